"""Let tests import the modules in scripts/: `assets` and `minilm`, which the demo uses too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

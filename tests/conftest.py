"""Let tests import the modules in scripts/: `assets` and `minilm`, which the demo uses too."""

import os
import sys
from pathlib import Path

# Before torch is imported: its idle threads sleep instead of spinning. On a machine with other work a small operation
# took 98 ms with spinning threads, and takes 5 ms with sleeping ones.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

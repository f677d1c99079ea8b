"""Run the command line as `python -m sparsify`."""

import sys

from sparsify.cli import main

sys.exit(main())

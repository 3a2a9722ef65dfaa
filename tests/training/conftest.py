"""The training scripts are no package: put their folder on the path."""

import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "training"
sys.path.insert(0, str(SCRIPTS))

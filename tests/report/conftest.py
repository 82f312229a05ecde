"""Reports are of the runs of tests/training, and looked at with the browser of tools/."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / "training"), str(ROOT / "tools")]

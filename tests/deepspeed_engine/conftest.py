"""These tests train the model and batches of tests/megatron, and start the runs of tests/training."""

import sys
from pathlib import Path

for name in ("megatron", "training"):
    sys.path.insert(0, str(Path(__file__).parents[1] / name))

"""The tiny models of `tests/model` are those of the sampling tests too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "model"))

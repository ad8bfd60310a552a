"""Where things lie. To be imported first: our modules lie in three folders."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benches"), str(ROOT / "tests")]
#: A quick look, and another model, are nobody's results but the looker's.
LOOK = any(name in os.environ for name in ("EXPERIMENTS_ROUNDS", "EXPERIMENTS_LARGE", "EXPERIMENTS_LIMIT_GIB"))
RESULTS = ROOT / ("target" if LOOK else "benches/results") / "experiments"

"""Where else our modules lie: to be imported first."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benches"), str(ROOT / "tests")]

"""How often everything is measured: BENCH_ROUNDS, or what fits into half an hour."""

import os

ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))

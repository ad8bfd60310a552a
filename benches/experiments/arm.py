"""One arm by hand: `python benches/experiments/arm.py onecopy --model t5-small --processes 4 --phases 4x8,1x10 --limit 3GiB`.

Arms are those of arms.py, models those of models.py; 4x8 are 8 batches of 4 in each process.
"""

from __future__ import annotations

import paths  # noqa: F401 isort: skip (before what lies elsewhere)

import argparse
import json

from arms import ARMS
from ending import end_well

import running

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="+", choices=ARMS)
    parser.add_argument("--model", default="MiniLM")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--phases", type=phases, default=((16, 20),))
    parser.add_argument("--limit", type=size)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=0, help="how often a run is repeated that had busy neighbours")
    options = parser.parse_args()
    end_well()
    with running.prepared(options.model) as files:
        for _ in range(options.rounds):
            for arm in options.arms:
                facts = running.run(
                    arm, files[options.model], options.processes, options.phases, options.limit, options.repeats
                )
                print(json.dumps(facts), flush=True)


def phases(text: str) -> tuple[tuple[int, int], ...]:
    """As 4x8,1x10: 8 batches of 4, then 10 of 1, in each process."""
    return tuple((int(batch), int(calls)) for batch, _, calls in (one.partition("x") for one in text.split(",")))


def size(text: str) -> int:
    """As 3GiB or 500MiB."""
    return int(float(text[:-3]) * UNITS[text[-3:]])


if __name__ == "__main__":
    main()

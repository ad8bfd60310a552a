"""Row 9: eight fresh interpreters start at once; until all have predicted.

The limit: the same eight that import the same and no model, and one load besides.
"""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from company import SPARE, Cannot
from machine import available
from rounds import ROUNDS
from shapes import MIB, MOST, linears
from users import BEAM, file, namespace_in

# About BERT-base's size, without the seconds that importing transformers takes.
SHAPE = linears(min(512, MOST // MIB))
COUNT = 8
NOTHING, ONE = "nothing", "one load"
STARTER = Path(__file__).with_name("starter.py")


def start(arm, count, folder):
    """Seconds until the last is ready, and the most that one of them worked on the model."""
    began = time.perf_counter()
    those = [
        subprocess.Popen(
            [sys.executable, STARTER, arm, SHAPE.name, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for _ in range(count)
    ]
    try:
        lines = [one.stdout.readline() for one in those]
        spent = time.perf_counter() - began
        assert all(lines), f"{arm}: one of {count} failed"
        return spent, max(float(line) for line in lines)
    finally:
        for one in those:
            one.stdin.close()
        for one in those:
            one.wait()
            one.stdout.close()


@functools.cache
def measured():
    found = {arm: [] for arm in (*BEAM, "limit")}
    imported, loaded = [], []
    with file(SHAPE) as folder:
        # Once without looking: Python's compiled files, and the page cache.
        start(NOTHING, 1, folder)
        for _ in range(min(ROUNDS, 3)):
            imported.append(start(NOTHING, COUNT, folder)[0])
            loaded.append(start(ONE, 1, folder)[1])
            found["limit"].append(imported[-1] + loaded[-1])
            for arm in BEAM:
                if arm == "Beam Shared" and COUNT * SHAPE.size > available() - SPARE:
                    found[arm] = Cannot(f"{COUNT} x {SHAPE.size} bytes are not free")
                    continue
                with namespace_in(folder) as mine:
                    found[arm].append(start(arm, COUNT, mine)[0])
    return found


@pytest.mark.parametrize("arm", [*BEAM, "limit"])
def test_together(arm, play):
    found = measured()
    group = f"together {SHAPE.name}"
    if isinstance(found[arm], Cannot):
        play(group, arm, found[arm])
    play(group, arm, found[arm], ours=found["onecopy"], processes=COUNT, cpus=len(os.sched_getaffinity(0)))

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
from rounds import ROUNDS, in_common, shuffled
from shapes import MIB, MOST, linears
from users import USERS, file, lacking_for, namespace_in

# About BERT-base's size, without the seconds that importing transformers takes.
SHAPE = linears(min(512, MOST // MIB))
COUNT = 8
NOTHING, ONE = "nothing", "one load"
STARTER = Path(__file__).with_name("starter.py")


def start(arm, count, folder):
    """Seconds until the last is ready, the most that one of them worked on the model, and what they predicted."""
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
        said = [(*line.split(), b"")[:2] for line in lines]
        return spent, max(float(seconds) for seconds, _ in said), {output for _, output in said}
    finally:
        for one in those:
            one.stdin.close()
        for one in those:
            one.wait()
            one.stdout.close()


@functools.cache
def measured():
    """By arm: seconds, by round; and why there are none."""
    found = {arm: {} for arm in (*USERS, NOTHING, ONE)}
    cannot, outputs = {}, set()
    with file(SHAPE) as folder:
        # Once without looking: Python's compiled files, and the page cache.
        start(NOTHING, 1, folder)
        for number in range(min(ROUNDS, 3)):
            for arm in shuffled(found, number):
                if reason := lacking_for(arm, COUNT, SHAPE.size):
                    cannot[arm] = reason
                    continue
                with namespace_in(folder) as mine:
                    spent, most, said = start(arm, 1 if arm == ONE else COUNT, mine)
                found[arm][number] = most if arm == ONE else spent
                outputs |= said if arm != NOTHING else set()
                assert len(outputs) <= 1, f"{arm} answers something else"
    found["limit"] = {
        number: found[NOTHING][number] + one for number, one in found[ONE].items() if number in found[NOTHING]
    }
    return found, cannot


@pytest.mark.parametrize("arm", [*USERS, "limit"])
def test_together(arm, play):
    found, cannot = measured()
    seconds, ours = in_common(found[arm], found["onecopy"])
    play(
        f"together {SHAPE.name}",
        arm,
        seconds or cannot[arm],
        ours=ours,
        processes=COUNT,
        cpus=len(os.sched_getaffinity(0)),
    )

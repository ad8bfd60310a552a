"""Row 4: the registry's part of an attach by another process, by leases: lock, descriptor, lease row, mapping, no skeleton.

The core's own benchmark measures it, and says what else its columns are; each round is a run of it.
"""

import functools
import subprocess

import pytest
from rounds import ROUNDS

COLUMNS = ("attach", "let go", "cold", "acquire", "lease", "wait", "sweep")
LEASES = (1, 64, 512)
#: Seconds, at any number of leases.
GOALS = {"attach": 50e-6}


@functools.cache
def measured():
    """Seconds, by (what, leases)."""
    command = ["cargo", "bench", "--locked", "--quiet", "--package", "onecopy-core", "--bench", "registry"]
    found = {}
    for _ in range(min(ROUNDS, 5)):
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        for line in printed.splitlines():
            first, *rest = line.split()
            if first.isdigit():
                for what, microseconds in zip(COLUMNS, rest, strict=True):
                    found.setdefault((what, int(first)), []).append(float(microseconds) / 1e6)
            elif line.startswith("publish to attached"):
                found.setdefault("wake", []).append(float(rest[-2]) / 1e6)
    return found


@pytest.mark.parametrize("leases", LEASES)
@pytest.mark.parametrize("what", COLUMNS)
def test_registry(what, leases, play):
    goal = {"goal": GOALS[what]} if what in GOALS else {}
    play("registry", f"{what}, {leases} leases", measured()[what, leases], **goal)


def test_wake(play):
    play("registry", "publish to attached in a waiter", measured()["wake"])

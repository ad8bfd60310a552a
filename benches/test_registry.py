"""Row 4: the registry's part of an attach by another process, by leases. The core's own benchmark measures it."""

import functools
import subprocess

import pytest

COLUMNS = ("attach", "release", "wait", "sweep")
LEASES = (1, 64, 512)


@functools.cache
def measured():
    """Microseconds, by (what, leases)."""
    command = ["cargo", "bench", "--locked", "--quiet", "--package", "onecopy-core", "--bench", "registry"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in printed.splitlines():
        first, *rest = line.split()
        if first.isdigit():
            found.update({(what, int(first)): float(value) for what, value in zip(COLUMNS, rest, strict=True)})
        elif line.startswith("publish to attached"):
            found["wake", 1] = float(line.split()[-2])
    return found


@pytest.mark.parametrize("leases", LEASES)
@pytest.mark.parametrize("what", COLUMNS)
def test_registry(what, leases, play):
    play("registry", f"{what}, {leases} leases", [measured()[what, leases] / 1e6])


def test_wake(play):
    play("registry", "publish to attached in a waiter", [measured()["wake", 1] / 1e6])

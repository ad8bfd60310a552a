"""The harness of docs/experiments.md still runs what it says: whole jobs, counted in a group of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.beam

ARM = Path(__file__).parents[2] / "benches" / "experiments" / "arm.py"


def test_two_arms(group):
    command = [
        sys.executable,
        str(ARM),
        "shared",
        "onecopy",
        "--model",
        "tiny",
        "--processes",
        "2",
        "--phases",
        "1x5,2x3",
    ]
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE)
    shared, ours = (json.loads(line) for line in done.stdout.splitlines())
    assert [(run["arm"], run["rc"], run["loads"]) for run in (shared, ours)] == [("shared", 0, 2), ("onecopy", 0, 1)]
    assert shared["digest"] == ours["digest"] != 0
    for run in (shared, ours):
        assert [phase["calls"] for phase in run["steady"]] == [10, 6]
        assert 0 < run["first"] <= run["all_first"] < run["wall"]
        if group is not None:
            assert run["kills"] == 0
            assert run["peak"] > 100 << 20
            assert 0 < run["start_cpu"] < run["ready_cpu"] < run["first_cpu"] < run["cpu"]

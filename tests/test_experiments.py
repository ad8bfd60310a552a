"""The harness of docs/experiments.md still runs what it says: whole jobs, counted in a group of their own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "benches" / "experiments"
ARM = EXPERIMENTS / "arm.py"


def test_what_a_group_of_version_2_has_counted(tmp_path, monkeypatch):
    """This machine may have version 1: files as the kernel writes them."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import account
    import notes
    from cgroups import Group

    files = {
        "cpu.stat": "usage_usec 3000000\nuser_usec 2000000\nsystem_usec 1000000\n",
        "memory.stat": "anon 5\nfile 9\nkernel 4\nshmem 7\n",
        "memory.events": "low 0\noom 3\noom_kill 2\n",
        "memory.max": "max\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    counted = account.Account(Group(tmp_path, tmp_path), tmp_path)
    assert counted.cpu() == (2.0, 1.0)
    assert notes.read_cpu(counted.cpu_file) == 3.0
    assert (counted.unreclaimable(), counted.kills) == (12, 2)


@pytest.mark.beam
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

"""Containers and other walls, removed registries, and numbers of processes that are given out again."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Forked, wait_until
from tasks import SEGMENT, loads

BACKENDS = pytest.mark.parametrize("backend", ["memfd", "posix"])
SPACE = "default"
REGISTRY = f"onecopy-v1-{os.geteuid()}-{SPACE}"

Fork = Callable[[Forked], Forked]


def names(process: Forked, directory: str = "/dev/shm") -> list[str]:
    """What is in a directory that this process sees."""
    return sorted(path.name for path in Path(f"/proc/{process.pid}/root{directory}").iterdir())


def remove(process: Forked, name: str) -> None:
    Path(f"/proc/{process.pid}/root/dev/shm/{name}").unlink()


# -- The registry's file is removed under those who live in it: by hand, or by systemd at logout (RemoveIPC).


@BACKENDS
def test_who_holds_something_comes_back_by_itself(machine, fork, log, backend):
    """Nobody touches onecopy after the file is gone, and still the next one finds the model."""
    one, two = fork(machine), fork(machine)
    value = one("acquire", SPACE, "model", log, backend=backend)[0]
    two("acquire", SPACE, "model", log, backend=backend)
    for turn in range(2):
        remove(machine, REGISTRY)
        wait_until(lambda: REGISTRY in names(machine))
        wait_until(lambda: machine("holders", SPACE) == sorted((one.pid, two.pid)))
        assert fork(machine)("acquire", SPACE, f"other {turn}", log)[1] == "publisher"
        third = fork(machine)
        assert third("acquire", SPACE, "model", log, backend=backend)[:2] == (value, "attacher")
        third.end("exit_cleanly")
        assert loads(log) == 2 + turn
    one.kill()
    assert two("total", "model") == value
    two.end("exit_cleanly")
    wait_until(lambda: sorted(machine("sweep", SPACE)) == ["other 0", "other 1"])


def test_all_names_are_removed_as_at_a_logout(machine, fork, log):
    """Those who have the model mapped go on, what comes next loads once; a memfd has no name to lose."""
    first, second = fork(machine), fork(machine)
    value = first("acquire", SPACE, "named", log, backend="posix")[0]
    second("acquire", SPACE, "unnamed", log, backend="memfd")
    for name in names(machine):
        remove(machine, name)
    wait_until(lambda: machine("holders", SPACE, "unnamed") == [second.pid])
    wait_until(lambda: machine("holders", SPACE, "named") == [first.pid])
    later = [fork(machine) for _ in range(3)]
    roles = [process("acquire", SPACE, "named", log, backend="posix")[1] for process in later]
    assert roles == ["publisher", "attacher", "attacher"]
    assert {process("acquire", SPACE, "unnamed", log)[1] for process in later} == {"attacher"}
    assert first("total", "named") == value
    assert loads(log) == 3
    for process in (first, second, *later):
        process.end("exit_cleanly")
    wait_until(lambda: machine("sweep", SPACE) == [] and names(machine) == [REGISTRY])


@BACKENDS
def test_the_file_is_removed_while_one_loads_and_one_waits(machine, fork, log, tmp_path, backend):
    """The loader's model is its own; the waiter loads for all who come later."""
    gate = tmp_path / "gate"
    loader, waiter = fork(machine), fork(machine)
    waiter("hear")
    loader("hear")
    loader.start("acquire_gated", SPACE, "model", log, str(gate), backend)
    wait_until(lambda: loads(log) == 1)
    waiter.start("acquire_gated", SPACE, "model", log, str(gate), backend)
    remove(machine, REGISTRY)
    wait_until(lambda: loads(log) == 2)
    gate.touch()
    (value, role), (other_value, other_role) = loader.result(), waiter.result()
    assert value == other_value
    assert sorted([role, other_role]) in (["private", "publisher"], ["attacher", "publisher"])
    later = fork(machine)
    later("hear")  # of another constructor
    assert later("acquire", SPACE, "model", log, backend=backend)[:2] == (value, "attacher")
    assert loads(log) == 2
    for process in (loader, waiter, later):
        process.end("exit_cleanly")
    wait_until(lambda: machine("sweep", SPACE) == [] and names(machine) == [REGISTRY])


# -- Mount and PID namespaces, and containers, which are both and more.


@pytest.fixture
def contain(hatch: Callable[[], Forked], fork: Fork, machine: Forked) -> Callable[..., tuple[Forked, Fork]]:
    """A container: its first process, and how to have more in it. `inside`: whose /dev/shm it sees as well."""

    def make(*walls: str, inside: Forked | None = None, root: int = 0) -> tuple[Forked, Fork]:
        runtime = hatch() if inside is None else fork(inside)
        runtime("apart", *walls, root=root)
        first = fork(runtime)
        if root:
            first("become", 0)
        if "pid" in walls:
            first("own_proc")
        first("hear")

        def another(_: object = None) -> Forked:
            process = fork(runtime)
            process("hear")
            return process

        return first, another

    del machine  # says why this is skipped where it is
    return make


def test_two_mount_namespaces_see_one_directory_under_two_names(machine, fork, log, contain):
    """A memfd is found through /proc, whatever the registry's directory is called."""
    machine("own_shm", "/dev/shm/volume")
    value, role = None, "publisher"
    for path in ("/dev/shm/volume", "/proc/self/root/dev/shm/volume"):
        process, _ = contain("mount", inside=machine)
        process("environment", "ONECOPY_DIR", path)
        total, seen, backend, _ = process("acquire", SPACE, "model", log)
        assert (seen, backend) == (role, "memfd")
        assert value in (None, total)
        value, role = total, "attacher"
    assert loads(log) == 1
    assert names(machine, "/dev/shm/volume") == [REGISTRY]


@pytest.mark.parametrize("first_is", ["around", "inside"])
def test_two_pid_namespaces_over_one_directory(machine, fork, log, contain, first_is):
    """Pids of the one mean nothing in the other: what has a name is shared, what has none is not."""
    around = fork(machine)
    around("hear")
    inside, more_inside = contain("mount", "pid", inside=machine)
    assert inside("pid") == 1
    one, two = (around, inside) if first_is == "around" else (inside, around)

    value = one("acquire", SPACE, "unnamed", log, backend="memfd")[0]
    assert one("heard") == []
    assert two("acquire", SPACE, "unnamed", log)[:3] == (value, "private", "private")
    (warning,) = two("heard")
    assert 'its holders live in other PID namespaces; backend="posix" reaches across' in warning
    assert loads(log) == 2

    # Both are in the table now: the one who loads takes what the other can open, without being told.
    assert two("acquire", SPACE, "auto", log)[1:3] == ("publisher", "posix")
    assert one("acquire", SPACE, "auto", log)[1:3] == ("attacher", "posix")
    third = more_inside()
    assert third("acquire", SPACE, "auto", log)[:2] == (value, "attacher")
    assert loads(log) == 3

    # The life of a holder is a lock, which is seen through every wall.
    third.kill()
    two.kill()
    wait_until(lambda: len(one("holders", SPACE, "auto")) == 1)
    assert one("total", "auto") == value
    one.kill()
    wait_until(lambda: machine("sweep", SPACE) == [] and names(machine) == [REGISTRY])


def test_a_loader_in_another_pid_namespace_is_waited_for_and_its_death_is_seen(machine, fork, log, contain):
    """Its /proc is another one: a live process of ours has its number."""
    around = fork(machine)
    inside, _ = contain("mount", "pid", inside=machine)
    inside.start("acquire", SPACE, "model", log, seconds=600.0, backend="posix")
    wait_until(lambda: loads(log) == 1)
    around.start("acquire", SPACE, "model", log, backend="posix")
    time.sleep(0.2)
    inside.kill()
    assert around.result()[1] == "publisher"
    assert loads(log) == 2


CONTAINER = ("user", "mount", "pid", "ipc")


def test_containers_that_share_a_volume(machine, fork, log, contain):
    """As of one pod: user, mount, PID and IPC namespaces of their own, and one directory in memory between them."""
    machine("own_shm", "/dev/shm/volume")
    processes = []
    kin = []
    for _ in range(2):
        first, another = contain(*CONTAINER, inside=machine)
        processes += [first, another()]
        kin.append((first, processes[-1]))
    for process in processes:
        process("environment", "ONECOPY_DIR", "/dev/shm/volume")
    answers = [process("acquire", SPACE, "model", log, backend="posix") for process in processes]
    assert [answer[1:3] for answer in answers] == [("publisher", "posix")] + [("attacher", "posix")] * 3
    assert len({total for total, *_ in answers}) == 1
    assert len(names(machine, "/dev/shm/volume")) == 2
    # A container ends with its first process.
    kin[0][0].kill()
    wait_until(kin[0][1].gone)
    survivor = kin[1][1]
    wait_until(lambda: len(survivor("holders", SPACE)) == 2)
    assert survivor("total", "model") == answers[0][0]
    assert loads(log) == 1
    assert all(process("heard") == [] for process in kin[1])
    survivor.end("exit_cleanly")
    kin[1][0].end("exit_cleanly")
    wait_until(lambda: names(machine, "/dev/shm/volume") == [REGISTRY])


def test_containers_that_share_nothing(log, contain):
    """The usual set-up: a copy in each, no error, and nobody is told anything."""
    containers = []
    for _ in range(2):
        first, another = contain(*CONTAINER)
        first("own_shm")
        containers.append((first, another()))
    for first, second in containers:
        assert first("acquire", SPACE, "model", log)[1:3] == ("publisher", "memfd")
        assert second("acquire", SPACE, "model", log)[1:3] == ("attacher", "memfd")
        assert first("holders", SPACE) == [1, second("pid")]
        assert names(first) == [REGISTRY]
        assert first("heard") == second("heard") == []
    assert loads(log) == 2


def test_a_container_whose_root_is_somebody_else_outside(machine, fork, log, contain):
    """Rootless, with the host's /dev/shm: what is there is nobody's, as seen from inside. It says so and goes on."""
    outside = fork(machine)
    value = outside("acquire", SPACE, "model", "/dev/null")[0]
    inside, _ = contain("user", "mount", "pid", inside=machine, root=12_003)
    total, role, *_ = inside("acquire", SPACE, "model", "/dev/null")
    assert (total, role) == (value, "private")
    (warning,) = inside("heard")
    assert re.search(r"/dev/shm\S*: owner 65534|belongs to user 65534", warning)
    assert "ONECOPY_DIR" in warning or "Use a directory" in warning
    assert outside("holders", SPACE) == [outside.pid]


# -- A dead holder's number is given to another process, which has a descriptor of the same number.


@pytest.mark.parametrize("row", ["dead", "kept by a child that nobody told"])
def test_a_number_that_is_given_out_again_is_not_its_holder(machine, fork, log, contain, row, tmp_path):
    """The row is believed dead by its lock; and where a raw clone keeps the lock, what is found under the number is not taken."""
    first, another = contain("mount", "pid", inside=machine)
    holder = another()
    value = holder("acquire", SPACE, "model", log, backend="memfd")[0]
    number = holder("pid")
    (descriptor,) = [int(link.name) for link in _descriptors(holder) if SEGMENT.search(str(link.readlink()))]
    if row != "dead":
        clone = holder("fork_without_handlers")
    _give_away(first, another, holder, number)
    stranger = another()
    assert stranger("pid") == number, "it did not wrap"
    other_file = tmp_path / "other"
    other_file.write_bytes(b"x" * 8192)
    stranger("open_at", descriptor, str(other_file))
    assert first("holders", SPACE) == ([] if row == "dead" else [number])
    assert first("acquire", SPACE, "model", log)[:2] == (value, "publisher")
    assert loads(log) == 2
    assert first("holders", SPACE) == [1]
    assert stranger("acquire", SPACE, "model", log)[:2] == (value, "attacher")
    if row != "dead":
        first("end_process", clone)


def test_a_loaders_number_that_is_given_out_again_is_not_the_loader(machine, fork, log, contain):
    first, another = contain("mount", "pid", inside=machine)
    loader, waiter = another(), another()
    number = loader("pid")
    loader.start("acquire", SPACE, "model", log, seconds=600.0)
    wait_until(lambda: loads(log) == 1)
    waiter.start("acquire", SPACE, "model", log)
    _give_away(first, another, loader, number)
    assert another()("pid") == number
    assert waiter.result()[1] == "publisher"


def _descriptors(process: Forked) -> list[Path]:
    return list(Path(f"/proc/{process.pid}/fd").iterdir())


def _give_away(first: Forked, another: Callable[[], Forked], dead: Forked, number: int) -> None:
    """The number of `dead`, to whoever is forked next."""
    dead.kill()
    wait_until(lambda: not Path(f"/proc/{dead.pid}").exists())
    first("next_pid", number)

"""Servers that load before they fork, pools of workers, and programs that outlive who started them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import Forked, Other, wait_until
from tasks import loads

import onecopy

BACKENDS = pytest.mark.parametrize("backend", ["memfd", "posix"])


def holders(namespace: str) -> list[int]:
    return sorted(who[0] for row in onecopy.Store(namespace).list() for who in row.holders)


def freed(namespace: str) -> bool:
    store = onecopy.Store(namespace)
    store.sweep()
    return not store.list() and not list(Path("/dev/shm").glob(f"onecopy-v1-{os.geteuid()}-{namespace}-*"))


@BACKENDS
def test_a_server_that_loads_before_it_forks(namespace, log, hatch, fork, backend):
    """As gunicorn does with --preload: workers infer, ask for the model by its name, are replaced, and outlive the master."""
    master = hatch()
    value = master("acquire", namespace, "model", log, backend=backend)[0]
    workers = [fork(master) for _ in range(4)]

    def infer(worker: Forked) -> None:
        assert worker("total", "model") == value
        assert worker("acquire", namespace, "model", log, backend=backend)[0] == value

    for worker in workers:
        infer(worker)
    for turn in range(4):  # one after another, half of them killed
        leaver = workers.pop(0)
        leaver.kill() if turn % 2 else leaver.end("exit_holding")
        workers.append(fork(master))
        infer(workers[-1])
        wait_until(lambda: holders(namespace) == sorted(process.pid for process in (master, *workers)))
    master.kill()
    wait_until(lambda: holders(namespace) == sorted(worker.pid for worker in workers))
    for worker in workers:
        infer(worker)
    stranger = hatch()
    assert stranger("acquire", namespace, "model", log, backend=backend)[:2] == (value, "attacher")
    stranger.end("exit_cleanly")
    for worker in workers[:-1]:
        worker.kill()
    wait_until(lambda: holders(namespace) == [workers[-1].pid])
    infer(workers[-1])
    workers[-1].end("exit_holding")
    assert freed(namespace)
    assert loads(log) == 1


@BACKENDS
@pytest.mark.parametrize("close_fds", [True, False])
def test_a_program_that_outlives_who_started_it_keeps_nothing(namespace, log, backend, close_fds):
    parent = Other()
    parent("acquire", namespace, "model", log, backend=backend)
    program = parent("start_program", close_fds)
    try:
        opened = [str(link.readlink()) for link in Path(f"/proc/{program}/fd").iterdir()]
        assert opened
        assert [name for name in opened if "onecopy-v" in name] == []
        assert holders(namespace) == [parent.pid]
        parent.kill()
        wait_until(lambda: holders(namespace) == [])
        assert freed(namespace)
        assert Path(f"/proc/{program}/exe").readlink().name == "sleep", "it lives"
    finally:
        os.kill(program, 9)
        parent.close()


def test_data_loader_workers_that_are_spawned(namespace, log, hatch):
    """A holder travels in the dataset, as any small thing does; the model is attached over there."""
    pytest.importorskip("torch")
    parent = hatch()
    seen, here = parent("load_data_in_spawned", namespace, "model", log)
    assert {(role, worker) for _, role, worker in seen} == {("attacher", 0), ("attacher", 1)}
    assert [value for value, *_ in seen] == pytest.approx(here)
    assert loads(log) == 1
    wait_until(lambda: holders(namespace) == [parent.pid])
    parent("release", "model")
    wait_until(lambda: freed(namespace))

"""A forked child has what its parent had: the weights, a lease of its own, and nothing else."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Forked, Other, wait_until
from tasks import Model, loads

import onecopy

BACKENDS = pytest.mark.parametrize("backend", ["memfd", "posix"])


@pytest.fixture
def sockets(tmp_path: Path) -> Path:
    folder = tmp_path / "s"
    folder.mkdir()
    return folder


def holders(namespace: str, tag: str = "model") -> list[int]:
    """Who holds it. The dead are buried at the first look after their last thread is gone."""
    store = onecopy.Store(namespace)
    return sorted(who[0] for row in store.list() if row.tag == tag for who in row.holders)


def segments(namespace: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"onecopy-v1-{os.geteuid()}-{namespace}-*")]


def freed(namespace: str) -> bool:
    """Nothing but what the killed left, which goes by a sweep."""
    store = onecopy.Store(namespace)
    store.sweep()
    return not store.list() and not segments(namespace)


# -- Parent, child, grandchild.


@BACKENDS
def test_a_child_uses_what_it_inherits_and_has_a_lease_of_its_own(namespace, log, sockets, backend):
    with Other() as parent:
        value = parent("acquire", namespace, "model", log, backend=backend)[0]
        with Forked(parent, sockets) as child:
            assert child("total", "model") == value
            assert holders(namespace) == sorted((parent.pid, child.pid))
            assert child("acquire", namespace, "model", log, backend=backend)[0] == value
            child("release", "model")
            wait_until(lambda: holders(namespace) == [parent.pid])
            assert child("segments_here") == []
            assert child("acquire", namespace, "model", log, backend=backend)[:2] == (value, "attacher")
            assert child("acquire", namespace, "other", log, backend=backend)[1] == "publisher"
            assert parent("acquire", namespace, "other", log, backend=backend)[1] == "attacher"
            assert loads(log) == 2
        wait_until(lambda: holders(namespace) == [parent.pid])
        assert parent("total", "model") == parent("total", "other") == value
    wait_until(lambda: freed(namespace))


DAEMON = """
import os, sys
import onecopy, tasks
namespace, log, backend, remove = sys.argv[1:]
holder = onecopy.Holder(lambda: tasks.counted(log), "model", store=onecopy.Store(namespace, backend=backend))
model = holder.acquire()
if remove == "True":
    onecopy.Store(namespace).remove("model")
if os.fork():
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@BACKENDS
@pytest.mark.parametrize("removed", [False, True])
def test_a_daemon_has_what_its_parent_had(namespace, log, backend, removed):
    """The parent ends as soon as it has forked. The child enters the table, which sweeps what the dead had: not before it
    has taken that over. A name that was taken away stays away."""
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, namespace, log, backend, str(removed)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
    )
    with daemon:
        pid = int(daemon.stdout.readline())
        wait_until(lambda: holders(namespace) == [pid])
        with Other() as other:
            role = other("acquire", namespace, "model", log, backend=backend)[1]
            assert role == ("publisher" if removed else "attacher")
        assert loads(log) == 1 + removed
    wait_until(lambda: freed(namespace))


@BACKENDS
@pytest.mark.parametrize("parent_ends", ["killed", "exits", "lets go"])
def test_the_parent_goes_first(namespace, log, sockets, backend, parent_ends):
    parent = Other()
    value = parent("acquire", namespace, "model", log, backend=backend)[0]
    with Forked(parent, sockets) as child, Forked(child, sockets) as grandchild:
        assert holders(namespace) == sorted((parent.pid, child.pid, grandchild.pid))
        if parent_ends == "killed":
            parent.kill()
        elif parent_ends == "exits":
            assert parent.close() == ""
        else:
            parent("release", "model")
        wait_until(lambda: holders(namespace) == sorted((child.pid, grandchild.pid)))
        child.kill()
        wait_until(lambda: holders(namespace) == [grandchild.pid])
        assert grandchild("total", "model") == value
        with Other() as stranger:
            assert stranger("acquire", namespace, "model", log, backend=backend)[:2] == (value, "attacher")
        assert grandchild("acquire", namespace, "model", log, backend=backend)[0] == value
        assert loads(log) == 1
        grandchild("release", "model")
        wait_until(lambda: freed(namespace))
    parent.close()


@BACKENDS
@pytest.mark.parametrize("end", ["exit_cleanly", "exit_holding"])
def test_the_child_goes_first_by_itself(namespace, log, sockets, backend, end):
    """A child that exits as Python programs do leaves the table by itself: nobody has to look for it."""
    with Other() as parent:
        value = parent("acquire", namespace, "model", log, backend=backend)[0]
        with Forked(parent, sockets) as child:
            child.end(end)
            assert parent("reap", child.pid) == 0
            (row,) = onecopy.Store(namespace).list()
            assert [who[0] for who in row.holders] == [parent.pid]
        assert parent("total", "model") == value
    assert loads(log) == 1


@BACKENDS
def test_the_last_child_exits_and_leaves_nothing(namespace, log, sockets, backend):
    with Other() as parent:
        parent("acquire", namespace, "model", log, backend=backend)
        with Forked(parent, sockets) as child:
            parent("release", "model")
            wait_until(lambda: holders(namespace) == [child.pid])
            child.end("exit_holding")
            assert parent("reap", child.pid) == 0
            assert segments(namespace) == []
            assert freed(namespace)


@BACKENDS
def test_a_chain_of_ten_generations(namespace, log, sockets, backend):
    with Other() as first:
        value = first("acquire", namespace, "model", log, backend=backend)[0]
        chain: list[Any] = [first]
        for _ in range(10):
            chain.append(Forked(chain[-1], sockets))
        assert holders(namespace) == sorted(link.pid for link in chain)
        for link in chain[1:-1]:
            link.kill()
        wait_until(lambda: holders(namespace) == sorted((first.pid, chain[-1].pid)))
        first("release", "model")
        wait_until(lambda: holders(namespace) == [chain[-1].pid])
        assert chain[-1]("total", "model") == value
        for link in chain[1:]:
            link.__exit__()
    wait_until(lambda: freed(namespace))
    assert loads(log) == 1


def test_a_published_objects_own_tensors_are_held_by_the_child(namespace, sockets, hatch):
    """They lie on the mapping through which the segment was filled, which is another than the one that others see."""
    pytest.importorskip("torch")
    parent = hatch()
    total = parent("torch_publish_own", namespace, "model")
    assert holders(namespace) == [parent.pid]
    with Forked(parent, sockets) as child:
        assert holders(namespace) == sorted((parent.pid, child.pid))
        parent("release", "own")
        wait_until(lambda: holders(namespace) == [child.pid])
        assert child("torch_own_total") == total
        assert onecopy.Store(namespace).verify("model") >= 1 << 20, "it is good for others"
        child("release", "own")
        wait_until(lambda: freed(namespace))
    parent("leave", namespace)


def test_data_loader_workers_that_are_forked(namespace, hatch):
    pytest.importorskip("torch")
    parent = hatch()
    parent("torch_publish", namespace, "model", 512)
    assert len(parent("load_data", namespace, "model", 2)) == 8
    wait_until(lambda: holders(namespace) == [parent.pid])
    parent("release", "model")
    wait_until(lambda: freed(namespace))


# -- While other threads of the parent are busy: the child has none of them, and their locks may be held for ever.


def test_fork_while_a_thread_loads(namespace, log, sockets, tmp_path):
    gate = tmp_path / "gate"
    with Other() as parent:
        parent("start", "acquire_gated", namespace, "model", log, str(gate))
        wait_until(lambda: loads(log) == 1)
        with Forked(parent, sockets) as one, Forked(parent, sockets) as two:
            one.start("acquire_gated", namespace, "model", log, str(gate))
            two.start("acquire_gated", namespace, "model", log, str(gate))
            gate.touch()
            value, role = parent("finish", "acquire_gated")
            assert role == "publisher"
            assert one.result() == two.result() == (value, "attacher")
            assert holders(namespace) == sorted((parent.pid, one.pid, two.pid))
    assert loads(log) == 1


def test_fork_while_a_thread_loads_and_the_parent_dies(namespace, log, sockets, tmp_path):
    gate = tmp_path / "gate"
    with Other() as parent:
        parent("start", "acquire_gated", namespace, "model", log, str(gate))
        wait_until(lambda: loads(log) == 1)
        with Forked(parent, sockets) as child:
            child.start("acquire_gated", namespace, "model", log, str(gate))
            parent.kill()
            gate.touch()
            assert child.result()[1] == "publisher"
            assert loads(log) == 2


def test_fork_while_a_thread_waits(namespace, log, sockets, tmp_path):
    gate = tmp_path / "gate"
    with Other() as loader, Other() as parent:
        loader.start("acquire_gated", namespace, "model", log, str(gate))
        wait_until(lambda: loads(log) == 1)
        parent("start", "acquire_gated", namespace, "model", log, str(gate))
        with Forked(parent, sockets) as child, Forked(child, sockets) as grandchild:
            child.start("acquire_gated", namespace, "model", log, str(gate))
            grandchild.start("acquire_gated", namespace, "model", log, str(gate))
            gate.touch()
            value, role = loader.result()
            assert role == "publisher"
            assert parent("finish", "acquire_gated") == child.result() == grandchild.result() == (value, "attacher")
    assert loads(log) == 1


def test_fork_while_a_thread_has_the_registrys_lock(namespace, log):
    with Other() as parent:
        value = parent("acquire", namespace, "model", log)[0]
        parent("start", "look_all_the_time", namespace)
        assert parent("fork_many", 30, namespace, "model", log) == [0] * 30
        assert parent("total", "model") == value
        with Other() as stranger:
            assert stranger("acquire", namespace, "model", log)[:2] == (value, "attacher")
        parent("release", "looking")
        parent("finish", "look_all_the_time")
        assert holders(namespace) == [parent.pid]
    assert loads(log) == 1


@BACKENDS
def test_fork_while_a_thread_publishes(namespace, log, sockets, tmp_path, backend):
    """The child inherits a mapping of something that nobody knows yet. It keeps its pages, and nobody from publishing."""
    gate = tmp_path / "gate"
    with Other() as parent:
        parent("start", "acquire_paused", namespace, "model", log, str(gate), backend)
        wait_until(Path(log).exists)
        with Forked(parent, sockets) as child:
            assert holders(namespace) == []
            child.start("acquire", namespace, "model", log, backend=backend)
            gate.touch()
            value, role = parent("finish", "acquire_paused")
            assert role == "publisher"
            assert child.result()[:2] == (value, "attacher")
            child("release", "model")
            parent("release", "model")
            wait_until(lambda: freed(namespace))
            assert child("acquire", namespace, "model", log, backend=backend)[1] == "publisher"


@BACKENDS
def test_fork_while_the_parent_lingers(namespace, log, sockets, backend):
    """The linger is the parent's: the child does not know that model."""
    with Other() as parent:
        value = parent("acquire", namespace, "model", log, backend=backend, linger=600.0)[0]
        parent("release", "model")
        parent("settle")
        assert holders(namespace) == [parent.pid]
        with Forked(parent, sockets) as child:
            assert child("segments_here") == []
            assert holders(namespace) == [parent.pid]
            assert child("acquire", namespace, "model", log, backend=backend)[:2] == (value, "attacher")
    assert loads(log) == 1


@BACKENDS
def test_fork_while_the_pages_of_a_new_model_are_made_huge(namespace, log, sockets, backend):
    """That takes a second for each GiB after READY, when servers fork their workers."""
    with Other() as parent:
        parent("acquire", namespace, "model", log, backend=backend, mib=96)
        for _ in range(4):
            with Forked(parent, sockets) as child:
                child("release", "model")
                wait_until(lambda: holders(namespace) == [parent.pid])
                assert child("segments_here") == []


@BACKENDS
def test_fork_while_the_pages_of_an_attached_model_are_mapped(namespace, sockets, backend):
    """A native thread does that in the first moments; in the child it must not hold the model for ever."""
    with Other() as publisher, Other() as parent:
        for turn in range(3):
            tag = f"model {turn}"
            publisher("publish", namespace, tag, 1.0, backend=backend, mib=96)
            with Forked(parent, sockets, "attach_and_fork", namespace, tag) as child:
                child("release", tag)
                wait_until(lambda tag=tag: holders(namespace, tag) == sorted((publisher.pid, parent.pid)))
                assert child("segments_here") == []
            parent("release", tag)
            wait_until(lambda tag=tag: holders(namespace, tag) == [publisher.pid])


def test_fork_while_a_thread_rebuilds(namespace, sockets, tmp_path):
    """The collector pauses while an object is rebuilt, and a child of that moment would never collect."""
    gate = tmp_path / "gate"
    with Other() as publisher, Other(ONECOPY_TEST_GATE=str(gate)) as parent:
        publisher("publish_slow", namespace, "model")
        parent("start", "attach", namespace, "model")
        wait_until((tmp_path / "gate.begun").exists)
        assert not parent("collects")
        with Forked(parent, sockets) as child:
            assert child("collects")
            gate.touch()
            assert child("attach", namespace, "model") == parent("finish", "attach")
            assert parent("collects")


def test_a_child_forked_by_a_constructor_exits(namespace, tmp_path):
    """It unwinds through our own call, which is its parent's."""
    script = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import onecopy, tasks
store = onecopy.Store({namespace!r})
def constructor():
    child = os.fork()
    if child == 0:
        sys.exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    return tasks.Model(1.0)
holder = onecopy.Holder(constructor, "model", store=store)
holder.acquire()
assert holder.info.role == "publisher", holder.info
assert len(store.show("model")[0].holders) == 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert freed(namespace)


# -- multiprocessing, and programs that are started.


@pytest.mark.parametrize(
    ("method", "held"), [("fork", True), ("forkserver", True), ("spawn", True), ("fork", False), ("spawn", False)]
)
def test_pools(namespace, log, method, held):
    with Other() as parent:
        if held:
            value = parent("acquire", namespace, "model", log)[0]
        done = parent("acquire_in_pool", method, 2, namespace, "model", log)
        assert len({total for total, _ in done}) == 1
        if held:
            assert {total for total, _ in done} == {value}
            assert loads(log) == 1
            assert holders(namespace) == [parent.pid]
        else:
            # A worker's lease ends with the worker: the next one may have come too late for it.
            assert 1 <= loads(log) <= 2
            assert holders(namespace) == []


@BACKENDS
@pytest.mark.parametrize("how", ["popen", "open descriptors", "preexec_fn", "posix_spawn", "system", "fork and exec"])
def test_programs_inherit_nothing(namespace, log, how, backend):
    with Other() as other:
        value = other("acquire", namespace, "model", log, backend=backend)[0]
        opened = other("descriptors_of_a_child", how)
        assert opened, "nothing was seen"
        assert [name for name in opened if "onecopy" in name and str(Path(log).parent) not in name] == []
        assert holders(namespace) == [other.pid]
        assert other("total", "model") == value


def test_a_daemon_that_closes_everything(namespace, log, sockets):
    """Twice forked, all descriptors closed: the weights are there, and the next acquire is as good as any."""
    with Other() as first:
        value = first("acquire", namespace, "model", log)[0]
        with Forked(first, sockets) as middle, Forked(middle, sockets) as daemon:
            middle.end("exit_holding")
            daemon("close_all_but_channels")
            assert daemon("total", "model") == value
            assert daemon("acquire", namespace, "other", log)[1] == "publisher"
            assert daemon("acquire", namespace, "model", log)[0] == value
            first.kill()
            assert daemon("total", "model") == value
            with Other() as stranger:
                assert stranger("acquire", namespace, "other", log)[1] == "attacher"


def test_this_process_forks(namespace):
    """Not a fresh one: with threads, torch and pytest in it. Its children end without a word."""
    lease = onecopy.Store(namespace).publish("model", Model(2.0))
    children = []
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(0 if lease.object.total() == 2.0 * (4 << 20) / 8 else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 5
    assert holders(namespace) == [os.getpid()]
    del lease
    gc.collect()
    wait_until(lambda: freed(namespace))

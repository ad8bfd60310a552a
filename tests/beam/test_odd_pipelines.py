"""Little room and odd kernels under Beam: a pipeline that runs without the wrapper runs with it.

Each surrounding is proved to be one in which a pipeline can run: the plain handler runs there first. Another user, and what
needs one (hidepid), are in `tests/test_odd_kernels.py` alone: Beam imports while it runs, and the interpreter may lie where
no other user can read.
"""

import re

import pytest
import surroundings
from processes import Other, wait_until
from test_odd_kernels import EXPECTED

WHY_NOT = surroundings.impossible()
pytestmark = [pytest.mark.odd, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]

MIB = 80
NOT_HERE = {"another user", "hidepid=2"}
#: What a pipeline needs beside the model, or it could not run: threads reserve their stacks and arenas.
MORE = {
    "RLIMIT_AS with room for one model": ({"spare": 1200}, 800),
    "RLIMIT_DATA with room for one model": ({"spare": 500}, 300),
}
IN_SHARE = "the model of beam_handlers.Sum is not shared: "
EACH = "Each process has a copy of its own, as without the wrapper; with ONECOPY=off sharing is not tried"


@pytest.fixture(scope="session")
def beamy():
    """Has imported Beam, and run nothing yet."""
    with Other() as other:
        other("import_all", "odd_jobs", "surroundings")
        yield other


@pytest.fixture
def born(beamy, fork):
    """Another process with Beam in it."""
    return lambda parent=beamy: fork(parent)


def results(mib):
    return [x + float(mib << 17) for x in range(4)]


@pytest.mark.parametrize("name", [name for name in EXPECTED if name not in NOT_HERE])
def test_a_pipeline_runs_wherever_it_runs_without_us(namespace, name, born, tmp_path):
    (backend, why), _ = EXPECTED[name]
    how, mib = MORE.get(name, ({}, MIB))
    room = born()
    room("call", "surroundings", "enter", name, **how)
    plain, first, second = (born(room) for _ in range(3))
    ask = ("call", "odd_jobs", "pipeline")
    assert plain(*ask, str(tmp_path / "plain"), namespace, mib, wrapped=False).results == results(mib)
    plain.kill()
    ran = [process(*ask, str(tmp_path / name), namespace, mib) for process, name in ((first, "1"), (second, "2"))]
    assert [one.results for one in ran] == [results(mib)] * 2
    if backend != "private":
        assert [one.shared for one in ran] == [(1, 0, 0), (0, 1, 0)]
        assert [one.warnings for one in ran] == [[], []]
        return
    for one in ran:
        assert one.shared == (0, 0, 1)
        (warning,) = one.warnings
        assert re.match(IN_SHARE + why, warning), warning
        assert warning.endswith(EACH)


def test_a_holder_that_may_not_be_reached(namespace, born, tmp_path):
    room = born()
    room("call", "surroundings", "enter", "own /dev/shm")
    holder, worker = born(room), born(room)
    worker("call", "surroundings", "drop_capabilities")
    assert holder("call", "odd_jobs", "load", namespace, 4) == "publisher"
    ran = worker("call", "odd_jobs", "pipeline", str(tmp_path / "run"), namespace, 4)
    assert (ran.results, ran.shared) == (results(4), (0, 0, 1))
    (warning,) = ran.warnings
    assert re.match(rf"{IN_SHARE}process {holder.pid} \(\S+\) has it, and /proc/{holder.pid}/fd may not be", warning)


@pytest.mark.parametrize("large_model", [False, True])
def test_after_two_killed_loaders_comes_the_next_rung(namespace, group, born, tmp_path, large_model):
    """The kernel kills two that fill a segment. The third would be killed again: it does without one, and fits."""
    if group is None or group.v2:
        pytest.skip("no memory cgroup of version 1 can be made here")
    members = first, second, third, strict = [born() for _ in range(4)]
    for process in members:
        group.add(process.pid)
    squeezed = str(group.path / "memory.limit_in_bytes"), 8 << 20
    ample = group.usage + (512 << 20)
    for kills, process in enumerate((first, second), start=1):
        group.limit = ample
        process.start("call", "odd_jobs", "load", namespace, MIB, squeezed, large_model=large_model)
        with pytest.raises(EOFError):
            process.result()
        wait_until(process.gone)
        assert group.kills() == kills
    group.limit = ample
    ran = third("call", "odd_jobs", "pipeline", str(tmp_path / "run"), namespace, MIB, large_model=large_model)
    assert (ran.results, ran.shared) == (results(MIB), (0, 0, 1))
    (warning,) = ran.warnings
    assert re.match(
        IN_SHARE
        + r"2 loaders of .* in a row were killed for lack of memory \(\d+ bytes were reserved; \d+ bytes are free",
        warning,
    )
    rung = "Beam's MultiProcessShared holds the one copy" if large_model else "Each process has a copy of its own"
    assert rung in warning
    assert group.kills() == 2
    with pytest.raises(Exception, match=r"LoaderKilledError: .*2 loaders of .* were killed .* makes this an error"):
        strict("call", "odd_jobs", "load", namespace, MIB, on_unshareable="raise")


def test_beams_torch_handler_is_loaded_and_published_at_one_model(namespace, group, born, tmp_path):
    """Beam's own way of loading, with the module and its state dict in memory, is killed where ours has room to spare."""
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    for map_weights in (True, False):
        process = born()
        ask = ("call", "odd_jobs", "load_torch", str(tmp_path), namespace)
        process(*ask, 1024, 1, map_weights=map_weights)  # code, threads and caches come first: they are not the model's
        group.add(process.pid)
        size = 10 * 2048**2 * 4
        group.limit = group.usage + size * 13 // 10
        process.start(*ask, 2048, 10, map_weights=map_weights)
        if map_weights:
            assert process.result() == (size, sum((1.0 + n) * 2048**2 for n in range(10)))
            process.kill()
            group.limit = 1 << 40
        else:
            with pytest.raises(EOFError):
                process.result()
            wait_until(process.gone)
    assert group.kills() == 1


@pytest.mark.parametrize("name", ["64 MB /dev/shm", "no memfd_create", "full /dev/shm"])
def test_real_sdk_workers(namespace, name, born, tmp_path):
    (backend, _), _ = EXPECTED[name]
    room = born()
    room("call", "surroundings", "enter", name)
    ask = ("call", "odd_jobs", "pipeline", str(tmp_path / "run"), namespace, MIB)
    ran = born(room)(*ask, workers=2, mode="multi_processing")
    assert ran.results == results(MIB)
    published, attached, private = ran.shared
    # Who got no element reports nothing.
    if backend == "private":
        assert (published, attached) == (0, 0)
        assert private in {1, 2}
        assert len(ran.warnings) == 2
    else:
        assert (published, private) == (1, 0) or (attached, private) == (1, 0)
        assert ran.warnings == []

"""Little room and odd kernels: the model is shared, or each process has its own and is told why, once. Never an exception.

`surroundings.py` makes each surrounding by real means; `tests/beam/test_odd_pipelines.py` runs pipelines in the same ones.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import surroundings
from tasks import loads

WHY_NOT = surroundings.impossible()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

#: Of a model in these tests, and its sum.
MIB, TOTAL = 80, float(80 << 17)

SHARED = ("memfd", "")
PRIVATELY = "This process has a copy of its own"


def private(why: str) -> tuple[str, str]:
    return "private", why


#: Where -> how a model is shared there, or the one warning why not; and what `onecopy doctor` finds, if it is to find it.
EXPECTED = {
    "own /dev/shm": (SHARED, ""),
    "another user": (SHARED, ""),
    "64 MB /dev/shm": (SHARED, ""),
    "full /dev/shm": (
        private(r"no room for \d+ bytes in /dev/shm/onecopy-v1-0-\S+: 0 bytes free \(its file system is full\)"),
        r"LOOK  /dev/shm: no file can be made, written and locked there: No space left",
    ),
    "no /dev/shm": (
        private(r"open /dev/shm: No such file or directory\. .*ONECOPY_DIR"),
        "LOOK  /dev/shm: No such file",
    ),
    "read-only /dev/shm": (
        private(r"open /dev/shm/onecopy-v1-0-\S+: Read-only file system"),
        "LOOK  /dev/shm: no file can be made, written and locked there: Read-only",
    ),
    "hidepid=2": (SHARED, ""),
    "no /proc": (("posix", ""), "LOOK  /proc is not mounted"),
    "no memfd_create": (("posix", ""), r"LOOK  memfd_create: Operation not permitted\n.*seccomp"),
    "no memfd_create, 64 MB /dev/shm": (
        private(r"no room for \d+ bytes in /dev/shm: \d+ bytes free \(file system of /dev/shm\)"),
        "LOOK  memfd_create: Function not implemented",
    ),
    "no seals": (("posix", ""), ""),
    "no locks of open files": (
        private(r"lock /dev/shm/onecopy-v1-0-\S+: Invalid argument"),
        "LOOK  /dev/shm: no file can be made, written and locked there: Invalid argument",
    ),
    "no fallocate": (SHARED, ""),
    "every pwrite fails": (private(r"pwrite /dev/shm/onecopy-v1-0-\S+: Input/output error"), "LOOK  /dev/shm: no file"),
    "every ftruncate fails": (private(r"ftruncate /dev/shm/onecopy-v1-0-\S+: No space left"), ""),
    "every madvise fails": (private("madvise segment: Function not implemented"), ""),
    "no getrandom": (private(r"getrandom /dev/shm/onecopy-v1-0-\S+: Function not implemented"), ""),
    "RLIMIT_FSIZE of 32 MB": (
        private(r"no room for \d+ bytes in memory \(memfd\): 33554432 bytes free \(RLIMIT_FSIZE\)"),
        "LOOK  RLIMIT_FSIZE bounds every segment to 33554432 bytes",
    ),
    "RLIMIT_FSIZE of 1 MB": (
        private(r"no room for \d+ bytes in /dev/shm/onecopy-v1-0-\S+: 1048576 bytes free \(RLIMIT_FSIZE\)\. Raise"),
        "LOOK  RLIMIT_FSIZE: files may have 1048576 bytes, and a registry has 14778368: nothing can be shared",
    ),
    "RLIMIT_AS with room for one model": (
        private(r"mmap \d+ bytes of a segment: Cannot allocate memory"),
        r"LOOK  RLIMIT_AS: a process and the models that it maps have \d+ MiB of addresses",
    ),
    "RLIMIT_DATA with room for one model": (private(r"mmap \d+ bytes of a segment: Cannot allocate memory"), ""),
}


def test_every_surrounding_is_expected_to_do_something():
    assert set(EXPECTED) == set(surroundings.SURROUNDINGS)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_model_is_shared_or_private_with_one_warning(namespace, name, born, open_log):
    (backend, why), finding = EXPECTED[name]
    room = born()
    room("call", "surroundings", "enter", name)
    first, second = born(room), born(room)
    told = [process("call", "told", "acquire", namespace, open_log, MIB) for process in (first, second)]
    assert [one.total for one in told] == [TOTAL, TOTAL]
    assert [one.backend for one in told] == [backend, backend]
    if backend == "private":
        for one in told:
            (warning,) = one.warnings
            assert re.match(f"'model' is not shared: {why}", warning), warning
            assert warning.endswith(PRIVATELY)
    else:
        assert [one.role for one in told] == ["publisher", "attacher"]
        assert [one.warnings for one in told] == [[], []]
    assert loads(open_log) == (2 if backend == "private" else 1)
    code, said = first("call", "told", "doctor")
    assert code == (1 if finding else 0), said
    assert re.search(finding, said), said
    for process in (first, second):
        left = process("call", "told", "let_go", namespace)
    assert left == []


@pytest.mark.parametrize(("how", "backend"), [({"pin": True}, "auto"), ({}, "posix")])
def test_what_needs_a_name_is_refused_with_figures_in_a_small_dev_shm(namespace, born, open_log, how, backend):
    room = born()
    room("call", "surroundings", "enter", "64 MB /dev/shm")
    said = room("call", "told", "publish", namespace, MIB, backend=backend, **how)
    found = re.match(r"NoRoomError: no room for (\d+) bytes in /dev/shm: (\d+) bytes free", said)
    assert found, said
    assert int(found[1]) > MIB << 20 > 64 << 20 >= int(found[2])
    assert room("call", "told", "publish", namespace, 40, backend=backend, **how) == ""
    # One that does not fit beside it, for lack of what is free now.
    told = born(room)("call", "told", "acquire", namespace, open_log, 40, "posix")
    assert (told.total, told.role) == (float(40 << 17), "private")
    assert re.search(r"no room for \d+ bytes in /dev/shm: \d+ bytes free", told.warnings[0])


def test_a_dev_shm_that_fills_up_later(namespace, born, open_log):
    """The registry is there and has room for what is usual: memfds go on. What has a name does not fit, and it does again
    when something was removed."""
    room = born()
    room("call", "surroundings", "enter", "64 MB /dev/shm")
    first, second, third = born(room), born(room), born(room)
    assert first("call", "told", "acquire", namespace, open_log, 4, tag="early").role == "publisher"
    room("call", "surroundings", "fill_up", "/dev/shm")
    assert second("call", "told", "acquire", namespace, open_log, 4, tag="early")[1:] == ("attacher", "memfd", [])
    assert first("call", "told", "acquire", namespace, open_log, 4).role == "publisher"
    assert second("call", "told", "acquire", namespace, open_log, 4).role == "attacher"
    named = third("call", "told", "acquire", namespace, open_log, 4, "posix", "named")
    assert re.match(r"'named' is not shared: no room for \d+ bytes in /dev/shm: \d+ bytes free", named.warnings[0])
    (Path(f"/proc/{room.pid}/root/dev/shm") / "ballast").unlink()
    third("call", "told", "let_go", namespace)
    assert third("call", "told", "acquire", namespace, open_log, 4, "posix", "named")[1:] == ("publisher", "posix", [])
    for process in (third, second, first):
        left = process("call", "told", "let_go", namespace)
    assert left == []


@pytest.mark.parametrize("role", ["publisher", "attacher"])
def test_descriptors_run_out_at_every_step(namespace, born, open_log, role):
    """EMFILE for real: none is free, one, two, ... until there are enough. The model is there each time."""
    room = born()
    room("call", "surroundings", "enter", "own /dev/shm")
    holder = born(room)
    roles = set()
    for free in range(12):
        tag = f"model-{free}"
        if role == "attacher":
            assert holder("call", "told", "acquire", namespace, open_log, 4, tag=tag).role == "publisher"
        with_few = born(room)
        told = with_few("call", "told", "acquire_with", free, namespace, "", 4, tag=tag)
        roles.add(told.role)
        assert told.total == float(4 << 17)
        assert told.role in ("private", role)
        assert len(told.warnings) == (1 if told.role == "private" else 0), told
        assert all("Too many open files" in warning for warning in told.warnings), told
        # The others are not harmed by it, nor is this process once it has descriptors again.
        assert holder("call", "told", "acquire", namespace, open_log, 4, tag=f"{tag} of others").role == "publisher"
        assert with_few("call", "told", "acquire", namespace, open_log, 4, tag=f"{tag} of others").role == "attacher"
        assert with_few("call", "told", "let_go", namespace) == []
    assert roles == {"private", role}
    assert holder("call", "told", "let_go", namespace) == []


# -- Holders that may not be reached.


REFUSED = (
    r"'model' is not shared: process {pid} \(\S+\) has it, and /proc/{pid}/fd may not be opened: Permission denied"
)


@pytest.mark.parametrize(
    ("how", "finding"),
    [
        ("not dumpable", r"it is not dumpable \(after setuid\(\) or prctl"),
        ("other group", r"it has user and group 61234:61235, this one 61234:61234"),
        ("capabilities", "it has capabilities that this one lacks"),
    ],
)
def test_a_holder_that_may_not_be_reached(namespace, born, open_log, how, finding):
    room = born()
    room("call", "surroundings", "enter", "own /dev/shm")
    holder, attacher = born(room), born(room)
    if how == "capabilities":
        attacher("call", "surroundings", "drop_capabilities")
    else:
        somebody = surroundings.SOMEBODY
        holder("call", "walls", "become", somebody, somebody + (how == "other group"))
        attacher("call", "walls", "become", somebody)
    assert holder("call", "told", "acquire", namespace, open_log, 4)[1:] == ("publisher", "memfd", [])
    if how == "not dumpable":
        holder("call", "walls", "be_dumpable", whether=False)
    told = attacher("call", "told", "acquire", namespace, open_log, 4)
    assert told[:3] == (float(4 << 17), "private", "private")
    (warning,) = told.warnings
    assert re.match(REFUSED.format(pid=holder.pid), warning), warning
    code, said = attacher("call", "told", "doctor", namespace)
    assert code == 1
    assert re.search(rf"LOOK  process {holder.pid} \(\S+\) does not let this one open what it has: {finding}", said), (
        said
    )
    # Who may open it shares as ever; and a name can be opened by all of them.
    if how == "not dumpable":
        holder("call", "walls", "be_dumpable", whether=True)
        told = attacher("call", "told", "let_go", namespace)
        assert attacher("call", "told", "acquire", namespace, open_log, 4).role == "attacher"
    assert holder("call", "told", "acquire", namespace, open_log, 4, "posix", "named").role == "publisher"
    assert attacher("call", "told", "acquire", namespace, open_log, 4, "posix", "named")[1:] == (
        "attacher",
        "posix",
        [],
    )
    for process in (attacher, holder):
        left = process("call", "told", "let_go", namespace)
    assert left == []


def test_a_memfd_is_not_reached_once_proc_is_gone(namespace, born, open_log):
    room = born()
    room("call", "surroundings", "enter", "own /dev/shm")
    holder, attacher = born(room), born(room)
    assert holder("call", "told", "acquire", namespace, open_log, 4).backend == "memfd"
    attacher("call", "surroundings", "cover_proc")
    told = attacher("call", "told", "acquire", namespace, open_log, 4)
    assert told.role == "private"
    assert re.match(r"'model' is not shared: .*/proc is not mounted here; backend=\"posix\"", told.warnings[0])
    assert holder("call", "told", "acquire", namespace, open_log, 4, tag="another").backend == "posix", "for its sake"
    assert attacher("call", "told", "acquire", namespace, open_log, 4, tag="another").role == "attacher"
    for process in (attacher, holder):
        left = process("call", "told", "let_go", namespace)
    assert left == []


# -- vm.overcommit_memory, which is the whole machine's.


@pytest.fixture
def commit_mode() -> Iterator[Callable[[int], None]]:
    """Sets it, with so high a limit that nobody on the machine can feel it, and puts everything back."""
    settings = {name: Path("/proc/sys/vm", f"overcommit_{name}") for name in ("memory", "ratio", "kbytes")}
    before = {name: file.read_text() for name, file in settings.items()}
    if not os.access(settings["memory"], os.W_OK):
        pytest.skip("vm.overcommit_memory cannot be set here")

    def change(mode: int) -> None:
        settings["kbytes"].write_text(str(1 << 40))
        settings["memory"].write_text(str(mode))

    try:
        yield change
    finally:
        settings["memory"].write_text(before["memory"])
        # Of these two the last one that is written counts.
        last = "ratio" if int(before["ratio"]) else "kbytes"
        settings[last].write_text(before[last])
        assert {name: file.read_text() for name, file in settings.items()} == before


def committed() -> int:
    found = re.search(r"Committed_AS:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.odd
@pytest.mark.parametrize("mode", [0, 2])
def test_strict_overcommit_charges_every_attach(namespace, born, open_log, commit_mode, mode):
    """What docs/protocol.md and `onecopy doctor` say of mode 2. What follows where the limit is reached is what follows of
    RLIMIT_AS: the same call fails with the same errno."""
    mib, count = 256, 24
    holder, attachers = born(), [born() for _ in range(count)]
    assert holder("call", "told", "acquire", namespace, open_log, mib).role == "publisher"
    for process in attachers:  # threads, and what else one has besides
        process("call", "told", "acquire", namespace, open_log, 4, tag="small")
    commit_mode(mode)
    before = committed()
    for process in attachers:
        assert process("call", "told", "acquire", namespace, open_log, mib).role == "attacher"
    charged = committed() - before
    # A wide margin: all the machine's processes are counted.
    half = mib * count // 2 << 20
    assert charged > half if mode == 2 else charged < half
    code, said = holder("call", "told", "doctor", namespace)
    assert (code, "LOOK  vm.overcommit_memory=2 charges every attach" in said) == (
        (1, True) if mode == 2 else (0, False)
    )

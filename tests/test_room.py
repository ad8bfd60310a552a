"""A memory cgroup at its limit: what does not fit is refused with figures; where the look-up was too hopeful, the kernel
kills who fills and nobody else; and nobody is killed a third time.

Version 1 here is the kernel's own. Version 2 is a folder that looks like one, under a /proc/self/cgroup that names it: it
shows that the files are read and understood, and nothing about the kernel.
"""

from __future__ import annotations

import re

import pytest
import surroundings
from processes import wait_until
from tasks import loads

WHY_NOT = surroundings.impossible()
MIB = 64
TOTAL = float(MIB << 17)


@pytest.fixture
def group(group):
    if group is None:
        pytest.skip("no memory cgroup can be made here")
    if group.v2:
        pytest.skip("limits are lowered below here as version 1 lets one")
    return group


def test_a_holder_is_private_where_the_group_has_no_room(namespace, group, born, open_log):
    """The constructor fits, a second copy beside it does not."""
    process, neighbour = born(), born()
    for member in (process, neighbour):
        group.add(member.pid)
    neighbour("call", "told", "eat", 32)
    group.limit = group.usage + ((MIB + 32) << 20)
    told = process("call", "told", "acquire", namespace, open_log, MIB)
    assert told[:3] == (TOTAL, "private", "private")
    (warning,) = told.warnings
    found = re.match(
        r"'model' is not shared: no room for (\d+) bytes in memory \(memfd\): (\d+) bytes free "
        r"\(\S+onecopy-test-\S+ = (\d+)\)",
        warning,
    )
    assert found, warning
    need, free, limit = map(int, found.groups())
    assert need >= MIB << 20 > free
    assert limit == group.limit
    assert group.kills() == 0
    assert neighbour("call", "told", "digest") == (32 << 20, "0")


@pytest.mark.parametrize(
    ("hopeful", "backend"),
    [("used up after the look-up", "memfd"), ("hidden limit", "memfd"), ("hidden limit", "posix")],
)
def test_two_are_killed_while_they_fill_and_the_third_is_told(
    namespace, group, born, open_log, tmp_path, hopeful, backend
):
    """The neighbour has more memory of its own than the fillers: the kernel would choose it."""
    neighbour, first, waiter, third = members = [born() for _ in range(4)]
    limit, ask = str(group.path / "memory.limit_in_bytes"), ("call", "told", "acquire")
    if hopeful == "hidden limit":
        inner = group.inner()
        for member in members:
            inner.add(member.pid)
            member("call", "surroundings", "hide_parents", str(group.mounted_at), str(inner.path), str(tmp_path))
        limit = f"({group.mounted_at}/memory.limit_in_bytes|MemAvailable in /proc/meminfo)"
    else:
        inner = group
        for member in members:
            group.add(member.pid)
        ask = ("call", "told", "acquire_squeezed", limit, 8 << 20)
    neighbour("call", "told", "eat", 5 * MIB)
    ample = group.usage + (8 * MIB << 20)
    # Room for what the constructor makes, and for half of the segment.
    group.limit = group.usage + (MIB * 3 // 2 << 20) if hopeful == "hidden limit" else ample
    for killed, process in enumerate((first, waiter), start=1):
        process.start(*ask, namespace, open_log, MIB, backend)
        with pytest.raises(EOFError):
            process.result()
        wait_until(process.gone)
        assert inner.kills() == killed
        if hopeful == "used up after the look-up":
            group.limit = ample
    group.limit = ample
    said = third("call", "told", "error_of_acquire", namespace, open_log, MIB, backend)
    found = re.fullmatch(
        r"LoaderKilledError: 2 loaders of 'model' in a row were killed for lack of memory "
        rf"\((\d+) bytes were reserved; (\d+) bytes are free: {limit}( = \d+)?\)\. "
        "A third is not started for 10 minutes: .*",
        said,
    )
    assert found, said
    assert int(found[1]) > MIB << 20
    assert loads(open_log) == 2, "nobody loaded a third time"
    assert neighbour("call", "told", "digest") == (5 * MIB << 20, "0")
    assert third("call", "told", "left", namespace) == []

    # Another model is loaded as ever. READY ends it: somebody outside of the group publishes.
    assert third("call", "told", "acquire", namespace, open_log, 4, backend, "another").role == "publisher"
    outside = born()
    assert outside("call", "told", "publish", namespace, MIB, "model", backend=backend) == ""
    assert third("call", "told", "acquire", namespace, open_log, MIB, backend).role == "attacher"
    outside("call", "told", "let_go", namespace)
    third("call", "told", "let_go", namespace)
    assert third("call", "told", "acquire", namespace, open_log, MIB, backend).role == "publisher"
    assert third("call", "told", "let_go", namespace) == []
    assert inner.kills() == 2
    assert neighbour("call", "told", "digest") == (5 * MIB << 20, "0")


def test_who_waits_takes_over_and_is_killed_and_the_next_waiter_is_told(namespace, group, born, open_log):
    """In the constructor, where nobody offers himself: the group holds the loaders alone."""
    waiters = [born() for _ in range(4)]
    for process in waiters:
        group.add(process.pid)
    group.limit = group.usage + (MIB << 20)
    for process in waiters:
        process.start("call", "told", "error_of_acquire", namespace, open_log, 4 * MIB)
    said = []
    for process in waiters:
        try:
            said.append(process.result())
        except EOFError:
            wait_until(process.gone)
    assert loads(open_log) == 2, "nobody loaded a third time"
    # While a loader's memory is on its way back, the kernel may find no other to kill than one who only waits.
    assert group.kills() == len(waiters) - len(said)
    late = born()
    group.add(late.pid)
    for one in [*said, late("call", "told", "error_of_acquire", namespace, open_log, 4 * MIB)]:
        assert re.match(
            r"LoaderKilledError: 2 loaders of 'model' in a row were killed for lack of memory "
            r"\(in the constructor, before any was reserved; \d+ bytes are free: ",
            one,
        )


# -- Version 2, as its files look (cgroups(7)).


@pytest.fixture
def looks_like_v2(tmp_path):
    if WHY_NOT:
        pytest.skip(WHY_NOT)
    folder = tmp_path / "cgroup" / "job"
    folder.mkdir(parents=True)
    (folder.parent / "cgroup.controllers").write_text("memory\n")
    (folder / "memory.max").write_text("max\n")
    (folder / "memory.current").write_text(f"{100 << 20}\n")
    (folder / "memory.stat").write_text("anon 1000\nfile 5000000\ninactive_file 3000000\nactive_file 1000000\n")
    (folder / "memory.events").write_text("low 0\nhigh 0\nmax 0\noom 7\noom_kill 0\noom_group_kill 0\n")
    return folder


def test_limits_of_version_2_are_read(namespace, born, open_log, looks_like_v2):
    process = born()
    process("call", "surroundings", "own_shm")
    process("call", "surroundings", "look_as_in_v2", str(looks_like_v2.parent), "/job")
    assert process("call", "told", "acquire", namespace, open_log, MIB, tag="unlimited").role == "publisher"
    limit = (100 + MIB) << 20
    (looks_like_v2 / "memory.max").write_text(f"{limit}\n")
    (warning,) = process("call", "told", "acquire", namespace, open_log, 2 * MIB).warnings
    free = (MIB << 20) + 4_000_000  # what is of files can be had back
    figures = re.escape(f"{free} bytes free ({looks_like_v2}/memory.max = {limit})")
    assert re.match(rf"'model' is not shared: no room for \d+ bytes in memory \(memfd\): {figures}", warning), warning
    assert process("call", "told", "acquire", namespace, open_log, MIB, tag="fits").role == "publisher"
    # The group's own group is tighter.
    (looks_like_v2.parent / "memory.max").write_text("4096\n")
    (looks_like_v2.parent / "memory.current").write_text("0\n")
    (warning,) = process("call", "told", "acquire", namespace, open_log, 4, tag="small").warnings
    assert f"4096 bytes free ({looks_like_v2.parent}/memory.max = 4096)" in warning
    process("call", "told", "let_go", namespace)


@pytest.mark.parametrize("counted", [True, False])
def test_kills_that_version_2_counts(namespace, born, open_log, looks_like_v2, counted):
    """Killed by us, counted or not by what looks like the kernel's counter."""
    room = born()
    room("call", "surroundings", "own_shm")
    loaders = [born(room) for _ in range(3)]
    for process in loaders:
        process("call", "surroundings", "look_as_in_v2", str(looks_like_v2.parent), "/job")
    for kills, process in enumerate(loaders[:2], start=1):
        process.start("acquire_gated", namespace, "model", open_log, "/nowhere")
        wait_until(lambda: loads(open_log) == kills)  # noqa: B023 (called here)
        events = looks_like_v2 / "memory.events"
        events.write_text(re.sub("oom_kill .*", f"oom_kill {kills if counted else 0}", events.read_text()))
        process.kill()
    said = loaders[2]("call", "told", "error_of_acquire", namespace, open_log, MIB)
    if counted:
        assert re.match(r"LoaderKilledError: 2 loaders of 'model' in a row were killed", said), said
        assert f"{looks_like_v2}/memory.max" not in said, "it is no limit"
    else:
        assert said == ""
    loaders[2]("call", "told", "let_go", namespace)


def test_a_loader_that_is_killed_by_hand_is_no_lack_of_memory(namespace, group, born, open_log):
    loaders = [born() for _ in range(3)]
    for process in loaders:
        group.add(process.pid)
    for kills, process in enumerate(loaders[:2], start=1):
        process.start("acquire_gated", namespace, "model", open_log, "/nowhere")
        wait_until(lambda: loads(open_log) == kills)  # noqa: B023 (called here)
        process.kill()
    assert loaders[2]("call", "told", "acquire", namespace, open_log, 4).role == "publisher"
    assert group.kills() == 0

"""Other users of the machine can neither read, change nor replace models, nor keep anybody waiting (SECURITY.md)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Failed, Forked

MINE, THEIRS = 12_001, 12_002
DENIED = os.strerror(errno.EACCES)
SPACE = "default"
REGISTRY = f"/dev/shm/onecopy-v1-{MINE}-{SPACE}"
#: Nobody counts loads here: another user's folder is closed to these.
LOG = "/dev/null"

Users = Callable[..., Forked]


@pytest.fixture
def user(machine: Forked, fork: Callable[[Forked], Forked]) -> Users:
    """A process of a user, on a machine that all of a test's users share."""

    def make(number: int, group: int | None = None, *, dumpable: bool = True) -> Forked:
        process = fork(machine)
        process("become", number, group, dumpable=dumpable)
        process("hear")
        return process

    return make


def shm(machine: Forked) -> list[Path]:
    return list(Path(f"/proc/{machine.pid}/root/dev/shm").iterdir())


@pytest.mark.parametrize("backend", ["memfd", "posix"])
def test_another_user_has_no_way_in(machine, user, backend):
    owner, other = user(MINE), user(THEIRS)
    value = owner("acquire", SPACE, "model", LOG, backend=backend)[0]
    names = [f"/dev/shm/{path.name}" for path in shm(machine)]
    assert len(names) == (2 if backend == "posix" else 1)
    for name in names:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            assert other("forbidden", "open", name, flags) == DENIED
        assert other("lock_through", name) == [DENIED, os.strerror(errno.EBADF), os.strerror(errno.EBADF)]
        for call, *rest in (["unlink"], ["rename", "/dev/shm/away"], ["truncate", 0], ["chmod", 0o666]):
            assert other("forbidden", call, name, *rest) in (os.strerror(errno.EPERM), DENIED), call
    assert other("forbidden", "listdir", f"/proc/{owner.pid}/fd") == DENIED
    with pytest.raises(Failed, match="ModelNotFoundError"):
        other("attach", SPACE, "model")
    assert other("acquire", SPACE, "model", LOG, value=2.0)[1] == "publisher", "in a registry of its own"
    assert owner("total", "model") == value
    assert user(MINE)("acquire", SPACE, "model", LOG, backend=backend)[:2] == (value, "attacher")


@pytest.mark.parametrize("kind", ["open file", "closed file", "lease", "fifo", "socket", "folder", "link"])
def test_what_another_user_put_under_our_name_first(machine, user, kind):
    """Nothing of it is used, nobody waits for it, and a clear word is said; as on kernels that let us open it at all."""
    owner, other = user(MINE), user(THEIRS)
    target = "/dev/shm/precious"
    owner("plant", "closed file", target, "")
    other("plant", kind, REGISTRY, target)
    before = [(path.name, path.lstat()) for path in shm(machine)]
    for verb in ("publish", "attach"):
        with pytest.raises(Failed, match=f"UntrustedError.*{REGISTRY}.*belongs to user {THEIRS}, not to you"):
            owner(verb, SPACE, "model")
    assert owner("heard") == []
    assert owner("acquire", SPACE, "model", LOG)[1] == "private"
    (warning,) = owner("heard")
    assert REGISTRY in warning
    assert "ONECOPY_DIR" in warning, "the remedy"
    assert [(path.name, path.lstat()) for path in shm(machine)] == before


@pytest.mark.parametrize("kind", ["open file", "closed file", "lease", "fifo", "socket", "folder", "link"])
def test_what_another_user_put_in_place_of_a_segment(machine, user, kind):
    """Its name was removed (by systemd, by a tidy person): who comes next loads, and shares with those after."""
    owner, other = user(MINE), user(THEIRS)
    value = owner("acquire", SPACE, "model", LOG, backend="posix")[0]
    (name,) = [f"/dev/shm/{path.name}" for path in shm(machine) if path.name.count("-") > 3]
    assert owner("forbidden", "unlink", name) == "allowed"
    other("plant", kind, name, "/dev/null")
    for role in ("publisher", "attacher"):
        next_one = user(MINE)
        assert next_one("acquire", SPACE, "model", LOG, backend="posix")[:2] == (value, role)
        assert next_one("heard") == []
    assert owner("total", "model") == value


@pytest.mark.parametrize(
    ("owner_of_it", "mode", "good"),
    [(0, 0o777, False), (0, 0o770, False), (0, 0o1777, True), (MINE, 0o700, True), (THEIRS, 0o1777, False)],
)
def test_a_directory_in_which_others_could_replace_files(machine, user, owner_of_it, mode, good):
    machine("own_shm", "/dev/shm/models")
    machine("forbidden", "chmod", "/dev/shm/models", mode)
    machine("forbidden", "chown", "/dev/shm/models", owner_of_it, MINE)
    one, two = user(MINE), user(MINE)
    for process, role in ((one, "publisher"), (two, "attacher")):
        process("environment", "ONECOPY_DIR", "/dev/shm/models")
        assert process("acquire", SPACE, "model", LOG)[1] == (role if good else "private")
        if good:
            assert process("heard") == []
        else:
            (warning,) = process("heard")
            assert f"/dev/shm/models: owner {owner_of_it}, mode {mode:o}" in warning
            assert "sticky bit" in warning


@pytest.mark.parametrize("closed", ["not dumpable", "other group"])
def test_a_holder_whose_descriptors_are_closed_to_its_own_user(machine, user, closed):
    """It changed its user without exec, as servers do that start as root."""
    group, dumpable = (MINE, False) if closed == "not dumpable" else (THEIRS, True)
    holder = user(MINE, group, dumpable=dumpable)
    value = holder("acquire", SPACE, "model", LOG, backend="memfd")[0]
    alone = user(MINE)
    assert alone("acquire", SPACE, "model", LOG, backend="memfd")[:2] == (value, "private")
    (warning,) = alone("heard")
    assert f"process {holder.pid} (" in warning
    assert "not dumpable" in warning
    assert "`onecopy doctor`" in warning
    # By name there is nothing to be refused.
    assert holder("acquire", SPACE, "named", LOG, backend="posix")[1] == "publisher"
    assert alone("acquire", SPACE, "named", LOG, backend="posix")[1] == "attacher"
    if closed == "not dumpable":
        holder("be_dumpable", whether=True)
        assert user(MINE)("acquire", SPACE, "model", LOG)[:2] == (value, "attacher")


def test_one_holder_of_two_is_enough(machine, user):
    closed, opened = user(MINE), user(MINE)
    value = closed("acquire", SPACE, "model", LOG)[0]
    assert opened("acquire", SPACE, "model", LOG)[1] == "attacher"
    for first, second in ((closed, opened), (opened, closed)):
        second("be_dumpable", whether=True)
        first("be_dumpable", whether=False)
        next_one = user(MINE)
        assert next_one("acquire", SPACE, "model", LOG)[:2] == (value, "attacher")
        next_one.end("exit_cleanly")

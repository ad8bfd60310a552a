"""Little room and odd kernels: every surrounding by its name, made by real means for one process and those it forks.

A child of the zygote enters one, for good, and forks the processes that then share a model in it. Nothing here touches the
machine: mounts are in a mount namespace of the child's own, filters and limits are its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import walls

SHM = "/dev/shm"
#: Nobody's number on this machine.
SOMEBODY = 61_234

libc = ctypes.CDLL(None, use_errno=True)

MS_RDONLY, MS_BIND, MS_MOVE, MNT_DETACH = 1, 1 << 12, 1 << 13, 2
PR_SET_NO_NEW_PRIVS = 38

#: System calls that are denied here, and their numbers.
NUMBERS = {
    "x86_64": {"memfd_create": 319, "fcntl": 72, "fallocate": 285, "pwrite64": 18, "ftruncate": 77, "madvise": 28,
               "getrandom": 318, "seccomp": 317},
    "aarch64": {"memfd_create": 279, "fcntl": 25, "fallocate": 47, "pwrite64": 68, "ftruncate": 46, "madvise": 233,
                "getrandom": 278, "seccomp": 277},
}.get(platform.machine(), {})  # fmt: skip
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
F_ADD_SEALS, F_OFD_SETLK = 1033, 37

SURROUNDINGS: dict[str, Callable[..., None]] = {}


def surrounding(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def add(make: Callable[..., None]) -> Callable[..., None]:
        SURROUNDINGS[name] = make
        return make

    return add


def enter(name: str, **how: int) -> None:
    SURROUNDINGS[name](**how)


def impossible() -> str:
    """Why they cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "mount namespaces and other users need root"
    if not NUMBERS:
        return f"no numbers of system calls for {platform.machine()}"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, text=True, check=False)
    return tried.stderr.strip()


def call(name: str, *args: object) -> int:
    done: int = getattr(libc, name)(*args)
    if done == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return done


# -- File systems.


def mount(kind: str, where: str, options: str = "", flags: int = 0) -> None:
    call("mount", kind.encode(), where.encode(), kind.encode(), flags, options.encode())


def fill_up(folder: str) -> None:
    """To the last page."""
    with Path(folder, "ballast").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 12)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise


@surrounding("own /dev/shm")
def own_shm() -> None:
    """As it usually is, for one's own."""
    walls.apart("mount")
    mount("tmpfs", SHM, "mode=1777,size=1g")


@surrounding("64 MB /dev/shm")
def small_shm() -> None:
    """A container's."""
    walls.apart("mount")
    mount("tmpfs", SHM, "mode=1777,size=64m")


@surrounding("full /dev/shm")
def full_shm() -> None:
    walls.apart("mount")
    mount("tmpfs", SHM, "mode=1777,size=1m")
    fill_up(SHM)


@surrounding("no /dev/shm")
def no_shm() -> None:
    walls.apart("mount")
    nodes = {name: Path("/dev", name).stat().st_rdev for name in ("null", "zero", "urandom", "random", "tty")}
    mount("tmpfs", "/dev")
    for name, number in nodes.items():
        os.mknod(f"/dev/{name}", stat.S_IFCHR | 0o666, number)


@surrounding("read-only /dev/shm")
def read_only_shm() -> None:
    walls.apart("mount")
    mount("tmpfs", SHM, "mode=1777", MS_RDONLY)


@surrounding("hidepid=2")
def hidden_proc() -> None:
    """Processes see those of their own user alone; root sees all, so nobody here is root."""
    own_shm()
    mount("proc", "/proc", "hidepid=2")
    walls.become(SOMEBODY)


@surrounding("no /proc")
def no_proc() -> None:
    own_shm()
    cover_proc()


def cover_proc() -> None:
    walls.apart("mount")
    mount("tmpfs", "/proc", "", MS_RDONLY)


def hide_parents(mount_point: str, group: str, empty: str) -> None:
    """As in a container without a cgroup namespace: of the hierarchy that is mounted there, `group` is all that is seen."""
    walls.apart("mount")
    call("mount", group.encode(), empty.encode(), None, MS_BIND, None)
    call("umount2", mount_point.encode(), MNT_DETACH)
    call("mount", empty.encode(), mount_point.encode(), None, MS_MOVE, None)


def look_as_in_v2(folder: str, group: str) -> None:
    """This process alone sees itself in `group` of a version 2 hierarchy that is mounted at `folder`, and in no other."""
    walls.apart("mount")
    draft = Path(folder).parent
    (draft / "own").write_text(f"0::{group}\n")
    (draft / "mounts").write_text(f"30 24 0:26 / {folder} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n")
    for file, name in (("own", "cgroup"), ("mounts", "mountinfo")):
        call("mount", bytes(draft / file), f"/proc/{os.getpid()}/{name}".encode(), None, MS_BIND, None)


# -- Users.


def drop_capabilities() -> None:
    """Root, without what root may: capset(2), version 3."""
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    call("capset", header, none)


@surrounding("another user")
def another_user() -> None:
    own_shm()
    walls.become(SOMEBODY)


# -- System calls that a filter denies (seccomp(2)).


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_char_p))


def deny(name: str, number: int, *, when: tuple[int, int] | None = None) -> None:
    """From here on `name` fails with errno `number`; with `when`, only where that argument has that value."""

    def step(code: int, then: int, other: int, value: int) -> bytes:
        return struct.pack("=HBBI", code, then, other, value)

    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | number
    check = [] if when is None else [step(load, 0, 0, 16 + 8 * when[0]), step(equal, 0, 1, when[1])]
    code = b"".join(
        [
            step(load, 0, 0, 4),
            step(equal, 0, 3 + len(check), AUDIT_ARCH[platform.machine()]),
            step(load, 0, 0, 0),
            step(equal, 0, 1 + len(check), NUMBERS[name]),
            *check,
            step(give, 0, 0, refuse),
            step(give, 0, 0, allow),
        ]
    )
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    program = _Program(len(code) // 8, code)
    call("syscall", NUMBERS["seccomp"], 1, 0, ctypes.byref(program))


@surrounding("no memfd_create")
def no_memfd() -> None:
    own_shm()
    deny("memfd_create", errno.EPERM)


@surrounding("no memfd_create, 64 MB /dev/shm")
def no_memfd_small_shm() -> None:
    small_shm()
    deny("memfd_create", errno.ENOSYS)


@surrounding("no seals")
def no_seals() -> None:
    own_shm()
    deny("fcntl", errno.EPERM, when=(1, F_ADD_SEALS))


@surrounding("no locks of open files")
def no_locks() -> None:
    """As sandboxes that implement few of fcntl's commands."""
    own_shm()
    deny("fcntl", errno.EINVAL, when=(1, F_OFD_SETLK))


@surrounding("no fallocate")
def no_fallocate() -> None:
    own_shm()
    deny("fallocate", errno.EOPNOTSUPP)


@surrounding("every pwrite fails")
def no_pwrite() -> None:
    own_shm()
    deny("pwrite64", errno.EIO)


@surrounding("every ftruncate fails")
def no_ftruncate() -> None:
    own_shm()
    deny("ftruncate", errno.ENOSPC)


@surrounding("every madvise fails")
def no_madvise() -> None:
    own_shm()
    deny("madvise", errno.ENOSYS)


@surrounding("no getrandom")
def no_getrandom() -> None:
    own_shm()
    deny("getrandom", errno.ENOSYS)


# -- Limits.


def limit(which: int, value: int) -> None:
    """The soft one: the hard one cannot be had back."""
    resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@surrounding("RLIMIT_FSIZE of 32 MB")
def short_files() -> None:
    own_shm()
    limit(resource.RLIMIT_FSIZE, 32 << 20)


@surrounding("RLIMIT_FSIZE of 1 MB")
def tiny_files() -> None:
    """The registry is longer than that."""
    own_shm()
    limit(resource.RLIMIT_FSIZE, 1 << 20)


@surrounding("RLIMIT_AS with room for one model")
def little_address_space(spare: int = 160) -> None:
    """So many MiB beside what there is."""
    own_shm()
    limit(resource.RLIMIT_AS, address_space() + (spare << 20))


@surrounding("RLIMIT_DATA with room for one model")
def little_data(spare: int = 160) -> None:
    """A private writable mapping counts as data, whatever is behind it."""
    own_shm()
    found = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    limit(resource.RLIMIT_DATA, (int(found.split()[1]) << 10) + (spare << 20))

"""What this machine lets processes share: the limits that matter here, each with its remedy."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onecopy import process
from onecopy.errors import OneCopyError

if TYPE_CHECKING:
    from onecopy.process import Place

#: A container's usual /dev/shm.
SMALL = 64 << 20
#: File systems whose files are memory.
IN_MEMORY = ("tmpfs", "ramfs")
#: Descriptors below which frameworks and data loaders run out first.
FEW = 256
#: `/proc/sys/vm/overcommit_memory`: every private mapping is charged in full.
STRICT = "2"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    good: bool
    what: str
    remedy: str = ""


def examine(place: Place) -> list[Finding]:
    """Everything that decides how models are shared here, in the order in which it matters."""
    return [
        _registry(place),
        _directory(place),
        _memory(place),
        _memfd(),
        _proc(),
        _overcommit(),
        _file_size(),
        _addresses(),
        _descriptors(),
        _huge_pages(),
    ]


def _registry(place: Place) -> Finding:
    try:
        store = process.core_store(place)
        models = store.list()
    except OneCopyError as error:
        return Finding(good=False, what=f"registry: {error}", remedy="Models load privately until this is mended")
    return Finding(good=True, what=f"registry {store.path}: {len(models)} models")


def _directory(place: Place) -> Finding:
    directory = place.resolved()
    try:
        stat = os.statvfs(directory)
    except OSError as error:
        return Finding(
            good=False, what=f"{directory}: {error.strerror}", remedy="Mount a tmpfs there, or set ONECOPY_DIR"
        )
    kind = filesystem(directory)
    if kind not in ("", *IN_MEMORY):
        remedy = (
            f"Set ONECOPY_DIR to a directory on a tmpfs ({process.SHM} usually is one), or mount one there: "
            f"mount -t tmpfs tmpfs {directory}"
        )
        what = f'{directory} is on {kind}, no tmpfs: pinned models and backend="posix" are written to its disk'
        return Finding(good=False, what=what, remedy=remedy)
    free = stat.f_bavail * stat.f_frsize
    what = f"{directory}: {free >> 20} MiB free"
    if free > SMALL:
        return Finding(good=True, what=what)
    return Finding(
        good=True,
        what=f"{what}: enough for the registry; models live in memfds, which it does not bound",
        remedy='Pinned models and backend="posix" need more: docker run --shm-size, or a memory-backed volume',
    )


def filesystem(directory: str) -> str:
    """The type of the file system that a directory is on, proc_pid_mountinfo(5); empty where it cannot be found."""
    found, deepest = "", 0
    real = Path(directory).resolve()
    for line in _read("/proc/self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        # Spaces and line breaks in a path are written as octal numbers.
        mounted = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields.split()[4]))
        depth = len(mounted.parts)
        # Of several at one place, the last one is on top.
        if real.is_relative_to(mounted) and depth >= deepest:
            found, deepest = rest.split()[0], depth
    return found


def _memory(place: Place) -> Finding:
    try:
        free, limit = process.core_store(place).room()
    except OneCopyError as error:
        return Finding(good=False, what=f"memory: {error}")
    return Finding(good=True, what=f"{free >> 20} MiB of memory may be taken by a model ({limit})")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("onecopy-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Finding(
            good=False, what=f"memfd_create: {error.strerror}", remedy='A seccomp filter denies it: backend="posix"'
        )
    return Finding(good=True, what="memfd_create works")


def _proc() -> Finding:
    if not Path("/proc/self/fd").is_dir():
        return Finding(
            good=False, what="/proc is not mounted: memfds cannot be reached", remedy='Mount it, or backend="posix"'
        )
    if os.geteuid() != 0 and Path("/proc/self/fd").stat().st_uid != os.geteuid():
        remedy = "prctl(PR_SET_DUMPABLE, 1) after setuid(), or exec a fresh program"
        return Finding(good=False, what="this process is not dumpable: others may not open its memfds", remedy=remedy)
    return Finding(good=True, what="/proc/<pid>/fd of own processes can be opened")


def _overcommit() -> Finding:
    mode = _read("/proc/sys/vm/overcommit_memory")
    if mode == STRICT:
        remedy = "Raise vm.overcommit_ratio, or use mode 0 or 1"
        return Finding(
            good=False, what="vm.overcommit_memory=2 charges every attach with the model's size", remedy=remedy
        )
    return Finding(good=True, what=f"vm.overcommit_memory={mode}")


def _file_size() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding(good=True, what="RLIMIT_FSIZE is unlimited")
    return Finding(good=False, what=f"RLIMIT_FSIZE bounds every segment to {limit} bytes", remedy="ulimit -f unlimited")


def _addresses() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding(good=True, what="RLIMIT_AS is unlimited")
    what = f"RLIMIT_AS: a process and the models that it maps have {limit >> 20} MiB of addresses"
    return Finding(good=False, what=what, remedy="ulimit -v unlimited")


def _descriptors() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    what = f"RLIMIT_NOFILE: {limit} descriptors in a process, of which each model takes one"
    if limit >= FEW:
        return Finding(good=True, what=what)
    return Finding(good=False, what=what, remedy=f"ulimit -n {FEW}")


def _huge_pages() -> Finding:
    modes = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = modes.partition("[")[2].partition("]")[0]
    if chosen in ("", "deny"):
        return Finding(good=True, what="no huge pages for shared memory: attached models use 4 KiB pages")
    by_itself = "gives none by itself" if chosen in ("never", "advise") else "gives them by itself"
    return Finding(
        good=True,
        what=f"huge pages for shared memory: the kernel {by_itself} (shmem_enabled={chosen}); onecopy asks for them once "
        "a model is published",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""

"""What this machine lets processes share: the limits that matter here, each with its remedy."""

from __future__ import annotations

import os
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
        _memfd(),
        _proc(),
        _overcommit(),
        _file_size(),
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
    free = stat.f_bavail * stat.f_frsize
    what = f"{directory}: {free >> 20} MiB free"
    if free > SMALL:
        return Finding(good=True, what=what)
    return Finding(
        good=True,
        what=f"{what}: enough for the registry; models live in memfds, which it does not bound",
        remedy='Pinned models and backend="posix" need more: docker run --shm-size, or a memory-backed volume',
    )


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


def _huge_pages() -> Finding:
    modes = _read("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    chosen = modes.partition("[")[2].partition("]")[0]
    if chosen in ("", "deny"):
        return Finding(good=True, what="no huge pages for shared memory: attached models use 4 KiB pages")
    return Finding(good=True, what=f"huge pages for shared memory: {chosen} (segments are collapsed after READY)")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return ""

"""What this machine lets processes share: the limits that matter here, each with its remedy."""

from __future__ import annotations

import fcntl
import importlib
import mmap
import os
import platform
import re
import resource
import struct
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
#: What the core says where no limit is visible.
UNKNOWN = (1 << 64) - 1
#: Bytes of a registry's file (docs/format.md).
REGISTRY = 14_778_368
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
    native = _native()
    return [
        native,
        *([_registry(place)] if native.good else []),
        _directory(place),
        _memory(place),
        _memfd(),
        _proc(),
        *_holders(place),
        *_others(place),
        *_left(place),
        _overcommit(),
        _file_size(),
        _addresses(),
        _descriptors(),
        *([_huge_pages()] if native.good else []),
    ]


def _native() -> Finding:
    try:
        importlib.import_module("onecopy._acquire")
    except ImportError as error:
        return Finding(good=False, what=str(error), remedy="Under Beam models load privately until then")
    return Finding(good=True, what=f"Python {platform.python_version()} loads the native part")


def _registry(place: Place) -> Finding:
    try:
        store = process.core_store(place)
        models = store.list()
    except OneCopyError as error:
        return Finding(good=False, what=f"registry: {error}", remedy="Models load privately until this is mended")
    count = f"{len(models)} model{'' if len(models) == 1 else 's'}"
    return Finding(good=True, what=f"registry {store.path}: {count}")


def _others(place: Place) -> list[Finding]:
    """Other sets of tags: what is missing here may be there."""
    found = namespaces(place) - {place.namespace}
    if not found:
        return []
    return [Finding(good=True, what=f"other namespaces in {place.resolved()}: {', '.join(sorted(found))}")]


def namespaces(place: Place) -> set[str]:
    """Those of this user that have a registry in this directory."""
    prefix = f"onecopy-v1-{os.geteuid()}-"
    try:
        names = {path.name for path in Path(place.resolved()).iterdir() if path.name.startswith(prefix)}
    except OSError:
        return set()
    return {name.removeprefix(prefix) for name in names if not re.search("-[0-9a-f]{32}$", name)}


def _left(place: Place) -> list[Finding]:
    """What only the dead hold; it limits nothing, but takes memory."""
    try:
        rows = process.core_store(place).sweep(dry_run=True)
    except OneCopyError:
        return []  # told already
    if not rows:
        return []
    what = f"{len(rows)} rows and files of dead processes in this namespace"
    return [
        Finding(good=True, what=what, remedy="The next use removes them, or `onecopy sweep`; --dry-run tells which")
    ]


def _directory(place: Place) -> Finding:
    directory = place.resolved()
    try:
        stat = os.statvfs(directory)
    except OSError as error:
        return Finding(
            good=False, what=f"{directory}: {error.strerror}", remedy="Mount a tmpfs there, or set ONECOPY_DIR"
        )
    try:
        _try_a_file(directory)
    except OSError as error:
        what = f"{directory}: no file can be made, written and locked there: {error.strerror}"
        remedy = "Models load privately until this is mended. Another directory on a tmpfs: ONECOPY_DIR"
        return Finding(good=False, what=what, remedy=remedy)
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


def _try_a_file(directory: str) -> None:
    """What the registry needs of a directory, with a file that has no name."""
    number = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(number, bytes(mmap.PAGESIZE), 0)
        fcntl.fcntl(number, fcntl.F_OFD_SETLK, write_lock(1))
    finally:
        os.close(number)


def write_lock(length: int) -> bytes:
    """`struct flock` of 64-bit Linux, fcntl_locking(2), for so many bytes from the first one; 0: to the end, whatever that is."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, length, 0)


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
    if free == UNKNOWN:
        return Finding(good=True, what="how much memory a model may take cannot be seen here")
    return Finding(good=True, what=f"{free >> 20} MiB of memory may be taken by a model ({limit})")


def _memfd() -> Finding:
    try:
        os.close(os.memfd_create("onecopy-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
    except OSError as error:
        return Finding(
            good=False, what=f"memfd_create: {error.strerror}", remedy='A seccomp filter denies it: backend="posix"'
        )
    return Finding(good=True, what="memfd_create works")


def _huge_pages() -> Finding:
    why_not = process.no_huge_pages()
    if why_not is None:
        return Finding(good=True, what="models are made of huge pages, 2 MiB each")
    return Finding(good=True, what=f"models are made of small pages, as the kernel gives no huge ones: {why_not}")


def _proc() -> Finding:
    if not Path("/proc/self/fd").is_dir():
        return Finding(
            good=False, what="/proc is not mounted: memfds cannot be reached", remedy='Mount it, or backend="posix"'
        )
    if os.geteuid() != 0 and Path("/proc/self/fd").stat().st_uid != os.geteuid():
        remedy = "prctl(PR_SET_DUMPABLE, 1) after setuid(), or exec a fresh program"
        return Finding(good=False, what="this process is not dumpable: others may not open its memfds", remedy=remedy)
    return Finding(good=True, what="/proc/<pid>/fd of own processes can be opened")


def _holders(place: Place) -> list[Finding]:
    """Those whose descriptors this process may not open: it loads what they have once more."""
    found = []
    try:
        models = process.core_store(place).list()
    except OneCopyError:
        return []  # told already
    for pid, name in sorted({holder[:2] for model in models for holder in model["holders"]}):
        try:
            # The folder may be read with fewer rights than what is in it.
            next(Path(f"/proc/{pid}/fd").iterdir()).readlink()
        except PermissionError:
            what = f"process {pid} ({name}) does not let this one open what it has: {_why_refused(pid)}"
            remedy = 'Run both alike, or share with backend="posix"'
            found.append(Finding(good=False, what=what, remedy=remedy))
        except (OSError, StopIteration):  # gone meanwhile, or of another PID namespace
            continue
    return found


def _why_refused(pid: int) -> str:
    """ptrace(2), "Ptrace access mode checking": the first condition that does not hold."""
    theirs, mine = _status(pid), _status(os.getpid())
    if theirs["Uid"] != mine["Uid"] or theirs["Gid"] != mine["Gid"]:
        return f"it has user and group {theirs['Uid']}:{theirs['Gid']}, this one {mine['Uid']}:{mine['Gid']}"
    if Path(f"/proc/{pid}/fd").stat().st_uid != theirs["Uid"]:
        return "it is not dumpable (after setuid() or prctl: prctl(PR_SET_DUMPABLE, 1) mends it)"
    if theirs["CapPrm"] & ~mine["CapPrm"]:
        return "it has capabilities that this one lacks"
    return "it is in another user namespace, or not dumpable"


def _status(pid: int) -> dict[str, int]:
    """Effective user and group, and permitted capabilities, proc_pid_status(5)."""
    found = {"Uid": -1, "Gid": -1, "CapPrm": 0}
    for line in _read(f"/proc/{pid}/status").splitlines():
        name, _, value = line.partition(":")
        if name in ("Uid", "Gid"):
            found[name] = int(value.split()[1])
        elif name == "CapPrm":
            found[name] = int(value, 16)
    return found


def _overcommit() -> Finding:
    mode = _read("/proc/sys/vm/overcommit_memory")
    if mode == STRICT:
        remedy = "Raise vm.overcommit_ratio, or use mode 0 or 1"
        return Finding(
            good=False, what="vm.overcommit_memory=2 charges every attach with the model's size", remedy=remedy
        )
    return Finding(good=True, what=f"vm.overcommit_memory={mode or ' cannot be read here'}")


def _file_size() -> Finding:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return Finding(good=True, what="RLIMIT_FSIZE is unlimited")
    what = f"RLIMIT_FSIZE bounds every segment to {limit} bytes"
    if limit < REGISTRY:
        what = f"RLIMIT_FSIZE: files may have {limit} bytes, and a registry has {REGISTRY}: nothing can be shared"
    return Finding(good=False, what=what, remedy="ulimit -f unlimited")


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


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""

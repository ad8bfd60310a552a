"""What the kernel says of memory."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23


def meminfo(name: str) -> int:
    """Bytes; 0 for what this kernel does not count."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next((line for line in lines if line.startswith(name + ":")), ": 0").split()[1]) << 10


def available() -> int:
    return meminfo("MemAvailable")


def rollup(name: str, pid: int | str = "self") -> int:
    """Bytes of one line of smaps_rollup: Pss, Anonymous, ..."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name + ":")).split()[1]) << 10


def status(name: str, pid: int | str = "self") -> int:
    """Bytes of one line of status: RssAnon, VmPTE, VmHWM, ..."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next((line for line in lines if line.startswith(name + ":")), ": 0").split()[1]) << 10


def described() -> dict[str, object]:
    names = ("/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory": meminfo("MemTotal"),
        "kernel": os.uname().release,
        **{Path(name).name: Path(name).read_text().strip() for name in names if Path(name).exists()},
    }


MAP_NORESERVE, MAP_FIXED, PROT_NONE = 0x4000, 0x10, 0
CHUNK = 2 << 20


def touch_segment(holder: int) -> int:
    """Map the segment that process `holder` has, as onecopy maps it, and touch every page; its size. Stays mapped."""
    folder = Path(f"/proc/{holder}/fd")
    names = (path for path in folder.iterdir() if str(path.readlink()).startswith("/memfd:onecopy"))
    number = os.open(next(names), os.O_RDONLY)
    size = os.fstat(number).st_size
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    private = mmap.MAP_PRIVATE | MAP_NORESERVE
    # Huge pages want an address that is a multiple of theirs.
    reserved = libc.mmap(None, size + CHUNK, PROT_NONE, private | mmap.MAP_ANONYMOUS, -1, 0)
    at = -(-reserved // CHUNK) * CHUNK
    assert libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, private | MAP_FIXED, number, 0) == at
    assert libc.madvise(at, size, MADV_POPULATE_READ) == 0, os.strerror(ctypes.get_errno())
    os.close(number)
    return size

"""What the kernel says of memory."""

from __future__ import annotations

import os
from pathlib import Path


def meminfo(name: str) -> int:
    """Bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) << 10


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

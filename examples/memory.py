"""What a process holds, asked of the kernel (proc(5), smaps)."""

import ctypes
import gc
import re
from pathlib import Path

MALLOC_TRIM = ctypes.CDLL(None).malloc_trim
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ (\S+) (\d+) +(.*)")


def anonymous() -> int:
    """Bytes that this process holds alone, after giving back to the system what is free."""
    gc.collect()
    MALLOC_TRIM(0)
    with Path("/proc/self/smaps_rollup").open(encoding="ascii") as lines:
        return next(_bytes(line) for line in lines if line.startswith("Anonymous:"))


def mapped(names: str) -> dict[str, int]:
    """Bytes of files in this process's page tables that are not its private copies, by inode; `names`: a pattern."""
    found: dict[str, int] = {}
    inode = ""
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if mapping := MAPPING.match(line):
                inode = f"{mapping[1]}:{mapping[2]}" if re.match(names, mapping[3]) else ""
            elif inode and line.startswith("Rss:"):
                found[inode] = found.get(inode, 0) + _bytes(line)
            elif inode and line.startswith("Anonymous:"):
                found[inode] -= _bytes(line)
    return found


def _bytes(line: str) -> int:
    return int(line.split()[1]) * 1024

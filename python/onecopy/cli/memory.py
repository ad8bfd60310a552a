"""What a model costs each process that has it, as the kernel counts: proc_pid_smaps(5)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

#: A mapping's first line: addresses, rights, offset, device, inode, path.
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ (?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one process, over its mappings of one file, in bytes."""

    #: Proportional: a page that n processes map counts 1/n. The sum over all of them is what the model takes.
    pss: int
    #: Pages that this process wrote to, and so has for itself.
    private: int


def cost(pid: int, file: tuple[int, int]) -> Cost | None:
    """None where the process cannot be looked into, or maps nothing of `file` (device, inode)."""
    try:
        with Path(f"/proc/{pid}/smaps").open(encoding="utf-8", errors="replace") as lines:
            mapped, pss, private = False, 0, 0
            ours = False
            for line in lines:
                if head := MAPPING.match(line):
                    device = os.makedev(int(head["major"], 16), int(head["minor"], 16))
                    ours = (device, int(head["inode"])) == file
                    mapped |= ours
                elif ours and line.startswith("Pss:"):
                    pss += _bytes(line)
                elif ours and line.startswith("Anonymous:"):
                    private += _bytes(line)
    except OSError:
        return None
    return Cost(pss, private) if mapped else None


def _bytes(line: str) -> int:
    return int(line.split()[1]) << 10

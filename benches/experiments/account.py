"""What a tree of processes takes: CPU, memory and kills, counted by the kernel in cgroups of its own (cgroups(7), 1 and 2)."""

from __future__ import annotations

import paths  # noqa: F401 isort: skip (before what lies there)

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from cgroups import Group, places
from notes import read_cpu

TICKS = os.sysconf("SC_CLK_TCK")


class Account:
    """A memory group and, where version 1 has it apart, a CPU group beside it."""

    def __init__(self, memory: Group, cpu: Path) -> None:
        self._memory = memory
        self._cpu = cpu
        #: Of which a worker reads what all have used so far.
        self.cpu_file = cpu / ("cpu.stat" if memory.v2 else "cpuacct.usage")

    def join(self) -> None:
        """Plays in a child, before exec."""
        for folder in {self._memory.path, self._cpu}:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def cpu(self) -> tuple[float, float]:
        """User and system seconds of all, the dead included."""
        if self._memory.v2:
            lines = dict(line.split() for line in self.cpu_file.read_text().splitlines())
            return int(lines["user_usec"]) / 1e6, int(lines["system_usec"]) / 1e6
        lines = dict(line.split() for line in (self._cpu / "cpuacct.stat").read_text().splitlines())
        user, system = int(lines["user"]), int(lines["system"])
        # The two are samples by ticks; their sum is exact elsewhere.
        scale = read_cpu(self.cpu_file) / max(1, user + system)
        return user * scale, system * scale

    def unreclaimable(self) -> int:
        """Bytes that nothing but the end of a process gives back: anonymous and shared memory, without page cache."""
        lines = dict(line.split() for line in (self._memory.path / "memory.stat").read_text().splitlines())
        return sum(int(lines[name]) for name in (("anon", "shmem") if self._memory.v2 else ("rss", "shmem")))

    @property
    def kills(self) -> int:
        return self._memory.kills()

    def kill(self) -> None:
        """Everybody who is still in it."""
        while pids := (self._memory.path / "cgroup.procs").read_text().split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.02)

    def remove(self) -> None:
        self._memory.remove()
        if self._cpu != self._memory.path:
            self._cpu.rmdir()


@contextlib.contextmanager
def opened(limit: int | None = None) -> Iterator[Account | None]:
    """A fresh one, with so many bytes of memory at most; None where this process may make none. Its processes end with it."""
    memory = Group.make()
    if memory is None:
        yield None
        return
    try:
        if limit is not None:
            memory.limit = limit
        account = Account(memory, memory.path if memory.v2 else beside(memory.path.name))
    except OSError:
        memory.remove()
        yield None
        return
    try:
        yield account
    finally:
        account.kill()
        account.remove()


def beside(name: str) -> Path:
    """A group of the CPU's hierarchy of version 1."""
    for _, parent in places("cpuacct"):
        with contextlib.suppress(OSError):
            path = parent / f"{name}-{uuid.uuid4().hex[:4]}"
            path.mkdir()
            return path
    raise FileNotFoundError("no cpuacct group can be made here")


def busy() -> tuple[float, float]:
    """Seconds that the machine's CPUs have worked, and that others had them while we waited (proc(5), /proc/stat)."""
    user, nice, system, _, _, interrupts, soft, stolen = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + interrupts + soft) / TICKS, stolen / TICKS

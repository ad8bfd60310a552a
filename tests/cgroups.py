"""A pytest plugin: a memory cgroup of the test's own, in which the kernel counts and kills."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest
from processes import wait_until


def places(controller: str) -> Iterator[tuple[Path, Path]]:
    """Where groups with that controller may be made: (where it is mounted, a group to make them in)."""
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, right = line.split(" - ")
        root, point = left.split()[3:5]
        kind, _, options = right.split(maxsplit=2)
        if kind == "cgroup2":
            mounts[""] = root, point
        elif kind == "cgroup" and controller in options.split(","):
            mounts[controller] = root, point
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            if name in mounts:
                root, point = mounts[name]
                own = Path(point) / path.removeprefix(root).lstrip("/")
                # A group of version 2 with processes in it has no groups with limits below it.
                for place in (own, own.parent) if name else (own.parent, own):
                    yield Path(point), place


class Group:
    """A memory cgroup, version 1 or 2 (cgroups(7)), below our own one or beside it."""

    def __init__(self, path: Path, mounted_at: Path) -> None:
        self.path = path
        self.mounted_at = mounted_at
        self._inner: list[Self] = []
        self.v2 = (path / "memory.max").exists()

    @classmethod
    def make(cls) -> Self | None:
        """None where this process may make none: it says so to whoever reads the output."""
        for mounted_at, parent in places("memory"):
            path = parent / f"onecopy-test-{uuid.uuid4().hex[:12]}"
            with contextlib.suppress(OSError):
                path.mkdir()
                group = cls(path, mounted_at)
                try:
                    group.limit = group.limit
                except OSError:
                    path.rmdir()
                else:
                    return group
        return None

    def _read(self, v1: str, v2: str) -> int:
        text = (self.path / (v2 if self.v2 else v1)).read_text().strip()
        return 1 << 62 if text == "max" else int(text)

    @property
    def limit(self) -> int:
        return self._read("memory.limit_in_bytes", "memory.max")

    @limit.setter
    def limit(self, limit: int) -> None:
        (self.path / ("memory.max" if self.v2 else "memory.limit_in_bytes")).write_text(str(limit))

    @property
    def usage(self) -> int:
        return self._read("memory.usage_in_bytes", "memory.current")

    @property
    def peak(self) -> int:
        return self._read("memory.max_usage_in_bytes", "memory.peak")

    def stat(self, v1: str, v2: str) -> int:
        lines = (self.path / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)[v2 if self.v2 else v1])

    def kills(self) -> int:
        file = self.path / ("memory.events" if self.v2 else "memory.oom_control")
        return int(dict(line.split() for line in file.read_text().splitlines())["oom_kill"])

    def add(self, pid: int) -> None:
        (self.path / "cgroup.procs").write_text(str(pid))

    def inner(self) -> Self:
        """A group in this one, without a limit of its own."""
        path = self.path / "inner"
        path.mkdir()
        self._inner.append(type(self)(path, self.mounted_at))
        return self._inner[-1]

    def remove(self) -> None:
        """Once the last process is out of it."""
        for inner in self._inner:
            inner.remove()
        wait_until(lambda: not (self.path / "cgroup.procs").read_text())
        self.path.rmdir()


@pytest.fixture
def group() -> Iterator[Group | None]:
    made = Group.make()
    yield made
    if made is not None:
        made.remove()

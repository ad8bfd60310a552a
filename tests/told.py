"""What a process gets and is told where sharing may not be possible. Run in children, see `processes.Forked`."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tasks

import onecopy
from onecopy import cli, process


class Told(NamedTuple):
    """What came of one acquire."""

    total: float
    role: str
    backend: str
    warnings: list[str]


class Heard(logging.Handler):
    """Keeps the warnings of a logger, and keeps them off standard error."""

    def __init__(self, name: str = "onecopy") -> None:
        super().__init__(logging.WARNING)
        self.logger = logging.getLogger(name)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        self.logger.addHandler(self)
        self.logger.propagate = False
        return self.messages

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)


def acquire(namespace: str, log: str, mib: int, backend: str = "auto", tag: str = "model") -> Told:
    """Acquires, asks again, and keeps it."""

    def load() -> tasks.Model:
        return tasks.counted(log, mib=mib) if log else tasks.Model(1.0, mib)

    store = onecopy.Store(namespace, backend=backend)
    holder, again = onecopy.Holder(load, tag, store=store), onecopy.Holder(load, tag, store=store)
    with Heard() as warnings:
        model = holder.acquire()
        assert again.acquire() is model
    tasks.KEPT[tag] = holder
    assert holder.info is not None
    return Told(model.total(), holder.info.role, holder.info.backend, warnings)


@contextlib.contextmanager
def squeezed_by_others(limit: str, spare: int) -> Iterator[None]:
    """As if others took the memory right after it was found to be free: `limit` goes down to that."""
    from onecopy import _publish

    fill = _publish._fill

    def squeeze(*given: Any) -> int:
        file = Path(limit)
        usage = int(file.with_name("memory.usage_in_bytes").read_text())
        file.write_text(str(usage + spare))
        return fill(*given)

    _publish._fill = squeeze
    try:
        yield
    finally:
        _publish._fill = fill


def acquire_squeezed(limit: str, spare: int, *args: Any, **kwargs: Any) -> Told:
    with squeezed_by_others(limit, spare):
        return acquire(*args, **kwargs)


def eat(mib: int) -> int:
    """Takes so much private memory, and keeps it; `digest` says whether it is still there."""
    tasks.KEPT["eaten"] = np.ones(mib << 20, np.uint8)
    return mib << 20


def digest() -> tuple[int, str]:
    """The sum of what was eaten, and whether this process offers itself to the OOM killer."""
    return int(tasks.KEPT["eaten"].sum(dtype=np.int64)), Path("/proc/self/oom_score_adj").read_text().strip()


def error_of_acquire(*args: Any, **kwargs: Any) -> str:
    """The error, or an empty text."""
    try:
        acquire(*args, **kwargs)
    except onecopy.errors.OneCopyError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def acquire_with(free: int, *args: Any, **kwargs: Any) -> Told:
    """While no more than so many descriptors are free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open("/dev/null", os.O_RDONLY)
    os.close(lowest)
    # The limit is on numbers: those that are free below it, and so many more.
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + free, hard))
    try:
        return acquire(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def publish(namespace: str, mib: int, tag: str = "published", **how: Any) -> str:
    """The error, or an empty text."""
    try:
        tasks.publish(namespace, tag, mib=mib, **how)
    except onecopy.errors.OneCopyError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def let_go(namespace: str) -> list[str]:
    """What is left in /dev/shm once nobody here has anything, the registry aside."""
    with Heard():
        tasks.KEPT.clear()
        gc.collect()
        with contextlib.suppress(onecopy.errors.OneCopyError):
            process.core_store(process.Place(namespace)).leave()
    return left(namespace)


def left(namespace: str) -> list[str]:
    folder = Path("/dev/shm")
    return [path.name for path in folder.glob(f"onecopy-v*-{namespace}-*")] if folder.is_dir() else []


def doctor(namespace: str = "default") -> tuple[int, str]:
    """Its exit status, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(["--namespace", namespace, "doctor"])
    return code, said.getvalue()

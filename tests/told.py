"""What a process gets and is told where sharing may not be possible. Run in children, see `processes.Forked`."""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

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
    """Keeps the warnings of onecopy, and keeps them off standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logger = logging.getLogger("onecopy")
        logger.addHandler(self)
        logger.propagate = False
        return self.messages

    def __exit__(self, *_: object) -> None:
        logging.getLogger("onecopy").removeHandler(self)


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


def publish(namespace: str, mib: int, **how: Any) -> str:
    """The error, or an empty text."""
    try:
        tasks.publish(namespace, "published", mib=mib, **how)
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
    registry = f"onecopy-v1-{os.geteuid()}-{namespace}"
    found = Path("/dev/shm").glob("onecopy-*") if Path("/dev/shm").is_dir() else []
    return [path.name for path in found if path.name != registry]


def doctor(namespace: str = "default") -> tuple[int, str]:
    """Its exit status, and what it says."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = cli.main(["--namespace", namespace, "doctor"])
    return code, said.getvalue()

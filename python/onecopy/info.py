"""What users are told of a model: plain, frozen records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model, as this process has it."""

    tag: str
    version: str | None
    namespace: str
    #: Counts the replacements of the tag, from 1; 0 where the model is private.
    generation: int
    role: Literal["publisher", "attacher", "private"]
    backend: Literal["memfd", "posix", "private"]
    #: Bytes in the shared mapping, one copy for the machine.
    shared_bytes: int
    #: Bytes of the mapping in huge pages when the model was published (`Store(huge=...)`); 0 where the kernel gave none.
    huge_bytes: int
    #: Bytes that this process has for itself: the skeleton, and for a publisher what could not be re-pointed.
    #: Where the role is "private": by how much this process's anonymous memory grew while the model was loaded.
    private_bytes: int
    #: What `acquire` took in all.
    seconds: float
    #: Of these: waiting for another process to load.
    wait_seconds: float
    #: Of these: the constructor. 0.0 for an attacher.
    load_seconds: float
    #: Why the model is private; empty otherwise.
    reason: str = ""


class HolderProcess(NamedTuple):
    """A living process with a lease."""

    #: As its own PID namespace numbers it.
    pid: int
    name: str
    #: When it took its lease, in seconds since the epoch.
    since: float


@dataclass(frozen=True, slots=True)
class StoredModel:
    """One row of `Store.list()`."""

    tag: str
    version: str | None
    #: "loading", "ready", "unshareable", or "stale": all who had to do with it are dead, or its file is
    #: gone (`reason` says which); the next use clears it away.
    state: str
    generation: int
    #: Superseded or removed, and still held by somebody.
    unnamed: bool
    pinned: bool
    backend: str | None
    shared_bytes: int
    #: Qualified name of the constructor that made it; empty where an object was published.
    constructor: str
    #: (pid, name) of the process that loads it, or that published it, while that lives.
    publisher: tuple[int, str] | None
    #: When it got its state, in seconds since the epoch.
    since: float
    holders: tuple[HolderProcess, ...]
    reason: str
    #: (device, inode) of its memory, by which stat(2) and /proc/<pid>/maps tell files apart; None where it has none.
    file: tuple[int, int] | None

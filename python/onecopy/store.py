"""`Store`: the verbs under the holder."""

from __future__ import annotations

import os
import re
from types import TracebackType
from typing import Any

from onecopy import process
from onecopy.errors import BadNameError, ModelNotFoundError
from onecopy.info import HolderProcess, ModelInfo, StoredModel
from onecopy.process import Acquired, Constructor, ModelKey, Place

BACKENDS = ("auto", "memfd", "posix")
HUGE = ("auto", "always", "never")
#: What the core takes (`namespace_fits`), to be told before anything is loaded.
NAMESPACE = re.compile(r"[A-Za-z0-9._-]{1,64}")
LIKE_A_SEGMENT = re.compile(r"-[0-9a-f]{32}\Z")

# `Store.list` hides the builtin from annotations in its class.
_Models = list[StoredModel]
_Swept = list[tuple[str, str, str]]


class Lease:
    """One acquired model. `release()` lets go; a model that is still in use keeps working."""

    __slots__ = ("_acquired", "_info")

    def __init__(self, acquired: Acquired) -> None:
        self._acquired: Acquired | None = acquired
        self._info = acquired.info

    @property
    def object(self) -> Any:
        """The model.

        Raises ValueError after `release()`.
        """
        if self._acquired is None:
            message = f"the lease of {self._info.tag!r} was released: acquire or attach again"
            raise ValueError(message)
        return self._acquired.object

    @property
    def info(self) -> ModelInfo:
        return self._info

    def release(self) -> None:
        """Let go. A second release does nothing."""
        self._acquired = None

    def __enter__(self) -> Any:
        return self.object

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class Store:
    """The models of one namespace of this user on this machine. Opening one costs nothing: no file is touched yet.

    Args:
        namespace: A set of tags; part of a file name: 1 to 64 of a-z A-Z 0-9 - _ .
        directory: Where the registry lives, a tmpfs; `ONECOPY_DIR` or /dev/shm if None.
        backend: "memfd" (anonymous, sealed), "posix" (named: survives without holders, reaches other PID namespaces
            that share the directory), or "auto".
        huge: Which of a model's pages are huge (2 MiB), in the sense of tmpfs(5): "auto", all that lie wholly within it;
            "always", the last one too, up to 2 MiB more; "never". Where the kernel has none, they stay small.
    """

    def __init__(
        self,
        namespace: str = "default",
        *,
        directory: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        huge: str = "auto",
    ) -> None:
        for name, word, words in ("backend", backend, BACKENDS), ("huge", huge, HUGE):
            if word not in words:
                message = f"{name} {word!r}: one of {', '.join(words)}"
                raise BadNameError(message)
        process.check_text("namespace", namespace)
        if not NAMESPACE.fullmatch(namespace) or LIKE_A_SEGMENT.search(namespace):
            message = (
                f"namespace {namespace!r}: 1 to 64 letters, digits, '.', '_' and '-', not ending like a segment's name "
                "('-' and 32 hexadecimal digits)"
            )
            raise BadNameError(message)
        process.check_path("directory", directory)
        self.place = Place(namespace, os.fsdecode(directory) if directory is not None else None, backend, huge)

    def acquire(
        self, tag: str, constructor: Constructor, *, version: str | None = None, timeout: float | None = None
    ) -> Lease:
        """The model under `tag`: the one of this process, else attached, else made by `constructor`, once on the machine."""
        process.check_callable(constructor)
        return Lease(process.acquire(self.place, ModelKey.checked(tag, version), constructor, timeout=timeout))

    def publish(
        self, tag: str, obj: object, *, version: str | None = None, pin: bool = False, replace: bool = False
    ) -> Lease:
        """Share `obj` under `tag`. Its own torch tensors end up on the mapping too.

        `pin`: it stays without leases until it is removed by hand. `replace`: supersede what is there; processes keep
        the generation they have.

        Raises ModelExistsError, UnshareableError, NoRoomError (with need and free in bytes).
        """
        from onecopy._verbs import publish

        return Lease(publish(self.place, ModelKey.checked(tag, version), obj, pin=pin, replace=replace))

    def attach(self, tag: str, *, version: str | None = None, timeout: float | None = None) -> Lease:
        """The model under `tag`, which another process published or is loading.

        Raises ModelNotFoundError at once where nothing is there, ModelTimeoutError where its loader takes longer than
        `timeout` seconds, UnshareableError where it is private, or cannot be rebuilt in this process.
        """
        from onecopy._verbs import attach

        return Lease(attach(self.place, ModelKey.checked(tag, version), timeout))

    def list(self) -> _Models:
        """Every model of the namespace, those that load and those that were superseded and are still held too."""
        return [_stored(row) for row in self._core().list() if row["state"] != "vacant"]

    def show(self, tag: str) -> _Models:
        """What `list` says of one tag: a row for each version and generation.

        Raises ModelNotFoundError.
        """
        process.check_tag("tag", tag)
        rows = [row for row in self.list() if row.tag == tag]
        if not rows:
            raise self._nothing(tag)
        return rows

    def verify(self, tag: str, *, version: str | None = None) -> int:
        """Check every buffer of a model (of one version, if given) against its checksum; the number of bytes that were checked.

        Raises CorruptError, ModelNotFoundError.
        """
        from onecopy._verbs import verify

        return sum(checked for _, checked in verify(self.place, ModelKey.checked(tag, version)))

    def remove(self, tag: str, *, version: str | None = None) -> int:
        """Unname a tag at once (one version of it, if given); how many models that were.

        The memory goes with the last lease; the next acquire loads.

        Raises ModelNotFoundError.
        """
        ModelKey.checked(tag, version)
        removed: int = self._core().remove(tag, version)
        if not removed:
            raise self._nothing(tag, version)
        return removed

    def sweep(self, *, dry_run: bool = False) -> _Swept:
        """Remove what dead processes left; (kind, what, why) each. `dry_run` only says what would go."""
        swept: _Swept = self._core().sweep(dry_run)
        return swept

    def _core(self) -> Any:
        return process.core_store(self.place)

    def _nothing(self, tag: str, version: str | None = None) -> ModelNotFoundError:
        from onecopy._verbs import nothing

        return nothing(self.place, ModelKey(tag, version or None))

    def __repr__(self) -> str:
        namespace, *options = self.place._asdict().items()
        return f"Store({namespace[1]!r}, {', '.join(f'{name}={value!r}' for name, value in options)})"


def _stored(row: dict[str, Any]) -> StoredModel:
    return StoredModel(
        tag=row["tag"],
        version=row["version"] or None,
        state=row["state"],
        generation=row["generation"],
        unnamed=row["unnamed"],
        pinned=row["pinned"],
        backend=row["backend"],
        shared_bytes=row["shared_bytes"],
        constructor=row["constructor"],
        publisher=row["publisher"],
        since=row["since"],
        holders=tuple(HolderProcess(*holder) for holder in row["holders"]),
        reason=row["reason"].removeprefix(process.QUIETLY),
        file=row["file"],
    )

"""Native part of onecopy. Use `onecopy.Store` and `onecopy.Holder`."""

import sys
from typing import Any, TypeAlias, final

__all__ = [
    "Again",
    "Attached",
    "Hold",
    "Loading",
    "Mapping",
    "Patience",
    "Private",
    "Publishing",
    "Store",
    "Waiting",
    "adopt",
    "forget_parent",
    "leave",
    "no_huge_pages",
    "trim",
]

_Key: TypeAlias = tuple[str, str, str]
_Constructor: TypeAlias = tuple[str, int]
# `Store.list` hides the builtin from annotations in its class.
_Rows: TypeAlias = list[dict[str, Any]]
_Swept: TypeAlias = list[tuple[str, str, str]]
_Buffers: TypeAlias = list[tuple[int, int]]

@final
class Store:
    """One namespace in one directory. Opening the same place again in a process gives the same store."""

    def __new__(cls, directory: str, namespace: str) -> Store: ...
    @property
    def path(self) -> str:
        """The registry's file."""
    @staticmethod
    def room() -> tuple[int, str]:
        """Memory that a model may take now: bytes, and the tightest limit on it in words."""
    def acquire(
        self, key: _Key, constructor: _Constructor, *, may_load: bool, waited: int | None = None
    ) -> Attached | Loading | Waiting | Again | Private:
        """Asks once.

        `key`: (tag, version, compatibility). `constructor`: (name, code hash). `waited`: the episode in which the
        caller began to wait.
        """
    def wait(self, waiting: Waiting, seconds: float) -> None:
        """Sleeps until the entry changes, at most `seconds`; may wake early."""
    def refuse(self, key: _Key, backend: str, pin: bool, replace: bool) -> None:
        """What can be said before an object is made or taken apart.

        Raises BadNameError for a backend that cannot pin, ModelExistsError for a tag that is taken.
        """
    def announce(
        self,
        key: _Key,
        constructor: _Constructor,
        *,
        skeleton: bytes,
        buffers: _Buffers,
        data_bytes: int,
        excess: int,
        backend: str,
        huge: str,
        pin: bool,
        replace: bool,
        loading: Loading | None = None,
    ) -> Publishing:
        """Looks for room and takes it.

        `buffers`: (offset in the data area, bytes), in order. `excess`: the most that is written and not yet freed at
        any moment of the fill, in bytes. `backend`: "auto", "memfd" or "posix". `huge`:
        "auto", "always" or "never".
        """
    def end_loading(self, loading: Loading, how: str, reason: str) -> None:
        """The loader ends without a model; `how`: "failed", "unshareable" or "gave up"."""
    def remove(self, tag: str, version: str | None = None) -> int: ...
    def list(self) -> _Rows:
        """A dict per model, unnamed and loading ones too."""
    def sweep(self, dry_run: bool) -> _Swept:
        """Removes what the dead left; (kind, what, why) each."""
    def verify(self, mapping: Mapping) -> int:
        """Checks the buffers of an attached segment; the number of bytes that were checked."""
    def remove_registry_if_unused(self) -> bool:
        """Removes the registry's file if nobody uses it."""
    def leave(self) -> None:
        """Clean exit: our leases and our place in the table go."""

@final
class Mapping:
    """A private, writable view of one segment; arrays over it keep it alive, and with it the lease."""

    @property
    def nbytes(self) -> int: ...
    @property
    def address(self) -> int: ...
    @property
    def uuid(self) -> bytes:
        """Identity of the segment: 16 bytes."""
    def hold(self, linger: float | None) -> Hold:
        """Something that keeps the mapping until it is dropped, and `linger` seconds longer (None: until the process exits)."""
    def prefault(self) -> None:
        """Maps the pages ahead of use, in the housekeeping thread."""
    if sys.version_info >= (3, 12):  # before, the buffer protocol is not visible from Python
        def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Hold:
    """Keeps a mapping; when dropped, the housekeeping thread keeps it for the linger."""

    def end(self) -> None:
        """Lets go without linger, and ends the linger of earlier holds of this segment: a newer one took its place."""

@final
class Attached:
    """A segment mapped into this process."""

    mapping: Mapping
    skeleton: bytes
    data_offset: int
    huge_bytes: int
    generation: int
    shared_bytes: int
    backend: str
    constructor: tuple[str, int]

@final
class Loading:
    """The caller is the loader: it publishes, or says how it ended."""

@final
class Waiting:
    """Another process loads."""

    @property
    def pid(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def since(self) -> float:
        """Seconds since the epoch."""
    @property
    def episode(self) -> int: ...

@final
class Again:
    """Those who hold it are dying: ask again in a moment."""

@final
class Private:
    """Load privately, for this reason."""

    def __new__(cls, reason: str, unshareable: bool = False) -> Private: ...
    @property
    def reason(self) -> str: ...
    @property
    def unshareable(self) -> bool: ...

@final
class Patience:
    """How long a waiter believes in its loader; one for each wait."""

    def __new__(cls) -> Patience: ...
    def exhausted(self, waiting: Waiting) -> str | None:
        """Why the loader is waited for no longer (it is stopped, or hangs), or None."""

@final
class Publishing:
    """Fill every buffer in order, seal, inspect, publish; dropped before that, nothing of it stays."""

    def data_offset(self) -> int: ...
    def backend(self) -> str: ...
    def fill(self, source: object) -> int:
        """Copies the next buffer; its offset in the mapping."""
    def mapping(self) -> Mapping:
        """A mapping of the unsealed segment, for re-pointing what was filled."""
    def seal(self) -> None: ...
    def inspect(self) -> Attached:
        """The sealed segment over a fresh mapping, as an attacher sees it."""
    def publish(self) -> int | None:
        """READY: the generation; None where the tag was replaced meanwhile."""
    def close(self) -> None:
        """Lets go of what filling needed. Call it when done; dropping the object without it does the same."""

def adopt(mappings: list[Mapping]) -> None:
    """In a forked child, before anything else: takes leases of its own for what it inherited."""

def forget_parent() -> None:
    """In a forked child that has adopted its mappings: lets go of what its parent's threads kept."""

def leave() -> None:
    """Clean exit: this process's leases and its places in the tables go."""

def no_huge_pages() -> str | None:
    """Why this kernel makes no huge pages; None where it does."""

def trim() -> None:
    """Gives freed heap memory back to the system (malloc_trim(3))."""

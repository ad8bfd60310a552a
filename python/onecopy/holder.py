"""`Holder`: one model, acquired when it is needed."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from onecopy import process
from onecopy.process import ModelKey, Place

if TYPE_CHECKING:
    from collections.abc import Callable

    from onecopy.info import ModelInfo
    from onecopy.process import Acquired, OnUnshareable
    from onecopy.store import Store

T = TypeVar("T")


class Holder(Generic[T]):
    """One copy of `constructor()` per machine, under the name `tag`. Cheap and picklable: nothing is loaded yet.

        holder = onecopy.Holder(load_t5, "t5-large")
        with holder as model:
            ...

    Args:
        constructor: Makes the model; runs in one process of the machine, the others map its weights.
        tag: The name under which it is shared, 1 to 255 bytes.
        version: Your name for the content (a path, a hash); another version is another model.
        store: Where it is shared; the default store if None.
        timeout: Seconds to wait while another process loads; None: as long as that process works.
        linger: Seconds that this process keeps its lease after its last user let go; None: until it exits.
        on_unshareable: "warn" loads privately with one warning, "raise" raises UnshareableError.
    """

    __slots__ = ("__weakref__", "_acquired", "_constructor", "_key", "_linger", "_on_unshareable", "_place", "_timeout")

    def __init__(
        self,
        constructor: Callable[[], T],
        tag: str,
        *,
        version: str | None = None,
        store: Store | None = None,
        timeout: float | None = None,
        linger: float | None = 0.0,
        on_unshareable: OnUnshareable = "warn",
    ) -> None:
        if on_unshareable not in ("warn", "raise"):
            message = f'on_unshareable {on_unshareable!r}: "warn" or "raise"'
            raise ValueError(message)
        process.check_seconds("timeout", timeout)
        process.check_seconds("linger", linger)
        process.check_callable(constructor)
        if store is not None and not hasattr(store, "place"):
            message = f"store must be a onecopy.Store, not {store!r}: Store({store!r}) opens a namespace of that name"
            raise TypeError(message)
        self._constructor = constructor
        self._key = ModelKey.checked(tag, version)
        self._place = store.place if store is not None else Place()
        self._timeout = timeout
        self._linger = linger
        self._on_unshareable: OnUnshareable = on_unshareable
        self._acquired: Acquired | None = None

    def acquire(self) -> T:
        """The model; loaded once on the machine. Asking again while it is acquired gives the same object.

        Raises what the constructor raises, ModelTimeoutError, LoaderKilledError. What keeps it from being shared is
        told by one warning, and by `info.reason`.
        """
        acquired = self._acquired
        if acquired is None:
            acquired = self._acquired = process.acquire(
                self._place,
                self._key,
                self._constructor,
                timeout=self._timeout,
                linger=self._linger,
                on_unshareable=self._on_unshareable,
            )
        return acquired.object  # type: ignore[return-value]

    def release(self) -> None:
        """Let go. A model that is still in use keeps working; a second release does nothing."""
        self._acquired = None

    @property
    def info(self) -> ModelInfo | None:
        """What `acquire` did; None while it is not acquired."""
        return self._acquired.info if self._acquired is not None else None

    def __enter__(self) -> T:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def __getstate__(self) -> tuple[Any, ...]:
        return (self._constructor, self._key, self._place, self._timeout, self._linger, self._on_unshareable)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._constructor, self._key, self._place, self._timeout, self._linger, self._on_unshareable = state
        self._acquired = None

    def __repr__(self) -> str:
        return f"Holder({self._constructor!r}, {self._key.tag!r}, version={self._key.version!r})"

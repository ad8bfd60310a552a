"""What this process has: one slot per model, whoever asks for it and however often.

A slot holds nothing strongly. Each acquired holder has the slot's `Acquired`, and with it the object; when the last one
lets go, the object lives on only where the user has it, and is found again by weak reference. So nothing has to be
counted, and letting go takes no lock: it may happen in a finalizer, in the middle of any call.
"""

from __future__ import annotations

import atexit
import errno
import numbers
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from onecopy import _key
from onecopy.errors import (
    BadNameError,
    ModelTimeoutError,
    RecursionInConstructorError,
    SystemCallError,
    UnshareableError,
)

if TYPE_CHECKING:
    from onecopy._core import Hold, Mapping
    from onecopy.info import ModelInfo

Constructor = Callable[[], object]
OnUnshareable = Literal["warn", "raise"]


#: Where POSIX shared memory lives, shm_overview(7).
SHM = "/dev/shm"  # noqa: S108
#: Before a reason in the table: nobody needs to hear it, the model is too small. Those who come later are told quietly.
QUIETLY = "quietly: "
#: Bytes of UTF-8 in a tag: the registry has room for so many (`store.rs`).
MAX_TAG = 255


class Place(NamedTuple):
    """Where a store lives. `directory` None: `ONECOPY_DIR`, or /dev/shm."""

    namespace: str = "default"
    directory: str | None = None
    backend: str = "auto"
    huge: str = "auto"

    def resolved(self) -> str:
        """The same text for every spelling of a directory."""
        return os.path.abspath(self.directory or os.environ.get("ONECOPY_DIR") or SHM)  # noqa: PTH100 (no links followed)


class ModelKey(NamedTuple):
    tag: str
    version: str | None = None

    @property
    def instead(self) -> str:
        """For messages: what happens where the model is not shared."""
        return "This process has a copy of its own"

    @classmethod
    def checked(cls, tag: str, version: str | None = None) -> ModelKey:
        """A key whose words can be used.

        Raises TypeError for what is no text, BadNameError for a text that is no tag, or no version.
        """
        check_tag("tag", tag)
        if version is not None:
            check_text("version", version)
            if "\0" in version:
                message = f"version {version!r}: text without NUL is wanted"
                raise BadNameError(message)
        return cls(tag, version or None)

    def __str__(self) -> str:
        # By repr: a line break in a tag is none in a message.
        return repr(self.tag) + (f" (version {self.version!r})" if self.version else "")


class Acquired:
    """One object of this process, and what keeps its mapping. All holders of a model share one of these."""

    __slots__ = ("__weakref__", "hold", "info", "object", "quiet", "state")

    def __init__(self, obj: object, state: object, info: ModelInfo, hold: Hold | None, *, quiet: bool = False) -> None:
        self.object = obj
        self.state = state
        self.info = info
        #: Keeps the mapping, and the linger after it; None for a private model.
        self.hold = hold
        #: Private for a reason that nobody needs to hear: it is too small.
        self.quiet = quiet

    def checked(self, key: ModelKey, on_unshareable: OnUnshareable) -> Acquired:
        """Itself.

        Raises UnshareableError for a private model, where the caller wants that.
        """
        if on_unshareable == "raise" and self.info.role == "private" and not self.quiet:
            message = f"{key} is not shared: {self.info.reason}"
            raise UnshareableError(message)
        return self


class _Seen(NamedTuple):
    """What is remembered of an object that nobody here may have acquired any more."""

    obj: weakref.ref[Any]
    info: ModelInfo
    mapping: weakref.ref[Mapping] | None
    linger: float | None
    quiet: bool


class Slot:
    """One model in this process."""

    def __init__(self, key: ModelKey) -> None:
        self.key = key
        self._lock = threading.RLock()
        self._inside = False
        self._acquired: weakref.ref[Acquired] | None = None
        self._seen: _Seen | None = None
        #: What made it, as `_key.describe` says; no name where an object was published.
        self._made_by = ("", 0)
        #: `_key.code_of` a constructor that is known to be the same.
        self._code: weakref.ref[Any] | None = None

    def current(self) -> Acquired | None:
        """What a living holder has. Takes no lock."""
        return self._acquired() if self._acquired is not None else None

    def alive(self) -> Acquired | None:
        """The same, or an object that only the user still has. Under the slot's lock."""
        acquired = self.current()
        if acquired is None and self._seen is not None:
            seen = self._seen
            obj = seen.obj()
            if obj is None:
                return None
            mapping = seen.mapping() if seen.mapping is not None else None
            hold = mapping.hold(seen.linger) if mapping is not None else None
            # What came with the object is not kept for it: it could keep the object.
            acquired = Acquired(obj, None, seen.info, hold, quiet=seen.quiet)
            self._acquired = weakref.ref(acquired)
        return acquired

    def remember(
        self, acquired: Acquired, mapping: Mapping | None, linger: float | None, made_by: tuple[str, int]
    ) -> None:
        self._acquired = weakref.ref(acquired)
        self._made_by = made_by
        self._code = None
        self._seen = None
        try:
            obj = weakref.ref(acquired.object)
        except TypeError:
            return  # A dict, a list: found again only while somebody has it acquired.
        mapping_ref = weakref.ref(mapping) if mapping is not None else None
        self._seen = _Seen(obj, acquired.info, mapping_ref, linger, acquired.quiet)

    def compare(self, place: Place, constructor: Constructor) -> None:
        """Warns, once, where something else made the model. Takes no lock, and describes nothing that it has seen before."""
        made_by = self._made_by
        if not made_by[0]:
            return
        code = getattr(constructor, "__code__", None) or _key.code_of(constructor)
        if self._code is not None and self._code() is code:
            return
        mine = _key.describe(constructor)
        if mine == made_by:
            with suppress(TypeError):
                self._code = weakref.ref(code)
            return
        from onecopy._acquire import warn_of_another

        warn_of_another(place, self.key, made_by, mine)

    def forget_threads(self) -> None:
        """In a forked child: whoever held the lock does not exist here."""
        self._lock = threading.RLock()
        self._inside = False

    @contextmanager
    def entered(self, deadline: float | None) -> Iterator[None]:
        """The slot's lock: one construction in this process, the other threads wait (Ctrl-C works in the main one)."""
        # This very lock is let go of in the end: a child that is forked inside gets a new one. It knows its owner by
        # itself, so Ctrl-C may come between any two steps here.
        lock: Any = self._lock
        if self._inside and lock._is_owned():  # noqa: SLF001 (threading.Condition uses it, too)
            message = f"the constructor of {self.key} asked for {self.key} itself"
            raise RecursionInConstructorError(message)
        began = time.monotonic()
        left = -1.0 if deadline is None else min(max(0.0, deadline - began), threading.TIMEOUT_MAX)
        try:
            try:
                if not lock.acquire(timeout=left):
                    waited = time.monotonic() - began
                    message = f"waited {waited:.1f} s for {self.key}: another thread of this process loads it. Raise `timeout`"
                    raise ModelTimeoutError(message)
                self._inside = True
                yield
            finally:
                self._let_go(lock)
        finally:
            # Twice: a signal's handler may raise before the first one has done anything.
            self._let_go(lock)

    def _let_go(self, lock: Any) -> None:
        if lock._is_owned():  # noqa: SLF001
            self._inside = False
            while lock._is_owned():  # noqa: SLF001
                lock.release()


_slots: dict[tuple[str, str, ModelKey], Slot] = {}
_mappings: weakref.WeakSet[Mapping] = weakref.WeakSet()
_stores: dict[tuple[str, str], Any] = {}


def slot(place: Place, key: ModelKey) -> Slot:
    where = (place.resolved(), place.namespace, key)
    return _slots.get(where) or _slots.setdefault(where, Slot(key))


def check_seconds(name: str, seconds: Any) -> None:
    """Raises TypeError for what is neither None nor a number, ValueError for one that is no time to wait."""
    if seconds is None:
        return
    message = f"{name} must be seconds, 0 or more, or None, not {seconds!r}"
    if not isinstance(seconds, numbers.Real):
        raise TypeError(message)
    if not float(seconds) >= 0:
        raise ValueError(message)


def check_text(name: str, text: object) -> None:
    """Raises TypeError for what is no text, BadNameError for a text that cannot be written as UTF-8."""
    if not isinstance(text, str):
        message = f"{name} must be a str, not {text!r}"
        raise TypeError(message)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{name} {text!r}: it cannot be written as UTF-8 ({error.reason})"
        raise BadNameError(message) from None


def check_path(name: str, path: object) -> None:
    """Raises TypeError for what is neither None nor a path."""
    if path is not None and not isinstance(path, (str, os.PathLike)):
        message = f"{name} must be a path, not {path!r}"
        raise TypeError(message)


def check_tag(name: str, tag: str, remedy: str = "Put a long path into `version`") -> None:
    """The same, and BadNameError for a text that is empty, too long, or has a NUL in it."""
    check_text(name, tag)
    size = len(tag.encode())
    if size > MAX_TAG:
        message = f"{name} {tag[:40]!r}... of {size} bytes: at most {MAX_TAG}. {remedy}"
        raise BadNameError(message)
    if not tag or "\0" in tag:
        message = f"{name} {tag!r}: 1 to {MAX_TAG} bytes of UTF-8 without NUL are wanted"
        raise BadNameError(message)


def check_callable(constructor: object) -> None:
    """Raises TypeError for a constructor that cannot be called: usually the model itself."""
    if not callable(constructor):
        message = (
            f"constructor must be a function that makes the model, not a {type(constructor).__qualname__}: "
            "pass it without calling it, or use Store.publish for a model that is there"
        )
        raise TypeError(message)


def core_store(place: Place) -> Any:
    """The native store of a place, opened once in a process."""
    where = (place.resolved(), place.namespace)
    store = _stores.get(where)
    if store is None:
        from onecopy import _core

        try:
            opened = _core.Store(*where)
        except SystemCallError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                raise
            message = (
                f"{error}. Make that directory (a tmpfs), or name another one: ONECOPY_DIR, or Store(directory=...)"
            )
            raise SystemCallError(error.errno, message) from None
        store = _stores.setdefault(where, opened)
    return store


def no_huge_pages() -> str | None:
    """Why this kernel makes no huge pages; None where it does."""
    from onecopy import _core

    return _core.no_huge_pages()


def note(mapping: Mapping) -> None:
    """A forked child takes a lease for every mapping that it inherits."""
    _mappings.add(mapping)


def acquire(
    place: Place,
    key: ModelKey,
    constructor: Constructor,
    *,
    timeout: float | None = None,
    linger: float | None = 0.0,
    on_unshareable: OnUnshareable = "warn",
    pickler: type | None = None,
    state: Callable[[], object] | None = None,
    without_sharing: Callable[[Constructor], object] | None = None,
) -> Acquired:
    """The model of this process: the one it has, else attached, else loaded here while the others wait.

    `state` is called right after the constructor, and its result is pickled together with the object.
    `without_sharing` is called where the model cannot be shared, with a function that returns it (the one that is
    loaded already, or loads it now), and returns what this process shall use. In a loader it runs before the others
    learn of it.

    Raises what the constructor raises, ModelTimeoutError, LoaderKilledError, CorruptError, UntrustedError,
    RecursionInConstructorError and, where `on_unshareable` is "raise", UnshareableError.
    """
    check_seconds("timeout", timeout)
    here = slot(place, key)
    acquired = here.current()
    if acquired is not None:
        here.compare(place, constructor)
        return acquired.checked(key, on_unshareable)
    deadline = None if timeout is None else time.monotonic() + timeout
    with here.entered(deadline):
        acquired = here.alive()
        if acquired is not None:
            here.compare(place, constructor)
        else:
            from onecopy._acquire import Acquisition

            attempt = Acquisition(
                place, key, constructor, deadline, linger, on_unshareable, pickler, state, without_sharing
            )
            acquired, mapping = attempt.run()
            here.remember(acquired, mapping, linger, attempt.made_by)
    return acquired.checked(key, on_unshareable)


def _in_child() -> None:
    """What belongs to the parent's threads and leases is forgotten; what was inherited gets leases of its own."""
    _stores.clear()
    for inherited in list(_slots.values()):
        inherited.forget_threads()
    native = sys.modules.get("onecopy._core")
    if native is None:
        return
    # A child without a lease works; only a later acquire would load again.
    with suppress(Exception):
        native.adopt(list(_mappings))
    native.forget_parent()


def _at_exit() -> None:
    native = sys.modules.get("onecopy._core")
    if native is not None:
        native.leave()


os.register_at_fork(after_in_child=_in_child)
atexit.register(_at_exit)

"""One acquire across processes: ask the registry, wait, load, attach, or go without sharing."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onecopy import _core, _key, _publish, skeleton
from onecopy._rebuild import rebuild
from onecopy.errors import (
    CorruptError,
    ModelTimeoutError,
    NoRoomError,
    OneCopyError,
    RefusedError,
    StoreFullError,
    StoreStuckError,
    SystemCallError,
    UnshareableError,
    UntrustedError,
)
from onecopy.info import ModelInfo
from onecopy.process import QUIETLY, Acquired, Constructor, ModelKey, OnUnshareable, Place, core_store

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("onecopy")

#: A waiter looks after the loader, Ctrl-C and its timeout this often, in seconds.
SLICE = 0.1
#: One line a minute while waiting.
REPORT = 60.0
#: Seconds in which a process that is dying gives its locks back: 60 ms for each private GiB, and a core dump.
DYING = 30.0
#: Why they are given up then.
OUT_OF_REACH = "those who hold it cannot be reached through /proc"
#: How often a load may be for nothing, because its tag was replaced or removed meanwhile.
RELOADS = 2
#: What sharing may fail of: the model is loaded privately then, with one warning that names the place and the remedy.
#: Another user's file under our name, or a damaged one, must not stop a program that would run without us.
ENVIRONMENT = (
    NoRoomError,
    StoreFullError,
    StoreStuckError,
    SystemCallError,
    RefusedError,
    UntrustedError,
    CorruptError,
)

_warned: set[tuple[Place, ModelKey, str]] = set()


class Acquisition:
    """One call of `process.acquire` that found nothing in this process."""

    def __init__(
        self,
        place: Place,
        key: ModelKey,
        constructor: Constructor,
        deadline: float | None,
        linger: float | None,
        on_unshareable: OnUnshareable,
        pickler: type | None,
        state: Callable[[], object] | None,
        without_sharing: Callable[[Constructor], object] | None,
    ) -> None:
        self.place = place
        self.key = key
        self.constructor = constructor
        self.deadline = deadline
        self.linger = linger
        self.on_unshareable = on_unshareable
        self.pickler = pickler
        self.state = state
        self.without_sharing = without_sharing or (lambda load: load())
        self.constructor_id = _key.describe(constructor)
        #: What made the object that this process uses in the end: our constructor, or that of another process.
        self.made_by = self.constructor_id
        self.began = time.monotonic()
        self.wait_seconds = 0.0
        self.load_seconds = 0.0
        self.private_bytes = 0
        self.superseded = 0

    def run(self) -> tuple[Acquired, Any]:
        """What this process shall use, and its mapping if it is shared."""
        step: Any = None
        try:
            step = self._ask()
            if isinstance(step, _core.Loading):
                return self._load(step)
        except BaseException as error:
            # Ctrl-C between any two steps: whoever has the traceback has the loader's ticket, too, and the others would wait.
            if isinstance(step, _core.Loading):
                _end(core_store(self.place), step, "gave up", "")
            if isinstance(error, ENVIRONMENT) and step is None:
                return self._privately(str(error)), None
            raise
        if isinstance(step, _core.Private):
            quiet = step.unshareable and (not step.reason or step.reason.startswith(QUIETLY))
            return self._privately(step.reason.removeprefix(QUIETLY), quiet=quiet), None
        return self._attach(step)

    def _ask(self) -> Any:
        """Asks until the answer is another one than `wait`."""
        store = core_store(self.place)
        patience = _core.Patience()
        waited: int | None = None
        began = time.monotonic()
        next_report = REPORT
        step: Any = None
        try:
            while True:
                step = store.acquire(_key.of(self.key), self.constructor_id, may_load=True, waited=waited)
                if isinstance(step, _core.Waiting):
                    waited = step.episode if waited is None else waited
                    left = self._time_left(step)
                    given_up = patience.exhausted(step)
                    if given_up:
                        return _core.Private(given_up)
                    if time.monotonic() - began > next_report:
                        logger.info("waiting for %s: %s", self.key, in_words(step))
                        next_report += REPORT
                    store.wait(step, min(SLICE, left))
                elif isinstance(step, _core.Again):
                    # Nobody dies for longer than that: their descriptors are out of reach for another reason.
                    if time.monotonic() - began > DYING or (
                        self.deadline is not None and time.monotonic() > self.deadline
                    ):
                        return _core.Private(OUT_OF_REACH)
                    time.sleep(SLICE / 10)
                else:
                    return step
        except BaseException:
            if isinstance(step, _core.Loading):
                _end(store, step, "gave up", "")
            raise
        finally:
            self.wait_seconds += time.monotonic() - began

    def _time_left(self, loader: Any) -> float:
        if self.deadline is None:
            return SLICE
        left = self.deadline - time.monotonic()
        if left > 0:
            return left
        message = (
            f"waited {time.monotonic() - self.began:.1f} s for {self.key}: {in_words(loader)}. "
            "Raise `timeout`, or look at that process"
        )
        raise ModelTimeoutError(message)

    def _load(self, loading: Any) -> tuple[Acquired, Any]:
        store = core_store(self.place)
        obj, state = self._construct(store, loading)
        try:
            published = _publish.publish(
                store, self.place, self.key, self.constructor_id, (obj, state), loading=loading, pickler=self.pickler
            )
        except skeleton.Unshareable as why:
            return self._unshareable(store, loading, obj, state, why.reason, silent=why.silent), None
        except NoRoomError as error:
            # What does not fit here does not fit next door either: the others need not try one after another.
            return self._unshareable(store, loading, obj, state, str(error)), None
        except ENVIRONMENT as error:
            # It may work next door: one tries, and if that fails, too, all load at the same time.
            return self._unshareable(store, loading, obj, state, str(error), how="failed"), None
        except Exception as error:
            logger.exception("%s could not be published", self.key)
            return self._unshareable(store, loading, obj, state, f"{type(error).__name__}: {error}"), None
        if published is None:
            # The tag was replaced while we loaded: what is there now is newer. Or it was removed: the next one loads.
            self.superseded += 1
            if self.superseded > RELOADS:
                reason = f"it was replaced or removed {self.superseded} times while it was loaded"
                return self._private(self.without_sharing(lambda: obj), state, reason, quiet=False), None
            obj = state = None
            return self.run()
        obj = None
        (rebuilt, state), attached, generation, _ = published
        info = self._info("publisher", attached, generation=generation, private_bytes=len(attached.skeleton))
        logger.info(
            "published %s: %.1f MB shared in %.2f s (load %.2f s), generation %d, %s, process %d",
            self.key,
            info.shared_bytes / 1e6,
            info.seconds,
            info.load_seconds,
            generation,
            info.backend,
            os.getpid(),
        )
        return self._shared(rebuilt, state, info, attached.mapping)

    def _construct(self, store: Any, loading: Any) -> tuple[object, object]:
        began = time.monotonic()
        before = anonymous_bytes()
        try:
            obj = self.constructor()
            self.private_bytes = anonymous_bytes() - before
            state = self.state() if self.state is not None else None
        except Exception as error:
            # Its own exception reaches its caller. Ctrl-C is no failure of the model: `run` says so, the next one tries.
            _end(store, loading, "failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self.load_seconds += time.monotonic() - began
        return obj, state

    def _unshareable(
        self,
        store: Any,
        loading: Any,
        obj: object,
        state: object,
        reason: str,
        *,
        silent: bool = False,
        how: str = "unshareable",
    ) -> Acquired:
        try:
            used = self.without_sharing(lambda: obj)
        finally:
            # Only now do the others learn of it: what `without_sharing` set up is there when they come.
            _end(store, loading, how, QUIETLY + reason if silent else reason)
        return self._private(used, state, reason, quiet=silent)

    def _attach(self, attached: Any) -> tuple[Acquired, Any]:
        if attached.constructor != self.constructor_id:
            warn_of_another(self.place, self.key, attached.constructor, self.constructor_id)
        try:
            obj, state = rebuild(attached)
        except Exception as error:  # Whatever the classes of the model raise here.
            return self._privately(f"it cannot be rebuilt in this process: {type(error).__name__}: {error}"), None
        info = self._info("attacher", attached, generation=attached.generation, private_bytes=len(attached.skeleton))
        self.made_by = attached.constructor
        logger.info(
            "attached %s: %.1f MB shared in %.4f s (waited %.2f s), generation %d, %s, process %d",
            self.key,
            info.shared_bytes / 1e6,
            info.seconds,
            info.wait_seconds,
            info.generation,
            info.backend,
            os.getpid(),
        )
        return self._shared(obj, state, info, attached.mapping)

    def _shared(self, obj: object, state: object, info: ModelInfo, mapping: Any) -> tuple[Acquired, Any]:
        return Acquired(obj, state, info, mapping.hold(self.linger)), mapping

    def _privately(self, reason: str, *, quiet: bool = False) -> Acquired:
        """Loads for this process alone, without anybody's help."""
        if self.on_unshareable == "raise" and not quiet:
            message = f"{self.key} is not shared: {reason}"
            raise UnshareableError(message)
        began = time.monotonic()
        before = anonymous_bytes()
        used = self.without_sharing(self.constructor)
        self.private_bytes = anonymous_bytes() - before
        state = self.state() if self.state is not None else None
        self.load_seconds += time.monotonic() - began
        return self._private(used, state, reason, quiet=quiet)

    def _private(self, obj: object, state: object, reason: str, *, quiet: bool) -> Acquired:
        if not quiet and self.on_unshareable == "warn":
            _warn_once(self.place, self.key, "private", "%s is not shared: %s. %s", self.key, reason, self.key.instead)
        info = self._info("private", private_bytes=max(0, self.private_bytes), reason=reason)
        return Acquired(obj, state, info, None, quiet=quiet)

    def _info(
        self, role: Any, attached: Any = None, *, generation: int = 0, private_bytes: int, reason: str = ""
    ) -> ModelInfo:
        return ModelInfo(
            tag=self.key.tag,
            version=self.key.version,
            namespace=self.place.namespace,
            generation=generation,
            role=role,
            backend=attached.backend if attached else "private",
            shared_bytes=attached.shared_bytes if attached else 0,
            huge_bytes=attached.huge_bytes if attached else 0,
            private_bytes=private_bytes,
            seconds=time.monotonic() - self.began,
            wait_seconds=self.wait_seconds,
            load_seconds=self.load_seconds,
            reason=reason,
        )


def warn_of_another(place: Place, key: ModelKey, made_by: tuple[str, int], mine: tuple[str, int]) -> None:
    """Says, once, that the model is not what our constructor makes. An object that was published has no constructor."""
    name = made_by[0]
    if not name:
        return
    difference = f"made by {name}" if name != mine[0] else f"made by other code under the name {name}"
    _warn_once(
        place,
        key,
        "constructor",
        "%s was %s, and is asked for with %s: the one that is there is used. Give them different tags or versions",
        key,
        difference,
        mine[0],
    )


def in_words(loader: Any) -> str:
    """Who loads, and for how long: `loader` is a `Waiting`."""
    return f"process {loader.pid} ({loader.name}) has been loading it for {max(0.0, time.time() - loader.since):.1f} s"


def _warn_once(place: Place, key: ModelKey, kind: str, message: str, *details: object) -> None:
    if (place, key, kind) not in _warned:
        _warned.add((place, key, kind))
        logger.warning(message, *details)


def _end(store: Any, loading: Any, how: str, reason: str) -> None:
    # Where the registry does not answer, the others see this process die, or lose patience; our caller has his answer.
    with contextlib.suppress(OneCopyError):
        store.end_loading(loading, how, reason)


def anonymous_bytes() -> int:
    """Private memory of this process (RssAnon, proc(5)); 0 where it cannot be read."""
    with contextlib.suppress(OSError, ValueError), Path("/proc/self/status").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    return 0

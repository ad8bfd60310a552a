"""One load of a model under Beam: attach or publish, else the next rung of the ladder."""

import hashlib
import importlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from apache_beam.ml.inference import base
from apache_beam.utils.multi_process_shared import MultiProcessShared

from onecopy import process
from onecopy.beam import loaded, state, torch_load
from onecopy.beam.pickling import pickler_class
from onecopy.errors import BadNameError, OneCopyError, RecursionInConstructorError, SystemCallError
from onecopy.info import ModelInfo
from onecopy.store import Store

logger = logging.getLogger(__name__)

# Mistakes in the program.
_TO_THE_CALLER = (BadNameError, RecursionInConstructorError)


# Of the 191 bytes that the table has for a version, so many are used where one is cut between two characters.
_CUT_SHORT = 188


@dataclass(frozen=True)
class Wish:
    """What is asked for. `owner` is the class of the handler; `must`: who says that nothing but sharing will do, or nothing."""

    place: process.Place
    tag: str
    owner: str
    path: str
    timeout: float | None
    linger: float | None
    must: str
    map_weights: bool

    @property
    def version(self) -> str:
        return ":".join(filter(None, (self.owner, self.path)))

    @property
    def words(self) -> str:
        """For messages: the tag may be a number that the handler gave itself, the version is both in one."""
        return f"the model of {self.owner}" + (f" ({self.path!r})" if self.path else "")


class HandlerKey(process.ModelKey):
    """A key that says in messages which handler's model it is, and what Beam does where it is not shared."""

    _words = ""
    _instead = ""

    @classmethod
    def of(cls, wish: Wish, *, one_copy: bool) -> "HandlerKey":
        process.ModelKey.checked(wish.tag, wish.version)
        key = cls(wish.tag, wish.version)
        key._words = wish.words
        if one_copy:
            key._instead = "Beam's MultiProcessShared holds the one copy, and each batch is sent through it"
        else:
            key._instead = "Each process has a copy of its own"
        key._instead += ", as without the wrapper; with ONECOPY=off sharing is not tried"
        return key

    @property
    def instead(self) -> str:
        return self._instead

    def __str__(self) -> str:
        return self._words


def share(handler: base.ModelHandler, wish: Wish) -> Any:
    """What `handler.load_model()` returns, shared if it can be; `loaded.find` knows it afterwards.

    Raises what `handler.load_model` raises, and, where `wish.must`, whatever kept it from being shared.
    """
    began = time.monotonic()
    pickler = pickler_class()
    before = state.snapshot(handler, pickler)
    one_copy = bool(handler.share_model_across_processes())

    key = HandlerKey.of(wish, one_copy=one_copy)

    def changes() -> state.Changes:
        return state.changes(handler, before, pickler)

    def next_rung(load: Callable[[], Any]) -> Any:
        def in_memory() -> Any:
            return torch_load.unmapped(load())

        return _served(in_memory, handler, wish) if one_copy else in_memory()

    def down_the_ladder(why: Exception) -> Any:
        logger.warning("%s is not shared: %s. %s", key, why, key.instead)
        waited = time.monotonic() - began
        model = next_rung(handler.load_model)
        left = state.without_model(changes(), model)
        return loaded.remember(model, loaded.Loaded(_private(wish, began, waited, why), left, None))

    try:
        # Not there: the extension, on another platform, or cloudpickle, where a runner installed us without dependencies.
        process.core_store(wish.place)
        importlib.import_module("onecopy._acquire")
    except (ImportError, OneCopyError) as error:
        if wish.must or isinstance(error, _TO_THE_CALLER):
            raise _to_the_caller(error, wish) from error
        return down_the_ladder(error)
    try:
        acquired = process.acquire(
            wish.place,
            key,
            torch_load.constructor(handler) if wish.map_weights else handler.load_model,
            # Not to wait for the one copy would make a second one.
            timeout=None if one_copy else wish.timeout,
            linger=wish.linger or 0.0,
            on_unshareable="raise" if wish.must else "warn",
            pickler=pickler,
            state=changes,
            without_sharing=next_rung,
        )
    except OneCopyError as error:
        if wish.must or isinstance(error, _TO_THE_CALLER):
            raise _to_the_caller(error, wish) from error
        return down_the_ladder(error)
    left: state.Changes = acquired.state or []  # type: ignore[assignment]
    came_with = loaded.Loaded(acquired.info, state.without_model(left, acquired.object), acquired.hold)
    loaded.supersede((wish.place.namespace, wish.tag, wish.owner), came_with, keep=wish.linger is None)
    return loaded.remember(acquired.object, came_with)


def _to_the_caller(error: Exception, wish: Wish) -> Exception:
    """The same error, in words that a user of Beam knows, and who made it one."""
    # The core knows the key alone.
    said = str(error).replace(f"{wish.tag!r} (version '{wish.version}')", wish.words)
    if wish.words not in said:
        said = f"{wish.words} is not shared: {said}"
    if wish.must and not isinstance(error, _TO_THE_CALLER):
        said += f". {wish.must} makes this an error; ONECOPY=auto goes on as Beam would without the wrapper"
    if isinstance(error, SystemCallError) and error.errno is not None:
        return SystemCallError(error.errno, said)
    return type(error)(said)


def warn_of_namesakes(wish: Wish) -> None:
    """Say so where another class of handler has models under the same identifier: it has a segment of its own."""
    try:
        store = Store(**wish.place._asdict())
        versions = [row.version or "" for row in store.list() if row.tag == wish.tag]
    except (ImportError, OneCopyError):  # no store to have them in
        return
    # The table shows the beginning of a version that is longer than its column.
    cut_short = {one for one in versions if len(one.encode()) >= _CUT_SHORT and wish.version.startswith(one)}
    others = sorted({version.split(":")[0] for version in versions if version not in cut_short} - {wish.owner})
    if others:
        logger.warning(
            "model_identifier %r is used by %s too: this %s does not share with it, and has a copy of its own",
            wish.tag, ", ".join(others), wish.owner,
        )  # fmt: skip


def _private(wish: Wish, began: float, waited: float, why: Exception) -> ModelInfo:
    seconds = time.monotonic() - began
    return ModelInfo(
        tag=wish.tag,
        version=wish.version,
        namespace=wish.place.namespace,
        generation=0,
        role="private",
        backend="private",
        shared_bytes=0,
        huge_bytes=0,
        private_bytes=0,
        seconds=seconds,
        wait_seconds=waited,
        load_seconds=seconds - waited,
        reason=str(why),
    )


def _served(load: Callable[[], Any], handler: base.ModelHandler, wish: Wish) -> Any:
    """The rung for `large_model=True`: what Beam gives to such a handler, a proxy of the model in one process.

    `load` returns the model that this process has already, or loads it. `model_copies` above one loads the others;
    Beam's round robin over them is kept.
    """
    copies = int(handler.model_copies())
    # Beam joins the tag to a directory: with a model path in it, its files would land beside the model.
    name = f"{wish.place.namespace}\0{wish.tag}\0{wish.version}"
    tag = "onecopy-" + hashlib.sha256(name.encode()).hexdigest()[:32]
    loaders = [load, *[handler.load_model] * (copies - 1)]
    models = [
        MultiProcessShared(loader, tag=f"{tag}{number}", always_proxy=True).acquire()
        for number, loader in enumerate(loaders)
    ]
    return base._SharedModelWrapper(models, tag) if copies > 1 else models[0]  # noqa: SLF001

"""The verbs of a person or a script, without a constructor: publish, attach, verify."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

from onecopy import _core, _key, _publish, process, skeleton
from onecopy._acquire import DYING, OUT_OF_REACH, SLICE, in_words
from onecopy._rebuild import rebuild
from onecopy.errors import ModelNotFoundError, ModelTimeoutError, UnshareableError
from onecopy.info import ModelInfo
from onecopy.process import Acquired, ModelKey, Place

logger = logging.getLogger("onecopy")


#: Of an object that was published: nobody says how it is made, so no constructor is another one than its.
NO_CONSTRUCTOR = ("", 0)


def publish(
    place: Place,
    key: ModelKey,
    obj: object,
    *,
    pin: bool,
    replace: bool,
    made_by: tuple[str, int] = NO_CONSTRUCTOR,
) -> Acquired:
    store = process.core_store(place)
    store.refuse(_key.of(key), place.backend, pin, replace)
    began = time.monotonic()
    try:
        published = _publish.publish(
            store,
            place,
            key,
            made_by,
            (obj, None),
            pin=pin,
            replace=replace,
        )
    except skeleton.Unshareable as why:
        message = f"{key} cannot be shared: {why.reason}"
        raise UnshareableError(message) from why
    if published is None:
        return attach(place, key, None)
    (rebuilt, _), attached, generation, kept_bytes = published
    info = _info(place, key, "publisher", attached, generation, len(attached.skeleton) + kept_bytes, began)
    logger.info(
        "published %s: %.1f MB shared in %.2f s, generation %d, %s, process %d",
        key,
        info.shared_bytes / 1e6,
        info.seconds,
        generation,
        info.backend,
        os.getpid(),
    )
    return _remembered(place, key, rebuilt, info, attached.mapping, made_by)


def attach(place: Place, key: ModelKey, timeout: float | None) -> Acquired:
    process.check_seconds("timeout", timeout)
    here = process.slot(place, key)
    began = time.monotonic()
    deadline = None if timeout is None else began + timeout
    with here.entered(deadline):
        acquired = here.alive()
        if acquired is not None and acquired.info.role != "private":
            return acquired
        attached = _attach(place, key, deadline)
        try:
            obj, _ = rebuild(attached)
        except Exception as error:
            message = f"{key} cannot be rebuilt in this process: {type(error).__name__}: {error}"
            raise UnshareableError(message) from error
        info = _info(place, key, "attacher", attached, attached.generation, len(attached.skeleton), began)
        acquired = _remembered(place, key, obj, info, attached.mapping, attached.constructor)
    logger.info(
        "attached %s: %.1f MB shared in %.4f s, generation %d, %s, process %d",
        key,
        info.shared_bytes / 1e6,
        info.seconds,
        info.generation,
        info.backend,
        os.getpid(),
    )
    return acquired


def verify(place: Place, key: ModelKey) -> list[tuple[str | None, int]]:
    """(version, bytes that were checked) of that version, or, where the key has none, of every version that is there.

    Raises ModelTimeoutError for one that is being loaded: looking waits for nobody.
    """
    core = process.core_store(place)
    under_it = [row for row in core.list() if row["tag"] == key.tag]
    mine = [row for row in _attachable(under_it) if row["compatibility"] == _key.compatibility()]
    # To ask for what is not there would enter the table, and clear away what is to be looked at.
    if not mine:
        raise nothing(place, key)
    # The table shows the beginning of a long version: under that name alone nothing is found, and the error says so.
    versions = [row["version"] or None for row in mine] if key.version is None else [key.version]
    keys = [key._replace(version=version) for version in versions]
    return [(one.version, core.verify(_attach(place, one, time.monotonic()).mapping)) for one in keys]


def nothing(place: Place, key: ModelKey) -> ModelNotFoundError:
    """That this is not there, what is there under the same tag, and how to ask for it."""
    where = f"in namespace '{place.namespace}' ({process.core_store(place).path})"
    under_it = [row for row in process.core_store(place).list() if row["tag"] == key.tag]
    rows = _attachable(under_it)
    if not rows:
        why = {"stale": "what is left of it is stale", "ready": "what is left of it has lost its name"}
        found = next((f": {why[row['state']]}" for row in under_it if row["state"] in why), "")
        return ModelNotFoundError(f"no model {key} {where}{found}: `onecopy ls` shows what is there")
    there = ", ".join(_row_in_words(row) for row in rows)
    asked = "" if key.version else " without a version"
    same = [row["version"] for row in rows if row["compatibility"] == _key.compatibility()]
    remedy = f". Pass version={same[0]!r}" if same and same[0] else ". Ask without a version" if same else ""
    return ModelNotFoundError(f"no model {key}{asked} {where}; there is {there}{remedy}")


def _row_in_words(row: dict[str, Any]) -> str:
    version = f"version {row['version']!r}" if row["version"] else "one without a version"
    foreign = row["compatibility"] != _key.compatibility()
    return version + (f" of {row['compatibility']} (here: {_key.compatibility()})" if foreign else "")


def _attachable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What can be attached to of these, or will be."""
    there = [row for row in rows if not row["unnamed"] and row["state"] in ("ready", "loading")]
    return sorted(there, key=lambda row: str(row["version"]))


def _attach(place: Place, key: ModelKey, deadline: float | None) -> Any:
    store = process.core_store(place)
    patience = _core.Patience()
    began = time.monotonic()
    while True:
        try:
            step = store.acquire(_key.of(key), NO_CONSTRUCTOR, may_load=False)
        except ModelNotFoundError:
            raise nothing(place, key) from None
        if isinstance(step, _core.Attached):
            return step
        if isinstance(step, _core.Private):
            message = f"{key} is not shared: {step.reason.removeprefix(process.QUIETLY) or 'too small to be worth it'}"
            raise UnshareableError(message)
        left = SLICE if deadline is None else min(SLICE, deadline - time.monotonic())
        if left <= 0:
            who = in_words(step) if isinstance(step, _core.Waiting) else "all who hold it are going away"
            message = (
                f"waited {time.monotonic() - began:.1f} s for {key}: {who}. Raise `timeout`, or look at that process"
            )
            raise ModelTimeoutError(message)
        if isinstance(step, _core.Waiting):
            given_up = patience.exhausted(step)
            if given_up:
                message = f"{key} is not shared yet: {given_up}"
                raise UnshareableError(message)
            store.wait(step, left)
        elif time.monotonic() - began > DYING:
            message = f"{key} is not shared: {OUT_OF_REACH}. `onecopy doctor` looks why"
            raise UnshareableError(message)
        else:
            time.sleep(min(left, SLICE / 10))


def _remembered(
    place: Place, key: ModelKey, obj: object, info: ModelInfo, mapping: Any, made_by: tuple[str, int]
) -> Acquired:
    acquired = Acquired(obj, None, info, mapping.hold(0.0))
    process.slot(place, key).remember(acquired, mapping, 0.0, made_by)
    return acquired


def _info(
    place: Place, key: ModelKey, role: Any, attached: Any, generation: int, private_bytes: int, began: float
) -> ModelInfo:
    return ModelInfo(
        tag=key.tag,
        version=key.version,
        namespace=place.namespace,
        generation=generation,
        role=role,
        backend=attached.backend,
        shared_bytes=attached.shared_bytes,
        huge_bytes=attached.huge_bytes,
        private_bytes=private_bytes,
        seconds=time.monotonic() - began,
        wait_seconds=0.0,
        load_seconds=0.0,
    )

"""Filling a segment, buffer by buffer, so that a torch model peaks at one model and not at two."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import cloudpickle

from onecopy import _core, _key, skeleton
from onecopy._rebuild import rebuild
from onecopy.process import note

if TYPE_CHECKING:
    from onecopy.process import ModelKey, Place

#: Freed memory goes back to the system after a sixteenth of the model, but neither more often nor less often than this,
#: in bytes: without it all of it stays resident. Where memory is tight, that sixteenth is what has to be free.
TRIM = 32 << 20, 256 << 20


def publish(
    store: Any,
    place: Place,
    key: ModelKey,
    constructor: tuple[str, int],
    obj: object,
    *,
    loading: Any = None,
    pickler: type | None = None,
    pin: bool = False,
    replace: bool = False,
) -> tuple[Any, Any, int, int] | None:
    """Take `obj` apart, fill a segment with its buffers, and make it READY.

    While it is filled, every torch tensor met on a storage is re-pointed to the segment, and the storage's memory goes.
    A failure in the middle just stops: the object is whole, part of it in the segment that nobody else will see.

    Returns (the object rebuilt over a fresh mapping, what was attached, generation, bytes that could not be re-pointed),
    or None where the tag was replaced meanwhile.
    Raises skeleton.Unshareable, and whatever the store raises for lack of room.
    """
    parts = skeleton.take_apart(obj, pickler=pickler or cloudpickle.Pickler)
    publishing = store.announce(
        _key.of(key),
        constructor,
        skeleton=parts.skeleton,
        buffers=[(buffer.offset, buffer.nbytes) for buffer in parts.buffers],
        data_bytes=parts.data_bytes,
        excess=_excess(parts),
        backend=place.backend,
        huge=place.huge,
        pin=pin,
        replace=replace,
        loading=loading,
    )
    try:
        kept_bytes = _fill(publishing, parts)
        publishing.seal()
        attached = publishing.inspect()
        try:
            rebuilt = rebuild(attached)
        except Exception as error:
            reason = f"it cannot be rebuilt from its parts: {type(error).__name__}: {error}"
            raise skeleton.Unshareable(reason) from error
        generation = publishing.publish()
    finally:
        publishing.close()
    if generation is None:
        return None
    return rebuilt, attached, generation, kept_bytes


def _fill(publishing: Any, parts: skeleton.Parts) -> int:
    """Copies every buffer; the bytes whose source stays, because nothing could be re-pointed or its allocator keeps it."""
    window = publishing.mapping()
    note(window)
    trim_after = _trim_after(parts)
    kept_bytes = freed = 0
    for buffer in parts.buffers:
        offset = publishing.fill(buffer.source)
        if buffer.repoint is None:
            kept_bytes += buffer.nbytes
            continue
        buffer.repoint(window, offset)
        buffer.source = None
        if not buffer.returned:
            kept_bytes += buffer.nbytes
            continue
        freed += buffer.nbytes
        if freed >= trim_after:
            _core.trim()
            freed = 0
    parts.buffers.clear()
    _core.trim()
    return kept_bytes


def _trim_after(parts: skeleton.Parts) -> int:
    least, most = TRIM
    return min(most, max(least, parts.data_bytes // 16))


def _excess(parts: skeleton.Parts) -> int:
    """The most that is written and not yet freed at any moment of the fill, in bytes."""
    most = excess = waiting = 0
    trim_after = _trim_after(parts)
    for buffer in parts.buffers:
        excess += buffer.nbytes
        most = max(most, excess)
        if buffer.repoint is not None and buffer.returned:
            waiting += buffer.nbytes
            if waiting >= trim_after:
                excess -= waiting
                waiting = 0
    return most

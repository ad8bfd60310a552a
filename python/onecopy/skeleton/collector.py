"""The garbage collector while an object is put together: none of it is garbage, and it is to live long."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

#: One for each call that has paused the collector: a child forked meanwhile has nobody who ends it.
_pauses: set[object] = set()
#: Whether the user has frozen something, which must stay so; servers do before they fork.
_user_freezes = False


@contextmanager
def paused() -> Iterator[None]:
    """No collection; what was made meanwhile counts as old.

    A full collection takes 0.2 s where torch and transformers are imported, one of the young a tenth of an attach.
    """
    if not gc.isenabled():
        yield
        return
    pause = object()
    _pauses.add(pause)
    gc.disable()
    try:
        yield
    finally:
        _pauses.discard(pause)
        _spare_the_young()
        gc.enable()


def _spare_the_young() -> None:
    """Freezing and unfreezing puts all objects into the oldest generation, and none of them is looked at."""
    global _user_freezes  # noqa: PLW0603 (of the process)
    if not 0 < gc.get_threshold()[0] < gc.get_count()[0] or _user_freezes:
        return
    # Counting walks through all that is frozen, 50 ms where torch and transformers are: once.
    _user_freezes = gc.get_freeze_count() > 0
    if not _user_freezes:
        gc.freeze()
        gc.unfreeze()


def _in_child() -> None:
    global _user_freezes  # noqa: PLW0603 (of the process)
    _user_freezes = True  # who knows; not worth the counting
    if _pauses:
        _pauses.clear()
        gc.enable()


os.register_at_fork(after_in_child=_in_child)

"""Models that this process has under RunInference: found by the model object, because that is all Beam hands on.

`run_inference` is called on handler instances that never loaded, so nothing about a model can be kept on a handler.
"""

import os
import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

from apache_beam.ml.inference import base

from onecopy.beam import metrics
from onecopy.beam.state import Changes
from onecopy.info import ModelInfo


@dataclass(eq=False)
class Loaded:
    """What came with a model, and what keeps its mapping."""

    info: ModelInfo
    state: Changes
    hold: Any  # a `_core.Hold`, or None for a private model
    #: For handlers to note whose state they took on, without keeping any of this.
    token: object = field(default_factory=object)
    #: Whether this process has updated its metrics.
    reported: bool = False


class Boxed:
    """Around a model that takes no weak references (a dict, a list): Beam's `shared.Shared` needs one."""

    __slots__ = ("__weakref__", "model")

    def __init__(self, model: Any) -> None:
        self.model = model


_lock = threading.Lock()
_by_id: dict[int, Loaded] = {}
_kept: dict[tuple[str, str, str], tuple[str | None, Any]] = {}
_reported: set[tuple[object, ...]] = set()


def remember(model: Any, came_with: Loaded) -> Any:
    """Note what came with `model` for as long as it lives; returns what Beam shall hold: the model, or a box of it."""
    if model is None:  # to Beam: no model
        return None
    try:
        weakref.ref(model)
    except TypeError:
        model = Boxed(model)
    with _lock:
        if id(model) not in _by_id:
            _by_id[id(model)] = came_with
            weakref.finalize(model, _by_id.pop, id(model), None).atexit = False
    return model


def find(model: Any) -> Loaded | None:
    return _by_id.get(id(model))


def unwrap(model: Any) -> Any:
    """What `run_inference` of the inner handler expects: the model itself, or the next of several served copies."""
    if isinstance(model, Boxed):
        return model.model
    if isinstance(model, base._SharedModelWrapper):  # noqa: SLF001
        return model.next_model()
    return model


def supersede(whose: tuple[str, str, str], now: Loaded, *, keep: bool) -> None:
    """`now` is what this process uses of (namespace, tag, handler class) from here on.

    Its other versions linger no longer: their mappings last as long as somebody has the model. With `keep`, the
    mapping of `now` lasts until the process exits, or is superseded.
    """
    version = now.info.version
    with _lock:
        versions = [(one.info.version, one.hold) for one in _by_id.copy().values() if _whose(one.info) == whose]
        versions += [_kept.pop(whose)] if whose in _kept else []
        if keep:
            _kept[whose] = version, now.hold
    for other, hold in versions:
        if other != version and hold is not None:
            hold.end()


def _in_child() -> None:
    """After a fork: another thread may have had the lock, and nothing has been reported here."""
    global _lock  # noqa: PLW0603 (one lock a process)
    _lock = threading.Lock()
    for one in _by_id.values():
        one.reported = False


os.register_at_fork(after_in_child=_in_child)


def _whose(info: ModelInfo) -> tuple[str, str, str]:
    return info.namespace, info.tag, (info.version or "").partition(":")[0]


def report(came_with: Loaded, namespace: str) -> None:
    """Update the metrics for this model, in a bundle, unless this process has done so."""
    info = came_with.info
    seen = (os.getpid(), info.namespace, info.tag, info.version, info.generation)
    with _lock:
        came_with.reported = True
        if seen in _reported:
            return
        _reported.add(seen)
    metrics.update(info, namespace)

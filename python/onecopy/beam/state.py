"""What `load_model` leaves on a handler besides the model that it returns.

Handlers keep a tokenizer, a device or a label map on themselves while they load. In Beam only the instance that
loaded has them; here they are noticed by comparing the handler before and after, and travel with the model.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

from apache_beam.ml.inference.base import ModelHandler

Route = tuple[str, ...]  # attribute names that lead from the outer handler to the one that changed
Changes = list[tuple[Route, str, bool, Any]]  # route, attribute, is it there, its value
Snapshot = dict[tuple[Route, str], tuple[Any, bytes | None]]
_MODEL = object()


def snapshot(handler: ModelHandler, pickler: type) -> Snapshot:
    """Every attribute of the handler and of the handlers inside it, with a fingerprint of its pickled bytes."""
    return {
        (route, name): (value, None if isinstance(value, ModelHandler) else _fingerprint(value, pickler))
        for route, one in _handlers(handler)
        for name, value in vars(one).items()
    }


def changes(handler: ModelHandler, before: Snapshot, pickler: type) -> Changes:
    """What differs from `before`: attributes set anew, changed in place, or removed.

    A value that cannot be pickled (and so has no fingerprint) counts as changed only where it is another object.
    """
    after = {(route, name): value for route, one in _handlers(handler) for name, value in vars(one).items()}
    found: Changes = [(*key, False, None) for key in before if key not in after]
    for key, value in after.items():
        if key in before:
            old, mark = before[key]
            if old is value and (mark is None or mark == _fingerprint(value, pickler)):
                continue
            if mark is not None and mark == _fingerprint(value, pickler):
                continue
        found.append((*key, True, value))
    # An attribute inside a handler that is itself new travels with that handler.
    new = {(*route, name) for route, name, there, value in found if there and isinstance(value, ModelHandler)}
    return [change for change in found if not any(change[0][: len(route)] == route for route in new)]


def without_model(found: Changes, model: object) -> Changes:
    """The same changes, to keep beside `model` without keeping `model`: it may be what a handler left on itself."""
    return [(route, name, there, _MODEL if value is model else value) for route, name, there, value in found]


def apply(handler: ModelHandler, found: Changes, model: object) -> None:
    """Make `handler` look as the one that loaded `model`."""
    for route, name, there, value in found:
        target = handler
        for step in route:
            target = vars(target).get(step, target)  # gone: the step itself is in `found`, as removed
        if there:
            vars(target)[name] = model if value is _MODEL else value
        else:
            vars(target).pop(name, None)


def _handlers(handler: ModelHandler, route: Route = ()) -> Iterator[tuple[Route, ModelHandler]]:
    yield route, handler
    for name, value in list(vars(handler).items()):
        # A handler is a tree of handlers; a depth that no tree has means that one refers back to its owner.
        if isinstance(value, ModelHandler) and len(route) < 8:
            yield from _handlers(value, (*route, name))


class _Digest:
    """A file that keeps only the hash of what is written: an attribute may be large."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha.update(data)
        return memoryview(data).nbytes


def _fingerprint(value: object, pickler: type) -> bytes | None:
    digest = _Digest()
    try:
        pickler(digest, 5).dump(value)
    except Exception:  # pickling runs the user's code, which may raise anything; then identity has to do
        return None
    return digest.sha.digest()

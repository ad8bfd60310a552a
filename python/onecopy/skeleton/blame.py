"""Where in an object the thing sits that could not be pickled."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Any

_LIMIT = 100_000  # objects looked at: an error message is not worth a minute


def path(root: object, culprit: object, prefix: str = "") -> str | None:
    """The shortest path of attributes, keys and indices from `root` to `culprit`, such as ``.encoder.lock``.

    `prefix`: what of it says nothing to the user, where it begins with that.
    """
    seen = {id(root)}
    waiting: deque[tuple[object, str]] = deque([(root, "")])
    while waiting and len(seen) < _LIMIT:
        obj, place = waiting.popleft()
        if obj is culprit:
            return place.removeprefix(prefix) or None
        with suppress(Exception):  # an object of somebody else that dislikes to be looked at
            for child, step in _children(obj):
                if id(child) not in seen:
                    seen.add(id(child))
                    waiting.append((child, place + step))
    return None


def _children(obj: Any) -> list[tuple[Any, str]]:
    if isinstance(obj, dict):
        return [(value, f"[{key!r:.80}]") for key, value in obj.items()]
    if isinstance(obj, (list, tuple)):
        return [(value, f"[{index}]") for index, value in enumerate(obj)]
    if isinstance(obj, (set, frozenset)):
        return [(value, "{...}") for value in obj]
    if isinstance(obj, type):
        return []
    children = []
    attributes = getattr(obj, "__dict__", None)
    for name, value in attributes.items() if isinstance(attributes, dict) else ():
        if name in ("_modules", "_parameters", "_buffers") and isinstance(value, dict):  # as torch's modules show them
            children += [(child, f".{key}") for key, child in value.items()]
        else:
            children.append((value, f".{name}"))
    for cls in type(obj).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(obj, name):
                children.append((getattr(obj, name), f".{name}"))
    return children

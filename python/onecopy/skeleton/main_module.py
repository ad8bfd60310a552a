"""Classes and functions of ``__main__``: the same in two processes where both run the same script."""

from __future__ import annotations

import os
import sys
import types
import uuid
from functools import reduce

#: multiprocessing's "spawn" imports the parent's script under the second name, and gives it the first one too.
NAMES = ("__main__", "__mp_main__")

_PROCESS_FAMILY = f"process:{uuid.uuid4()}"


def script() -> str:
    """What this process runs. Equal in two processes: what one finds in its `__main__`, the other may have too."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path:
        return f"file:{os.path.realpath(path)}"
    if "-c" in sys.orig_argv[:-1]:
        return f"command:{sys.orig_argv[sys.orig_argv.index('-c') + 1]}"
    return _PROCESS_FAMILY  # an interactive session, and what it forks


def name_of(obj: type | types.FunctionType) -> str | None:
    """The qualified name under which `__main__` has this very object, if it has."""
    if getattr(obj, "__module__", None) not in NAMES:
        return None
    try:
        return obj.__qualname__ if attribute(obj.__qualname__) is obj else None
    except AttributeError:  # made in a function, or under a name that is gone
        return None


def attribute(qualname: str) -> object:
    """What `__main__` has under a qualified name. Raises AttributeError."""
    return reduce(getattr, qualname.split("."), sys.modules["__main__"])


def has(qualname: str) -> bool:
    try:
        attribute(qualname)
    except AttributeError:
        return False
    return True

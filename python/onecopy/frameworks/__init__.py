"""Which memory of an object can be shared: one file per framework, imported when the framework is in use.

Each file has ``Taker``, used by `take_apart`, and two functions for `put_together`: ``build`` makes the objects
that a taker has numbered, ``rebuilding`` is the context in which an object is put together.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from onecopy.skeleton.parts import Extents

#: Returns the number under which an object is kept outside the pickle, or None to have it pickled.
Leaf = Callable[[Any], int | None]
#: Returns what ``__reduce_ex__`` may, or NotImplemented.
Reducer = Callable[[Any], Any]


class Taker(Protocol):
    """Takes the objects of one framework out of the pickle of one object."""

    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None: ...

    def leaf(self, cls: type) -> Leaf | None:
        """How instances of a class are taken out, if they are. Asked once per class."""

    def reducer(self, cls: type) -> Reducer | None:
        """How instances of a class are pickled, if not as usual. Asked once per class."""

    def settle(self) -> None:
        """All is met and merged; last chance to replace an extent by a copy."""

    def columns(self) -> object:
        """What `build` needs, to be pickled, or None: the object has nothing of it. All is placed."""


class Framework(Protocol):
    """The module of one framework."""

    Taker: type[Taker]

    def build(self, columns: Any, mapping: object, data_start: int, table: MutableMapping[int, object]) -> None: ...

    def rebuilding(self) -> AbstractContextManager[None]: ...


#: Those that are looked for beside NumPy, in the order in which they are asked. Keras comes last: on torch its models are modules.
_KNOWN = ("torch", "tensorflow", "keras")


def names() -> list[str]:
    """Frameworks in use in this process. An object can hold tensors of no other."""
    return ["numpy", *(name for name in _KNOWN if name in sys.modules)]


def load(name: str) -> Framework:
    if name not in ("numpy", *_KNOWN):
        raise ValueError(f"this version of onecopy knows no framework {name!r}")
    module: Any = importlib.import_module(f"onecopy.frameworks.{name}")
    framework: Framework = module
    return framework

"""Takes a picklable object apart into a small skeleton and large buffers, and puts it together over a mapping.

    parts = take_apart(model)                  # once: skeleton, and buffers to copy into shared memory
    model = put_together(parts.skeleton, mapping, data_start)      # anywhere: nothing is copied

The skeleton is a pickle in which torch's tensors and storages and NumPy's arrays are numbers (persistent ids), with
a table in front from which those are made before the pickle is read. Every array and tensor holds a reference to
the mapping. The skeleton is unpickled: check its integrity and its owner first.
"""

from __future__ import annotations

import copyreg
import importlib
import io
import itertools
import pickle
import struct
from collections import OrderedDict
from contextlib import ExitStack
from functools import lru_cache
from types import FunctionType
from typing import Any

import cloudpickle

from onecopy import frameworks
from onecopy.skeleton import blame, collector, main_module
from onecopy.skeleton.parts import Buffer, Extents, Parts, Unshareable

__all__ = ["LEAST_SHARED", "Buffer", "Parts", "Unshareable", "put_together", "take_apart"]

try:
    from cloudpickle.cloudpickle import _dynamic_class_reduce
except ImportError:  # before cloudpickle 3, which Beam before 2.65 does not take
    from cloudpickle.cloudpickle_fast import _dynamic_class_reduce

#: Bytes in buffers of `_LARGE` and more below which sharing is not worth a segment.
LEAST_SHARED = 1 << 20
_LARGE = 1 << 10

# Version, then the lengths of the table, the pickle that names what `__main__` has, and the pickle that contains it.
_HEADER = struct.Struct("<4sIQQQ")
_MAGIC = b"1CSK"
#: What is shared is (model, what came with it): the user knows the model.
_MODEL = "[0]"
_VERSION = 1


def take_apart(obj: object, *, pickler: type = cloudpickle.Pickler, least_shared: int = LEAST_SHARED) -> Parts:
    """Take `obj` apart; `obj` itself is not changed.

    `pickler` makes the skeleton. With cloudpickle's own, classes and functions of `__main__` are named where the
    attacher runs the same script, and contained where it does not; any other keeps its own ways with them.

    Raises Unshareable with the reason.
    """
    skeleton, data_bytes, extents = _skeleton(obj, pickler)
    buffers = extents.buffers()
    shared_bytes = sum(buffer.nbytes for buffer in buffers if buffer.nbytes >= _LARGE)
    if shared_bytes < least_shared:
        raise Unshareable(
            f"{shared_bytes / 1024:.0f} KiB in tensors and arrays of 1 KiB and more, less than "
            f"{least_shared / 1024:.0f} KiB: not worth a segment",
            silent=True,
        )
    return Parts(skeleton, buffers, data_bytes, shared_bytes)


def put_together(skeleton: bytes | memoryview, mapping: Any, data_start: int) -> Any:
    """Put an object together over `mapping`, whose data area begins `data_start` bytes after its start.

    Raises ValueError where the skeleton is not one, and AttributeError or ModuleNotFoundError where this process
    lacks a class or function of the object.
    """
    stream = io.BytesIO(skeleton)
    lengths = _lengths(stream.read(_HEADER.size), len(skeleton))
    with collector.paused(), ExitStack() as stack:
        objects: dict[int, object] = {}
        data_bytes, columns, unpickler_module, script, names, trouble = _table(stream.read(lengths[0]))
        _check_size(mapping, data_start + data_bytes)
        for name, framework_columns in columns.items():
            framework = frameworks.load(name)
            stack.enter_context(framework.rebuilding())
            framework.build(framework_columns, mapping, data_start, objects)
        if names and not _by_name(script, names, trouble):
            stream.seek(lengths[1], io.SEEK_CUR)
        unpickler = importlib.import_module(unpickler_module).Unpickler(stream)
        unpickler.persistent_load = objects.__getitem__
        return unpickler.load()


def _lengths(header: bytes, total: int) -> tuple[int, int, int]:
    if len(header) < _HEADER.size:
        raise ValueError(f"a skeleton of {total} bytes is shorter than its header of {_HEADER.size}")
    magic, version, *lengths = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise ValueError(f"not a skeleton: it begins with {magic!r}, not {_MAGIC!r}")
    if version != _VERSION:
        raise ValueError(f"a skeleton of version {version}; this onecopy reads version {_VERSION}")
    table, named, contained = lengths
    if _HEADER.size + table + named + contained != total:
        raise ValueError(f"a skeleton of {total} bytes whose header speaks of {_HEADER.size + sum(lengths)}")
    return table, named, contained


def _table(data: bytes) -> tuple[int, dict[str, object], str, str, set[str], str]:
    try:
        data_bytes, columns, unpickler_module, script, names, trouble = pickle.loads(data)
    except (pickle.UnpicklingError, EOFError, TypeError) as error:
        raise ValueError(f"the table of a skeleton cannot be read: {error}") from error
    return data_bytes, columns, unpickler_module, script, names, trouble


def _check_size(mapping: Any, need: int) -> None:
    with memoryview(mapping) as view:
        if view.nbytes < need:
            raise ValueError(f"a mapping of {view.nbytes} bytes for a skeleton whose data area ends at {need}")


def _by_name(script: str, names: set[str], trouble: str) -> bool:
    """Whether this process's `__main__` is the one that the pickled object names."""
    if script == main_module.script() and all(map(main_module.has, names)):
        return True
    if not trouble:
        return False
    raise AttributeError(
        f"{', '.join(sorted(names))} of the __main__ of {script}: this process runs {main_module.script()}, "
        f"and they cannot be sent along either ({trouble})"
    )


def _skeleton(obj: object, pickler: type, trouble: str = "") -> tuple[bytes, int, Extents]:
    """The skeleton, the size of the data area, and what lies there. What the picklers met is let go of on return.

    `trouble`: why the object cannot be pickled with what is in `__main__`, if so.
    """
    extents = Extents()
    number = itertools.count().__next__
    takers = {name: frameworks.load(name).Taker(extents, number) for name in frameworks.names()}
    names: set[str] = set()
    named, contained = b"", b""
    if pickler is cloudpickle.Pickler:
        named = _dump(obj, pickler, takers, names)
    if not names:
        named, contained = b"", named or _dump(obj, pickler, takers, None)
    elif not trouble:
        try:
            contained = _dump(obj, pickler, takers, None)
        except Unshareable as error:  # attachers that run the same script do without; but anew, for what it met by then
            return _skeleton(obj, pickler, trouble=error.reason)
    extents.merge()
    for taker in takers.values():
        taker.settle()
    data_bytes = extents.place()
    # Who attaches need not import what the object has nothing of.
    columns = {name: columns for name, taker in takers.items() if (columns := taker.columns()) is not None}
    table = pickle.dumps(
        (data_bytes, columns, _unpickler_of(pickler), main_module.script(), names, trouble), protocol=5
    )
    header = _HEADER.pack(_MAGIC, _VERSION, len(table), len(named), len(contained))
    return b"".join((header, table, named, contained)), data_bytes, extents


def _unpickler_of(pickler: type) -> str:
    """The module whose `Unpickler` goes with a pickler: dill's own, plain pickle for cloudpickle in all its forms."""
    dills = [cls.__module__ for cls in pickler.__mro__ if cls.__module__.partition(".")[0] == "dill"]
    return dills[0] if dills else "pickle"


def _dump(obj: object, pickler: type, takers: dict[str, frameworks.Taker], names: set[str] | None) -> bytes:
    file = io.BytesIO()
    taking = _taking(pickler)(file, protocol=5)
    taking.takers, taking.names = list(takers.values()), names
    taking.keep_main = pickler is cloudpickle.Pickler
    try:
        taking.dump(obj)
    except (Unshareable, MemoryError) as error:
        place = blame.path(obj, taking.last, _MODEL)
        if place and isinstance(error, Unshareable):
            raise Unshareable(f"{error.reason} (at {place})") from error
        raise
    except Exception as error:
        place = blame.path(obj, taking.last, _MODEL)
        where = f" (at {place})" if place else ""
        message = (
            f"it cannot be pickled: {type(error).__name__}: {error}{where}. To share it, leave that out (__getstate__) and "
            "make it where it is used"
        )
        raise Unshareable(message) from error
    return file.getvalue()


# Here rather than in the first call, where somebody waits for the model.
for _name in frameworks.names():
    frameworks.load(_name)

_MISSING: Any = object()


@lru_cache
def _taking(pickler: Any) -> Any:
    """A subclass of a pickler that takes out what the takers want."""

    class Taking(pickler):  # type: ignore[misc]
        takers: list[frameworks.Taker]
        names: set[str] | None  # collects what is pickled by its name in `__main__`; None: nothing is
        keep_main: bool  # whether `__main__` is ours to decide on
        last: object = None  # the culprit, if pickling fails

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._leaves: dict[type, frameworks.Leaf | None] = {}
            self._reducers: dict[type, frameworks.Reducer | None] = {}

        def persistent_id(self, obj: object) -> int | None:
            self.last = obj
            cls = type(obj)
            leaf = self._leaves.get(cls, _MISSING)
            if leaf is _MISSING:
                leaf = self._leaves[cls] = next(filter(None, (taker.leaf(cls) for taker in self.takers)), None)
            return None if leaf is None else leaf(obj)

        def reducer_override(self, obj: Any) -> Any:
            cls = type(obj)
            reducer = self._reducers.get(cls, _MISSING)
            if reducer is _MISSING:
                reducer = next(filter(None, (taker.reducer(cls) for taker in self.takers)), None)
                self._reducers[cls] = reducer
            if cls is OrderedDict and not obj and not obj.__dict__:
                # Every torch module has a dozen. Without a call of `__init__` they cost a tenth less.
                return copyreg.__newobj__, (cls,)  # type: ignore[attr-defined]
            reduced = NotImplemented if reducer is None else reducer(obj)
            if reduced is NotImplemented and self.keep_main and isinstance(obj, (type, FunctionType)):
                reduced = self._reduce_of_main(obj)
            if reduced is NotImplemented and hasattr(super(), "reducer_override"):
                reduced = super().reducer_override(obj)
            return reduced

        def _reduce_of_main(self, obj: Any) -> Any:
            name = main_module.name_of(obj)
            if name is None:
                return NotImplemented
            if self.names is not None:
                self.names.add(name)
                return main_module.attribute, (name,)
            if obj.__module__ == "__main__":
                return NotImplemented
            # cloudpickle takes multiprocessing's second name of the script for an importable module.
            return _dynamic_class_reduce(obj) if isinstance(obj, type) else self._dynamic_function_reduce(obj)

    return Taking

"""TensorFlow's eager tensors, its variables, and what `tf.saved_model.load` returns.

TensorFlow computes on foreign memory only where that comes through DLPack, and a variable that is made from such a tensor,
or assigned it, takes the memory over as it is. It never writes into it: an update makes memory of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

from onecopy.frameworks import tensorflow_saved
from onecopy.skeleton.parts import ALIGNMENT, Unshareable, address, in_mapping

if TYPE_CHECKING:
    from onecopy.frameworks import Leaf, Reducer
    from onecopy.skeleton.parts import Extent, Extents

EagerTensor: Any = tf.__internal__.EagerTensor

# What DLPack has no word for, and TensorFlow can take for integers of the same size. The rest (strings, float8, int4) is
# pickled with its values, and private.
_CARRIERS: dict[Any, np.dtype[Any]] = {
    **{tf.as_dtype(np.dtype(code)): np.dtype(code) for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")},
    **{tf.as_dtype(np.dtype(code)): np.dtype(code) for code in ("f2", "f4", "f8", "c8", "c16")},
    tf.bfloat16: np.dtype("u2"),
    tf.qint8: np.dtype("i1"),
    tf.quint8: np.dtype("u1"),
    tf.qint32: np.dtype("i4"),
}


class Memory:
    """Of a variable, to be taken out without the variable: what is put together in its place is a tensor."""

    __slots__ = ("variable",)

    def __init__(self, variable: Any) -> None:
        self.variable = variable


class Taker:
    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None:
        self._extents = extents
        self._next_number = next_number
        # By id() of the tensor or variable, which the row keeps alive.
        self._rows: dict[int, tuple[int, Any, Any, Extent]] = {}

    def leaf(self, cls: type) -> Leaf | None:
        if issubclass(cls, EagerTensor):
            return self._tensor
        if cls is Memory:
            return self._memory
        refusal = tensorflow_saved.refusal(cls)
        return partial(_refuse, refusal) if refusal else None

    def reducer(self, cls: type) -> Reducer | None:
        if issubclass(cls, tf.Variable):
            plain = issubclass(cls, BaseResourceVariable) and ".distribute." not in cls.__module__
            return _reduce_variable if plain else _refuse_variable
        return tensorflow_saved.reduce_loaded if tensorflow_saved.is_loaded(cls) else None

    def _tensor(self, tensor: Any) -> int | None:
        return self._row(tensor, tensor)

    def _memory(self, memory: Memory) -> int | None:
        return self._row(memory.variable, memory.variable.read_value())

    def _row(self, owner: Any, tensor: Any) -> int | None:
        row = self._rows.get(id(owner))
        if row is not None:
            return row[0]
        if "CPU" not in (tensor.backing_device or "CPU"):
            raise Unshareable(f"a tensor on {tensor.backing_device}: only CPU tensors can be shared")
        carrier = _CARRIERS.get(tensor.dtype)
        if carrier is None:
            return None
        array = np.asarray(tensor)  # a view
        extent = self._extents.add(address(array) if array.nbytes else 0, array.nbytes, array)
        if owner is not tensor:
            extent.mover = Mover(owner)
        row = self._rows[id(owner)] = (self._next_number(), owner, tensor, extent)
        return row[0]

    def settle(self) -> None:
        for _, _, _, extent in self._rows.values():
            region = extent.region
            if region is not None and (extent.start - region.start) % ALIGNMENT:
                raise Unshareable(
                    f"a tensor over memory that begins {extent.start - region.start} bytes into an array of the same object: "
                    f"TensorFlow needs a multiple of {ALIGNMENT}. Share a copy of it (tf.identity of a constant)"
                )

    def columns(self) -> object:
        rows = list(self._rows.values())
        if not rows:
            return None
        return (
            [number for number, _, _, _ in rows],
            [tuple(tensor.shape) for _, _, tensor, _ in rows],
            [tensor.dtype.name for _, _, tensor, _ in rows],
            [extent.offset for _, _, _, extent in rows],
        )


class Mover:
    """A variable is assigned what lies in the mapping. All that reads it, graphs too, goes through the variable."""

    #: TensorFlow's allocator keeps what it frees, for other tensors.
    returns_memory = False

    def __init__(self, variable: Any) -> None:
        self._variable = weakref.ref(variable)

    def alive(self) -> bool:
        return self._variable() is not None

    def move(self, mapping: object, offset: int) -> None:
        variable = self._variable()
        if variable is not None:
            with rebuilding():
                variable.assign(tensor_over(mapping, offset, tuple(variable.read_value().shape), variable.dtype.name))


def build(columns: Any, mapping: object, data_start: int, table: MutableMapping[int, object]) -> None:
    numbers, shapes, dtypes, offsets = columns
    places = in_mapping(data_start, offsets)
    table.update(zip(numbers, map(tensor_over, repeat(mapping), places, shapes, dtypes), strict=True))


@contextmanager
def rebuilding() -> Iterator[None]:
    with tf.init_scope(), tf.device("/CPU:0"):
        if not tf.executing_eagerly():
            raise RuntimeError("TensorFlow is not eager here: acquire the model outside of `tf.Graph().as_default()`")
        yield


def tensor_over(buffer: Any, offset: int, shape: tuple[int, ...], dtype: str) -> Any:
    """A tensor that looks at a buffer, which it keeps alive.

    Raises ValueError where TensorFlow would abort the process.
    """
    kind = tf.as_dtype(dtype)
    carrier = _CARRIERS.get(kind)
    if carrier is None:
        raise ValueError(f"a tensor of {dtype} over shared memory: TensorFlow cannot take that from outside")
    ndarray: Any = np.ndarray
    array = ndarray(shape, carrier, buffer, offset)
    if not array.nbytes:
        return tf.zeros(shape, kind)
    if address(array) % ALIGNMENT:
        raise ValueError(f"a tensor at {address(array):#x}: TensorFlow needs a multiple of {ALIGNMENT}")
    # The capsule is NumPy's: it lets go of the array in any thread, and when the interpreter is gone, not at all.
    tensor = tf.experimental.dlpack.from_dlpack(array.__dlpack__())
    return tensor if tensor.dtype == kind else tf.bitcast(tensor, kind)


def can_share(dtype: str) -> bool:
    """Whether `tensor_over` makes tensors of it."""
    return tf.as_dtype(dtype) in _CARRIERS


def make_variable(memory: Any, options: dict[str, Any]) -> Any:
    """Unpickles a variable."""
    return tf.Variable(memory, **options)


def _reduce_variable(variable: Any) -> Any:
    options = {
        "trainable": variable.trainable,
        "name": variable.name.partition(":")[0],
        "constraint": variable.constraint,
        "synchronization": variable.synchronization,
        "aggregation": variable.aggregation,
        "shape": variable.shape.as_list() if variable.shape.rank is not None else None,
    }
    if options["shape"] is None:
        options["shape"] = tf.TensorShape(None)
    return make_variable, (memory_of(variable), options)


def memory_of(variable: Any) -> Any:
    """What stands for a variable's value in a pickle."""
    return Memory(variable) if variable.dtype in _CARRIERS else variable.read_value()


def _refuse_variable(variable: Any) -> Any:
    raise Unshareable(f"a {type(variable).__name__}: its value belongs to a distribution strategy")


def _refuse(reason: str, _obj: object) -> int | None:
    raise Unshareable(reason)


def is_variable(obj: object) -> bool:
    return isinstance(obj, BaseResourceVariable)

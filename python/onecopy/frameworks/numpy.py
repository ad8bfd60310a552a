"""NumPy arrays, and anything else that pickles through ``pickle.PickleBuffer``."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np

from onecopy.skeleton.parts import address, in_mapping

if TYPE_CHECKING:
    from onecopy.frameworks import Leaf, Reducer
    from onecopy.skeleton.parts import Extent, Extents

Array = np.ndarray[Any, Any]


class Taker:
    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None:
        self._extents = extents
        self._next_number = next_number
        self._rows: dict[int, tuple[int, Array, Extent]] = {}  # by id() of the array, which the row keeps alive
        self._buffers: list[tuple[int, Array, Extent, bool]] = []

    def leaf(self, cls: type) -> Leaf | None:
        if cls is np.ndarray or cls is np.memmap:
            return self._array
        return self._buffer if cls is pickle.PickleBuffer else None

    def reducer(self, cls: type) -> Reducer | None:
        return _reduce_subclass if issubclass(cls, np.ndarray) and _views_suffice(cls) else None

    def _array(self, array: Array) -> int | None:
        if array.dtype.hasobject:
            return None
        row = self._rows.get(id(array))
        if row is None:
            row = self._rows[id(array)] = (self._next_number(), array, self._extents.add(*_span(array), array))
        return row[0]

    def _buffer(self, buffer: pickle.PickleBuffer) -> int | None:
        try:
            raw = buffer.raw()
        except BufferError:
            return None  # not contiguous: pickle has the better message
        array = np.frombuffer(raw, np.uint8)
        number = self._next_number()
        self._buffers.append((number, array, self._extents.add(address(array), array.nbytes, array), raw.readonly))
        return number

    def settle(self) -> None:
        for key, (number, array, extent) in self._rows.items():
            if extent.alone and array.nbytes < extent.nbytes:
                copy = array.copy(order="K")
                extent.replace(copy)
                copy.flags.writeable = array.flags.writeable
                self._rows[key] = (number, copy, extent)

    def columns(self) -> object:
        rows = list(self._rows.values())
        return (
            [number for number, _, _ in rows],
            [array.shape for _, array, _ in rows],
            [array.dtype for _, array, _ in rows],
            [extent.offset + address(array) - extent.start if extent.nbytes else 0 for _, array, extent in rows],
            [None if array.flags.c_contiguous else array.strides for _, array, _ in rows],
            [number for number, array, _ in rows if not array.flags.writeable],
            [(number, extent.offset, array.nbytes, readonly) for number, array, extent, readonly in self._buffers],
        )


def build(columns: Any, mapping: Any, data_start: int, table: MutableMapping[int, object]) -> None:
    numbers, shapes, dtypes, offsets, strides, readonly, buffers = columns
    places = in_mapping(data_start, offsets)
    if any(dtype.hasobject for dtype in dtypes):
        raise ValueError("an array of objects over shared memory: its bytes are no pointers")
    ndarray: Any = np.ndarray
    table.update(zip(numbers, map(ndarray, shapes, dtypes, repeat(mapping), places, strides), strict=True))
    for number in readonly:
        array: Any = table[number]
        array.flags.writeable = False
    for number, offset, nbytes, is_readonly in buffers:
        (place,) = in_mapping(data_start, [offset])
        view = memoryview(ndarray((nbytes,), np.uint8, mapping, place))
        table[number] = view.toreadonly() if is_readonly else view


@contextmanager
def rebuilding() -> Iterator[None]:
    yield


def _span(array: Array) -> tuple[int, int]:
    """Address and length of the memory between an array's lowest and highest byte."""
    if not array.nbytes:
        return 0, 0
    start = stop = address(array)
    for count, stride in zip(array.shape, array.strides, strict=True):
        start += min(0, (count - 1) * stride)
        stop += max(0, (count - 1) * stride)
    return start, stop + array.itemsize - start


def _views_suffice(cls: type) -> bool:
    """Whether data, class and attributes are all there is to the instances of a subclass of ndarray."""
    stock = all(
        getattr(cls, name) is getattr(np.ndarray, name) for name in ("__reduce__", "__reduce_ex__", "__setstate__")
    )
    return stock or cls is np.ma.MaskedArray


def _reduce_subclass(array: Array) -> Any:
    if array.dtype.hasobject:
        return NotImplemented
    return _view, (array.view(np.ndarray), type(array)), vars(array), None, None, _set_attributes


def _view(array: Array, cls: type[Array]) -> Array:
    return array.view(cls)


def _set_attributes(array: Array, attributes: dict[str, object]) -> None:
    vars(array).update(attributes)

"""Torch's tensors, storages and modules.

The unit is the storage, not the tensor. Strided CPU tensors without Python attributes become rows; everything else
goes through torch's own reducers, which end at a storage, and that is a row again.
"""

# ruff: noqa: SLF001 (what torch's own reducers use has no public name)
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.storage import TypedStorage

from onecopy.frameworks import torch_modules
from onecopy.frameworks.torch_move import Mover
from onecopy.skeleton.parts import Unshareable, in_mapping

if TYPE_CHECKING:
    from onecopy.frameworks import Leaf, Reducer
    from onecopy.skeleton.parts import Extent, Extents

Tensor = torch.Tensor
Parameter = torch.nn.Parameter
UntypedStorage = torch.UntypedStorage

# Dtypes that NumPy lacks travel as integers of the same size.
_CARRIERS = {1: np.dtype("u1"), 2: np.dtype("i2"), 4: np.dtype("i4"), 8: np.dtype("i8"), 16: np.dtype("c16")}


def _native_dtypes() -> dict[torch.dtype, np.dtype[Any]]:
    native = {}
    for code in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"):
        dtype = np.dtype(code)
        try:
            native[torch.from_numpy(np.empty(0, dtype)).dtype] = dtype
        except TypeError:  # u2, u4 and u8 before torch 2.3
            continue
    return native


_NATIVE = _native_dtypes()
#: Calls what an iterator calls, in C.
_exhaust = deque[object](maxlen=0).extend


class _Storage:
    """One storage met, and the tensors met on it."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.number: int | None = None  # of the storage itself, where somebody asks for it
        self.rows: list[tuple[int, Tensor]] = []
        self.others: list[Tensor] = []  # not rows, but to be re-pointed too


class Taker:
    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None:
        self._extents = extents
        self._next_number = next_number
        self._storages: dict[int, _Storage] = {}  # by address of the C++ object
        self._numbers: dict[int, int] = {}  # by id() of the tensor, which its storage's entry keeps alive
        self._setter: int | None = None

    def leaf(self, cls: type) -> Leaf | None:
        if issubclass(cls, Tensor):
            return self._tensor
        if issubclass(cls, UntypedStorage):
            return self._untyped_storage
        if cls is type(torch_modules.SET_STATE):
            return self._set_state
        refusal = torch_modules.refusal(cls)
        return _refuse(refusal) if refusal else None

    def reducer(self, cls: type) -> Reducer | None:
        if issubclass(cls, torch.nn.Module):
            return torch_modules.reducer(cls)
        return _reduce_typed_storage if issubclass(cls, TypedStorage) else None

    def _tensor(self, tensor: Tensor) -> int | None:
        number = self._numbers.get(id(tensor))
        if number is not None:
            return number
        if tensor.device.type not in ("cpu", "meta"):
            raise Unshareable(f"a tensor on {tensor.device}: only CPU tensors can be shared")
        if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]
            raise Unshareable("an opaque mkldnn tensor has no storage: share the model as it was before to_mkldnn()")
        if not _has_memory(tensor):
            return None
        storage = self._storage(tensor.untyped_storage())
        if not _is_plain(tensor):
            storage.others.append(tensor)
            return None
        number = self._numbers[id(tensor)] = self._next_number()
        storage.rows.append((number, tensor))
        return number

    def _untyped_storage(self, storage: UntypedStorage) -> int:
        entry = self._storage(storage)
        if entry.number is None:
            entry.number = self._next_number()
        return entry.number

    def _storage(self, storage: UntypedStorage) -> _Storage:
        if storage.device.type != "cpu":
            raise Unshareable(f"a storage on {storage.device}: only CPU storages can be shared")
        entry = self._storages.get(storage._cdata)
        if entry is None:
            start = storage.data_ptr()
            entry = _Storage(self._extents.add(start, storage.nbytes() if start else 0, storage))
            self._storages[storage._cdata] = entry
        return entry

    def _set_state(self, obj: object) -> int | None:
        if obj is not torch_modules.SET_STATE:
            return None
        if self._setter is None:
            self._setter = self._next_number()
        return self._setter

    def settle(self) -> None:
        """Storages are never stored in part."""

    def columns(self) -> object:
        wholes: dict[tuple[torch.dtype, bool, bool], list[tuple[int, tuple[int, ...], int]]] = {}
        storages: list[tuple[int, int, int]] = []
        views: list[tuple[int, int, dict[str, Any]]] = []
        aliases: list[tuple[int, int]] = []
        for entry in self._storages.values():
            offset, nbytes = entry.extent.offset, entry.extent.nbytes
            owner = next((row for row in entry.rows if _is_whole(row[1], nbytes)), None)
            if owner is not None:
                number, tensor = owner
                key = (tensor.dtype, type(tensor) is Parameter, tensor.requires_grad)
                wholes.setdefault(key, []).append((number, tuple(tensor.shape), offset))
            else:
                number = self._next_number()
                storages.append((number, offset, nbytes))
            views += [(n, number, _describe(tensor)) for n, tensor in entry.rows if n != number]
            if entry.number is not None:
                aliases.append((entry.number, number))
            tensors = [*(tensor for _, tensor in entry.rows), *entry.others]
            if not any(map(Tensor.is_inference, tensors)):
                entry.extent.mover = Mover(tensors, entry.extent.nbytes)
        groups = [(key, *map(list, zip(*rows, strict=True))) for key, rows in wholes.items()]
        return groups, storages, views, aliases, self._setter


def build(columns: Any, mapping: Any, data_start: int, table: MutableMapping[int, Any]) -> None:
    groups, storages, views, aliases, setter = columns
    for (dtype, is_parameter, requires_grad), numbers, shapes, offsets in groups:
        native = _NATIVE.get(dtype)
        carrier = native or _CARRIERS[dtype.itemsize]
        places = in_mapping(data_start, offsets)
        ndarray: Any = np.ndarray
        # Only C functions from here on: no Python frame per tensor. A storage of its own for each, of exactly its
        # size: with one storage for all, torch.save of one tensor would write the whole model.
        made = list(map(torch.from_numpy, map(ndarray, shapes, repeat(carrier), repeat(mapping), places)))
        cls = Parameter if is_parameter else Tensor
        if native is None:  # a view of the carrier, which _make_subclass detaches from it
            made = list(map(Tensor._make_subclass, repeat(cls), map(Tensor.view, made, repeat(dtype))))
        elif is_parameter:  # as torch's own lazy parameters become what they are: half the cost of _make_subclass
            _exhaust(map(setattr, made, repeat("__class__"), repeat(cls)))
        if requires_grad:
            _exhaust(map(Tensor.requires_grad_, made))
        table.update(zip(numbers, made, strict=True))
    for number, offset, nbytes in storages:
        (place,) = in_mapping(data_start, [offset])
        table[number] = storage_over(mapping, place, nbytes)
    for number, owner, description in views:
        memory = table[owner]
        storage = memory if isinstance(memory, UntypedStorage) else memory.untyped_storage()
        table[number] = _view(storage, **description)
    for number, owner in aliases:
        memory = table[owner]
        table[number] = memory if isinstance(memory, UntypedStorage) else memory.untyped_storage()
    if setter is not None:
        table[setter] = torch_modules.SET_STATE


@contextmanager
def rebuilding() -> Iterator[None]:
    # What is built is used by every thread of the process, so the caller's inference mode must not mark it.
    with torch.inference_mode(mode=False):
        yield
    # torch's reducers remember sparse tensors for a check that torch.load makes; without it the list would grow.
    torch._utils._validate_loaded_sparse_tensors()


def storage_over(mapping: Any, offset: int, nbytes: int) -> UntypedStorage:
    return torch.from_numpy(np.ndarray((nbytes,), np.uint8, mapping, offset)).untyped_storage()


def _has_memory(tensor: Tensor) -> bool:
    """False for tensors made of other tensors, which pickle meets next, and for those that are only a shape."""
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.is_nested:
        return False
    if torch.nn.parameter.is_lazy(tensor) or not torch._C._has_storage(tensor):
        return False
    try:
        tensor.untyped_storage().data_ptr()
    except RuntimeError:  # what torch says of a wrapper subclass
        return False
    return True


def _is_plain(tensor: Tensor) -> bool:
    """Whether storage, geometry, class and two flags are all there is to a tensor."""
    return (
        (type(tensor) is Tensor or type(tensor) is Parameter)
        and not tensor.is_quantized
        and not tensor.__dict__
        and not tensor._backward_hooks
    )


def _is_whole(tensor: Tensor, nbytes: int) -> bool:
    """Whether a tensor is its whole storage in order.

    Strides are compared exactly: those of dimensions of size 1 choose the memory format, and with it the kernel.
    """
    stride = 1
    for size, actual in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if actual != stride:
            return False
        stride *= max(size, 1)
    covered = tensor.storage_offset() == 0 and tensor.numel() * tensor.itemsize == nbytes
    return bool(covered) and not tensor.is_conj() and not tensor.is_neg()


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype,
        "offset": tensor.storage_offset(),
        "size": tuple(tensor.shape),
        "stride": tensor.stride(),
        "metadata": torch._utils.get_tensor_metadata(tensor),  # conjugate and negative bits
        "is_parameter": type(tensor) is Parameter,
        "requires_grad": tensor.requires_grad,
    }


def _view(
    storage: UntypedStorage,
    *,
    dtype: torch.dtype,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    metadata: dict[str, bool],
    is_parameter: bool,
    requires_grad: bool,
) -> Tensor:
    view = torch.empty(0, dtype=dtype, device="cpu").set_(storage, offset, size, stride)
    if metadata:
        torch._utils.set_tensor_metadata(view, metadata)
    if is_parameter:
        return Tensor._make_subclass(Parameter, view, requires_grad)
    return view.requires_grad_() if requires_grad else view


def _reduce_typed_storage(storage: TypedStorage) -> Any:
    # torch's own reducer would write the bytes into the pickle.
    return _typed_storage, (storage._untyped_storage, storage.dtype)


def _typed_storage(storage: UntypedStorage, dtype: torch.dtype) -> TypedStorage:
    return TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _refuse(reason: str) -> Leaf:
    def refuse(_obj: object) -> int | None:
        raise Unshareable(reason)

    return refuse

"""A module over the pages of its state dict's file, exactly as Beam would have loaded it, or an exception."""

import gc
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode


class DiffersError(Exception):
    """It would not be the model that Beam loads."""


def load(handler: Any) -> Module:
    """What `handler.load_model()` of one of Beam's torch handlers returns, and leaves on the handler.

    Raises DiffersError, and what torch and the model's class raise.
    """
    path, arguments = handler._state_dict_path, getattr(handler, "_load_model_args", None) or {}  # noqa: SLF001
    weights = torch.load(path, map_location="cpu", mmap=True, **arguments)
    with _Undrawn() as undrawn:
        model = handler._model_class(**(handler._model_params or {}))  # noqa: SLF001
    if not isinstance(model, Module) or not isinstance(weights, Mapping):
        raise DiffersError("the class makes no module, or the file holds no state dict")
    looks, ties = _looks(model), _ties(model)
    _check_memory(model, weights, ties)
    replaced = [StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(model.state_dict()).values()]
    model.load_state_dict(weights, assign=True)
    _tie(model, ties)
    if _looks(model) != looks:
        raise DiffersError(
            "the file's tensors have other types or layouts than the module's, into which Beam copies them"
        )
    _check_gone([*replaced, *undrawn.storages])
    handler._device = torch.device("cpu")  # noqa: SLF001
    return model.requires_grad_(requires_grad=False).eval()


class _Undrawn(TorchDispatchMode):
    """Leaves large tensors as they are where they would be filled with random numbers, in this thread."""

    LARGE = 1 << 20
    IN_PLACE = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
    #: How often one tensor is spared: some draw again until they like what they see.
    OFTEN = 4

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        #: What was drawn or should have been: in Beam's order of drawing it would hold other numbers.
        self.storages: list[StorageWeakRef] = []
        self._spared: Counter[int] = Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nobody compiles a constructor. Torch would import its compiler to say so: seconds, and memory, in who loads.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        if func not in self.IN_PLACE:
            if self._spared:
                raise DiffersError(f"{func} of the module's constructor would draw other numbers than in Beam")
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        storage = tensor.untyped_storage()
        self.storages.append(StorageWeakRef(storage))
        if storage.nbytes() < self.LARGE or self._spared[storage.data_ptr()] >= self.OFTEN:
            return func(*args, **(kwargs or {}))
        self._spared[storage.data_ptr()] += 1
        return tensor


def _named(model: Module) -> Iterable[tuple[str, torch.Tensor]]:
    return itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def _looks(model: Module) -> dict[str, tuple[object, ...]]:
    return {
        name: (type(one), one.dtype, one.shape, one.layout, one.device, one.stride(), one.is_contiguous())
        for name, one in _named(model)
    }


def _ties(model: Module) -> list[list[str]]:
    """Names of one tensor, for each that has several."""
    names: defaultdict[int, list[str]] = defaultdict(list)
    for name, tensor in _named(model):
        names[id(tensor)].append(name)
    return [group for group in names.values() if len(group) > 1]


def _tie(model: Module, ties: list[list[str]]) -> None:
    for last, *others in (reversed(group) for group in ties):
        module, _, name = last.rpartition(".")
        tensor = getattr(model.get_submodule(module), name)
        for other in others:
            module, _, name = other.rpartition(".")
            setattr(model.get_submodule(module), name, tensor)


def _memory(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _check_memory(model: Module, weights: Mapping[str, Any], ties: list[list[str]]) -> None:
    """Tensors of one memory are one tensor in the module, and the same ones are one in the file."""
    for where, tensors in (("module", dict(_named(model))), ("file", _tensors(weights))):
        memories: defaultdict[int, set[str]] = defaultdict(set)
        for name, tensor in tensors.items():
            if tensor.numel():
                memories[tensor.untyped_storage().data_ptr()].add(name)
        for names in memories.values():
            tied = len(names) == 1 or any(names <= set(group) for group in ties)
            if not tied or len({_memory(tensors[name]) for name in names}) > 1:
                raise DiffersError(f"{', '.join(sorted(names))} lie in one memory of the {where}")
    for group in ties:
        if len({_memory(weights[name]) for name in group if name in weights}) > 1:
            raise DiffersError(f"{', '.join(group)} are one tensor, of which the file has several")


def _check_gone(storages: list[StorageWeakRef]) -> None:
    """Nothing looks at what was there before: it would have Beam's weights, and not these."""
    if not _gone(storages):
        gc.collect()
        if not _gone(storages):
            raise DiffersError("the model keeps tensors that its state dict does not replace")


def _gone(storages: list[StorageWeakRef]) -> bool:
    return all(storage.expired() for storage in storages)

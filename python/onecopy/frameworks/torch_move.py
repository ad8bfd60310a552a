"""Re-pointing: a tensor that lives on looks at the mapping instead of its old storage."""

# ruff: noqa: SLF001 (what torch's own reducers use has no public name)
from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor


class Mover:
    """Moves the tensors met on one storage by ``.data =``.

    The storage itself is never resized or swapped: a NumPy array that somebody made from it would dangle.
    """

    returns_memory = True

    def __init__(self, tensors: Sequence[Tensor], nbytes: int) -> None:
        self._nbytes = nbytes
        # Weakly: torch's reducers make tensors of their own on the way, and moving those frees nothing.
        self._tensors = [weakref.ref(tensor) for tensor in {id(t): t for t in tensors}.values()]

    def alive(self) -> bool:
        return any(tensor() is not None for tensor in self._tensors)

    def move(self, mapping: Any, offset: int) -> None:
        """All or none of the tensors."""
        tensors = {id(tensor): tensor for ref in self._tensors if (tensor := ref()) is not None}
        for tensor in list(tensors.values()):
            base = tensor._base  # a view keeps its base, and the base keeps the old storage
            if base is not None:
                tensors.setdefault(id(base), base)
        with torch.inference_mode(mode=False), torch.no_grad():
            storage = torch.from_numpy(np.ndarray((self._nbytes,), np.uint8, mapping, offset)).untyped_storage()
            moves = [(tensor, tensor.data, _like(tensor, storage)) for tensor in tensors.values()]
            try:
                for tensor, _, new in moves:
                    tensor.data = new
            except BaseException:
                for tensor, old, _ in moves:
                    tensor.data = old
                raise


def _like(tensor: Tensor, storage: torch.UntypedStorage) -> Tensor:
    """The same view of another storage."""
    view = _empty_like(tensor).set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
    torch._utils.set_tensor_metadata(view, torch._utils.get_tensor_metadata(tensor))
    return view


def _empty_like(tensor: Tensor) -> Tensor:
    if not tensor.is_quantized:
        return torch.empty(0, dtype=tensor.dtype, device="cpu")
    if tensor.qscheme() is torch.per_tensor_affine:
        return torch._empty_affine_quantized(
            [0], scale=tensor.q_scale(), zero_point=tensor.q_zero_point(), dtype=tensor.dtype, device="cpu"
        )
    axis = tensor.q_per_channel_axis()
    sizes = [0] * tensor.dim()
    sizes[axis] = tensor.size(axis)  # torch compares it with the number of scales
    return torch._empty_per_channel_affine_quantized(
        sizes,
        scales=tensor.q_per_channel_scales(),
        zero_points=tensor.q_per_channel_zero_points(),
        axis=axis,
        dtype=tensor.dtype,
        device="cpu",
    )

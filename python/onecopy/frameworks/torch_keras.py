"""Keras's variables on torch."""

# ruff: noqa: SLF001 (what a Keras variable is made of has no public name)
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from keras import Variable

from onecopy.frameworks.instead import instead
from onecopy.frameworks.torch import storage_over
from onecopy.frameworks.zeros import Zeros


def building(stack: ExitStack) -> Zeros:
    """While `stack` is open, variables that this thread makes are zeros, and what they are assigned takes their place."""
    zeros = Zeros()

    def with_zeros(_before: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def initialize(variable: Any, _initializer: Any) -> None:
            dtype = getattr(torch, variable._dtype)
            like = torch.empty(tuple(variable._shape), dtype=dtype, device="meta")
            storage = storage_over(zeros.buffer(like.nbytes), 0, like.nbytes)
            tensor = torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, like.shape, like.stride())
            variable._initialize(tensor)

        return initialize

    def take_over(_before: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def assign(variable: Any, value: Any) -> None:
            variable._value.data = value.detach()

        return assign

    stack.enter_context(instead(Variable, "_initialize_with_initializer", with_zeros))
    stack.enter_context(instead(Variable, "_direct_assign", take_over))
    return zeros


def memory(variable: Any) -> Any:
    """What stands for a variable's value in a pickle."""
    return variable._value


def address(variable: Any) -> int:
    return int(variable._value.data_ptr())


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def own_variables(layer: Any) -> list[str]:
    """Attributes of a layer with weights that Keras does not know of."""
    return [*layer._parameters, *layer._buffers]

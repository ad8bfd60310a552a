"""Keras's variables on TensorFlow."""

# ruff: noqa: SLF001 (what a Keras variable is made of has no public name)
from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from onecopy.frameworks.instead import instead
from onecopy.frameworks.tensorflow import EagerTensor, can_share, is_variable, memory_of, rebuilding, tensor_over
from onecopy.frameworks.zeros import Zeros
from onecopy.skeleton.parts import address as address_of


def building(stack: ExitStack) -> Zeros:
    """While `stack` is open, variables that this thread makes are zeros: no initializer runs."""
    zeros = Zeros()

    def with_zeros(before: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def initialize(variable: Any, initializer: Any) -> None:
            if not can_share(variable._dtype):
                before(variable, initializer)
                return
            shape = tuple(variable._shape)
            nbytes = int(np.prod(shape, dtype=np.int64)) * 16  # of the largest type
            with rebuilding():
                variable._initialize(tensor_over(zeros.buffer(nbytes), 0, shape, variable._dtype))

        return initialize

    stack.enter_context(rebuilding())
    stack.enter_context(instead(keras.Variable, "_initialize_with_initializer", with_zeros))
    return zeros


def memory(variable: Any) -> Any:
    """What stands for a variable's value in a pickle."""
    return memory_of(variable._value)


def address(variable: Any) -> int:
    return address_of(np.asarray(variable._value.read_value())) if can_share(variable._dtype) else 0


def is_tensor(value: object) -> bool:
    return isinstance(value, EagerTensor)


def own_variables(layer: Any) -> list[str]:
    """Attributes of a layer with weights that Keras does not know of."""
    held = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in vars(layer).items()}
    return [
        name
        for name, values in held.items()
        if any(is_variable(one) or (isinstance(one, tf.Module) and not isinstance(one, keras.Layer)) for one in values)
    ]

"""The state of a Keras model: what is in it, where, and how it is saved and loaded."""

# ruff: noqa: SLF001 (Keras has no public way to walk a model's state)
from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.models.functional import Functional
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.saving_lib import get_attr_skipset

#: Only training needs it: the optimizer alone may be twice the model.
OF_TRAINING = {
    "optimizer", "_optimizer", "_loss_tracker", "_compile_loss", "_compile_metrics", "_compile_config", "loss", "compiled",
    "train_function", "test_function", "predict_function", "history", "_epoch_iterator", "_eval_epoch_iterator",
}  # fmt: skip
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MISSING: Any = object()


@dataclass
class State:
    """Of one layer, or metric."""

    place: str
    cls: str
    own: dict[str, Any]  #: what `save_own_variables` saves
    seeds: list[Any]  #: of its seed generators, which Keras's own files leave out
    attributes: dict[str, Any]  #: plain ones: somebody may have set them after the constructor
    assets: dict[str, bytes]  #: vocabularies
    running: tuple[bool | None, bool] | None  #: jit_compile, run_eagerly
    variables: list[Described]  #: as they must come out
    policy: str  #: what it computes in


#: Name, shape, dtype, trainable.
Described = tuple[str, tuple[int, ...], str, bool]


def walk(root: Any) -> Iterator[tuple[str, Any]]:
    """Everything with state, and its place: attributes, as Keras's own files have them."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", root)]
    while waiting:
        place, one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, KerasSaveable):
            yield place, one
            children = [(f"{place}.{name}", child) for name, child in _children(one)]
        elif isinstance(one, dict):
            children = [(f"{place}[{key!r:.80}]", child) for key, child in one.items()]
        else:
            children = [(f"{place}[{number}]", child) for number, child in enumerate(one)]
        waiting += [
            (where, child)
            for where, child in reversed(children)
            if isinstance(child, (KerasSaveable, dict, list, tuple))
        ]


def _children(one: Any) -> list[tuple[str, Any]]:
    kind = one._obj_type()
    children = [("layers", one.layers)] if kind in ("Sequential", "Functional") else []
    skipped = _not_walked(kind) | (OF_TRAINING if isinstance(one, keras.Model) else set())
    for name in sorted(dir(one)):
        if not name.startswith("__") and name not in skipped:
            with suppress(Exception):  # a property of the user's, which nobody asked for
                children.append((name, getattr(one, name)))
    return children


@functools.cache
def _not_walked(kind: str) -> set[str]:
    return set(get_attr_skipset(kind))


def save(walked: list[tuple[str, Any]], values: Any) -> tuple[list[State], set[int]]:
    """The state of everything, and by id() the variables that it covers."""
    states = []
    covered: set[int] = set()

    def value(one: Any) -> Any:
        if isinstance(one, keras.Variable):
            covered.add(id(one))
            return values.memory(one)
        return one

    for place, one in walked:
        own: dict[str, Any] = {}
        if isinstance(one, keras.Metric):  # Keras's own files have none of theirs
            own = {str(number): variable for number, variable in enumerate(one.variables)}
        elif hasattr(one, "save_own_variables"):
            one.save_own_variables(own)
        layer = isinstance(one, keras.Layer)
        state = State(
            place,
            _class_name(one),
            {key: value(stored) for key, stored in own.items()},
            [value(generator.state) for generator in one._seed_generators] if layer else [],
            {name: value(kept) for name, kept in _attributes(one, values)} if layer else {},
            _assets(one) if layer else {},
            (one._jit_compile, one._run_eagerly) if isinstance(one, keras.Model) else None,
            [describe(variable) for variable in _own_variables(one)],
            one.dtype_policy.name if layer else "",
        )
        if own or layer:
            states.append(state)
    return states, covered


def load(one: Any, state: State) -> None:
    """Into what Keras built in its place."""
    if _class_name(one) != state.cls:
        raise ValueError(f"Keras built a {_class_name(one)} at {state.place}, not a {state.cls}")
    if state.policy and state.policy != one.dtype_policy.name:
        if not isinstance(
            one, (Functional, keras.Sequential)
        ):  # these compute nothing, and do not say what they compute in
            raise ValueError(
                f"Keras built {state.place or 'the model'} to compute in {one.dtype_policy.name}, not in {state.policy}"
            )
        one.dtype_policy = state.policy
    for name, value in state.attributes.items():
        _set_attribute(one, name, value)
    if isinstance(one, keras.Metric):
        for number, variable in enumerate(one.variables):
            variable.assign(state.own[str(number)])
    elif hasattr(one, "load_own_variables"):
        one.load_own_variables(state.own)
    if state.seeds or getattr(one, "_seed_generators", None):
        for generator, seed in zip(one._seed_generators, state.seeds, strict=True):
            generator.state.assign(seed)
    if state.assets:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state.assets.items():
                Path(folder, name).write_bytes(data)
            one.load_assets(folder)
    _check_variables(one, state)
    if state.running is not None:
        one._jit_compile, one._run_eagerly = state.running


def _own_variables(one: Any) -> list[Any]:
    if isinstance(one, keras.Layer):
        return [*one._trainable_variables, *one._non_trainable_variables]
    return list(getattr(one, "variables", []))


def describe(variable: Any) -> Described:
    # The number that Keras gives to a name which was not given one depends on what the process made before.
    name = re.sub(r"_\d+$", "", variable.name)
    return name, tuple(variable.shape), keras.backend.standardize_dtype(variable._dtype), variable.trainable


def _check_variables(one: Any, state: State) -> None:
    """The order may differ: a quantized layer makes its variables in another one when it is built from its config."""
    built = sorted(_own_variables(one), key=describe)
    published = sorted(state.variables)
    if [describe(variable)[:3] for variable in built] != [described[:3] for described in published]:
        raise ValueError(f"{state.place} has the variables {published}, and Keras built {[*map(describe, built)]}")
    for variable, described in zip(built, published, strict=True):
        if variable.trainable is not described[3]:
            variable.trainable = described[3]


def _class_name(one: Any) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def _attributes(layer: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(layer).items():
        if isinstance(value, np.ndarray) or values.is_tensor(value):
            yield name, value
        elif not name.startswith("_") and name not in OF_TRAINING and _is_plain(value):
            yield name, _plain(value)
    yield "trainable", layer._trainable


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return type(value) in _PLAIN


def _plain(value: Any) -> Any:
    """Without the wrappers in which Keras and TensorFlow keep lists."""
    if isinstance(value, (list, tuple)):
        made = [_plain(one) for one in value]
        return tuple(made) if isinstance(value, tuple) else made
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def _set_attribute(one: Any, name: str, value: Any) -> None:
    now = getattr(one, name, _MISSING)
    same = type(value) in _PLAIN and type(now) is type(value) and now == value
    if not same and not (isinstance(value, (list, tuple, dict)) and _is_plain(now) and _plain(now) == value):
        setattr(one, name, value)


def _assets(layer: Any) -> dict[str, bytes]:
    if not hasattr(layer, "save_assets"):
        return {}
    with tempfile.TemporaryDirectory() as folder:
        layer.save_assets(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

"""The state of a Keras model: what is in it, where, and how it is saved and loaded."""

# ruff: noqa: SLF001 (Keras has no public way to walk a model's state)
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.saving_lib import _walk_saveable

# Only training needs it: the publisher's optimizer alone is twice the model.
_OF_TRAINING = {"optimizer", "_optimizer", "_loss_tracker", "_compile_loss", "_compile_metrics", "loss", "compiled"}
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
            skipped = _OF_TRAINING if isinstance(one, keras.Model) else ()
            children = [
                (f"{place}.{name}", child) for name, child in _walk_saveable(one) if name not in skipped
            ]
        elif isinstance(one, dict):
            children = [(f"{place}[{key!r:.80}]", child) for key, child in one.items()]
        else:
            children = [(f"{place}[{number}]", child) for number, child in enumerate(one)]
        waiting += [
            (where, child) for where, child in reversed(children) if isinstance(child, (KerasSaveable, dict, list, tuple))
        ]


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
        if hasattr(one, "save_own_variables"):
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
        )
        if own or state.seeds or state.attributes or state.assets or state.running:
            states.append(state)
    return states, covered


def load(one: Any, state: State) -> None:
    """Into what Keras built in its place."""
    if _class_name(one) != state.cls:
        raise ValueError(f"Keras built a {_class_name(one)} at {state.place}, not a {state.cls}")
    for name, value in state.attributes.items():
        _set_attribute(one, name, value)
    if hasattr(one, "load_own_variables"):
        one.load_own_variables(state.own)
    if state.seeds or getattr(one, "_seed_generators", None):
        for generator, seed in zip(one._seed_generators, state.seeds, strict=True):
            generator.state.assign(seed)
    if state.assets:
        with tempfile.TemporaryDirectory() as folder:
            for name, data in state.assets.items():
                Path(folder, name).write_bytes(data)
            one.load_assets(folder)
    if state.running is not None:
        one._jit_compile, one._run_eagerly = state.running


def _class_name(one: Any) -> str:
    return f"{type(one).__module__}.{type(one).__qualname__}"


def _attributes(layer: Any, values: Any) -> Iterator[tuple[str, Any]]:
    for name, value in vars(layer).items():
        if isinstance(value, np.ndarray) or values.is_tensor(value):
            yield name, value
        elif not name.startswith("_") and name not in _OF_TRAINING and _is_plain(value):
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

"""Keras 3 models and layers: published as their config and their variables, put together by Keras itself.

What belongs to a model's state is what Keras writes into a `.keras` file, addressed as it does there: by the attributes that lead
to a layer, never by the names that Keras makes up. While Keras builds the model anew, variables are zeros that no memory is spent
on; then each layer loads its own variables from the shared ones.
"""

# ruff: noqa: SLF001 (Keras has no public way to walk a model's state)
from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.saving import object_registration, serialization_lib

from onecopy.frameworks import keras_state
from onecopy.frameworks.instead import instead
from onecopy.skeleton.parts import Unshareable

if TYPE_CHECKING:
    from onecopy.frameworks import Leaf, Reducer
    from onecopy.skeleton.parts import Extents

_BACKENDS = ("tensorflow", "torch")
#: Layers around what Keras does not know the insides of.
_FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
_ARRAY = "onecopy.array"


@dataclass
class Blueprint:
    """A model without its variables' bytes."""

    backend: str
    config: dict[str, Any]
    custom: dict[str, Any]  #: classes and functions that the config names, as `custom_object_scope` has them
    state: list[keras_state.State]
    variables: list[tuple[str, tuple[int, ...], str, bool]]  #: name, shape, dtype, trainable, as `model.variables` has them
    functions: list[tuple[str, Any]] = field(default_factory=list)  #: of Lambda layers, by place


class Taker:
    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None:
        pass

    def leaf(self, _cls: type) -> Leaf | None:
        return None

    def reducer(self, cls: type) -> Reducer | None:
        return _reduce if issubclass(cls, keras.Layer) else None

    def settle(self) -> None:
        """Variables are tensors of the backend, whose taker has them."""

    def columns(self) -> object:
        return None


def build(columns: Any, mapping: object, data_start: int, table: MutableMapping[int, object]) -> None:
    """Never called: there are no columns."""


@contextmanager
def rebuilding() -> Iterator[None]:
    yield


def put_together(blueprint: Blueprint) -> Any:
    """Unpickles a model.

    Raises ValueError where what Keras builds is not what was published.
    """
    if keras.backend.backend() != blueprint.backend:
        raise RuntimeError(
            f"the model was published by Keras on {blueprint.backend}, and Keras runs on {keras.backend.backend()} here: "
            "set KERAS_BACKEND to the same"
        )
    values = _backend(blueprint.backend)
    with ExitStack() as stack:
        zeros = values.building(stack)
        stack.enter_context(instead(serialization_lib, "deserialize_keras_object", _with_arrays_back))
        stack.enter_context(keras.saving.custom_object_scope(blueprint.custom))
        model = keras.saving.deserialize_keras_object(blueprint.config, safe_mode=False)
        places = dict(keras_state.walk(model))
        for place, function in blueprint.functions:
            places[place].function = function
        for state in blueprint.state:
            if state.place not in places:
                raise ValueError(f"Keras built a {type(model).__name__} without {state.place or 'itself'}")
            keras_state.load(places[state.place], state)
    _compare(model, blueprint.variables)
    for variable in model.variables:
        if zeros.has(values.address(variable)):
            raise ValueError(f"Keras built a variable that was not published: {variable.path}")
    return model


def _reduce(model: Any) -> Any:
    if keras.backend.backend() not in _BACKENDS:
        raise Unshareable(f"Keras runs on {keras.backend.backend()}: shared are models on {' and '.join(_BACKENDS)}")
    values = _backend(keras.backend.backend())
    walked = list(keras_state.walk(model))
    layers = [one for _, one in walked if isinstance(one, keras.Layer)]
    for layer in layers:
        if type(layer).__name__ in _FOREIGN:
            raise Unshareable(f"layer {layer.name!r} is a {type(layer).__name__}: share what is in it instead")
        if own := values.own_variables(layer):
            raise Unshareable(f"layer {layer.name!r} keeps weights that Keras does not know of in {own}: use add_weight")
    state, covered = keras_state.save(walked, values)
    for variable in model.variables:
        if id(variable) not in covered:
            raise Unshareable(
                f"variable {variable.path} is not among what its layer saves (`save_own_variables`): merge LoRA weights, or "
                "save it there"
            )
    config = _config_of(model)
    return put_together, (
        Blueprint(
            backend=keras.backend.backend(),
            config=config,
            custom=_custom_objects(config, layers),
            state=state,
            variables=_described(model),
            functions=[(place, one.function) for place, one in walked if isinstance(one, keras.layers.Lambda)],
        ),
    )


def _config_of(model: Any) -> Any:
    """As Keras has it, with arrays as they are and not as lists of numbers, and without what training needs."""
    def keep_arrays(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def serialize(obj: Any) -> Any:
            if isinstance(obj, dict) and obj.get("class_name") == _ARRAY:
                return obj  # Keras serializes what it has serialized
            if (isinstance(obj, np.ndarray) and obj.ndim) or keras.ops.is_tensor(obj):
                return {"class_name": _ARRAY, "config": {"value": obj}}
            return before(obj)

        return serialize

    with warnings.catch_warnings(), instead(serialization_lib, "serialize_keras_object", keep_arrays):
        warnings.simplefilter("ignore")  # lambdas are fine here: a skeleton may contain code
        try:
            config = keras.saving.serialize_keras_object(model)
        except Exception as error:
            raise Unshareable(f"Keras cannot describe it: {type(error).__name__}: {error}") from error
    return _without_training(config)


def _with_arrays_back(before: Callable[..., Any]) -> Callable[..., Any]:
    def deserialize(config: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(config, dict) and config.get("class_name") == _ARRAY:
            return config["config"]["value"]
        return before(config, *args, **kwargs)

    return deserialize


def _without_training(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_training(value) for key, value in config.items() if key != "compile_config"}
    if isinstance(config, (list, tuple)):
        return type(config)(map(_without_training, config))
    return config


def _custom_objects(config: Any, layers: list[Any]) -> dict[str, Any]:
    """What the config names and Keras alone would not find in another process, registered or not."""
    own = {object_registration.get_registered_name(type(layer)): type(layer) for layer in layers}
    found: dict[str, Any] = {}
    for named in _named(config):
        module, name = named.get("module"), named.get("registered_name")
        if named["class_name"] == "function":
            name = named["config"]
        if not name or not module or module == "builtins" or module.partition(".")[0] == "keras":
            continue
        simple = name.rpartition(">")[2]
        candidates = (
            own.get(name),
            keras.saving.get_registered_object(name),
            getattr(sys.modules.get(module), simple, None),
        )
        one = next((candidate for candidate in candidates if candidate is not None), None)
        if one is None:
            raise Unshareable(
                f"Keras could not find {module}.{simple} again: register it (keras.saving.register_keras_serializable), or "
                "define it at the top of its module"
            )
        found[name] = one
    for layer in layers:
        name = object_registration.get_registered_name(type(layer))
        if name in found and found[name] is not type(layer):
            raise Unshareable(f"two classes of layers are called {name}: register them under different names")
    return found


def _named(config: Any) -> Iterator[dict[str, Any]]:
    if isinstance(config, dict):
        if "class_name" in config and "registered_name" in config:
            yield config
        for value in config.values():
            yield from _named(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _named(value)


def _described(model: Any) -> list[tuple[str, tuple[int, ...], str, bool]]:
    # The number that Keras gives to a name which was not given one depends on what the process made before.
    return [
        (re.sub(r"_\d+$", "", v.name), tuple(v.shape), keras.backend.standardize_dtype(v.dtype), v.trainable)
        for v in model.variables
    ]


def _compare(model: Any, published: list[tuple[str, tuple[int, ...], str, bool]]) -> None:
    built = _described(model)
    for number, (mine, theirs) in enumerate(zip(built, published, strict=False)):
        if mine[:3] != theirs[:3]:
            raise ValueError(f"variable {number} is {theirs[:3]}, and Keras built {mine[:3]}")
        model.variables[number].trainable = theirs[3]
    if len(built) != len(published):
        raise ValueError(f"Keras built {len(built)} variables of {len(published)}")


def _backend(name: str) -> Any:
    return importlib.import_module(f"onecopy.frameworks.{name}_keras")

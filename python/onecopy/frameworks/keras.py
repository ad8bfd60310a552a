"""Keras 3 models and layers: published as their config and their variables, put together by Keras itself.

What belongs to a model's state is what Keras writes into a `.keras` file, addressed as it does there: by the attributes that lead
to a layer, never by the names that Keras makes up. While Keras builds the model anew, variables are zeros that no memory is spent
on; then each layer loads its own variables from the shared ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras.src.saving import object_registration, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable

from onecopy.frameworks import keras_attributes, keras_state
from onecopy.frameworks.instead import instead
from onecopy.skeleton.parts import Unshareable

if TYPE_CHECKING:
    from onecopy.frameworks import Leaf, Reducer
    from onecopy.skeleton.parts import Extents

_BACKENDS = ("tensorflow", "torch")
#: Layers around what Keras does not know the insides of.
_FOREIGN = ("TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer")
_AS_IT_IS = "onecopy.as_it_is"


@dataclass
class Blueprint:
    """A model without its variables' bytes."""

    settings: dict[str, Any]
    config: dict[str, Any]
    classes: dict[str, Any]  #: custom ones, as `custom_object_scope` has them
    state: list[keras_state.State]


@dataclass
class _Box:
    content: Any


class Taker:
    def __init__(self, extents: Extents, next_number: Callable[[], int]) -> None:
        pass

    def leaf(self, _cls: type) -> Leaf | None:
        return None

    def reducer(self, cls: type) -> Reducer | None:
        return _reduce if issubclass(cls, (keras.Layer, keras.Metric)) else None

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
    check_settings(blueprint.settings)
    values = adapter(blueprint.settings["backend"])
    with ExitStack() as stack:
        zeros = values.building(stack)
        stack.enter_context(instead(serialization_lib, "deserialize_keras_object", _with_boxes_opened))
        stack.enter_context(keras.saving.custom_object_scope(blueprint.classes))
        model = keras.saving.deserialize_keras_object(blueprint.config, safe_mode=False)
        places = dict(keras_state.walk(model))
        for state in blueprint.state:
            if state.place not in places:
                raise ValueError(f"Keras built a {type(model).__name__} without {state.place or 'itself'}")
            keras_state.load(places[state.place], state)
    for variable in model.variables:
        if zeros.has(values.address(variable)):
            raise ValueError(f"Keras built a variable that was not published: {variable.path}")
    return model


def _reduce(model: Any) -> Any:
    if keras.backend.backend() not in _BACKENDS:
        raise Unshareable(f"Keras runs on {keras.backend.backend()}: shared are models on {' and '.join(_BACKENDS)}")
    if isinstance(model, keras.Layer) and keras_attributes.suffice(type(model)):
        return keras_attributes.reduce(model)
    walked = list(keras_state.walk(model))
    for _, one in walked:
        if isinstance(one, keras.Layer):
            check_layer(one)
    state, covered = keras_state.save(walked, adapter(keras.backend.backend()))
    for variable in model.variables:
        if id(variable) not in covered:
            raise Unshareable(
                f"variable {variable.path} is not among what its layer saves (`save_own_variables`): merge LoRA weights, or "
                "save it there"
            )
    return put_together, (
        Blueprint(settings(), _config_of(model), _custom_classes({type(one) for _, one in walked}), state),
    )


def check_layer(layer: Any) -> None:
    """Raises Unshareable where there are weights that Keras does not know of."""
    if type(layer).__name__ in _FOREIGN:
        raise Unshareable(f"layer {layer.name!r} is a {type(layer).__name__}: share what is in it instead")
    if own := adapter(keras.backend.backend()).own_variables(layer):
        raise Unshareable(f"layer {layer.name!r} keeps weights that Keras does not know of in {own}: use add_weight")


def _config_of(model: Any) -> Any:
    """As Keras has it, without what training needs, and with arrays, functions and custom objects as they are.

    Keras would write an array as a list of numbers, and a function as its name.
    """

    def keep(before: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def serialize(obj: Any) -> Any:
            if isinstance(obj, dict) and obj.get("class_name") == _AS_IT_IS:
                return obj  # Keras serializes what it has serialized
            return _boxed(obj) if _is_kept(obj) else before(obj)

        return serialize

    def keep_function(_before: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda _layer, function: _boxed(function)

    with (
        instead(serialization_lib, "serialize_keras_object", keep),
        instead(keras.layers.Lambda, "_serialize_function_to_config", keep_function),
    ):
        try:
            config = keras.saving.serialize_keras_object(model)
        except Exception as error:
            said = " ".join(str(error).split())
            raise Unshareable(f"Keras cannot describe it: {type(error).__name__}: {said:.300}") from error
    return _without_training(config)


def _is_kept(obj: Any) -> bool:
    if isinstance(obj, np.ndarray):
        return obj.ndim > 0
    module = obj.__module__ if isinstance(obj, FunctionType) else type(obj).__module__
    if module.partition(".")[0] in ("keras", "builtins", "numpy") or isinstance(obj, KerasSaveable):
        return False
    return isinstance(obj, FunctionType) or hasattr(obj, "get_config") or bool(keras.ops.is_tensor(obj))


def _boxed(obj: Any) -> dict[str, Any]:
    # Twice: some of Keras's own `serialize` go on with "config" alone.
    return {"class_name": _AS_IT_IS, "config": {"class_name": _AS_IT_IS, "config": _Box(obj)}}


def _with_boxes_opened(before: Callable[..., Any]) -> Callable[..., Any]:
    def deserialize(config: Any, *args: Any, **kwargs: Any) -> Any:
        while isinstance(config, dict) and config.get("class_name") == _AS_IT_IS:
            config = config["config"]
        return config.content if isinstance(config, _Box) else before(config, *args, **kwargs)

    return deserialize


def _without_training(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_training(value) for key, value in config.items() if key != "compile_config"}
    if isinstance(config, (list, tuple)):
        return type(config)(map(_without_training, config))
    return config


def _custom_classes(classes: set[type]) -> dict[str, Any]:
    """Those that Keras alone would not find in another process, registered or not, by the name that the config has."""
    found: dict[str, Any] = {}
    for cls in classes:
        if cls.__module__.partition(".")[0] != "keras":
            name = object_registration.get_registered_name(cls)
            if found.setdefault(name, cls) is not cls:
                raise Unshareable(f"two classes are called {name}: register them under different names")
    return found


def settings() -> dict[str, Any]:
    """Of the process, that layers look at when they run."""
    return {
        "backend": keras.backend.backend(),
        "epsilon": keras.config.epsilon(),
        "floatx": keras.config.floatx(),
        "image_data_format": keras.config.image_data_format(),
    }


def check_settings(theirs: dict[str, Any]) -> None:
    """Raises RuntimeError where Keras would compute something else here."""
    different = [f"{name} {theirs[name]!r}, here {mine!r}" for name, mine in settings().items() if theirs[name] != mine]
    if different:
        raise RuntimeError(f"the model was published by a Keras with another configuration: {'; '.join(different)}")


def adapter(backend: str) -> Any:
    """What depends on it."""
    return importlib.import_module(f"onecopy.frameworks.{backend}_keras")

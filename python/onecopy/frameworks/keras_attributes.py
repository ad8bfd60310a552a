"""Custom layers and models that say nothing of how to make them again: by their attributes, as any object is pickled.

Keras's own `get_config` knows what a class of the user was constructed with only where that is numbers and words, and the class takes
Keras's arguments too. What such an object is made of is in its attributes, whenever and by whom they were set.
"""

# ruff: noqa: SLF001 (what a layer is made of has no public name)
from __future__ import annotations

import functools
from typing import Any

import keras

from onecopy.frameworks import keras_state

#: What Keras's own constructor sets, and is set anew: the rest of what it sets belongs to one object.
_KEPT = (
    "name", "built", "autocast", "activity_regularizer", "supports_jit", "_input_spec", "_called", "_supports_masking",
    "_convert_input_args", "_allow_non_tensor_positional_args", "_build_shapes_dict", "_jit_compile", "_run_eagerly",
)  # fmt: skip


def suffice(cls: type) -> bool:
    """Whether a class is the user's own, and has left its description to Keras."""
    inherited: Any = cls
    return (
        cls.__module__.partition(".")[0] != "keras"
        and getattr(inherited.get_config, "_is_default", False)
        and inherited.from_config.__func__ in (keras.Layer.from_config.__func__, keras.Model.from_config.__func__)
    )


def reduce(layer: Any) -> Any:
    from onecopy.frameworks.keras import check_layer, settings

    check_layer(layer)
    base = _set_by_keras(isinstance(layer, keras.Model))
    attributes = {
        name: _unwrapped(value)
        for name, value in _attributes(layer).items()
        if (name not in base or name in _KEPT) and name not in keras_state.OF_TRAINING and not name.startswith("_self_")
    }
    about = {
        "settings": settings(),
        "policy": keras.dtype_policies.serialize(layer.dtype_policy),
        "trainable": layer._trainable,
        "variables": _described(layer),
    }
    return new, (type(layer),), (about, attributes), None, None, fill


def new(cls: Any) -> Any:
    """Unpickles a layer that `fill` makes whole: it may refer to itself."""
    return cls.__new__(cls)


def fill(layer: Any, state: tuple[dict[str, Any], dict[str, Any]]) -> None:
    from onecopy.frameworks.keras import check_settings

    about, attributes = state
    check_settings(about["settings"])
    base: Any = keras.Model if isinstance(layer, keras.Model) else keras.Layer
    base.__init__(layer, name=attributes["name"], dtype=keras.dtype_policies.deserialize(about["policy"]))
    for name, value in attributes.items():
        if name == "built":
            continue
        if name in _KEPT:
            object.__setattr__(layer, name, value)
        else:
            setattr(layer, name, value)
    layer._trainable = about["trainable"]
    if _described(layer) != about["variables"]:
        raise ValueError(f"variables of {layer.name} are {about['variables']}, and came out as {_described(layer)}")
    if attributes["built"]:
        layer.built = True
        layer._post_build()
        layer._lock_state()


def _attributes(layer: Any) -> dict[str, Any]:
    # On torch a layer is a module, which keeps the layers in it apart.
    return {**vars(layer), **vars(layer).get("_modules", {})}


@functools.cache
def _set_by_keras(model: bool) -> frozenset[str]:  # noqa: FBT001
    made = keras.Model() if model else keras.Layer()
    return frozenset(vars(made)) | {"_torch_params", "torch_params"}


def _described(layer: Any) -> list[keras_state.Described]:
    return sorted(keras_state.describe(v) for v in (*layer._trainable_variables, *layer._non_trainable_variables))


def _unwrapped(value: Any) -> Any:
    """Without what Keras and TensorFlow put around lists and the like, which `setattr` puts around them again."""
    wrapped = type(value).__module__.partition(".")[0] in ("keras", "tensorflow", "wrapt")
    if isinstance(value, list) and (wrapped or type(value) is list):
        return [_unwrapped(one) for one in value]
    if isinstance(value, tuple) and (wrapped or type(value) is tuple):
        return tuple(_unwrapped(one) for one in value)
    if isinstance(value, dict) and (wrapped or type(value) is dict):
        return {key: _unwrapped(one) for key, one in value.items()}
    if isinstance(value, set) and (wrapped or type(value) is set):
        return {_unwrapped(one) for one in value}
    return value

"""A loaded SavedModel: its functions are exported anew without the variables' bytes, which are shared like others.

The export is a part of the skeleton. It is written to and read from TensorFlow's file system in memory, so what attaches depends
on no path, and nothing is written to disk.
"""

from __future__ import annotations

import posixpath
import uuid
import weakref
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.checkpoint.trackable_view import TrackableView
from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable
from tensorflow.python.saved_model import save as _save

from onecopy.skeleton.parts import Unshareable

if TYPE_CHECKING:
    from collections.abc import Iterator

_LOADED = "tensorflow.python.saved_model.load"
_FUNCTIONS = "tensorflow.python.eager.polymorphic_function"


def is_loaded(cls: type) -> bool:
    """Whether instances of a class are what `tf.saved_model.load` returned, or objects in it."""
    return cls.__module__ == _LOADED and cls.__name__ == "_UserObject"


def refusal(cls: type) -> str | None:
    """Why instances of a class cannot be shared, and what to share instead."""
    if issubclass(cls, tf.Module) and any(base.__module__.startswith("tf_keras.") for base in cls.__mro__):
        return "a Keras 2 model (tf_keras) carries its weights in its pickle: share a Keras 3 model, or a SavedModel"
    if cls.__name__ in ("ConcreteFunction", "_WrapperFunction", "RestoredFunction", "_SignatureMap"):
        module = cls.__module__
        if module.startswith((_FUNCTIONS, "tensorflow.python.saved_model")):
            return (
                "a graph function cannot be pickled by itself: share what tf.saved_model.load returned, and look the function "
                "or the signature up where it is used"
            )
    return None


def reduce_loaded(loaded: Any) -> Any:
    from onecopy.frameworks.tensorflow import memory_of

    with _folder() as folder:
        try:
            signatures = getattr(loaded, "signatures", None) or None
            _, paths = _save.save_and_return_nodes(
                loaded, folder, signatures=signatures, experimental_skip_checkpoint=True
            )
        except Exception as error:
            raise Unshareable(f"the SavedModel cannot be exported again: {type(error).__name__}: {error}") from error
        files = dict(_files(folder))
    exported = saved_model_pb2.SavedModel.FromString(files["saved_model.pb"].tobytes())
    for asset in exported.meta_graphs[0].asset_file_def:
        if f"assets/{asset.filename}" not in files:
            raise Unshareable(f"the SavedModel's file assets/{asset.filename} is gone from where it was loaded")
    values = {
        tuple(reference.name for reference in path): memory_of(node)
        for node, path in paths.items()
        if isinstance(node, BaseResourceVariable)
    }
    return load, (files, values)


def load(files: dict[str, Any], values: dict[tuple[str, ...], Any]) -> Any:
    """Unpickles a SavedModel."""
    kept: Any = None
    with _folder(keep_for=lambda: kept) as folder:
        for name, data in files.items():
            path = posixpath.join(folder, name)
            tf.io.gfile.makedirs(posixpath.dirname(path))
            with tf.io.gfile.GFile(path, "wb") as file:
                file.write(data.tobytes())
        loaded = tf.saved_model.load(folder, options=tf.saved_model.LoadOptions(experimental_skip_checkpoint=True))
        if any(name.startswith("assets/") for name in files):
            kept = loaded  # its functions may read them at any time
    left = {id(one): one for one in TrackableView(loaded).descendants() if isinstance(one, BaseResourceVariable)}
    for names, value in values.items():
        variable = loaded
        for name in names:
            variable = variable._lookup_dependency(name)  # noqa: SLF001 (children have no public names)
        if left.pop(id(variable), None) is None:
            raise ValueError(f"the SavedModel has no variable of its own at {'.'.join(names)}")
        if value.dtype != variable.dtype or not variable.shape.is_compatible_with(value.shape):
            raise ValueError(
                f"{'.'.join(names)} is a variable of {variable.dtype.name} {variable.shape}, and its value one of "
                f"{value.dtype.name} {value.shape}"
            )
        variable.assign(value)
    if left:
        raise ValueError(f"the SavedModel has variables without a value: {[one.name for one in left.values()]}")
    return loaded


@contextmanager
def _folder(keep_for: Any = lambda: None) -> Iterator[str]:
    """In memory. It goes with the object that `keep_for` returns, or at once."""
    folder = f"ram://onecopy-{uuid.uuid4().hex}"
    try:
        yield folder
    finally:
        if (owner := keep_for()) is None:
            _remove(folder)
        else:
            weakref.finalize(owner, _remove, folder).atexit = False


def _remove(folder: str) -> None:
    with suppress(tf.errors.NotFoundError):
        tf.io.gfile.rmtree(folder)


def _files(folder: str) -> Iterator[tuple[str, Any]]:
    for where, _, names in tf.io.gfile.walk(folder):
        for name in names:
            path = posixpath.join(where, name)
            with tf.io.gfile.GFile(path, "rb") as file:
                yield posixpath.relpath(path, folder), np.frombuffer(file.read(), np.uint8)

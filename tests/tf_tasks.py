"""Models of TensorFlow and Keras, and what the two processes that have these do with them: see `frameworks/conftest.py`."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import mmap
import pickle
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tasks import KEPT

import onecopy
from onecopy.frameworks import keras as adapter
from onecopy.frameworks import keras_state
from onecopy.skeleton import Unshareable, put_together, take_apart

DATA_START = 4096
MIB = 1 << 20
WIDE = 2048  # a layer of this width is 16 MiB


def numbers(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


# -- Models, and what is computed with them.


def double_tanh(x: Any) -> Any:
    return keras.ops.tanh(x) * 2


class Block(layers.Layer):
    """Layers in a list and in a dict, an array, a tensor, and nothing that says how to make it again."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = layers.Dense(width, activation="gelu")
        self.rest = [layers.Dense(width), layers.LayerNormalization()]
        self.named = {"last": layers.Dense(width)}
        self.table = np.arange(width, dtype=np.float32)
        self.shift = tf.constant(numbers(width))

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones", name="scale")
        super().build(shape)

    def call(self, x: Any) -> Any:
        h = self.first(x)
        for layer in self.rest:
            h = layer(h)
        return self.named["last"](h) * self.scale + self.table + self.shift


class Custom(keras.Model):
    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = blocks
        self.again = blocks[0]  # shared
        self.drop = layers.Dropout(0.3)
        self.seen = keras.metrics.Mean()
        self.labels = ["yes", "no"]

    def call(self, x: Any, training: bool = False) -> Any:  # noqa: FBT001, FBT002 (Keras calls it)
        for block in self.blocks:
            x = block(x)
        return self.drop(self.again(x), training=training)


class Described(layers.Layer):
    """As Keras wants custom layers to be."""

    def __init__(self, factor: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.factor = factor

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "factor": self.factor}

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.scale * self.factor


class Tied(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.words = layers.Embedding(500, 64)
        self.dense = layers.Dense(64)

    def call(self, ids: Any) -> Any:
        return keras.ops.matmul(self.dense(self.words(ids)), keras.ops.transpose(self.words.embeddings))


class Module(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = tf.Variable(numbers(256, 256), name="weight")
        self.biases = [tf.Variable(numbers(256), trainable=False), tf.constant(numbers(256))]
        self.again = {"weight": self.weight}

    @tf.function(input_signature=[tf.TensorSpec([None, 256])])
    def __call__(self, x: Any) -> Any:
        return x @ self.again["weight"] + self.biases[0] + self.biases[1]


class WithVocabulary(Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        path = Path(folder, "vocabulary.txt")
        path.write_text("one\ncopy\n")
        words = tf.lookup.TextFileInitializer(
            str(path), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        self.numbers = tf.lookup.StaticHashTable(words, -1)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def find(self, words: Any) -> Any:
        return self.numbers.lookup(words)


class Values:
    """Variables and tensors in an object of anybody's."""

    def __init__(self) -> None:
        self.keras = keras.Variable(numbers(64, 64))
        self.variable = tf.Variable(numbers(64, 64), trainable=False, name="mine")
        self.same = self.variable
        self.tensors = [
            tf.constant(numbers(8, 8)), tf.cast(numbers(64), tf.bfloat16), tf.Variable(tf.cast(numbers(64), tf.float16)),
            tf.constant([True, False]), tf.constant(["one", "copy"]), tf.cast(numbers(16), "float8_e5m2"), tf.zeros([0, 3]),
            tf.constant(1.5), tf.bitcast(tf.constant([1, -2], tf.int8), tf.qint8), tf.constant([1 + 2j]), tf.cast([1, 2], "int4"),
            tf.ragged.constant([[1, 2], [3]]), tf.sparse.from_dense(np.eye(3)), tf.constant(2**40, tf.uint64),
        ]  # fmt: skip

    def all(self) -> list[Any]:
        parts = [tf.nest.flatten(one, expand_composites=True) for one in self.tensors]
        kinds = [type(one).__name__ for one in self.tensors] + [one.dtype.name for one in self.tensors]
        about = [self.same is self.variable, self.variable.trainable, self.variable.name]
        return [self.keras, self.variable, *chain(*parts), np.array(kinds), np.array(about)]


def functional() -> Any:
    """A shared layer, dropout, batch normalization; trained, so that nothing is as an initializer makes it."""
    inputs = keras.Input((64,))
    shared = layers.Dense(64, activation=double_tanh)
    h = layers.BatchNormalization()(layers.Dropout(0.5)(shared(inputs)))
    model = keras.Model(inputs, layers.Dense(3)(Described(2.0)(shared(h))))
    model.compile("adam", "mse")
    model.fit(numbers(32, 64), numbers(32, 3), verbose=0)
    model.layers[1].trainable = False
    return model


def sequential() -> Any:
    by = numbers(1)
    lambda_layer = layers.Lambda(lambda x: x * by)
    rows = keras.initializers.Constant(numbers(500, 64))
    return keras.Sequential(
        [keras.Input((7,)), layers.Embedding(500, 64, rows), lambda_layer, layers.Flatten(), layers.Dense(2)]
    )


def custom() -> Any:
    model = Custom([Block(32), Block(32)])
    model(numbers(2, 32))
    model.seen.update_state(3.0)
    model.blocks[1].trainable = False
    model.labels = ["other"]
    return model


def tied() -> Any:
    model = Tied()
    model(np.arange(4))
    return model


def transformer() -> Any:
    inputs = keras.Input((16,), dtype="int32")
    x = layers.Embedding(500, 64)(inputs) + layers.Embedding(16, 64)(keras.ops.arange(16))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 16, dropout=0.1)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(64)(layers.Dense(128, "gelu")(x)))
    return keras.Model(inputs, layers.Dense(5)(layers.GlobalAveragePooling1D()(x)))


def recurrent() -> Any:
    both = layers.Bidirectional(layers.LSTM(32, return_sequences=True, dropout=0.2))
    return keras.Sequential([keras.Input((7, 8)), both, layers.GRU(16), layers.Dense(2)])


def mixed() -> Any:
    half = {"dtype": "mixed_float16"}
    first, norm = layers.Dense(64, "relu", **half), layers.BatchNormalization(**half)
    return keras.Sequential([keras.Input((64,)), first, norm, layers.Dense(4, dtype="bfloat16")])


def int8() -> Any:
    model = keras.Sequential([layers.Dense(64, "relu"), layers.Dense(4)])
    model(numbers(2, 64))
    model.quantize("int8")
    return model


def preprocessing() -> Any:
    """Vocabularies and means that were learned."""
    words = layers.TextVectorization(max_tokens=50, output_sequence_length=8)
    words.adapt(["one copy of the model", "per machine"])
    scale = layers.Normalization()
    scale.adapt(5 + numbers(100, 8))
    text = keras.Sequential([keras.Input((), dtype="string"), words, layers.Embedding(50, 8), layers.Flatten()])
    return {"text": text, "scale": scale}


def mobilenet() -> Any:
    return keras.applications.MobileNetV2(weights=None, input_shape=(96, 96, 3), classes=10)


def saved(folder: str) -> Any:
    path = str(Path(folder, "saved"))
    tf.saved_model.save(WithVocabulary(folder), path)
    return tf.saved_model.load(path)


def exported(folder: str) -> Any:
    path = str(Path(folder, "exported"))
    mixed().export(path, verbose=False)
    return tf.saved_model.load(path)


def _twice(model: Any, x: Any) -> list[Any]:
    """Inference, and training's answer, which the seed generators have a part in."""
    return [model(x), model(x, training=True), model.predict(x, verbose=0)]


def _of_custom(model: Any) -> list[Any]:
    same = [model.again is model.blocks[0], model.seen.result(), model.labels, [v.trainable for v in model.variables]]
    return [*_twice(model, numbers(2, 32)), *map(np.array, same)]


def _of_saved(model: Any) -> list[Any]:
    answer = model.signatures["serving_default"](numbers(2, 256)) if "serving_default" in model.signatures else {}
    return [model(tf.constant(numbers(2, 256))), model.find(tf.constant(["copy", "two"])), *answer.values()]


IDS = np.arange(32).reshape(2, 16)
#: By name: makes a model, computes with it. Who wants a folder gets one.
MODELS: dict[str, tuple[Callable[..., Any], Callable[[Any], list[Any]]]] = {
    "functional": (functional, lambda m: [*_twice(m, numbers(2, 64)), np.array([v.trainable for v in m.variables])]),
    "sequential": (sequential, lambda m: [m(np.arange(14).reshape(2, 7))]),
    "custom": (custom, _of_custom),
    "tied": (tied, lambda m: [m(np.arange(6))]),
    "transformer": (transformer, lambda m: _twice(m, IDS)),
    "recurrent": (recurrent, lambda m: _twice(m, numbers(2, 7, 8))),
    "mixed": (mixed, lambda m: _twice(m, numbers(2, 64))),
    "int8": (int8, lambda m: [m(numbers(2, 64))]),
    "preprocessing": (preprocessing, lambda m: [m["text"](tf.constant(["one model", "x"])), m["scale"](numbers(3, 8))]),
    "mobilenet": (mobilenet, lambda m: [m(numbers(1, 96, 96, 3))]),
    "layer": (lambda: mixed().layers[0], lambda m: [m(numbers(2, 64))]),
    "module": (Module, lambda m: [m(tf.constant(numbers(2, 256))), np.array([m.again["weight"] is m.weight])]),
    "values": (Values, Values.all),
    "saved": (saved, _of_saved),
    "exported": (exported, lambda m: [m.serve(tf.constant(numbers(2, 64)))]),
}


def fingerprint(values: list[Any]) -> list[tuple[str, tuple[int, ...], str]]:
    arrays = [np.asarray(value) for value in values]
    datas = [repr(one.tolist()).encode() if one.dtype == object else one.tobytes() for one in arrays]
    return [
        (one.dtype.str, one.shape, hashlib.sha256(data).hexdigest()[:12])
        for one, data in zip(arrays, datas, strict=True)
    ]


# -- Without a store: any model, however small.


def take_apart_into(folder: str, name: str) -> tuple[list[Any], int]:
    """What it computes afterwards, and the size of its skeleton."""
    make, use = MODELS[name]
    keras.utils.set_random_seed(3)
    model = make(folder) if name in ("saved", "exported") else make()
    parts = take_apart(model, least_shared=0)
    with Path(folder, "data").open("wb") as file:
        for buffer in parts.buffers:
            file.seek(DATA_START + buffer.offset)
            file.write(memoryview(buffer.source))  # type: ignore[arg-type]
        file.truncate(DATA_START + parts.data_bytes)
    Path(folder, "skeleton").write_bytes(parts.skeleton)
    for path in ("saved", "exported"):  # what attaches must not depend on it
        shutil.rmtree(Path(folder, path), ignore_errors=True)
    return fingerprint(use(model)), len(parts.skeleton)


def put_together_from(folder: str, name: str) -> list[Any]:
    return fingerprint(MODELS[name][1](_put_together(folder)))


def _put_together(folder: str, change: Callable[[bytes], bytes] = bytes, shift: int = 0) -> Any:
    with Path(folder, "data").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return put_together(change(Path(folder, "skeleton").read_bytes()), mapping, DATA_START + shift)


def frameworks_of_an_array() -> list[str]:
    """Which adapters an object without tensors needs."""
    skeleton = take_apart(np.ones(MIB)).skeleton
    (length,) = struct.unpack_from("<Q", skeleton, 8)
    return sorted(pickle.loads(skeleton[32 : 32 + length])[1])


def hostile(folder: str) -> list[str]:
    """Errors of tables that lie about "values", and of blueprints that do: TensorFlow would abort the process."""
    said = []

    def forge(number: int, value: Any) -> Callable[[bytes], bytes]:
        def change(skeleton: bytes) -> bytes:
            table, named, contained = struct.unpack_from("<QQQ", skeleton, 8)
            data_bytes, columns, *rest = pickle.loads(skeleton[32 : 32 + table])
            lies = list(columns["tensorflow"])
            lies[number] = [value, *lies[number][1:]]
            forged = pickle.dumps((data_bytes, {**columns, "tensorflow": tuple(lies)}, *rest), protocol=5)
            return b"1CSK" + struct.pack("<IQQQ", 1, len(forged), named, contained) + forged + skeleton[32 + table :]

        return change

    lies = [
        forge(3, 4), forge(3, 1 << 40), forge(3, -(1 << 20)), forge(1, (2**62,)), forge(1, (1 << 30,)), forge(1, (-1, 4)),
        forge(2, "string"), forge(2, "no such type"), forge(2, "float8_e5m2"),
    ]  # fmt: skip
    for change in lies:
        said.append(_error(lambda change=change: _put_together(folder, change)))
    said.append(_error(lambda: _put_together(folder, shift=8)))
    return said


def hostile_blueprints() -> list[str]:
    def without(key: str) -> Callable[[Any], None]:
        return lambda blueprint: _state(blueprint, "Dense").own.pop(key)

    def other(key: str, value: Any) -> Callable[[Any], None]:
        return lambda blueprint: _state(blueprint, "Dense").own.update({key: value})

    changes: list[Callable[[Any], None]] = [
        without("0"),
        other("0", tf.zeros([3, 3])),
        other("2", tf.zeros([3])),
        lambda blueprint: _state(blueprint, "Dense").seeds.append(tf.zeros([2], tf.uint32)),
        lambda blueprint: setattr(_state(blueprint, "Dense"), "place", ".layers[77]"),
        lambda blueprint: setattr(_state(blueprint, "Dense"), "cls", "keras.src.layers.Other"),
        lambda blueprint: setattr(_state(blueprint, "Dense"), "policy", "float16"),
        lambda blueprint: blueprint.state.remove(_state(blueprint, "Dense")),
        lambda blueprint: blueprint.config["config"]["layers"].pop(),
        lambda blueprint: blueprint.config["config"]["layers"][1]["config"].update(units=9),
        lambda blueprint: blueprint.settings.update(epsilon=0.5),
        lambda blueprint: blueprint.settings.update(backend="jax"),
        lambda blueprint: blueprint.classes.clear(),
    ]
    said = []
    model = functional()
    for change in changes:
        function, (blueprint,) = adapter.Taker(None, None).reducer(keras.Model)(model)  # type: ignore[arg-type, misc]
        for state in blueprint.state:
            state.own = {key: _read(value) for key, value in state.own.items()}
            state.seeds = [_read(value) for value in state.seeds]
        change(blueprint)
        said.append(_error(lambda function=function, blueprint=blueprint: function(blueprint)))
    return said


def _state(blueprint: Any, cls: str) -> keras_state.State:
    return next(state for state in blueprint.state if state.cls.endswith(f".{cls}"))


def _read(value: Any) -> Any:
    return value.variable.read_value() if hasattr(value, "variable") else value


def _error(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# -- What cannot be shared.


class OwnWeights(layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.mine = [tf.Variable(numbers(4, 4))]

    def call(self, x: Any) -> Any:
        return x @ self.mine[0]


def lora() -> Any:
    model = keras.Sequential([keras.Input((64,)), layers.Dense(64)])
    model.layers[0].enable_lora(4)
    return model


def undescribed() -> Any:
    return keras.Sequential([keras.Input((4,)), type("Local", (Described,), {"get_config": _no_config})(2.0)])


def _no_config(_layer: Any) -> dict[str, Any]:
    raise NotImplementedError("no config")


def namesakes() -> Any:
    first, second = (type("Same", (Described,), {})(2.0) for _ in range(2))
    return keras.Sequential([keras.Input((4,)), first, second])


def keras_2() -> Any:
    return type("Model", (tf.Module,), {"__module__": "tf_keras.src.engine.training"})()


def aliased() -> Any:
    array = np.zeros(1 << 10, np.uint8)
    start = -array.ctypes.data % 64
    base = array[start + 16 : start + 512]
    return [base, tf.experimental.dlpack.from_dlpack(base[48:112].__dlpack__())]


def distributed() -> Any:
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        return tf.Variable(1.0)


def without_assets() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return saved(folder)


UNSHAREABLE: dict[str, Callable[[], Any]] = {
    "own weights": lambda: keras.Sequential([OwnWeights()]),
    "lora": lora,
    "undescribed": undescribed,
    "namesakes": namesakes,
    "keras 2": keras_2,
    "function": lambda: (module := Module(), module.__call__.get_concrete_function())[1],
    "aliased": aliased,
    "distributed": distributed,
    "without assets": without_assets,
}


def refusals() -> dict[str, str]:
    said = {}
    for name, make in UNSHAREABLE.items():
        try:
            take_apart({"model": make()}, least_shared=0)
        except Unshareable as error:
            said[name] = error.reason
    return said


# -- Through a store.


def large() -> Any:
    """64 MiB, and a layer that is there twice."""
    inputs = keras.Input((WIDE,))
    first, second, third = (layers.Dense(WIDE, "relu") for _ in range(3))
    return keras.Model(inputs, layers.Dense(WIDE)(third(second(first(first(inputs))))))


def publish(namespace: str, tag: str) -> tuple[list[Any], int, bool]:
    """What it computes, the bytes that are its own, and whether the object that was published looks at the segment, too."""
    model = large()
    x = numbers(2, WIDE)
    before = fingerprint([model(x)])
    lease = KEPT[tag] = onecopy.Store(namespace).publish(tag, model)
    KEPT["own"] = model
    assert fingerprint([model(x)]) == fingerprint([lease.object(x)]) == before
    moved = all(in_segment(variable.value.read_value()) for variable in (*model.variables, *lease.object.variables))
    return before, lease.info.private_bytes, moved


def attach(namespace: str, tag: str) -> tuple[list[Any], int, int]:
    """What it computes, and the private memory for it: attached, and after an inference."""
    large()(numbers(2, WIDE))  # TensorFlow's own threads and pools
    gc.collect()
    before = anonymous()
    lease = KEPT[tag] = onecopy.Store(namespace).attach(tag)
    attached = anonymous() - before
    answer = fingerprint([lease.object(numbers(2, WIDE))])
    return answer, attached, anonymous() - before


def computed(tag: str) -> list[Any]:
    return fingerprint([KEPT[tag].object(numbers(2, WIDE))])


def assign_add(tag: str) -> bool:
    """Whether the variable looks at other memory afterwards."""
    kernel = KEPT[tag].object.variables[0].value
    kernel.assign_add(tf.ones_like(kernel))
    kernel.scatter_nd_update([[0, 0]], [5.0])
    return not in_segment(kernel.read_value())


def keep_a_tensor(tag: str) -> None:
    """And nothing else of the model."""
    lease = KEPT.pop(tag)
    KEPT["tensor"] = lease.object.variables[2].value.read_value()
    KEPT["gone"] = weakref.ref(lease.object)
    lease.release()
    del lease
    gc.collect()
    assert KEPT["gone"]() is None


def drop_the_tensor() -> float:
    total = float(tf.reduce_sum(KEPT.pop("tensor")))
    gc.collect()
    return total


def acquire_elsewhere(namespace: str, tag: str) -> tuple[str, str]:
    """In a process whose Keras computes with another epsilon."""
    keras.config.set_epsilon(1e-3)
    try:
        holder = onecopy.Holder(lambda: keras.Sequential([layers.Dense(3)]), tag, store=onecopy.Store(namespace))
        with holder:
            assert holder.info is not None
            return holder.info.role, holder.info.reason
    finally:
        keras.config.set_epsilon(1e-7)


def in_segment(tensor: Any) -> bool:
    place = np.asarray(tensor).__array_interface__["data"][0]
    with Path("/proc/self/maps").open() as lines:
        for line in lines:
            start, end = (int(one, 16) for one in line.split()[0].split("-"))
            if start <= place < end:
                return "onecopy" in line
    return False


def anonymous() -> int:
    ctypes.CDLL(None).malloc_trim(0)
    with Path("/proc/self/status").open() as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

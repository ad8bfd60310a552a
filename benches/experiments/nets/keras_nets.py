"""Image classifiers of keras.applications that take 224 pixels, with seeded weights: Beam's TFModelHandlerTensor."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from apache_beam.ml.inference.tensorflow_inference import TFModelHandlerTensor

SIDE = 224


class Model:
    inference_args = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.file = "weights.keras"

    def prepare(self, folder: Path) -> None:
        keras.utils.set_random_seed(0)
        getattr(keras.applications, self.name)(weights=None).save(folder / self.file)

    def handler(self, folder: str, *, large_model: bool) -> TFModelHandlerTensor:
        return TFModelHandlerTensor(f"{folder}/{self.file}", large_model=large_model)

    def examples(self, count: int) -> list[tf.Tensor]:
        images = np.random.default_rng(0).random((max(16, count), SIDE, SIDE, 3), np.float32)
        return [tf.constant(image) for image in images]


def find(name: str) -> Model:
    return Model(name)

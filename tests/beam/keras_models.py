"""Keras models that the tests here make in SDK workers. Run as a script, it saves one: `keras_models.py FOLDER`."""

import os
import sys
from pathlib import Path

import keras

WIDTH = 512  # a layer of this width is 1 MiB


class Residual(keras.Model):
    """A class of the user's that says nothing of how to make it again, as most that only load weights."""

    def __init__(self, width, depth):
        super().__init__()
        self.steps = [keras.layers.Dense(width, activation="gelu") for _ in range(depth)]
        self.norm = keras.layers.BatchNormalization()

    def call(self, x):
        for step in self.steps:
            x = x + step(x)
        return self.norm(x)


def count(room, what):
    with Path(room, what).open("a") as file:
        file.write(f"{os.getpid()}\n")


def residual(room="", what="loads"):
    """Counts its constructions in `room`: a line per process."""
    if room:
        count(room, what)
    model = Residual(WIDTH, 4)
    model(keras.ops.zeros((1, WIDTH)))  # makes the variables
    return model


def residual_without_sharing(room):
    return residual(room, "loads without sharing")


def save(folder):
    keras.utils.set_random_seed(0)
    residual().save_weights(Path(folder, "residual.weights.h5"))
    functional = keras.Sequential(
        [keras.Input((WIDTH,)), keras.layers.Dense(2 * WIDTH, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(3)]
    )
    functional.save(Path(folder, "functional.keras"))


if __name__ == "__main__":
    save(sys.argv[1])

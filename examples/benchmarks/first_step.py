"""How long it takes until the first step of `fit` is done, traced once and traced twice.

    python examples/benchmarks/first_step.py

TensorFlow traces a step a second time if variables were made in the first trace. keras_optkit has them made in a
rehearsal, without gradients and updates. A multilayer perceptron, a convolutional network and a transformer, each with
two metrics and Keras's Adam, are made and fitted to one batch in turns with and without that; given are the medians,
and that of the ratio of neighbours.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_optkit as ok


class AsKeras(keras.Model):
    """A functional model whose step is made by Keras alone."""

    make_train_function = keras.Model.make_train_function.__wrapped__


def perceptron() -> tuple[Any, Any]:
    """Two hidden layers."""
    x = given = keras.Input((64,))
    for _ in range(2):
        x = layers.Dropout(0.1)(layers.Dense(128, activation="relu")(x))
    return given, layers.Dense(10, activation="softmax")(x)


def convolutional() -> tuple[Any, Any]:
    """Six convolutions with batch normalization."""
    x = given = keras.Input((28, 28, 1))
    for filters in (8, 8, 16, 16, 32, 32):
        x = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3, padding="same")(x)))
    return given, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def transformer() -> tuple[Any, Any]:
    """Two blocks of attention."""
    x = given = keras.Input((16, 32))
    for _ in range(2):
        x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 16)(x, x))
        x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x)))
    return given, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling1D()(x))


def seconds(kind: type[keras.Model], make: Any) -> float:
    """Until a `fit` of one batch has ended."""
    model = kind(*make())
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy", "sparse_categorical_crossentropy"])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, *model.input_shape[1:])).astype("float32"), rng.integers(0, 10, 32)
    start = time.perf_counter()
    model.fit(x, y, verbose=0)
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    print(f"keras_optkit {ok.__version__}, Keras {keras.__version__}; median of {rounds} rounds")
    for make in (perceptron, convolutional, transformer):
        seconds(keras.Model, make)
        pairs = [(seconds(AsKeras, make), seconds(keras.Model, make)) for _ in range(rounds)]
        twice, once = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"{make.__name__}: {twice:.2f} s as Keras, {once:.2f} s traced once, ratio {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Three small tasks on real data, for benchmarks that train: images, text and a table. Nothing is downloaded."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

sys.path.append(str(Path(__file__).parents[1]))
from fashion_mnist import load

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
CONTEXT = 48
WIDTH = 48


class Data(NamedTuple):
    """Rows to train with and rows to validate with."""

    x: Any
    y: Any
    x_val: Any
    y_val: Any


@dataclass(frozen=True)
class Task:
    """What to train, on which data, and how far.

    Attributes:
        load: Returns the data.
        build: Returns the model, uncompiled.
        loss: For `compile`; it is also that of validation.
        batch_size: Of training.
        steps: The most updates of a run.
        every: After how many updates the loss of validation is measured.
        target: The loss of validation to reach.
    """

    load: Callable[[], Data]
    build: Callable[[], keras.Model]
    loss: Any
    batch_size: int
    steps: int
    every: int
    target: float

    def batches(self, data: Data, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches without end; each pass is in another order."""
        generator = np.random.default_rng(seed)
        while True:
            order = generator.permutation(len(data.y))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                of_batch = order[start : start + self.batch_size]
                yield data.x[of_batch], data.y[of_batch]


def images() -> Data:
    """Fashion-MNIST: 58,000 images to train with, 2,000 to validate with, of its training set."""
    x, y = load(FASHION_MNIST, "train")
    order = np.random.default_rng(0).permutation(len(y))
    x, y = (x[order] - 0.286) / 0.353, y[order]  # mean 0 and standard deviation 1
    return Data(x[2000:], y[2000:], x[:2000], y[:2000])


def convolutions() -> keras.Model:
    """Three strided convolutions: 23,946 parameters."""
    layers = keras.layers
    convolutions = [layers.Conv2D(n, 3, strides=2, padding="same", activation="relu") for n in (16, 32, 64)]
    return keras.Sequential(
        [keras.Input((28, 28, 1)), *convolutions, layers.GlobalAveragePooling2D(), layers.Dense(10)]
    )


def text() -> Data:
    """The modules of Python's standard library as characters: 1,000,000 to train with, 32,000 to validate with.

    Comments and code of the running interpreter, in the order of names; other characters than those of ASCII are
    dropped, so that there are 97.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    content = "".join(file.read_text(encoding="utf-8") for file in files)
    content = re.sub(r"[^\n\t\x20-\x7e]", "", content)
    codes = np.array([0 if c == "\n" else 1 if c == "\t" else ord(c) - 30 for c in content[:1_032_000]], "int32")
    windows = np.lib.stride_tricks.sliding_window_view
    seen, unseen = codes[:1_000_000], codes[1_000_000:]
    x, x_val = windows(seen[:-1], CONTEXT), windows(unseen[:-1], CONTEXT)[::CONTEXT]
    return Data(x, windows(seen[1:], CONTEXT), x_val, windows(unseen[1:], CONTEXT)[::CONTEXT])


class Positions(keras.layers.Layer):
    """Adds a trained vector for each position."""

    def build(self, shape: Any) -> None:  # noqa: D102
        self.table = self.add_weight(shape=tuple(shape[1:]), initializer="uniform", name="table")

    def call(self, x: Any) -> Any:  # noqa: D102
        return x + self.table


def transformer() -> keras.Model:
    """A causal transformer of two blocks."""
    layers = keras.layers
    tokens = keras.Input((CONTEXT,), dtype="int32")
    x = Positions()(layers.Embedding(97, WIDTH)(tokens))
    for _ in range(2):
        h = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(3, WIDTH // 3)(h, h, use_causal_mask=True)
        h = layers.Dense(2 * WIDTH, activation="gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(WIDTH)(h)
    return keras.Model(tokens, layers.Dense(97)(layers.LayerNormalization()(x)))


def table() -> Data:
    """Plotnine's diamonds: the logarithm of the price from nine columns; 48,940 rows and 5,000 to validate with."""
    try:
        from plotnine.data import diamonds
    except ImportError as error:
        raise ImportError("This task takes its table from plotnine: pip install plotnine.") from error
    columns = [diamonds[name].to_numpy("float64") for name in ("carat", "depth", "table", "x", "y", "z")]
    columns += [diamonds[name].cat.codes.to_numpy("float64") for name in ("cut", "color", "clarity")]
    columns.append(np.log(diamonds["price"].to_numpy("float64")))
    rows = np.stack(columns, axis=1)
    rows = np.random.default_rng(0).permutation((rows - rows.mean(axis=0)) / rows.std(axis=0)).astype("float32")
    x, y = rows[:, :-1], rows[:, -1:]
    return Data(x[5000:], y[5000:], x[:5000], y[:5000])


def perceptron() -> keras.Model:
    """Three hidden layers of 64: 9,025 parameters."""
    hidden = [keras.layers.Dense(64, activation="gelu") for _ in range(3)]
    return keras.Sequential([keras.Input((9,)), *hidden, keras.layers.Dense(1)])


def crossentropy() -> keras.losses.Loss:
    """That of logits and class numbers."""
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


TASKS = {
    "images": Task(images, convolutions, crossentropy(), batch_size=64, steps=400, every=20, target=0.60),
    "text": Task(text, transformer, crossentropy(), batch_size=16, steps=400, every=20, target=2.1),
    "table": Task(table, perceptron, "mse", batch_size=128, steps=600, every=20, target=0.015),
}

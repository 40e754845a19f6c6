"""Train with a loop of your own: `tf.GradientTape` and `optimizer.apply_gradients`, without `model.fit`.

Runs the same loop eagerly, as a `tf.function`, and as a `tf.function` compiled by XLA, from the same weights and on the
same batches, and shows that the three agree.

    python examples/custom_loop.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf
from five_layer_cnn import DIGITS, Data, Row, build, digits, positive
from rich.console import Console
from rich.table import Table

Step = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

LOSS = keras.losses.CategoricalCrossentropy(from_logits=True)


def train(data: Data, epochs: int, compiled: Callable[[Step], Step]) -> tuple[np.ndarray, float]:
    """Trains a fresh network; `compiled` wraps the step. Returns the loss of every step and the test accuracy."""
    keras.utils.set_random_seed(0)
    (x, y), batch = data.train, DIGITS.batch_size
    model = build(DIGITS, Row.OPTIMIZER, steps=0)
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)  # a tf.function may create variables in its first call only

    @compiled
    def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = LOSS(labels, model(images, training=True))
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        return loss

    losses = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(x))
        for start in range(0, len(x) - batch + 1, batch):
            rows = order[start : start + batch]
            losses.append(step(tf.constant(x[rows]), tf.constant(y[rows])))
    predicted = np.argmax(model.predict(data.test[0], verbose=0), axis=-1)
    return np.array(losses), float(np.mean(predicted == np.argmax(data.test[1], axis=-1)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A GradientTape loop, eager and compiled.")
    parser.add_argument("--epochs", type=positive, default=5)
    arguments = parser.parse_args(argv)

    data = digits(seed=0)
    ways: dict[str, Callable[[Step], Step]] = {
        "eager": lambda step: step,
        "tf.function": tf.function,
        "tf.function, XLA": tf.function(jit_compile=True),
    }
    table = Table(title="One loop, three ways")
    for heading in ("step", "test accuracy", "loss, first step", "loss, last epoch", "largest difference", "seconds"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    eager = None
    for name, compiled in ways.items():
        start = time.perf_counter()
        losses, accuracy = train(data, arguments.epochs, compiled)
        seconds = time.perf_counter() - start
        eager = losses if eager is None else eager
        last = losses[-len(losses) // arguments.epochs :].mean()
        # the first epoch only: float32 rounding differs between the ways, and training magnifies it
        difference = np.abs(losses - eager)[: len(losses) // arguments.epochs].max()
        table.add_row(name, f"{accuracy:.2%}", f"{losses[0]:.6f}", f"{last:.4f}", f"{difference:.1e}", f"{seconds:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()

"""What `search.py` trains: a small network for handwritten digits, whose numbers are variables.

Tracing a training step takes longer than the step's 27 epochs. So there is one model for each shape of the network, and
all other hyperparameters are variables: trials reuse it with new weights and a new state of the optimizer. An epoch is
one compiled function.
"""

from __future__ import annotations

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import keras_optkit as ok

ROWS = 300
UNSEEN = 1000


def variable(value: float = 0.0) -> keras.Variable:
    """A number that trials set."""
    return keras.Variable(value, trainable=False, dtype="float32")


class Noise(keras.layers.Layer):
    """Adds Gaussian noise in training, with a standard deviation that is a variable."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = self.add_weight(shape=(), initializer="zeros", trainable=False)
        self.random = keras.random.SeedGenerator(0)

    def call(self, x: Any, training: bool = False) -> Any:  # noqa: D102
        if not training:
            return x
        return x + self.amount * keras.random.normal(keras.ops.shape(x), seed=self.random)


class Dropout(Noise):
    """Keras's Dropout, with a rate that is a variable."""

    def call(self, x: Any, training: bool = False) -> Any:  # noqa: D102
        if not training:
            return x
        kept = keras.random.uniform(keras.ops.shape(x), seed=self.random) >= self.amount
        return keras.ops.where(kept, x / (1.0 - self.amount), 0.0)


class Network:
    """A model of one shape, its optimizer, and one epoch as a compiled function."""

    def __init__(self, filters: int, activation: str) -> None:
        self.noise, self.dropout = Noise(), Dropout()
        self.model = keras.Sequential(
            [
                keras.Input((8, 8, 1)),
                self.noise,
                keras.layers.Conv2D(filters, 3, padding="same", activation=activation),
                keras.layers.Conv2D(2 * filters, 3, strides=2, padding="same", activation=activation),
                keras.layers.Flatten(),
                self.dropout,
                keras.layers.Dense(10),
            ]
        )
        self.weight_decay, self.beta_1, self.smoothing = variable(), variable(0.9), variable()
        self.optimizer = ok.optimizers.AdamW(1e-3, weight_decay=self.weight_decay, beta_1=self.beta_1)
        self.optimizer.build(self.model.trainable_variables)
        self.initial = [keras.ops.convert_to_numpy(v) for v in self.optimizer.variables]
        self.epoch = tf.function(self._epoch, reduce_retracing=True)
        self.evaluate = tf.function(self._evaluate)

    def reset(self, point: dict[str, Any], seed: int) -> None:
        """New weights, a new optimizer state and the numbers of a point."""
        for value, initial in zip(self.optimizer.variables, self.initial, strict=True):
            value.assign(initial)
        for place, weight in enumerate(self.model.trainable_variables):
            kernel = keras.initializers.GlorotUniform(seed=1000 * seed + place)
            weight.assign(kernel(weight.shape) if len(weight.shape) > 1 else keras.ops.zeros(weight.shape))
        for place, layer in enumerate((self.noise, self.dropout)):
            layer.random.state.assign(np.array([seed, place], "uint32"))
        self.noise.amount.assign(point["noise"])
        self.dropout.amount.assign(point["dropout"])
        self.weight_decay.assign(point["weight_decay"])
        self.beta_1.assign(point["beta_1"])
        self.smoothing.assign(point["label_smoothing"])

    def _epoch(self, x: tf.Tensor, y: tf.Tensor, order: tf.Tensor, batch_size: tf.Tensor) -> None:
        for start in tf.range(0, tf.shape(order)[0], batch_size):
            rows = order[start : start + batch_size]
            labels = tf.gather(y, rows) * (1.0 - self.smoothing) + self.smoothing / 10
            with tf.GradientTape() as tape:
                logits = self.model(tf.gather(x, rows), training=True)
                loss = tf.reduce_mean(keras.losses.categorical_crossentropy(labels, logits, from_logits=True))
            weights = self.model.trainable_variables
            self.optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)

    def _evaluate(self, x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        logits = self.model(x, training=False)
        right = tf.equal(tf.argmax(logits, 1), tf.argmax(y, 1))
        loss = keras.losses.categorical_crossentropy(y, logits, from_logits=True)
        return tf.reduce_mean(tf.cast(right, "float32")), tf.reduce_mean(loss)


class Trainer:
    """Trains points on the digits."""

    def __init__(self) -> None:
        if keras.config.backend() != "tensorflow":
            raise RuntimeError(f"KERAS_BACKEND must be tensorflow to record curves, got {keras.config.backend()}.")
        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))[: ROWS + UNSEEN]
        x = (images[order] / 16).reshape(-1, 8, 8, 1).astype("float32")
        y = keras.utils.to_categorical(labels[order], 10).astype("float32")
        self.x, self.y, self.x_val, self.y_val = map(tf.constant, (x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]))
        self.network = functools.cache(Network)

    def train(self, point: dict[str, Any], seed: int, epochs: int) -> dict[str, list[float]]:
        """Returns the curves of validation; they end where the loss is no longer finite."""
        network = self.network(point["filters"], point["activation"])
        network.reset(point, seed)
        generator = np.random.default_rng([17, seed])
        accuracies: list[float] = []
        losses: list[float] = []
        for epoch in range(epochs):
            network.optimizer.learning_rate = point["learning_rate"] * point["decay"] ** epoch
            order = tf.constant(generator.permutation(ROWS), "int32")
            network.epoch(self.x, self.y, order, tf.constant(point["batch_size"]))
            accuracy, loss = network.evaluate(self.x_val, self.y_val)
            if not np.isfinite(loss):
                break
            accuracies.append(round(float(accuracy), 4))
            losses.append(float(f"{float(loss):.5g}"))
        return {"val_accuracy": accuracies, "val_loss": losses}


def one_core() -> None:
    """So that the recording slows nothing else down, and that sums have one order."""
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)

"""Small models, data and callbacks that the tests of callbacks share."""

import signal

import keras
import numpy as np
import pytest
from keras import ops

from keras_optkit.callbacks import Resume


def regression(n=24, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(dtype)
    return x, (x @ np.array([[1.0], [-2.0], [0.5]]) + 0.1 * rng.normal(size=(n, 1))).astype(dtype)


def linear_model(optimizer, dtype="float64", **arguments):
    """y = x w with mean squared error; its gradient is 2/n xᵀ(x w - y)."""
    start = keras.initializers.Constant(0.5)
    model = keras.Sequential(
        [keras.Input((3,), dtype=dtype), keras.layers.Dense(1, use_bias=False, kernel_initializer=start, dtype=dtype)]
    )
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


def mean_output(_, p):
    return ops.mean(p)


def counting_model(optimizer, **arguments):
    """One weight whose gradient is the mean of its inputs, so that a test can choose every gradient."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer=optimizer, loss=mean_output, **arguments)
    return model


def fit(model, x, y, *callbacks, batch_size=4, epochs=2, **arguments):
    return model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments
    )


class At(keras.callbacks.Callback):
    """Calls a function at the end of one batch (of one epoch) or of one epoch."""

    stateless = True

    def __init__(self, function, *, batch=None, epoch=None):
        super().__init__()
        self.function, self.batch, self.epoch, self.now = function, batch, epoch, None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch and self.epoch in (None, self.now):
            self.function(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if self.batch is None and self.epoch in (None, epoch):
            self.function(self.model)


def boom(_):
    raise RuntimeError("boom")


class Alternating(keras.Model):
    """Two layers, each with an optimizer that the model holds and a number of updates in every step, as a GAN has them.

    On TensorFlow, which a training step of one's own is written for.
    """

    def __init__(self, first, second, updates=(1, 1), inputs=3):
        super().__init__()
        start = keras.initializers.Constant(0.5)
        self.parts = [keras.layers.Dense(1, use_bias=False, kernel_initializer=start) for _ in range(2)]
        self.first, self.others = first, {"second": [second]}
        self.updates = updates
        self.tracker = keras.metrics.Mean(name="loss")
        self(ops.ones((1, inputs)))

    def call(self, x):
        return self.parts[0](x) + self.parts[1](x)

    @property
    def metrics(self):
        return [self.tracker]

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        optimizers = [self.first, self.others["second"][0]]
        loss = 0.0
        for part, optimizer, n in zip(self.parts, optimizers, self.updates, strict=True):
            for _ in range(n):
                with tf.GradientTape() as tape:
                    loss = ops.mean((self(x) - y) ** 2)
                weights = part.trainable_variables
                optimizer.apply(tape.gradient(loss, weights), weights)
        self.tracker.update_state(loss)
        return {"loss": self.tracker.result()}

    def test_step(self, data):
        x, y = data
        self.tracker.update_state(ops.mean((self(x) - y) ** 2))
        return {"loss": self.tracker.result()}


def noisy_model(optimizer="sgd", **arguments):
    """A model with moving statistics, so that a snapshot has to hold more than what is trained."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"], **arguments)
    return model


class Snapshots(keras.callbacks.Callback):
    """The weights after each epoch, and the logs."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.weights, self.logs = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append([np.array(w) for w in self.model.get_weights()])
        self.logs.append(dict(logs))


def assert_weights(model, expected):
    for mine, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


def interrupt(_):
    signal.raise_signal(signal.SIGINT)


class Failing(keras.utils.PyDataset):
    """Data that raise in the middle once they are told to."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.fails = x, y, False

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.fails and index == 3:
            raise OSError("disk")
        return self.x[4 * index : 4 * index + 4], self.y[4 * index : 4 * index + 4]

    def fail(self, _):
        self.fails = True


def interrupted(run, directory, *, after, batch=None, every="epoch"):
    """What `run(*callbacks)` returns when it is run again after a crash in an epoch, from 0, and goes on by Resume."""
    with pytest.raises(RuntimeError, match="boom"):
        run(At(boom, batch=batch, epoch=after), Resume(directory, every))
    return run(Resume(directory, every))


def without_names(part):
    """Optimizers' states without their schemas, which have names of layers, that Keras numbers through in a process."""
    if isinstance(part, dict):
        return {name: without_names(value) for name, value in part.items() if name != "schema"}
    return list(map(without_names, part)) if isinstance(part, list) else part

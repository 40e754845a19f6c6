"""Runs that are broken on purpose, and healthy ones: `python tests/diagnose_cases.py` counts what `diagnose` tells.

Of a broken run the first warning must be the one for what was done to it; a healthy run must have no warning. With the
argument "broken" or "healthy", it counts these, and with names, only those.
"""

import sys
import tempfile
import time

import keras
import numpy as np
from keras import initializers, layers, optimizers

import keras_optkit as ok

CLASSES = 4


def images(rng, size=768, side=12):
    """Images with a bright bar in one of four places."""
    y = rng.integers(0, CLASSES, size)
    x = rng.normal(size=(size, side, side, 1)).astype("float32")
    for image, label in zip(x, y, strict=True):
        image[:, 3 * label : 3 * label + 2] += 1.5
    return x, y


def vectors(rng, size=768):
    x = rng.normal(size=(size, 20)).astype("float32")
    return x, np.argmax(x @ rng.normal(size=(20, CLASSES)), axis=1)


def deep_cnn(deviation=None, depth=8, activation="relu", filters=16):
    """A CNN of eight layers, with normal weights of a deviation, or those of He."""

    def kernel():
        return "he_normal" if deviation is None else initializers.RandomNormal(stddev=deviation)

    convolutions = [
        layers.Conv2D(
            filters,
            3,
            2 if place == 1 else 1,
            "same",
            activation=activation,
            kernel_initializer=kernel(),
            name=f"conv{place}",
        )
        for place in range(depth)
    ]
    end = [layers.GlobalAveragePooling2D(), layers.Dense(CLASSES, kernel_initializer=kernel(), name="head")]
    return keras.Sequential([keras.Input((12, 12, 1)), *convolutions, *end])


def mlp(activation="relu", depth=3, bias=0.0, **given):
    hidden = [
        layers.Dense(
            32,
            activation,
            bias_initializer=initializers.Constant(bias if place == 1 else 0.0),
            name=f"hidden{place}",
            **given,
        )
        for place in range(depth)
    ]
    return keras.Sequential([keras.Input((20,)), *hidden, layers.Dense(CLASSES, name="head")])


def normalized_cnn():
    model = keras.Sequential([keras.Input((12, 12, 1))])
    for filters in (8, 16, 16):
        model.add(layers.Conv2D(filters, 3, padding="same", use_bias=False))
        model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(CLASSES))
    return model


def residual_cnn():
    """Residual blocks that begin as zero."""
    x = inputs = keras.Input((12, 12, 1))
    x = layers.Conv2D(16, 3, padding="same", kernel_initializer="he_normal")(x)
    for _ in range(3):
        inner = layers.Conv2D(16, 3, padding="same", activation="relu", kernel_initializer="he_normal")(x)
        x = layers.Add()([x, layers.Conv2D(16, 3, padding="same", kernel_initializer="zeros")(inner)])
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))


def transformer():
    x = inputs = keras.Input((10, 2))
    x = layers.Dense(16)(x)
    for _ in range(2):
        inner = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(inner, inner)
        x = x + layers.Dense(16)(layers.Dense(32, "gelu")(layers.LayerNormalization()(x)))
    return keras.Model(inputs, layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))))


def lstm():
    return keras.Sequential(
        [keras.Input((10, 2)), layers.LSTM(16, return_sequences=True), layers.LSTM(16), layers.Dense(CLASSES)]
    )


def series(rng, size=768):
    x, y = vectors(rng, size)
    return x.reshape(size, 10, 2), y


def with_nan(data):
    def make(rng):
        x, y = data(rng)
        x[-1] = np.nan
        return x, y

    return make


def scaled(data, factor, shift=0.0):
    def make(rng):
        x, y = data(rng)
        return (factor * x + shift).astype("float32"), y

    return make


def random_labels(rng):
    x, _ = vectors(rng)
    return x, rng.integers(0, CLASSES, len(x))


class Stop(layers.Layer):
    """Lets no gradient through."""

    def call(self, x):
        return keras.ops.stop_gradient(x)


def cut_mlp():
    first = [layers.Dense(32, "relu", name="hidden0"), layers.Dense(32, "relu", name="hidden1"), Stop()]
    return keras.Sequential(
        [keras.Input((20,)), *first, layers.Dense(32, "relu", name="hidden2"), layers.Dense(CLASSES)]
    )


SGD, ADAM = optimizers.SGD, optimizers.Adam
DENSE = "hidden"

#: Model, data, optimizer; the warning for what was done, and where.
BROKEN = {
    "weights of 0.005": (lambda: deep_cnn(0.005), images, lambda: ADAM(1e-3), "kernel_scale", "conv0 to conv7"),
    "weights of 0.005, SGD": (lambda: deep_cnn(0.005), images, lambda: SGD(0.05), "kernel_scale", "conv0 to conv7"),
    "weights of 0.4": (lambda: deep_cnn(0.4, filters=32), images, lambda: ADAM(1e-3), "kernel_scale", "conv1 to conv7"),
    "rate of Adam 1000 times too large": (mlp, vectors, lambda: ADAM(1.0), "update_size", "optimizer"),
    "rate of Adam far too small": (mlp, vectors, lambda: ADAM(1e-7), "update_size", "optimizer"),
    "rate of SGD far too small": (mlp, vectors, lambda: SGD(1e-6), "update_size", "optimizer"),
    "rate of SGD far too large": (mlp, vectors, lambda: SGD(1e4), "update_size", "optimizer"),
    "rate 0": (mlp, vectors, lambda: ADAM(0.0), "rate_is_zero", "optimizer"),
    "schedule that ends early": (
        mlp,
        vectors,
        lambda: ADAM(optimizers.schedules.PolynomialDecay(1e-3, 40, 0.0)),
        "rate_is_zero",
        "optimizer",
    ),
    "NaN in the data": (mlp, with_nan(vectors), lambda: ADAM(1e-3), "loss_value", "loss"),
    "dead ReLUs": (lambda: mlp(bias=-30.0), vectors, lambda: ADAM(1e-3), "dead_units", "hidden1 to hidden2"),
    "saturated tanh": (lambda: mlp("tanh", bias=8.0), vectors, lambda: ADAM(1e-3), "saturation", "hidden1"),
    "deep sigmoids": (lambda: mlp("sigmoid", 12), vectors, lambda: ADAM(1e-3), "vanishing_gradient", "hidden0"),
    "gradient is cut": (cut_mlp, vectors, lambda: ADAM(1e-3), "missing_gradient", "hidden1"),
    "inputs of 1000": (mlp, scaled(vectors, 300.0, 1000.0), lambda: ADAM(1e-3), "loss_at_start", "loss"),
}

#: With nothing wrong.
HEALTHY = {
    "mlp, Adam": (mlp, vectors, lambda: ADAM(1e-3)),
    "mlp, Adam 1e-2": (mlp, vectors, lambda: ADAM(1e-2)),
    "mlp, SGD": (mlp, vectors, lambda: SGD(0.1)),
    "mlp, momentum": (mlp, vectors, lambda: SGD(0.02, momentum=0.9)),
    "mlp, RMSprop": (mlp, vectors, lambda: optimizers.RMSprop(1e-3)),
    "mlp, AdamW of ours, cosine": (mlp, vectors, lambda: ok.optimizers.AdamW(ok.schedules.Cosine(3e-3, 192))),
    "mlp, warm-up from 0": (mlp, vectors, lambda: ADAM(ok.schedules.Warmup(ok.schedules.Cosine(3e-3, 192), steps=40))),
    "mlp, Lion": (mlp, vectors, lambda: ok.optimizers.Lion(3e-4)),
    "mlp, clipped always": (mlp, vectors, lambda: ADAM(1e-3, global_clipnorm=0.01)),
    "mlp, tanh": (lambda: mlp("tanh"), vectors, lambda: ADAM(1e-3)),
    "mlp, gelu": (lambda: mlp("gelu"), vectors, lambda: ADAM(1e-3)),
    "eight layers, He": (deep_cnn, images, lambda: ADAM(1e-3)),
    "eight layers, Muon": (deep_cnn, images, lambda: ok.optimizers.Muon(1e-2)),
    "normalized cnn": (normalized_cnn, images, lambda: ADAM(1e-3)),
    "normalized cnn, SGD 0.1": (normalized_cnn, images, lambda: SGD(0.1, momentum=0.9)),
    "residual cnn": (residual_cnn, images, lambda: ADAM(1e-3)),
    "transformer": (transformer, series, lambda: ADAM(1e-3)),
    "LSTM": (lstm, series, lambda: ADAM(3e-3)),
    "Prodigy": (mlp, vectors, lambda: ok.optimizers.Prodigy()),
    "Schedule-Free": (mlp, vectors, lambda: ok.optimizers.ScheduleFreeAdamW(3e-3)),
}


def run(make, data, optimizer, directory, epochs=8, seed=0):
    """Trains, and returns the diagnosis."""
    keras.utils.set_random_seed(seed)
    x, y = data(np.random.default_rng(seed))
    model = make()
    model.compile(optimizer(), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    activations = "conv|hidden|dense" if keras.config.backend() == "tensorflow" else None
    monitor = ok.callbacks.TrainingMonitor(directory, every=5, activations=activations, findings=True)
    model.fit(x, y, batch_size=32, epochs=epochs, verbose=0, callbacks=[monitor])
    return ok.diagnose(directory)


def count(cases, seed):
    """Prints what is found in each run, and returns how many are right, of how many."""
    right = total = 0
    for name, (make, data, optimizer, *wanted) in cases.items():
        if len(sys.argv) > 2 and name not in sys.argv:
            continue
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as directory:
            found = run(make, data, optimizer, directory, seed=seed).warnings
        is_right = (found and (found[0].rule, found[0].where) == tuple(wanted)) if wanted else not found
        right, total = right + bool(is_right), total + 1
        print(f"{name:36} {'right' if is_right else 'WRONG'} {time.perf_counter() - begun:6.1f} s", flush=True)
        for each in found if wanted or not is_right else ():
            print(f"    {each}", flush=True)
        keras.backend.clear_session()
    return right, total


def main():
    """Prints what is found in each run, and the counts."""
    seed = next((int(each) for each in sys.argv if each.isdigit()), 0)
    if "healthy" not in sys.argv:
        print("broken runs, named first with the right cause: {} of {}".format(*count(BROKEN, seed)))
    if "broken" not in sys.argv:
        print("healthy runs without a warning: {} of {}".format(*count(HEALTHY, seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

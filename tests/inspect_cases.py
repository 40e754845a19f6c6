"""Models that are broken on purpose, and healthy ones: `python tests/inspect_cases.py` counts what is told apart.

Of a broken model the first warning must be the one for what was done to it; a healthy one must have no warning.
"""

import sys

import keras
import numpy as np
from keras import layers

from keras_optkit.inspection import inspect

CLASSES = 4

#: What is done to a model, and the rules that may name it first.
BROKEN = {
    "wrong init": ("kernel_scale",),
    "dead ReLUs": ("dead_units",),
    "missing gradient": ("missing_gradient",),
    "exploding depth": ("kernel_scale", "growth"),
    "saturated tanh": ("kernel_scale", "saturation"),
    "frozen by mistake": ("frozen",),
    "identical layers": ("identical_layers",),
    "L2 and Adam": ("l2_and_adaptive",),
    "wrong output bias": ("output_bias",),
    "rate 100 times off": ("update_size",),
    "unscaled inputs": ("unscaled_inputs",),
    "softmax as logits": ("output_and_loss",),
}
KINDS = ("mlp", "cnn", "transformer")


class Cut(layers.Layer):
    """Lets no gradient through."""

    def call(self, x):
        return keras.ops.stop_gradient(x)


def hidden(how, place, activation="relu"):
    """Arguments of a hidden layer."""
    # small: the standard deviations that a scale of 100 in the variance gives, in one layer or in all
    large = keras.initializers.VarianceScaling(100.0, "fan_in", seed=place)
    initializer = keras.initializers.HeNormal(seed=0 if how == "identical layers" else place)
    if (how == "wrong init" and place == 2) or how in ("exploding depth", "saturated tanh"):
        initializer = large
    return {
        "activation": "tanh" if how == "saturated tanh" else activation,
        "kernel_initializer": initializer,
        "bias_initializer": keras.initializers.Constant(-50.0 if how == "dead ReLUs" and place == 2 else 0.0),
        "kernel_regularizer": keras.regularizers.L2(1e-3) if how == "L2 and Adam" else None,
        "trainable": not (how == "frozen by mistake" and place == 2),
    }


def body(kind, how):
    """The input, and features of it."""
    if kind == "cnn":
        x = inputs = keras.Input((8, 8, 3))
        for place in range(1, 5):
            x = layers.Conv2D(16, 3, padding="same", **hidden(how, place))(x)
            x = Cut()(x) if how == "missing gradient" and place == 2 else x
        return inputs, layers.GlobalAveragePooling2D()(x)
    if kind == "mlp":
        x = inputs = keras.Input((20,))
        for place in range(1, 5):
            x = layers.Dense(64, **hidden(how, place))(x)
            x = Cut()(x) if how == "missing gradient" and place == 2 else x
        return inputs, x
    inputs = keras.Input((6, 16))
    x = layers.Dense(16, kernel_initializer=keras.initializers.GlorotUniform(seed=9))(inputs)
    for place in range(1, 5):
        attended = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(2, 8)(attended, attended)
        inner = layers.Dense(64, **hidden(how, place))(layers.LayerNormalization()(x))
        inner = Cut()(inner) if how == "missing gradient" and place == 2 else inner
        x = x + layers.Dense(16)(inner)
    return inputs, layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))


def build(kind, how=None, seed=0):
    """A compiled model, a batch and its labels."""
    keras.utils.set_random_seed(seed)
    rng = np.random.default_rng(seed)
    inputs, x = body(kind, how)
    bias = [20.0, 0, 0, 0] if how == "wrong output bias" else [0.0] * CLASSES
    softmax = how == "softmax as logits"
    head = layers.Dense(CLASSES, "softmax" if softmax else None)
    model = keras.Model(inputs, head(x))
    if how == "wrong output bias":
        head.bias.assign(bias)
    rate = 0.1 if how == "rate 100 times off" else 1e-3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    scale = 255.0 if how == "unscaled inputs" else 1.0
    batch = (scale * rng.normal(size=(32, *inputs.shape[1:]))).astype("float32")
    return model, batch, rng.integers(0, CLASSES, 32).astype("int32")


def first(kind, how=None, seed=0):
    """The rule that warns first, or None."""
    warnings = inspect(*build(kind, how, seed)).warnings
    return warnings[0].rule if warnings else None


def main():
    """Prints what is found in each case, and the counts."""
    right = 0
    for kind in KINDS:
        for how, rules in BROKEN.items():
            found = first(kind, how)
            right += found in rules
            print(f"{kind:12} {how:20} {found!s:24} {'right' if found in rules else 'WRONG'}", flush=True)
    healthy = [(kind, seed, first(kind, seed=seed)) for kind in KINDS for seed in range(3)]
    for kind, seed, found in healthy:
        print(f"{kind:12} {f'healthy, seed {seed}':20} {found!s:24}")
    alarms = sum(found is not None for *_, found in healthy)
    print(f"named first with the right cause: {right} of {len(KINDS) * len(BROKEN)}")
    print(f"false alarms: {alarms} of {len(healthy)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

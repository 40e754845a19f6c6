"""Every optimizer in three small programs: `python tests/every_optimizer.py [NAME ...]`.

A convolutional network, a transformer and an LSTM are trained with each for 30 steps, those in `EPOCHS` longer, with
`jit_compile` off and on. Half-way the model is saved; the model loaded from the file must end with the same weights,
bit by bit. Optimizers have their own defaults. A line is printed for each, with the first and the last loss of each
program, and the exit status is 1 if one fails.

KERAS_BACKEND=jax runs it on JAX, where the step is always compiled.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import keras_optkit as ok
from keras_optkit.private import op_determinism

BATCH, STEPS = 16, 15
#: Epochs of 15 steps before the file, and after it, of those that need more. The rate that Prodigy finds for the
#: convolutional network is too high for the first 50 steps, and SAM looks at a distance of 0.05, which is far for an
#: embedding of norm 0.3.
EPOCHS = {"Prodigy": 3, "SAM": 3}


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(tokens)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(12, activation="relu", name="dense")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(3, name="head")(x))


def network():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2DTranspose(4, 3, name="transposed")(x)
    x = layers.Conv2D(4, 3, groups=2, name="grouped")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, name="head")(x))


def recurrent():
    return keras.Sequential([keras.Input((5, 4)), layers.LSTM(6, name="lstm"), layers.Dense(3, name="head")])


MODELS = (network, transformer, recurrent)


def problem(make, n, seed=0):
    """Inputs and classes that a small model can learn."""
    rng = np.random.default_rng(seed)
    if make is transformer:
        x = rng.integers(0, 11, (n, 6)).astype("int32")
        return x, np.argmax([np.sum(x == k, axis=1) + 0.1 * k for k in range(3)], axis=0)
    shape = (8, 8, 3) if make is network else (5, 4)
    x = rng.normal(size=(n, *shape)).astype("float32")
    return x, np.argmax(np.mean(x, axis=tuple(range(1, x.ndim - 1)))[:, :3], axis=1)


def exact(jit_compile):
    """Op determinism where it is needed: Keras refuses XLA with it, and on other backends there is nothing to ask."""
    plain = jit_compile or keras.config.backend() != "tensorflow"
    return contextlib.nullcontext() if plain else op_determinism()


def continued(optimizer, make, jit_compile, n=BATCH * STEPS, epochs=1):
    """Losses before and after the file; raises AssertionError unless what was loaded goes the same way."""
    x, y = problem(make, n)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    how = {"batch_size": BATCH, "epochs": epochs, "shuffle": False, "verbose": 0}
    with exact(jit_compile), tempfile.TemporaryDirectory() as directory:
        keras.utils.set_random_seed(0)
        model = make()
        model.compile(optimizer, loss=loss, jit_compile=jit_compile)
        first = model.fit(x, y, **how).history["loss"]
        path = Path(directory, "model.keras")
        model.save(path)
        last = model.fit(x, y, **how).history["loss"]
        loaded = keras.models.load_model(path)
        loaded.compile(loaded.optimizer, loss=loss, jit_compile=jit_compile)
        assert loaded.fit(x, y, **how).history["loss"] == last, "the losses differ"
        for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    return first, last


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of optimizers; all when left out")
    chosen = parser.parse_args()
    cards = {card.name: card for card in ok.cards("optimizer")}
    unknown = set(chosen.names) - cards.keys()
    if unknown:
        parser.error(f"unknown names {sorted(unknown)}; allowed: {', '.join(cards)}")
    compiled = (False, True) if keras.config.backend() == "tensorflow" else (True,)
    failed = 0
    for name in chosen.names or cards:
        begun, said = time.perf_counter(), []
        for make in MODELS:
            for jit_compile in compiled:
                inner = {k: v for k, v in cards[name].cases[0].items() if k == "inner"}
                try:
                    first, last = continued(cards[name].make(**inner), make, jit_compile, epochs=EPOCHS.get(name, 1))
                    said.append(f"{first[0]:.3f} {last[-1]:.3f}")
                    assert np.isfinite(last[-1]), "the loss is not finite"
                    assert last[-1] < first[0], "the loss has not fallen"
                except Exception as error:  # whatever it is, the others are tried
                    failed += 1
                    said.append(f"FAILED {make.__name__} jit_compile={jit_compile}: {type(error).__name__} {error}")
        print(f"{name:20} {' | '.join(said)} ({time.perf_counter() - begun:.0f} s)", flush=True)
    print(f"{failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)
    sys.exit(main())

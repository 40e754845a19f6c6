"""Orthogonalizing one matrix, as in Muon: ours beside Keras's, with the same five iterations, in turns.

    python examples/benchmarks/orthogonalization.py [--shapes 768x768 768x3072 ...] [--repeats N]

Given are the median of the rounds in milliseconds, that of the ratio to Keras's in the same round, and the largest
difference of the results relative to the largest element.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

from keras_optkit.optimizers.rules.muon import orthogonalized, polynomials

#: Of BERT-base: attention and the two kernels of the other half of a block; of ResNet-50: a window of 3 x 3.
SHAPES = ("768x768", "768x3072", "3072x768", "1152x128", "4608x512")
STEPS = 5


def compiled(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """As the optimizers are compiled: a graph of TensorFlow without XLA, or `jax.jit`."""
    if keras.config.backend() == "jax":
        import jax

        return jax.jit(function)
    import tensorflow as tf

    return tf.function(function, autograph=False)


def seconds(function: Callable[[Any], Any], x: Any) -> float:
    """For one call."""
    start = time.perf_counter()
    ops.convert_to_numpy(function(x)[..., :1, :1])
    return time.perf_counter() - start


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), metavar="ROWSxCOLUMNS")
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    stock = keras.optimizers.Muon()
    coefficients = polynomials("keller_jordan", STEPS)
    theirs = compiled(lambda x: stock.zeropower_via_newtonschulz5(x, STEPS))
    ours = compiled(lambda x: orthogonalized(x[None], coefficients, 1e-7)[0])
    print("| shape | Keras's, ms | ours, ms | ratio | difference |\n|---|---|---|---|---|")
    for shape in given.shapes:
        rows, columns = map(int, shape.split("x"))
        x = ops.convert_to_tensor(np.random.default_rng(0).normal(size=(rows, columns)), "float32")
        expected, got = (ops.convert_to_numpy(f(x)) for f in (theirs, ours))
        times = [[seconds(f, x) for f in (theirs, ours)] for _ in range(given.repeats)]
        before, after = (1e3 * statistics.median(each) for each in zip(*times, strict=True))
        ratio = statistics.median(b / a for a, b in times)
        difference = np.max(np.abs(got - expected)) / np.max(np.abs(expected))
        print(f"| {shape} | {before:.3g} | {after:.3g} | {ratio:.2f} | {difference:.0e} |", flush=True)


if __name__ == "__main__":
    main()

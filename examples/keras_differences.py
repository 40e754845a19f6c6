"""How Keras's own optimizers differ from ours, in numbers: `python examples/keras_differences.py [NAME ...]`.

Both are given the same weights and the same 100 gradients of a 64x32 kernel and a bias of 32, in float64. The columns:

- same: the largest difference between the weights after any step, relative to the largest weight, with the arguments
  for ours that reproduce Keras; "-" where there are none.
- defaults: the same with the defaults of both, at the same rate: the power of two next to Keras's default, since Keras
  rounds some scalars to float32.
- bytes: state for each element of the kernel, in float32: Keras's, and ours.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import keras_optkit as ok
from keras_optkit.tables import table

SHAPES = ((64, 32), (32,))
STEPS = 100
O, K = ok.optimizers, keras.optimizers  # noqa: E741

#: By Keras's name: ours with the arguments that reproduce Keras's, or None, and ours with its own defaults.
PAIRS: dict[str, tuple[Callable[[float], Any] | None, Callable[[float], Any]]] = {
    "SGD": (O.SGD, O.SGD),
    "RMSprop": (lambda rate: O.RMSprop(rate, epsilon=1e-7), O.RMSprop),
    "Adagrad": (lambda rate: O.Adagrad(rate, 0.1, 1e-7), O.Adagrad),
    "Adam": (lambda rate: O.Adam(rate, epsilon=1e-7, epsilon_hat=True), O.Adam),
    "AdamW": (
        lambda rate: O.AdamW(rate, epsilon=1e-7, epsilon_hat=True, weight_decay=0.004, decay_mask="all"),
        O.AdamW,
    ),
    "Nadam": (lambda rate: O.NAdam(rate, epsilon=1e-7, momentum_decay=1.0), O.NAdam),
    "Adadelta": (lambda rate: O.Adadelta(rate, 0.95, 1e-7), O.Adadelta),
    "Adamax": (None, O.Adamax),
    "Ftrl": (lambda rate: O.Ftrl(rate, initial_accumulator_value=0.1), O.Ftrl),
    "Lion": (O.Lion, O.Lion),
    "Lamb": (lambda rate: O.LAMB(rate, epsilon=1e-7), O.LAMB),
    "Adafactor": (O.Adafactor, O.Adafactor),
    "Muon": (None, lambda rate: O.Muon(rate, exclude_output=False)),
    "ScheduleFreeAdamW": (None, O.ScheduleFreeAdamW),
}


def trained(optimizer: Any) -> list[list[np.ndarray]]:
    """The weights after each step."""
    rng = np.random.default_rng(0)
    weights = [keras.Variable(0.1 * rng.normal(size=shape), dtype="float64", name="kernel") for shape in SHAPES]
    optimizer.build(weights)
    path = []
    for _ in range(STEPS):
        optimizer.apply([ops.convert_to_tensor(rng.normal(size=shape)) for shape in SHAPES], weights)
        path.append([np.array(ops.convert_to_numpy(w)) for w in weights])
    return path


def state_bytes(optimizer: Any) -> float:
    """Bytes of state in float32 for each element of the kernel, which is built alone; scalars do not count."""
    kernel = keras.Variable(np.zeros(SHAPES[0], "float32"), name="kernel")
    optimizer.build([kernel])
    return sum(4 * int(np.prod(v.shape)) for v in optimizer.variables if v.shape) / int(np.prod(SHAPES[0]))


def difference(a: list[list[np.ndarray]], b: list[list[np.ndarray]]) -> float:
    """The largest, relative to the largest weight of a parameter."""
    each = [(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True)]
    return max(float(np.max(np.abs(x - y)) / np.max(np.abs(y))) for x, y in each)


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="Keras's names; all when left out")
    chosen = parser.parse_args()
    unknown = set(chosen.names) - PAIRS.keys()
    if unknown:
        parser.error(f"unknown names {sorted(unknown)}; allowed: {', '.join(PAIRS)}")
    keras.config.set_floatx("float64")
    lines = [("Keras", "same", "defaults", "bytes, Keras", "ours")]
    for name in chosen.names or PAIRS:
        same, default = PAIRS[name]
        theirs = getattr(K, name)
        rate = 2.0 ** round(np.log2(float(theirs().learning_rate)))
        expected = trained(theirs(rate))
        equal = "-" if same is None else f"{difference(trained(same(rate)), expected):.1e}"
        apart = f"{difference(trained(default(rate)), expected):.1e}"
        sizes = [f"{state_bytes(make):.1f}" for make in (theirs(), default(rate))]
        lines.append((name, equal, apart, sizes[0], sizes[1]))
    print(*table(lines, left=(0,), rule=True), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

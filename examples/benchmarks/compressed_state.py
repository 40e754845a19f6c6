"""What state in fewer bits costs: the final loss, the bytes, and the time of an update.

    python examples/benchmarks/compressed_state.py

A character language model of two transformer blocks is trained on the source of Python's standard library by AdamW and
by Lion, with each `slot_dtype`, from the same weights and on the same batches for each seed. Shown is the mean loss of
the last fifth of the updates relative to float32, as the mean and the largest deviation over the seeds, the measured
bytes of state per parameter, and the median time of an update of this model by itself, in a graph.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sysconfig
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok
from keras_optkit.testing import problems
from keras_optkit.testing.memory import bytes_per_parameter

LENGTH, WIDTH, HEADS, BATCH, CHARACTERS = 32, 64, 4, 16, 96

OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "AdamW": functools.partial(ok.optimizers.AdamW, 2e-3, weight_decay=0.1),
    "Lion": functools.partial(ok.optimizers.Lion, 3e-4, weight_decay=0.1),
}

DTYPES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"slot_dtype": "bfloat16"},
    "bfloat16+8": {"slot_dtype": "bfloat16+8"},
    "int8": {"slot_dtype": "int8"},
    "int8, rounded at random": {"slot_dtype": "int8", "stochastic_rounding": True},
}


def text() -> np.ndarray:
    """The source of modules of the standard library, as codes of printable characters."""
    folder = Path(sysconfig.get_path("stdlib"))
    source = "".join(path.read_text("utf-8", "ignore") for path in sorted(folder.glob("*.py"))[:120])
    codes = np.frombuffer(source.encode("ascii", "ignore"), np.uint8).astype("int32") - 32
    return np.where((codes >= 0) & (codes < CHARACTERS - 1), codes, CHARACTERS - 1)


@keras.saving.register_keras_serializable("compressed_state")
class Position(keras.layers.Layer):
    """Adds a trained vector for each position."""

    def build(self, shape: tuple[int, ...]) -> None:
        """Makes the table."""
        self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

    def call(self, x: keras.KerasTensor) -> keras.KerasTensor:
        """Adds it."""
        return x + self.table


def model() -> keras.Model:
    """Two blocks of attention and a feed-forward network, normalised before each."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    x = Position()(keras.layers.Embedding(CHARACTERS, WIDTH)(inputs))
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        x = x + keras.layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(y, y, use_causal_mask=True)
        y = keras.layers.Dense(4 * WIDTH, "gelu")(keras.layers.LayerNormalization()(x))
        x = x + keras.layers.Dense(WIDTH)(y)
    return keras.Model(inputs, keras.layers.Dense(CHARACTERS)(keras.layers.LayerNormalization()(x)))


def trained(optimizer: keras.optimizers.Optimizer, seeds: int, steps: int, source: np.ndarray) -> list[float]:
    """The mean loss of the last fifth of the updates, for each seed."""
    network = model()
    network.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    optimizer.build(network)
    fresh, found = problems.state_of(optimizer), []
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        network.set_weights(model().get_weights())
        optimizer.load_own_variables(fresh)
        rng = np.random.default_rng(seed)
        losses = []
        for _ in range(steps):
            begins = rng.integers(0, len(source) - LENGTH - 1, BATCH)
            part = source[begins[:, None] + np.arange(LENGTH + 1)]
            losses.append(float(network.train_on_batch(part[:, :-1], part[:, 1:])))
            network.reset_metrics()
        found.append(float(np.mean(losses[-max(1, steps // 5) :])))
    return found


def time_of_update(optimizer: keras.optimizers.Optimizer, repeats: int) -> float:
    """Seconds, as the median."""
    weights = model().trainable_variables
    rng = np.random.default_rng(0)
    grads = [keras.ops.convert_to_tensor(rng.normal(size=w.shape), dtype="float32") for w in weights]
    step = problems.stepper(optimizer, weights, "graph")
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        step(grads)
        keras.ops.convert_to_numpy(weights[-1])
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="updates of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--repeats", type=int, default=20, help="updates that are timed")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    chosen = parser.parse_args(arguments)
    source = text()
    runs = [(name, dtype) for name in OPTIMIZERS for dtype in DTYPES]
    losses = {}
    for name, dtype in track(runs, "training", console=Console(stderr=True)):
        losses[name, dtype] = trained(OPTIMIZERS[name](**DTYPES[dtype]), chosen.seeds, chosen.steps, source)
    head = ["optimizer", "state", "loss", "to float32, mean", "largest", "bytes per parameter", "update, ms"]
    rows = []
    for name, make in OPTIMIZERS.items():
        for dtype, how in DTYPES.items():
            found = losses[name, dtype]
            ratios = [100 * (a / b - 1) for a, b in zip(found, losses[name, "float32"], strict=True)]
            held, took = bytes_per_parameter(make(**how), model()), time_of_update(make(**how), chosen.repeats)
            largest = max(ratios, key=abs)
            cells = [f"{np.mean(found):.4f}", f"{np.mean(ratios):+.2f} %", f"{largest:+.2f} %", f"{held:.2f}"]
            rows.append([name, dtype, *cells, f"{1000 * took:.2f}"])
    if chosen.markdown:
        print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
        return
    table = Table(*head, title=f"{chosen.steps} updates, {chosen.seeds} seeds, {keras.config.backend()}")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    main()

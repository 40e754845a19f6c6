"""How the time of an update depends on the size of an embedding of which a batch holds few rows.

    python examples/benchmarks/embedding_rows.py

One update of a table of (rows, 64) with the gradient of 4,096 looked-up rows, in a `tf.function`: our Adam by rows
(`sparse="lazy"`), our Adam on the whole table (`sparse="dense"`), and Keras's Adam, which moves all rows as well. The
alternatives are timed in turns; the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok

WIDTH, LOOKED_UP = 64, 4096

ALTERNATIVES: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "ours, lazy": lambda: ok.optimizers.Adam(1e-3),
    "ours, dense": lambda: ok.optimizers.Adam(1e-3, sparse="dense"),
    "keras": lambda: keras.optimizers.Adam(1e-3),
}


def stepper(optimizer: keras.optimizers.Optimizer, rows: int) -> Callable[[], None]:
    """A function that makes one update of a table with this number of rows, the same rows each time."""
    table = keras.Variable(np.zeros((rows, WIDTH), "float32"), name="embeddings")
    rng = np.random.default_rng(0)
    indices = tf.constant(rng.integers(0, rows, LOOKED_UP))
    values = tf.constant(rng.normal(size=(LOOKED_UP, WIDTH)).astype("float32"))
    optimizer.build([table])

    def step(values: tf.Tensor, indices: tf.Tensor) -> None:
        optimizer.apply([tf.IndexedSlices(values, indices, tf.constant([rows, WIDTH], tf.int64))], [table])

    compiled = tf.function(step, autograph=False)
    return lambda: compiled(values, indices)


def measure(rows: int, rounds: int) -> dict[str, float]:
    """Milliseconds of one update by alternative."""
    steps = {name: stepper(make(), rows) for name, make in ALTERNATIVES.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(samples)) for name, samples in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Updates of an embedding by rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes of the table")
    parser.add_argument("--rounds", type=int, default=15, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    shown = Table(title=f"One update with {LOOKED_UP:,} looked-up rows of {WIDTH}, milliseconds")
    for heading in ("rows of the table", *ALTERNATIVES):
        shown.add_column(heading, justify="right")
    for rows in track(arguments.rows, description="measuring", console=console):
        shown.add_row(f"{rows:,}", *(f"{ms:.2f}" for ms in measure(rows, arguments.rounds).values()))
    console.print(shown)


if __name__ == "__main__":
    main()

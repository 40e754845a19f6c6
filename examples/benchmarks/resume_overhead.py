"""What writing bundles costs: a model of 25 million parameters that is saved every 100 steps.

    python examples/benchmarks/resume_overhead.py

A multilayer perceptron of 25 million parameters is trained with AdamW, whose state is twice as large again, so that a
bundle is 300 MB. Trainings with and without `Resume` take turns; each step is timed, beginning after the first bundle's
hundred steps, so that compilation does not count, and every block of 100 steps holds one bundle. Shown is the mean time
of a step in each block, and how long the training thread stood still for the copy.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok


class Clock(keras.callbacks.Callback):
    """Notes the time before every batch."""

    stateless = True

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self.times.append(time.perf_counter())


def built(width: int) -> keras.Model:
    """Three dense layers; 25 million parameters with a width of 3,500."""
    layers = [keras.layers.Dense(width, "relu") for _ in range(3)]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=ok.optimizers.AdamW(1e-4), loss=loss)
    return model


def blocks(model: keras.Model, every: int, count: int, batch_size: int, *, saved: bool) -> list[float]:
    """The mean time of a step, in seconds, in each block of `every` steps but the first one."""
    rng = np.random.default_rng(0)
    rows = every * (count + 1) * batch_size
    x, y = rng.normal(size=(rows, 64)).astype("float32"), rng.integers(0, 10, rows)
    clock = Clock()
    with tempfile.TemporaryDirectory() as directory:
        resume = [ok.callbacks.Resume(directory, every=every)] if saved else []
        data = ok.data.Shuffled(x, y, batch_size=batch_size)
        model.fit(data, callbacks=[*resume, clock], verbose=0)
    # a bundle is copied before the first step of a block and written during the next ones
    starts = clock.times[::every]
    return [(b - a) / every for a, b in itertools.pairwise(starts[1:])]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The cost of bundles in training steps.")
    parser.add_argument("--width", type=int, default=3500, help="of the layers (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between two bundles (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="of so many steps in a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs with and without (default: %(default)s)")
    given = parser.parse_args(argv)
    console = Console()
    model = built(given.width)
    megabytes = sum(3 * 4 * int(np.prod(v.shape)) for v in model.trainable_variables) / 1e6
    times: dict[bool, list[float]] = {False: [], True: []}
    for _ in track(range(given.rounds), description="measuring", console=console):
        for saved in times:
            times[saved] += blocks(model, given.every, given.blocks, given.batch_size, saved=saved)
    shown = Table(title=f"{model.count_params():,} parameters, bundles of {megabytes:.0f} MB every {given.every} steps")
    for heading in ("", "a step, ms: median of the blocks", "lowest", "highest"):
        shown.add_column(heading, justify="right")
    for saved, samples in times.items():
        cells = [f"{1e3 * value:.2f}" for value in (np.median(samples), min(samples), max(samples))]
        shown.add_row("with Resume" if saved else "without", *cells)
    console.print(shown)
    ratio = float(np.median(times[True]) / np.median(times[False]))
    console.print(f"With bundles a step takes {100 * (ratio - 1):+.1f} %.")


if __name__ == "__main__":
    main()

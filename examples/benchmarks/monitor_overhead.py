"""What TrainingMonitor costs in a training step of MobileNetV2, beside the naive way, a second tape.

    python examples/benchmarks/monitor_overhead.py
    python examples/benchmarks/monitor_overhead.py --size 96 --batch 16 --rounds 15

The alternatives train equal models (`keras.applications.MobileNetV2`, 10 classes, weights not downloaded, our AdamW) on
the same random images, each as `fit` does, but round by round in turns:

- `plain`: without any callback that looks;
- `monitor`: `TrainingMonitor(every=n)`, with both of its files;
- `monitor, on request`: with the activations of all ReLUs, the gradient noise scale and histograms besides;
- `second tape`: a callback that, after every n-th update, computes the gradient of the batch once more in a
  `tf.function`, and from it the norms of gradient and weights of each variable, which it reads one by one and writes
  with `tf.summary.scalar`; it has no update-to-weight ratio;
- `second tape, eager`: the same without `tf.function`, as it is mostly written.

A round is n updates, of which one is looked at, for each alternative; it ends when the last update is done. Everything
is compiled and run once before. Given are the median of the milliseconds of an update over the rounds, and the median
of the ratios to `plain` in the same round with the quartiles in brackets, of the time on the clock and of the time that
the processor worked for this process, which other processes disturb less. How long the compiling takes is given apart:
the monitor has the step compiled twice.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok


class Seconds(NamedTuple):
    """How long something took on the clock, and how long the processor worked for it, on all cores together."""

    clock: float
    processor: float


class SecondTape(keras.callbacks.Callback):
    """The naive monitor: the gradient is computed once more, and every norm is read by itself."""

    def __init__(self, log_dir: Path, every: int, batch: Any, compiled: bool):
        super().__init__()
        self.every, self.batch, self.updates = every, batch, 0
        self.writer = tf.summary.create_file_writer(str(log_dir))
        self.norms = tf.function(self.compute_norms, autograph=False) if compiled else self.compute_norms

    def compute_norms(self, x: tf.Tensor, y: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The norms of gradient and weights of every variable."""
        weights = [variable.value for variable in self.model.trainable_variables]
        with tf.GradientTape() as tape:
            loss = self.model.compute_loss(x=x, y=y, y_pred=self.model(x, training=True))
        return [tf.norm(g) for g in tape.gradient(loss, weights)], [tf.norm(w) for w in weights]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Looks at every n-th update, after it."""
        self.updates += 1
        if self.updates % self.every:
            return
        gradient_norms, weight_norms = self.norms(*self.batch)
        with self.writer.as_default(self.updates):
            for variable, gradient, weight in zip(
                self.model.trainable_variables, gradient_norms, weight_norms, strict=True
            ):
                tf.summary.scalar(f"gradient_norm/{variable.path}", float(gradient))
                tf.summary.scalar(f"weight_norm/{variable.path}", float(weight))

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002
        """Closes the file."""
        self.writer.close()


def alternatives(every: int, batch: Any, directory: Path) -> dict[str, list[keras.callbacks.Callback]]:
    """The callbacks of each alternative."""
    monitor = ok.callbacks.TrainingMonitor
    on_request: dict[str, Any] = {"activations": "relu", "noise_scale": True, "histograms": 1}
    return {
        "plain": [],
        "monitor": [monitor(directory / "monitor", every)],
        "monitor, on request": [monitor(directory / "on_request", every, **on_request)],
        "second tape": [SecondTape(directory / "tape", every, batch, compiled=True)],
        "second tape, eager": [SecondTape(directory / "eager", every, batch, compiled=False)],
    }


def network(size: int) -> keras.Model:
    """What is trained."""
    return keras.applications.MobileNetV2((size, size, 3), weights=None, classes=10)


def trained(
    callbacks: list[keras.callbacks.Callback], batch: Any, size: int, xla: bool, ending: contextlib.ExitStack
) -> Callable[[int], Seconds]:
    """A function that makes so many updates of a fresh model, as `fit` does, and says how long it took."""
    keras.utils.set_random_seed(0)
    model = network(size)
    model.compile(ok.optimizers.AdamW(1e-3), loss="sparse_categorical_crossentropy", jit_compile=xla)
    model.optimizer.build(model.trainable_variables)
    model.evaluate(*batch, verbose=0)  # builds losses and metrics
    told = keras.callbacks.CallbackList(callbacks, model=model, epochs=1, steps=None)
    model.make_train_function()
    told.on_train_begin()
    ending.callback(told.on_train_end)
    told.on_epoch_begin(0)
    data: Iterator[Any] = iter(tf.data.Dataset.from_tensors(batch).repeat())
    made = 0

    def updates(count: int) -> Seconds:
        nonlocal made
        start, worked = time.perf_counter(), time.process_time()
        for _ in range(count):
            told.on_train_batch_begin(made)
            logs = model.train_function(data)
            told.on_train_batch_end(made, logs)
            made += 1
        float(logs["loss"])  # waits for the last update
        return Seconds(time.perf_counter() - start, time.process_time() - worked)

    return updates


def spread(ratios: Sequence[float]) -> str:
    """The median and the quartiles."""
    if len(ratios) < 2:
        return f"{ratios[0]:.3f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def measure(
    arguments: argparse.Namespace, directory: Path, console: Console, ending: contextlib.ExitStack
) -> list[list[str]]:
    """The rows of the table: alternative, seconds until everything is compiled, milliseconds of an update, ratios."""
    rng = np.random.default_rng(0)
    shape = (arguments.batch, arguments.size, arguments.size, 3)
    batch = tf.constant(rng.normal(size=shape), tf.float32), tf.constant(rng.integers(0, 10, arguments.batch))
    runs = {
        name: trained(callbacks, batch, arguments.size, arguments.xla, ending)
        for name, callbacks in alternatives(arguments.every, batch, directory).items()
    }
    first = {name: updates(arguments.every + 1).clock for name, updates in runs.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for _ in track(range(arguments.rounds), description="measuring", console=console):
        for name, updates in runs.items():
            times[name].append(updates(arguments.every))
    rows = []
    for name, seconds in times.items():
        update = statistics.median(s.clock for s in seconds) / arguments.every
        pairs = list(zip(seconds, times["plain"], strict=True))
        ratios = spread([a.clock / b.clock for a, b in pairs]), spread([a.processor / b.processor for a, b in pairs])
        compiling = first[name] - update * (arguments.every + 1)
        rows.append([name, f"{compiling:.1f}", f"{1e3 * update:.2f}", *ratios])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What TrainingMonitor costs in a training step of MobileNetV2.")
    for name, default, text in (
        ("--every", 50, "updates between two that are looked at"),
        ("--batch", 16, "images in a batch"),
        ("--size", 64, "pixels of an image along each side, at least 32"),
        ("--rounds", 9, "rounds"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--xla", action="store_true", help="compiles the training step with XLA")
    arguments = parser.parse_args(argv)
    if min(arguments.every, arguments.batch, arguments.rounds) < 1 or arguments.size < 32:
        parser.error("--every, --batch and --rounds must be at least 1, and --size at least 32")
    console = Console()
    console.width = max(console.width, 100)  # where the output is a file, it would be cut off after 80 characters
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as ending:
        rows = measure(arguments, Path(directory), console, ending)
    shown = Table(
        title=f"MobileNetV2, {arguments.size} x {arguments.size}, batches of {arguments.batch}, "
        f"{'XLA' if arguments.xla else 'graph'}, every {arguments.every}th update looked at, "
        f"{arguments.rounds} rounds, {os.cpu_count()} cores"
    )
    for heading in ("", "compiling, s", "update, ms", "ratio [quartiles]", "of processor time"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)


if __name__ == "__main__":
    main()

"""What `NonFiniteGuard` adds to the time of a training step, and how long its copy of the state takes.

    python examples/benchmarks/guard_overhead.py
    KERAS_BACKEND=jax python examples/benchmarks/guard_overhead.py

`mlp` is 784-512-512-10 with batches of 32, `conv` has four 3 x 3 convolutions of 32 channels on 16 x 16 images and
batches of 32; both with `keras.optimizers.Adam`, the mean squared error and random data. An alternative is one `fit` of
a fresh model with epochs of `--steps` steps, of which the first, with tracing, does not count; the median of the others
is its time. The alternatives take turns for `--rounds` rounds. Shown are the medians of the rounds in milliseconds per
step, and in brackets the median of the ratios to "no callback" in the same round.

"Every batch" is a callback that does nothing after each batch, for which Keras waits as for the progress bar. The guard
makes one copy in an epoch; the last column is the time of one, of which by default there is one more in 25 steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok
from keras_optkit.callbacks.state import TrainingState


def dense() -> keras.Model:
    layers = [keras.layers.Dense(512, "relu"), keras.layers.Dense(512, "relu"), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((784,)), *layers])


def convolutions() -> keras.Model:
    layers = [keras.layers.Conv2D(32, 3, padding="same", activation="relu") for _ in range(4)]
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)]
    return keras.Sequential([keras.Input((16, 16, 3)), *layers, *head])


#: How the model is made, and its batch size.
MODELS: dict[str, tuple[Callable[[], keras.Model], int]] = {
    "mlp": (dense, 32),
    "conv": (convolutions, 32),
}


class EveryBatch(keras.callbacks.Callback):
    """Does nothing, after every batch."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: D102
        pass


class Clock(keras.callbacks.Callback):
    """Milliseconds per step of each epoch."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps = steps
        self.times: list[float] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self.begun = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self.times.append(1e3 * (time.perf_counter() - self.begun) / self.steps)


ALTERNATIVES: dict[str, Callable[[], list[keras.callbacks.Callback]]] = {
    "no callback": list,
    "every batch": lambda: [EveryBatch()],
    "guard, find_layer=False": lambda: [ok.callbacks.NonFiniteGuard(every=10**9, find_layer=False)],
    "guard": lambda: [ok.callbacks.NonFiniteGuard(every=10**9)],
}


def in_turns(
    name: str,
    alternatives: Mapping[str, Callable[[], tuple[Any, list[keras.callbacks.Callback]]]],
    steps: int,
    rounds: int,
) -> tuple[dict[str, list[float]], keras.Model]:
    """The times of alternatives, optimizers with callbacks, round by round; and the last model."""
    make, batch = MODELS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *make().input_shape[1:])).astype("float32")
    y = rng.normal(size=(len(x), 10)).astype("float32")
    times: dict[str, list[float]] = {alternative: [] for alternative in alternatives}
    for _ in range(rounds):
        for alternative, given in alternatives.items():
            (optimizer, callbacks), clock, model = given(), Clock(steps), make()
            model.compile(optimizer, loss="mse")
            model.fit(x, y, batch_size=batch, epochs=4, verbose=0, callbacks=[*callbacks, clock])
            times[alternative].append(statistics.median(clock.times[1:]))
    return times, model


def cells(times: Mapping[str, Sequence[float]], reference: str) -> list[str]:
    """The median of each alternative, and in brackets that of its ratios to the reference in the same round."""
    found = []
    for mine in times.values():
        ratios = [a / b for a, b in zip(mine, times[reference], strict=True)]
        found.append(f"{statistics.median(mine):.2f} ({statistics.median(ratios):.2f})")
    return found


def measure(name: str, steps: int, rounds: int) -> tuple[dict[str, list[float]], float]:
    """The times of all alternatives, round by round, and of a copy."""
    alternatives = {alternative: (lambda make=make: ("adam", make())) for alternative, make in ALTERNATIVES.items()}
    times, model = in_turns(name, alternatives, steps, rounds)
    copies = []
    for _ in range(5):
        begun = time.perf_counter()
        TrainingState.of(model)
        copies.append(1e3 * (time.perf_counter() - begun))
    return times, statistics.median(copies)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What NonFiniteGuard adds to a training step.")
    parser.add_argument("--models", default=",".join(MODELS), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    shown = Table(title=f"Milliseconds per step, and ratios, on {keras.config.backend()}")
    for heading in ("model", *ALTERNATIVES, "one copy"):
        shown.add_column(heading, justify="right")
    for name in track(arguments.models.split(","), description="measuring", console=console):
        times, copy = measure(name, arguments.steps, arguments.rounds)
        shown.add_row(name, *cells(times, "no callback"), f"{copy:.1f}")
    console.print(shown)


if __name__ == "__main__":
    main()

"""What `SAM` adds to a training step: a second gradient, and moving the weights there and back.

    python examples/benchmarks/sharpness_aware.py
    KERAS_BACKEND=jax python examples/benchmarks/sharpness_aware.py

The models and the way of measuring are those of `guard_overhead.py`. The optimizers are `AdamW` and `SAM(AdamW)` of
this package. Shown are the medians of the rounds in milliseconds per step, and in brackets the median of the ratios to
`AdamW` in the same round. A ratio of 2.0 is what two gradients would cost if all else took no time.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence

import keras
import numpy as np
from guard_overhead import MODELS, Clock
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok

ALTERNATIVES: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "AdamW": lambda: ok.optimizers.AdamW(1e-3),
    "SAM(AdamW)": lambda: ok.optimizers.SAM(ok.optimizers.AdamW(1e-3)),
    "adaptive": lambda: ok.optimizers.SAM(ok.optimizers.AdamW(1e-3), rho=0.5, adaptive=True),
}


def measure(name: str, steps: int, rounds: int) -> dict[str, list[float]]:
    """The times of all alternatives, round by round."""
    make, batch = MODELS[name]
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps * batch, *make().input_shape[1:])).astype("float32")
    y = rng.normal(size=(len(x), 10)).astype("float32")
    times: dict[str, list[float]] = {alternative: [] for alternative in ALTERNATIVES}
    for _ in range(rounds):
        for alternative, optimizer in ALTERNATIVES.items():
            clock, model = Clock(steps), make()
            model.compile(optimizer(), loss="mse")
            model.fit(x, y, batch_size=batch, epochs=4, verbose=0, callbacks=[clock])
            times[alternative].append(statistics.median(clock.times[1:]))
    return times


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What SAM adds to a training step.")
    parser.add_argument("--models", default=",".join(MODELS), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    shown = Table(title=f"Milliseconds per step, and ratios, on {keras.config.backend()}")
    for heading in ("model", *ALTERNATIVES):
        shown.add_column(heading, justify="right")
    for name in track(arguments.models.split(","), description="measuring", console=console):
        times = measure(name, arguments.steps, arguments.rounds)
        cells = []
        for alternative in ALTERNATIVES:
            ratios = [a / b for a, b in zip(times[alternative], times["AdamW"], strict=True)]
            cells.append(f"{statistics.median(times[alternative]):.2f} ({statistics.median(ratios):.2f})")
        shown.add_row(name, *cells)
    console.print(shown)


if __name__ == "__main__":
    main()

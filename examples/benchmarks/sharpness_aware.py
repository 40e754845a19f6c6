"""What a second gradient, with moving the weights there and back, and products with the Hessian add to a step.

    python examples/benchmarks/sharpness_aware.py
    KERAS_BACKEND=jax python examples/benchmarks/sharpness_aware.py

The models and the way of measuring are those of `guard_overhead.py`. The optimizers are those of this package;
`SophiaH` computes a product in one of ten steps, `AdaHessian` in each. Shown are the medians of the rounds in
milliseconds per step, and in brackets the median of the ratios to `AdamW` in the same round. A ratio of 2.0 is what two
gradients would cost if all else took no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import keras
from guard_overhead import MODELS, cells, in_turns
from rich.console import Console
from rich.progress import track
from rich.table import Table

import keras_optkit as ok

ALTERNATIVES: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "AdamW": lambda: ok.optimizers.AdamW(1e-3),
    "SAM(AdamW)": lambda: ok.optimizers.SAM(ok.optimizers.AdamW(1e-3)),
    "adaptive": lambda: ok.optimizers.SAM(ok.optimizers.AdamW(1e-3), rho=0.5, adaptive=True),
    "GSAM(AdamW)": lambda: ok.optimizers.GSAM(ok.optimizers.AdamW(1e-3)),
    "SophiaH": lambda: ok.optimizers.SophiaH(0.06),
    "AdaHessian": lambda: ok.optimizers.AdaHessian(0.01),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What more than one gradient adds to a training step.")
    parser.add_argument("--models", default=",".join(MODELS), help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="of an epoch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    arguments = parser.parse_args(argv)
    console = Console()
    shown = Table(title=f"Milliseconds per step, and ratios, on {keras.config.backend()}")
    for heading in ("model", *ALTERNATIVES):
        shown.add_column(heading, justify="right")
    for name in track(arguments.models.split(","), description="measuring", console=console):
        alternatives: dict[str, Any] = {each: (lambda make=make: (make(), [])) for each, make in ALTERNATIVES.items()}
        times, _ = in_turns(name, alternatives, arguments.steps, arguments.rounds)
        shown.add_row(name, *cells(times, "AdamW"))
    console.print(shown)


if __name__ == "__main__":
    main()

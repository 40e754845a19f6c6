"""Find a learning rate and a batch size for the five-layer CNN on handwritten digits, and see what other rates do.

Sweeps the learning rate of Adam, draws the curve, trains afresh with the suggested rate, a tenth and ten times of it,
and measures batch sizes. Takes about a minute on two CPU cores.

    python examples/find_learning_rate.py
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from five_layer_cnn import DIGITS, Data, Row, build, digits, positive
from rich.console import Console
from rich.table import Table

import keras_optkit as ok


def draw(found: ok.finding.LearningRates, path: Path) -> None:
    """The curve with its suggestions, and beside it the mean of all losses so far, which other finders read."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogx(found.learning_rates, mean_so_far(found), "k--", linewidth=1, label="mean of all so far")
    found.plot(axes)
    axes.set_ylim(0, 1.5 * found.losses[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def mean_so_far(found: ok.finding.LearningRates) -> np.ndarray:
    """What Keras's logs hold: the mean of the losses since the epoch began."""
    return np.cumsum(found.losses) / np.arange(1, len(found.losses) + 1)


def trained(data: Data, rate: float, epochs: int) -> float:
    """Validation accuracy of a fresh network after so many epochs with a rate."""
    keras.utils.set_random_seed(0)
    model = build(DIGITS, Row.OPTIMIZER, steps=0)
    model.optimizer.learning_rate = rate
    order = ok.data.Shuffled(*data.train, batch_size=DIGITS.batch_size)
    model.fit(order, epochs=epochs, verbose=0)
    return float(model.evaluate(*data.validation, verbose=0, return_dict=True)["accuracy"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A learning rate and a batch size for a small CNN.")
    parser.add_argument("--steps", type=positive, default=100, help="of the sweep (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=3, help="with each rate (default: %(default)s)")
    parser.add_argument("--max-size", type=positive, default=512, help="of a batch (default: %(default)s)")
    parser.add_argument(
        "--picture", type=Path, default=Path("runs/find_learning_rate.png"), help="of the curve (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    console = Console()
    data = digits(seed=0)
    keras.utils.set_random_seed(0)
    model = build(DIGITS, Row.OPTIMIZER, steps=0)

    found = ok.find_learning_rate(
        model, data.train, low=1e-6, high=1.0, steps=arguments.steps, batch_size=DIGITS.batch_size, verbose=0
    )
    console.print(str(found), highlight=False)
    rates = found.learning_rates
    console.print(
        f"The smoothed loss is lowest at {rates[np.argmin(found.smoothed)]:.1e}, "
        f"the mean of all losses so far at {rates[np.argmin(mean_so_far(found))]:.1e}.\n"
    )
    draw(found, arguments.picture)
    assert found.suggestion is not None

    table = Table("learning rate", "validation accuracy %", title=f"After {arguments.epochs} epochs")
    for factor in (0.1, 1, 10):
        rate = factor * found.suggestion
        table.add_row(f"{rate:.1e}", f"{100 * trained(data, rate, arguments.epochs):.1f}")
    console.print(table)

    sizes = ok.find_batch_size(model, data.train, max_size=arguments.max_size, verbose=0)
    console.print(str(sizes), highlight=False)
    console.print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()

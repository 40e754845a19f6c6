"""The best learning rate at several widths, with and without muP: `python examples/learning_rate_transfer.py`.

An MLP with three hidden layers is trained on scikit-learn's handwritten digits with Adam, at each width with each rate,
from the same initial weights. Prints the training loss of the last epoch and the best rates; `--figure` draws them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from sklearn.datasets import load_digits

import keras_optkit as ok


def network(width: int) -> keras.Model:
    """The MLP, with initial weights of variance 2 / fan_in."""
    hidden = [keras.layers.Dense(width, "relu", kernel_initializer="he_normal") for _ in range(3)]
    return keras.Sequential([keras.Input((64,)), *hidden, keras.layers.Dense(10, kernel_initializer="he_normal")])


def losses(width: int, base: int, rates: list[float], epochs: int, seed: int, *, scaled: bool) -> list[float]:
    """The training loss of the last epoch for each rate."""
    images, digits = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32")
    keras.utils.set_random_seed(seed)
    model = network(width)
    groups = ok.mup(model, network(base)) if scaled else []
    model.compile(
        ok.optimizers.Adam(1e-3, groups=groups or None), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    initial, found = model.get_weights(), []
    state = None
    for rate in rates:
        model.set_weights(initial)
        if state is not None:
            for variable, value in zip(model.optimizer.variables, state, strict=True):
                variable.assign(value)
        else:
            model.optimizer.build(model.trainable_variables)
            state = [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
        model.optimizer.learning_rate = rate
        keras.utils.set_random_seed(seed)
        history = model.fit(images, digits, batch_size=128, epochs=epochs, verbose=0).history
        found.append(history["loss"][-1])
    return found


def draw(found: dict[str, dict[int, np.ndarray]], rates: list[float], path: str) -> None:
    """Draws the losses by rate, a line for each width, without muP at the left."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, (title, by_width) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        for width, each in by_width.items():
            (line,) = axis.plot(rates, each, marker=".", label=f"width {width}")
            best = int(np.nanargmin(each))
            axis.plot(rates[best], each[best], "o", color=line.get_color(), markersize=9)
        axis.set(title=title, xscale="log", yscale="log", xlabel="learning rate", ylim=(None, 3))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("training loss, last epoch")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the losses and the best rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument(
        "--powers", type=int, nargs=2, default=[-13, -4], help="the first and last power of 2 of the rate"
    )
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--figure", help="where to write the figure")
    given = parser.parse_args(arguments)
    powers = list(range(given.powers[0], given.powers[1] + 1))
    rates = [2.0**power for power in powers]
    found: dict[str, dict[int, np.ndarray]] = {}
    for title, scaled in (("without muP", False), ("with muP", True)):
        found[title] = {}
        print(f"{title}\n{'width':>6} " + " ".join(f"{f'2^{power}':>7}" for power in powers) + "   best", flush=True)
        for width in given.widths:
            each = np.mean(
                [
                    losses(width, given.widths[0], rates, given.epochs, seed, scaled=scaled)
                    for seed in range(given.seeds)
                ],
                0,
            )
            found[title][width] = each
            row = " ".join(f"{loss:7.3f}" for loss in each)
            print(f"{width:6} {row}   2^{powers[int(np.nanargmin(each))]}", flush=True)
    if given.figure:
        draw(found, rates, given.figure)


if __name__ == "__main__":
    main()

"""Six experiments on how networks begin and how they are regularised: `python examples/experiments.py --help`.

Each trains small networks on scikit-learn's handwritten digits, prints a table, and draws it with `--figure`, in a few
minutes on two cores. The chapter that explains them is docs/guide/experiments.md.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import keras_optkit as ok

#: By the name of a row, the curves of all seeds.
Curves = dict[str, np.ndarray]


def digits(train: int = 1437, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Standardised images and labels, for training and for testing."""
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).astype("float32")
    order = np.random.default_rng(seed).permutation(len(labels))
    return images[order[:train]], labels[order[:train]], images[order[train:]], labels[order[train:]]


def classifier(*hidden: keras.layers.Layer) -> keras.Model:
    """The layers between the pixels and ten logits."""
    return keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(10)])


class Runs:
    """Runs of one architecture, which is compiled once; each begins with the weights that its seed draws.

    Args:
        make: Makes the model.
        optimizer: Its optimizer.
        loss: Its loss; None: the cross-entropy of logits.
    """

    def __init__(self, make: Callable[[], keras.Model], optimizer: Any, loss: Any = None):
        self.make, self.model = make, make()
        loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        metrics = [] if loss == "mse" else ["accuracy"]
        self.model.compile(optimizer, loss, metrics=metrics, jit_compile=False)  # XLA compiles longer than these runs
        optimizer.build(self.model.trainable_variables)
        self._state = [keras.ops.convert_to_numpy(variable) for variable in optimizer.variables]

    def begin(self, seed: int, rate: float | None = None) -> keras.Model:
        """The model as it is before training."""
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make().get_weights())
        for variable, value in zip(self.model.optimizer.variables, self._state, strict=True):
            variable.assign(value)
        if rate is not None:
            self.model.optimizer.learning_rate = rate
        return self.model

    def fit(self, seed: int, rate: float | None, x: np.ndarray, y: np.ndarray, **given: Any) -> dict[str, list[float]]:
        """Trains, and returns the history."""
        return self.begin(seed, rate).fit(x, y, verbose=0, **given).history


# -- the experiments --------------------------------------------------------------------------------------------------


def deep_relu(seeds: int) -> Curves:
    """Xavier's and He's initialization of 30 ReLU layers (He et al. 2015, figure 3)."""
    x, y, *_ = digits()
    found: Curves = {}
    print(
        f"{'initializer':14} {'optimizer':9} {'std of logits':>13} {'loss, last epoch':>24}   first warning of inspect"
    )
    for name, optimizer in (("SGD", keras.optimizers.SGD(0.003, 0.9)), ("Adam", keras.optimizers.Adam(1e-3))):
        for title, initializer in (("Xavier", "glorot_normal"), ("He", "he_normal")):

            def make(initializer: str = initializer) -> keras.Model:
                hidden = [layers.Dense(64, "relu", kernel_initializer=initializer) for _ in range(30)]
                return classifier(*hidden)

            runs = Runs(make, type(optimizer).from_config(optimizer.get_config()))
            model = runs.begin(0)
            report = ok.inspect(model, x[:64], y[:64])
            std = float(np.std(keras.ops.convert_to_numpy(model(x[:256]))))
            curves = [runs.fit(seed, None, x, y, batch_size=32, epochs=15)["loss"] for seed in range(seeds)]
            found[f"{title}, {name}"] = np.array(curves)
            warned = report.warnings[0].rule if report.warnings else "none"
            print(
                f"{title:14} {name:9} {std:13.1e} {_each(found[f'{title}, {name}'][:, -1]):>24}   {warned}", flush=True
            )
    return found


def dead_relus(seeds: int) -> Curves:
    """The share of dead units after training with rates that are too high, as `inspect` sees it."""
    x, y, x_test, y_test = digits()
    rates = [0.03, 0.1, 0.2, 0.3]
    found: Curves = {}
    print(f"{'activation':10} {'rate':>5} {'units dead':>24} {'accuracy':>24}   warnings of dead_units")
    for activation in ("relu", "leaky_relu"):

        def make(activation: str = activation) -> keras.Model:
            hidden = [layers.Dense(128, activation, kernel_initializer="he_normal") for _ in range(3)]
            return classifier(*hidden)

        runs, shares = Runs(make, keras.optimizers.SGD(0.1, 0.9)), []
        for rate in rates:
            dead, accuracy, warned = [], [], 0
            for seed in range(seeds):
                runs.fit(seed, rate, x, y, batch_size=32, epochs=5)
                report = ok.inspect(runs.model, x[:512], y[:512])
                share = float(np.mean([layer.dead or 0.0 for layer in report.model.layers[:3]]))
                dead.append(share if np.isfinite(report.model.loss_value or np.nan) else np.nan)
                accuracy.append(runs.model.evaluate(x_test, y_test, verbose=0)[1])
                warned += any(each.rule == "dead_units" for each in report.warnings)
            shares.append(dead)
            row = f"{activation:10} {rate:5} {_each(dead, '.0%'):>24} {_each(accuracy, '.0%'):>24}"
            print(f"{row}   {warned} of {seeds}", flush=True)
        found[activation] = np.array(shares).T
    return found


def deep_linear(seeds: int) -> Curves:
    """Orthogonal and Gaussian weights in deep linear networks (Saxe et al. 2014): updates until the loss is 0.05."""
    x, y, *_ = digits()
    targets = np.eye(10, dtype="float32")[y]
    depths, rates = [2, 8, 32], [0.003, 0.01, 0.03, 0.1]
    kinds = {
        "orthogonal": ok.initializers.Orthogonal,
        "Gaussian": lambda: keras.initializers.VarianceScaling(1.0, "fan_in", "untruncated_normal"),
    }
    found: Curves = {}
    print(f"{'weights':10} {'layers':>6} {'updates':>18} {'best rate':>9}")
    for title, kind in kinds.items():
        needed = []
        for depth in depths:

            def make(depth: int = depth, kind: Any = kind) -> keras.Model:
                hidden = [layers.Dense(64, use_bias=False, kernel_initializer=kind()) for _ in range(depth)]
                return classifier(*hidden)

            runs = Runs(make, keras.optimizers.SGD(0.1), "mse")
            by_rate = [[_epochs_until(0.05, runs, rate, seed, x, targets) for seed in range(seeds)] for rate in rates]
            best = min(range(len(rates)), key=lambda place: _with_failures(by_rate[place]))
            needed.append([45 * epochs for epochs in by_rate[best]])
            print(f"{title:10} {depth:6} {_each(needed[-1], '.0f'):>18} {rates[best]:9}", flush=True)
        found[title] = np.array(needed).T
    return found


def _with_failures(needed: list[float]) -> tuple[int, float]:
    """What makes one rate better than another: fewer seeds that fail, then fewer epochs of the others."""
    there = [epochs for epochs in needed if np.isfinite(epochs)]
    return len(needed) - len(there), float(np.mean(there)) if there else np.inf


def _epochs_until(loss: float, runs: Runs, rate: float, seed: int, x: np.ndarray, y: np.ndarray) -> float:
    """How many epochs of 45 updates are trained until their mean loss is below; infinite if 20 are not enough."""
    stop = ok.callbacks.EarlyStopping("loss", patience=20, target=loss, divergence=10.0)
    losses = runs.fit(seed, rate, x, y, batch_size=32, epochs=20, callbacks=[stop])["loss"]
    return float(len(losses)) if losses[-1] < loss else np.inf


def overfitting(seeds: int) -> Curves:
    """Dropout and weight decay with 500 digits for training and 1,297 for testing."""
    x, y, x_test, y_test = digits(500)
    found: Curves = {}
    print(f"{'regularization':22} {'training accuracy':>17} {'test accuracy':>32} {'test loss, last and lowest':>26}")
    for title, dropout, decay in (
        ("none", 0.0, 0.0),
        ("dropout 0.5", 0.5, 0.0),
        ("decay 0.1", 0.0, 0.1),
        ("decay 1", 0.0, 1.0),
        ("dropout 0.5, decay 0.1", 0.5, 0.1),
    ):

        def make(dropout: float = dropout) -> keras.Model:
            hidden = [
                [layers.Dense(256, "relu", kernel_initializer="he_normal"), layers.Dropout(dropout)] for _ in "12"
            ]
            return classifier(*hidden[0], *hidden[1])

        runs = Runs(make, ok.optimizers.AdamW(1e-3, weight_decay=decay))
        given = {"validation_data": (x_test, y_test), "batch_size": 50, "validation_batch_size": 1297, "epochs": 60}
        histories = [runs.fit(seed, None, x, y, **given) for seed in range(seeds)]
        losses = np.array([history["val_loss"] for history in histories])
        test = [history["val_accuracy"][-1] for history in histories]
        train = np.mean([history["accuracy"][-1] for history in histories])
        lowest = np.mean(np.min(losses, axis=1))
        row = f"{title:22} {train:17.1%} {_each(test, '.1%'):>32}"
        print(f"{row} {np.mean(losses[:, -1]):17.3f} {lowest:8.3f}", flush=True)
        found[title] = losses
    return found


def batch_norm(seeds: int) -> Curves:
    """The training loss after 5 epochs by learning rate, with and without batch normalization."""
    x, y, *_ = digits()
    rates = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    found: Curves = {}
    print(f"{'network':20} " + " ".join(f"{rate:>7}" for rate in rates) + "   (mean loss of the fifth epoch)")
    for title, normalized in (("plain", False), ("batch normalization", True)):

        def make(normalized: bool = normalized) -> keras.Model:
            hidden: list[Any] = []
            for _ in range(6):
                norm = [layers.BatchNormalization()] if normalized else []
                hidden += [layers.Dense(64, kernel_initializer="he_normal"), *norm, layers.ReLU()]
            return classifier(*hidden)

        runs = Runs(make, keras.optimizers.SGD(0.1))
        losses = np.array(
            [
                [runs.fit(seed, rate, x, y, batch_size=32, epochs=5)["loss"][-1] for rate in rates]
                for seed in range(seeds)
            ]
        )
        found[title] = losses
        print(f"{title:20} " + " ".join(f"{loss:7.3f}" for loss in np.mean(losses, axis=0)), flush=True)
    return found


def large_batch(seeds: int) -> Curves:
    """A batch of 512 with 16 times the rate of a batch of 32, with and without warm-up (Goyal et al. 2017)."""
    x, y, x_test, y_test = digits()
    found: Curves = {}
    print(
        f"{'batch':>5} {'rate':>5} {'warm-up':>9} {'loss, last epoch':>40} {'highest loss':>12} {'test accuracy':>13}"
    )
    for base in (0.02, 0.05):
        for batch, rate, warm_up in ((32, base, 0), (512, 16 * base, 0), (512, 16 * base, 15)):
            schedule = ok.schedules.Warmup(rate, steps=warm_up) if warm_up else rate

            def make() -> keras.Model:
                return classifier(*[layers.Dense(128, "relu", kernel_initializer="he_normal") for _ in range(4)])

            runs = Runs(make, keras.optimizers.SGD(schedule, 0.9))
            given = {"batch_size": batch, "epochs": 20}
            losses = np.array([runs.fit(seed, None, x, y, **given)["loss"] for seed in range(seeds)])
            accuracy = runs.model.evaluate(x_test, y_test, verbose=0)[1]
            kind = f"{warm_up} updates" if warm_up else "none"
            row = f"{batch:5} {rate:5.2f} {kind:>9} {_each(losses[:, -1]):>40}"
            print(f"{row} {np.max(losses):12.3g} {accuracy:13.1%}", flush=True)
            found[f"batch {batch}, rate {rate:.2f}{', warm-up' * bool(warm_up)}"] = losses
    return found


# -- tables and figures -----------------------------------------------------------------------------------------------


def _each(values: Any, form: str = ".3g") -> str:
    """The values of all seeds."""
    return " ".join(format(value, form) for value in values)


#: By the name of an experiment: the function, and of its figure the values on the axis below, both labels, and whether
#: the axes are logarithmic.
EXPERIMENTS: dict[str, tuple[Callable[[int], Curves], Any, str, str, str, str]] = {
    "deep-relu": (deep_relu, None, "epoch", "training loss", "linear", "log"),
    "dead-relus": (dead_relus, [0.03, 0.1, 0.2, 0.3], "learning rate", "share of dead units", "log", "linear"),
    "deep-linear": (deep_linear, [2, 8, 32], "layers", "updates until the loss is 0.05", "linear", "log"),
    "overfitting": (overfitting, None, "epoch", "test loss", "linear", "log"),
    "batch-norm": (batch_norm, [0.01, 0.03, 0.1, 0.3, 1.0, 3.0], "learning rate", "training loss", "log", "log"),
    "large-batch": (large_batch, None, "epoch", "training loss", "linear", "log"),
}


def draw(name: str, found: Curves, path: str) -> None:
    """Draws the mean of all seeds as a line, and each seed as a faint one."""
    from matplotlib.figure import Figure
    from PIL import Image

    _, places, below, left, x_scale, y_scale = EXPERIMENTS[name]
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for title, curves in found.items():
        x = places or list(range(1, curves.shape[1] + 1))
        (line,) = axes.plot(x, np.mean(curves, axis=0), marker="." if places else "", label=title)
        for curve in curves:
            axes.plot(x, curve, color=line.get_color(), alpha=0.25, linewidth=0.8)
    axes.set(xscale=x_scale, yscale=y_scale, xlabel=below, ylabel=left)
    if left.endswith("loss"):
        axes.set_ylim(top=min(axes.get_ylim()[1], 10.0))  # of a run that diverges, the beginning is enough
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, dpi=90)
    Image.open(file).convert("RGB").quantize(128).save(path, "PNG", optimize=True)  # a third of the size


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one experiment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--figure", help="where to write the figure")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {given.seeds}.")
    found = EXPERIMENTS[given.name][0](given.seeds)
    if given.figure:
        draw(given.name, found, given.figure)


if __name__ == "__main__":
    main()

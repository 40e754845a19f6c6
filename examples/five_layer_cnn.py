"""The five-layer CNN of the worked examples, and the table of what each technique of training adds.

Shared by `quickstart.py` (handwritten digits) and `fashion_mnist.py`; it is not run by itself. The network is always
three convolutions and two dense layers. The rows of the table are cumulative: each adds one technique to the row above,
on the same data and for the same number of epochs.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import keras_optkit as ok


class Row(enum.IntEnum):
    """The rows of the table; `row >= Row.OPTIMIZER` says whether a row has a technique."""

    BASE = 0
    INITIALISATION = 1
    OPTIMIZER = 2
    REGULARISATION = 3
    SCHEDULE = 4

    @property
    def label(self) -> str:
        """The row's name in the table."""
        return (
            "base",
            "+ initialisation",
            "+ optimizer",
            "+ regularisation and augmentation",
            "+ early stopping, schedule = all together",
        )[self]


class Data(NamedTuple):
    """Images in [0, 1] of shape (n, height, width, 1) and one-hot labels, as three (images, labels) pairs."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What may differ between data sets, and what a hyperparameter search may change."""

    image_shape: tuple[int, int, int]
    widths: tuple[int, int, int]  # channels of the three convolutions
    windows: tuple[int, int, int]  # their sizes in pixels
    pools: tuple[bool, bool, bool]  # which of them are followed by 2x2 pooling
    augmentation: Callable[[], list[keras.layers.Layer]]  # layers that act during training only
    batch_size: int
    epochs: int
    pool_padding: str = "same"  # "valid" drops a last row and column that are left over
    units: int = 256  # of the first dense layer
    learning_rate: float = 1e-3  # of Adam while there is no schedule
    peak_rate: float = 4e-3  # of the one-cycle schedule
    l2: float = 1e-3
    dropout: float = 0.5
    label_smoothing: float = 0.0


def digits(seed: int) -> Data:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels: 20 % for the test, 15 % of the rest for validation."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("float32") / 16
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    return Data(*split(x, y, 0.15, seed), (x_test, one_hot(y_test)))


def split(
    x: np.ndarray, y: np.ndarray, validation: float, seed: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Training and validation data with the same share of every class."""
    x, x_val, y, y_val = train_test_split(x, y, test_size=validation, stratify=y, random_state=seed)
    return (x, one_hot(y)), (x_val, one_hot(y_val))


def one_hot(labels: np.ndarray) -> np.ndarray:
    """Labels as rows of zeros and a one, the form that label smoothing needs."""
    return keras.utils.to_categorical(labels, 10)


DIGITS = Recipe(
    image_shape=(8, 8, 1),
    widths=(32, 64, 64),
    windows=(3, 3, 3),
    pools=(True, False, False),  # 8x8 becomes 4x4, so that the dense layers are 1024 -> 256 -> 10
    # no mirror images: a mirrored 2 is not a digit
    augmentation=lambda: [keras.layers.RandomRotation(0.03), keras.layers.RandomTranslation(0.1, 0.1)],
    batch_size=32,
    epochs=20,
)


def build(recipe: Recipe, row: Row, steps: int) -> keras.Model:
    """The network of one row, compiled.

    Args:
        recipe: Sizes and rates.
        row: The last technique that is switched on.
        steps: How many times the weights will be updated, which is the length of the schedule.
    """
    regularised = row >= Row.REGULARISATION
    conv_init: type[keras.initializers.Initializer]
    dense_init: type[keras.initializers.Initializer]
    if row >= Row.INITIALISATION:
        conv_init, dense_init = ok.initializers.HeNormal, ok.initializers.XavierNormal
    else:
        conv_init = dense_init = ok.initializers.RandomNormal  # standard deviation 0.05 in every layer

    def penalty() -> keras.Regularizer | None:
        return ok.regularizers.L2(recipe.l2) if regularised else None

    def conv(width: int, window: int) -> keras.layers.Layer:
        return keras.layers.Conv2D(
            width, window, padding="same", kernel_initializer=conv_init(), kernel_regularizer=penalty()
        )

    def dense(units: int) -> keras.layers.Layer:
        return keras.layers.Dense(units, kernel_initializer=dense_init(), kernel_regularizer=penalty())

    layers: list[keras.layers.Layer] = [keras.Input(recipe.image_shape)]
    if regularised:
        layers += recipe.augmentation()
    for width, window, pool in zip(recipe.widths, recipe.windows, recipe.pools, strict=True):
        layers.append(conv(width, window))
        if pool:  # before the ReLU, which gives the same and costs a quarter
            layers.append(keras.layers.MaxPooling2D(padding=recipe.pool_padding))
        if regularised:
            layers.append(ok.layers.GhostBatchNormalization(momentum=0.9))
        layers.append(keras.layers.ReLU())
    layers += [keras.layers.Flatten(), dense(recipe.units), keras.layers.ReLU()]
    if regularised:
        layers.append(ok.layers.ScheduledDropout(recipe.dropout))
    layers.append(dense(10))

    if row >= Row.SCHEDULE:
        optimizer = ok.optimizers.Adam(ok.schedules.OneCycle(recipe.peak_rate, steps))
    elif row >= Row.OPTIMIZER:
        optimizer = ok.optimizers.Adam(recipe.learning_rate)
    else:
        optimizer = ok.optimizers.SGD(0.01)
    model = keras.Sequential(layers)
    smoothing = recipe.label_smoothing if regularised else 0.0
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


class Result(NamedTuple):
    """One training run."""

    row: Row
    accuracy: float  # on the test set, measured once, at the end
    seconds: float
    curve: list[float]  # validation accuracy after each epoch


def steps(recipe: Recipe, data: Data) -> int:
    """How many times a run updates the weights."""
    return recipe.epochs * math.ceil(len(data.train[0]) / recipe.batch_size)


def train(recipe: Recipe, row: Row, data: Data, seed: int, logs: Path, after_epoch: Callable[[], None]) -> Result:
    """Trains one row with one seed, watched by TensorBoard, and measures it on the test set."""
    keras.backend.clear_session()
    keras.utils.set_random_seed(seed)
    log_dir = logs / f"{row.value}-{row.name.lower()}" / f"seed-{seed}"
    for old in (*log_dir.glob("events.out.tfevents.*"), *log_dir.glob("monitor.jsonl")):
        old.unlink()  # TrainingMonitor would continue an earlier run's curves
    start = time.perf_counter()
    model = build(recipe, row, steps(recipe, data))
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_end=lambda *_: after_epoch()),
        ok.callbacks.TrainingMonitor(log_dir, every=10, hparams=None),
    ]
    if row >= Row.SCHEDULE:  # stop when validation stands still, and keep the best weights
        callbacks.append(
            ok.callbacks.EarlyStopping("val_loss", patience=max(3, recipe.epochs // 3), restore_best_weights=True)
        )
    history = model.fit(
        *data.train,
        validation_data=data.validation,
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        callbacks=callbacks,
        verbose=0,
    )
    seconds = time.perf_counter() - start
    accuracy = model.evaluate(*data.test, batch_size=500, verbose=0, return_dict=True)["accuracy"]
    return Result(row, float(accuracy), seconds, history.history["val_accuracy"])


def compare(
    recipe: Recipe, data_for: Callable[[int], Data], seeds: Sequence[int], logs: Path, console: Console
) -> list[Result]:
    """Trains every row with every seed behind a progress bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    )
    results = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(Row) * len(seeds) * recipe.epochs)
        for done, (seed, row) in enumerate(((s, r) for s in seeds for r in Row), start=1):
            progress.update(bar, description=f"seed {seed}: {row.label}")
            results.append(train(recipe, row, data_for(seed), seed, logs, lambda: progress.advance(bar)))
            progress.update(bar, completed=done * recipe.epochs)  # early stopping leaves some out
    return results


def table(results: Sequence[Result], title: str) -> Table:
    """Mean and standard deviation over the seeds of the test accuracy, and the mean time, of every row."""
    shown = Table(title=title)
    shown.add_column("training", no_wrap=True)
    for heading in ("accuracy, %", "seconds", "epochs"):
        shown.add_column(heading, justify="right")
    for row in Row:
        runs = [result for result in results if result.row == row]
        accuracy = [100 * run.accuracy for run in runs]
        spread = f" ± {np.std(accuracy, ddof=1):.2f}" if len(runs) > 1 else ""
        shown.add_row(
            row.label,
            f"{np.mean(accuracy):.2f}{spread}",
            f"{np.mean([run.seconds for run in runs]):.1f}",
            f"{np.mean([len(run.curve) for run in runs]):.0f}",
        )
    return shown


def draw(results: Sequence[Result], path: Path) -> None:
    """A picture of the validation accuracy against the epoch, mean over the seeds, one curve a row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for row in Row:
        curves = [result.curve for result in results if result.row == row]
        epochs = min(map(len, curves))  # as far as no seed has stopped early
        axes.plot(range(1, epochs + 1), np.mean([curve[:epochs] for curve in curves], axis=0), label=row.label)
    axes.set(xlabel="epoch", ylabel="validation accuracy")
    axes.legend()
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def positive(text: str) -> int:
    """A number of seeds or epochs on a command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)

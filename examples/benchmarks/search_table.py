"""The space of `search.py`, and the files of what is recorded: a line for each point, and one compressed table."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_optkit.files import atomic_write
from keras_optkit.tuning import Choice, Float, Space

EPOCHS = 27
METRICS = ("val_accuracy", "val_loss")

SPACE = Space(
    learning_rate=Float(1e-4, 1e-1, log=True),
    decay=Float(0.8, 1.0),  # the rate is multiplied by it after each epoch
    beta_1=Float(0.5, 0.99),
    weight_decay=Float(1e-4, 1.0, log=True),
    dropout=Float(0.0, 0.8),
    label_smoothing=Float(0.0, 0.5),
    noise=Float(0.0, 1.0),  # the standard deviation of what is added to the images
    batch_size=Choice([8, 16, 32, 64]),
    filters=Choice([4, 8, 16]),
    activation=Choice(["relu", "gelu", "tanh"]),
)

Point = dict[str, Any]
Line = dict[str, Any]


def points_of(count: int) -> Iterator[Point]:
    """The points to record; each depends on its number alone."""
    for number in range(count):
        point = dict(SPACE.sample(np.random.default_rng([16, number])))
        yield {name: float(f"{x:.4g}") if isinstance(SPACE[name], Float) else x for name, x in point.items()}


def finished(path: Path) -> dict[int, Line]:
    """The lines of a file by the number of their point; a last one that was not finished is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {line["number"]: line for line in found}


def append(path: Path, line: Line) -> None:
    """Adds one line to a file, also behind one that was not finished."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.truncate(path.read_bytes().rfind(b"\n") + 1)
        file.write((json.dumps(line) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, lines: Mapping[int, Line]) -> None:
    """Writes the table: a column for each hyperparameter, and a row of values for each curve.

    A curve that ended early, with a loss that was not finite, is filled up with NaN.
    """
    numbers = sorted(lines)
    columns: dict[str, Any] = {"number": np.array(numbers, "int32")}
    columns |= {name: np.array([lines[number]["point"][name] for number in numbers]) for name in SPACE}
    for metric in METRICS:
        table = np.full((len(numbers), EPOCHS), np.nan, "float32")
        for row, number in enumerate(numbers):
            curve = lines[number][metric]
            table[row, : len(curve)] = curve
        columns[metric] = table
    with atomic_write(path) as file:
        np.savez_compressed(file, **columns)


def recorded(path: Path) -> dict[int, Line]:
    """The lines that a table was made of; none if there is no such file."""
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as held:
        columns = {name: held[name] for name in held.files}
    found = {}
    for row, number in enumerate(columns["number"].tolist()):
        line: Line = {"number": number, "point": {name: columns[name][row].item() for name in SPACE}}
        for metric in METRICS:
            curve = columns[metric][row]
            line[metric] = [float(f"{value:.5g}") for value in curve[np.isfinite(curve)]]
        found[number] = line
    return found


def read(path: Path) -> tuple[list[Point], np.ndarray]:
    """The points of a table, and the accuracy of each after each epoch; 0 where its loss was no longer finite."""
    with np.load(path, allow_pickle=False) as held:
        columns = {name: held[name].tolist() for name in SPACE}
        scores = held["val_accuracy"].astype("float64")
    points = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return points, np.nan_to_num(scores, nan=0.0)

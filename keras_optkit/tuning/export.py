"""The trials of a search for other programs: pandas, CSV and JSON."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_optkit import arguments
from keras_optkit.files import atomic_write, finite

if TYPE_CHECKING:
    from keras_optkit.tuning.result import Result


def needed(package: str, user: str, install: str = "") -> Any:
    """An optional package.

    Raises:
        ImportError: If it is not there, with what to install.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{user} needs {package}: pip install {install or package}") from error


def file_of(path: Any) -> Path:
    """The argument `path` as the name of a file that can be written; of a link, what it points to.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or of something else than a file.
        OSError: If it is a directory's, or if its directory does not exist.
    """
    given = arguments.path("path", path)
    place = Path(os.path.realpath(given))
    if place.is_dir() or given.endswith(("/", os.sep)):
        raise IsADirectoryError(f"path must be that of a file, got the directory {given!r}.")
    if place.exists() and not place.is_file():
        raise ValueError(f"path must be that of a file, got {given!r}, which is something else.")
    if not place.parent.is_dir():
        kind = NotADirectoryError if place.parent.exists() else FileNotFoundError
        raise kind(f"path must be in a directory that exists, got {given!r}; make {str(place.parent)!r} first.")
    return place


def write(path: Any, text: str) -> None:
    """Writes a text as a whole or not at all.

    Raises:
        TypeError: If `path` is no path.
        OSError: If it cannot be written; what was there is kept.
    """
    with atomic_write(file_of(path)) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # half of a character pair may be in a failure's message


def columns(result: Result) -> dict[str, list[Any]]:
    """The columns of the table of all trials; None where a trial has no value."""
    trials = result.trials
    several = any(len(trial.scores) > 1 for trial in trials)
    spreads = {"spread": [trial.spread for trial in trials]} if several else {}
    metrics = dict.fromkeys([*result.objectives, *(name for trial in trials for name in trial.metrics)])
    return {
        "number": [trial.number for trial in trials],
        "status": [trial.status for trial in trials],
        "score": [trial.score for trial in trials],
        **spreads,
        **{f"values.{name}": [trial.values.get(name) for trial in trials] for name in result.space},
        **{f"metrics.{name}": [trial.metrics.get(name) for trial in trials] for name in metrics},
        "epochs": [trial.epochs for trial in trials],
        "best_epoch": [trial.best_epoch for trial in trials],
        "seconds": [trial.seconds for trial in trials],
        "message": [trial.message for trial in trials],
    }


def frame(result: Result) -> Any:
    """The table as a data frame.

    Raises:
        ImportError: Without pandas.
    """
    pandas = needed("pandas", "result.to_pandas")
    typed = {name: pandas.Series(values, dtype=_dtype(values)) for name, values in columns(result).items()}
    return pandas.DataFrame(typed)


def _dtype(values: Sequence[Any]) -> str | None:
    """The type of a column; None: as pandas has it, which makes floats of integers where one is missing."""
    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return "float64"
    names = {bool: "boolean", int: "Int64"}
    return names.get(kinds.pop()) if len(kinds) == 1 and None in values else None


def csv_of(result: Result) -> str:
    """The table as comma-separated values."""
    table = columns(result)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


def json_of(result: Result) -> str:
    """The space and the trials as JSON."""
    held = {
        "objective": result.objective,
        "direction": result.direction,
        "objectives": result.objectives,
        "seed": result.seed,
        "best": result.best_trial.number,
        "space": result.space.get_config(),
        "trials": [finite(asdict(trial)) for trial in result.trials],
    }
    return json.dumps(held, indent=1, allow_nan=False) + "\n"

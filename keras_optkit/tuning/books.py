"""The files that a search is continued from: whole at any moment, read with their names, and in one search's hands."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import keras_tuner

from keras_optkit.files import atomic_write, leftovers
from keras_optkit.private import with_trials_saved_by

Stateful: Any = keras_tuner.Oracle.__mro__[1]  # what saves an oracle and a tuner; KerasTuner does not export it


_OF_A_TRIAL = ("trial.json", "model.keras", "*.weights.h5", "*.built.json")
_NAMES = re.compile(r"(oracle|trial|tuner\w*|(model|end_\d+)\.built)\.json|(model|end_\d+)\.(keras|weights\.h5)")
_IN_ORACLE = ("start_order", "end_order", "ongoing_trials", "hyperparameters")
_IN_TRIAL = ("trial_id", "hyperparameters", "metrics", "status")


class CannotWriteError(keras_tuner.errors.FatalError, OSError):
    """A file of the search cannot be written, e.g. since the disk is full, which ends the search and not the trial."""


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Names the file in what the system says about it."""
    try:
        yield
    except OSError as error:
        raise CannotWriteError(f"{str(path)!r} cannot be written, and the search ends: {error}") from error


def write_json(path: str | Path, state: Any) -> str:
    """Writes a file of JSON, as a whole or not at all; returns its text.

    Raises:
        CannotWriteError: If the disk does not take it; what was there is kept.
    """
    text = json.dumps(state)
    with writing(path), atomic_write(path) as file:
        file.write(text.encode())
    return text


class AtomicBooks(Stateful):
    """Mixin for oracles and tuners of KerasTuner, which write over the old file and leave half of it when killed.

    It stands behind KerasTuner's own classes in the order in which methods are looked up, and before the class that
    does the writing.
    """

    def save(self, fname: str = "") -> str:  # that of KerasTuner's own classes, which call it, has no argument
        """Writes the state as a whole or not at all."""
        return write_json(fname, self.get_state())


def keep_books_of(oracle: keras_tuner.Oracle) -> None:
    """Has an oracle write its books, `oracle.json` and the `trial.json` of each trial, as a whole or not at all."""
    kind = type(oracle)
    if not issubclass(kind, AtomicBooks):
        oracle.__class__ = type(kind.__name__, (kind, AtomicBooks), {"__module__": kind.__module__})
        with_trials_saved_by(oracle, lambda path, trial: write_json(path, trial.get_state()))


def check_books(directory: Path) -> None:
    """Reads all books of a search.

    Raises:
        RuntimeError: If one is damaged or missing, with its name.
    """
    started = _read(directory / "oracle.json", _IN_ORACLE)["start_order"]
    trials = [directory / f"trial_{trial_id}" / "trial.json" for trial_id in started]
    for path in {*trials, *directory.glob("trial_*/trial.json")}:
        _read(path, _IN_TRIAL)
    for path in directory.glob("tuner*.json"):
        _read(path)


def _read(path: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        book = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except ValueError as error:  # neither JSON nor text
        raise damaged(path, error) from error
    if not isinstance(book, dict):
        raise damaged(path, f"it holds {type(book).__name__} instead of a mapping")
    if missing := [name for name in names if name not in book]:
        raise damaged(path, f"it has no {missing[0]!r}")
    return book


def damaged(path: Path, reason: object) -> RuntimeError:
    """The error about a book that cannot be used."""
    return RuntimeError(
        f"The search cannot be continued, since {str(path)!r} is damaged: {reason}. Restore it from a copy, choose "
        "another directory, or pass overwrite=True to start over."
    )


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps a directory for the search in the block.

    Raises:
        RuntimeError: If another search is in it.
        OSError: If the directory cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(directory / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise RuntimeError(
            f"directory={str(directory)!r} is in use by the search of another process, or by another of this one."
        ) from error
    try:
        for place in (directory, *(path for path in directory.glob("trial_*") if path.is_dir())):
            for path in leftovers(place, _NAMES):
                path.unlink()
        yield
    finally:
        lock.release()


def delete_search(directory: Path) -> None:
    """Deletes what KerasTuner and `Tuner` wrote into a directory, and nothing else."""
    for trial in directory.glob("trial_*"):
        if any(path for name in _OF_A_TRIAL for path in trial.glob(name)):
            shutil.rmtree(trial)
    for state in (*directory.glob("oracle.json"), *directory.glob("tuner*.json")):
        state.unlink()

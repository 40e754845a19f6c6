"""The files that a search is continued from: whole at any moment, read with their names, and in one search's hands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_tuner

from keras_optkit.files import atomic_write, lock, opened, sealed
from keras_optkit.private import with_trials_saved_by
from keras_optkit.space import Space

Stateful: Any = keras_tuner.Oracle.__mro__[1]  # what saves an oracle and a tuner; KerasTuner does not export it


HISTORY = "history.json"  # of a trial
DONE = "done_{}.json"  # an execution of a trial that is running
REACHED = "reached_{}.json"  # likewise, which has not ended
PAYLOADS = "payload-*.pickle"  # what workers are given

_OF_A_TRIAL = ("trial.json", HISTORY, "model.keras", "*.weights.h5", "*.built.json")
_NAMES = re.compile(
    r"(oracle|trial|history|(done|reached)_\d+|tuner\w*|(model|end_\d+)\.built)\.json|(model|end_\d+)\.(keras|weights\.h5)|"
    r"payload-[0-9a-f]{8}\.pickle"
)
_IN_ORACLE = ("start_order", "end_order", "ongoing_trials", "hyperparameters")
_IN_TRIAL = ("trial_id", "hyperparameters", "metrics", "status")


class OtherSearchError(ValueError):
    """The directory holds another search.

    Args:
        directory: Where it is.
        difference: How it differs from the one that was to be continued.
        argument: Which argument says where.
    """

    def __init__(self, directory: Any, difference: str, argument: str = "directory") -> None:
        super().__init__(
            f"{argument} must be new or hold the same search, got {str(directory)!r}, {difference}. Choose another "
            f"{argument}, or pass overwrite=True to start over."
        )
        self.difference = difference


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between the definitions of two searches, each in a few words; of a space, its parameters only."""
    changed = [name for name in new if json.dumps(new[name]) != json.dumps(old.get(name))]
    return [text for name in changed for text in _difference(name, old.get(name), new[name])]


def _difference(name: str, old: Any, new: Any) -> list[str]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [f"{name} was {old!r} and is {new!r}"]
    shown = [_shown(name, entries) for entries in (old, new)]
    found = [f"{name} has the new {each!r}" for each in new if each not in old]
    found += [f"{name} has no {each!r} any more" for each in old if each not in new]
    both = [each for each in new if each in old and json.dumps(new[each]) != json.dumps(old[each])]
    pairs = {each: [entries[each] for entries in shown] for each in both}
    found += [f"{name}[{each!r}] was {before} and is {now}" for each, (before, now) in pairs.items()]
    return found or [f"the order of {name} was {', '.join(old)} and is {', '.join(new)}"]


def _shown(name: str, entries: Mapping[str, Any]) -> dict[str, str]:
    """The entries as they are written in Python: those of a space as the calls that make its parameters."""
    shown = {each: repr(entry) for each, entry in entries.items()}
    if name == "space":
        with contextlib.suppress(TypeError, ValueError):  # a space of another version
            shown |= {each: repr(parameter) for each, parameter in Space.from_config(entries).items()}
    return shown


def path_of(name: str, path: Any) -> Path:
    """The argument as a path."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise TypeError(f"{name} must be the path of a directory, got {path!r}.")
    return Path(path)


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
    """Writes a mapping as a file of JSON with its digest, as a whole or not at all; returns its text.

    Raises:
        CannotWriteError: If the disk does not take it; what was there is kept.
    """
    content = sealed(state)
    with writing(path), atomic_write(path) as file:
        file.write(content)
    return content.decode()


def read_json(path: str | Path) -> dict[str, Any]:
    """What `write_json` was given, or what a version before the digests has written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not what was written.
    """
    content = Path(path).read_bytes()
    book = json.loads(content.decode("utf-8"))
    if not isinstance(book, dict):
        raise ValueError(f"it holds {type(book).__name__} instead of a mapping")
    if not book.keys() & {"sealed", "sha256"}:
        return book
    book, unchanged = opened(content)
    if not unchanged:  # KerasTuner reads what is outside the seal
        raise ValueError("it was changed after it had been written")
    return book


class AtomicBooks(Stateful):
    """Mixin for oracles and tuners of KerasTuner, which write over the old file and leave half of it when killed.

    It stands behind KerasTuner's own classes in the order in which methods are looked up, and before the class that
    does the writing.
    """

    def save(self, fname: str = "") -> str:  # that of KerasTuner's own classes, which call it, has no argument
        """Writes the state as a whole or not at all."""
        return write_json(fname, self.get_state())

    def reload(self, fname: str = "") -> None:  # likewise
        """Reads the state."""
        self.set_state(read_json(fname))


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
    for path in (
        *directory.glob("tuner*.json"),
        *directory.glob(f"trial_*/{HISTORY}"),
        *directory.glob(f"trial_*/{DONE.format('*')}"),
        *directory.glob(f"trial_*/{REACHED.format('*')}"),
    ):
        _read(path)


def _read(path: Path, names: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        book = read_json(path)
    except FileNotFoundError as error:
        raise damaged(path, "it is missing") from error
    except ValueError as error:  # neither JSON nor text, or not what was written
        raise damaged(path, error) from error
    if missing := [name for name in names if name not in book]:
        raise damaged(path, f"it has no {missing[0]!r}")
    return book


def write_history(trial: Path, runs: Sequence[Sequence[tuple[int, Mapping[str, float]]]]) -> None:
    """Writes the metrics of every epoch beside a trial, one run for each execution.

    They are in a file of their own, since the tuner's is written again with each trial.

    Raises:
        CannotWriteError: If the disk does not take it.
    """
    path = trial / HISTORY
    if any(runs):
        write_json(path, {"runs": [curves(run) for run in runs]})
    else:  # of an attempt that was interrupted
        path.unlink(missing_ok=True)


def curves(run: Sequence[tuple[int, Mapping[str, float]]]) -> dict[str, Any]:
    """The epochs of a run as `Trial.history` has them."""
    names = dict.fromkeys(name for _, metrics in run for name in metrics)
    curves = {name: [metrics.get(name) for _, metrics in run] for name in names}
    return {"epochs": [epoch for epoch, _ in run], "metrics": curves}


def read_history(trial: Path) -> list[dict[str, Any]]:
    """What `write_history` has written beside a trial; nothing for one of a version that kept no history."""
    try:
        runs: list[dict[str, Any]] = read_json(trial / HISTORY)["runs"]
    except FileNotFoundError:
        return []
    except (KeyError, ValueError) as error:
        raise damaged(trial / HISTORY, error) from error
    return runs


def write_done(trial: Path, execution: int, state: Mapping[str, Any]) -> None:
    """Notes how an execution of a trial has ended, so that a trial that is interrupted begins with the next one.

    Raises:
        CannotWriteError: If the disk does not take it.
    """
    write_json(trial / DONE.format(execution), state)


def read_done(trial: Path, execution: int) -> dict[str, Any] | None:
    """What `write_done` has noted, if it has."""
    path = trial / DONE.format(execution)
    return read_json(path) if path.exists() else None


def write_reached(trial: Path, execution: int, state: Mapping[str, Any]) -> None:
    """Notes from which bundle an execution that is interrupted is continued.

    Raises:
        CannotWriteError: If the disk does not take it.
    """
    write_json(trial / REACHED.format(execution), state)


def read_reached(trial: Path, execution: int) -> dict[str, Any] | None:
    """What `write_reached` has noted, if it has."""
    path = trial / REACHED.format(execution)
    return read_json(path) if path.exists() else None


def forget_done(trial: Path) -> None:
    """Deletes the notes of `write_done` and `write_reached`."""
    for path in (*trial.glob(DONE.format("*")), *trial.glob(REACHED.format("*"))):
        path.unlink()


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
    release = lock(directory, _NAMES, user="search", folders="trial_*")
    try:
        yield
    finally:
        release()


@contextlib.contextmanager
def alone(trial: Path, patience: float) -> Iterator[None]:
    """Keeps the directory of a trial for the training in the block.

    The process that trained it before may not know yet that the search has given it up.

    Args:
        trial: The directory.
        patience: How many seconds to wait for it.

    Raises:
        RuntimeError: If it is in use for longer.
    """
    until = time.monotonic() + patience
    while True:
        try:
            release = lock(trial, _NAMES, user="trial")
            break
        except RuntimeError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        release()


def delete_search(directory: Path) -> None:
    """Deletes what KerasTuner and `Tuner` wrote into a directory, and nothing else."""
    for trial in directory.glob("trial_*"):
        if any(path for name in _OF_A_TRIAL for path in trial.glob(name)):
            shutil.rmtree(trial)
    for state in (*directory.glob("oracle.json"), *directory.glob("tuner*.json"), *directory.glob(PAYLOADS)):
        state.unlink()

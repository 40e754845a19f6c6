"""The sealed list of the checkpoints in a directory, and when the next one is due."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from keras_optkit.callbacks.bundle import DamagedError
from keras_optkit.callbacks.watching import Watched
from keras_optkit.files import atomic_write, opened, sealed
from keras_optkit.fit.hooks import around
from keras_optkit.private import sublayers

_INDENT = 1  # of the list, which people read
ENDINGS = {"model": ".keras", "weights": ".weights.h5"}
#: The names that files are given; see `List.named`.
_BEGIN = re.compile(r"epoch=\d{4,}-update=\d{6,}")
NAME = re.compile(_BEGIN.pattern + r"(-\w+=[-+.\w]+)?(-on=\w+)?(-\d+)?(\.keras|\.weights\.h5)")


class Due:
    """Whether `every` so much has passed.

    Args:
        every: The interval.
        updates: How many updates there have been.
        one_a_batch: Whether a batch makes at most one; the device is then asked for their number no more often than
            needed.
    """

    def __init__(self, every: Any, updates: int, one_a_batch: bool):
        self._every, self._one_a_batch = every, one_a_batch
        self._since = time.monotonic()
        self._next = self._next_after(updates)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Called when an epoch begins."""
        self._look_at = 0  # before this batch nothing can be due

    def inside_epoch(self, batch: int, updates: Any) -> bool:
        """Whether it is due before this batch; after an epoch that was for `after_epoch` to say."""
        if batch == 0 or self._every == "epoch":
            return False
        if isinstance(self._every, timedelta):
            return self._has_passed()
        if batch < self._look_at:
            return False
        now = updates()
        due = self._reached(now)
        if self._one_a_batch:
            self._look_at = batch + self._next - now
        return due

    def after_epoch(self, updates: Any) -> bool:
        """Whether one is due at the end of an epoch."""
        if self._every == "epoch":
            return True
        return self._has_passed() if isinstance(self._every, timedelta) else self._reached(updates())

    def _has_passed(self) -> bool:
        now = time.monotonic()
        if now - self._since < self._every.total_seconds():
            return False
        self._since = now
        return True

    def _reached(self, updates: int) -> bool:
        if updates < self._next - self._every:  # since another optimizer of the model counts from now on
            self._next = self._next_after(updates)
        if updates < self._next:
            return False
        self._next = self._next_after(updates)
        return True

    def _next_after(self, updates: int) -> int:
        return (updates // self._every + 1) * self._every if isinstance(self._every, int) else 0

    def state_dict(self) -> dict[str, Any]:
        """The state needed to continue."""
        return {"seconds": time.monotonic() - self._since, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets what `state_dict` returned."""
        self._since, self._next = time.monotonic() - state["seconds"], state["next"]


@dataclass(frozen=True)
class Entry:
    """A file.

    Attributes:
        file: Its name.
        epoch: The epoch that it was written in, or at the end of, counted from 1.
        update: How many updates the optimizer had made.
        value: The monitored value; None inside an epoch.
        regular: Whether it was written since `every` asked for it.
        error: The name of the exception that it was written for, or None.
        sha256: The digest of the file.
    """

    file: str
    epoch: int
    update: int
    value: float | None
    regular: bool
    error: str | None
    sha256: str

    def is_whole(self, path: Path) -> bool:
        """Whether the file at `path` is what was written."""
        return path.is_file() and digest(path) == self.sha256


class List:
    """The files of a directory, in the order in which they were written."""

    name = "checkpoints.json"
    format = 2

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.monitor: str | None = None
        self.mode = "min"
        self.entries: list[Entry] = []
        self._superseded: list[str] = []
        self._announced: Entry | None = None

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> List:
        """The list that is in the directory, without files that are gone; an empty one if there is none.

        Raises:
            DamagedError: If it is not what was written, or if it lists none of the files that are named like
                checkpoints.

        Warns:
            UserWarning: For files that are gone, and for those that are named like a checkpoint and are not listed.
        """
        found = cls(directory)
        path = found.directory / cls.name
        if path.exists():
            try:
                found._take(_opened(path))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DamagedError(
                    f"{path} is not a list of checkpoints of this version, or was changed: {error}. Move it away, with "
                    "the files that it is of, to begin a new one."
                ) from error
        found._forget_what_is_gone()
        found._look_for_strangers()
        return found

    def _take(self, held: Mapping[str, Any]) -> None:
        if held["format"] != self.format:
            raise ValueError(f"it has format {held['format']!r}")
        self.monitor, self.mode, self._superseded = held["monitor"], held["mode"], held["superseded"]
        self.entries = [_from_json(entry) for entry in held["checkpoints"]]
        self._announced = None if held["announced"] is None else _from_json(held["announced"])
        announced = [] if self._announced is None else [self._announced]
        for name in [*(entry.file for entry in [*self.entries, *announced]), *self._superseded]:
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a checkpoint")
        for entry in announced:  # the process may have ended after it had been given its name
            path = self.directory / entry.file
            if entry.is_whole(path):
                self._put(entry)

    def _forget_what_is_gone(self) -> None:
        gone = [entry for entry in self.entries if not (self.directory / entry.file).exists()]
        self._forget(gone, "no longer there")

    def forget_what_is_damaged(self) -> None:
        """Takes files off the list that are not what was written.

        Raises:
            DamagedError: If that is so of all.

        Warns:
            UserWarning: For each.
        """
        damaged = [entry for entry in self.entries if not entry.is_whole(self.directory / entry.file)]
        if damaged and len(damaged) == len(self.entries):
            raise DamagedError(
                f"{self.directory} has {', '.join(entry.file for entry in damaged)}, and none is what was written: "
                "their digests are wrong. Remove them to begin without."
            )
        self._forget(damaged, "not what was written: its digest is wrong")

    def _forget(self, entries: list[Entry], why: str) -> None:
        for entry in entries:
            self.entries.remove(entry)
            warnings.warn(f"{self.directory / entry.file} is {why}. It is left out of {self.name}.", stacklevel=6)

    def _look_for_strangers(self) -> None:
        if not self.directory.is_dir():
            return
        known = {*(entry.file for entry in self.entries), *self._superseded}
        strangers = sorted(p.name for p in self.directory.iterdir() if _BEGIN.match(p.name) and p.name not in known)
        if strangers and not self.entries:
            raise DamagedError(
                f"{self.directory} has {', '.join(strangers)}, and nothing that {self.name} lists. Put that file back, "
                "or move these away."
            )
        if strangers:
            warnings.warn(
                f"{self.directory} has {', '.join(strangers)}, not listed in {self.name}: left alone, and neither "
                "among the best nor the last.",
                stacklevel=5,
            )

    def ranked(self) -> list[Entry]:
        """Those with a value that can be the best, the best first; of equal ones the earlier."""
        watched = Watched(None, self.monitor or "", self.mode)
        valued = [(entry.value, entry) for entry in self.entries if entry.value is not None]
        usable = [pair for pair in valued if watched.is_usable(pair[0])]
        return [entry for _, entry in sorted(usable, key=lambda pair: pair[0] if self.mode == "min" else -pair[0])]

    def named(self, entry: Entry, ending: str) -> Entry:
        """The entry with a name that identifies it: another entry has it only if it is the same."""
        parts = [f"epoch={entry.epoch:04d}", f"update={entry.update:06d}"]
        if entry.value is not None:
            parts.append(f"{re.sub(r'[^0-9A-Za-z_]+', '_', self.monitor or '')}={entry.value:.6g}")
        if entry.error is not None:
            parts.append(f"on={entry.error}")
        listed = {other.file: other for other in self.entries}
        number, name = 1, "-".join(parts)
        while True:
            file = name + (f"-{number}" if number > 1 else "") + ending
            if _is_same(entry, listed[file]) if file in listed else not os.path.lexists(self.directory / file):
                return dataclasses.replace(entry, file=file)
            number += 1

    def announce(self, entry: Entry) -> None:
        """Says which file is about to be given its name, so that it is known should the process end right then."""
        self._announced = entry
        self._write()

    def add(self, entry: Entry, top_k: int, last_n: int) -> None:
        """Adds a file that is there already, and deletes those that are no longer wanted."""
        self._forget_what_is_gone()
        before = self.entries
        self._put(entry)
        wanted = self._wanted(top_k, last_n)
        self._superseded = [other.file for other in self.entries if other not in wanted]
        self.entries = [other for other in self.entries if other in wanted]
        self._announced = None
        try:
            self._write()
        except BaseException:
            self.entries = before
            if entry.file not in [other.file for other in before]:
                (self.directory / entry.file).unlink(missing_ok=True)
            raise
        self.finish()

    def _put(self, entry: Entry) -> None:
        self.entries = [*(other for other in self.entries if other.file != entry.file), entry]

    def _wanted(self, top_k: int, last_n: int) -> list[Entry]:
        regular = [entry for entry in self.entries if entry.regular]
        errors = [entry for entry in self.entries if entry.error is not None]
        return [*self.ranked()[:top_k], *regular[len(regular) - min(last_n, len(regular)) :], *errors[-1:]]

    def _write(self) -> None:
        held = {
            "format": self.format,
            "monitor": self.monitor,
            "mode": self.mode,
            "checkpoints": [_as_json(entry) for entry in self.entries],
            "superseded": self._superseded,
            "announced": None if self._announced is None else _as_json(self._announced),
        }
        with atomic_write(self.directory / self.name) as file:
            file.write(sealed(held, _INDENT))

    def finish(self) -> None:
        """Deletes what the list that was written last has left out."""
        for name in self._superseded:
            if (self.directory / name).is_file():
                (self.directory / name).unlink()


def _is_same(one: Entry, other: Entry) -> bool:
    """Whether they are the same state of one training; of a value that is NaN, too."""
    return all(repr(getattr(one, name)) == repr(getattr(other, name)) for name in ("epoch", "update", "value", "error"))


def _as_json(entry: Entry) -> dict[str, Any]:
    """Values as strings, since JSON has no NaN and no infinity."""
    return dataclasses.asdict(entry) | {"value": None if entry.value is None else repr(entry.value)}


def _from_json(entry: Mapping[str, Any]) -> Entry:
    return Entry(**{**entry, "value": None if entry["value"] is None else float(entry["value"])})


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(path: Path) -> Mapping[str, Any]:
    """The list, as it was written.

    Raises:
        ValueError: If it is not what was written.

    Warns:
        UserWarning: If only what is there for people is not.
    """
    if not path.is_file():
        raise ValueError("it is not a file")
    held, unchanged = opened(path.read_bytes(), _INDENT)
    if not unchanged:
        warnings.warn(f"{path} was changed. It is read as it was written, from its entry 'sealed'.", stacklevel=6)
    return held


@contextlib.contextmanager
def refusing_unbuilt_layers(model: Any, path: Path) -> Iterator[None]:
    """While a model loads weights: raises for layers that have none yet, which Keras passes over.

    It does so where the model itself counts as built, as after `model.build` of a class that builds no layers, and
    something else was loaded, such as the optimizer.
    """
    missed: list[str] = []

    @contextlib.contextmanager
    def noting(layer: Any, store: Any) -> Iterator[None]:
        if not layer.built and list(store.keys()):
            missed.append(layer.name)
        yield

    unbuilt = [layer for layer in sublayers(model) if not layer.built]
    remove = [around(layer, "load_own_variables", functools.partial(noting, layer)) for layer in unbuilt]
    try:
        yield
    except ValueError:  # Keras's, where nothing at all was loaded
        if not missed:
            raise
    finally:
        for each in remove:
            each()
    if missed:
        raise ValueError(
            f"model must be built, and {len(missed)} layers of {model.name!r} that {path} has weights for are not: "
            f"{', '.join(missed[:10])}. Make the model, call it on a batch of data, and load into it."
        )

"""Files of a model while it trains: the best ones, and the last ones."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.callbacks import others
from keras_optkit.callbacks.bundle import DamagedError
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.watching import MODES, Watched, checked_monitor
from keras_optkit.files import atomic_path, atomic_write, leftovers, opened, sealed
from keras_optkit.fit.hooks import around
from keras_optkit.fit.run import running_fit
from keras_optkit.private import sublayers
from keras_optkit.registry import register
from keras_optkit.saving import mark_as_built

_INDENT = 1  # of the list, which people read
_ENDINGS = {"model": ".keras", "weights": ".weights.h5"}

#: The names that files are given; see `_List.named`.
_BEGIN = re.compile(r"epoch=\d{4,}-update=\d{6,}")
_NAME = re.compile(_BEGIN.pattern + r"(-\w+=[-+.\w]+)?(-on=\w+)?(-\d+)?(\.keras|\.weights\.h5)")


@register(
    "callback",
    paper="Keeping the best k and the last n",
    tags=("passive",),
    cases=(
        {"directory": "all", "monitor": "val_loss", "top_k": 2, "last_n": 2},
        {"directory": "steps", "top_k": 0, "every": 3, "save": "weights", "on_exception": True},
    ),
)
class Checkpoint(Callback):
    """Keeps the best k and the last n states of a model as files, whatever comes between.

    - **The best** are those with the best values of `monitor` at the end of an epoch, where it is measured. NaN, and
      infinity in the wrong direction, are never among them; of equal values the earlier one stays.
    - **The last** are written every epoch, or every so many updates, or after some time.

    A file is written to another name in the directory, synced and renamed, so that there is never half of one, and only
    then is one deleted that is no longer wanted. If it cannot be written, since the disk is full, that is an error, and
    those that are there stay.

    `checkpoints.json` in the directory lists the files with their epochs, counted from 1, updates, values and digests,
    once for people and once in a string with a digest, which is what is believed, and is written in the same way. It is
    read when `fit` begins, so that the best is still the best after a restart, in another process or with another
    callback: a worse one never replaces it.

    A damaged list is an error and not guessed from the files, whose names hold rounded values. So is a damaged file
    where `best`, `latest`, `load_best` or `load_latest` would give it; when `fit` begins, it is left out of the list
    with a warning, as files are that somebody has removed. Files that are not listed are neither overwritten nor
    deleted; where one is named like a checkpoint, there is a warning. If nothing that was written is left whole, but
    such files are there, that is an error.

    Models load without `custom_objects`, by `load_best` and `load_latest` or by Keras itself. With `AveragedWeights`
    the files hold the averaged weights that were measured. Updates are those of the optimizer that the model was
    compiled with; where it is not used, of the one with most among those that the model holds. Where a step makes
    several, or with Keras's `steps_per_execution`, a file by updates is written after the first step at which it is
    due. Epochs without the monitored value are passed over, as with `EarlyStopping`.

    When not to use it: to go on after a crash; `Resume` writes what the next step depends on, and this does not.

    Args:
        directory: Where the files are; made if it does not exist. One directory for one `Checkpoint`.
        monitor: Name in the logs, e.g. `"val_loss"`; None if `top_k` is 0.
        mode: `"min"`, `"max"` or `"auto"`, as in `EarlyStopping`.
        top_k: How many of the best to keep.
        last_n: How many of the last to keep.
        every: When the last are written: `"epoch"`, a number of updates of the weights, or a `datetime.timedelta`.
        save: `"model"` for `.keras` files, or `"weights"` for `.weights.h5`. Both hold the state of the optimizer.
        on_exception: Whether an exception that ends `fit`, Ctrl-C included, has the model written as it is then. The
            file is marked by the name of the exception; the newest such file is kept. On JAX there is nothing left to
            write if the training step itself has failed.
        verbose: 1 prints what is written, 0 is silent.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; when training begins, for a directory with values of another monitor or
            mode, with a damaged list, or that another `Checkpoint` of this `fit` has, and for a model that a `.keras`
            file cannot hold; before, while or after training, for an unknown monitor, as with `EarlyStopping`.
        OSError: If a file cannot be written or read.

    Warns:
        UserWarning: For files that are missing, damaged or not listed, as above.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.AdamW(1e-2), loss="mse")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = ok.callbacks.Checkpoint(directory, "val_loss", top_k=2, last_n=1)
        model.fit(x, x[:, :1], validation_split=0.25, epochs=3, callbacks=[checkpoint], verbose=0)
        print(checkpoint.best.name)  # epoch=0003-update=000006-val_loss=...
        best = ok.callbacks.Checkpoint(directory).load_best()  # in another process, say
    ```
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        monitor: str | None = "val_loss",
        mode: str = "auto",
        top_k: int = 1,
        last_n: int = 1,
        every: str | int | timedelta = "epoch",
        save: str = "model",
        on_exception: bool = False,
        verbose: int = 0,
    ):
        super().__init__()
        self.directory = arguments.path("directory", directory)
        self.top_k = arguments.integer("top_k", top_k, 0)
        self.last_n = arguments.integer("last_n", last_n, 0)
        self.monitor = None if monitor is None and not top_k else checked_monitor(monitor)
        self.mode = arguments.choice("mode", mode, MODES)
        self.every = arguments.interval("every", every)
        self.save = arguments.choice("save", save, tuple(_ENDINGS))
        self.on_exception = arguments.boolean("on_exception", on_exception)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        if not (top_k or last_n or on_exception):
            raise ValueError("top_k, last_n or on_exception must ask for files, got 0, 0 and False.")
        self._list: _List | None = None  # while training

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def best(self) -> Path | None:
        """The file with the best value, or None.

        Raises:
            ValueError: If this file, or the list of files, is not what was written.
        """
        return self._path(_List.ranked)

    @property
    def latest(self) -> Path | None:
        """The file that was written last, or None.

        Raises:
            ValueError: If this file, or the list of files, is not what was written.
        """
        return self._path(lambda listed: listed.entries[-1:])

    def _path(self, of: Callable[[_List], list[_Entry]]) -> Path | None:
        entries = of(_List.read(self.directory))
        if not entries:
            return None
        path = Path(self.directory, entries[0].file)
        if entries[0].is_whole(path):
            return path
        if not path.exists():  # another process trains here, and has deleted it just now
            return self._path(of)
        raise DamagedError(f"{path} is not what was written: its digest is wrong. Remove it to use the next one.")

    def load_best(self, model: Any = None) -> Any:
        """The model of the file with the best value.

        Args:
            model: A built model whose weights are set to those of the file; None makes a new one, from a `.keras` file.

        Raises:
            ValueError: If there is no such file, if it or the list of files is not what was written, if it holds
                weights alone and no model was given, or if it holds weights of layers of the model that are not built.
        """
        return self._loaded(self.best, "with a value", model)

    def load_latest(self, model: Any = None) -> Any:
        """The model of the file that was written last; the argument and errors are those of `load_best`."""
        return self._loaded(self.latest, "at all", model)

    def _loaded(self, path: Path | None, what: str, model: Any) -> Any:
        if path is None:
            raise ValueError(f"directory={self.directory!r} holds no checkpoint {what}.")
        if model is not None:
            mark_as_built(model)
            with _refusing_unbuilt_layers(model, path):
                model.load_weights(path)
            return model
        if path.name.endswith(_ENDINGS["weights"]):
            raise ValueError(f"model must be given for {path}, which holds weights alone.")
        model = keras.saving.load_model(path)
        if not all(layer.built for layer in sublayers(model)):  # they may have been so when it was saved
            alone = keras.saving.load_model(path, compile=False)
            with _refusing_unbuilt_layers(alone, path):
                alone.load_weights(path)
        return model

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        directory = Path(self.directory)
        self._refuse_if_shared(directory)
        self._refuse_what_a_file_cannot_hold()
        directory.mkdir(parents=True, exist_ok=True)
        for path in leftovers(directory, re.compile(f"{_NAME.pattern}|{re.escape(_List.name)}")):
            path.unlink()
        self._list = _List.read(directory)
        self._list.finish()
        self._list.forget_what_is_damaged()
        self._watched = Watched(self.model, self.monitor or "", self.mode)
        if self.top_k:
            self._watched.begin_training()
        self._adopt_mode(self.mode)
        self._due = _Due(self.every, self._updates(), others.updates_at_most_once_a_batch(self.model))
        self._epoch = 0

    def _refuse_if_shared(self, directory: Path) -> None:
        fit = running_fit(self.model)
        for other in fit.listed() if fit else ():
            if (
                isinstance(other, Checkpoint)
                and other is not self
                and directory.resolve() == Path(other.directory).resolve()
            ):
                raise ValueError(f"directory={self.directory!r} is that of another Checkpoint of this fit, too.")

    def _refuse_what_a_file_cannot_hold(self) -> None:
        if self.save == "model":
            try:
                self.model.get_config()
            except NotImplementedError as error:
                raise ValueError(
                    f"save must be 'weights' for model {self.model.name!r}, got 'model': a .keras file cannot hold its "
                    "class, which has arguments and no get_config."
                ) from error

    def _adopt_mode(self, mode: str) -> None:
        """Takes notice of what the values are, which must be what those in the directory are."""
        assert self._list is not None
        held = self._list.monitor, self._list.mode
        if not self.top_k:
            return
        if self._list.ranked() and (held[0] != self.monitor or mode not in ("auto", held[1])):
            raise ValueError(
                f"directory={self.directory!r} holds checkpoints by monitor={held[0]!r} and mode={held[1]!r}, got "
                f"{self.monitor!r} and {mode!r}. Take another directory."
            )
        if mode != "auto":
            self._list.monitor, self._list.mode = self.monitor, mode

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._epoch = epoch
        self._watched.begin_epoch()
        self._due.begin_epoch()

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Writes what is due after the previous batch; `on_train_batch_end` would make Keras wait for every step."""
        if self.last_n and self._due.inside_epoch(batch, self._updates):
            self._write(regular=True)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        assert self._list is not None
        value = None
        if self.top_k:
            value = self._watched.value(logs)
            self._adopt_mode(self._watched.mode)
        regular = bool(self.last_n) and self._due.after_epoch(self._updates)
        if regular or (value is not None and self._is_among_the_best(value)):
            self._write(value, regular=regular)

    def _is_among_the_best(self, value: float) -> bool:
        assert self._list is not None
        best = self._list.ranked()[: self.top_k]
        worst = best[-1].value if len(best) == self.top_k else None
        return self._watched.improves(value, worst)

    def on_train_failure(self, error: BaseException) -> None:  # noqa: D102
        try:
            if self.on_exception and self._list is not None:
                self._write(error=type(error).__name__)
        finally:
            self._list = None

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self.top_k:
            self._watched.end_training()
        self._list = None

    def _write(self, value: float | None = None, *, regular: bool = False, error: str | None = None) -> None:
        assert self._list is not None
        model = self.model  # asked for it, Keras on JAX fills the variables
        entry = self._list.named(
            _Entry("", self._epoch + 1, self._updates(), value, regular, error, ""), _ENDINGS[self.save]
        )
        with atomic_path(self._list.directory / entry.file) as unfinished:
            mark_as_built(model)
            if self.save == "model":
                model.save(unfinished)
            else:
                model.save_weights(unfinished)
            entry = dataclasses.replace(entry, sha256=_digest(unfinished))
            self._list.announce(entry)
        self._list.add(entry, self.top_k, self.last_n)
        if self.verbose:
            print(f"{type(self).__name__}: {self._list.directory / entry.file}")

    # -- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """When the next file is due; what files there are, is in the directory."""
        return self._due.state_dict() | {"seen": self._watched.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Args:
            state: What `state_dict` returned.
        """
        self._due.load_state_dict(state)
        self._watched.seen = state["seen"]


# -- when -------------------------------------------------------------------------------------------------------------


class _Due:
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
        return {"seconds": time.monotonic() - self._since, "next": self._next}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._since, self._next = time.monotonic() - state["seconds"], state["next"]


# -- the list of files ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A file.

    Attributes:
        file: Its name.
        epoch: The epoch that it was written in, or at the end of, counted from 1.
        update: How many updates the optimizer had made.
        value: The monitored value; None inside of an epoch.
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
        return path.is_file() and _digest(path) == self.sha256


class _List:
    """The files of a directory, in the order in which they were written."""

    name = "checkpoints.json"
    format = 2

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.monitor: str | None = None
        self.mode = "min"
        self.entries: list[_Entry] = []
        self._superseded: list[str] = []
        self._announced: _Entry | None = None

    @classmethod
    def read(cls, directory: str | os.PathLike[str]) -> _List:
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
                    f"{path} is no list of checkpoints of this version, or was changed: {error}. Move it away, with "
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
            if not _NAME.fullmatch(name):
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

    def _forget(self, entries: list[_Entry], why: str) -> None:
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

    def ranked(self) -> list[_Entry]:
        """Those with a value that can be the best, the best first; of equal ones the earlier."""
        watched = Watched(None, self.monitor or "", self.mode)
        valued = [(entry.value, entry) for entry in self.entries if entry.value is not None]
        usable = [pair for pair in valued if watched.is_usable(pair[0])]
        return [entry for _, entry in sorted(usable, key=lambda pair: pair[0] if self.mode == "min" else -pair[0])]

    def named(self, entry: _Entry, ending: str) -> _Entry:
        """The entry with a name that says what it is, which another one has only if it is the same."""
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

    def announce(self, entry: _Entry) -> None:
        """Says which file is about to be given its name, so that it is known should the process end right then."""
        self._announced = entry
        self._write()

    def add(self, entry: _Entry, top_k: int, last_n: int) -> None:
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

    def _put(self, entry: _Entry) -> None:
        self.entries = [*(other for other in self.entries if other.file != entry.file), entry]

    def _wanted(self, top_k: int, last_n: int) -> list[_Entry]:
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


def _is_same(one: _Entry, other: _Entry) -> bool:
    """Whether they are the same state of one training; of a value that is NaN, too."""
    return all(repr(getattr(one, name)) == repr(getattr(other, name)) for name in ("epoch", "update", "value", "error"))


def _as_json(entry: _Entry) -> dict[str, Any]:
    """Values as strings, since JSON has no NaN and no infinity."""
    return dataclasses.asdict(entry) | {"value": None if entry.value is None else repr(entry.value)}


def _from_json(entry: Mapping[str, Any]) -> _Entry:
    return _Entry(**{**entry, "value": None if entry["value"] is None else float(entry["value"])})


def _digest(path: Path) -> str:
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
def _refusing_unbuilt_layers(model: Any, path: Path) -> Iterator[None]:
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

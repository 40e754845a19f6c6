"""Files of a model while it trains: the best ones, and the last ones."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.callbacks import others
from keras_optkit.callbacks.bundle import DamagedError
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.listing import ENDINGS, NAME, Due, Entry, List, digest, refusing_unbuilt_layers
from keras_optkit.callbacks.watching import MODES, Watched, checked_monitor
from keras_optkit.files import atomic_path, leftovers
from keras_optkit.fit.run import running_fit
from keras_optkit.private import sublayers
from keras_optkit.registry import register
from keras_optkit.saving import mark_as_built


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
    """Keeps the best k and the last n states of a model as files, across restarts.

    - **The best** are those with the best values of `monitor` at the end of an epoch, where it is measured. NaN, and
      infinity in the wrong direction, are never among them; of equal values the earlier one stays.
    - **The last** are written every epoch, or every so many updates, or after some time.

    A file is written under another name in the directory, synced and renamed, so that there is never half of one; only
    then is an old one deleted. If it cannot be written, for example since the disk is full, that is an error, and the
    existing files stay.

    `checkpoints.json` in the directory lists the files with their epochs, counted from 1, updates, values and digests,
    once for people and once in a string with a digest, which is the one that is read. It is written in the same way. It
    is read when `fit` begins, so that the best is still the best after a restart, in another process or with another
    callback: a worse one never replaces it.

    A damaged list is an error and not guessed from the files, whose names hold rounded values. So is a damaged file
    that `best`, `latest`, `load_best` or `load_latest` would return; when `fit` begins, it is left out of the list with
    a warning, as are files that somebody has removed. Files that are not listed are neither overwritten nor deleted;
    where one is named like a checkpoint, there is a warning. If nothing that was written is left whole, but such files
    are there, that is an error.

    Models load without `custom_objects`, by `load_best` and `load_latest` or by Keras itself. With `AveragedWeights`
    the files hold the averaged weights that were measured. Updates are those of the optimizer that the model was
    compiled with; where it is not used, of the one with most among those that the model holds. Where a step makes
    several, or with Keras's `steps_per_execution`, a file by updates is written after the first step at which it is
    due. Epochs without the monitored value are skipped, as with `EarlyStopping`.

    When not to use it: to continue after a crash; `Resume` writes what the next step depends on, and this does not.

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
        self.save = arguments.choice("save", save, tuple(ENDINGS))
        self.on_exception = arguments.boolean("on_exception", on_exception)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        if not (top_k or last_n or on_exception):
            raise ValueError("top_k, last_n or on_exception must ask for files, got 0, 0 and False.")
        self._list: List | None = None  # while training

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def best(self) -> Path | None:
        """The file with the best value, or None.

        Raises:
            ValueError: If this file, or the list of files, is not what was written.
        """
        return self._path(List.ranked)

    @property
    def latest(self) -> Path | None:
        """The file that was written last, or None.

        Raises:
            ValueError: If this file, or the list of files, is not what was written.
        """
        return self._path(lambda listed: listed.entries[-1:])

    def _path(self, of: Callable[[List], list[Entry]]) -> Path | None:
        entries = of(List.read(self.directory))
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
            with refusing_unbuilt_layers(model, path):
                model.load_weights(path)
            return model
        if path.name.endswith(ENDINGS["weights"]):
            raise ValueError(f"model must be given for {path}, which holds weights alone.")
        model = keras.saving.load_model(path)
        if not all(layer.built for layer in sublayers(model)):  # they may have been so when it was saved
            alone = keras.saving.load_model(path, compile=False)
            with refusing_unbuilt_layers(alone, path):
                alone.load_weights(path)
        return model

    # -- training -----------------------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        directory = Path(self.directory)
        self._refuse_if_shared(directory)
        self._refuse_what_a_file_cannot_hold()
        directory.mkdir(parents=True, exist_ok=True)
        for path in leftovers(directory, re.compile(f"{NAME.pattern}|{re.escape(List.name)}")):
            path.unlink()
        self._list = List.read(directory)
        self._list.finish()
        self._list.forget_what_is_damaged()
        self._watched = Watched(self.model, self.monitor or "", self.mode)
        if self.top_k:
            self._watched.begin_training()
        self._adopt_mode(self.mode)
        self._due = Due(self.every, self._updates(), others.updates_at_most_once_a_batch(self.model))
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
            Entry("", self._epoch + 1, self._updates(), value, regular, error, ""), ENDINGS[self.save]
        )
        with atomic_path(self._list.directory / entry.file) as unfinished:
            mark_as_built(model)
            if self.save == "model":
                model.save(unfinished)
            else:
                model.save_weights(unfinished)
            entry = dataclasses.replace(entry, sha256=digest(unfinished))
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

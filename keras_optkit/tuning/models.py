"""The trained model of a trial on disk: a `.keras` file, or its weights where it cannot be such a file."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import keras

from keras_optkit.files import atomic_path
from keras_optkit.optimizers.of_model import optimizers_of
from keras_optkit.private import known_variables
from keras_optkit.tuning.books import CannotWriteError, read_json, write_json, writing


@contextlib.contextmanager
def _as_built(model: keras.Model) -> Iterator[None]:
    """Has Keras save a model that never was called as a whole, since it has a `train_step` and no `call`."""
    built, model.built = model.built, True
    try:
        yield
    finally:
        model.built = built


class KeptModel:
    """A trained model in the directory of a trial, with the state of its optimizers.

    A `.keras` file holds the model itself, where Keras can serialise it. For another one, e.g. a subclass whose
    arguments are functions, there are its weights; and a file that Keras cannot open again, e.g. with a loss that is
    defined inside a function, still has the weights in it. Both are loaded into the model that the build function
    returns, which a file beside them helps to build.

    Args:
        directory: Of the trial.
        name: What the names of the files begin with.
    """

    def __init__(self, directory: Path, name: str = "model") -> None:
        self._model = directory / f"{name}.keras"
        self._weights = directory / f"{name}.weights.h5"
        self._built = directory / f"{name}.built.json"

    @property
    def path(self) -> Path:
        """The file that there is; that of a `.keras` file, if there is none."""
        return self._weights if self._weights.exists() else self._model

    def save(self, model: keras.Model) -> str:
        """Saves a model over the last one, as a whole or not at all; returns why it is not a `.keras` file, or "".

        Raises:
            CannotWriteError: If the disk does not take it.
        """
        why_not = self._write(self._model, model, model.save)
        if why_not and (of_weights := self._write(self._weights, model, model.save_weights)):
            self.remove()
            return f"{why_not} And its weights cannot be kept. {of_weights}"
        (self._model if why_not else self._weights).unlink(missing_ok=True)
        self._write_how_it_is_built(model)
        return why_not

    def save_weights(self, model: keras.Model) -> None:
        """Saves the weights and the state of the optimizers alone.

        Raises:
            CannotWriteError: If the disk does not take them.
        """
        with writing(self._weights), atomic_path(self._weights) as path, _as_built(model):
            model.save_weights(path)
        self._write_how_it_is_built(model)

    @staticmethod
    def _write(path: Path, model: keras.Model, save: Callable[[Path], None]) -> str:
        try:
            with writing(path), atomic_path(path) as unfinished, _as_built(model):
                save(unfinished)
        except CannotWriteError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        return ""

    def _write_how_it_is_built(self, model: keras.Model) -> None:
        trainable = model.trainable_variables
        place = {id(variable): i for i, variable in enumerate(trainable)}
        optimizers = [
            [place[id(variable)] for variable in known_variables(optimizer) or trainable if id(variable) in place]
            if optimizer.built
            else []
            for optimizer in optimizers_of(model)
        ]
        try:
            write_json(self._built, {"model": model.get_build_config(), "optimizers": optimizers})
        except TypeError:  # a config of the model's own that JSON does not hold; its build function may build it
            write_json(self._built, {"model": None, "optimizers": optimizers})

    def load(self, build: Callable[[], keras.Model]) -> keras.Model:
        """The model, compiled: from the file alone where that is possible, or else built, with the weights of the file.

        Raises:
            RuntimeError: If it cannot be loaded in either way.
        """
        reason: Exception | None = None
        if self.path == self._model:
            try:
                model = keras.saving.load_model(self._model)
                if type(model).compile is keras.Model.compile:  # Keras leaves out a compile method of the model's own
                    return model
            except Exception as error:
                reason = error
        model = build()
        try:
            self.load_into(model)
        except RuntimeError as error:
            raise error from error.__cause__ if reason is None else reason
        return model

    def load_into(self, model: keras.Model) -> None:
        """Loads the weights and the state of the optimizers into a model that need not be built.

        Raises:
            RuntimeError: If they do not fit, or if the model cannot be built.
        """
        try:
            built = read_json(self._built)
            if not model.built:
                model.build_from_config(built["model"])
                model.built = True  # Keras leaves that open for a subclass, whose layers it has built
            trainable = model.trainable_variables
            for optimizer, places in zip(optimizers_of(model), built["optimizers"], strict=False):
                if not optimizer.built and places:
                    optimizer.build([trainable[i] for i in places])
            model.load_weights(self.path)
        except Exception as error:
            raise RuntimeError(
                f"The model cannot be loaded from {str(self.path)!r}, which holds its weights: {error} By hand: build "
                "it, call it on a batch, and use its load_weights."
            ) from error

    def remove(self) -> None:
        """Deletes the files."""
        for path in (self._model, self._weights, self._built):
            path.unlink(missing_ok=True)

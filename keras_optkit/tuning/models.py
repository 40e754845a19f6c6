"""The trained model of a trial on disk: a `.keras` file, or its weights where it cannot be such a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import keras

from keras_optkit.files import atomic_path
from keras_optkit.tuning.books import CannotWriteError, write_json, writing

MODEL, WEIGHTS, SHAPES = "model.keras", "model.weights.h5", "shapes.json"


class KeptModel:
    """The model of a trial in the trial's directory, with its optimizer.

    A `.keras` file holds the model itself, where Keras can serialise it. For another one, e.g. a subclass whose
    arguments are functions, there are its weights; and a file that Keras cannot open again, e.g. with a loss that is
    defined inside of a function, still has the weights in it. Both are loaded into the model that the build function
    returns.

    Args:
        directory: Of the trial.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @property
    def path(self) -> Path:
        """The file that there is; that of a `.keras` file, if there is none."""
        weights = self._directory / WEIGHTS
        return weights if weights.exists() else self._directory / MODEL

    def save(self, model: keras.Model) -> str:
        """Saves a model over the last one, as a whole or not at all; returns why it is not a `.keras` file, or "".

        Raises:
            CannotWriteError: If the disk does not take it.
        """
        why_not = self._write(MODEL, model.save)
        if not why_not:
            (self._directory / WEIGHTS).unlink(missing_ok=True)
        elif not (of_weights := self._write(WEIGHTS, model.save_weights)):
            (self._directory / MODEL).unlink(missing_ok=True)
        else:
            self.remove()
            return f"{why_not} And not its weights: {of_weights}"
        try:
            write_json(self._directory / SHAPES, model.get_build_config())
        except TypeError:  # a config of the model's own; the build function may build it
            (self._directory / SHAPES).unlink(missing_ok=True)
        return why_not

    def _write(self, name: str, save: Callable[[Path], None]) -> str:
        try:
            with writing(self._directory / name), atomic_path(self._directory / name) as path:
                save(path)
        except CannotWriteError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        return ""

    def load(self, build: Callable[[], keras.Model]) -> keras.Model:
        """The model, compiled: from the file alone where that is possible, or else built, with the weights of the file.

        Raises:
            FileNotFoundError: If it is not kept.
            RuntimeError: If it cannot be loaded in either way.
        """
        path = self.path
        if not path.exists():
            raise FileNotFoundError(f"No model is kept in {str(self._directory)!r}.")
        reason: Exception | None = None
        if path.name == MODEL:
            try:
                model = keras.saving.load_model(path)
                if type(model).compile is keras.Model.compile:  # Keras leaves out a compile method of the model's own
                    return model
            except Exception as error:
                reason = error
        try:
            return self._into(build())
        except Exception as error:
            error.__cause__ = error.__cause__ or reason
            raise RuntimeError(
                f"The model cannot be loaded from {str(path)!r}, which holds its weights: {error} By hand: build it, "
                "call it on a batch, and use its load_weights."
            ) from error

    def _into(self, model: keras.Model) -> keras.Model:
        if not model.built:
            shapes = self._directory / SHAPES
            if shapes.exists():
                model.build_from_config(json.loads(shapes.read_text()))
            model.built = True  # Keras leaves that open for a subclass, whose layers it has built
        load_state(model, self.path)
        return model

    def remove(self) -> None:
        """Deletes the files."""
        for name in (MODEL, WEIGHTS, SHAPES):
            (self._directory / name).unlink(missing_ok=True)


def load_state(model: keras.Model, path: Path) -> None:
    """Loads the weights into a model that is built, and the state of its optimizer."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    model.load_weights(path)


def save_state(model: keras.Model, path: Path) -> None:
    """Saves what `load_state` loads, as a whole or not at all.

    Raises:
        CannotWriteError: If the disk does not take it.
    """
    with writing(path), atomic_path(path) as unfinished:
        model.save_weights(unfinished)

"""The callbacks of each run of a search: made by a function, or copied."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
from keras_tuner.errors import FatalTypeError

from keras_optkit.space import Values

Callbacks = Callable[..., Sequence[keras.callbacks.Callback]]

_WANTED = "callbacks must be a function of (), (hp) or (hp, log_dir) that returns a list of new callbacks"


class Factory:
    """Calls a function that makes callbacks with as much of (values, log directory) as it takes.

    Args:
        function: The argument `callbacks` of `search`; None makes none.

    Raises:
        TypeError: If it is not a function, or one with more parameters.
    """

    def __init__(self, function: Callbacks | None) -> None:
        if function is not None and not callable(function):
            raise TypeError(f"{_WANTED}, since each trial needs its own, e.g. lambda: [...], got {function!r}.")
        self._function = function
        self._arity = 0 if function is None else self._required(function)

    @staticmethod
    def _required(function: Callbacks) -> int:
        """How many parameters without defaults there are."""
        parameters = inspect.signature(function).parameters.values()
        count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        if count > 2:
            raise TypeError(f"{_WANTED}, got {function!r} with {count} arguments.")
        return count

    def __call__(self, values: Values, directory: Path | None, run: Path) -> list[Any]:  # noqa: ARG002  (of copies)
        """The callbacks of one run."""
        return [] if self._function is None else _checked(self._function(*(values, directory)[: self._arity]))


def _checked(callbacks: Any) -> list[Any]:
    if not isinstance(callbacks, list | tuple) or not all(isinstance(c, keras.callbacks.Callback) for c in callbacks):
        raise FatalTypeError(f"callbacks must return a list of keras.callbacks.Callback, got {callbacks!r}.")
    return list(callbacks)


class Copies:
    """Copies a list of callbacks for each run, as KerasTuner does.

    A stock TensorBoard callback writes into a directory of each run, below its own.

    Raises:
        TypeError: If one of them is not a callback, or cannot be copied.
    """

    def __init__(self, callbacks: Sequence[Any]) -> None:
        for callback in callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise TypeError(f"callbacks must be keras.callbacks.Callback, got {callback!r}.")
            try:
                copy.deepcopy(callback)
            except Exception as error:
                raise TypeError(
                    f"callbacks must be such that copy.deepcopy can copy them for each trial, got {callback!r}, which "
                    f"raises {type(error).__name__}: {error} Or pass a function that returns new ones."
                ) from error
        self._callbacks = callbacks

    def __call__(self, values: Values, directory: Path | None, run: Path) -> list[Any]:  # noqa: ARG002  (of factories)
        """The callbacks of one run."""
        copies = list(copy.deepcopy(self._callbacks))
        for callback in copies:
            if isinstance(callback, keras.callbacks.TensorBoard):
                callback.log_dir = str(Path(callback.log_dir) / run)
        return copies


def of_search(callbacks: Any) -> Factory | Copies:
    """What `Tuner.search` was given as callbacks: a list, one callback, or a function that makes them."""
    if isinstance(callbacks, keras.callbacks.Callback):
        callbacks = [callbacks]
    return Copies(callbacks) if isinstance(callbacks, list | tuple) else Factory(callbacks)

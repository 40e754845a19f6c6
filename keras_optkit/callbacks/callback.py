"""The base of our callbacks: a callback that is also told when training fails.

Keras calls `on_train_end` only when `fit` comes to its end; callbacks are not told of an exception, Ctrl-C included.
The first callback made here therefore puts a wrapper around `keras.Model.fit`. It passes everything through, and when
an exception comes by, from data, model, metrics or another callback, it tells the callbacks before letting it go on.
For callbacks that have to know, `evaluate` and `predict` are wrapped, too.
"""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass, field
from typing import Any, ClassVar

import keras
from keras import ops

from keras_optkit.saving import FromSignature

#: What is called on the callbacks when an exception leaves a method of `keras.Model`.
_ON_FAILURE = {"fit": "on_train_failure", "evaluate": "on_test_failure", "predict": "on_predict_failure"}


@dataclass
class Run:
    """A `model.fit(...)` or another method that is running: its arguments by name, and those of our callbacks in it."""

    method: str
    model: Any
    arguments: dict[str, Any]
    callbacks: list[Callback] = field(default_factory=list)


_thread = threading.local()


def _running() -> list[Run]:
    if not hasattr(_thread, "runs"):
        _thread.runs = []
    return _thread.runs


def running_fit(model: Any) -> Run | None:
    """The innermost running `fit` of this model, or None, e.g. when callbacks are called from a hand-written loop."""
    return next((run for run in reversed(_running()) if run.model is model and run.method == "fit"), None)


def _guard(method: str) -> None:
    function = getattr(keras.Model, method)
    if getattr(function, "tells_callbacks_of_failure", False):
        return
    hook = _ON_FAILURE[method]

    @functools.wraps(function)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = inspect.signature(function).bind(self, *args, **kwargs).arguments
        except TypeError:  # Keras says it better
            given = {}
        run = Run(method, self, dict(given))
        _running().append(run)
        try:
            return function(self, *args, **kwargs)
        except BaseException as error:
            for callback in reversed(run.callbacks):
                try:
                    getattr(callback, hook)(error)
                except Exception as second:  # the others have to be told, and the first error is the one to see
                    error.add_note(f"{type(callback).__name__}.{hook} raised {second!r}.")
            raise
        finally:
            _running().remove(run)

    guarded.tells_callbacks_of_failure = True  # type: ignore[attr-defined]
    setattr(keras.Model, method, guarded)


def number(scalar: Any) -> Any:
    """A scalar variable or tensor as a Python number."""
    return (scalar.numpy() if isinstance(scalar, keras.Variable) else ops.convert_to_numpy(scalar)).item()


class Callback(FromSignature, keras.callbacks.Callback):
    """A Keras callback with one hook more, `on_train_failure`.

    Subclasses call `super().__init__()`, which sees to it that `fit` is guarded.

    Attributes:
        guards: The methods of `keras.Model` whose failure the callback has to be told; `evaluate` and `predict` only
            count where the callback is passed to them directly.
    """

    guards: ClassVar[tuple[str, ...]] = ("fit",)

    def __init__(self) -> None:
        super().__init__()
        for method in self.guards:
            _guard(method)

    def set_model(self, model: Any) -> None:
        """Called by Keras when `fit`, `evaluate` or `predict` begins."""
        super().set_model(model)
        run = next((run for run in reversed(_running()) if run.model is model), None)
        if run is not None and self not in run.callbacks:
            run.callbacks.append(self)

    def _updates(self) -> int:
        """The number of updates that the optimizer has made.

        Inside an epoch Keras's variables are empty on JAX; asking for `self.model` has Keras fill them.
        """
        iterations = self.model.optimizer.iterations
        try:
            return number(iterations)
        except TypeError as error:  # so Keras on JAX answers once the first step of a `fit` has failed
            raise RuntimeError("Keras has lost the optimizer's variables in a step that failed.") from error

    def on_train_failure(self, error: BaseException) -> None:
        """Called when an exception, Ctrl-C included, leaves `fit`; it goes on afterwards.

        It may come at any moment, also before `on_train_begin` or after `on_train_end`.

        Args:
            error: The exception.
        """

    def on_test_failure(self, error: BaseException) -> None:
        """Called when an exception leaves an `evaluate` that this callback was passed to, if it is guarded.

        Args:
            error: The exception.
        """

    def on_predict_failure(self, error: BaseException) -> None:
        """Called when an exception leaves a `predict` that this callback was passed to, if it is guarded.

        Args:
            error: The exception.
        """

"""The base of our callbacks: a callback that is also told when training fails.

Keras calls `on_train_end` only when `fit` comes to its end; callbacks are not told of an exception, Ctrl-C included.
The first callback made here therefore puts a wrapper around `keras.Model.fit`. It passes everything through, and when
an exception comes by, from data, model, metrics or another callback, it tells the callbacks before letting it go on.
"""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from keras_optkit.saving import FromSignature


@dataclass
class Fit:
    """A `model.fit(...)` that is running: its arguments by name, and those of our callbacks that take part."""

    model: Any
    arguments: dict[str, Any]
    callbacks: list[Callback] = field(default_factory=list)


_thread = threading.local()


def _running() -> list[Fit]:
    if not hasattr(_thread, "fits"):
        _thread.fits = []
    return _thread.fits


def running_fit(model: Any) -> Fit | None:
    """The innermost running `fit` of this model, or None, e.g. when callbacks are called from a hand-written loop."""
    return next((fit for fit in reversed(_running()) if fit.model is model), None)


def _guard_fit() -> None:
    fit = keras.Model.fit
    if getattr(fit, "tells_callbacks_of_failure", False):
        return

    @functools.wraps(fit)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = inspect.signature(fit).bind(self, *args, **kwargs).arguments
        except TypeError:  # Keras says it better
            given = {}
        run = Fit(self, dict(given))
        _running().append(run)
        try:
            return fit(self, *args, **kwargs)
        except BaseException as error:
            for callback in reversed(run.callbacks):
                try:
                    callback.on_train_failure(error)
                except Exception as second:  # the others have to be told, and the first error is the one to see
                    error.add_note(f"{type(callback).__name__}.on_train_failure raised {second!r}.")
            raise
        finally:
            _running().remove(run)

    guarded.tells_callbacks_of_failure = True  # type: ignore[attr-defined]
    keras.Model.fit = guarded


def number(scalar: Any) -> Any:
    """A scalar variable or tensor as a Python number."""
    return (scalar.numpy() if isinstance(scalar, keras.Variable) else ops.convert_to_numpy(scalar)).item()


class Callback(FromSignature, keras.callbacks.Callback):
    """A Keras callback with one hook more, `on_train_failure`.

    Subclasses call `super().__init__()`, which sees to it that `fit` is guarded.
    """

    def __init__(self) -> None:
        super().__init__()
        _guard_fit()

    def set_model(self, model: Any) -> None:
        """Called by Keras when `fit` begins."""
        super().set_model(model)
        run = running_fit(model)
        if run is not None and self not in run.callbacks:
            run.callbacks.append(self)

    def on_train_failure(self, error: BaseException) -> None:
        """Called when an exception, Ctrl-C included, leaves `fit`; it goes on afterwards.

        It may come at any moment, also before `on_train_begin` or after `on_train_end`.

        Args:
            error: The exception.
        """

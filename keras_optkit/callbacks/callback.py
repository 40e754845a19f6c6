"""The base of our callbacks: a callback that is also told when training fails.

Keras calls `on_train_end` only when `fit` comes to its end; callbacks are not told of an exception, Ctrl-C included.
There is therefore a wrapper around `keras.Model.fit`, `evaluate` and `predict`; see `keras_optkit.wrapping`. It passes
everything through, and when an exception comes by, from data, model, metrics or another callback, it tells our
callbacks before letting it go on.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
from keras import ops

from keras_optkit.optimizers.of_model import update_counter
from keras_optkit.saving import FromSignature

#: What is called on the callbacks when an exception leaves a method of `keras.Model`.
ON_FAILURE = {"fit": "on_train_failure", "evaluate": "on_test_failure", "predict": "on_predict_failure"}


@dataclass
class Run:
    """A `model.fit(...)` or another method that is running: its arguments by name, and those of our callbacks in it.

    What is given as `x` or as a callback may have a method `prepare_fit(run)`, which is called before `fit` itself, and
    may change the arguments.
    """

    method: str
    model: Any
    arguments: dict[str, Any]
    callbacks: list[Callback] = field(default_factory=list)

    def listed(self) -> list[Any]:
        """The callbacks that the method was given."""
        given = self.arguments.get("callbacks") or []
        return given.callbacks if isinstance(given, keras.callbacks.CallbackList) else keras.tree.flatten(given)

    def add(self, callback: Any, *, first: bool = False) -> None:
        """Adds a callback, as the first or as the last one."""
        given, listed = self.arguments.get("callbacks"), self.listed()
        listed.insert(0 if first else len(listed), callback)
        if isinstance(given, keras.callbacks.CallbackList):  # what the list has told the others already
            callback.set_model(self.model)
            callback.set_params(given.params)
        else:
            self.arguments["callbacks"] = listed


_thread = threading.local()


def _running() -> list[Run]:
    if not hasattr(_thread, "runs"):
        _thread.runs = []
    return _thread.runs


def running_fit(model: Any) -> Run | None:
    """The innermost running `fit` of this model, or None, e.g. when callbacks are called from a hand-written loop."""
    return next((run for run in reversed(_running()) if run.model is model and run.method == "fit"), None)


def telling_callbacks(function: Callable[..., Any]) -> Callable[..., Any]:
    """`fit`, `evaluate` or `predict` of `keras.Model`, which tells our callbacks of an exception."""
    method = function.__name__
    hook, signature = ON_FAILURE[method], inspect.signature(function)

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:  # Keras says it better
            return function(self, *args, **kwargs)
        run = Run(method, self, given.arguments)
        _running().append(run)
        try:
            if method == "fit":
                for part in [run.arguments.get("x"), *run.listed()]:
                    if hasattr(part, "prepare_fit"):
                        part.prepare_fit(run)
            return function(*given.args, **given.kwargs)
        except BaseException as error:
            for callback in reversed(run.callbacks):
                try:
                    getattr(callback, hook)(error)
                except Exception as second:  # the others have to be told, and the first error is the one to see
                    error.add_note(f"{type(callback).__name__}.{hook} raised {second!r}.")
            raise
        finally:
            _running().remove(run)

    return wrapped


def number(scalar: Any) -> Any:
    """A scalar variable or tensor as a Python number."""
    return (scalar.numpy() if isinstance(scalar, keras.Variable) else ops.convert_to_numpy(scalar)).item()


class Callback(FromSignature, keras.callbacks.Callback):
    """A Keras callback with more hooks, `on_train_failure` and the like, and with state."""

    def set_model(self, model: Any) -> None:
        """Called by Keras when `fit`, `evaluate` or `predict` begins."""
        super().set_model(model)
        run = next((run for run in reversed(_running()) if run.model is model), None)
        if run is not None and self not in run.callbacks:
            run.callbacks.append(self)

    def _updates(self) -> int:
        """The number of updates that the model's optimizer has made; 0 where it has none. See `update_counter`.

        Inside an epoch Keras's variables are empty on JAX; asking for `self.model` has Keras fill them.
        """
        try:
            counter = update_counter(self.model)
            return 0 if counter is None else number(counter)
        except TypeError as error:  # so Keras on JAX answers once the first step of a `fit` has failed
            raise RuntimeError("Keras has lost the optimizer's variables in a step that failed.") from error

    def on_train_failure(self, error: BaseException) -> None:
        """Called when an exception, Ctrl-C included, leaves `fit`; it goes on afterwards.

        It may come at any moment, also before `on_train_begin` or after `on_train_end`.

        Args:
            error: The exception.
        """

    def on_test_failure(self, error: BaseException) -> None:
        """Called when an exception leaves an `evaluate` that this callback was passed to.

        Args:
            error: The exception.
        """

    def on_predict_failure(self, error: BaseException) -> None:
        """Called when an exception leaves a `predict` that this callback was passed to.

        Args:
            error: The exception.
        """

    def state_dict(self) -> dict[str, Any]:
        """What is to be known in order to go on in another process: numbers, strings and arrays, in lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets what `state_dict` returned.

        Called after `on_train_begin`, inside of an epoch after `on_epoch_begin`, of all callbacks, and before the
        variables of the model and the optimizer are set.

        Args:
            state: What `state_dict` returned.
        """

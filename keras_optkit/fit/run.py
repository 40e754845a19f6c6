"""A running `fit`, or another running method of `keras.Model`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import keras

#: The hook of callbacks that is called when a method of `keras.Model` raises.
ON_FAILURE = {"fit": "on_train_failure", "evaluate": "on_test_failure", "predict": "on_predict_failure"}


@dataclass
class Run:
    """A running `model.fit(...)` or another method: its arguments by name, and our callbacks in it.

    `x` and each callback may have a method `prepare_fit(run)`, which is called before `fit` itself and may change the
    arguments.
    """

    method: str
    model: Any
    arguments: dict[str, Any]
    callbacks: list[Any] = field(default_factory=list)

    def listed(self) -> list[Any]:
        """The callbacks that the method was given."""
        given = self.arguments.get("callbacks") or []
        return given.callbacks if isinstance(given, keras.callbacks.CallbackList) else keras.tree.flatten(given)

    def replace(self, kind: type, callback: Any) -> None:
        """Adds a callback in first place, and removes one of the same kind from an earlier run."""
        given = self.arguments.get("callbacks")
        if isinstance(given, keras.callbacks.CallbackList):
            given.callbacks[:] = [c for c in given.callbacks if not isinstance(c, kind)]
        self.add(callback, first=True)

    def add(self, callback: Any, *, first: bool = False) -> None:
        """Adds a callback in first or last place."""
        given, listed = self.arguments.get("callbacks"), self.listed()
        listed.insert(0 if first else len(listed), callback)
        if isinstance(given, keras.callbacks.CallbackList):  # the list has told the others already
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
    """The innermost running `fit` of this model, or None, for instance in a custom training loop."""
    return next((run for run in reversed(_running()) if run.model is model and run.method == "fit"), None)


def innermost_run(model: Any) -> Run | None:
    """The innermost running method of this model, or None."""
    return next((run for run in reversed(_running()) if run.model is model), None)


@contextlib.contextmanager
def telling_callbacks(run: Run) -> Iterator[None]:
    """Lets data and callbacks prepare a `fit`, and tells our callbacks if the method raises."""
    _running().append(run)
    try:
        if run.method == "fit":
            for part in [run.arguments.get("x"), *run.listed()]:
                if hasattr(part, "prepare_fit"):
                    part.prepare_fit(run)
        yield
    except BaseException as error:
        hook = ON_FAILURE[run.method]
        for callback in reversed(run.callbacks):
            try:
                getattr(callback, hook)(error)
            except Exception as second:  # the others have to be told, and the first error is the one to raise
                error.add_note(f"{type(callback).__name__}.{hook} raised {second!r}.")
        raise
    finally:
        _running().remove(run)

"""The wrapper around methods of `keras.Model`, which is applied once."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras

from keras_optkit.fit.needs import providing_needs
from keras_optkit.fit.optimizers import refusing_stock_averages, shown_the_model, told_of_files, told_of_training
from keras_optkit.fit.run import Run, telling_callbacks
from keras_optkit.fit.tracing import tracing_once
from keras_optkit.optimizers.state_tree import describing_optimizers, restoring_optimizers

#: What is around each method, the outermost first: callbacks may change the model before optimizers see it.
AROUND = {
    "compile": (shown_the_model,),
    "compile_from_config": (told_of_files,),
    "make_train_function": (tracing_once, providing_needs),
    "fit": (telling_callbacks, refusing_stock_averages, shown_the_model, told_of_training),
    "train_on_batch": (shown_the_model, told_of_training),
    "evaluate": (telling_callbacks, refusing_stock_averages),
    "predict": (telling_callbacks, refusing_stock_averages),
}


def wrap_keras() -> None:
    """Has `keras.Model` tell our optimizers and callbacks what Keras does not; unless it does.

    When the package is imported, and not when the first callback is made: `model.fit(..., callbacks=[Resume(...)])`
    looks `fit` up before that.
    """
    if hasattr(keras.Model, "_keras_optkit"):
        return
    for method in AROUND:
        # on the class that has it: Keras does not compile a loaded model whose class has another `compile`
        owner = next(base for base in keras.Model.__mro__ if method in vars(base))
        setattr(owner if method == "compile" else keras.Model, method, _wrapped(getattr(keras.Model, method)))
    keras.Model.get_state_tree = describing_optimizers(keras.Model.get_state_tree)
    keras.Model.set_state_tree = restoring_optimizers(keras.Model.set_state_tree)
    keras.Model._keras_optkit = True


def _wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    method, signature = function.__name__, inspect.signature(function)

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError:  # let Keras report it
            return function(self, *args, **kwargs)
        run = Run(method, self, given.arguments)
        with contextlib.ExitStack() as stack:
            for around in AROUND[method]:
                stack.enter_context(around(run))
            return function(*given.args, **given.kwargs)

    return wrapped

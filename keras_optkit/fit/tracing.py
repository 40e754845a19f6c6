"""The first step of a model, which TensorFlow traces once instead of twice.

A `tf.function` in which variables are made is traced a second time without them, since their first values could depend
on its arguments. Those of Keras (of metrics, of an optimizer, of layers that are built by the first batch) do not: they
are made outside of the function, and the first trace is the one that is used. A `fit` with metrics starts in half the
time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from keras_optkit.backend import TENSORFLOW
from keras_optkit.fit.run import Run


@contextlib.contextmanager
def tracing_once(run: Run) -> Iterator[None]:
    """Has the function that is made be traced once when it is called first."""
    model, name = run.model, run.method.removeprefix("make_")
    before = getattr(model, name)
    yield
    made = getattr(model, name)
    if TENSORFLOW and made is not before and not model.run_eagerly:
        setattr(model, name, _first(model, name, made))


def _first(model: Any, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a function of a model with variables made outside; once that has succeeded, the model has itself again."""
    done = False

    @functools.wraps(function)
    def first(*given: Any) -> Any:
        nonlocal done
        if done:
            return function(*given)
        import tensorflow as tf

        with tf.variable_creator_scope(_outside):
            results = function(*given)
        done = True
        if getattr(model, name) is first:
            setattr(model, name, function)
        return results

    return first


def _outside(make: Callable[..., Any], **settings: Any) -> Any:
    """Makes a variable outside of what is traced, unless its first value is computed there; replicas have their own."""
    import tensorflow as tf

    if tf.distribute.has_strategy() or tf.is_symbolic_tensor(settings.get("initial_value")):
        return make(**settings)
    with tf.init_scope():
        return make(**{**settings, "experimental_enable_variable_lifting": False})

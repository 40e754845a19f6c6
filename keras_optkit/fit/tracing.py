"""The first step of a model, which TensorFlow traces once instead of twice.

A `tf.function` in which variables are made is traced a second time without them, and Keras makes those of metrics,
optimizers and layers that the first batch builds in the first step. Here a rehearsal makes them: Keras's own step on
tensors without values, with zeros for the gradients and without an update, so that about a third of the first trace is
left. Its graph is thrown away, as that is, and what a step decides by what is built it decides as ever.

It is not enough to build metrics and optimizer: their number and kind depend on what the model returns in training, for
labels of that shape. Nor to make all variables outside of the first trace and keep it: as long as Keras's
`LossScaleOptimizer` is not built, its initial scale is a constant in the step.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_optkit.backend import TENSORFLOW
from keras_optkit.fit.run import Run
from keras_optkit.optimizers.of_model import ours
from keras_optkit.private import compiled_metrics

if TENSORFLOW:
    import tensorflow as tf


@contextlib.contextmanager
def tracing_once(run: Run) -> Iterator[None]:
    """Has the step of a model be rehearsed before it is traced, if it is Keras's own."""
    model = run.model
    before, own = model.train_function, vars(model).get("train_step")
    yield
    made = model.train_function
    if not TENSORFLOW or made is before or model.run_eagerly or type(model).train_step is not keras.Model.train_step:
        return
    around_that_of_keras = own is None or hasattr(own, "provides")
    # a driven optimizer is built with the values that it is driven with, inside of the step
    if around_that_of_keras and not getattr(own, "drives", False):
        model.train_function = _rehearsed(model, made)


def _rehearsed(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Rehearses the step until a first call succeeds, and then gives way to the function itself."""
    done = False

    @functools.wraps(function)
    def first(iterator: Any) -> Any:
        nonlocal done
        if done:
            return function(iterator)
        if _makes_variables(model) and not tf.config.functions_run_eagerly():
            batch, iterator = _peeked(iterator)
            if batch is not None:
                with contextlib.suppress(Exception):  # the step raises it again
                    _rehearse(model, batch)
        logs = function(iterator)
        done = True
        if model.train_function is first:
            model.train_function = function
        return logs

    return first


def _makes_variables(model: Any) -> bool:
    """Whether the step makes variables that a rehearsal can make, unlike those of an optimizer of ours."""
    optimizer, metrics = model.optimizer, compiled_metrics(model)
    if optimizer is None or (ours(optimizer) and not optimizer.built):
        return False
    return not optimizer.built or (metrics is not None and not metrics.built)


def _peeked(iterator: Any) -> tuple[Any, Any]:
    """The next batch or its spec, None where it is unknown, and an iterator that still has it."""
    if isinstance(iterator, tf.distribute.DistributedIterator):
        return None, iterator  # Keras builds everything before
    if isinstance(iterator, tf.data.Iterator):
        return keras.tree.map_structure(_without_optional, iterator.element_spec), iterator
    batches = list(itertools.islice(iterator, 1))  # the one batch of `train_on_batch`
    return (batches or [None])[0], itertools.chain(batches, iterator)


def _without_optional(spec: Any) -> Any:
    return None if isinstance(spec, tf.OptionalSpec) else spec


def _rehearse(model: Any, batch: Any) -> None:
    optimizer = model.optimizer
    method = "apply" if ours(optimizer) else "update_step"

    def step(data: Any) -> None:
        with _gradients_of_zeros(), tf.variable_creator_scope(_outside):
            keras.Model.train_step(model, data)

    held = vars(optimizer).get(method)
    vars(optimizer)[method] = lambda *_, **__: None
    try:
        tf.function(step, autograph=False).get_concrete_function(batch)
    finally:
        if held is None:
            del vars(optimizer)[method]
        else:
            vars(optimizer)[method] = held


def _outside(make: Callable[..., Any], **settings: Any) -> Any:
    """Makes a variable outside of what is traced."""
    value = settings.get("initial_value")
    if tf.is_symbolic_tensor(value):
        value = tf.get_static_value(value)
        if value is None:
            raise NotImplementedError("A first value that is computed from the batch.")
    with tf.init_scope():
        return make(**{**settings, "initial_value": value, "experimental_enable_variable_lifting": False})


_changing = threading.Lock()
_threads: set[int] = set()  # those that rehearse


@contextlib.contextmanager
def _gradients_of_zeros() -> Iterator[None]:
    """In this thread, gradients are zeros, for which nothing is traced."""
    thread = threading.get_ident()
    with _changing:
        if not _threads:
            tf.GradientTape.gradient = _zeros(tf.GradientTape.gradient)
        _threads.add(thread)
    try:
        yield
    finally:
        with _changing:
            _threads.remove(thread)
            if not _threads:
                tf.GradientTape.gradient = tf.GradientTape.gradient.__wrapped__


def _zeros(gradient: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(gradient)
    def zeros(self: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() not in _threads:
            return gradient(self, target, sources, *args, **kwargs)
        return tf.nest.map_structure(tf.zeros_like, sources)

    return zeros

"""The first step of a model, which TensorFlow traces once instead of twice.

A `tf.function` in which variables are made is traced a second time without them. On TensorFlow, Keras makes those of
metrics and optimizer in the first step, so that a `fit` with metrics starts in almost twice the time that it needs. On
JAX, and where a strategy distributes, it makes them before the step, as is done here.

They are not merely made elsewhere while the step is traced: what a step does may depend on what is built, as Keras's
`LossScaleOptimizer` has its initial scale as a constant until it is.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_optkit.backend import TENSORFLOW
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.fit.run import Run
from keras_optkit.private import compiled_metrics

if TENSORFLOW:
    import tensorflow as tf


@contextlib.contextmanager
def tracing_once(run: Run) -> Iterator[None]:
    """Has the function that is made build what its first step would, if that step is Keras's own."""
    model, name = run.model, run.method.removeprefix("make_")
    step = name.replace("function", "step")
    before, own = getattr(model, name), vars(model).get(step)
    yield
    made = getattr(model, name)
    if not TENSORFLOW or made is before or model.run_eagerly:
        return
    around_that_of_keras = own is None or hasattr(own, "provides")
    if around_that_of_keras and getattr(type(model), step) is getattr(keras.Model, step):
        # an optimizer whose hyperparameters are driven is built with the values that it is driven with
        builds_optimizer = step == "train_step" and not getattr(own, "drives", False)
        setattr(model, name, _building_first(model, name, made, builds_optimizer))


def _building_first(model: Any, name: str, function: Callable[..., Any], builds_optimizer: bool) -> Callable[..., Any]:
    """Builds what is not built until a first call succeeds, and then gives way to the function itself."""
    done = False

    @functools.wraps(function)
    def first(iterator: Any) -> Any:
        nonlocal done
        if done:
            return function(iterator)
        logs = function(_build(model, iterator, builds_optimizer))
        done = True
        if getattr(model, name) is first:
            setattr(model, name, function)
        return logs

    return first


def _build(model: Any, iterator: Any, builds_optimizer: bool) -> Any:
    """Builds what a step with the next batch would; returns an iterator that still has this batch."""
    if not model.built or isinstance(iterator, tf.distribute.DistributedIterator):
        return iterator  # then there are variables to make in the first step anyway, or none any more
    if isinstance(iterator, tf.data.Iterator):
        batch = iterator.element_spec
    else:  # over the one batch of `train_on_batch`
        batches = list(itertools.islice(iterator, 1))
        iterator = itertools.chain(batches, iterator)
        batch = batches[0] if batches else None
    if builds_optimizer:
        build_optimizer(model)
    with contextlib.suppress(Exception):  # the step raises it again, after what else Keras says about the data
        _build_metrics(model, batch)
    return iterator


def _build_metrics(model: Any, batch: Any) -> None:
    """Builds the metrics that the model was compiled with, and those of the losses of several outputs."""
    metrics = compiled_metrics(model)
    if type(model).compute_metrics is not keras.Model.compute_metrics:
        return
    x, y, _ = keras.utils.unpack_x_y_sample_weight(keras.tree.map_structure(_symbolic, batch))
    of_any_size = keras.tree.map_structure(lambda given: keras.KerasTensor((None, *given.shape[1:]), given.dtype), x)
    y_pred = model.compute_output_spec(of_any_size)
    if metrics is not None and not metrics.built:
        metrics.build(y, y_pred)
    if keras.tree.is_nested(y_pred):
        specs = keras.tree.map_structure(lambda given: tf.TensorSpec(given.shape, given.dtype), (x, y, y_pred))
        tf.function(model.compute_loss, autograph=False).get_concrete_function(*specs)


def _symbolic(given: Any) -> Any:
    """A symbolic tensor like a part of a batch or of its spec."""
    if given is None or isinstance(given, tf.OptionalSpec):
        return None
    if isinstance(given, (tf.RaggedTensorSpec, tf.SparseTensorSpec)):
        raise TypeError(f"A {type(given).__name__} has no symbolic form.")
    return keras.KerasTensor(given.shape, keras.backend.standardize_dtype(given.dtype))

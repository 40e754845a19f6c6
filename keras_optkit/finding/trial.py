"""Trying something out: a model is trained for a while, and is afterwards as it was found."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit import arguments
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.data import Shuffled
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.optimizers.of_model import innermost, optimizers_of
from keras_optkit.private import forget_trace, sublayers

#: What `fit` sets on a model besides the state of the training.
_ATTRIBUTES = ("history", "stop_training", "steps_per_execution", "train_function")

#: Epochs of a trial, which a callback ends; data that are too few for it are begun again.
_ENDLESS = 10**9

_ABSENT = object()


@contextlib.contextmanager
def as_found(model: Any) -> Iterator[None]:
    """Puts everything back when the block ends, however it ends; after `build`.

    That is the state of the training, and with it the compiled training step, `history`, `stop_training` and
    `steps_per_execution`. An optimizer that was not built is built, and metrics that were not are at zero.
    """
    attributes = {name: getattr(model, name, _ABSENT) for name in _ATTRIBUTES}
    with state_as_found(model):
        try:
            yield
        finally:
            for name, value in attributes.items():
                if value is not _ABSENT:
                    setattr(model, name, value)
                elif hasattr(model, name):
                    delattr(model, name)
            if keras.config.backend() == "jax":  # or the old function would continue with the trace of the trial
                forget_trace(model.train_step)


@contextlib.contextmanager
def state_as_found(model: Any) -> Iterator[None]:
    """Puts the state of the training back when the block ends; see `keras_optkit.callbacks.state` for what that is."""
    state = TrainingState.of(model)
    try:
        yield
    finally:
        model.reset_metrics()
        # metrics that the first batch has built were in no state
        state.into(model, metrics=len(model.metrics_variables) == len(state.metrics))


def checked_model(model: Any) -> Any:
    """Returns `model` if it can be trained.

    Raises:
        TypeError: If it is no Keras model.
        ValueError: If it is not compiled, or holds no optimizer.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    if not model.compiled:
        raise ValueError(f"model must be compiled, got {model.name!r}, which is not. Call compile(optimizer, loss).")
    if not optimizers_of(model):
        raise ValueError(f"model must have an optimizer, got {model.name!r}, which has none. Call compile(optimizer).")
    return model


def used_optimizers(model: Any) -> list[Any]:
    """The optimizers that the training step may use: with Keras's own step the one of `compile`, else all it holds."""
    return [model.optimizer] if _has_own_step(model) else optimizers_of(model)


def _has_own_step(model: Any) -> bool:
    """Whether the training step is Keras's own, with the optimizer of `compile`."""
    return type(model).train_step is keras.Model.train_step and model.optimizer is not None


# -- data -------------------------------------------------------------------------------------------------------------


def checked_arrays(data: Any) -> tuple[Any, ...] | None:
    """`data` if it is a tuple of arrays, as for `Shuffled`; None if it is something that gives batches.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(data, tuple) and 1 <= len(data) <= 3:
        return data
    gives_batches = isinstance(data, Iterable | keras.utils.PyDataset)
    if not gives_batches or isinstance(data, tuple | list | dict | str | bytes) or hasattr(data, "shape"):
        raise TypeError(
            "data must be a tuple (x,), (x, y) or (x, y, sample_weight) of arrays, or a tf.data.Dataset, PyDataset, "
            f"DataLoader or generator of batches, got {_described(data)}."
        )
    return None


def _described(data: Any) -> str:
    return f"a {type(data).__name__}" + (f" of {len(data)} parts" if isinstance(data, tuple) else "")


def batches(data: Any, batch_size: int | None, seed: int) -> dict[str, Any]:
    """The arguments of `fit` that give it the data.

    Raises:
        TypeError: If `data` is not data.
        ValueError: If data that have batches of their own come with a batch size.
    """
    arguments.integer("batch_size", batch_size, 1, optional=True)
    arguments.integer("seed", seed, 0)
    arrays = checked_arrays(data)
    if arrays is not None:
        return {"x": Shuffled(*arrays, batch_size=batch_size or 32, seed=seed)}
    if batch_size is not None:
        raise ValueError(f"batch_size must be None for data that give batches ({_described(data)}), got {batch_size}.")
    # Keras can shuffle the batches of a PyDataset that ends, and warns if it is to shuffle others
    return {"x": data, "shuffle": isinstance(data, keras.utils.PyDataset) and data.num_batches is not None}


# -- building ---------------------------------------------------------------------------------------------------------


def build(model: Any, data: Any) -> Any:
    """Makes the variables of layers and optimizers that the first training step would make, without training.

    Args:
        model: A compiled model.
        data: What `fit` takes as x, giving batches.

    Returns:
        The same data, which have not lost a batch.
    """
    if not _is_built(model):
        data = _build_by_first_batch(model, data)
    if _has_own_step(model) or (model.optimizer is not None and keras.config.backend() != "tensorflow"):
        build_optimizer(model)
    return data


def _is_built(model: Any) -> bool:
    """Whether there is all that a step uses; Keras's own step is known to use the optimizer of `compile` alone."""
    optimizers = [] if _has_own_step(model) else optimizers_of(model)
    inside = [inner for optimizer in optimizers for inner in innermost(optimizer)]
    return all(part.built for part in [model, *sublayers(model), *inside])


def _build_by_first_batch(model: Any, data: Any) -> Any:
    batch, data = _first_batch(data)
    if keras.config.backend() != "tensorflow":
        x, *_ = keras.utils.unpack_x_y_sample_weight(batch)
        model(tree.map_structure(lambda part: keras.KerasTensor(*_kind(part)), x))
        return data
    import tensorflow as tf

    # a trace makes all variables at the values that they begin with, whatever the model's train_step is
    strategy = model.distribute_strategy
    step = tf.function(lambda batch: strategy.run(model.train_step, args=(batch,)))
    specs = tree.map_structure(
        lambda part: part if isinstance(part, tf.TypeSpec) else tf.TensorSpec(*_kind(part)), batch
    )
    with strategy.scope():
        step.get_concrete_function(specs)
    return data


def _first_batch(data: Any) -> tuple[Any, Any]:
    """The first batch, as a training step is given it, and data that begin with it."""
    if hasattr(data, "element_spec"):
        return data.element_spec, data
    if isinstance(data, keras.utils.PyDataset):
        batch = data[0]
    else:
        batch = next(iter(data), None)
        if batch is None:
            raise ValueError(f"data must hold at least one batch, got {data!r}.")
        if isinstance(data, Iterator):
            data = _begun(batch, data)
    return tuple(batch) if isinstance(batch, list) else batch, data


def _begun(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _kind(part: Any) -> tuple[tuple[int | None, ...], str]:
    """Shape, for batches of any size, and dtype."""
    part = part if hasattr(part, "dtype") else np.asarray(part)
    return (None, *part.shape[1:]), keras.backend.standardize_dtype(part.dtype)


# -- training ---------------------------------------------------------------------------------------------------------


def run(model: Any, callbacks: Sequence[Any], **data: Any) -> None:
    """Trains until a callback sets `stop_training`; data that come to an end are begun again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data")  # so Keras of all data of unknown length
        model.fit(**data, epochs=_ENDLESS, callbacks=list(callbacks), verbose=0)

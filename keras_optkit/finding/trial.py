"""Trying something out: a model is trained for a while, and is afterwards as it was found."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.data import Shuffled
from keras_optkit.private import forget_trace

#: What `fit` sets on a model besides the state of the training.
_ATTRIBUTES = ("history", "stop_training", "steps_per_execution", "train_function")

#: Epochs of a trial, which a callback ends; data that are too few for it are begun again.
_ENDLESS = 10**9

_ABSENT = object()


@contextlib.contextmanager
def as_found(model: Any) -> Iterator[None]:
    """Puts everything back when the block ends, however it ends.

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
            if keras.config.backend() == "jax":  # or the old function would go on with the trace of the trial
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
        ValueError: If it is not built or not compiled.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which is not. Call it on a batch, or build(shape).")
    if not model.compiled or model.optimizer is None:
        raise ValueError(f"model must be compiled, got {model.name!r}, which is not. Call compile(optimizer, loss).")
    return model


def innermost(optimizer: Any) -> Any:
    """The optimizer that updates the weights, inside of loss scaling."""
    while isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    return optimizer


def checked_arrays(data: Any) -> tuple[Any, ...] | None:
    """`data` if it is a tuple of arrays, as for `Shuffled`; None if it is something that gives batches.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(data, tuple) and 1 <= len(data) <= 3:
        return data
    if isinstance(data, tuple | list | dict) or hasattr(data, "shape"):
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
        TypeError: If `data` is no data.
        ValueError: If data that have batches of their own come with a batch size.
    """
    arguments.integer("batch_size", batch_size, 1, optional=True)
    arrays = checked_arrays(data)
    if arrays is not None:
        return {"x": Shuffled(*arrays, batch_size=batch_size or 32, seed=seed)}
    if batch_size is not None:
        raise ValueError(f"batch_size must be None for data that give batches ({_described(data)}), got {batch_size}.")
    # Keras can shuffle the batches of a PyDataset that ends, and warns if it is to shuffle others
    return {"x": data, "shuffle": isinstance(data, keras.utils.PyDataset) and data.num_batches is not None}


def run(model: Any, callbacks: Sequence[Any], **data: Any) -> None:
    """Trains until a callback sets `stop_training`; data that come to an end are begun again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data")  # so Keras of all data of unknown length
        model.fit(**data, epochs=_ENDLESS, callbacks=list(callbacks), verbose=0)

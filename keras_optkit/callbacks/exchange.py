"""Weights that change places, and means of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.averaging import checked_inputs
from keras_optkit.backend import is_lost
from keras_optkit.optimizers import Optimizer


@dataclass
class Exchange:
    """What the variables held before the weights to evaluate at were put in, and what they held then."""

    variables: list[Any]
    before: list[Any]
    inside: list[Any] = field(default_factory=list)
    #: What to assign on the way back; kept, so that a way back that was interrupted can be gone again.
    plan: list[tuple[Any, Any]] | None = None


@dataclass
class Mean:
    """The mean of what a variable was at some moments, in at least float32."""

    count: int
    value: np.ndarray

    def take(self, value: np.ndarray) -> None:
        """Adds a value to the mean."""
        self.count += 1
        # a new array, since what is handed to a backend may be its memory from then on
        self.value = self.value + (value.astype(self.value.dtype) - self.value) / self.count


def averages(optimizer: Any) -> bool:
    """Whether an optimizer has weights to evaluate at, other than those of training."""
    return (isinstance(optimizer, Optimizer) and optimizer.rule.averages) or bool(optimizer.use_ema)


def is_batch_norm(layer: Any) -> bool:
    """Whether a layer keeps moving statistics."""
    return isinstance(layer, keras.layers.BatchNormalization)


def repeatable(data: Any) -> Any:
    """The argument `batch_norm_data`, if several passes can be made over it."""
    if hasattr(data, "__next__"):
        raise TypeError(
            f"batch_norm_data must be something that can be read again, such as an array or a tf.data.Dataset; "
            f"got {data!r} of type {type(data).__name__}."
        )
    return checked_inputs("batch_norm_data", data)


def separate(model: Any) -> None:
    """On JAX, Keras lets weights and their average share memory, which the next compiled step gives away twice."""
    if keras.config.backend() == "jax":
        for variable in model.trainable_weights:
            if not is_lost(variable):
                variable.assign(ops.copy(ops.convert_to_tensor(variable)))


def copies(variables: list[Any]) -> list[Any]:
    """The values of variables, which later assignments leave as they are."""
    return [ops.copy(ops.convert_to_tensor(variable)) for variable in variables]


def same(a: Any, b: Any) -> bool:
    """Whether all elements are the same; NaN is itself, and 0 is not -0."""
    equal = ops.equal(a, b)
    if "float" in keras.backend.standardize_dtype(a.dtype):
        equal = ops.logical_and(equal, ops.equal(ops.signbit(a), ops.signbit(b)))
        equal = ops.logical_or(equal, ops.logical_and(ops.isnan(a), ops.isnan(b)))
    return bool(ops.convert_to_numpy(ops.all(equal)))

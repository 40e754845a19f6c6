"""What regularizers share: the dtype that they compute in and return, and the norms whose gradient at 0 is 0."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_optkit import arguments
from keras_optkit.precision import HALF, at_least_float32


def checked_factor(name: str, value: Any) -> Any:
    """Returns `value` if it is a finite number of 0 or more."""
    return arguments.real(name, value, 0, closed="left")


def wide(x: Any) -> Any:
    """The tensor or variable in float32 at least: float16 overflows at 65,504, bfloat16 cannot count past 256."""
    x = ops.convert_to_tensor(x)
    return ops.cast(x, at_least_float32(x.dtype))


def as_loss(penalty: Any, x: Any) -> Any:
    """The penalty on `x` in its dtype, for half precision in floatx.

    Keras can add only losses of one dtype, and computes its own in floatx.
    """
    half = keras.backend.standardize_dtype(ops.convert_to_tensor(x).dtype) in HALF
    return ops.cast(penalty, keras.config.floatx()) if half else penalty


def root(squares: Any) -> Any:
    """The square root, with the gradient 0 at 0, where the root has none."""
    some = squares > 0
    return ops.where(some, ops.sqrt(ops.where(some, squares, ops.ones_like(squares))), ops.zeros_like(squares))

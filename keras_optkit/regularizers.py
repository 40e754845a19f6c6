"""Penalties on weights, exact in every precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.precision import HALF, at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["L1", "L1L2", "L2"]

_TAGS = ("nonnegative", "zero_at_zero")


def _factor(name: str, value: Any) -> Any:
    return arguments.real(name, value, 0, closed="left")


def _penalty(weights: Any, *terms: tuple[float, Callable[[Any], Any]]) -> Any:
    """Σ factor Σ function(weights), in float32 at least: float16 overflows at 65,504, bfloat16 cannot count past 256.

    Keras can add only losses of one dtype, and computes its own in floatx.
    """
    weights = keras.ops.convert_to_tensor(weights)
    wide = keras.ops.cast(weights, at_least_float32(weights.dtype))
    total = sum(factor * keras.ops.sum(function(wide)) for factor, function in terms)
    half = keras.backend.standardize_dtype(weights.dtype) in HALF
    return keras.ops.cast(total, keras.config.floatx()) if half else total


@register(
    "regularizer",
    paper="Tibshirani 1996, Regression shrinkage and selection via the lasso",
    parity="keras.regularizers.L1",
    tags=_TAGS,
    cases=({}, {"l1": 0.5}),
    space={"l1": Float(1e-6, 1e-2, log=True)},
)
class L1(FromSignature, keras.regularizers.Regularizer):
    """The sum of absolute values, which drives weights to exactly zero.

    Ω(w) = l1 Σ |w|, a scalar of the weights' dtype. For float16 and bfloat16 weights the sum is taken in float32 and
    returned in `keras.config.floatx()`, the dtype of Keras's losses; Keras's own sum overflows.

    When not to use it: to keep weights small without making them sparse (`L2`). Keras adds the penalty to the loss, so
    its gradient l1 sign(w) passes through the optimizer, and an adaptive one rescales it.

    Args:
        l1: The factor λ, 0 or more.

    Raises:
        TypeError: `l1` is not a number.
        ValueError: `l1` is negative, infinite or NaN.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_regularizer=ok.regularizers.L1(1e-4))
    ```
    """

    def __init__(self, l1: float = 0.01) -> None:
        self.l1 = _factor("l1", l1)

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        return _penalty(x, (self.l1, keras.ops.abs))


@register(
    "regularizer",
    paper="Hoerl and Kennard 1970, Ridge regression",
    parity="keras.regularizers.L2",
    tags=_TAGS,
    cases=({}, {"l2": 0.5}),
    space={"l2": Float(1e-6, 1e-2, log=True)},
)
class L2(FromSignature, keras.regularizers.Regularizer):
    """The sum of squares, which keeps weights small.

    Ω(w) = l2 Σ w², without a factor 1/2, a scalar of the weights' dtype. For float16 and bfloat16 weights the sum is
    taken in float32 and returned in `keras.config.floatx()`, the dtype of Keras's losses; Keras's own sum overflows.

    When not to use it: with Adam and other adaptive optimizers, which divide the gradient 2 l2 w by its own size, so
    that every weight decays at about the same speed whatever `l2`: there use `weight_decay` of
    `keras_optkit.optimizers.AdamW`.

    Args:
        l2: The factor λ, 0 or more.

    Raises:
        TypeError: `l2` is not a number.
        ValueError: `l2` is negative, infinite or NaN.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_regularizer=ok.regularizers.L2(1e-3))
    ```
    """

    def __init__(self, l2: float = 0.01) -> None:
        self.l2 = _factor("l2", l2)

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        return _penalty(x, (self.l2, keras.ops.square))


@register(
    "regularizer",
    paper="Zou and Hastie 2005, Regularization and variable selection via the elastic net",
    parity="keras.regularizers.L1L2",
    tags=_TAGS,
    cases=({}, {"l1": 0.5, "l2": 0.25}, {"l2": 0.5}),
    space={"l1": Float(1e-6, 1e-2, log=True), "l2": Float(1e-6, 1e-2, log=True)},
)
class L1L2(FromSignature, keras.regularizers.Regularizer):
    """The sum of absolute values and the sum of squares, each with its factor (elastic net).

    Ω(w) = l1 Σ |w| + l2 Σ w², in the precision that `L1` and `L2` have.

    When not to use it: see `L1` and `L2`; with one of the factors 0 use the other class.

    Args:
        l1: The factor of the absolute values, 0 or more. None (default): 0 if `l2` is given, else 0.01.
        l2: The factor of the squares, 0 or more. None (default): 0 if `l1` is given, else 0.01.

    Raises:
        TypeError: An argument is neither a number nor None.
        ValueError: A factor is negative, infinite or NaN.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_regularizer=ok.regularizers.L1L2(l1=1e-5, l2=1e-4))
    ```
    """

    def __init__(self, l1: float | None = None, l2: float | None = None) -> None:
        missing = 0.01 if l1 is None and l2 is None else 0.0
        self.l1 = _factor("l1", missing if l1 is None else l1)
        self.l2 = _factor("l2", missing if l2 is None else l2)

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        return _penalty(x, (self.l1, keras.ops.abs), (self.l2, keras.ops.square))

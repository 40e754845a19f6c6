"""Penalties on single weights: on their sizes, or on their distances from a point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_optkit.registry import register
from keras_optkit.regularizers.base import as_loss, checked_factor, wide
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["L1", "L1L2", "L2", "L2SP"]

_TAGS = ("nonnegative", "zero_at_zero")


def _penalty(weights: Any, *terms: tuple[float, Callable[[Any], Any]]) -> Any:
    """Σ factor Σ function(weights), in float32 at least."""
    values = wide(weights)
    return as_loss(sum(factor * keras.ops.sum(function(values)) for factor, function in terms), weights)


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
        self.l1 = checked_factor("l1", l1)

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
        self.l2 = checked_factor("l2", l2)

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
        self.l1 = checked_factor("l1", missing if l1 is None else l1)
        self.l2 = checked_factor("l2", missing if l2 is None else l2)

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        return _penalty(x, (self.l1, keras.ops.abs), (self.l2, keras.ops.square))


@register(
    "regularizer",
    paper="1802.01483",
    parity="the formula is the reference",
    tags=("anchored", "nonnegative"),
    cases=({"start": 0.5}, {"start": -0.25, "l2": 0.5}),
    space={"l2": Float(1e-6, 1e-2, log=True)},
)
class L2SP(FromSignature, keras.regularizers.Regularizer):
    """The sum of squared distances from a starting point, which keeps fine-tuned weights near the pretrained ones.

    Ω(w) = l2 Σ (w - w⁰)², without a factor 1/2, a scalar of the weights' dtype, with the pretrained weights w⁰. Half
    precision is computed in float32. The new layers of the model have `L2`, as in the paper.

    w⁰ is in the config, so that a saved model has it, as text: some 20 bytes for each weight. It is set on layers that
    have their pretrained weights, before `compile`; see the example.

    When not to use it: without pretrained weights (`L2`); on layers of many millions of weights, since w⁰ is a constant
    of the compiled step; with Adam and other adaptive optimizers, which rescale its gradient like that of `L2`.

    Args:
        start: w⁰, an array or variable in the shape of the weights, which is copied, or one number for all.
        l2: The factor λ, 0 or more. The paper's α is 2 l2.

    Raises:
        TypeError: `start` is not numeric, or `l2` is not a number.
        ValueError: `start` is not finite, or `l2` is negative, infinite or NaN; when called, the weights are not of the
            shape of `start`.

    Source: Li, Grandvalet and Davoine 2018, arXiv 1802.01483, equation 2.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8)
    layer.build((None, 4))  # and load pretrained weights
    layer.kernel_regularizer = layer.kernel.regularizer = ok.regularizers.L2SP(layer.kernel, l2=0.01)
    assert float(layer.losses[0]) == 0.0
    ```
    """

    def __init__(self, start: Any, l2: float = 0.01) -> None:
        self.start = _point(start)
        self.l2 = checked_factor("l2", l2)

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        values = wide(x)
        shape = np.shape(self.start)
        if shape not in ((), tuple(values.shape)):
            raise ValueError(f"start must have the shape of the weights, {tuple(values.shape)}, got {shape}.")
        point = keras.ops.cast(keras.ops.convert_to_tensor(self.start, values.dtype), values.dtype)
        return as_loss(self.l2 * keras.ops.sum(keras.ops.square(values - point)), x)


def _point(start: Any) -> Any:
    """An array of at least float32, or a number."""
    if isinstance(start, keras.Variable) or keras.ops.is_tensor(start):
        start = keras.ops.convert_to_numpy(wide(start))
    array: Any
    try:
        array = np.array(start)
        if array.dtype.kind not in "iuf":
            array = np.array(start, "float32") if array.dtype.name == "bfloat16" else None
    except ValueError:  # rows of different lengths
        array = None
    if array is None:
        raise TypeError(f"start must be a numeric array or a number, got {start!r} of type {type(start).__name__}.")
    if not np.isfinite(array).all():
        raise ValueError(f"start must be finite, got {start!r}.")
    if not array.shape:
        return array.item()
    return array if array.dtype in ("float32", "float64") else array.astype("float32")

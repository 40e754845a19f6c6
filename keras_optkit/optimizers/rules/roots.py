"""Powers of every element in a form that XLA computes several at a time: of a power it computes one after the other."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_optkit.optimizers.rule import Tensor


def power(x: Tensor, exponent: Any) -> Tensor:
    """`x^exponent` of numbers >= 0: where the exponent is the number 1/2, a square root."""
    return ops.sqrt(x) if isinstance(exponent, float) and exponent == 0.5 else ops.power(x, exponent)


def cube_root(x: Tensor) -> Tensor:
    """`∛x` of numbers >= 0: by a logarithm, and a Newton iteration for the last digits."""
    positive = x > 0
    safe = ops.where(positive, x, ops.ones_like(x))
    y = ops.exp(ops.log(safe) / 3)
    y = y - (y - safe / (y * y)) / 3
    return ops.where(positive, y, ops.zeros_like(x))

"""The initial state of a parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from keras import ops

Tensor = Any


@dataclass(frozen=True)
class Fill:
    """A number, in the shape of the parameter or, if it is given, in another one.

    Attributes:
        value: The number.
        shape: The shape for one parameter; None for its own.
        is_moment: Whether it may be stored in 8 bits; see `moment`.
        signed: Whether it may be negative.
    """

    value: float
    shape: tuple[int, ...] | None = None
    is_moment: bool = False
    signed: bool = True


@dataclass(frozen=True)
class FromWeights:
    """A function of the parameters `(k, *shape)`, of their shape, which is computed in their first update.

    Before that it is 0: the weights of a model that is built by its first step have no values while it is traced.
    """

    function: Callable[[Tensor], Tensor]


#: The initial value of a slot: a number stands for `fill(number)`, a function for `FromWeights(function)`.
Initial = float | Callable[[Tensor], Tensor] | Fill | FromWeights


def fill(value: float) -> Fill:
    """A number, in the shape of the parameter."""
    return Fill(value)


def moment(value: float = 0.0, *, signed: bool = True) -> Fill:
    """A number, in the shape of the parameter, that a running mean begins with, of gradients or of their powers.

    `slot_dtype="int8"` stores it in 8 bits, with an error of up to 1 % (relative to the largest of 256 elements), which
    later gradients correct. Not for sums, which add errors up, for what is compared or subtracted, such as the previous
    gradient, or for means that change by less than a thousandth at a time. With `signed=False` it is never negative,
    and one that is above 0 does not become 0.
    """
    return Fill(value, None, True, signed)


def shaped(*shape: int, value: float = 0.0) -> Fill:
    """A number, in a shape other than that of the parameter: `shaped(8, 8)`; `shaped()` for one number.

    For rules whose layout is "whole".
    """
    return Fill(value, shape)


def weights_copy() -> FromWeights:
    """The parameter itself, as it is before its first update."""
    return FromWeights(ops.copy)


def as_initial(initial: Initial) -> Fill | FromWeights:
    """The initial value that a rule declares for a slot, without the short forms."""
    if isinstance(initial, Fill | FromWeights):
        return initial
    return FromWeights(initial) if callable(initial) else Fill(initial)

"""The curves that schedules are made of, and steps as the numbers that they are functions of."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from keras import ops

from keras_optkit.precision import scalar_dtype

Tensor = Any


def real(x: Any) -> Tensor:
    """`x` as a tensor of the dtype that schedules compute in."""
    if isinstance(x, Real):  # ops.cast would take a Python float through float32
        return ops.convert_to_tensor(x, dtype=scalar_dtype())
    return ops.cast(x, scalar_dtype())


def since(step: Any, begin: int) -> Any:
    """How many updates ago `begin` was, in the type of `step`; 0 before it."""
    return max(step - begin, 0) if isinstance(step, int) else ops.maximum(step - begin, 0)


def cycle(step: Any, length: int) -> tuple[Any, Any]:
    """How many cycles of `length` updates are over, and how many updates of the present one; in the type of `step`."""
    if isinstance(step, int):
        return divmod(step, length)
    return ops.floor_divide(step, length), ops.mod(step, length)


def share(step: Any, steps: Any) -> Tensor:
    """How much of `steps` is over, from 0 to 1."""
    return ops.clip(real(step) / real(steps), 0.0, 1.0)


def power(base: float, exponent: Tensor) -> Tensor:
    """`base` to the power of a tensor."""
    return ops.power(real(base), exponent)


def line(share: Tensor, first: Any, last: Any) -> Tensor:
    """A straight line from `first` to `last`."""
    return first + (last - first) * share


def half_cosine(share: Tensor, first: Any, last: Any) -> Tensor:
    """Half a cosine: flat at both ends."""
    return last + (first - last) * (1 + ops.cos(np.pi * share)) / 2


def one_minus_sqrt(share: Tensor, first: Any, last: Any) -> Tensor:
    """Steep at first, and ever flatter."""
    return last + (first - last) * (1 - ops.sqrt(share))


def geometric(share: Tensor, first: Any, last: Any) -> Tensor:
    """The same factor in every update; both ends are above 0."""
    return first * power(last / first, share)


#: The curves between two values, by the names that `anneal` has for them.
ANNEAL: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {
    "cosine": half_cosine,
    "linear": line,
    "1-sqrt": one_minus_sqrt,
    "exponential": geometric,
}

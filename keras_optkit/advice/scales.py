"""Kernels: what is measured of them, and which scale their fans and the activation behind them ask for."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import keras
import numpy as np

from keras_optkit.advice.measured import KernelReport
from keras_optkit.initializers.gains import ACTIVATIONS, calculate_gain
from keras_optkit.kernels import KERNEL, KernelAxes, by_shape, role

#: Activations that have no gain of their own, by one that is like them there.
_LIKE = {
    **dict.fromkeys(("gelu", "silu", "swish", "relu6", "mish", "elu", "celu", "softplus", "hard_silu"), "relu"),
    **dict.fromkeys(("softmax", "hard_sigmoid", "log_softmax", "exponential"), "linear"),
    **dict.fromkeys(("softsign", "hard_tanh", "tanh_shrink"), "tanh"),
}

#: So many different elements, at least, are in a kernel that was drawn; an identity or a Hadamard matrix has fewer.
_DRAWN = 8


def gain_before(activation: str | None) -> float | None:
    """The gain that an activation asks of the kernel before it; None for one that is not known."""
    name = _LIKE.get(activation or "linear", activation or "linear")
    return calculate_gain(name) if name in ACTIVATIONS else None


def kernel_reports(layer: Any, variables: list[Any], activation: str | None, read: Any) -> tuple[KernelReport, ...]:
    """The kernels of a layer.

    Args:
        layer: The layer.
        variables: Those of it and, of a recurrent layer, its cells.
        activation: The one that it has, or that is next to it.
        read: The function that reads a variable.
    """
    found = []
    for variable in variables:
        kind, axes = role(variable, layer)
        if kind == KERNEL and axes is not None and math.prod(variable.shape):
            found.append(_report(variable, layer, axes, activation, read(variable)))
    return tuple(found)


def _report(variable: Any, layer: Any, axes: KernelAxes, activation: str | None, value: np.ndarray) -> KernelReport:
    fan_in, fan_out = axes.fans(value.shape)
    gain, by_equation = gain_before(activation), isinstance(layer, keras.layers.EinsumDense)
    low, high = (None, None) if gain is None else usual_deviations(value.shape, axes, gain, by_equation=by_equation)
    drawn = len(np.unique(value.ravel()[:10_000])) >= min(_DRAWN, value.size)
    return KernelReport(
        name=str(variable.name),
        shape=tuple(value.shape),
        fan_in=fan_in,
        fan_out=fan_out,
        std=0.0 if np.all(value == value.flat[0]) else float(value.std()),
        mean=float(value.mean()),
        asked=None if gain is None else gain / math.sqrt(max(fan_in, 1)),
        low=low,
        high=high,
        key=hashlib.sha256(repr(value.shape).encode() + value.tobytes()).hexdigest() if drawn else None,
    )


def usual_deviations(
    shape: tuple[int, ...], axes: KernelAxes, gain: float, *, by_equation: bool = False
) -> tuple[float, float]:
    """The smallest and the largest standard deviation that a usual initializer gives a kernel of this shape.

    He (gain / sqrt(fan_in)), LeCun (1 / sqrt(fan_in)) and Glorot (sqrt(2 / (fan_in + fan_out))), each with the true
    fans and with those that Keras reads off the shape; with the fan-out, He's for convolutions, and for others the
    1 / sqrt(3 fan_out) of stock models' last layers. The kernel of an `EinsumDense` (`by_equation`) has true fans only.
    """
    fans = {axes.fans(shape)} if by_equation else {axes.fans(shape), by_shape(len(shape)).fans(shape)}
    found = []
    for each in fans:
        fan_in, fan_out = max(each[0], 1), max(each[1], 1)
        found += [gain / math.sqrt(fan_in), 1 / math.sqrt(fan_in), math.sqrt(2 / (fan_in + fan_out))]
        if not by_equation:
            found.append(gain / math.sqrt(fan_out) if len(shape) > 2 else 1 / math.sqrt(3 * fan_out))
    return min(found), max(found)

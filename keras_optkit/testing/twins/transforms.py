"""NumPy twins of transforms: functions of one parameter.

Where a transform looks at units, these are the outputs of a kernel, the rows of an embedding, or else the whole
parameter; `weight` says which it is.
"""

from __future__ import annotations

import numpy as np

from keras_optkit.kernels import KERNEL, TABLE
from keras_optkit.optimizers.rule import Weight


def _axes_of_unit(weight: Weight) -> tuple[int, ...]:
    if weight.role == KERNEL:
        return weight.axes.inputs  # type: ignore[union-attr]
    return tuple(range(1 if weight.role == TABLE else 0, len(weight.shape)))


def centralize(g: np.ndarray, weight: Weight) -> np.ndarray:
    """`g - mean(g)` for each output of a kernel."""
    return g - g.mean(axis=_axes_of_unit(weight), keepdims=True) if weight.role == KERNEL and g.size else g


def adaptive_clip(
    g: np.ndarray, p: np.ndarray, weight: Weight, clipping: float = 0.01, epsilon: float = 1e-3
) -> np.ndarray:
    """No unit's gradient is larger than `clipping` times the unit."""
    axes = _axes_of_unit(weight)
    norm, size = (np.sqrt(np.sum(x**2, axis=axes, keepdims=True)) for x in (g, p))
    return g * np.minimum(1, clipping * np.maximum(size, epsilon) / np.maximum(norm, 1e-300))


def cautious_update(step: np.ndarray, g: np.ndarray, minimum: float = 1e-3) -> np.ndarray:
    """The parts of a step that go down the gradient, larger by as much as there are fewer of them."""
    agrees = step * g > 0
    return step * agrees / max(agrees.mean(), minimum) if step.size else step


def cautious_decay(step: np.ndarray, p: np.ndarray, decay: float) -> np.ndarray:
    """A step with the decay (times the learning rate) of those weights that it makes smaller."""
    return step + decay * p * (step * p >= 0)

"""NumPy twins of transforms.

A twin is a function `twin(u, p, told, **arguments)` of lists over the parameters of a model: gradients or steps, and
the weights before. It returns what takes the place of `u`. `told` has the rest. Where a transform looks at units, these
are the outputs of a kernel, the rows of an embedding, or else the whole parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from keras_optkit.kernels import KERNEL, TABLE
from keras_optkit.optimizers.random_numbers import normal
from keras_optkit.optimizers.rule import Weight
from keras_optkit.testing.tools import numbers

Arrays = list[np.ndarray]


class Told(NamedTuple):
    """What a transform is told besides.

    Attributes:
        weights: What each parameter is for its layer.
        gradients: For steps, the gradients that the rule was handed.
        decays: For each parameter its decay, times the learning rate.
        learning_rate: The learning rate.
        step: The number of the update, from 1.
        places: The places of the parameters in the model.
    """

    weights: list[Weight]
    gradients: Arrays
    decays: list[float]
    learning_rate: float = 0.0
    step: int = 1
    places: Sequence[int] = ()


Twin = Callable[..., Arrays]


def _axes_of_unit(weight: Weight) -> tuple[int, ...]:
    if weight.role == KERNEL:
        return weight.axes.inputs  # type: ignore[union-attr]
    return tuple(range(1 if weight.role == TABLE else 0, len(weight.shape)))


def clip_by_value(u: Arrays, p: Arrays, told: Told, limit: float = 1.0) -> Arrays:
    """Each element is within the limit."""
    return [np.clip(x, -limit, limit) for x in u]


def clip_by_norm(u: Arrays, p: Arrays, told: Told, limit: float = 1.0) -> Arrays:
    """No parameter's norm is above the limit."""
    return [x * min(1, limit / max(float(np.linalg.norm(x)), 1e-300)) for x in u]


def clip_by_global_norm(u: Arrays, p: Arrays, told: Told, limit: float = 1.0) -> Arrays:
    """The norm of all is not above the limit."""
    norm = np.sqrt(sum(np.sum(x**2) for x in u))
    return [x * min(1, limit / max(norm, 1e-300)) for x in u]


def centralize(u: Arrays, p: Arrays, told: Told) -> Arrays:
    """`g - mean(g)` for each output of a kernel."""
    return [
        x - x.mean(axis=_axes_of_unit(w), keepdims=True) if w.role == KERNEL and x.size else x
        for x, w in zip(u, told.weights, strict=True)
    ]


def adaptive_clip(u: Arrays, p: Arrays, told: Told, clipping: float = 0.01, epsilon: float = 1e-3) -> Arrays:
    """No unit's gradient is larger than `clipping` times the unit."""

    def clipped(x: np.ndarray, w: np.ndarray, weight: Weight) -> np.ndarray:
        norm, size = (np.sqrt(np.sum(a**2, axis=_axes_of_unit(weight), keepdims=True)) for a in (x, w))
        return x * np.minimum(1, clipping * np.maximum(size, epsilon) / np.maximum(norm, 1e-300))

    return [clipped(*each) for each in zip(u, p, told.weights, strict=True)]


def cautious_update(u: Arrays, p: Arrays, told: Told, minimum: float = 1e-3) -> Arrays:
    """The parts of a step that go down the gradient, larger by as much as there are fewer of them."""
    agree = [x * g > 0 for x, g in zip(u, told.gradients, strict=True)]
    return [x * a / max(a.mean(), minimum) if x.size else x for x, a in zip(u, agree, strict=True)]


def cautious_decay(u: Arrays, p: Arrays, told: Told) -> Arrays:
    """A step with the decay of those weights that it makes smaller."""
    return [x + decay * w * (x * w >= 0) for x, w, decay in zip(u, p, told.decays, strict=True)]


def corrected_decay(u: Arrays, p: Arrays, told: Told, peak: float, parameters: str = "kernels") -> Arrays:
    """A step with a decay that has the rate in it twice, for kernels or for all."""
    ratios = [told.learning_rate / peak if parameters == "all" or w.role == KERNEL else 1.0 for w in told.weights]
    return [x + ratio * decay * w for x, w, decay, ratio in zip(u, p, told.decays, ratios, strict=True)]


def gradient_noise(u: Arrays, p: Arrays, told: Told, eta: float = 0.01, gamma: float = 0.55, seed: int = 0) -> Arrays:
    """Gradients with the engine's random numbers, each parameter's own."""
    drawn = [normal(x.shape, "float64", seed, place, told.step - 1) for x, place in zip(u, told.places, strict=True)]
    return [x + np.sqrt(eta / told.step**gamma) * numbers(z) for x, z in zip(u, drawn, strict=True)]


def hyperball(u: Arrays, p: Arrays, told: Told) -> Arrays:
    """The steps to the point of each kernel's sphere, in the direction of the rule's step."""
    steps = []
    for x, w, weight, decay in zip(u, p, told.weights, told.decays, strict=True):
        radius, length = np.linalg.norm(np.ravel(w)), np.linalg.norm(np.ravel(x))
        if weight.role != KERNEL:
            steps.append(x + decay * w)
        elif not radius or not length:
            steps.append(x)
        else:
            moved = w - told.learning_rate * radius * x / length
            steps.append(w - radius * moved / np.linalg.norm(np.ravel(moved)))
    return steps


TWINS: dict[str, Twin] = {
    "AdaptiveClip": adaptive_clip,
    "CautiousDecay": cautious_decay,
    "CautiousUpdate": cautious_update,
    "Centralize": centralize,
    "ClipByGlobalNorm": clip_by_global_norm,
    "ClipByNorm": clip_by_norm,
    "ClipByValue": clip_by_value,
    "CorrectedDecay": corrected_decay,
    "GradientNoise": gradient_noise,
    "Hyperball": hyperball,
}

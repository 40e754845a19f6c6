"""NumPy twins of AdamP and SGDP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray
Grads = Iterable[Array]


def _rows_of_units(x: Array, weight: Weight) -> Array:
    """A row for each unit: an output of a kernel, of which these are in the last axis, or a row of a table."""
    return x.reshape(-1, x.shape[-1]).T if weight.role == "kernel" else x.reshape(len(x), -1)


def _projection(step: Array, g: Array, p: Array, weight: Weight, delta: float, epsilon: float) -> tuple[Array, bool]:
    """The step without its part along the weights, if their gradient has nearly none; and whether."""
    if weight.role == "vector" or not p.size:
        return step, False
    units = _rows_of_units(np.arange(p.size).reshape(p.shape), weight)
    for view in (units, units.reshape(1, -1)):
        w, u, s = (np.ravel(x)[view] for x in (p, g, step))
        w_norm, u_norm = np.linalg.norm(w, axis=1), np.linalg.norm(u, axis=1)
        cosine = np.abs(np.sum(w * u, 1)) / (np.maximum(w_norm, epsilon) * np.maximum(u_norm, epsilon))
        if cosine.max() < delta / np.sqrt(view.shape[1]):
            n = w / (w_norm + epsilon)[:, None]
            found = np.empty(p.size)
            found[view] = s - n * np.sum(n * s, 1, keepdims=True)
            return found.reshape(p.shape), True
    return step, False


def adamp(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """AdamP."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        mean = beta_1 * m + (1 - beta_1) * g if nesterov else m
        step = mean / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        step, near = _projection(step, g, p, weight, delta, epsilon)
        p = p - learning_rate * (step + weight_decay * (decay_ratio if near else 1.0) * p)
        yield p


def sgdp(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    nesterov: bool = False,
    epsilon: float = 1e-8,
    delta: float = 0.1,
    decay_ratio: float = 0.1,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """SGDP."""
    v = np.zeros_like(p)
    for g in grads:
        v = momentum * v + g
        step, near = _projection(g + momentum * v if nesterov else v, g, p, weight, delta, epsilon)
        decay = weight_decay * (decay_ratio if near else 1.0) / (1 - momentum)
        p = p - learning_rate * (step + decay * p)
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {
    "AdamP": adamp,
    "SGDP": sgdp,
}

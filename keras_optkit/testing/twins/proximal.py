"""NumPy twins of ProximalAdagrad and ConditionalGradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray
Grads = Iterable[Array]


def proximal_adagrad(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.01,
    initial_accumulator_value: float = 0.1,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """ProximalAdagrad."""
    total = np.full_like(p, initial_accumulator_value)
    for g in grads:
        total = total + g**2
        rate = learning_rate / np.sqrt(total)
        p = p - learning_rate * weight_decay * p - rate * g
        p = np.sign(p) * np.maximum(np.abs(p) - rate * l1_regularization_strength, 0)
        p = p / (1 + rate * l2_regularization_strength)
        yield p


def conditional_gradient(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.01,
    radius: float = 10.0,
    norm: str = "frobenius",
    epsilon: float = 1e-7,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """ConditionalGradient."""
    for g in grads:
        if norm == "nuclear" and weight.role != "vector" and g.size:
            u, _, vt = np.linalg.svd(g.reshape(-1, g.shape[-1]), full_matrices=False)
            point = -radius * np.outer(u[:, 0], vt[0]).reshape(p.shape)
        else:
            point = -radius * g / (np.linalg.norm(np.ravel(g)) + epsilon)
        p = (1 - learning_rate) * p + learning_rate * point - learning_rate * weight_decay * p
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {
    "ProximalAdagrad": proximal_adagrad,
    "ConditionalGradient": conditional_gradient,
}

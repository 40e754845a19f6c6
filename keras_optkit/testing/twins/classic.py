"""NumPy twins of Adadelta, Adamax, FTRL and Rprop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray
Grads = Iterable[Array]


def adadelta(
    p: Array,
    grads: Grads,
    learning_rate: float = 1.0,
    rho: float = 0.95,
    epsilon: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Adadelta."""
    squares = steps = np.zeros_like(p)
    for g in grads:
        squares = rho * squares + (1 - rho) * g**2
        step = np.sqrt(steps + epsilon) / np.sqrt(squares + epsilon) * g
        steps = rho * steps + (1 - rho) * step**2
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def adamax(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.002,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Adamax."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = np.maximum(beta_2 * v, np.abs(g) + epsilon)
        p = p - learning_rate * (m / (1 - beta_1**t) / v + weight_decay * p)
        yield p


def ftrl(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.1,
    learning_rate_power: float = -0.5,
    initial_accumulator_value: float = 0.0,
    l1_regularization_strength: float = 0.0,
    l2_regularization_strength: float = 0.0,
    l2_shrinkage_regularization_strength: float = 0.0,
    beta: float = 0.0,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """FTRL-Proximal."""
    n, z = np.full_like(p, initial_accumulator_value), np.zeros_like(p)
    for g in grads:
        p = p - learning_rate * weight_decay * p
        sigma = ((n + g**2) ** -learning_rate_power - n**-learning_rate_power) / learning_rate
        n = n + g**2
        z = z + g + 2 * l2_shrinkage_regularization_strength * p - sigma * p
        size = (beta + n**-learning_rate_power) / learning_rate + 2 * l2_regularization_strength
        small = np.abs(z) <= l1_regularization_strength
        p = np.where(small, 0.0, -(z - np.sign(z) * l1_regularization_strength) / size)
        yield p


def rprop(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.01,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    min_factor: float = 1e-4,
    max_factor: float = 5e3,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Rprop without weight-backtracking."""
    size, before = np.full_like(p, learning_rate), np.zeros_like(p)
    for g in grads:
        size = np.where(g * before > 0, size * eta_plus, np.where(g * before < 0, size * eta_minus, size))
        size = np.clip(size, learning_rate * min_factor, learning_rate * max_factor)
        before = np.where(g * before < 0, 0.0, g)
        p = p - size * np.sign(before) - learning_rate * weight_decay * p
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {"Adadelta": adadelta, "Adamax": adamax, "Ftrl": ftrl, "Rprop": rprop}

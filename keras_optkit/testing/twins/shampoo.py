"""NumPy twins of Shampoo and its relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight
from keras_optkit.testing.twins.structured import _adam, soap

Array = np.ndarray


def shampoo(
    p: Array,
    grads: Iterable[Array],
    weight: Weight,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-12,
    grafting_epsilon: float = 1e-8,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 1024,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Shampoo with the length of Adam's steps."""
    if weight.role == "vector" or max(p.shape) > max_precondition_dim:
        yield from _adam(p, grads, learning_rate, beta_1, beta_2, grafting_epsilon, weight_decay)
        return
    m, v = np.zeros_like(p), np.zeros_like(p)
    grams = [np.zeros((d, d)) for d in p.shape]
    roots: list[Array] = []
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        m_hat, v_hat = m / (1 - beta_1**t), v / (1 - beta_2**t)
        step = m_hat / (np.sqrt(v_hat) + grafting_epsilon)
        for i in range(p.ndim):
            others = [j for j in range(p.ndim) if j != i]
            grams[i] = beta_2 * grams[i] + (1 - beta_2) * np.tensordot(g, g, (others, others))
        if t % precondition_frequency == 0:
            roots = [_inverse_root(gram / (1 - beta_2**t), 2 * p.ndim, epsilon) for gram in grams]
        if roots:
            direction = m_hat
            for root in roots:  # each turns the next axis to the end
                direction = np.tensordot(direction, root, (0, 0))
            length = np.linalg.norm(direction)
            step = np.linalg.norm(step) / length * direction if length else step
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def _inverse_root(matrix: Array, order: int, epsilon: float) -> Array:
    """(matrix + ε)^(-1 / order)."""
    if not matrix.size:
        return matrix
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * (values - min(values.min(), 0) + epsilon) ** (-1 / order)) @ vectors.T


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"KLSOAP": functools.partial(soap, kl=True), "Shampoo": shampoo}

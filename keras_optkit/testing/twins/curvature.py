"""Twins of the optimizers that need the Hessian.

They are given `diagonals`, what `v * Hv` is in each step; None where the product is such that it equals the gradient,
as it is taken to be in checks whose gradients do not depend on the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Grads = Iterable[np.ndarray]


def sophia_h(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.06,
    beta_1: float = 0.96,
    beta_2: float = 0.99,
    rho: float = 0.01,
    epsilon: float = 1e-12,
    update_period: int = 10,
    weight_decay: float = 0.0,
    diagonals: Grads | None = None,
) -> Iterator[np.ndarray]:
    """Sophia-H."""
    grads = list(grads)
    m = h = np.zeros_like(p)
    for t, (g, diagonal) in enumerate(zip(grads, grads if diagonals is None else diagonals, strict=True)):
        m = beta_1 * m + (1 - beta_1) * g
        if t % update_period == 0:
            h = beta_2 * h + (1 - beta_2) * diagonal
        step = np.clip(m / np.maximum(h, epsilon), -rho, rho)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def adahessian(
    p: np.ndarray,
    grads: Grads,
    weight: Any,
    learning_rate: float = 0.1,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-4,
    hessian_power: float = 1.0,
    spatial_averaging: bool = True,
    update_period: int = 1,
    weight_decay: float = 0.0,
    diagonals: Grads | None = None,
) -> Iterator[np.ndarray]:
    """AdaHessian; kernels have their window in all axes but the last two."""
    grads = list(grads)
    window = tuple(range(p.ndim - 2)) if spatial_averaging and weight.role == "kernel" and p.size else ()
    m = s = np.zeros_like(p)
    for t, (g, diagonal) in enumerate(zip(grads, grads if diagonals is None else diagonals, strict=True)):
        m = beta_1 * m + (1 - beta_1) * g
        if t % update_period == 0:
            mean = np.mean(diagonal, axis=window, keepdims=True) if window else diagonal
            s = beta_2 * s + (1 - beta_2) * mean**2
        s_hat = s / (1 - beta_2 ** (t // update_period + 1))
        step = m / (1 - beta_1 ** (t + 1)) / (s_hat ** (hessian_power / 2) + epsilon)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"AdaHessian": adahessian, "SophiaH": sophia_h}

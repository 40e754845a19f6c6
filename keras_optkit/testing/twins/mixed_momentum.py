"""NumPy twins of AdEMAMix and MARS."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray


def ademamix(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    beta_3: float = 0.9999,
    alpha: float = 5.0,
    epsilon: float = 1e-8,
    alpha_warmup_steps: int = 0,
    beta_3_warmup_steps: int = 0,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """AdEMAMix."""
    m_1 = m_2 = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        a, slow = alpha, beta_3
        if alpha_warmup_steps:
            a = min(t * alpha / alpha_warmup_steps, alpha)
        if beta_3_warmup_steps:
            log_1, log_3, mu = np.log(beta_1), np.log(beta_3), t / beta_3_warmup_steps
            slow = min(np.exp(log_1 * log_3 / ((1 - mu) * log_3 + mu * log_1)), beta_3) if mu < 1 else beta_3
        m_1 = beta_1 * m_1 + (1 - beta_1) * g
        m_2 = slow * m_2 + (1 - slow) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        step = (m_1 / (1 - beta_1**t) + a * m_2) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def mars(
    p: Array,
    grads: Iterable[Array | None],
    learning_rate: float = 0.003,
    beta_1: float = 0.95,
    beta_2: float = 0.99,
    gamma: float = 0.025,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """MARS-AdamW, approximate."""
    m = v = np.zeros_like(p)
    before = None
    for t, g in enumerate(grads, 1):
        if g is not None:
            c = g + gamma * beta_1 / (1 - beta_1) * (g - (g if before is None else before))
            c = c / max(float(np.linalg.norm(np.ravel(c))), 1.0)
            m = beta_1 * m + (1 - beta_1) * c
            v = beta_2 * v + (1 - beta_2) * c**2
            step = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
            p = p - learning_rate * (step + weight_decay * p)
            before = g
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {"AdEMAMix": ademamix, "MARS": mars}

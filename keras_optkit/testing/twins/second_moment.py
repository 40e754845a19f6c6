"""NumPy twins of Yogi, LaProp, ADOPT and StableAdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray


def yogi(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 0.01,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-3,
    initial_accumulator_value: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Yogi."""
    m, v = np.zeros_like(p), np.full_like(p, initial_accumulator_value)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = np.where(v > g**2, v - (1 - beta_2) * g**2, v + (1 - beta_2) * g**2)
        step = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def laprop(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 4e-4,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-15,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """LaProp."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        v = beta_2 * v + (1 - beta_2) * g**2
        m = beta_1 * m + (1 - beta_1) * g / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        p = p - learning_rate * (m / (1 - beta_1**t) + weight_decay * p)
        yield p


def adopt(
    p: Array,
    grads: Iterable[Array | None],
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.9999,
    epsilon: float = 1e-6,
    clip_exponent: float | None = 0.25,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """ADOPT."""
    m, v, begun = np.zeros_like(p), np.zeros_like(p), False
    for t, g in enumerate(grads):
        if g is not None and not begun:
            v, begun = g**2, True
        elif g is not None:
            scaled = g / np.maximum(np.sqrt(v), epsilon)
            if clip_exponent is not None:
                scaled = np.clip(scaled, -(t**clip_exponent), t**clip_exponent)
            m = beta_1 * m + (1 - beta_1) * scaled
            p = p - learning_rate * (m + weight_decay * p)
            v = beta_2 * v + (1 - beta_2) * g**2
        yield p


def stable_adamw(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    epsilon: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """StableAdamW."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        hat_1, hat_2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in (beta_1, beta_2))
        m = hat_1 * m + (1 - hat_1) * g
        v = hat_2 * v + (1 - hat_2) * g**2
        rms = np.sqrt(np.mean(g**2 / np.maximum(v, epsilon**2))) if g.size else 0.0
        rate = learning_rate / max(1.0, rms)
        p = p - rate * weight_decay * p - rate * m / (np.sqrt(v) + epsilon)
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {
    "Yogi": yogi,
    "LaProp": laprop,
    "ADOPT": adopt,
    "StableAdamW": stable_adamw,
}

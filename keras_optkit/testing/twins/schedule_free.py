"""The NumPy twin of Schedule-Free RAdam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray


def schedule_free_radam(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 0.0025,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    silent_sgd_phase: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Schedule-Free RAdam; the weights y of training."""
    x = y = z = p
    v = np.zeros_like(p)
    total = largest = 0.0
    limit = 2 / (1 - beta_2) - 1
    for t, g in enumerate(grads, 1):
        correction = 1 - beta_2**t
        v = beta_2 * v + (1 - beta_2) * g**2
        length = limit - 2 * t * beta_2**t / correction
        direction, rate = g, 0.0 if silent_sgd_phase else learning_rate
        if length > 4:
            top, bottom = (length - 4) * (length - 2) * limit, (limit - 4) * (limit - 2) * length
            direction, rate = g / (np.sqrt(v / correction) + epsilon), learning_rate * np.sqrt(top / bottom)
        z = z - rate * (direction + weight_decay * y)
        largest = max(largest, rate)
        weight = t**r * largest**weight_lr_power
        total += weight
        share = weight / total if total else 0.0
        x = (1 - share) * x + share * z
        y = beta_1 * x + (1 - beta_1) * z
        yield y


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"ScheduleFreeRAdam": schedule_free_radam}

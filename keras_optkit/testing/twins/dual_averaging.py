"""NumPy twin of MADGRAD."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray
Grads = Iterable[Array]


def madgrad(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    epsilon: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """MADGRAD."""
    start = p
    s = nu = np.zeros_like(p)
    for k, g in enumerate(grads):
        g = g + weight_decay * p
        rate = learning_rate * np.sqrt(k + 1)
        s = s + rate * g
        nu = nu + rate * g**2
        z = start - s / (np.cbrt(nu) + epsilon)
        p = momentum * p + (1 - momentum) * z
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {"MADGRAD": madgrad}

"""NumPy twin of Signum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Array = np.ndarray
Grads = Iterable[Array]


def signum(
    p: Array, grads: Grads, learning_rate: float = 1e-4, momentum: float = 0.9, weight_decay: float = 0.0
) -> Iterator[Array]:
    """Signum."""
    m = np.zeros_like(p)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        p = p - learning_rate * (np.sign(m) + weight_decay * p)
        yield p


#: The twins of this family.
TWINS: dict[str, Callable[..., Iterator[Any]]] = {"Signum": signum}

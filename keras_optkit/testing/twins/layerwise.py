"""NumPy twins of optimizers whose steps are scaled to the size of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray
Grads = Iterable[Array]
Some = Iterable[Array | None]


def lars(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    trust_coefficient: float = 0.01,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """LARS."""
    v = np.zeros_like(p)
    for g in grads:
        size = np.linalg.norm(np.ravel(p))
        length = np.linalg.norm(np.ravel(g)) + weight_decay * size
        adapted = weight.role != "vector" and size > 0 and length > 0
        rate = learning_rate * (trust_coefficient * size / length if adapted else 1.0)
        v = momentum * v + rate * (g + weight_decay * p)
        p = p - (momentum * v + rate * (g + weight_decay * p) if nesterov else v)
        yield p


def novograd(
    p: Array,
    grads: Some,
    learning_rate: float = 0.01,
    beta_1: float = 0.95,
    beta_2: float = 0.98,
    epsilon: float = 1e-8,
    grad_averaging: bool = False,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """NovoGrad."""
    m = v = None
    for g in grads:
        if g is None:
            yield p
            continue
        square = np.sum(g**2)
        v = square if v is None else beta_2 * v + (1 - beta_2) * square
        direction = g / (np.sqrt(v) + epsilon) + weight_decay * p
        m = direction if m is None else beta_1 * m + (1 - beta_1 if grad_averaging else 1.0) * direction
        p = p - learning_rate * m
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"LARS": lars, "NovoGrad": novograd}

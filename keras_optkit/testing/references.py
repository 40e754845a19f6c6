"""NumPy twins: each optimizer once more, as plainly as its paper has it.

A twin is a generator `twin(p, grads, **arguments)`: it takes the start value, the gradients of successive steps and the
optimizer's own arguments, and yields the parameter after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

Twin = Callable[..., Iterator[np.ndarray]]
Grads = Iterable[np.ndarray]


def sgd(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.01,
    momentum: float = 0.0,
    nesterov: bool = False,
    rate_in_velocity: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """SGD, momentum and Nesterov momentum."""
    inside, outside = (learning_rate, 1.0) if rate_in_velocity else (1.0, learning_rate)
    v = np.zeros_like(p)
    for g in grads:
        v = momentum * v + inside * g
        step = momentum * v + inside * g if nesterov else v
        p = p - outside * step - learning_rate * weight_decay * p
        yield p


def adagrad(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.01,
    initial_accumulator_value: float = 0.0,
    epsilon: float = 1e-8,
    epsilon_inside: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Adagrad."""
    total = np.full_like(p, initial_accumulator_value)
    for g in grads:
        total = total + g**2
        root = np.sqrt(total + epsilon) if epsilon_inside else np.sqrt(total) + epsilon
        p = p - learning_rate * g / root - learning_rate * weight_decay * p
        yield p


def rmsprop(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.001,
    rho: float = 0.9,
    momentum: float = 0.0,
    epsilon: float = 1e-8,
    centered: bool = False,
    epsilon_inside: bool = True,
    rate_in_velocity: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """RMSprop."""
    inside, outside = (learning_rate, 1.0) if rate_in_velocity else (1.0, learning_rate)
    square = mean = v = np.zeros_like(p)
    for g in grads:
        square = rho * square + (1 - rho) * g**2
        mean = rho * mean + (1 - rho) * g if centered else mean
        variance = square - mean**2
        root = np.sqrt(variance + epsilon) if epsilon_inside else np.sqrt(variance) + epsilon
        v = momentum * v + inside * g / root
        p = p - outside * v - learning_rate * weight_decay * p
        yield p


def adam(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    amsgrad: bool = False,
    epsilon_hat: bool = False,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Adam."""
    m = v = largest = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        largest = np.maximum(largest, v) if amsgrad else v
        c1, c2 = 1 - beta_1**t, 1 - beta_2**t
        hat = np.sqrt(c2) * (m / c1) / (np.sqrt(largest) + epsilon)
        paper = (m / c1) / (np.sqrt(largest / c2) + epsilon)
        p = p - learning_rate * ((hat if epsilon_hat else paper) + weight_decay * p)
        yield p


def adamw(p: np.ndarray, grads: Grads, weight_decay: float = 0.01, **arguments: Any) -> Iterator[np.ndarray]:
    """AdamW."""
    return adam(p, grads, weight_decay=weight_decay, **arguments)


#: The twin of each of the package's optimizers, by the optimizer's name.
TWINS: dict[str, Twin] = {"SGD": sgd, "Adagrad": adagrad, "RMSprop": rmsprop, "Adam": adam, "AdamW": adamw}

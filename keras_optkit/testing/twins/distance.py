"""NumPy twins of DoG, DoWG and COCOB, which measure from the initial weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

Array = np.ndarray


def _decayed(ps: list[Array], gs: Sequence[Array | None], decays: Sequence[float]) -> list[Array | None]:
    return [None if g is None else g + decay * p for p, g, decay in zip(ps, gs, decays, strict=True)]


def _norm(arrays: Iterable[Array]) -> float:
    return float(np.sqrt(sum(np.sum(a**2) for a in arrays)))


def dog(
    parameters: Sequence[Array],
    grads: Iterable[Sequence[Array | None]],
    learning_rate: float = 1.0,
    initial_distance: float = 1e-6,
    epsilon: float = 1e-8,
    weight_decay: Sequence[float] = (),
) -> Iterator[list[Array]]:
    """DoG."""
    start, ps = list(parameters), list(parameters)
    distance = squares = 0.0
    for gradients in grads:
        gs = _decayed(ps, gradients, weight_decay)
        present = [i for i, g in enumerate(gs) if g is not None]
        first = initial_distance * (1 + _norm(start[i] for i in present))
        distance = max(distance, first, _norm(ps[i] - start[i] for i in present))
        squares += sum(np.sum(g**2) for g in gs if g is not None)
        rate = learning_rate * distance / np.sqrt(squares + epsilon)
        ps = [p if g is None else p - rate * g for p, g in zip(ps, gs, strict=True)]
        yield ps


def dowg(
    parameters: Sequence[Array],
    grads: Iterable[Sequence[Array | None]],
    learning_rate: float = 1.0,
    initial_distance: float = 1e-2,
    epsilon: float = 1e-4,
    weight_decay: Sequence[float] = (),
) -> Iterator[list[Array]]:
    """DoWG."""
    start, ps = list(parameters), list(parameters)
    distance, weighted = initial_distance, 0.0
    for gradients in grads:
        gs = _decayed(ps, gradients, weight_decay)
        distance = max(distance, _norm(p - s for p, s, g in zip(ps, start, gs, strict=True) if g is not None))
        weighted += distance**2 * sum(np.sum(g**2) for g in gs if g is not None)
        rate = learning_rate * distance**2 / (np.sqrt(weighted) + epsilon)
        ps = [p if g is None else p - rate * g for p, g in zip(ps, gs, strict=True)]
        yield ps


def cocob(
    p: Array,
    grads: Iterable[Array],
    learning_rate: float = 1.0,
    alpha: float = 100.0,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """COCOB-Backprop."""
    start, largest = p, np.full_like(p, epsilon)
    total = reward = theta = np.zeros_like(p)
    for gradient in grads:
        g = -(gradient + weight_decay * p)
        largest = np.maximum(largest, np.abs(g))
        total = total + np.abs(g)
        reward = np.maximum(reward + (p - start) * g, 0)
        theta = theta + g
        target = start + theta / (largest * np.maximum(total + largest, alpha * largest)) * (largest + reward)
        p = (1 - learning_rate) * p + learning_rate * target
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"DoG": dog, "DoWG": dowg, "COCOB": cocob}

"""NumPy twins of optimizers whose second moments are smaller than the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray
Grads = Iterable[Array]


def came(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.0002,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    beta_3: float = 0.9999,
    epsilon_1: float = 1e-30,
    epsilon_2: float = 1e-16,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """CAME."""
    m = np.zeros_like(p)
    v: Any = 0.0
    row = column = residual_row = residual_column = 0.0
    for g in grads:
        if not p.size:
            yield p
            continue
        if weight.role == "vector":
            v = beta_2 * v + (1 - beta_2) * (g**2 + epsilon_1)
        else:
            squares = g.reshape(-1, g.shape[-1]) ** 2 + epsilon_1
            row = beta_2 * row + (1 - beta_2) * squares.mean(1)
            column = beta_2 * column + (1 - beta_2) * squares.mean(0)
            v = (np.outer(row, column) / np.mean(row)).reshape(p.shape)
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / clip_threshold)
        m = beta_1 * m + (1 - beta_1) * u
        step = m
        if weight.role != "vector":
            residual = (u - m).reshape(-1, p.shape[-1]) ** 2 + epsilon_2
            residual_row = beta_3 * residual_row + (1 - beta_3) * residual.mean(1)
            residual_column = beta_3 * residual_column + (1 - beta_3) * residual.mean(0)
            s = np.outer(residual_row, residual_column) / np.mean(residual_row)
            step = m / np.sqrt(s).reshape(p.shape)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def sm3(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    epsilon: float = 1e-30,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """SM3-II."""
    shape = p.shape or (1,)
    axes = range(len(shape))
    mu = [np.zeros(d) for d in shape]
    m = np.zeros_like(p)
    for g in grads:
        if not p.size:
            yield p
            continue
        sides = [mu[i].reshape([d if i == j else 1 for j, d in enumerate(shape)]) for i in axes]
        nu = np.min(np.stack(np.broadcast_arrays(*sides)), 0) + np.reshape(g, shape) ** 2
        mu = [np.max(nu, axis=tuple(j for j in axes if j != i)) for i in axes]
        step = g / np.sqrt(nu.reshape(p.shape) + epsilon)
        m = momentum * m + (1 - momentum) * step
        p = p - learning_rate * (m + weight_decay * p)
        yield p


def adam_mini(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Adam-mini, with a block for each unit of a kernel and for each element of a vector."""
    m = np.zeros_like(p)
    v: Any = 0.0
    for t, g in enumerate(grads, 1):
        squares = g**2
        if weight.role == "kernel":
            squares = squares.reshape(-1, p.shape[-1])
            squares = squares.sum(0) / max(1, len(squares))
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * squares
        direction = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        p = p - learning_rate * (direction + weight_decay * p)
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"CAME": came, "SM3": sm3, "AdamMini": adam_mini}

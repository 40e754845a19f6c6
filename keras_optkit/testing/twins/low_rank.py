"""The NumPy twin of APOLLO."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray


def _hashed(x: Array) -> Array:
    """MurmurHash3's last step, in integers of 64 bits."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> shift)) * factor % 2**32
    return x


def projection(seed: int, drawn: int, rank: int, length: int) -> Array:
    """The random projection."""
    key = (_hashed(np.array(seed, "uint64")) + np.uint64(drawn)) % 2**32
    bits = _hashed((np.arange(2 * rank * length, dtype="uint64") + _hashed(key)) % 2**32)
    radius, angle = np.split(((bits >> np.uint64(8)) + 0.5) / 2**24, 2)
    return (np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)).reshape(rank, length) / np.sqrt(rank)


def apollo(
    p: Array,
    grads: Iterable[Array],
    weight: Weight,
    learning_rate: float = 0.01,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    rank: int = 256,
    scale: float = 1.0,
    scale_type: str = "channel",
    projection_frequency: int = 200,
    growth_limit: float = 1.01,
    seed: int = 0,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """APOLLO."""
    low_rank = weight.role == "kernel" and p.size > 0 and min(p.size // p.shape[-1], p.shape[-1]) > rank
    m: Any = 0.0
    v: Any = 0.0
    before: Any = None
    for t, g in enumerate(grads, 1):
        rate = learning_rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        matrix = r = g
        if low_rank:
            matrix = g.reshape(-1, g.shape[-1])
            matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
            r = projection(seed, (t - 1) // projection_frequency, rank, len(matrix)) @ matrix
        m = beta_1 * m + (1 - beta_1) * r
        v = beta_2 * v + (1 - beta_2) * r**2
        adam = m / (np.sqrt(v) + epsilon)
        step = rate * adam
        if low_rank:
            axis = 0 if scale_type == "channel" else None
            scaled = matrix * np.linalg.norm(adam, axis=axis) / (np.linalg.norm(r, axis=axis) + 1e-8)
            length = np.linalg.norm(scaled)
            limit: Any = 1.0 if before is None else max(1.0, length / (before + 1e-8) / growth_limit)
            before, scaled = length / limit, scaled / limit
            turned = scaled.shape != g.reshape(-1, g.shape[-1]).shape
            step = rate * np.sqrt(scale) * (scaled.T if turned else scaled).reshape(p.shape)
        p = p - step - learning_rate * weight_decay * p
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"APOLLO": apollo}

"""NumPy twins of Muon's relatives; orthogonal matrices are made of singular vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight
from keras_optkit.testing.twins.structured import _adam, _polynomials_of

Array = np.ndarray
Grads = Iterable[Array]


def _orthogonal(x: Array, epsilon: float = 1e-7, steps: int = 5) -> Array:
    """The matrix whose singular values are those of x after Keller Jordan's iterations."""
    if not x.size:
        return x
    u, values, vt = np.linalg.svd(x / max(float(np.linalg.norm(x)), epsilon), full_matrices=False)
    return (u * _polynomials_of(values, "keller_jordan", steps)) @ vt


def normuon(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    momentum: float = 0.95,
    beta_2: float = 0.95,
    nesterov: bool = True,
    scaling: str = "moonlight",
    ns_steps: int = 5,
    epsilon_2: float = 1e-10,
    adam_lr_ratio: float = 1.0,
    exclude_output: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """NorMuon."""
    if weight.role != "kernel" or (weight.output and exclude_output):
        yield from _adam(p, grads, learning_rate * adam_lr_ratio, 0.9, 0.95, 1e-8, weight_decay)
        return
    m, v = np.zeros_like(p), 0.0
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        x = momentum * m + (1 - momentum) * g if nesterov else m
        o = _orthogonal(x.reshape(-1, p.shape[-1]), steps=ns_steps)
        if o.size:
            v = beta_2 * v + (1 - beta_2) * np.mean(o**2, axis=0)
            normal = o / (np.sqrt(v) + epsilon_2)
            rows, columns = o.shape
            size = (
                0.2 * np.sqrt(rows * columns)
                if scaling == "moonlight"
                else np.linalg.norm(o) * np.sqrt(max(1, columns / rows))
            )
            o = size * normal / (np.linalg.norm(normal) + epsilon_2)
        p = p - learning_rate * (o.reshape(p.shape) + weight_decay * p)
        yield p


def adamuon(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    momentum: float = 0.95,
    beta_2: float = 0.95,
    sign_momentum: bool = True,
    nesterov: bool = False,
    ns_steps: int = 5,
    epsilon_2: float = 1e-8,
    adam_lr_ratio: float = 1.0,
    exclude_output: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """AdaMuon."""
    if weight.role != "kernel" or (weight.output and exclude_output):
        yield from _adam(p, grads, learning_rate * adam_lr_ratio, 0.9, 0.95, 1e-8, weight_decay)
        return
    m, v = np.zeros_like(p), np.zeros(())
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        x = momentum * m + (1 - momentum) * g if nesterov else m
        o = _orthogonal((np.sign(x) if sign_momentum else x).reshape(-1, p.shape[-1]), steps=ns_steps)
        v = beta_2 * v + (1 - beta_2) * o**2
        adapted = o / (np.sqrt(v) + epsilon_2)
        adapted = 0.2 * np.sqrt(o.size) * adapted / (np.linalg.norm(adapted) + epsilon_2)
        p = p - learning_rate * (adapted.reshape(p.shape) + weight_decay * p)
        yield p


def scion(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    momentum: float = 0.9,
    constrained: bool = False,
    radius: float = 1.0,
    output_radius: float = 1.0,
    ns_steps: int = 5,
    epsilon: float = 1e-8,
    sign_embeddings: bool = True,
    sign_output: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Scion."""
    m = np.zeros_like(p)
    inputs, outputs = p.shape[-2:] if p.ndim > 1 else (1, 1)
    window = int(np.prod(p.shape[:-2]))
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        if not p.size:
            yield p
            continue
        if weight.role == "vector":
            step = radius * m / (np.sqrt(np.mean(m**2)) + epsilon)
        elif weight.role == "table" and sign_embeddings:
            step = output_radius * np.sign(m)
        elif weight.output and sign_output:
            step = output_radius * np.sign(m) / inputs
        else:
            done = _orthogonal(m.reshape(-1, outputs), steps=ns_steps).reshape(p.shape)
            step = radius * np.sqrt(outputs / inputs) / window * done
        p = p - learning_rate * (step + (weight_decay + constrained) * p)
        yield p


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"AdaMuon": adamuon, "NorMuon": normuon, "Scion": scion}

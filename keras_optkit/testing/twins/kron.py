"""NumPy twin of PSGD Kron."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray


def kron(
    p: Array,
    grads: Iterable[Array],
    weight: Weight,
    learning_rate: float = 0.001,
    momentum: float = 0.9,
    update_probability: float | None = None,
    preconditioner_learning_rate: float = 0.1,
    initial_scale: float = 1.0,
    max_precondition_dim: int = 2048,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """PSGD Kron with the mean over its noise."""
    flat = weight.role == "vector"
    shape = (p.size,) if flat else p.shape
    diagonal = [flat or not 1 < d <= max_precondition_dim for d in shape]
    qs = [initial_scale ** (1 / len(shape)) * np.eye(d) for d in shape]
    m, waited = np.zeros(shape), 0
    for t, g in enumerate(grads, 1):
        if not p.size:
            yield p
            continue
        m = momentum * m + (1 - momentum) * g.reshape(shape)
        m_hat = m / (1 - momentum**t)
        probability = update_probability or min(max(np.exp(-0.001 * (t - 1 - 500)), 0.03), 1.0)
        waited += 1
        due = waited * probability >= 1 - 1e-6
        waited = 0 if due else waited
        if due and np.any(m_hat):
            a = _times(m_hat, qs)
            inverses = [np.linalg.inv(q) for q in qs]
            new = []
            for i, q in enumerate(qs):
                others = [j for j in range(len(shape)) if j != i]
                first = np.tensordot(a, a, (others, others))
                noise = np.prod([np.sum(inverses[j] ** 2) for j in others])
                second = noise * inverses[i].T @ inverses[i]
                if diagonal[i]:
                    first, second = np.diag(np.diag(first)), np.diag(np.diag(second))
                    size = np.max(first + second)
                else:
                    size = _spectral_norm(first + second)
                new.append(q - preconditioner_learning_rate * np.triu(first - second) / size @ q)
            qs = new
            if t % 100 == 0 and len(qs) > 1:
                sizes = [np.max(np.abs(q)) for q in qs]
                qs = [q * np.prod(sizes) ** (1 / len(qs)) / size for q, size in zip(qs, sizes, strict=True)]
        step = _times(m_hat, [q.T @ q for q in qs])
        step = step * min(1.0, 1.1 / (np.sqrt(np.mean(step**2)) + 1e-8))
        p = p - learning_rate * (step.reshape(p.shape) + weight_decay * p)
        yield p


def _times(x: Array, matrices: list[Array]) -> Array:
    for matrix in matrices:  # each turns the next axis to the end
        x = np.tensordot(x, matrix, (0, 1))
    return x


def _spectral_norm(x: Array) -> float:
    """One power iteration from the longest row of a symmetric matrix."""
    largest = np.max(np.abs(x))
    x = x / largest
    image = x @ x[np.argmax(np.sum(x**2, axis=1))]
    return float(largest * np.linalg.norm(x @ image) / np.linalg.norm(image))


TWINS: dict[str, Callable[..., Iterator[Any]]] = {"Kron": kron}

"""NumPy twins of optimizers that look at a parameter, or at the model, as a whole.

Some need to be told what the parameter is for its layer, and take a `weight`; that of Prodigy, whose estimate is one
for the whole model, takes and yields lists. A gradient may be None where what is missing makes a difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from keras_optkit.optimizers.rule import Weight

Array = np.ndarray
Grads = Iterable[Array]
Some = Iterable[Array | None]


def _adam(
    p: Array, grads: Grads, learning_rate: float, beta_1: float, beta_2: float, epsilon: float, weight_decay: float
) -> Iterator[Array]:
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        direction = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon)
        p = p - learning_rate * (direction + weight_decay * p)
        yield p


def lamb(
    p: Array,
    grads: Grads,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-6,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """LAMB."""
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        r = m / (1 - beta_1**t) / (np.sqrt(v / (1 - beta_2**t)) + epsilon) + weight_decay * p
        size, length = np.linalg.norm(np.ravel(p)), np.linalg.norm(np.ravel(r))
        p = p - learning_rate * (size / length if size and length else 1.0) * r
        yield p


def adafactor(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.01,
    beta_1: float = 0.0,
    beta_2_decay: float = -0.8,
    epsilon_1: float = 1e-30,
    epsilon_2: float = 1e-3,
    clip_threshold: float = 1.0,
    relative_step: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Adafactor."""
    m, v, row, column = np.zeros_like(p), 0.0, 0.0, 0.0
    for t, g in enumerate(grads, 1):
        beta = 1 - t**beta_2_decay
        if not p.size:
            yield p
            continue
        if weight.role == "vector":
            v = beta * v + (1 - beta) * (g**2 + epsilon_1)
        else:
            squares = g.reshape(-1, g.shape[-1]) ** 2 + epsilon_1
            row = beta * row + (1 - beta) * squares.mean(1)
            column = beta * column + (1 - beta) * squares.mean(0)
            v = (np.outer(row, column) / row.mean()).reshape(p.shape)
        u = g / np.sqrt(v)
        u = u / max(1.0, np.sqrt(np.mean(u**2)) / clip_threshold)
        rate = min(learning_rate, t**-0.5) if relative_step else learning_rate
        step = rate * max(epsilon_2, np.sqrt(np.mean(p**2))) * u
        if beta_1:
            step = m = beta_1 * m + (1 - beta_1) * step
        p = p - step - learning_rate * weight_decay * p
        yield p


def prodigy(
    parameters: Sequence[Array],
    grads: Iterable[Sequence[Array | None]],
    learning_rate: float = 1.0,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    beta_3: float | None = None,
    epsilon: float = 1e-8,
    initial_d: float = 1e-6,
    d_coef: float = 1.0,
    growth_rate: float | None = None,
    bias_correction: bool = False,
    safeguard_warmup: bool = False,
    weight_decay: Sequence[float] = (),
) -> Iterator[list[Array]]:
    """Prodigy."""
    start, ps = list(parameters), list(parameters)
    m, v, s = ([np.zeros_like(p) for p in ps] for _ in range(3))
    d = d_max = initial_d
    numerator, root = 0.0, np.sqrt(beta_2) if beta_3 is None else beta_3
    for t, gs in enumerate(grads, 1):
        rate = learning_rate * d
        if bias_correction:
            rate *= np.sqrt(1 - beta_2**t) / (1 - beta_1**t)
        numerator *= root
        denominator = 0.0
        for i, g in enumerate(gs):
            if g is None:
                continue
            numerator += d / initial_d * rate * np.sum(g * (start[i] - ps[i]))
            m[i] = beta_1 * m[i] + (1 - beta_1) * d * g
            v[i] = beta_2 * v[i] + (1 - beta_2) * d**2 * g**2
            s[i] = root * s[i] + d / initial_d * (d if safeguard_warmup else rate) * g
            denominator += np.sum(np.abs(s[i]))
        estimate = d_coef * numerator / denominator
        d = max(d, estimate) if d == initial_d else d
        d_max = max(d_max, estimate)
        d = d_max if growth_rate is None else min(d_max, d * growth_rate)
        ps = [
            p if g is None else p - rate * (m[i] / (np.sqrt(v[i]) + d * epsilon) + weight_decay[i] * p)
            for i, (p, g) in enumerate(zip(ps, gs, strict=True))
        ]
        yield ps


_QUINTIC = (3.4445, -4.7750, 2.0315)
_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)


def muon(
    p: Array,
    grads: Grads,
    weight: Weight,
    learning_rate: float = 0.001,
    momentum: float = 0.95,
    nesterov: bool = True,
    scaling: str = "moonlight",
    coefficients: str = "keller_jordan",
    ns_steps: int = 5,
    epsilon: float = 1e-7,
    adam_lr_ratio: float = 1.0,
    exclude_output: bool = True,
    weight_decay: float = 0.0,
) -> Iterator[Array]:
    """Muon."""
    if weight.role != "kernel" or (weight.output and exclude_output):
        yield from _adam(p, grads, learning_rate * adam_lr_ratio, 0.9, 0.95, 1e-8, weight_decay * 1.0)
        return
    m = np.zeros_like(p)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        x = (momentum * m + (1 - momentum) * g if nesterov else m).reshape(-1, p.shape[-1])
        rows, columns = x.shape
        singular = np.linalg.svd(x / max(float(np.linalg.norm(x)), epsilon), full_matrices=False) if x.size else None
        if singular is not None:
            u, values, vt = singular
            x = (u * _polynomials_of(values, coefficients, ns_steps)) @ vt
        scale = (
            0.2 * np.sqrt(max(rows, columns)) if scaling == "moonlight" else np.sqrt(max(1.0, columns / max(rows, 1)))
        )
        p = p - learning_rate * (scale * x.reshape(p.shape) + weight_decay * p)
        yield p


def _polynomials_of(values: Array, coefficients: str, steps: int) -> Array:
    """What the iterations do to singular values."""
    if coefficients == "polar_express":
        values = values / 1.01
    for n in range(steps):
        a, b, c = _QUINTIC
        if coefficients == "polar_express":
            last = n >= len(_EXPRESS)
            a, b, c = (1.875, -1.25, 0.375) if last else _EXPRESS[n]
            s = 1.0 if last else 1.01
            a, b, c = a / s, b / s**3, c / s**5
        values = a * values + b * values**3 + c * values**5
    return values


def soap(
    p: Array,
    grads: Some,
    weight: Weight,
    learning_rate: float = 0.003,
    beta_1: float = 0.95,
    beta_2: float = 0.95,
    shampoo_beta: float | None = None,
    epsilon: float = 1e-8,
    precondition_frequency: int = 10,
    max_precondition_dim: int = 10000,
    initial_basis: str = "identity",
    weight_decay: float = 0.0,
    kl: bool = False,
) -> Iterator[Array]:
    """SOAP, from the identity; with `kl`, KL-SOAP."""
    assert initial_basis == "identity"
    beta = beta_2 if shampoo_beta is None else shampoo_beta
    axes = [] if weight.role == "vector" else [i for i, d in enumerate(p.shape) if d <= max_precondition_dim]
    gram = {i: np.zeros((p.shape[i],) * 2) for i in axes}
    basis = {i: np.eye(p.shape[i]) for i in axes}
    m, v = np.zeros_like(p), np.zeros_like(p)

    def along(x: Array, axis: int, matrix: Array) -> Array:
        return np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)

    def kl_grams(g: Array, t: int) -> dict[int, Array]:
        new, w = {}, (1 - beta) / (1 - beta ** (t + 1))
        for i in axes:
            x = np.moveaxis(g, i, 0)
            inverses = [np.eye(d) for d in x.shape[1:]]
            for j in axes:
                if j != i and not first:
                    values = np.maximum(np.diag(basis[j].T @ gram[j] @ basis[j]), epsilon)
                    inverses[j - (j > i)] = basis[j] @ np.diag(1 / (p.shape[j] * values)) @ basis[j].T
            scaled = x
            for place, inverse in enumerate(inverses, 1):
                scaled = along(scaled, place, inverse)
            others = list(range(1, p.ndim))
            new[i] = (1 - w) * gram[i] + w * np.tensordot(x, scaled, (others, others))
        return new

    first = True
    for t, g in enumerate(grads):
        if g is None:
            yield p
            continue
        if not first:
            turned = g
            for i in axes:
                turned = along(turned, i, basis[i].T)
            m = beta_1 * m + (1 - beta_1) * g
            v = beta_2 * v + (1 - beta_2) * turned**2
            step = m
            for i in axes:
                step = along(step, i, basis[i].T)
            step = step / (np.sqrt(v) + epsilon)
            for i in axes:
                step = along(step, i, basis[i])
            p = p - learning_rate * np.sqrt(1 - beta_2**t) / (1 - beta_1**t) * step
            p = p - learning_rate * weight_decay * p
        gram |= kl_grams(g, t) if kl else {}
        for i in axes:
            others = [j for j in range(p.ndim) if j != i]
            if not kl:
                gram[i] = beta * gram[i] + (1 - beta) * np.tensordot(g, g, (others, others))
            if not first and t % precondition_frequency == 0:
                product = gram[i] @ basis[i]
                order = np.argsort(-np.sum(basis[i] * product, 0), kind="stable")
                v = np.take(v, order, i)
                basis[i] = np.linalg.qr(product[:, order])[0]
        first = False
        yield p

"""NumPy twins: each optimizer once more, as plainly as its paper has it.

A twin is a generator `twin(p, grads, **arguments)`: it takes the start value, the gradients of successive steps and the
optimizer's own arguments, and yields the parameter after each step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from keras_optkit.testing.twins import (
    classic,
    compact,
    curvature,
    distance,
    dual_averaging,
    kron,
    layerwise,
    low_rank,
    mixed_momentum,
    muon_family,
    projected,
    proximal,
    second_moment,
    shampoo,
    sign,
)
from keras_optkit.testing.twins import schedule_free as schedule_free_family
from keras_optkit.testing.twins.structured import adafactor, lamb, muon, prodigy, soap

Twin = Callable[..., Iterator[Any]]
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


def nadam(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.002,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    momentum_decay: float = 0.004,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """NAdam."""
    m = v = np.zeros_like(p)
    product = 1.0
    for t, g in enumerate(grads, 1):
        now, following = (beta_1 * (1 - 0.5 * 0.96 ** (i * momentum_decay)) for i in (t, t + 1))
        product *= now
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        mean = following * m / (1 - product * following) + (1 - now) * g / (1 - product)
        p = p - learning_rate * (mean / (np.sqrt(v / (1 - beta_2**t)) + epsilon) + weight_decay * p)
        yield p


def radam(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """RAdam."""
    m = v = np.zeros_like(p)
    limit = 2 / (1 - beta_2) - 1
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        v = beta_2 * v + (1 - beta_2) * g**2
        correction = 1 - beta_2**t
        length = limit - 2 * t * beta_2**t / correction
        step = m / (1 - beta_1**t)
        if length > 5:
            r = np.sqrt((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length))
            step = r * step * np.sqrt(correction) / (np.sqrt(v) + epsilon)
        p = p - learning_rate * (step + weight_decay * p)
        yield p


def adabelief(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.001,
    beta_1: float = 0.9,
    beta_2: float = 0.999,
    epsilon: float = 1e-16,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """AdaBelief."""
    m = s = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta_1 * m + (1 - beta_1) * g
        s = beta_2 * s + (1 - beta_2) * (g - m) ** 2 + epsilon
        size = np.sqrt(s / (1 - beta_2**t)) + epsilon
        p = p - learning_rate * (m / (1 - beta_1**t) / size + weight_decay * p)
        yield p


def adan(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 0.001,
    beta_1: float = 0.98,
    beta_2: float = 0.92,
    beta_3: float = 0.99,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Adan."""
    m = v = n = np.zeros_like(p)
    before = None
    for t, g in enumerate(grads, 1):
        if g is not None:
            change = g - (g if before is None else before)
            m = beta_1 * m + (1 - beta_1) * g
            v = beta_2 * v + (1 - beta_2) * change
            n = beta_3 * n + (1 - beta_3) * (g + beta_2 * change) ** 2
            size = np.sqrt(n / (1 - beta_3**t)) + epsilon
            step = (m / (1 - beta_1**t) + beta_2 * v / (1 - beta_2**t)) / size
            p = (p - learning_rate * step) / (1 + learning_rate * weight_decay)
            before = g
        yield p


def lion(
    p: np.ndarray,
    grads: Grads,
    learning_rate: float = 1e-4,
    beta_1: float = 0.9,
    beta_2: float = 0.99,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Lion."""
    m = np.zeros_like(p)
    for g in grads:
        p = p - learning_rate * (np.sign(beta_1 * m + (1 - beta_1) * g) + weight_decay * p)
        m = beta_2 * m + (1 - beta_2) * g
        yield p


def _directions(inner: dict[str, Any], grads: Grads) -> list[np.ndarray]:
    """What an optimizer, whose steps do not depend on the weights, would subtract with a learning rate of 1."""
    grads = list(grads)
    zero = np.zeros_like(grads[0])
    path = [zero, *TWINS[inner["class_name"]](zero, grads, learning_rate=1.0, weight_decay=0.0, **inner["config"])]
    return [a - b for a, b in itertools.pairwise(path)]


def lookahead(
    p: np.ndarray,
    grads: Grads,
    inner: dict[str, Any],
    sync_period: int = 5,
    slow_step_size: float = 0.5,
    learning_rate: float = 0.001,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Lookahead; the fast weights."""
    slow = p
    for t, direction in enumerate(_directions(inner, grads), 1):
        p = p - learning_rate * (direction + weight_decay * p)
        if t % sync_period == 0:
            slow = p = slow + slow_step_size * (p - slow)
        yield p


def ema_nesterov(
    p: np.ndarray,
    grads: Grads,
    inner: dict[str, Any],
    lookahead_step_size: float = 0.5,
    lookahead_momentum: float = 0.99,
    learning_rate: float = 0.001,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """EMA-Nesterov; the weights that gradients are computed at."""
    x, m = p, np.zeros_like(p)
    for direction in _directions(inner, grads):
        before, x = x, p - learning_rate * (direction + weight_decay * p)
        m = lookahead_momentum * m + (1 - lookahead_momentum) * (x - before)
        p = x + lookahead_step_size * m
        yield p


def sam(p: np.ndarray, grads: Grads, inner: dict[str, Any], **arguments: Any) -> Iterator[np.ndarray]:
    """SAM where the second gradients are given: the inner optimizer. Where they are to be taken says `perturbed`."""
    common = {name: value for name, value in arguments.items() if name not in ("rho", "adaptive")}
    return TWINS[inner["class_name"]](p, grads, **inner["config"], **common)


def perturbed(
    ps: list[np.ndarray], grads: list[np.ndarray], rho: float = 0.05, adaptive: bool = False
) -> list[np.ndarray]:
    """The weights that SAM computes the second gradient at; of all parameters of a model."""
    scales = [np.abs(p) if adaptive else np.ones_like(p) for p in ps]
    norm = np.sqrt(sum(np.sum((t * g) ** 2) for t, g in zip(scales, grads, strict=True)))
    return [p + rho * t**2 * g / (norm + 1e-12) for p, t, g in zip(ps, scales, grads, strict=True)]


sam.perturbed = perturbed  # type: ignore[attr-defined]


def asam(*args: Any, eta: float = 0.01, **arguments: Any) -> Iterator[np.ndarray]:  # noqa: ARG001
    """ASAM where the second gradients are given."""
    return sam(*args, **arguments)


def perturbed_kernels(
    ps: list[np.ndarray], grads: list[np.ndarray], rho: float = 0.5, eta: float = 0.01
) -> list[np.ndarray]:
    """The weights that ASAM computes the second gradient at, with parameters of rank 2 and more as kernels."""
    scales = [np.abs(p) + eta if p.ndim > 1 else np.ones_like(p) for p in ps]
    norm = np.sqrt(sum(np.sum((t * g) ** 2) for t, g in zip(scales, grads, strict=True)))
    return [p + rho * t**2 * g / (norm + 1e-12) for p, t, g in zip(ps, scales, grads, strict=True)]


asam.perturbed = perturbed_kernels  # type: ignore[attr-defined]


def gsam(p: np.ndarray, grads: Grads, inner: dict[str, Any], **arguments: Any) -> Iterator[np.ndarray]:
    """GSAM where both gradients are equal: the inner optimizer. What is made of two says `combined`."""
    own = ("alpha", "rho_min", "max_learning_rate", "min_learning_rate")
    return sam(p, grads, inner, **{name: value for name, value in arguments.items() if name not in own})


def perturbed_by_rate(
    ps: list[np.ndarray],
    grads: list[np.ndarray],
    learning_rate: float,
    rho: float = 0.05,
    rho_min: float = 0.0,
    max_learning_rate: float | None = None,
    min_learning_rate: float = 0.0,
    adaptive: bool = False,
) -> list[np.ndarray]:
    """The weights that GSAM computes the second gradient at."""
    if max_learning_rate is not None:
        share = (learning_rate - min_learning_rate) / (max_learning_rate - min_learning_rate)
        rho = rho_min + (rho - rho_min) * share
    return perturbed(ps, grads, rho, adaptive)


def combined(first: list[np.ndarray], second: list[np.ndarray], alpha: float = 0.4) -> list[np.ndarray]:
    """The gradient that GSAM updates with."""
    product = sum(np.sum(a * b) for a, b in zip(first, second, strict=True))
    squares = sum(np.sum(b**2) for b in second)
    return [b - alpha * (a - product / squares * b) for a, b in zip(first, second, strict=True)]


gsam.perturbed = perturbed_by_rate  # type: ignore[attr-defined]
gsam.combined = combined  # type: ignore[attr-defined]


def schedule_free(
    p: np.ndarray,
    grads: Grads,
    inner: dict[str, Any],
    momentum: float = 0.9,
    warmup_steps: int = 0,
    r: float = 0.0,
    weight_lr_power: float = 2.0,
    learning_rate: float = 0.001,
    weight_decay: float = 0.0,
) -> Iterator[np.ndarray]:
    """Schedule-Free; the weights y of training."""
    x = y = z = p
    total = largest = 0.0
    for t, direction in enumerate(_directions(inner, grads), 1):
        rate = learning_rate * min(t / max(warmup_steps, 1), 1)
        z = z - rate * (direction + weight_decay * y)
        largest = max(largest, rate)
        total += t**r * largest**weight_lr_power
        share = t**r * largest**weight_lr_power / total
        x = (1 - share) * x + share * z
        y = momentum * x + (1 - momentum) * z
        yield y


def schedule_free_sgd(
    p: np.ndarray, grads: Grads, learning_rate: float = 1.0, **arguments: Any
) -> Iterator[np.ndarray]:
    """Schedule-Free SGD."""
    return schedule_free(p, grads, {"class_name": "SGD", "config": {}}, learning_rate=learning_rate, **arguments)


def schedule_free_adamw(
    p: np.ndarray, grads: Grads, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-8, **arguments: Any
) -> Iterator[np.ndarray]:
    """Schedule-Free AdamW."""
    inner = {"class_name": "Adam", "config": {"beta_1": 0.0, "beta_2": beta_2, "epsilon": epsilon}}
    return schedule_free(p, grads, inner, momentum=beta_1, **arguments)


#: The twin of each of the package's optimizers, by the optimizer's name.
TWINS: dict[str, Twin] = {
    "AdaBelief": adabelief,
    "Adan": adan,
    "Lion": lion,
    "NAdam": nadam,
    "RAdam": radam,
    "SGD": sgd,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adamw,
    "EMANesterov": ema_nesterov,
    "Lookahead": lookahead,
    "SAM": sam,
    "ASAM": asam,
    "GSAM": gsam,
    "ScheduleFree": schedule_free,
    "ScheduleFreeSGD": schedule_free_sgd,
    "ScheduleFreeAdamW": schedule_free_adamw,
    "LAMB": lamb,
    "Adafactor": adafactor,
    "Prodigy": prodigy,
    "Muon": muon,
    "SOAP": soap,
    **classic.TWINS,
    **curvature.TWINS,
    **dual_averaging.TWINS,
    **mixed_momentum.TWINS,
    **projected.TWINS,
    **proximal.TWINS,
    **second_moment.TWINS,
    **sign.TWINS,
    **kron.TWINS,
    **muon_family.TWINS,
    **shampoo.TWINS,
    **compact.TWINS,
    **distance.TWINS,
    **layerwise.TWINS,
    **low_rank.TWINS,
    **schedule_free_family.TWINS,
}

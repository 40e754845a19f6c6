"""PSGD Kron: a preconditioner that is fitted so that gradients become white, as a Kronecker product of triangles."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, count, number
from keras_optkit.optimizers.rules.soap import gram_along, turned
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float

#: After how many updates the factors of a preconditioner are given the same largest element.
BALANCE_PERIOD = 100

#: The least norm that a change of a factor is divided by.
TINY = 1.2e-38


@dataclass(frozen=True)
class KronVectorRule(Rule):
    """`θ ← θ - η q² m̂`, with a root mean square of at most 1.1 η, and q fitted towards `1 / √|m̂|`."""

    layout = "whole"
    momentum: Value = number(0.9, 0, 1, closed="left")
    update_probability: Value = number(None, 0, 1, closed="right", optional=True)
    preconditioner_learning_rate: Value = number(0.1)
    initial_scale: float = number(1.0, 0, closed="neither", fixed=True)

    def scalars(self) -> Mapping[str, float]:
        return {"waited": 0.0, "due": 0.0}

    def measure(self, h: Hyper) -> dict[str, Tensor]:  # type: ignore[override]
        """Whether the preconditioner is fitted in this update: after 1 / probability updates."""
        waited = h.scalars["waited"] + 1
        if self.update_probability is None:
            probability = ops.clip(ops.exp((501 - h.step) / 1000), 0.03, 1.0)
        else:
            probability = ops.cast(h.exact(self.update_probability), waited.dtype)
        due = ops.cast(waited * probability >= 1 - 1e-6, waited.dtype)
        return {"waited": waited * (1 - due), "due": due}

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "q": self.initial_scale}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        gamma = h(self.momentum)
        m = gamma * slots["m"] + (1 - gamma) * u
        m_hat = m / h.bias_correction(self.momentum)
        old = {name: slot for name, slot in slots.items() if name != "m"}
        if 0 in u.shape:
            return u, {"m": m, **old}
        new = dict(ops.cond(h.scalar("due") > 0, lambda: self.fitted(old, m_hat, h), lambda: old))
        seen = h.sum(m_hat * m_hat) > 0  # without any gradient, factors would grow without end
        new = {
            name: ops.where(ops.reshape(seen, (-1, *[1] * (len(q.shape) - 1))), q, old[name]) for name, q in new.items()
        }
        direction = self.whitened(new, m_hat)
        size = ops.sqrt(h.mean(direction * direction)) + 1e-8
        return h.learning_rate * ops.minimum(1.1 / size, 1.0) * direction, {"m": m, **new}

    def fitted(self, old: Slots, g: Tensor, h: Hyper) -> Slots:
        """The factors after one step of the fit to g."""
        q = old["q"]
        return {"q": self.changed(q, ops.square(q * g), ops.square(1 / q), h)}

    def whitened(self, factors: Slots, g: Tensor) -> Tensor:
        """G times the preconditioner."""
        return factors["q"] * factors["q"] * g

    def changed(self, q: Tensor, first: Tensor, second: Tensor, h: Hyper) -> Tensor:
        """A diagonal factor after a step along the difference of the gradient's part and that of the noise."""
        size = ops.max(first + second, axis=tuple(range(1, len(q.shape))), keepdims=True) + TINY
        return q - h(self.preconditioner_learning_rate) * (first - second) / size * q


@dataclass(frozen=True)
class KronRule(KronVectorRule):
    """The same with a triangle for each axis: `θ ← θ - η (⊗ QᵢᵀQᵢ) m̂`."""

    max_precondition_dim: int = count(2048)

    def routes(self) -> Mapping[str, Rule]:
        fields = self.momentum, self.update_probability, self.preconditioner_learning_rate, self.initial_scale
        return {"vector": KronVectorRule(*fields)}

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        first = self.first(len(w.shape))
        factors = {
            f"q_{i}": shaped(d, d) if 1 < d <= self.max_precondition_dim else shaped(d, value=first)
            for i, d in enumerate(w.shape)
        }
        return {"m": moment(), **factors}

    def first(self, rank: int) -> float:
        """The scale of each of the first factors, which are multiples of the identity."""
        return self.initial_scale ** (1 / rank)

    def triangles(self, slots: Slots) -> dict[int, Tensor]:
        """The factors by axis; slots have the differences of triangles from the first ones."""
        factors = {}
        for i in range(len(slots)):
            slot = slots[f"q_{i}"]
            first = self.first(len(slots)) * ops.eye(slot.shape[-1], dtype=slot.dtype)
            factors[i] = slot + first if len(slot.shape) == 3 else slot
        return factors

    def fitted(self, old: Slots, g: Tensor, h: Hyper) -> Slots:
        factors = self.triangles(old)
        a = _times(g, factors)
        inverses = {i: _inverse(q) for i, q in factors.items()}
        traces = {i: ops.sum(ops.square(r), axis=tuple(range(1, len(r.shape)))) for i, r in inverses.items()}
        new = {}
        for i, q in factors.items():
            noise = math.prod(trace for j, trace in traces.items() if j != i)
            if len(q.shape) == 2:
                squares = ops.sum(ops.square(a), axis=[j + 1 for j in factors if j != i])
                noise = ops.reshape(noise, (-1, 1)) if len(factors) > 1 else 1.0
                new[i] = self.changed(q, squares, noise * ops.square(inverses[i]), h)
                continue
            r = inverses[i]
            noise = ops.reshape(noise, (-1, 1, 1)) if len(factors) > 1 else 1.0
            first, second = gram_along(a, i), noise * ops.matmul(ops.transpose(r, (0, 2, 1)), r)
            change = ops.triu(first - second) / (_spectral_norm(first + second) + TINY)
            new[i] = q - h(self.preconditioner_learning_rate) * ops.matmul(change, q)
        balance = ops.equal(ops.mod(ops.cast(h.step, "int32"), BALANCE_PERIOD), 0)
        new = _balanced(new, balance) if len(new) > 1 else new
        identity = {i: self.first(len(new)) * ops.eye(q.shape[-1], dtype=q.dtype) for i, q in new.items()}
        return {f"q_{i}": q - identity[i] if len(q.shape) == 3 else q for i, q in new.items()}

    def whitened(self, factors: Slots, g: Tensor) -> Tensor:
        triangles = self.triangles(factors)
        return _times(_times(g, triangles), triangles, transposed=True)


def _times(x: Tensor, factors: dict[int, Tensor], *, transposed: bool = False) -> Tensor:
    """`Q x` along each axis, or `Qᵀ x`."""
    x = turned(x, {i: q for i, q in factors.items() if len(q.shape) == 3}, back=not transposed)
    for i, q in factors.items():
        if len(q.shape) == 2:
            x = x * ops.reshape(q, (q.shape[0], *[1] * i, -1, *[1] * (len(x.shape) - 2 - i)))
    return x


def _inverse(q: Tensor) -> Tensor:
    if len(q.shape) == 2:
        return 1 / q
    identity = ops.broadcast_to(ops.eye(q.shape[-1], dtype=q.dtype), q.shape)
    return ops.solve_triangular(q, identity)


def _spectral_norm(x: Tensor) -> Tensor:
    """About the largest singular value of symmetric matrices, from below: one power iteration from the longest row."""
    largest = ops.max(ops.abs(x), axis=(1, 2), keepdims=True)
    scaled = ops.divide_no_nan(x, largest)
    place = ops.argmax(ops.sum(ops.square(scaled), axis=2), axis=1)
    row = ops.take_along_axis(scaled, ops.reshape(place, (-1, 1, 1)), axis=1)
    image = ops.matmul(row, scaled)
    length = ops.sqrt(ops.sum(ops.square(image), axis=2, keepdims=True))
    again = ops.matmul(ops.divide_no_nan(image, length), scaled)
    return largest * ops.sqrt(ops.sum(ops.square(again), axis=2, keepdims=True))


def _balanced(factors: dict[int, Tensor], when: Tensor) -> dict[int, Tensor]:
    """The factors with the same largest element, and the same product."""
    sizes = {i: ops.max(ops.abs(q), axis=tuple(range(1, len(q.shape)))) for i, q in factors.items()}
    mean = ops.exp(sum(ops.log(size) for size in sizes.values()) / len(sizes))
    return {
        i: ops.where(when, q * ops.reshape(mean / sizes[i], (-1, *[1] * (len(q.shape) - 1))), q)
        for i, q in factors.items()
    }


@register(
    "optimizer",
    paper="Li, arXiv 1512.04202, and Pooladzandi and Li, arXiv 2402.04553 (Kronecker products)",
    parity="timm.optim.Kron, with the mean over its noise",
    cases=(
        {"learning_rate": 0.01},
        {
            "learning_rate": 0.01,
            "momentum": 0.8,
            "update_probability": 0.5,
            "preconditioner_learning_rate": 0.3,
            "initial_scale": 0.5,
            "max_precondition_dim": 3,
        },
    ),
    space={
        "learning_rate": Float(1e-5, 1e-2, log=True),
        "preconditioner_learning_rate": Choice([0.05, 0.1, 0.3]),
        "weight_decay": Float(1e-3, 1.0, log=True),
    },
)
class Kron(Optimizer):
    """PSGD Kron: a preconditioner is fitted that makes gradients white, one triangle for each axis.

    ```text
    m ← γ m + (1 - γ) g                     m̂ = m / (1 - γᵗ)
    if it is time:   A = m̂ times Qᵢ along each axis
                     Cᵢ = Aᵢ Aᵢᵀ            Nᵢ = (Qᵢ Qᵢᵀ)⁻¹ ∏ⱼ ‖Qⱼ⁻¹‖²        j: all other axes
                     Qᵢ ← Qᵢ - μ triu(Cᵢ - Nᵢ) Qᵢ / ‖Cᵢ + Nᵢ‖
    s = m̂ times Qᵢᵀ Qᵢ along each axis
    θ ← θ - η min(1, 1.1 / rms(s)) s
    ```

    Qᵢ are upper triangles, and diagonals for axes with one element or more than `max_precondition_dim`; vectors have
    one diagonal. They are multiples of the identity at first. State: m in the shape of θ, and for each axis of d
    elements d × d: for a square matrix one and a half times that of Adam. The fit is done in every update at first, and
    from update 501 on less and less often, down to every 34th: when p times the updates since the last one reaches 1,
    with `p = exp(-(t - 501) / 1000)`, at least 0.03; or with p as given.

    **Without random numbers.** The paper has `Bᵢ Bᵢᵀ` in place of Nᵢ, B being noise times the inverse of Q, drawn in
    each update; Nᵢ is the mean of it. So runs are reproducible, and fits less noisy. ‖·‖ is an estimate of the spectral
    norm from below, as in the reference. That also balances the largest elements of the Qᵢ, in one of 100 fits at
    random; here these are the fits in the updates 100, 200, ... Parameters whose m is 0 altogether keep their Q.

    When to use it: where curvature along each axis helps, and neither eigenvalues nor their bases are to be kept.

    When not to use it: with a rate that was tuned for Adam, which is several times too large here; on kernels with long
    axes without a `max_precondition_dim` that excludes them (triangles take d³).

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        update_probability: p in (0, 1], or a schedule: the share of updates with a fit; None for the p above.
        preconditioner_learning_rate: μ >= 0, or a schedule.
        initial_scale: The product of the first Q is this multiple of the identity, a number > 0.
        max_precondition_dim: Axes with more elements than this have a diagonal.
        weight_decay: λ >= 0, a schedule, or None.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Kron(3e-4), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        momentum: float | Schedule = 0.9,
        update_probability: float | Schedule | None = None,
        preconditioner_learning_rate: float | Schedule = 0.1,
        initial_scale: float = 1.0,
        max_precondition_dim: int = 2048,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = KronRule(momentum, update_probability, preconditioner_learning_rate, initial_scale, max_precondition_dim)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

"""Optimizers that find their learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, number
from keras_optkit.optimizers.slots import Initial, moment, weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class ProdigyRule(Rule):
    """`m ← β₁ m + (1 - β₁) d g; v ← β₂ v + (1 - β₂) d² g²; θ ← θ - η d m / (√v + d' ε)`, with d' the new d."""

    layout = "elementwise"
    reuses = frozenset({"m", "s", "v"})
    handles_decay = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    beta_3: float | None = number(None, 0, 1, closed="left", fixed=True, optional=True)
    epsilon: Value = number(1e-8)
    initial_d: float = number(1e-6, 0, closed="neither", fixed=True)
    d_coef: Value = number(1.0, 0, closed="neither")
    growth_rate: Value | None = number(None, 1, optional=True)
    bias_correction: bool = flag(False)
    safeguard_warmup: bool = flag(False)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False), "s": 0.0, "start": weights_copy()}

    def scalars(self) -> Mapping[str, float]:
        return {"d": self.initial_d, "d_max": self.initial_d, "numerator": 0.0}

    def root(self, h: Hyper) -> Any:
        """β₃."""
        return h(self.beta_2) ** 0.5 if self.beta_3 is None else self.beta_3

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        return h.scalar("d", before=True)

    def rate(self, h: Hyper) -> Tensor:
        """η d of this update."""
        rate = h.learning_rate * h.scalar("d", before=True)
        if self.bias_correction:
            rate = rate * ops.sqrt(h.bias_correction(self.beta_2)) / h.bias_correction(self.beta_1)
        return rate

    def distance(self, u: Tensor, slots: Slots, h: Hyper) -> Tensor:
        """The weighted sum s of the gradients."""
        d, d_0 = h.scalar("d", before=True), self.initial_d
        return self.root(h) * slots["s"] + d / d_0 * (d if self.safeguard_warmup else self.rate(h)) * u

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        numerator = h.scalar("d", before=True) / self.initial_d * self.rate(h) * u * (slots["start"] - p)
        return {"numerator": numerator, "denominator": ops.abs(self.distance(u, slots, h))}

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        d, largest = h.scalars["d"], h.scalars["d_max"]
        numerator = self.root(h) * h.scalars["numerator"] + sums["numerator"]
        estimate = h(self.d_coef) * ops.divide_no_nan(numerator, sums["denominator"])
        largest = new_d = ops.maximum(largest, estimate)
        if self.growth_rate is not None:
            still = ops.equal(d - self.initial_d, 0)  # a number by itself would go through float32
            before = ops.where(still, ops.maximum(d, estimate), d)
            new_d = ops.minimum(largest, before * h(self.growth_rate))
        new = {"d": new_d, "d_max": largest, "numerator": numerator}
        moves = ops.logical_and(h.learning_rate > 0, sums["denominator"] > 0)
        return {name: ops.where(moves, value, h.scalars[name]) for name, value in new.items()}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        d, rate, beta_1, beta_2 = h.scalar("d", before=True), self.rate(h), h(self.beta_1), h(self.beta_2)
        m = beta_1 * slots["m"] + (1 - beta_1) * d * u
        v = beta_2 * slots["v"] + (1 - beta_2) * d * d * u * u
        step = rate * (m / (ops.sqrt(v) + h.scalar("d") * h(self.epsilon)) + h.weight_decay * p)
        new = {"m": m, "v": v, "s": self.distance(u, slots, h)}
        moves = h.learning_rate > 0
        return step, {"start": slots["start"], **{k: ops.where(moves, x, slots[k]) for k, x in new.items()}}


@register(
    "optimizer",
    paper="Mishchenko and Defazio, arXiv 2306.06101, algorithm 4, in the form of the authors' implementation",
    parity="prodigyopt.Prodigy",
    cases=(
        {"learning_rate": 1.0, "initial_d": 1e-3},
        {"learning_rate": 0.5, "initial_d": 1e-2, "bias_correction": True, "safeguard_warmup": True, "beta_3": 0.9},
        {"learning_rate": 1.0, "initial_d": 1e-3, "d_coef": 0.5, "growth_rate": 1.02, "beta_2": 0.9},
    ),
    space={"d_coef": Float(0.1, 10.0, log=True), "beta_1": Choice([0.8, 0.9, 0.95])},
)
class Prodigy(Optimizer):
    """Prodigy: Adam that estimates its learning rate from the distance to the initial weights.

    ```text
    η' = η d                                  with bias_correction: times √(1 - β₂ᵗ) / (1 - β₁ᵗ)
    r ← β₃ r + (d / d₀) η' Σ g (θ₀ - θ)       s ← β₃ s + (d / d₀) η' g           (sums over the whole model)
    d̂ = c r / Σ|s|                            d' = max(d, d̂), at most d times growth_rate
    m ← β₁ m + (1 - β₁) d g                   v ← β₂ v + (1 - β₂) d² g²
    θ ← θ - η' (m / (√v + d' ε) + λ θ)        then d ← d'
    ```

    θ₀ are the weights before the first update; m, v and s start at 0, and all four have the shape of θ: twice the state
    of Adam. There is one d, one largest estimate and one r for the whole model. As in the authors' implementation, d'
    is the new one in the denominator only, β₃ is √β₂ unless it is given, and nothing changes d while the rate is 0.

    Leave the learning rate at 1, or give a schedule that ends at 0, such as `ok.schedules.Cosine(1.0, steps)`. Factors
    of groups on the rate count in the estimate of d as well.

    When to use it: if there is no time to tune the rate of `AdamW`.

    When not to use it: with weights in half precision without `master_weights=True`, or with an `initial_d` below the
    resolution of float32 weights and sparse gradients: the first steps have the length of d₀. To raise or lower the
    estimate use `d_coef`, not the learning rate.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        beta_3: β₃ in [0, 1), or None for √β₂.
        epsilon: ε >= 0, or a schedule.
        initial_d: d₀ > 0, the first estimate of d.
        d_coef: c > 0, a factor on the estimate of d.
        growth_rate: The largest factor >= 1 on d in one update, or a schedule. None: no limit.
        bias_correction: Whether the rate is corrected as in Adam.
        safeguard_warmup: Whether η is left out of s, which keeps d from growing too fast under a warm-up.
        weight_decay: λ >= 0, a schedule, or None.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Prodigy(weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        beta_3: float | None = None,
        epsilon: float | Schedule = 1e-8,
        initial_d: float = 1e-6,
        d_coef: float | Schedule = 1.0,
        growth_rate: float | Schedule | None = None,
        bias_correction: bool = False,
        safeguard_warmup: bool = False,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = ProdigyRule(
            beta_1, beta_2, beta_3, epsilon, initial_d, d_coef, growth_rate, bias_correction, safeguard_warmup
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

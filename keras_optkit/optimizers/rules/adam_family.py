"""Relatives of Adam: other momentum, other second moments, a warm-up of their own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, is_dynamic, number
from keras_optkit.optimizers.rules.adam import SPACE
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


def moments(u: Tensor, slots: Slots, beta_1: Value, beta_2: Value) -> tuple[Tensor, Tensor]:
    """The running means of the gradient and of its square."""
    m = beta_1 * slots["m"] + (1 - beta_1) * u
    return m, beta_2 * slots["v"] + (1 - beta_2) * u * u


@dataclass(frozen=True)
class NAdamRule(Rule):
    """`θ ← θ - η (μ' m / (1 - Πμ μ') + (1 - μ) g / (1 - Πμ)) / (√v̂ + ε)`, with μ' the next μ."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)
    momentum_decay: Value = number(0.004)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        m, v = moments(u, slots, h(self.beta_1), h(self.beta_2))
        beta, decay = h.exact(self.beta_1), h.exact(self.momentum_decay) * -math.log(0.96)
        now, following = (beta * (1 - 0.5 * ops.exp(-decay * t)) for t in (h.step, h.step + 1))
        product = (beta * ops.ones_like(h.step)) ** h.step * _product(decay * ops.ones_like(h.step), h.step)
        of_gradient = ops.cast((1 - now) / (1 - product), u.dtype)
        of_momentum = ops.cast(following / (1 - product * following), u.dtype)
        size = ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)
        return h.learning_rate * (of_gradient * u + of_momentum * m) / size, {"m": m, "v": v}


def _product(decay: Tensor, t: Tensor) -> Tensor:
    """`Π (1 - q^i / 2)` for i from 1 to t, with q = exp(-decay).

    Its logarithm is `-Σ (q / 2)^k / k (1 - q^kt) / (1 - q^k)`, of which the terms halve. So the product needs no state,
    which would be wrong for a parameter that joins later.
    """
    k = ops.cast(ops.arange(1, 60), decay.dtype)
    flat = decay == 0
    each = k * ops.where(flat, ops.ones_like(decay), decay)
    lengths = ops.where(flat, t, ops.expm1(-each * t) / ops.expm1(-each))
    return ops.exp(-ops.sum(ops.exp(-k * (decay + math.log(2.0))) / k * lengths))


@register(
    "optimizer",
    paper="Dozat, Incorporating Nesterov Momentum into Adam, 2016, algorithm 2, without its factor β₂ on v̂",
    parity="torch.optim.NAdam (decoupled_weight_decay=True)",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "momentum_decay": 0.1}),
    space=SPACE,
)
class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's momentum, which warms up. With `weight_decay` it is NAdamW.

    ```text
    μₜ = β₁ (1 - 0.96^(t ψ) / 2)
    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²          v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η (μₜ₊₁ m / (1 - μ₁⋯μₜ₊₁) + (1 - μₜ) g / (1 - μ₁⋯μₜ)) / (√v̂ + ε) - η λ θ
    ```

    m and v have the shape of θ and start at 0. With a schedule for β₁ or ψ, the products are those of the current
    values. The paper multiplies v̂ by β₂, too; torch, Keras and optax leave that out, and so does this one. Keras's
    `Nadam` computes 0.96^t, without ψ, so that the momentum is at its full size after a hundred updates instead of
    after tens of thousands. NAdamW, tuned, is the baseline of AlgoPerf (2306.07179).

    When to use it: as `Adam`, or with `weight_decay` as `AdamW`: it is often a little faster.

    When not to use it: where a tuned AdamW is already there, there is little to gain.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. 0.002 as in torch.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        momentum_decay: ψ >= 0, or a schedule: how fast the momentum reaches β₁.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.NAdam(1e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.002,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        momentum_decay: float | Schedule = 0.004,
        **common: Any,
    ):
        super().__init__(learning_rate, NAdamRule(beta_1, beta_2, epsilon, momentum_decay), **common)


@dataclass(frozen=True)
class RAdamRule(Rule):
    """`θ ← θ - η r m̂ √(1 - β₂ᵗ) / (√v + ε)`, and `θ ← θ - η m̂` while the variance of v is not known."""

    elementwise = True
    threshold: ClassVar[float] = 5.0
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="neither")
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        m, v = moments(u, slots, h(self.beta_1), h(self.beta_2))
        mean = m / h.bias_correction(self.beta_1)
        adapted = ops.sqrt(h.bias_correction(self.beta_2)) / (ops.sqrt(v) + h(self.epsilon))
        factor, known = self.rectification(h)
        step = ops.where(known, ops.cast(factor, u.dtype) * adapted, ops.ones_like(adapted))
        return h.learning_rate * mean * step, {"m": m, "v": v}

    def rectification(self, h: Hyper) -> tuple[Tensor, Tensor]:
        """r, and whether ρₜ is above the threshold.

        With ℓ = -log β₂, ρ∞ = coth(ℓ / 2) and ρₜ = ρ∞ - t (coth(t ℓ / 2) - 1). Both are about 2 / ℓ, and their
        difference has no digits left in float32; that of what is above 2 / ℓ has all.
        """
        beta = h.exact(self.beta_2)
        half = -(ops.log(beta) if is_dynamic(self.beta_2) else math.log(beta)) / 2
        unit = half * ops.ones_like(h.step)  # ops.cast would take a Python number through float32
        limit = _coth(unit)
        length = ops.minimum(h.step + (_above(unit) - _above(h.step * half)) / half, limit)
        known = length > self.threshold
        safe = ops.where(known, length, 6.0 * ops.ones_like(length))
        top, bottom = (safe - 4) * (safe - 2) * limit, (limit - 4) * (limit - 2) * safe
        return ops.sqrt(ops.where(known, ops.divide_no_nan(top, bottom), ops.ones_like(top))), known


def _coth(x: Tensor) -> Tensor:
    """`coth(x)`; on JAX `ops.tanh` computes in float32."""
    return 1 + 2 / ops.expm1(2 * x)


def _above(x: Tensor) -> Tensor:
    """`x coth(x) - 1`, by its series where x is small."""
    square = ops.minimum(x * x, 0.0625)
    series = (
        square / 3 * (1 - square / 15 * (1 - square * (2 / 21) * (1 - square * (1 / 10) * (1 - square * (10 / 99)))))
    )
    return ops.where(x < 0.25, series, x * _coth(x) - 1)


@register(
    "optimizer",
    paper="Liu, Jiang, He, Chen, Liu, Gao and Han, arXiv 1908.03265, algorithm 2, with a threshold of 5 as in its code",
    parity="torch.optim.RAdam (decoupled_weight_decay=True)",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    space=SPACE,
)
class RAdam(Optimizer):
    """RAdam: Adam whose first steps are as short as the variance of its second moment demands.

    ```text
    ρ∞ = 2 / (1 - β₂) - 1          ρₜ = ρ∞ - 2 t β₂ᵗ / (1 - β₂ᵗ)
    r = √((ρₜ - 4) (ρₜ - 2) ρ∞ / ((ρ∞ - 4) (ρ∞ - 2) ρₜ))
    ρₜ > 5:     θ ← θ - η r m̂ √(1 - β₂ᵗ) / (√v + ε) - η λ θ
    otherwise:  θ ← θ - η m̂ - η λ θ
    ```

    with m, m̂ and v as in `Adam`. It acts as a warm-up of about 2 / (1 - β₂) updates. ε is added before the bias
    correction, as in torch; the paper has none. The paper's threshold is 4; its authors' code and torch have 5. ρₜ is
    computed without the cancellation that costs float32 all its digits.

    When to use it: as `Adam` where no schedule warms up.

    When not to use it: with a schedule that warms up anyway. The first five updates or so are plain momentum at the
    full rate, which may be too long where gradients are large.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in (0, 1), or a schedule.
        epsilon: ε >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.RAdam(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        **common: Any,
    ):
        super().__init__(learning_rate, RAdamRule(beta_1, beta_2, epsilon), **common)


@dataclass(frozen=True)
class AdaBeliefRule(Rule):
    """`θ ← θ - η m̂ / (√ŝ + ε)`, with s the running mean of `(g - m)²`."""

    elementwise = True
    reuses = frozenset({"s"})
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-16)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "s": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2, epsilon = h(self.beta_1), h(self.beta_2), h(self.epsilon)
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        s = beta_2 * slots["s"] + (1 - beta_2) * ops.square(u - m) + epsilon
        size = ops.sqrt(s / h.bias_correction(self.beta_2)) + epsilon
        return h.learning_rate * m / h.bias_correction(self.beta_1) / size, {"m": m, "s": s}


@register(
    "optimizer",
    paper="Zhuang, Tang, Ding, Tatikonda, Dvornek, Papademetris and Duncan, arXiv 2010.07468",
    parity="optax.adabelief",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-8}),
    space=SPACE,
)
class AdaBelief(Optimizer):
    """AdaBelief: steps are long where gradients are what the running mean has led to expect.

    ```text
    m ← β₁ m + (1 - β₁) g          s ← β₂ s + (1 - β₂) (g - m)² + ε
    θ ← θ - η m̂ / (√ŝ + ε) - η λ θ          m̂ = m / (1 - β₁ᵗ),  ŝ = s / (1 - β₂ᵗ)
    ```

    m and s have the shape of θ and start at 0. ε is added twice, as in the paper. Steps are independent of the
    gradient's scale only as long as ε is far below its square; the authors give 1e-16 to 1e-8, by task.

    When to use it: for recurrent networks and GANs, and other noisy gradients, as a variant of `Adam` with the same
    state.

    When not to use it: with gradients that hardly change from step to step (large batches), where s is close to ε and
    steps become very long.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.AdaBelief(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-16,
        **common: Any,
    ):
        super().__init__(learning_rate, AdaBeliefRule(beta_1, beta_2, epsilon), **common)


@dataclass(frozen=True)
class AdanRule(Rule):
    """`θ ← (θ - η (m̂ + β₂ v̂) / (√n̂ + ε)) / (1 + η λ)`, with v the running mean of differences of gradients."""

    elementwise = True
    reuses = frozenset({"gradient"})
    uses_first = True
    handles_decay = True
    beta_1: Value = number(0.98, 0, 1, closed="left")
    beta_2: Value = number(0.92, 0, 1, closed="left")
    beta_3: Value = number(0.99, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        # of the difference to a gradient in 8 bits little would be right
        return {"m": moment(), "v": moment(), "n": moment(signed=False), "gradient": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2, beta_3 = h(self.beta_1), h(self.beta_2), h(self.beta_3)
        change = ops.where(h.first, ops.zeros_like(u), u - slots["gradient"])
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = beta_2 * slots["v"] + (1 - beta_2) * change
        n = beta_3 * slots["n"] + (1 - beta_3) * ops.square(u + beta_2 * change)
        c_1, c_2, c_3 = (h.bias_correction(beta) for beta in (self.beta_1, self.beta_2, self.beta_3))
        direction = (m / c_1 + beta_2 * v / c_2) / (ops.sqrt(n / c_3) + h(self.epsilon))
        decay = h.learning_rate * h.weight_decay
        step = (h.learning_rate * direction + decay * p) / (1 + decay)
        return step, {"m": m, "v": v, "n": n, "gradient": u}


@register(
    "optimizer",
    paper="Xie, Zhou, Li, Lin and Yan, arXiv 2208.06677, algorithm 1, with bias corrections as in its code",
    parity="pytorch_optimizer.Adan",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.8, "beta_3": 0.95, "epsilon": 1e-3},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.95, 0.98]),
        "weight_decay": Float(1e-4, 1.0, log=True),
    },
)
class Adan(Optimizer):
    """Adan: Nesterov's momentum by differences of successive gradients, with a second moment of both.

    ```text
    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) (g - g')          n ← β₃ n + (1 - β₃) (g + β₂ (g - g'))²
    θ ← (θ - η (m̂ + β₂ v̂) / (√n̂ + ε)) / (1 + η λ)
    ```

    g' is the gradient before, in a parameter's first update g itself; hats are the corrections for the start at 0, as
    in the authors' code. m, v, n and g' have the shape of θ: twice Adam's state. The βs are decays, as in the code and
    everywhere here; the paper's are one minus these. The decay is proximal, inside the update, as in the paper.

    Its rate may be 5 to 10 times that of Adam.

    When to use it: where few updates at large rates are wanted, and four times the size of the weights fits into
    memory.

    When not to use it: where state has to be small; with gradients that are mostly noise, of which the difference has
    twice the variance.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        beta_3: β₃ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Adan(3e-3, weight_decay=0.02), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.98,
        beta_2: float | Schedule = 0.92,
        beta_3: float | Schedule = 0.99,
        epsilon: float = 1e-8,
        **common: Any,
    ):
        super().__init__(learning_rate, AdanRule(beta_1, beta_2, beta_3, epsilon), **common)

"""AdEMAMix and MARS: Adam with a momentum of another kind, of very old gradients or of corrected ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, count, is_dynamic, number
from keras_optkit.optimizers.rules.adam_family import moments
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class AdEMAMixRule(Rule):
    """`θ ← θ - η (m̂₁ + α m₂) / (√v̂ + ε)`, with m₂ a mean of the gradient that is slower than m₁."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    beta_3: Value = number(0.9999, 0, 1, closed="neither")
    alpha: Value = number(5.0)
    epsilon: Value = number(1e-8)
    alpha_warmup_steps: int = count(0, low=0)
    beta_3_warmup_steps: int = count(0, low=0)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        # m_2 changes by a ten thousandth at a time
        return {"m": moment(), "m_2": 0.0, "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        m, v = moments(u, slots, h(self.beta_1), h(self.beta_2))
        slow = slots["m_2"] + ops.cast(self._share(h), u.dtype) * (u - slots["m_2"])
        warm = ops.minimum(h.step / max(self.alpha_warmup_steps, 1), 1)
        mean = m / h.bias_correction(self.beta_1) + h(self.alpha) * ops.cast(warm, u.dtype) * slow
        size = ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)
        return h.learning_rate * mean / size, {"m": m, "m_2": slow, "v": v}

    def _share(self, h: Hyper) -> Tensor:
        """`1 - β₃` of this update: `-1 / log β₃`, the memory of m₂ in updates, rises linearly from that of β₁."""
        final = _memory(h.exact(self.beta_3), self.beta_3) * ops.ones_like(h.step)
        warm = ops.minimum(h.step / max(self.beta_3_warmup_steps, 1), 1)
        start = _memory(h.exact(self.beta_1), self.beta_1)
        return -ops.expm1(-1 / ops.minimum(start + warm * (final - start), final))


def _memory(beta: Any, declared: Value) -> Any:
    """`-1 / log β`, with all digits where β is a number."""
    if is_dynamic(declared):
        return -1 / ops.log(beta)
    return -1 / math.log(beta) if beta else 0.0


@register(
    "optimizer",
    paper="Pagliardini, Ablin and Grangier, arXiv 2409.03137, algorithm 1 with its schedulers of alpha and beta_3",
    parity="pytorch_optimizer.AdEMAMix; optax.contrib.ademamix (without warm-up)",
    cases=(
        {"learning_rate": 0.01},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.9,
            "beta_3": 0.99,
            "alpha": 8.0,
            "epsilon": 1e-4,
            "alpha_warmup_steps": 10,
            "beta_3_warmup_steps": 10,
        },
    ),
    space={
        "learning_rate": Float(1e-5, 1e-1, log=True),
        "beta_3": Choice([0.99, 0.999, 0.9999]),
        "alpha": Float(2.0, 10.0),
    },
)
class AdEMAMix(Optimizer):
    """AdEMAMix: Adam with a second, much slower momentum, which keeps what gradients of long ago have said.

    ```text
    m₁ ← β₁ m₁ + (1 - β₁) g          m₂ ← β₃ m₂ + (1 - β₃) g          v ← β₂ v + (1 - β₂) g²
    θ ← θ - η (m̂₁ + α m₂) / (√v̂ + ε) - η λ θ          m̂₁ = m₁ / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    warm-up:  α at update t is α min(t / T, 1);  -1 / log β₃ rises linearly from that of β₁ in T updates
    ```

    m₁, m₂ and v have the shape of θ and start at 0: one and a half times Adam's state. m₂ has no bias correction and so
    fills up slowly. The paper warms both α and β₃ up, for T = all updates of the run, against instability early on;
    `alpha_warmup_steps=T, beta_3_warmup_steps=T` gives that. α and β₃ may instead be schedules of your own. The default
    is no warm-up, as in the references. The paper's curve for β₃ is the linear rise of `-1 / log β₃` written out.

    When to use it: in long runs, of some ten thousand updates or more, where old gradients still help.

    When not to use it: in short runs, as m₂ remembers about 1 / (1 - β₃) updates: take β₃ = 0.999 below some ten
    thousand. Where the data change their distribution, old gradients mislead.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        beta_3: β₃ in (0, 1), or a schedule; should be above β₁.
        alpha: α >= 0, or a schedule: the weight of the slow momentum. The paper's are 4 to 10.
        epsilon: ε >= 0, or a schedule.
        alpha_warmup_steps: Updates in which α rises linearly from 0; 0 for none.
        beta_3_warmup_steps: Updates in which β₃ rises from β₁; 0 for none.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = ok.optimizers.AdEMAMix(1e-3, alpha_warmup_steps=10_000, beta_3_warmup_steps=10_000, weight_decay=0.1)
    model.compile(optimizer=optimizer, loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        beta_3: float | Schedule = 0.9999,
        alpha: float | Schedule = 5.0,
        epsilon: float | Schedule = 1e-8,
        alpha_warmup_steps: int = 0,
        beta_3_warmup_steps: int = 0,
        **common: Any,
    ):
        rule = AdEMAMixRule(beta_1, beta_2, beta_3, alpha, epsilon, alpha_warmup_steps, beta_3_warmup_steps)
        super().__init__(learning_rate, rule, **common)


@dataclass(frozen=True)
class MARSRule(Rule):
    """`c = g + γ β₁ / (1 - β₁) (g - g')`, shortened to a norm of 1; then Adam with c for the gradient."""

    layout = "per_parameter"
    reuses = frozenset({"gradient"})
    uses_first = True
    beta_1: Value = number(0.95, 0, 1, closed="left")
    beta_2: Value = number(0.99, 0, 1, closed="left")
    gamma: Value = number(0.025)
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False), "gradient": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        change = ops.where(h.first, ops.zeros_like(u), u - slots["gradient"])
        c = u + h(self.gamma) * beta_1 / (1 - beta_1) * change
        c = c / ops.maximum(ops.sqrt(h.sum(c * c)), 1)
        m, v = moments(c, slots, beta_1, beta_2)
        size = ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)
        return h.learning_rate * m / h.bias_correction(self.beta_1) / size, {"m": m, "v": v, "gradient": u}


@register(
    "optimizer",
    paper="Yuan, Liu, Wu, Zhou and Gu, arXiv 2411.10438, algorithm 2 (MARS-AdamW), approximate: with the gradient of "
    "the previous batch at the previous weights",
    parity="pytorch_optimizer.MARS (optimize_1d=True), with a first correction of 0 and ε behind the bias correction",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "gamma": 0.2, "epsilon": 1e-4},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "gamma": Choice([0.01, 0.025, 0.05]),
        "weight_decay": Float(1e-3, 1.0, log=True),
    },
)
class MARS(Optimizer):
    """MARS: AdamW of gradients that are corrected by their change since the last update, to reduce their variance.

    ```text
    c = g + γ β₁ / (1 - β₁) (g - g')          c ← c / max(‖c‖, 1)
    m ← β₁ m + (1 - β₁) c                     v ← β₂ v + (1 - β₂) c²
    θ ← θ - η m̂ / (√v̂ + ε) - η λ θ            m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    ```

    g' is the previous gradient, in a parameter's first update g itself; the norm is over the whole parameter. m, v and
    g' have the shape of θ and start at 0: one and a half times Adam's state. This is the approximate variant, at the
    cost of one gradient; the exact one computes g' for the current batch, a second gradient. The authors' code and
    pytorch_optimizer set the first g' to 0, so that the first c is longer; here it is the paper's, whose first
    correction is 0. The authors train vectors by AdamW with settings of their own; here all parameters are treated
    alike, and `groups=[ok.Group("(bias|gamma|beta)$", rule="AdamW")]` trains these by AdamW.

    When to use it: where gradients are noisy from step to step and batches are small.

    When not to use it: where state has to be small; with large batches, whose gradients have little variance to reduce.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        gamma: γ >= 0, or a schedule: the strength of the correction. 0 gives AdamW with each gradient clipped to 1.
        epsilon: ε >= 0, or a schedule.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.MARS(3e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.003,
        beta_1: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.99,
        gamma: float | Schedule = 0.025,
        epsilon: float | Schedule = 1e-8,
        **common: Any,
    ):
        super().__init__(learning_rate, MARSRule(beta_1, beta_2, gamma, epsilon), **common)

"""Schedule-Free RAdam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, flag, number
from keras_optkit.optimizers.rules.adam_family import RAdamRule
from keras_optkit.optimizers.rules.schedule_free import ScheduleFreeBaseRule, SecondMomentRule
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


class _Rectification(RAdamRule):
    """r, and whether ρₜ > 4."""

    threshold = 4.0


@dataclass(frozen=True)
class RectifiedRule(SecondMomentRule):
    """`θ ← θ - η g / (√v̂ + ε)`, and `θ ← θ - η g` while the variance of v is not known."""

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        step, new = super().update(u, slots, p, h)
        known = _Rectification(beta_2=self.beta_2).rectification(h)[1]
        return ops.where(known, step, h.learning_rate * u), new


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeRAdamRule(ScheduleFreeBaseRule):
    """Schedule-Free with `s = η r g / (√v̂ + ε)`, with RAdam's r as a warm-up."""

    beta_1: float = number(0.9, 0, 1, closed="neither", fixed=True)
    beta_2: Value = number(0.999, 0, 1, closed="neither")
    epsilon: Value = number(1e-8)
    silent_sgd_phase: bool = flag(True)

    def inner(self) -> Rule:
        return RectifiedRule(self.beta_2, self.epsilon)

    def beta(self) -> float:
        return self.beta_1

    def warmed_up(self, h: Hyper) -> Hyper:
        factor, known = _Rectification(beta_2=self.beta_2).rectification(h)
        factor = ops.where(known, factor, ops.zeros_like(factor) if self.silent_sgd_phase else ops.ones_like(factor))
        return h.at_rate(h.learning_rate * ops.cast(factor, h.learning_rate.dtype))


@register(
    "optimizer",
    paper="Defazio et al., arXiv 2405.15682, algorithm 1, with the r of Liu et al., arXiv 1908.03265, as a warm-up",
    parity="schedulefree.RAdamScheduleFree (decay_mask='all')",
    tags=("recovers",),
    cases=(
        {"learning_rate": 0.01, "silent_sgd_phase": False},  # whose first update is as long as the rate
        {"learning_rate": 0.01, "beta_1": 0.95, "beta_2": 0.9, "epsilon": 1e-4},
        {"learning_rate": 0.01, "weight_decay": 0.1, "decay_mask": "all", "r": 1.0, "weight_lr_power": 1.0},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.9, 0.95, 0.98]),
        "weight_decay": Float(1e-4, 1.0, log=True),
    },
)
class ScheduleFreeRAdam(Optimizer):
    """Schedule-Free RAdam: neither a decaying learning rate nor a warm-up has to be chosen.

    ```text
    η_t = η r                              r and ρₜ as in `RAdam`; c as in `ScheduleFreeAdamW`
    v ← β₂ v + (1 - β₂) g(y)²              v̂ = v / (1 - β₂ᵗ)
    ρₜ > 4:     z ← z - η_t (g(y) / (√v̂ + ε) + λ y)
    otherwise:  z does not move, or z ← z - η (g(y) + λ y) without silent_sgd_phase
    x ← (1 - c) x + c z                    y ← (1 - β₁) z + β₁ x
    trained at y, evaluated at x
    ```

    As `ScheduleFreeAdamW` with the rectification of RAdam instead of `warmup_steps`; see `ScheduleFree` for how x is
    computed. State: z and v, as much as Adam's. The threshold is 4, as in the paper of RAdam and in the authors' code;
    that of `RAdam` is 5, as in torch.

    When to use it: as `ScheduleFreeAdamW`, if a warm-up is not to be chosen either.

    When not to use it: as `ScheduleFree`; where 2 / (1 - β₂) updates are a large part of the run, since the warm-up
    takes about as many: give a smaller β₂.

    Args:
        learning_rate: η >= 0. Constant, as a rule; a schedule is accepted.
        beta_1: β₁ in (0, 1), a number.
        beta_2: β₂ in (0, 1), or a schedule.
        epsilon: ε >= 0.
        weight_decay: λ >= 0, a schedule, or None.
        r: Power of t in the weights of the average, >= 0.
        weight_lr_power: p, power of the largest rate so far in them, >= 0.
        silent_sgd_phase: Whether the first updates, in which ρₜ <= 4, only collect v; otherwise they are steps of SGD.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.ScheduleFreeRAdam(2.5e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.0025,
        beta_1: float = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | Schedule | None = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        **common: Any,
    ):
        rule = ScheduleFreeRAdamRule(
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            r=r,
            weight_lr_power=weight_lr_power,
            silent_sgd_phase=silent_sgd_phase,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

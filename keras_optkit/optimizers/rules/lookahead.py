"""Lookahead: slow weights that follow the fast ones of another optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.around import Around, Keeping, inner_rule, inner_step, with_own, without
from keras_optkit.optimizers.inner import Inner
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, count, number
from keras_optkit.optimizers.slots import Initial, weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class LookaheadRule(Keeping):
    """`φ ← φ + α (θ - φ); θ ← φ` after every k steps of the inner rule on θ."""

    kept = "slow"
    inner_rule: Rule = inner_rule()
    sync_period: int = count(5, 1)
    slow_step_size: Value = number(0.5, 0, 1, closed="right")

    def slots(self, w: Weight | None = None) -> dict[str, Initial]:
        return with_own(super().slots(w), "slow", weights_copy())

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        slow, held = slots["slow"], without(slots, "slow")
        step, new = inner_step(self.inner_rule, u, held, p, p, h)
        due = ops.equal(ops.mod(h.step, self.sync_period), 0)
        step = ops.where(due, step - (1 - h(self.slow_step_size)) * (slow - (p - step)), step)
        return step, {**new, "slow": ops.where(due, p - step, slow)}


@register(
    "optimizer",
    paper="Zhang, Lucas, Hinton and Ba, arXiv 1907.08610, algorithm 1",
    parity="pytorch_optimizer.Lookahead (pullback_momentum='none')",
    cases=(
        {"inner": {"class_name": "SGD", "config": {"momentum": 0.9}}, "learning_rate": 0.01},
        {"inner": {"class_name": "Adam", "config": {}}, "learning_rate": 0.01, "sync_period": 3, "slow_step_size": 0.8},
        {"inner": {"class_name": "SGD", "config": {}}, "learning_rate": 0.01, "sync_period": 2, "slow_step_size": 0.3},
    ),
    space={
        "learning_rate": Float(1e-4, 1.0, log=True),
        "sync_period": Choice([5, 10, 20]),
        "slow_step_size": Choice([0.2, 0.5, 0.8]),
    },
)
class Lookahead(Around):
    """Lookahead: fast weights take k steps, and slow weights then follow part of the way.

    ```text
    each update:    θ ← θ - (step of the inner optimizer at θ, decay included)
    every k-th:     φ ← φ + α (θ - φ)          θ ← φ
    evaluated at φ
    ```

    φ has the shape of θ and starts at θ; k counts updates. A synchronisation does not change the slots of the inner
    optimizer, such as its momentum. α = 1 is the inner optimizer, exactly. A parameter without a gradient in the update
    in which the others are synchronised waits for the next time. Constraints of variables act on θ only.

    The weights to evaluate at are φ; φ and θ are swapped when `fit` ends, by `swap_weights`, or for the time of an
    evaluation with the callback `AveragedWeights`, and back bitwise (with weights in half precision, φ is rounded to it
    when they do).

    **Settings of the inner optimizer.** Its rule is used, and everything else is used as if it had been given to
    `Lookahead`: learning rate or schedule, `weight_decay`, clipping, `groups` and all the other common keywords but its
    name. A common keyword that is given here counts where the inner optimizer has its default; given differently to
    both, it raises. `optimizer.learning_rate` and the others are those of the result, and `optimizer.inner_rule` shows
    the hyperparameters of the inner rule; the object that was passed is not used again.

    When to use it: around a noisy inner optimizer with a rate that does not fall to 0, such as SGD with momentum.

    When not to use it: on top of another average (`use_ema`, Schedule-Free), which it refuses; or with a learning rate
    that is decayed to 0 anyway, where fast and slow weights meet.

    Args:
        inner: An optimizer of this package that has not been used yet, its name (`"AdamW"`,
            `"package>Name"`), or its config, `{"class_name": ..., "config": {...}}`.
        sync_period: k >= 1, updates between two synchronisations. 5 as in most of the paper's experiments.
        slow_step_size: α in (0, 1], or a schedule.
        learning_rate: That of the inner optimizer if None; otherwise as in every optimizer.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range, an `inner` that is unknown, used already or averages by itself, or a
            keyword that is given twice with different values.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Lookahead(ok.optimizers.AdamW(3e-4), sync_period=5), loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "AdamW",
        sync_period: int = 5,
        slow_step_size: float | Schedule = 0.5,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(inner, learning_rate, lambda rule: LookaheadRule(rule, sync_period, slow_step_size), **common)

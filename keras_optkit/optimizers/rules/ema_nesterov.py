"""EMA-Nesterov: another optimizer's steps from points ahead, in the direction that the weights have taken lately."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.around import Around, Keeping, inner_rule, inner_step, with_own, without
from keras_optkit.optimizers.inner import Inner
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, number
from keras_optkit.optimizers.slots import Initial, weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class EMANesterovRule(Keeping):
    """`x' = (inner step at y); m ← γ m + (1 - γ) (x' - x); y ← x' + β m`."""

    kept = "base"
    inner_rule: Rule = inner_rule()
    lookahead_step_size: Value = number(0.5)
    lookahead_momentum: Value = number(0.99, 0, 1, closed="left")

    @property
    def reuses(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner_rule.reuses | {"base"}

    def slots(self, w: Weight | None = None) -> dict[str, Initial]:
        return with_own(with_own(super().slots(w), "base", weights_copy()), "trend", 0.0)

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        held, gamma = without(without(slots, "base"), "trend"), h(self.lookahead_momentum)
        step, new = inner_step(self.inner_rule, u, held, p, p, h)
        base = p - step
        trend = gamma * slots["trend"] + (1 - gamma) * (base - slots["base"])
        return step - h(self.lookahead_step_size) * trend, {**new, "base": base, "trend": trend}


@register(
    "optimizer",
    paper="Yau, Li, Glentis, Boreiko, Wai and Hong, arXiv 2605.25395",
    parity="none: the authors' EMA_Nesterov is in no package index; its twin follows their code",
    cases=(
        {"inner": {"class_name": "SGD", "config": {"momentum": 0.9}}, "learning_rate": 0.01},
        {
            "inner": {"class_name": "Adam", "config": {}},
            "learning_rate": 0.01,
            "lookahead_step_size": 2.0,
            "lookahead_momentum": 0.8,
        },
    ),
    known_failures={"decay_mask": "m has the decay in it, so that y moves further by it; the check twin has it"},
    space={
        "learning_rate": Float(1e-4, 1.0, log=True),
        "lookahead_step_size": Choice([0.3, 0.5, 1.0]),
        "lookahead_momentum": Choice([0.9, 0.99]),
    },
)
class EMANesterov(Around):
    """EMA-Nesterov: Nesterov's look ahead, along a running mean of all changes of the weights instead of the last one.

    ```text
    x' = y - (step of the inner optimizer at y, decay included)
    m ← γ m + (1 - γ) (x' - x)          x ← x'
    y ← x + β m                         gradients are computed at y, evaluation is at x
    ```

    y are the training weights and x those to evaluate at; both have the shape of θ and start at the weights. m starts
    at 0: x and m are state besides that of the inner optimizer. y and x are swapped as with `Lookahead`. β = 0 is the
    inner optimizer, exactly. Constraints of variables act on y only.

    The authors let β be proportional to the learning rate, and 0 in the first and last steps of a run. Here β is a
    number or a schedule, read in the update that leads to y. Give one that ends at 0: with a rate of 0 and a β above
    it, the weights would still move along m. Settings of the inner optimizer are taken over as in `Lookahead`.

    When to use it: to get further in a fixed number of updates in pre-training, with a tuned inner optimizer.

    When not to use it: on top of another average (`use_ema`, Schedule-Free), which it refuses; in short runs, since m
    remembers about 1 / (1 - γ) updates; with a γ of 0 and noisy gradients, where it is Nesterov's own look ahead.

    Args:
        inner: An optimizer of this package that has not been used yet, its name (`"AdamW"`,
            `"package>Name"`), or its config, `{"class_name": ..., "config": {...}}`.
        lookahead_step_size: β >= 0, or a schedule.
        lookahead_momentum: γ in [0, 1), or a schedule.
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

    rate, ahead = ok.schedules.Cosine(3e-4, 1000), ok.schedules.Cosine(0.5, 1000)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.EMANesterov(ok.optimizers.AdamW(rate), ahead), loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "AdamW",
        lookahead_step_size: float | Schedule = 0.5,
        lookahead_momentum: float | Schedule = 0.99,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(
            inner,
            learning_rate,
            lambda rule: EMANesterovRule(rule, lookahead_step_size, lookahead_momentum),
            **common,
        )

"""Schedule-Free: averages of the iterates instead of a decaying learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.around import Around, inner_rule, inner_step, with_own, without
from keras_optkit.optimizers.inner import Inner
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, Wrapper, count, number
from keras_optkit.optimizers.rules.sgd import SGDRule
from keras_optkit.optimizers.slots import Initial, moment, weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeBaseRule(Wrapper):
    """What all Schedule-Free rules share. The model trains at y; z is kept; x, to evaluate at, follows from the two.

    With s the step of the inner rule, `z ← z - s`, `x ← (1 - c) x + c z`, `y ← β x + (1 - β) z`. Without x, that is
    `y ← y - c (y - z) - (1 - β (1 - c)) s`, with y and z before the step.
    """

    averages = True
    handles_decay = True
    r: float = number(0.0, 0, fixed=True)
    weight_lr_power: float = number(2.0, 0, fixed=True)

    @property
    def reuses(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner().reuses | {"anchor", "weights"}

    def beta(self) -> float:
        """The share of x in y."""
        raise NotImplementedError

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return with_own(super().slots(w), "anchor", weights_copy())  # z, which other rules have, too

    def scalars(self) -> dict[str, float]:
        return {**self.inner().scalars(), "largest_rate": 0.0, "total_weight": 0.0, "share": 0.0}

    def warmed_up(self, h: Hyper) -> Hyper:
        """`h` with the rate of this update."""
        return h

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return super().contribute(u, without(slots, "anchor"), slots["anchor"], self.warmed_up(h))

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        h = self.warmed_up(h)
        largest = ops.maximum(h.scalars["largest_rate"], h.learning_rate)
        weight = h.step**self.r * largest**self.weight_lr_power
        total = h.scalars["total_weight"] + weight
        share = ops.divide_no_nan(weight, total)
        return {**super().measure(h, sums), "largest_rate": largest, "total_weight": total, "share": share}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        h, c = self.warmed_up(h), h.scalar("share")
        z = slots["anchor"]
        step, new = inner_step(self.inner(), u, without(slots, "anchor"), z, p, h)
        return c * (p - z) + (1 - self.beta() * (1 - c)) * step, {**new, "anchor": z - step}

    def eval_value(self, p: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        return p + (1 - 1 / self.beta()) * (slots["anchor"] - p), slots

    def train_value(self, x: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        return x + (1 - self.beta()) * (slots["anchor"] - x), slots


@dataclass(frozen=True, kw_only=True)
class _LinearWarmup(ScheduleFreeBaseRule):
    """With a rate that rises linearly at first."""

    warmup_steps: int = count(0, 0)

    def warmed_up(self, h: Hyper) -> Hyper:
        if not self.warmup_steps:
            return h
        factor = ops.minimum(h.step / self.warmup_steps, 1.0)
        return h.at_rate(h.learning_rate * ops.cast(factor, h.learning_rate.dtype))


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeRule(_LinearWarmup):
    """Schedule-Free around any rule."""

    inner_rule: Rule = inner_rule()
    momentum: float = number(0.9, 0, 1, closed="neither", fixed=True)

    def inner(self) -> Rule:
        return self.inner_rule

    def beta(self) -> float:
        return self.momentum


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeSGDRule(_LinearWarmup):
    """Schedule-Free with `s = η g`."""

    momentum: float = number(0.9, 0, 1, closed="neither", fixed=True)

    def inner(self) -> Rule:
        return SGDRule()

    def beta(self) -> float:
        return self.momentum


@dataclass(frozen=True)
class SecondMomentRule(Rule):
    """`θ ← θ - η g / (√v̂ + ε)`: Adam without its first moment."""

    elementwise = True
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_2 = h(self.beta_2)
        v = beta_2 * slots["v"] + (1 - beta_2) * u * u
        return h.learning_rate * u / (ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)), {"v": v}


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeAdamWRule(_LinearWarmup):
    """Schedule-Free with `s = η g / (√v̂ + ε)`."""

    beta_1: float = number(0.9, 0, 1, closed="neither", fixed=True)
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def inner(self) -> Rule:
        return SecondMomentRule(self.beta_2, self.epsilon)

    def beta(self) -> float:
        return self.beta_1


_SPACE = {"warmup_steps": Choice([0, 100, 1000]), "momentum": Choice([0.9, 0.95, 0.98])}


@register(
    "optimizer",
    paper="Defazio et al., arXiv 2405.15682, the updates of y, z and x that define Schedule-Free SGD",
    parity="schedulefree.ScheduleFreeWrapperReference",
    tags=("recovers",),
    cases=(
        {"inner": {"class_name": "RMSprop", "config": {"rho": 0.99}}, "learning_rate": 0.01},
        {
            "inner": {"class_name": "Adam", "config": {"beta_1": 0.5}},
            "learning_rate": 0.01,
            "momentum": 0.8,
            "warmup_steps": 7,
            "r": 1.0,
            "weight_lr_power": 1.0,
        },
    ),
    space={"learning_rate": Float(1e-4, 1e-1, log=True)} | _SPACE,
)
class ScheduleFree(Around):
    """Schedule-Free around any optimizer: an average of the iterates replaces a decaying learning rate.

    ```text
    η_t = η min(1, t / warmup_steps)       c = w_t / (w_1 + ... + w_t)       w_t = tʳ (max of η_1 ... η_t)ᵖ
    z ← z - (step of the inner optimizer for the gradient at y, with rate η_t) - η_t λ y
    x ← (1 - c) x + c z                    y ← (1 - β) z + β x
    trained at y, evaluated at x
    ```

    x, y and z start at the weights and have their shape. The model holds y, z is the one additional slot, and x is
    recovered from the two when it is needed: when `fit` ends, by `swap_weights`, or for the time of an evaluation with
    the callback `AveragedWeights`. Going to x and back is exact up to rounding.

    The decay λ is taken at y, which the authors recommend; an inner rule that looks at the weights sees z. The inner
    optimizer needs no momentum of its own: β replaces it. Its settings are used as by `Lookahead`. The weights w have
    one sequence of maxima for the whole model; factors on the rate of groups cancel in c. Constraints of variables act
    on y only. With weights in half precision, x suffers from the rounding of y.

    When to use it: if the length of the run is open, so that no schedule can be chosen, around any inner optimizer.

    When not to use it: with a schedule that decays (it is to be replaced), with another average (refused), where
    batches are few and a tuned schedule exists; or, without recalibration (`ok.recalibrate_batch_norm`), in models with
    batch normalisation, whose moving statistics are those at y.

    Args:
        inner: An optimizer of this package that has not been used yet, its name, or its config; see `Lookahead`.
        momentum: β in (0, 1), a number.
        warmup_steps: Updates in which the rate rises linearly to η; 0 for none.
        r: Power of t in the weights of the average, >= 0.
        weight_lr_power: p, power of the largest rate so far in them, >= 0.
        learning_rate: That of the inner optimizer if None; otherwise as in every optimizer. Constant, as a rule.
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
    inner = ok.optimizers.RMSprop(1e-3, rho=0.99)
    model.compile(optimizer=ok.optimizers.ScheduleFree(inner, warmup_steps=100), loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "RMSprop",
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        def rule(inner_rule: Rule) -> Rule:
            return ScheduleFreeRule(
                inner_rule=inner_rule,
                momentum=momentum,
                warmup_steps=warmup_steps,
                r=r,
                weight_lr_power=weight_lr_power,
            )

        super().__init__(inner, learning_rate, rule, **common)


@register(
    "optimizer",
    paper="Defazio et al., arXiv 2405.15682, the updates of y, z and x that define Schedule-Free SGD",
    parity="schedulefree.SGDScheduleFreeReference (decay_mask='all')",
    tags=("recovers",),
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.05, "momentum": 0.8, "warmup_steps": 7},
        {"learning_rate": 0.05, "warmup_steps": 3, "r": 2.0, "weight_lr_power": 0.0},
    ),
    space={"learning_rate": Float(1e-2, 10.0, log=True)} | _SPACE,
)
class ScheduleFreeSGD(Optimizer):
    """Schedule-Free SGD: an average of the iterates replaces a decaying learning rate.

    ```text
    η_t = η min(1, t / warmup_steps)       c = w_t / (w_1 + ... + w_t)       w_t = tʳ (max of η_1 ... η_t)ᵖ
    z ← z - η_t (g(y) + λ y)               x ← (1 - c) x + c z               y ← (1 - β) z + β x
    trained at y, evaluated at x
    ```

    As `ScheduleFree` around `SGD`; see there how x is computed, and when not to use it. State: z.

    The authors advise rates 10 to 50 times those of SGD with momentum, and β up to 0.98 for long training.
    `decay_mask="all"` decays vectors too, as the reference does.

    When to use it: as `SGD` if the length of the run is open, so that no schedule can be chosen.

    When not to use it: as `ScheduleFree`: with a schedule that decays, with another average, or with batch
    normalisation without recalibration.

    Args:
        learning_rate: η >= 0. Constant, as a rule; a schedule is accepted.
        momentum: β in (0, 1), a number.
        warmup_steps: Updates in which the rate rises linearly to η; 0 for none.
        r: Power of t in the weights of the average, >= 0.
        weight_lr_power: p, power of the largest rate so far in them, >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.ScheduleFreeSGD(1.0, warmup_steps=100), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        momentum: float = 0.9,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Any,
    ):
        rule = ScheduleFreeSGDRule(momentum=momentum, warmup_steps=warmup_steps, r=r, weight_lr_power=weight_lr_power)
        super().__init__(learning_rate, rule, **common)


@register(
    "optimizer",
    paper="Defazio et al., arXiv 2405.15682, algorithm 1",
    parity="schedulefree.AdamWScheduleFreeReference (decay_mask='all')",
    tags=("recovers",),
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.95, "beta_2": 0.9, "warmup_steps": 7, "epsilon": 1e-4},
        {"learning_rate": 0.01, "weight_decay": 0.1, "decay_mask": "all", "r": 1.0, "weight_lr_power": 1.0},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.9, 0.95, 0.98]),
        "warmup_steps": _SPACE["warmup_steps"],
        "weight_decay": Float(1e-4, 1.0, log=True),
    },
)
class ScheduleFreeAdamW(Optimizer):
    """Schedule-Free AdamW: an average of the iterates replaces momentum and a decaying learning rate.

    ```text
    η_t = η min(1, t / warmup_steps)       c = w_t / (w_1 + ... + w_t)       w_t = tʳ (max of η_1 ... η_t)ᵖ
    v ← β₂ v + (1 - β₂) g(y)²              v̂ = v / (1 - β₂ᵗ)
    z ← z - η_t (g(y) / (√v̂ + ε) + λ y)    x ← (1 - c) x + c z               y ← (1 - β₁) z + β₁ x
    trained at y, evaluated at x
    ```

    As `ScheduleFree` around Adam without its first moment; see there how x is computed, and when not to use it. State:
    z and v, as much as Adam's. The paper's algorithm 1 puts √(1 - β₂ᵗ) into the rate, and thereby into the weights of
    the average; here v is corrected, as in the authors' own implementation since.

    The authors advise rates 1 to 10 times those of AdamW. `decay_mask="all"` decays vectors too, as the reference does.

    When to use it: as `AdamW` if the length of the run is open, so that no schedule can be chosen.

    When not to use it: as `ScheduleFree`: with a schedule that decays, with another average, or with batch
    normalisation without recalibration.

    Args:
        learning_rate: η >= 0. Constant, as a rule; a schedule is accepted.
        beta_1: β₁ in (0, 1), a number.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        weight_decay: λ >= 0, a schedule, or None.
        warmup_steps: Updates in which the rate rises linearly to η; 0 for none.
        r: Power of t in the weights of the average, >= 0.
        weight_lr_power: p, power of the largest rate so far in them, >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.ScheduleFreeAdamW(2.5e-3, warmup_steps=100), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.0025,
        beta_1: float = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | Schedule | None = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **common: Any,
    ):
        rule = ScheduleFreeAdamWRule(
            beta_1=beta_1,
            beta_2=beta_2,
            epsilon=epsilon,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

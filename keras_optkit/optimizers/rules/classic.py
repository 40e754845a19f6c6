"""Older methods that Keras and torch have: Adadelta, Adamax, FTRL and Rprop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, is_dynamic, number
from keras_optkit.optimizers.rules.roots import power
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class AdadeltaRule(Rule):
    """`d = g √(D + ε) / √(E + ε); θ ← θ - η d`, with E and D the running means of g² and d²."""

    elementwise = True
    rho: Value = number(0.95, 0, 1, closed="left")
    epsilon: Value = number(1e-6, closed="neither")

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"E": moment(signed=False), "D": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        rho, epsilon = h(self.rho), h(self.epsilon)
        E = rho * slots["E"] + (1 - rho) * u * u
        d = u * ops.sqrt(slots["D"] + epsilon) / ops.sqrt(E + epsilon)
        return h.learning_rate * d, {"E": E, "D": rho * slots["D"] + (1 - rho) * d * d}


@register(
    "optimizer",
    paper="Zeiler, arXiv 1212.5701, algorithm 1",
    parity="torch.optim.Adadelta; pytorch_optimizer.AdaDelta for the decoupled decay",
    cases=({"learning_rate": 1.0, "epsilon": 1e-2}, {"learning_rate": 0.5, "rho": 0.9, "epsilon": 1e-4}),
    space={
        "learning_rate": Float(1e-2, 10.0, log=True),
        "rho": Choice([0.9, 0.95, 0.99]),
        "epsilon": Float(1e-8, 1e-4, log=True),
    },
)
class Adadelta(Optimizer):
    """Adadelta: the gradient divided by its size and multiplied by the size of the last steps.

    ```text
    E ← ρ E + (1 - ρ) g²          d = g √(D + ε) / √(E + ε)          D ← ρ D + (1 - ρ) d²
    θ ← θ - η d - η λ θ
    ```

    E and D have the shape of θ and start at 0, so the first steps are about √ε, and grow from there: ε decides how fast
    training begins. η is 1 in the paper, and here as in torch; Keras's default, 0.001, makes its `Adadelta` a thousand
    times slower. ρ is the paper's and Keras's 0.95; torch has 0.9.

    When to use it: to repeat old recipes that name it.

    When not to use it: where a tuned `Adam` or `SGD` is possible. It was made to need no learning rate; `Prodigy` is a
    later answer.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        rho: ρ in [0, 1), or a schedule.
        epsilon: ε > 0, or a schedule.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Adadelta(), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        rho: float | Schedule = 0.95,
        epsilon: float | Schedule = 1e-6,
        **common: Any,
    ):
        super().__init__(learning_rate, AdadeltaRule(rho, epsilon), **common)


@dataclass(frozen=True)
class AdamaxRule(Rule):
    """`v ← max(β₂ v, |g| + ε); θ ← θ - η m̂ / v`."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1 = h(self.beta_1)
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = ops.maximum(h(self.beta_2) * slots["v"], ops.abs(u) + h(self.epsilon))
        return h.learning_rate / h.bias_correction(self.beta_1) * ops.divide_no_nan(m, v), {"m": m, "v": v}


@register(
    "optimizer",
    paper="Kingma and Ba, arXiv 1412.6980, algorithm 2",
    parity="torch.optim.Adamax; pytorch_optimizer.AdaMax for the decoupled decay",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3}),
    space={
        "learning_rate": Float(1e-5, 1e-1, log=True),
        "beta_1": Choice([0.85, 0.9, 0.95]),
        "beta_2": Choice([0.95, 0.99, 0.999]),
    },
)
class Adamax(Optimizer):
    """Adamax: Adam with the largest recent gradient instead of the root of a mean square.

    ```text
    m ← β₁ m + (1 - β₁) g          v ← max(β₂ v, |g| + ε)
    θ ← θ - η m̂ / v - η λ θ        m̂ = m / (1 - β₁ᵗ)
    ```

    m and v have the shape of θ and start at 0. v needs no bias correction. The paper has no ε; torch adds it to |g|,
    and so does this one; Keras adds it to v, which makes no difference as long as gradients are larger.

    When to use it: to repeat old recipes that name it.

    When not to use it: where single gradients are outliers: one of them shortens the steps of the next 1 / (1 - β₂)
    updates.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. 0.002 as in the paper and torch; Keras has 0.001.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
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
    model.compile(optimizer=ok.optimizers.Adamax(2e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.002,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-8,
        **common: Any,
    ):
        super().__init__(learning_rate, AdamaxRule(beta_1, beta_2, epsilon), **common)


@dataclass(frozen=True)
class FtrlRule(Rule):
    """`z ← z + g - (n'ᵖ - nᵖ) / η θ; θ ← (clip(z, ±λ₁) - z) / ((n'ᵖ + β) / η + 2 λ₂)`, with n' = n + g²."""

    elementwise = True
    reuses = frozenset({"n", "weights", "z"})
    handles_decay = True
    learning_rate_power: Value = number(-0.5, float("-inf"), 0)
    initial_accumulator_value: float = number(0.0, fixed=True)
    l1_regularization_strength: Value = number(0.0)
    l2_regularization_strength: Value = number(0.0)
    l2_shrinkage_regularization_strength: Value = number(0.0)
    beta: Value = number(0.0)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"n": self.initial_accumulator_value, "z": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        moves = h.learning_rate > 0
        rate = ops.where(moves, h.learning_rate, ops.ones_like(h.learning_rate))
        l_1, exponent = h(self.l1_regularization_strength), -h(self.learning_rate_power)
        decayed = (1 - rate * h.weight_decay) * p
        n = slots["n"] + u * u
        root, before = power(n, exponent), power(slots["n"], exponent)
        shrunk = u + 2 * h(self.l2_shrinkage_regularization_strength) * decayed
        z = slots["z"] + shrunk - (root - before) / rate * decayed
        size = (root + h(self.beta)) / rate + 2 * h(self.l2_regularization_strength)
        new = ops.where(size > 0, ops.divide_no_nan(ops.clip(z, -l_1, l_1) - z, size), decayed)
        kept = {"n": ops.where(moves, n, slots["n"]), "z": ops.where(moves, z, slots["z"])}
        return ops.where(moves, p - new, ops.zeros_like(p)), kept


@register(
    "optimizer",
    paper="McMahan et al., Ad Click Prediction: a View from the Trenches, KDD 2013, algorithm 1",
    parity="keras.optimizers.Ftrl",
    cases=(
        {"learning_rate": 0.1},
        {
            "learning_rate": 0.1,
            "learning_rate_power": -0.7,
            "initial_accumulator_value": 0.5,
            "l1_regularization_strength": 0.02,
            "l2_regularization_strength": 0.1,
            "l2_shrinkage_regularization_strength": 0.01,
            "beta": 0.5,
        },
    ),
    space={
        "learning_rate": Float(1e-3, 1.0, log=True),
        "l1_regularization_strength": Float(1e-6, 1.0, log=True),
        "l2_regularization_strength": Float(1e-6, 1.0, log=True),
    },
)
class Ftrl(Optimizer):
    """FTRL-Proximal: per-element rates as in Adagrad, with an L1 penalty that makes weights exactly 0.

    ```text
    n' = n + g²                    z ← z + g + 2 s θ - (n'ᵖ - nᵖ) / η θ
    θ ← (clip(z, ±λ₁) - z) / ((n'ᵖ + β) / η + 2 λ₂)
    ```

    with p = `-learning_rate_power`, 1/2 by default. n and z have the shape of θ; n starts at
    `initial_accumulator_value`, z at 0. Arguments are Keras's, and so are the defaults but for two: n starts at 0, as
    in the paper, where Keras has 0.1, and the rate is 0.1, where Keras's 0.001, for steps of η g / √n, hardly trains.
    The paper has p = 1/2, and λ₂ instead of 2 λ₂.

    **With a larger start of n, the first update forgets the weights**, but for the share 1 - (n / n')ᵖ: as z starts at
    0, the method then takes them to have been 0. That is right for linear models, and fatal for deep ones. With a start
    at 0, elements without a gradient so far stay as they are, unless β or λ₂ is above 0, which take them to 0; with p =
    0, the first update forgets all weights. θ is a function of the state: weights that are assigned later, as by
    `EarlyStopping(restore_best_weights=True)`, last for one update unless the state is restored, too. In updates with a
    rate of 0, nothing changes. `weight_decay` shrinks the θ on the right, as in Keras, which has a lasting effect only
    through z; take λ₂ or s instead.

    When to use it: for wide linear models of sparse features, most of whose weights should be exactly 0.

    When not to use it: for deep networks, for which `AdamW` is better. It is for wide linear models of sparse features.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        learning_rate_power: -p <= 0, or a schedule: how fast rates fall with n. 0 for rates that do not.
        initial_accumulator_value: The initial value of n, >= 0.
        l1_regularization_strength: λ₁ >= 0, or a schedule.
        l2_regularization_strength: λ₂ >= 0, or a schedule: pulls the weights to 0, as if it had done so from the start.
        l2_shrinkage_regularization_strength: s >= 0, or a schedule: an L2 penalty in the gradient.
        beta: β >= 0, or a schedule.
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
    model.compile(optimizer=ok.optimizers.Ftrl(0.1, l1_regularization_strength=0.001), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.1,
        learning_rate_power: float | Schedule = -0.5,
        initial_accumulator_value: float = 0.0,
        l1_regularization_strength: float | Schedule = 0.0,
        l2_regularization_strength: float | Schedule = 0.0,
        l2_shrinkage_regularization_strength: float | Schedule = 0.0,
        beta: float | Schedule = 0.0,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = FtrlRule(
            learning_rate_power,
            initial_accumulator_value,
            l1_regularization_strength,
            l2_regularization_strength,
            l2_shrinkage_regularization_strength,
            beta,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@dataclass(frozen=True)
class RpropRule(Rule):
    """`θ ← θ - η f sign(g)`, with f multiplied by η⁺ while signs repeat and by η⁻ when one changes."""

    elementwise = True
    reuses = frozenset({"factor", "sign"})
    eta_minus: Value = number(0.5, 0, 1, closed="neither")
    eta_plus: Value = number(1.2, 1, closed="left")
    min_factor: Value = number(1e-4)
    max_factor: Value = number(5e3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_dynamic(self.min_factor) or is_dynamic(self.max_factor)) and self.min_factor > self.max_factor:
            raise ValueError(f"min_factor must not be above max_factor, got {self.min_factor} and {self.max_factor}.")

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"factor": 1.0, "sign": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        sign = ops.sign(u)
        agree = sign * slots["sign"]
        ones = ops.ones_like(u)
        change = ops.where(agree > 0, h(self.eta_plus) * ones, ops.where(agree < 0, h(self.eta_minus) * ones, ones))
        factor = ops.clip(slots["factor"] * change, h(self.min_factor), h(self.max_factor))
        sign = ops.where(agree < 0, ops.zeros_like(sign), sign)
        return h.learning_rate * factor * sign, {"factor": factor, "sign": sign}


@register(
    "optimizer",
    paper="Riedmiller and Braun, 1993, in the form iRprop- of Igel and Hüsken, 2000",
    parity="torch.optim.Rprop",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "eta_minus": 0.7, "eta_plus": 1.5, "min_factor": 0.5, "max_factor": 3.0},
    ),
    space={"learning_rate": Float(1e-5, 1e-1, log=True), "eta_plus": Choice([1.1, 1.2, 1.3])},
)
class Rprop(Optimizer):
    """Rprop: signs of gradients, with a step size for each element that grows until the sign changes.

    ```text
    f ← f η⁺   where g has the sign of the update before
    f ← f η⁻   where it has the other one: no step, and no comparison in the next update
    θ ← θ - η f sign(g) - η λ θ          f stays in [min_factor, max_factor]
    ```

    f and the sign have the shape of θ; f starts at 1, so η is the first step size. That no step is taken where the sign
    changes, and none taken back, is iRprop-, as in torch. There, sizes η f are state and their limits absolute; here
    limits are multiples of η, and a schedule acts on all steps. The default limits are torch's 1e-6 and 50 for the
    default η.

    When to use it: for small problems whose whole data are the batch of each update.

    When not to use it: with mini-batches, where signs change by chance and sizes shrink; use `Signum`, `Lion` or
    `RMSprop`. It is for gradients of the full batch.

    Args:
        learning_rate: η >= 0, or a schedule of the update count: the first step size.
        eta_minus: η⁻ in (0, 1), or a schedule.
        eta_plus: η⁺ >= 1, or a schedule.
        min_factor: The least f, >= 0, or a schedule.
        max_factor: The largest f, >= 0, or a schedule.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Rprop(0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        eta_minus: float | Schedule = 0.5,
        eta_plus: float | Schedule = 1.2,
        min_factor: float | Schedule = 1e-4,
        max_factor: float | Schedule = 5e3,
        **common: Any,
    ):
        super().__init__(learning_rate, RpropRule(eta_minus, eta_plus, min_factor, max_factor), **common)

"""Relatives of Adam that measure or use the second moment differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, number
from keras_optkit.optimizers.rules.adam import SPACE
from keras_optkit.optimizers.rules.adam_family import moments
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class YogiRule(Rule):
    """`v ← v - (1 - β₂) sign(v - g²) g²; θ ← θ - η m̂ / (√v̂ + ε)`."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-3)
    initial_accumulator_value: float = number(1e-6, fixed=True)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": self.initial_accumulator_value}  # v changes by a thousandth of g² at a time

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, square = h(self.beta_1), u * u
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = slots["v"] - (1 - h(self.beta_2)) * ops.sign(slots["v"] - square) * square
        size = ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)
        return h.learning_rate * m / h.bias_correction(self.beta_1) / size, {"m": m, "v": v}


@register(
    "optimizer",
    paper="Zaheer, Reddi, Sachan, Kale and Kumar, Adaptive Methods for Nonconvex Optimization, 2018",
    parity="pytorch_optimizer.Yogi, with its first moment started at 0",
    cases=(
        {"learning_rate": 0.01},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.9,
            "epsilon": 1e-6,
            "initial_accumulator_value": 0.01,
        },
    ),
    space=SPACE,
)
class Yogi(Optimizer):
    """Yogi: Adam whose second moment falls slowly, so that the effective rate cannot jump up.

    ```text
    m ← β₁ m + (1 - β₁) g          v ← v - (1 - β₂) sign(v - g²) g²
    θ ← θ - η m̂ / (√v̂ + ε) - η λ θ          m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    ```

    Where gradients become small, Adam's v falls by a share of itself, and Yogi's only by a share of g². m and v have
    the shape of θ; m starts at 0, v at a small number. ε is as large as in the paper. The paper's algorithm has no
    bias corrections; implementations have them, and so it is here. pytorch_optimizer and optax start m, too, at the
    initial value of v, with the bias that this adds to the first steps; m starts at 0 here, as in Adam.

    When to use it: where gradients are sparse or come in bursts, as an `Adam` whose rate does not jump up between them.

    When not to use it: where gradients are large at first and small later: v hardly falls, so steps do not grow either.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        initial_accumulator_value: The initial value of v, >= 0.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Yogi(1e-2), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-3,
        initial_accumulator_value: float = 1e-6,
        **common: Any,
    ):
        super().__init__(learning_rate, YogiRule(beta_1, beta_2, epsilon, initial_accumulator_value), **common)


@dataclass(frozen=True)
class LaPropRule(Rule):
    """`m ← β₁ m + (1 - β₁) g / (√v̂ + ε); θ ← θ - η m̂`."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-15)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        v = beta_2 * slots["v"] + (1 - beta_2) * u * u
        scaled = u / (ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon))
        m = beta_1 * slots["m"] + (1 - beta_1) * scaled
        return h.learning_rate * m / h.bias_correction(self.beta_1), {"m": m, "v": v}


@register(
    "optimizer",
    paper="Ziyin, Wang and Ueda, arXiv 2002.04839",
    parity="pytorch_optimizer.LaProp, with ε behind the bias correction",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-4}),
    space=SPACE,
)
class LaProp(Optimizer):
    """LaProp: momentum of gradients that are already divided by their size, instead of Adam's opposite order.

    ```text
    v ← β₂ v + (1 - β₂) g²          m ← β₁ m + (1 - β₁) g / (√v̂ + ε)
    θ ← θ - η m̂ - η λ θ          m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    ```

    m and v have the shape of θ and start at 0. As each gradient is divided by the v of its own time, β₁ and β₂ can be
    chosen independently; Adam diverges where β₁ is far above β₂. With β₁ = 0 it is Adam with β₁ = 0, with β₂ = 0
    momentum of signs. η acts on all of m; in the authors' code and timm it is inside m, which is the same while η is
    constant. They decay the weights after the step (the authors by λ, without η); here it is, as always, the weights
    before it.

    When to use it: where β₁ and β₂ are to be chosen freely: any β₁ is stable with any β₂.

    When not to use it: with the default βs it is close to `AdamW`, and where that is tuned there is little to gain.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. 4e-4 as in the authors' code.
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
    model.compile(optimizer=ok.optimizers.LaProp(4e-4), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 4e-4,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-15,
        **common: Any,
    ):
        super().__init__(learning_rate, LaPropRule(beta_1, beta_2, epsilon), **common)


@dataclass(frozen=True)
class ADOPTRule(Rule):
    """`m ← β₁ m + (1 - β₁) clip(g / max(√v, ε), (t - 1)^κ); θ ← θ - η m`, with the v of the gradients before g."""

    elementwise = True
    reuses = frozenset({"v"})
    uses_first = True
    handles_decay = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.9999, 0, 1, closed="left")
    epsilon: Value = number(1e-6)
    clip_exponent: Value = number(0.25, optional=True)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        scaled = ops.divide_no_nan(u, ops.maximum(ops.sqrt(slots["v"]), h(self.epsilon)))
        if self.clip_exponent is not None:
            limit = ops.cast(ops.maximum(h.step - 1, 1) ** h.exact(self.clip_exponent), u.dtype)
            scaled = ops.clip(scaled, -limit, limit)

        def unless_first(value: Any, first: float) -> Tensor:
            of_first, value = (ops.convert_to_tensor(x, dtype=u.dtype) for x in (first, value))
            return ops.where(h.first, of_first, value)

        # at a parameter's first update there is no v yet: it becomes g², and all else stays
        m = unless_first(beta_1, 1.0) * slots["m"] + unless_first(1 - beta_1, 0.0) * scaled
        v = unless_first(beta_2, 0.0) * slots["v"] + unless_first(1 - beta_2, 1.0) * u * u
        rate = unless_first(h.learning_rate, 0.0)
        return rate * (m + h.weight_decay * p), {"m": m, "v": v}


@register(
    "optimizer",
    paper="Taniguchi, Harada, Minegishi, Oshima, Jeong, Nagahara, Iiyama, Suzuki, Iwasawa and Matsuo, arXiv "
    "2411.02853, ADOPT with clipping",
    parity="optax.contrib.adopt",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-3, "clip_exponent": 0.5},
        {"learning_rate": 0.01, "clip_exponent": None},
    ),
    space={
        "learning_rate": Float(1e-5, 1e-1, log=True),
        "beta_1": Choice([0.85, 0.9, 0.95]),
        "beta_2": Choice([0.99, 0.999, 0.9999]),
    },
)
class ADOPT(Optimizer):
    """ADOPT: Adam that divides by the second moment of earlier gradients only, and so converges for every β₂.

    ```text
    first:  v = g², and nothing else
    then:   m ← β₁ m + (1 - β₁) clip(g / max(√v, ε), ±(t - 1)^κ)          θ ← θ - η m - η λ θ
            v ← β₂ v + (1 - β₂) g²
    ```

    m and v have the shape of θ; a parameter's first gradient becomes v, and moves and decays nothing. So there is no
    bias correction. t counts the optimizer's updates. The clipping, with κ = 1/4, keeps early steps short, where v is a
    single gradient; `clip_exponent=None` is the algorithm without it.

    When to use it: where `Adam` is unstable or its β₂ would have to be tuned: it converges with any β₂.

    When not to use it: for very few updates, of which the first is lost and those after it are clipped. Without
    clipping, for elements whose first gradient comes late (rows of embeddings, dead units): v is 0 until then, and they
    move by g / ε. With β₂ as low
    as Adam's, v is noisy.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        clip_exponent: κ >= 0, a schedule, or None for no clipping.
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
    model.compile(optimizer=ok.optimizers.ADOPT(1e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.9999,
        epsilon: float | Schedule = 1e-6,
        clip_exponent: float | Schedule | None = 0.25,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = ADOPTRule(beta_1, beta_2, epsilon, clip_exponent)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@dataclass(frozen=True)
class StableAdamWRule(Rule):
    """`ρ = η / max(1, RMS(g / √v̂)); θ ← θ - ρ m̂ / (√v̂ + ε) - ρ λ θ`."""

    layout = "per_parameter"
    handles_decay = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.99, 0, 1, closed="left")
    epsilon: Value = number(1e-6)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        epsilon = h(self.epsilon)
        m, v = moments(u, slots, h(self.beta_1), h(self.beta_2))
        v_hat = v / h.bias_correction(self.beta_2)
        surprise = ops.sqrt(h.mean(ops.divide_no_nan(u * u, ops.maximum(v_hat, epsilon * epsilon))))
        direction = m / h.bias_correction(self.beta_1) / (ops.sqrt(v_hat) + epsilon)
        step = h.learning_rate / ops.maximum(surprise, 1) * (direction + h.weight_decay * p)
        return step, {"m": m, "v": v}


@register(
    "optimizer",
    paper="Wortsman, Dettmers, Zettlemoyer, Morcos, Farhadi and Schmidt, arXiv 2304.13013",
    parity="pytorch_optimizer.StableAdamW",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3, "weight_decay": 0.1},
    ),
    space=SPACE | {"weight_decay": Float(1e-4, 1.0, log=True)},
)
class StableAdamW(Optimizer):
    """StableAdamW: AdamW that lowers the rate of a parameter whose gradient is larger than its second moment expects.

    ```text
    m ← β₁ m + (1 - β₁) g          v ← β₂ v + (1 - β₂) g²          m̂ = m / (1 - β₁ᵗ),  v̂ = v / (1 - β₂ᵗ)
    ρ = η / max(1, √mean(g² / max(v̂, ε²)))
    θ ← θ - ρ m̂ / (√v̂ + ε) - ρ λ θ
    ```

    The mean is over the whole parameter: the update clipping of Adafactor, which makes loss spikes rarer, in place of
    clipping gradients. m and v have the shape of θ and start at 0. The decay has the lowered rate, too, as in the
    paper. The paper corrects the bias in the βs, β (1 - βᵗ⁻¹) / (1 - βᵗ), which is the same as m̂ and v̂ while no
    gradient is missing.

    When to use it: in place of `AdamW` with clipping, where the loss has spikes.

    When not to use it: together with clipping of gradients, which it replaces. Where nothing spikes it is `AdamW`.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
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
    model.compile(optimizer=ok.optimizers.StableAdamW(1e-3, weight_decay=0.05), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.99,
        epsilon: float | Schedule = 1e-6,
        weight_decay: float | Schedule | None = 0.01,
        **common: Any,
    ):
        rule = StableAdamWRule(beta_1, beta_2, epsilon)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

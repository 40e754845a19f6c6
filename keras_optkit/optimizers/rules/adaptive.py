"""Adagrad and RMSprop: the gradient divided by the root of its accumulated or averaged square."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, is_dynamic, number
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


def _root(x: Tensor, epsilon: Any, inside: bool) -> Tensor:
    return ops.sqrt(x + epsilon) if inside else ops.sqrt(x) + epsilon


@dataclass(frozen=True)
class AdagradRule(Rule):
    """`G ← G + g²; θ ← θ - η g / √(G + ε)`."""

    elementwise = True
    initial_accumulator_value: float = number(0.0, fixed=True)
    epsilon: Value = number(1e-8)
    epsilon_inside: bool = flag(True)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"G": self.initial_accumulator_value}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        G = slots["G"] + u * u
        return h.learning_rate * u / _root(G, h(self.epsilon), self.epsilon_inside), {"G": G}


@register(
    "optimizer",
    paper="Duchi, Hazan and Singer, JMLR 2011, eq. 1 with the diagonal matrix",
    parity="torch.optim.Adagrad (epsilon_inside=False)",
    cases=(
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "epsilon_inside": False, "initial_accumulator_value": 0.1, "weight_decay": 0.1},
    ),
    space={"learning_rate": Float(1e-3, 1.0, log=True)},
)
class Adagrad(Optimizer):
    """Adagrad: rates that fall, element by element, with the sum of the squared gradients.

    ```text
    G ← G + g²          θ ← θ - η g / √(G + ε)
    ```

    G has the shape of θ and starts at 0, so the first step is about ±η for every element. Keras starts G at 0.1, which
    damps the first steps of parameters with small gradients: `initial_accumulator_value=0.1, epsilon=1e-7` gives its
    formula. torch has ε outside the root, `θ ← θ - η g / (√G + ε)`: `epsilon_inside=False, epsilon=1e-10`.

    When to use it: for sparse features and convex losses, in runs that are not long.

    When not to use it: in long or non-stationary training. G only grows, so the rate goes to zero for good; `RMSprop`
    and `Adam` forget. It is at its best for sparse features with a convex loss.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        initial_accumulator_value: The initial value of G, >= 0.
        epsilon: ε >= 0; with 0, a gradient that has been exactly 0 so far gives NaN.
        epsilon_inside: Whether ε is inside the root.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Adagrad(0.1), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        initial_accumulator_value: float = 0.0,
        epsilon: float = 1e-8,
        epsilon_inside: bool = True,
        **common: Any,
    ):
        super().__init__(learning_rate, AdagradRule(initial_accumulator_value, epsilon, epsilon_inside), **common)


@dataclass(frozen=True)
class RMSpropRule(Rule):
    """`E ← ρ E + (1 - ρ) g²; θ ← θ - η g / √(E + ε)`."""

    elementwise = True
    rho: Value = number(0.9, 0, 1, closed="left")
    momentum: Value = number(0.0, 0, 1, closed="left")
    epsilon: Value = number(1e-8)
    centered: bool = flag(False)
    epsilon_inside: bool = flag(True)
    rate_in_velocity: bool = flag(True)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return (
            {"E": 0.0 if self.centered else moment(signed=False)}  # a difference of rounded means may be negative
            | ({"mean": 0.0} if self.centered else {})
            | ({"v": moment()} if is_dynamic(self.momentum) or self.momentum else {})
        )

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        rho = h(self.rho)
        new = {"E": rho * slots["E"] + (1 - rho) * u * u}
        variance = new["E"]
        if self.centered:
            new["mean"] = rho * slots["mean"] + (1 - rho) * u
            variance = variance - new["mean"] * new["mean"]
        direction = u / _root(variance, h(self.epsilon), self.epsilon_inside)
        if "v" not in slots:
            return h.learning_rate * direction, new
        if self.rate_in_velocity:
            new["v"] = h(self.momentum) * slots["v"] + h.learning_rate * direction
            return new["v"], new
        new["v"] = h(self.momentum) * slots["v"] + direction
        return h.learning_rate * new["v"], new


@register(
    "optimizer",
    paper="Tieleman and Hinton, Coursera lecture 6.5, 2012; centered: Graves, arXiv 1308.0850, eq. 38-45",
    parity="torch.optim.RMSprop (epsilon_inside=False, rate_in_velocity=False)",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "momentum": 0.9, "centered": True, "epsilon": 1e-4, "weight_decay": 0.1},
        {"learning_rate": 0.01, "rho": 0.99, "momentum": 0.9, "epsilon_inside": False, "rate_in_velocity": False},
    ),
    space={"learning_rate": Float(1e-5, 1e-1, log=True), "rho": Choice([0.9, 0.99])},
)
class RMSprop(Optimizer):
    """RMSprop: the gradient divided by a running root mean square of itself.

    ```text
    E ← ρ E + (1 - ρ) g²          θ ← θ - η g / √(E + ε)
    centered:   a ← ρ a + (1 - ρ) g         with E - a² instead of E
    momentum γ: v ← γ v + η g / √(E + ε)    θ ← θ - v
    ```

    E, a and v have the shape of θ and start at 0; there is no bias correction, so early steps are larger by up to
    `1/√(1-ρ)`. Keras has the same formula with ε = 1e-7. torch has ε outside the root, the learning rate outside the
    velocity and ρ = 0.99: `rho=0.99, epsilon_inside=False, rate_in_velocity=False`.

    When to use it: for recurrent networks and reinforcement learning, whose recipes name it.

    When not to use it: where the first steps matter (fine-tuning); `Adam` corrects the bias. `centered=True` subtracts
    two nearly equal numbers when gradients hardly vary: E - a² can come out slightly negative in float32, so keep ε
    well above rounding (1e-5 or more with `epsilon_inside=True`).

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        rho: ρ in [0, 1), or a schedule.
        momentum: γ in [0, 1), or a schedule. 0 keeps no velocity.
        epsilon: ε >= 0.
        centered: Whether to divide by the running standard deviation.
        epsilon_inside: Whether ε is inside the root.
        rate_in_velocity: Whether η is inside the velocity (Keras) or outside (torch).
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.RMSprop(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        rho: float | Schedule = 0.9,
        momentum: float | Schedule = 0.0,
        epsilon: float = 1e-8,
        centered: bool = False,
        epsilon_inside: bool = True,
        rate_in_velocity: bool = True,
        **common: Any,
    ):
        rule = RMSpropRule(rho, momentum, epsilon, centered, epsilon_inside, rate_in_velocity)
        super().__init__(learning_rate, rule, **common)

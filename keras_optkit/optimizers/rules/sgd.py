"""Stochastic gradient descent with and without momentum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, is_dynamic, number
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class SGDRule(Rule):
    """`v ← γ v + η g; θ ← θ - v`."""

    elementwise = True
    momentum: Value = number(0.0, 0, 1, closed="left")
    nesterov: bool = flag(False)
    rate_in_velocity: bool = flag(True)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"v": moment()} if is_dynamic(self.momentum) or self.momentum else {}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        if "v" not in slots:
            return h.learning_rate * u, {}
        gamma = h(self.momentum)
        if self.rate_in_velocity:
            u = h.learning_rate * u
        v = gamma * slots["v"] + u
        step = gamma * v + u if self.nesterov else v
        return (step if self.rate_in_velocity else h.learning_rate * step), {"v": v}


@register(
    "optimizer",
    paper="Polyak 1964 (momentum); Nesterov 1983, in the form of Sutskever et al. 2013, eq. 3-4",
    parity="torch.optim.SGD (rate_in_velocity=False)",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "momentum": 0.9},
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"learning_rate": 0.01, "momentum": 0.9, "rate_in_velocity": False},
        {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True, "rate_in_velocity": False},
    ),
    space={"learning_rate": Float(1e-4, 1.0, log=True), "momentum": Choice([0.0, 0.9, 0.99])},
)
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov momentum.

    ```text
    momentum = 0:  θ ← θ - η g
    momentum γ:    v ← γ v + η g          θ ← θ - v
    nesterov:      v ← γ v + η g          θ ← θ - (γ v + η g)
    ```

    v starts at 0 and has the shape of θ. The learning rate η is inside the velocity, as in Keras, so a change of η acts
    on new gradients only. With `rate_in_velocity=False` it is outside, as in torch: `v ← γ v + g`, `θ ← θ - η v`; a
    change of η then acts at once on all of v. The two are equal while η is constant.

    When to use it: for convolutional networks with a tuned rate and schedule, and where state has to be small.

    When not to use it: without tuning the learning rate. For transformers and other models whose gradients differ much
    in scale between layers, an adaptive method such as `AdamW` is the better start.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule. 0 keeps no state.
        nesterov: Whether to look one step ahead.
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
    model.compile(optimizer=ok.optimizers.SGD(0.1, momentum=0.9, nesterov=True), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        momentum: float | Schedule = 0.0,
        nesterov: bool = False,
        rate_in_velocity: bool = True,
        **common: Any,
    ):
        super().__init__(learning_rate, SGDRule(momentum, nesterov, rate_in_velocity), **common)

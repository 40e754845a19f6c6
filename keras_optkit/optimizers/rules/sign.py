"""Optimizers whose steps are signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, is_dynamic, number
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class LionRule(Rule):
    """`θ ← θ - η sign(β₁ m + (1 - β₁) g)`."""

    elementwise = True
    reuses = frozenset({"m"})
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.99, 0, 1, closed="left")

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment()}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        direction = beta_1 * slots["m"] + (1 - beta_1) * u
        return h.learning_rate * ops.sign(direction), {"m": beta_2 * slots["m"] + (1 - beta_2) * u}


@register(
    "optimizer",
    paper="Chen, Liang, Huang, Real, Wang et al., arXiv 2302.06675",
    parity="optax.lion",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.95, "beta_2": 0.98}),
    space={
        "learning_rate": Float(1e-6, 1e-2, log=True),
        "beta_1": Choice([0.9, 0.95]),
        "weight_decay": Float(1e-3, 10.0, log=True),
    },
)
class Lion(Optimizer):
    """Lion: the sign of an interpolated momentum, so that every element moves by the learning rate.

    ```text
    θ ← θ - η sign(β₁ m + (1 - β₁) g) - η λ θ
    m ← β₂ m + (1 - β₂) g
    ```

    m has the shape of θ and starts at 0: half of Adam's state. All elements move by η in each update, so that η should
    be 3 to 10 times smaller than Adam's, and λ larger by the same factor, as the paper has it. The default, 1e-4, is
    that of the authors' code; Keras's `Lion` has 1e-3.

    When to use it: for large batches, and where Adam's state is too large: it has half of it.

    When not to use it: with small batches, whose gradients have random signs (below 64, the paper expects no gain over
    AdamW); where the rate was tuned for Adam, which is several times too large here.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule: the share of the momentum in the step.
        beta_2: β₂ in [0, 1), or a schedule: the decay of the momentum.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Lion(1e-4, weight_decay=0.1), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1e-4,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.99,
        **common: Any,
    ):
        super().__init__(learning_rate, LionRule(beta_1, beta_2), **common)


@dataclass(frozen=True)
class SignumRule(Rule):
    """`m ← γ m + (1 - γ) g; θ ← θ - η sign(m)`."""

    elementwise = True
    momentum: Value = number(0.9, 0, 1, closed="left")

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment()} if is_dynamic(self.momentum) or self.momentum else {}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        if "m" not in slots:
            return h.learning_rate * ops.sign(u), {}
        gamma = h(self.momentum)
        m = gamma * slots["m"] + (1 - gamma) * u
        return h.learning_rate * ops.sign(m), {"m": m}


@register(
    "optimizer",
    paper="Bernstein, Wang, Azizzadenesheli and Anandkumar, arXiv 1802.04434, algorithms 1 (signSGD) and 2 (Signum)",
    parity="pytorch_optimizer.SignSGD",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "momentum": 0.5}, {"learning_rate": 0.01, "momentum": 0.0}),
    space={
        "learning_rate": Float(1e-6, 1e-2, log=True),
        "momentum": Choice([0.0, 0.9, 0.95, 0.99]),
        "weight_decay": Float(1e-3, 10.0, log=True),
    },
)
class Signum(Optimizer):
    """Signum: the sign of the momentum; with `momentum=0`, signSGD: the sign of the gradient.

    ```text
    m ← γ m + (1 - γ) g          θ ← θ - η sign(m) - η λ θ
    ```

    m has the shape of θ and starts at 0; without momentum there is no state at all. All elements move by η in each
    update, so that η should be as small as for `Lion`, which differs in that the current gradient counts more in the
    step than in m.

    When to use it: where gradients of layers differ much in scale, with no more state than SGD with momentum.

    When not to use it: with small batches and no momentum, where the sign is mostly that of noise. Where the end of the
    run has no smaller rate: steps do not become shorter near a minimum.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule. 0 keeps no state.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Signum(1e-4, weight_decay=0.1), loss="mse")
    ```
    """

    def __init__(self, learning_rate: float | Schedule = 1e-4, momentum: float | Schedule = 0.9, **common: Any):
        super().__init__(learning_rate, SignumRule(momentum), **common)

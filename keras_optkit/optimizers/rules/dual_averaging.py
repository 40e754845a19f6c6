"""MADGRAD: dual averaging with adaptive rates and momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, number
from keras_optkit.optimizers.rules.roots import cube_root
from keras_optkit.optimizers.slots import weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class MADGRADRule(Rule):
    """`s ← s + η √t g; ν ← ν + η √t g²; θ ← γ θ + (1 - γ) (θ₀ - s / (∛ν + ε))`."""

    elementwise = True
    handles_decay = True
    momentum: Value = number(0.9, 0, 1, closed="left")
    epsilon: Value = number(1e-6)

    def slots(self, w: Weight | None = None) -> dict[str, Any]:
        return {"start": weights_copy(), "s": 0.0, "nu": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        g = u + h.weight_decay * p
        rate = h.learning_rate * ops.cast(ops.sqrt(h.step), u.dtype)
        s = slots["s"] + rate * g
        nu = slots["nu"] + rate * g * g
        z = slots["start"] - ops.divide_no_nan(s, cube_root(nu) + h(self.epsilon))
        return (1 - h(self.momentum)) * (p - z), {"start": slots["start"], "s": s, "nu": nu}


@register(
    "optimizer",
    paper="Defazio and Jelassi, arXiv 2101.11075",
    parity="pytorch_optimizer.MADGRAD, with its lr + eps for the rate",
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.1, "momentum": 0.5, "epsilon": 1e-3, "weight_decay": 0.1}),
    space={"learning_rate": Float(1e-4, 1.0, log=True), "momentum": Choice([0.0, 0.9, 0.95])},
)
class MADGRAD(Optimizer):
    """MADGRAD: all gradients so far, summed and scaled, are subtracted from the initial weights.

    ```text
    s ← s + η √t g          ν ← ν + η √t g²          z = θ₀ - s / (∛ν + ε)
    θ ← γ θ + (1 - γ) z
    ```

    θ₀ is the initial value of θ, s and ν start at 0; all three have the shape of θ: one and a half times Adam's state.
    Later gradients have more weight, and a cube root replaces the square root of Adagrad. Weight decay is an L2 term in
    the gradient, g + λ θ, as in the authors' code: θ is recomputed from θ₀, which forgets a decay of θ alone.
    Their code adds ε to the rate, too; here it is η. As θ approaches z, it moves for some updates after η has become 0.

    Weights that are assigned later are forgotten within some updates, since z is a function of the state.

    When to use it: for sparse problems, and where SGD reaches the better test accuracy but is too slow.

    When not to use it: with the decay that is right for Adam or SGD; it needs less, often none. To fine-tune, where a
    sum over all gradients forgets nothing.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        weight_decay: λ >= 0, a schedule, or None: an L2 term in the gradient.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.MADGRAD(1e-2), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        momentum: float | Schedule = 0.9,
        epsilon: float | Schedule = 1e-6,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, MADGRADRule(momentum, epsilon), weight_decay=weight_decay, **common)

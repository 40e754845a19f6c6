"""COCOB: steps without a learning rate, from betting on the sign of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, number
from keras_optkit.optimizers.slots import Initial, weights_copy
from keras_optkit.registry import register
from keras_optkit.space import Choice


@dataclass(frozen=True)
class COCOBRule(Rule):
    """`w = θ₀ + S (L + R) / (L max(G + L, α L)); θ ← θ - η (θ - w)`."""

    layout = "elementwise"
    reuses = frozenset({"R", "weights"})
    handles_decay = True
    alpha: Value = number(100.0, 0, closed="neither")
    epsilon: float = number(1e-8, 0, closed="neither", fixed=True)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"start": weights_copy(), "L": self.epsilon, "G": 0.0, "R": 0.0, "S": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        g, start = u + h.weight_decay * p, slots["start"]
        L = ops.maximum(slots["L"], ops.abs(g))
        G = slots["G"] + ops.abs(g)
        R = ops.maximum(slots["R"] - g * (p - start), 0.0)
        S = slots["S"] - g
        new = {"start": start, "L": L, "G": G, "R": R, "S": S}
        return h.learning_rate * (p - (start + S * self.estimate(new, h))), new

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        """The factor on the sum of the gradients, for each element."""
        L, G, R = slots["L"], slots["G"], slots["R"]
        return (L + R) / (L * ops.maximum(G + L, h(self.alpha) * L))


@register(
    "optimizer",
    paper="Orabona and Tommasi, arXiv 1705.07795, algorithm 2",
    parity="optax.contrib.cocob",
    cases=({"learning_rate": 1.0}, {"learning_rate": 1.0, "alpha": 10.0, "epsilon": 1e-3}, {"learning_rate": 0.5}),
    space={"alpha": Choice([10.0, 100.0, 1000.0])},
)
class COCOB(Optimizer):
    """COCOB: no learning rate; each element is at a bet, on the sign of its next gradient, away from its start.

    ```text
    L ← max(L, |g|)          G ← G + |g|          R ← max(R - g (θ - θ₀), 0)          S ← S - g
    w = θ₀ + S / (L max(G + L, α L)) (L + R)
    θ ← θ - η (θ - w)
    ```

    L is the largest gradient so far, which starts at ε; G the sum of their sizes, R the reward and S minus the sum of
    the gradients start at 0; θ₀ are the weights before the first update. All five have the shape of θ: two and a half
    times the state of Adam. The algorithm has no learning rate. Here η is the part of the way to w, 1 in the paper, so
    that a schedule to 0 stops at the last weights and 0 changes nothing; optax scales the gradients instead, of whose
    scale the algorithm is independent. Since w starts again from θ₀ in every update, a decay beside the steps would be
    undone: the weight decay is an L2 term in the gradient, as in optax.

    θ is a function of the state: weights that are assigned later, as by `EarlyStopping(restore_best_weights=True)`, are
    forgotten in the next update unless the state is restored, too.

    When to use it: for small models, if no rate is to be chosen at all.

    When not to use it: for transformers, or where memory is short; where there is time to tune `AdamW`.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. 1, as a rule.
        alpha: α > 0, or a schedule: the first steps are at most 1 / α long.
        epsilon: ε > 0, a number below the size of any gradient.
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
    model.compile(optimizer=ok.optimizers.COCOB(), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        alpha: float | Schedule = 100.0,
        epsilon: float = 1e-8,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, COCOBRule(alpha, epsilon), weight_decay=weight_decay, **common)

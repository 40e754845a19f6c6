"""DoG and DoWG: learning rates from the distance to the initial weights."""

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
from keras_optkit.space import Float


@dataclass(frozen=True)
class DoGRule(Rule):
    """`G ← G + ‖g‖²; θ ← θ - η r̄ / √(G + ε) g`, with r̄ the largest `‖θ - θ₀‖` so far; norms over the whole model."""

    layout = "elementwise"
    handles_decay = True
    initial_distance: float = number(1e-6, 0, closed="neither", fixed=True)
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"start": weights_copy()}

    def scalars(self) -> Mapping[str, float]:
        return {"distance": 0.0, "squares": 0.0}

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        start, g = slots["start"], u + h.weight_decay * p
        return {"moved": ops.square(p - start), "square": g * g, "size": start * start}

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        least = self.initial_distance * (1 + ops.sqrt(sums["size"]))
        distance = ops.maximum(ops.maximum(h.scalars["distance"], least), ops.sqrt(sums["moved"]))
        return {"distance": distance, "squares": h.scalars["squares"] + sums["square"]}

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        root = ops.sqrt(h.scalar("squares") + h(self.epsilon))
        return ops.divide_no_nan(h.scalar("distance"), root)

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        return h.learning_rate * self.estimate(slots, h) * (u + h.weight_decay * p), {"start": slots["start"]}


@dataclass(frozen=True)
class DoWGRule(DoGRule):
    """`G ← G + r̄² ‖g‖²; θ ← θ - η r̄² / (√G + ε) g`."""

    initial_distance: float = number(1e-2, 0, closed="neither", fixed=True)
    epsilon: Value = number(1e-4)

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        g = u + h.weight_decay * p
        return {"moved": ops.square(p - slots["start"]), "square": g * g}

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        least = ops.maximum(h.scalars["distance"], self.initial_distance)
        distance = ops.maximum(least, ops.sqrt(sums["moved"]))
        return {"distance": distance, "squares": h.scalars["squares"] + ops.square(distance) * sums["square"]}

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        root = ops.sqrt(h.scalar("squares")) + h(self.epsilon)
        return ops.divide_no_nan(ops.square(h.scalar("distance")), root)


@register(
    "optimizer",
    paper="Ivgi, Hinder and Carmon, arXiv 2302.12022, with the initial movement of its code",
    parity="optax.contrib.dog",
    cases=(
        {"learning_rate": 1.0, "initial_distance": 1.0},
        {"learning_rate": 0.5, "initial_distance": 1e-2, "epsilon": 1e-3},
    ),
    space={"initial_distance": Float(1e-6, 1e-3, log=True)},
)
class DoG(Optimizer):
    """DoG: SGD whose learning rate is the distance travelled so far over the root of the sum of squared gradients.

    ```text
    r̄ ← max(r̄, α (1 + ‖θ₀‖), ‖θ - θ₀‖)          G ← G + ‖g + λ θ‖²
    θ ← θ - η r̄ / √(G + ε) (g + λ θ)
    ```

    θ₀ are the weights before the first update; the norms are over the whole model, and only parameters with a gradient
    count. State: θ₀ in the shape of θ, and r̄ and G once for the model, which start at 0. The weight decay is an L2 term
    in the gradient, as in the reference: with steps of such different lengths, a decay beside them has no good value.

    Leave the learning rate at 1. The authors evaluate at an average of the iterates, on which their results depend:
    `use_ema=True`, or `ok.callbacks.AveragedWeights`. Factors of groups on the rate do not count in r̄ and G.

    When to use it: if there is no time to tune a rate, with an average of the weights.

    When not to use it: where there is time to tune a rate; with weights in half precision without
    `master_weights=True`, which do not resolve the first steps; without an average.

    Args:
        learning_rate: η >= 0, a factor on the estimated rate, or a schedule of the update count.
        initial_distance: α > 0: r̄ starts at α (1 + ‖θ₀‖). 1e-4 with batch normalisation.
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
    model.compile(optimizer=ok.optimizers.DoG(use_ema=True), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        initial_distance: float = 1e-6,
        epsilon: float | Schedule = 1e-8,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, DoGRule(initial_distance, epsilon), weight_decay=weight_decay, **common)


@register(
    "optimizer",
    paper="Khaled, Mishchenko and Jin, arXiv 2305.16284",
    parity="optax.contrib.dowg",
    cases=(
        {"learning_rate": 1.0, "initial_distance": 1.0},
        {"learning_rate": 0.5, "epsilon": 1e-2},
    ),
    space={"initial_distance": Float(1e-4, 1e-1, log=True)},
)
class DoWG(Optimizer):
    """DoWG: DoG with squared gradients weighted by the distance when they were seen, which makes longer steps.

    ```text
    r̄ ← max(r̄, ‖θ - θ₀‖)                        G ← G + r̄² ‖g + λ θ‖²
    θ ← θ - η r̄² / (√G + ε) (g + λ θ)
    ```

    θ₀ are the weights before the first update; the norms are over the whole model, and only parameters with a gradient
    count. State: θ₀ in the shape of θ, and r̄ and G once for the model; G starts at 0. ε is the authors' code's, not the
    paper's. The weight decay is an L2 term in the gradient, as in `DoG`.

    When to use it: as `DoG`, where that is too slow at first.

    When not to use it: as `DoG`; where its longer steps are unstable, `DoG` may be stable.

    Args:
        learning_rate: η >= 0, a factor on the estimated rate, or a schedule of the update count.
        initial_distance: What r̄ starts at, > 0; in optax its square, 1e-4.
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
    model.compile(optimizer=ok.optimizers.DoWG(), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 1.0,
        initial_distance: float = 1e-2,
        epsilon: float | Schedule = 1e-4,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, DoWGRule(initial_distance, epsilon), weight_decay=weight_decay, **common)

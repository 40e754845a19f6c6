"""Optimizers whose steps are scaled to the size of each parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, number
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class LAMBRule(Rule):
    """`r = m̂ / (√v̂ + ε) + λ θ; θ ← θ - η (‖θ‖ / ‖r‖) r`."""

    layout = "per_parameter"
    handles_decay = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-6)

    def slots(self, w: Weight) -> dict[str, float]:
        return {"m": 0.0, "v": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = beta_2 * slots["v"] + (1 - beta_2) * u * u
        v_hat = v / h.bias_correction(self.beta_2)
        r = m / h.bias_correction(self.beta_1) / (ops.sqrt(v_hat) + h(self.epsilon)) + h.weight_decay * p
        size, length = ops.sqrt(h.sum(p * p)), ops.sqrt(h.sum(r * r))
        ratio = ops.where(size * length > 0, ops.divide_no_nan(size, length), ops.ones_like(size))
        return h.learning_rate * ratio * r, {"m": m, "v": v}


@register(
    "optimizer",
    paper="You et al., arXiv 1904.00962, algorithm 2 (with φ(z) = z)",
    parity="optax.lamb",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-4},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.85, 0.9, 0.95]),
        "beta_2": Choice([0.95, 0.99, 0.999]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class LAMB(Optimizer):
    """LAMB: steps of Adam, each scaled to the norm of its parameter, for very large batches.

    ```text
    m ← β₁ m + (1 - β₁) g                    m̂ = m / (1 - β₁ᵗ)
    v ← β₂ v + (1 - β₂) g²                   v̂ = v / (1 - β₂ᵗ)
    r = m̂ / (√v̂ + ε) + λ θ
    θ ← θ - η (‖θ‖ / ‖r‖) r                  the ratio is 1 where one of the norms is 0
    ```

    The norms are over a whole parameter; m and v have the shape of θ and start at 0. Weight decay is inside the ratio,
    as in the paper; Keras's `Lamb` adds it outside. Vectors are scaled like matrices, as in optax.

    When not to use it: with batches of a size that `AdamW` trains well with.

    Args:
        learning_rate: η >= 0, or a schedule of the update count: the length of a step relative to that of θ.
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
    model.compile(optimizer=ok.optimizers.LAMB(2e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-6,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, LAMBRule(beta_1, beta_2, epsilon), weight_decay=weight_decay, **common)

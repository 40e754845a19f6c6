"""Adam and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, number
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class AdamRule(Rule):
    """`θ ← θ - η m̂ / (√v̂ + ε)`."""

    elementwise = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)
    amsgrad: bool = flag(False)
    epsilon_hat: bool = flag(False)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)} | ({"v_max": moment(signed=False)} if self.amsgrad else {})

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2, epsilon = h(self.beta_1), h(self.beta_2), h(self.epsilon)
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = beta_2 * slots["v"] + (1 - beta_2) * u * u
        new = {"m": m, "v": v}
        if self.amsgrad:
            v = new["v_max"] = ops.maximum(slots["v_max"], v)
        correction_1, correction_2 = h.bias_correction(self.beta_1), h.bias_correction(self.beta_2)
        rate = h.learning_rate / correction_1
        if self.epsilon_hat:
            return rate * ops.sqrt(correction_2) * m / (ops.sqrt(v) + epsilon), new
        return rate * m / (ops.sqrt(v / correction_2) + epsilon), new


#: The search space of Adam and most of its relatives.
SPACE = {
    "learning_rate": Float(1e-5, 1e-1, log=True),
    "beta_1": Choice([0.85, 0.9, 0.95]),
    "beta_2": Choice([0.95, 0.99, 0.999]),
}


@register(
    "optimizer",
    paper="Kingma and Ba, arXiv 1412.6980, algorithm 1; amsgrad: Reddi et al., arXiv 1904.09237",
    parity="torch.optim.Adam",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "amsgrad": True, "beta_1": 0.8, "beta_2": 0.9},
        {"learning_rate": 0.01, "epsilon_hat": True, "epsilon": 1e-4},
    ),
    space=SPACE,
)
class Adam(Optimizer):
    """Adam: running means of the gradient and of its square, both corrected for their start at zero.

    ```text
    m ← β₁ m + (1 - β₁) g          m̂ = m / (1 - β₁ᵗ)
    v ← β₂ v + (1 - β₂) g²         v̂ = v / (1 - β₂ᵗ)          θ ← θ - η m̂ / (√v̂ + ε)
    amsgrad:  the largest v so far instead of v
    ```

    m and v have the shape of θ and start at 0; t counts updates from 1. ε is added outside the root and after the bias
    correction, as in the paper's algorithm 1 and in torch. Keras adds "epsilon hat" before the correction (the paper's
    note after algorithm 1), `θ ← θ - η √(1-β₂ᵗ)/(1-β₁ᵗ) m/(√v + ε)`, which acts like a larger ε in the early steps:
    `epsilon_hat=True, epsilon=1e-7` gives it. The corrections are computed as `-expm1(t log β)`, which keeps all digits
    where `1 - βᵗ` in float32 loses half of them.

    When to use it: as a first try where nothing decays the weights; with a decay, `AdamW`.

    When not to use it: with an L2 penalty as weight decay; the penalty's gradient is divided by √v̂ too and hardly acts
    on weights with large gradients. Use `AdamW`, or `weight_decay=`, which is decoupled for every optimizer here.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        amsgrad: Whether to use the largest v so far.
        epsilon_hat: Whether ε is added before the bias correction, as in Keras.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Adam(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        amsgrad: bool = False,
        epsilon_hat: bool = False,
        **common: Any,
    ):
        super().__init__(learning_rate, AdamRule(beta_1, beta_2, epsilon, amsgrad, epsilon_hat), **common)


@register(
    "optimizer",
    paper="Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, with λ scaled by the learning rate",
    parity="torch.optim.AdamW (decay_mask='all')",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "weight_decay": 0.1, "decay_mask": "all", "amsgrad": True},
        {"learning_rate": 0.01, "weight_decay": None, "epsilon_hat": True},
    ),
    space=SPACE | {"weight_decay": Float(1e-4, 1.0, log=True)},
)
class AdamW(Optimizer):
    """Adam with decoupled weight decay: the weights shrink directly, not through the gradient.

    ```text
    θ ← θ - η m̂ / (√v̂ + ε) - η λ θ
    ```

    with m̂ and v̂ as in `Adam`, and θ on the right the weights before the step. The decay is multiplied by the learning
    rate, as in torch and Keras (the paper multiplies it by its schedule factor alone). By default vectors and scalars,
    that is biases and normalisation scales, are spared; torch and Keras decay them too: `decay_mask="all"`.

    When to use it: for transformers and most of what is trained today; tuned, it is what others are measured against.

    When not to use it: where the decay is meant as a penalty that is part of the loss; use a regularizer.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0.
        weight_decay: λ >= 0, a schedule, or None. 0.01 as in torch; Keras has 0.004.
        amsgrad: Whether to use the largest v so far.
        epsilon_hat: Whether ε is added before the bias correction, as in Keras.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.AdamW(3e-4, weight_decay=0.05), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float | Schedule | None = 0.01,
        amsgrad: bool = False,
        epsilon_hat: bool = False,
        **common: Any,
    ):
        rule = AdamRule(beta_1, beta_2, epsilon, amsgrad, epsilon_hat)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

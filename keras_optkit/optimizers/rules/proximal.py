"""Optimizers for penalties and constraints: ProximalAdagrad and ConditionalGradient, which TensorFlow Addons had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR, as_matrices, from_matrices
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, choice, number
from keras_optkit.registry import register
from keras_optkit.space import Float


@dataclass(frozen=True)
class ProximalAdagradRule(Rule):
    """`ρ = η / √(G + g²); v = θ - ρ g; θ ← sign(v) max(|v| - ρ λ₁, 0) / (1 + ρ λ₂)`."""

    elementwise = True
    handles_decay = True
    initial_accumulator_value: float = number(0.1, fixed=True)
    l1_regularization_strength: Value = number(0.0)
    l2_regularization_strength: Value = number(0.0)

    def slots(self, w: Weight | None = None) -> dict[str, float]:
        return {"G": self.initial_accumulator_value}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        G = slots["G"] + u * u
        rate = ops.divide_no_nan(h.learning_rate * ops.ones_like(G), ops.sqrt(G))
        v = p - h.learning_rate * h.weight_decay * p - rate * u
        shorter = ops.maximum(ops.abs(v) - rate * h(self.l1_regularization_strength), 0)
        new = ops.sign(v) * shorter / (1 + rate * h(self.l2_regularization_strength))
        return p - new, {"G": G}


@register(
    "optimizer",
    paper="Duchi and Singer, JMLR 2009 (forward-backward splitting), with the rates of Duchi, Hazan and Singer, 2011",
    parity="tf.raw_ops.ResourceApplyProximalAdagrad",
    cases=(
        {"learning_rate": 0.1},
        {
            "learning_rate": 0.1,
            "initial_accumulator_value": 0.5,
            "l1_regularization_strength": 0.1,
            "l2_regularization_strength": 0.2,
            "weight_decay": 0.1,
        },
        {"learning_rate": 0.1, "initial_accumulator_value": 0.0, "l1_regularization_strength": 0.1},
    ),
    space={
        "learning_rate": Float(1e-3, 1.0, log=True),
        "l1_regularization_strength": Float(1e-6, 1.0, log=True),
        "l2_regularization_strength": Float(1e-6, 1.0, log=True),
    },
)
class ProximalAdagrad(Optimizer):
    """Adagrad with L1 and L2 penalties that are applied exactly after each step, so that weights become exactly 0.

    ```text
    G ← G + g²          ρ = η / √G          v = θ - η λ θ - ρ g
    θ ← sign(v) max(|v| - ρ λ₁, 0) / (1 + ρ λ₂)
    ```

    G has the shape of θ and starts at `initial_accumulator_value`. An L1 penalty in the loss has a gradient of ±λ₁ and
    lets weights jitter about 0; this one stops them there. Penalties are scaled with the rate of each element, as in
    TensorFlow. The decay λ comes before the penalties, so that zeros stay zeros. TensorFlow Addons' default rate was
    0.001; elements that have had no gradient yet stay as they are here with an initial value of 0, where it gave NaN.

    When to use it: for sparse features where many weights should be exactly 0.

    When not to use it: where nothing is to be sparse; and in long runs, as for `Adagrad`.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        initial_accumulator_value: The initial value of G, >= 0.
        l1_regularization_strength: λ₁ >= 0, or a schedule.
        l2_regularization_strength: λ₂ >= 0, or a schedule.
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
    model.compile(optimizer=ok.optimizers.ProximalAdagrad(0.01, l1_regularization_strength=0.001), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        initial_accumulator_value: float = 0.1,
        l1_regularization_strength: float | Schedule = 0.0,
        l2_regularization_strength: float | Schedule = 0.0,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = ProximalAdagradRule(initial_accumulator_value, l1_regularization_strength, l2_regularization_strength)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


def leading(x: Tensor) -> Tensor:
    """`u₁ v₁ᵀ` of matrices `(n, rows, columns)`, with their first singular vectors; 0 for matrices of zeros."""
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = ops.transpose(x, (0, 2, 1))
    x = ops.divide_no_nan(x, ops.sqrt(ops.sum(x * x, axis=(1, 2), keepdims=True)))
    gram = ops.matmul(x, ops.transpose(x, (0, 2, 1)))
    basis = ops.eigh(gram)[1]
    # XLA's eigenvectors have half of the digits, which a correction of first order completes.
    rotated = ops.matmul(ops.matmul(ops.transpose(basis, (0, 2, 1)), gram), basis)
    gaps = rotated[:, -1:, -1:] - ops.diagonal(rotated, axis1=1, axis2=2)[:, :, None]
    last = ops.eye(x.shape[1], dtype=x.dtype)[None, :, -1:]
    u = ops.matmul(basis, ops.divide_no_nan(rotated[:, :, -1:], gaps) + last)
    v = ops.matmul(ops.transpose(x, (0, 2, 1)), u)
    outer = ops.matmul(u, ops.transpose(v, (0, 2, 1)))
    lengths = [ops.sqrt(ops.sum(each * each, axis=1, keepdims=True)) for each in (u, v)]
    outer = ops.divide_no_nan(outer, lengths[0] * lengths[1])
    return ops.transpose(outer, (0, 2, 1)) if tall else outer


@dataclass(frozen=True)
class ConditionalGradientRule(Rule):
    """`θ ← θ - η (θ - s)`, with s the point of the ball of radius r that is farthest down the gradient."""

    layout = "whole"
    radius: Value = number(10.0)
    norm: str = choice("frobenius", ("frobenius", "nuclear"))
    epsilon: Value = number(1e-7)

    @property
    def decomposes(self) -> bool:  # type: ignore[override]
        return self.norm == "nuclear"

    def routes(self) -> Mapping[str, Rule]:
        inside = {"vector": ConditionalGradientRule(self.radius, "frobenius", self.epsilon)}
        return inside if self.norm == "nuclear" else {}

    def route(self, w: Weight) -> str:
        return "vector" if self.norm == "nuclear" and (w.role == VECTOR or 0 in w.shape) else ""

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        if self.norm == "frobenius":
            direction = ops.divide_no_nan(u, ops.sqrt(h.sum(u * u)) + h(self.epsilon))
        else:
            direction = from_matrices(leading(as_matrices(u, h.kernel)), u.shape, h.kernel)
        return h.learning_rate * (p + h(self.radius) * direction), {}


@register(
    "optimizer",
    paper="Frank and Wolfe 1956; Jaggi, ICML 2013; Ravi et al., arXiv 1803.06453; as TensorFlow Addons defined it",
    parity="none: TensorFlow Addons does not run with Keras 3, and the twin is its formula",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.05, "radius": 3.0, "epsilon": 0.1, "weight_decay": 0.1},
        {"learning_rate": 0.05, "radius": 3.0, "norm": "nuclear"},
    ),
    space={"learning_rate": Float(1e-4, 1e-1, log=True), "radius": Float(1.0, 1000.0, log=True)},
)
class ConditionalGradient(Optimizer):
    """Conditional gradient (Frank-Wolfe): each parameter stays in a ball, without projections.

    ```text
    s = argmin of g · s over ‖s‖ ≤ r          θ ← (1 - η) θ + η s
    frobenius:  s = -r g / (‖g‖ + ε)          nuclear:  s = -r u₁ v₁ᵀ, the first singular vectors of g
    ```

    Every step moves θ towards a point s of the ball, by a share η of the distance: inside the ball θ never leaves it,
    and outside it comes back. There is no state. A ball in the nuclear norm leads to matrices of low rank; kernels are
    the matrices from inputs to outputs that they are for their layers (the window of a convolution in the rows,
    separate maps each by itself), and vectors have the Frobenius norm, which is the same for them. For a gradient of 0,
    s is 0.

    **Coming from TensorFlow Addons:** its `learning_rate` was the share 1 - η that is kept, so its 0.99 is 0.01 here;
    `lambda_` is `radius`, `ord="fro"` is `norm="frobenius"`.

    When to use it: for weights that have to stay in a ball of some norm, or to have a low rank.

    When not to use it: without a constraint. Steps do not become shorter near a minimum inside the ball, so η must
    decay, in theory as 2 / (t + 2). The nuclear norm costs a singular value decomposition for each kernel and update.

    Args:
        learning_rate: η in [0, 1], or a schedule of the update count.
        radius: r >= 0, or a schedule: the largest norm of each parameter.
        norm: `"frobenius"` or `"nuclear"`.
        epsilon: ε >= 0, or a schedule; of the Frobenius norm.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.ConditionalGradient(0.01, radius=10.0, norm="nuclear"), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        radius: float | Schedule = 10.0,
        norm: str = "frobenius",
        epsilon: float | Schedule = 1e-7,
        **common: Any,
    ):
        if isinstance(learning_rate, float | int) and learning_rate > 1:
            raise ValueError(f"learning_rate must be a number in [0, 1] or a schedule, got {learning_rate}.")
        super().__init__(learning_rate, ConditionalGradientRule(radius, norm, epsilon), **common)

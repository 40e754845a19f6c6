"""Optimizers that divide by an estimate of the Hessian's diagonal, from its products with random vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KernelAxes
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.random_numbers import DISTRIBUTIONS, RandomVector
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, choice, count, flag, number
from keras_optkit.optimizers.rules.roots import power
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class SophiaHRule(Rule):
    """`θ ← θ - η clip(m / max(h, ε), ρ)`, where h is the running mean of `v * Hv`."""

    needs = frozenset({"hessian_vector"})
    elementwise = True
    beta_1: Value = number(0.96, 0, 1, closed="left")
    beta_2: Value = number(0.99, 0, 1, closed="left")
    rho: Value = number(0.01)
    epsilon: Value = number(1e-12)
    update_period: int = count(10, 1)
    distribution: str = choice("normal", DISTRIBUTIONS)
    seed: int = count(0, 0)

    def random_vector(self) -> RandomVector:
        return RandomVector(self.distribution, self.update_period, self.seed)

    def slots(self, w: Weight | None = None) -> dict[str, float]:
        return {"m": 0.0, "h": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2, rho = h(self.beta_1), h(self.beta_2), h(self.rho)
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        hessian = h.with_product(
            lambda v, product: beta_2 * slots["h"] + (1 - beta_2) * v * product, lambda: slots["h"]
        )
        ratio = ops.divide_no_nan(m, ops.maximum(hessian, h(self.epsilon)))
        return h.learning_rate * ops.clip(ratio, -rho, rho), {"m": m, "h": hessian}


@register(
    "optimizer",
    paper="Liu, Li, Hall, Liang and Ma, arXiv 2305.14342 (version 1), algorithm 3 with the estimator of algorithm 1",
    parity="pytorch_optimizer.SophiaH",
    cases=(
        {"learning_rate": 0.1, "rho": 0.1, "update_period": 3},
        {"learning_rate": 0.5, "beta_1": 0.8, "beta_2": 0.9, "rho": 1.0, "epsilon": 0.1, "update_period": 1},
    ),
    space={
        "learning_rate": Float(1e-3, 1.0, log=True),
        "rho": Choice([0.01, 0.02, 0.05]),
        "beta_2": Choice([0.95, 0.99]),
    },
)
class SophiaH(Optimizer):
    """Sophia with Hutchinson's estimator: Newton's step for each element, no longer than ρ.

    ```text
    m ← β₁ m + (1 - β₁) g
    h ← β₂ h + (1 - β₂) v * (H v)        in the updates 1, k + 1, 2 k + 1, ..., with v ~ N(0, I) and H = ∇²L(θ)
    θ ← θ - η clip(m / max(h, ε), ρ)     clip(x, ρ) = min(max(x, -ρ), ρ)
    ```

    m and h have the shape of θ and start at 0. `E[v * (H v)]` is the diagonal of H. Where the estimate is negative or
    small, the step is `η ρ` in the direction of the sign of m. Later versions of the paper write
    `η clip(m / max(γ h, ε), 1)`; that is this with `ρ = γ` and η and ε divided by γ.

    In one of `update_period` steps, `fit` and `train_on_batch` also compute `H v`, exactly, as the derivative of the
    gradient in the direction v. By its number of operations, such a step takes about three times as long. The model's
    `train_step`, which may be your own, runs once: logs, metrics, statistics of `BatchNormalization` and dropout are as
    with any optimizer. v is a function of `seed` and `iterations`, so that a resumed run has the same vectors, and
    micro-batches and replicas have one v. The products are averaged over both as gradients are, so that accumulation
    equals one large batch. Clipping and `transforms` apply to the gradients and not to the products;
    `skip_nonfinite`, and dynamic loss scaling in `fit`, also leave out updates with a product that is not finite.
    Elements of v are 0 for parameters that another rule updates. In a loop of your own, with TensorFlow:

    ```python
    import keras
    import tensorflow as tf

    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = ok.optimizers.SophiaH(0.06)
    x, variables = tf.ones((8, 4)), model.trainable_variables


    def gradient():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, variables)


    grads = optimizer.with_products(gradient, variables)
    optimizer.apply(grads, variables)
    ```

    When to use it: on transformers and other smooth models, to get further in as many updates as AdamW makes; one in
    ten updates costs more.

    When not to use it: where operations have no second derivative, such as the fused LSTM on GPUs (`use_cudnn=False`)
    and custom gradients that are not differentiable; with activations whose second derivative is 0, a ReLU network
    being piecewise linear, H is that of the loss alone; in float16 where products overflow; for a model that is trained
    by several optimizers, which is refused. Gradients of embeddings are dense.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. A step changes an element by at most `η ρ`.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        rho: ρ >= 0, or a schedule.
        epsilon: ε >= 0.
        update_period: k >= 1: how often H v is computed.
        distribution: That of v, `"normal"` or `"rademacher"` (1 or -1).
        seed: A whole number >= 0; another one gives other vectors.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range; in `apply`, if no product was given.
        RuntimeError: In the step, if an operation of the model has no second derivative in TensorFlow.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.SophiaH(0.06, weight_decay=0.1), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.06,
        beta_1: float | Schedule = 0.96,
        beta_2: float | Schedule = 0.99,
        rho: float | Schedule = 0.01,
        epsilon: float = 1e-12,
        update_period: int = 10,
        distribution: str = "normal",
        seed: int = 0,
        **common: Any,
    ):
        rule = SophiaHRule(beta_1, beta_2, rho, epsilon, update_period, distribution, seed)
        super().__init__(learning_rate, rule, **common)


@dataclass(frozen=True)
class AdaHessianRule(Rule):
    """Adam with the Hessian's diagonal instead of the gradient in the second moment."""

    needs = frozenset({"hessian_vector"})
    layout = "whole"
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-4)
    hessian_power: Value = number(1.0, 0, 1, closed="right")
    spatial_averaging: bool = flag(True)
    update_period: int = count(1, 1)
    distribution: str = choice("rademacher", DISTRIBUTIONS)
    seed: int = count(0, 0)

    def random_vector(self) -> RandomVector:
        return RandomVector(self.distribution, self.update_period, self.seed)

    def slots(self, w: Weight | None = None) -> dict[str, float]:
        return {"m": 0.0, "s": 0.0}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        window = _window(h.kernel) if self.spatial_averaging else ()

        def squares(v: Tensor, product: Tensor) -> Tensor:
            diagonal = v * product
            if window:
                elements = max(math.prod(diagonal.shape[axis] for axis in window), 1)  # ops.mean is in float32 on JAX
                diagonal = ops.sum(diagonal, axis=window, keepdims=True) / elements
            return beta_2 * slots["s"] + (1 - beta_2) * ops.square(diagonal)

        m = beta_1 * slots["m"] + (1 - beta_1) * u
        s = h.with_product(squares, lambda: slots["s"])
        mean = s / h.bias_correction(self.beta_2, products=True)
        size = ops.where(mean > 0, power(ops.where(mean > 0, mean, 1.0), 0.5 * h(self.hessian_power)), 0.0)
        step = h.learning_rate / h.bias_correction(self.beta_1) * ops.divide_no_nan(m, size + h(self.epsilon))
        if self.update_period > 1:  # parameters that have joined wait for their first product
            step = ops.where(h.products > 0, step, ops.zeros_like(step))
        return step, {"m": m, "s": s}


def _window(axes: KernelAxes | None) -> tuple[int, ...]:
    """The axes of a convolution's window in a tensor of the layout "whole"."""
    return () if axes is None else tuple(axis + 1 for axis in axes.inputs if axis in axes.outputs)


@register(
    "optimizer",
    paper="Yao et al., arXiv 2006.00719, algorithm 1 and equations 8 to 12",
    parity="pytorch_optimizer.AdaHessian (spatial_averaging=False)",
    cases=(
        {"learning_rate": 0.01, "epsilon": 0.1},
        {"learning_rate": 0.05, "beta_1": 0.8, "beta_2": 0.9, "hessian_power": 0.5, "update_period": 3},
        {"learning_rate": 0.01, "spatial_averaging": False},
    ),
    space={
        "learning_rate": Float(1e-3, 1.0, log=True),
        "hessian_power": Choice([0.5, 1.0]),
        "beta_2": Choice([0.99, 0.999]),
    },
)
class AdaHessian(Optimizer):
    """AdaHessian: Adam's step, divided by the size of the Hessian's diagonal instead of the gradient's.

    ```text
    D = v * (H v)                         v = ±1 with probability 1/2 each, H = ∇²L(θ)
    D ← its mean over the window          for kernels of convolutions (`spatial_averaging`)
    m ← β₁ m + (1 - β₁) g                 m̂ = m / (1 - β₁ᵗ)
    s ← β₂ s + (1 - β₂) D²                ŝ = s / (1 - β₂ⁿ)
    θ ← θ - η m̂ / (ŝ^(k/2) + ε)           k = hessian_power
    ```

    m and s have the shape of θ and start at 0; t counts updates and n products. How `H v` is computed, and what that
    means for accumulation, replicas, clipping, non-finite values and loops of your own, is described in `SophiaH`. With
    the default `update_period=1`, that is each step.

    The mean over the window keeps the sign, as in equation 10 of the paper; the authors' code takes absolute values
    first. Their language models also average over blocks of matrices, which is not done here. With `update_period > 1`,
    ŝ is corrected by the number n of products, where the parity reference uses t, which makes its first steps too long;
    parameters that join later do not move before their first product.

    When to use it: if Adam's rates are hard to tune and a step may take three times as long.

    When not to use it: as `SophiaH`; where a step must not cost three times as much, use `update_period`; with a small
    ε on parameters on which the loss depends linearly, whose diagonal is 0.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0; 1e-4 as in the authors' code.
        hessian_power: k in (0, 1]; a smaller one is closer to SGD.
        spatial_averaging: Whether to average over the windows of convolutions.
        update_period: How often H v is computed: in the updates 1, `update_period` + 1, ...
        distribution: That of v, `"rademacher"` or `"normal"`.
        seed: A whole number >= 0; another one gives other vectors.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range; in `apply`, if no product was given.
        RuntimeError: In the step, if an operation of the model has no second derivative in TensorFlow.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.AdaHessian(0.1), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.1,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float = 1e-4,
        hessian_power: float | Schedule = 1.0,
        spatial_averaging: bool = True,
        update_period: int = 1,
        distribution: str = "rademacher",
        seed: int = 0,
        **common: Any,
    ):
        rule = AdaHessianRule(
            beta_1, beta_2, epsilon, hessian_power, spatial_averaging, update_period, distribution, seed
        )
        super().__init__(learning_rate, rule, **common)

"""Shampoo: gradients that are preconditioned along each of their axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, count, number
from keras_optkit.optimizers.rules.adam import AdamRule
from keras_optkit.optimizers.rules.soap import gram_along, turned
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class ShampooRule(Rule):
    """`θ ← θ - η ‖a‖ s / ‖s‖`: Adam's step a along the direction s, m̂ times an inverse root of each running mean L."""

    layout = "whole"
    decomposes = True
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-12)
    grafting_epsilon: Value = number(1e-8)
    precondition_frequency: int = count(10)
    max_precondition_dim: int = count(1024)

    def routes(self) -> Mapping[str, Rule]:
        return {"adam": self.grafted()}

    def grafted(self) -> AdamRule:
        """The method whose steps are as long."""
        return AdamRule(self.beta_1, self.beta_2, self.grafting_epsilon)

    def route(self, w: Weight) -> str:
        return "adam" if w.role == VECTOR or max(w.shape) > self.max_precondition_dim else ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        sides = {f"{name}_{i}": shaped(d, d) for i, d in enumerate(w.shape) for name in ("gram", "root")}
        return {"m": moment(), "v": moment(signed=False), **sides}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        axes, beta_2 = range(len(u.shape) - 1), h(self.beta_2)
        adam, new = self.grafted().update(u, slots, p, h)
        grams = [beta_2 * slots[f"gram_{i}"] + (1 - beta_2) * gram_along(u, i) for i in axes]
        old = [slots[f"root_{i}"] for i in axes]
        roots = h.every(self.precondition_frequency, lambda: [self.root(x, len(old), h) for x in grams], lambda: old)
        s = turned(new["m"], dict(enumerate(roots)), back=True)
        length, size = ops.sqrt(h.sum(s * s)), ops.sqrt(h.sum(adam * adam))
        step = ops.where(length > 0, ops.divide_no_nan(size, length) * s, adam)
        new |= {f"gram_{i}": gram for i, gram in enumerate(grams)}
        return step, {**new, **{f"root_{i}": root for i, root in enumerate(roots)}}

    def root(self, gram: Tensor, order: int, h: Hyper) -> Tensor:
        """`(L̂ + ε)^(-1 / (2 order))`."""
        return power(gram / h.bias_correction(self.beta_2), -1 / (2 * order), h(self.epsilon))


def power(x: Tensor, exponent: float, epsilon: Value) -> Tensor:
    """`(x + ε)^exponent` of symmetric matrices (n, d, d), whose eigenvalues are raised if one is below 0.

    XLA's eigenvectors have half of the digits. What is left beside the diagonal, in their basis, is taken into account
    to first order, by the differences of the function between eigenvalues.
    """
    if not x.shape[-1]:
        return x
    vectors = ops.eigh(x)[1]
    back = ops.transpose(vectors, (0, 2, 1))
    rotated = ops.matmul(ops.matmul(back, x), vectors)
    values = ops.diagonal(rotated, axis1=1, axis2=2)
    moved = values - ops.minimum(ops.min(values, axis=-1, keepdims=True), 0) + epsilon
    results = ops.power(moved, exponent)
    gaps, means = moved[:, :, None] - moved[:, None], (moved[:, :, None] + moved[:, None]) / 2
    near = ops.abs(gaps) < 1e-3 * means
    slopes = (results[:, :, None] - results[:, None]) / ops.where(near, ops.ones_like(gaps), gaps)
    slopes = ops.where(near, exponent * ops.divide_no_nan(ops.power(means, exponent), means), slopes)
    unit = ops.eye(x.shape[-1], dtype=x.dtype)
    beside = rotated * (1 - unit)
    return ops.matmul(ops.matmul(vectors, unit * results[:, None] + slopes * beside), back)


@register(
    "optimizer",
    paper="Gupta, Koren and Singer, arXiv 1802.09568, algorithm 2; grafting, running means and their bias: Shi et al., "
    "arXiv 2309.06497",
    parity="none: the authors' distributed_shampoo is in no package index; its twin was compared with it once",
    cases=(
        {"learning_rate": 0.01, "precondition_frequency": 2, "epsilon": 1e-4},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.95,
            "epsilon": 1e-6,
            "grafting_epsilon": 1e-4,
            "precondition_frequency": 3,
            "max_precondition_dim": 4,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_2": Choice([0.95, 0.99, 0.999]),
        "precondition_frequency": Choice([10, 50, 100]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class Shampoo(Optimizer):
    """Shampoo: the gradient, preconditioned along each of its axes; its steps are as long as those of Adam.

    ```text
    a: the step of Adam on m and v, with β₁, β₂ and ε₂
    for each axis i of a kernel:   Lᵢ ← β₂ Lᵢ + (1 - β₂) gᵢ gᵢᵀ     gᵢ: g with axis i as rows, all others as columns
    every n updates:               Pᵢ = (Lᵢ / (1 - β₂ᵗ) + ε I)^(-1 / 2k)     k: the number of axes
    s = m times Pᵢ along each axis
    θ ← θ - η ‖a‖ s / ‖s‖
    ```

    For a matrix, s is `L^(-1/4) m R^(-1/4)`. The roots are computed from eigenvalues. Until a parameter has its first
    roots, in update n, its step is a. Vectors, and kernels with an axis of more than `max_precondition_dim` elements,
    are trained by Adam altogether. Norms are over each parameter. Rates and decays of AdamW are right.

    State: m and v in the shape of θ, and for each axis of d elements two matrices of d × d; for a square matrix three
    times that of Adam. It starts at 0.

    Where papers and implementations differ, this is as in the second paper and its authors' code: the gradient is
    averaged before it is preconditioned, means are running means with bias correction (the first paper adds up), and
    the method that lends its length is Adam. Other than in that code, long axes are not split into blocks, short ones
    are not merged, and vectors have no matrices.

    In directions that have had no gradient, eigenvalues are rounding errors, which a small ε turns into long steps: in
    float32, runs in other modes or on other machines then differ. With an ε of 1e-6 of the largest eigenvalue or more
    they do not.

    When to use it: for large batches, if the rate of `AdamW` should carry over and each step of the model takes long.

    When not to use it: on kernels with long axes (eigenvalues take d³), which Adam trains above
    `max_precondition_dim`; or where a step of the model takes less time than its optimizer would.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        grafting_epsilon: ε₂ >= 0, or a schedule.
        precondition_frequency: n >= 1.
        max_precondition_dim: Kernels with a longer axis than this are trained by Adam.
        weight_decay: λ >= 0, a schedule, or None.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Shampoo(1e-3, precondition_frequency=50), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-12,
        grafting_epsilon: float | Schedule = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 1024,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = ShampooRule(beta_1, beta_2, epsilon, grafting_epsilon, precondition_frequency, max_precondition_dim)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

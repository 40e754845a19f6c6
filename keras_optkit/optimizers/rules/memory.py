"""Optimizers whose state is smaller than the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR, as_matrices, from_matrices, matrix_shape
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, number
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class AdafactorVectorRule(Rule):
    """`v ← β v + (1 - β) (g² + ε₁)` with `β = 1 - tᶜ`, and then the step of `scaled`."""

    layout = "per_parameter"
    beta_1: Value = number(0.0, 0, 1, closed="left")
    beta_2_decay: float = number(-0.8, -float("inf"), 0, closed="neither", fixed=True)
    epsilon_1: Value = number(1e-30)
    epsilon_2: Value = number(1e-3)
    clip_threshold: Value = number(1.0, 0, closed="neither")
    relative_step: bool = flag(True)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"v": moment(signed=False), **self.momentum()}

    def momentum(self) -> dict[str, Initial]:
        """The slot of the first moment, if there is one."""
        return {} if isinstance(self.beta_1, float) and not self.beta_1 else {"m": moment()}

    def decay(self, h: Hyper, like: Tensor) -> Tensor:
        """The decay β of the second moment: a mean of all squares at first, and of the last ones later."""
        return ops.cast(1 - h.step**self.beta_2_decay, like.dtype)

    def scaled(self, u: Tensor, v: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        """`û = g / √v, no longer than d; θ ← θ - max(ε₂, rms θ) η û`."""
        u = u / ops.sqrt(v)  # on GPUs rsqrt has 28 bits in float64
        u = u / ops.maximum(1.0, ops.sqrt(h.mean(u * u)) / h(self.clip_threshold))
        rate = h.learning_rate
        if self.relative_step:
            rate = ops.minimum(rate, ops.cast(1 / ops.sqrt(h.step), rate.dtype))
        step = rate * ops.maximum(h(self.epsilon_2), ops.sqrt(h.mean(p * p))) * u
        if "m" not in slots:
            return step, {}
        m = h(self.beta_1) * slots["m"] + (1 - h(self.beta_1)) * step
        return m, {"m": m}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta = self.decay(h, u)
        v = beta * slots["v"] + (1 - beta) * (u * u + h(self.epsilon_1))
        step, new = self.scaled(u, v, slots, p, h)
        return step, {**new, "v": v}


@dataclass(frozen=True)
class AdafactorRule(AdafactorVectorRule):
    """The same with the means of v over rows and over columns: `v = row column / mean(row)`."""

    layout = "whole"

    def routes(self) -> Mapping[str, Rule]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"vector": AdafactorVectorRule(**fields)}

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        count, rows, columns = matrix_shape(w.shape, w.axes)
        return {"row": shaped(count, rows), "column": shaped(count, columns), **self.momentum()}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta = self.decay(h, u)
        new = factored(as_matrices(u * u + h(self.epsilon_1), h.kernel), slots, beta)
        v = product(new["row"], new["column"])
        step, more = self.scaled(u, from_matrices(v, u.shape, h.kernel), slots, p, h)
        return step, {**new, **more}


def factored(squares: Tensor, slots: Slots, beta: Value, names: tuple[str, str] = ("row", "column")) -> Slots:
    """The running means of matrices over their columns and over their rows."""
    new = {}
    for name, axis in zip(names, (2, 1), strict=True):
        mean = ops.reshape(_mean(squares, axis), slots[name].shape)
        new[name] = beta * slots[name] + (1 - beta) * mean
    return new


def product(row: Tensor, column: Tensor) -> Tensor:
    """`row column / mean(row)`, the matrices of which both have the means."""
    row = row / ops.expand_dims(_mean(row, -1), -1)
    return ops.expand_dims(row, 3) * ops.expand_dims(column, 2)


def _mean(x: Tensor, axis: int) -> Tensor:
    """The mean, which `ops.mean` computes in float32 on JAX."""
    return ops.sum(x, axis=axis) / max(1, x.shape[axis])


@register(
    "optimizer",
    paper="Shazeer and Stern, arXiv 1804.04235, algorithms 4 and 5",
    parity="torch.optim.Adafactor (convolution and attention kernels as the matrices that they are)",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.1, "relative_step": False, "clip_threshold": 0.5, "epsilon_2": 0.1, "beta_2_decay": -0.5},
        {"learning_rate": 0.01, "beta_1": 0.9, "epsilon_1": 1e-8},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.0, 0.9]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class Adafactor(Optimizer):
    """Adafactor: the second moment of a matrix from its means over rows and over columns.

    ```text
    β = 1 - tᶜ
    row    ← β row + (1 - β) mean over columns of (g² + ε₁)
    column ← β column + (1 - β) mean over rows of (g² + ε₁)
    v = row column / mean(row)                vectors:  v ← β v + (1 - β) (g² + ε₁)
    û = g / √v                                û ← û / max(1, rms(û) / d)
    θ ← θ - max(ε₂, rms(θ)) min(η, 1/√t) û
    ```

    State: one element for each row and each column of a kernel, and as many as a vector has elements. Keras's
    `Adafactor` also stores a second moment of full size.

    A kernel is seen as the matrix from a unit's inputs to its outputs, as its layer has them (`optimizer.explain`):
    a convolution's window is in the rows, attention kernels have all heads in one axis, and kernels that are several
    maps side by side (depthwise, grouped and recurrent ones) are factored each by itself. torch and optax factor the
    last two or the two largest axes instead; for matrices all are the same.

    When to use it: where state has to be small: large kernels, with a model that hardly fits into memory.

    When not to use it: if there is memory for `AdamW`, which needs fewer updates as a rule.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. It is relative to the size of each parameter.
        beta_1: β₁ in [0, 1), or a schedule: a running mean of the steps, with state as large as the weights. 0: none.
        beta_2_decay: c < 0, a number.
        epsilon_1: ε₁ >= 0, added to the squares.
        epsilon_2: ε₂ >= 0, the least size that a parameter counts as.
        clip_threshold: d > 0, the largest root mean square of û.
        relative_step: Whether the rate is at most 1/√t.
        weight_decay: λ >= 0, a schedule, or None: `θ ← θ - η λ θ` in addition to the step, with η as given, as in
            torch.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Adafactor(0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        beta_1: float | Schedule = 0.0,
        beta_2_decay: float = -0.8,
        epsilon_1: float | Schedule = 1e-30,
        epsilon_2: float | Schedule = 1e-3,
        clip_threshold: float | Schedule = 1.0,
        relative_step: bool = True,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = AdafactorRule(beta_1, beta_2_decay, epsilon_1, epsilon_2, clip_threshold, relative_step)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

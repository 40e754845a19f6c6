"""APOLLO: learning rates for the channels of a kernel from a random projection of its gradients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KERNEL, as_matrices, from_matrices, matrix_shape
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, choice, count, number
from keras_optkit.optimizers.rules.adam import AdamRule
from keras_optkit.optimizers.slots import Initial, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


def hashed(x: Tensor) -> Tensor:
    """Integers of 32 bits, mixed by the last step of MurmurHash3: bitwise the same on every backend and device."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ops.bitwise_xor(x, ops.bitwise_right_shift(x, ops.cast(shift, "uint32")))
        x = x * ops.convert_to_tensor(factor, "uint32")
    return x


def projection(seed: int, drawn: Tensor, rank: int, length: int, dtype: str) -> Tensor:
    """A matrix of `rank` × `length` elements from N(0, 1 / rank), by a seed and by how often one was drawn before."""
    key = hashed(ops.convert_to_tensor(seed, "uint32")) + ops.cast(drawn, "uint32")
    places = ops.cast(ops.arange(2 * rank * length, dtype="int32"), "uint32")  # TensorFlow counts in no uint32
    bits = hashed(places + hashed(key))
    uniform = (ops.cast(ops.bitwise_right_shift(bits, ops.cast(8, "uint32")), dtype) + 0.5) / 2**24
    radius, turns = ops.split(uniform, 2)
    normal = ops.sqrt(-2 * ops.log(radius)) * _cosine(turns)
    return ops.reshape(normal, (rank, length)) / math.sqrt(rank)


def _cosine(turns: Tensor) -> Tensor:
    """`cos(2π x)` for x from 0 to 1, by its series, since `ops.cos` computes in float32 on JAX."""
    square, series = ops.square(2 * math.pi * (turns - 0.5)), ops.ones_like(turns)
    for k in range(15, 0, -1):
        series = 1 - square * series / (2 * k * (2 * k - 1))
    return -series


@dataclass(frozen=True)
class APOLLORule(Rule):
    """`θ ← θ - η s g`, with s the ratio of the norms of Adam's step for `r = P g` and of r, by channel or matrix."""

    layout = "whole"
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-6)
    rank: int = count(256)
    scale: Value = number(1.0)
    scale_type: str = choice("channel", ("channel", "tensor"))
    projection_frequency: int = count(200)
    growth_limit: Value = number(1.01, 1)
    seed: int = count(0, 0)

    def routes(self) -> Mapping[str, Rule]:
        return {"adam": AdamRule(self.beta_1, self.beta_2, self.epsilon, epsilon_hat=True)}

    def route(self, w: Weight) -> str:
        return "" if w.role == KERNEL and min(matrix_shape(w.shape, w.axes)[1:]) > self.rank else "adam"

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        maps, rows, columns = matrix_shape(w.shape, w.axes)
        low = shaped(maps, self.rank, max(rows, columns))
        return {"m": low, "v": low, "length": shaped(maps)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        g = as_matrices(u, h.kernel)
        tall = g.shape[1] > g.shape[2]
        g = ops.transpose(g, (0, 2, 1)) if tall else g
        drawn = ops.floor((h.step - 1) / self.projection_frequency)
        r = ops.matmul(projection(self.seed, drawn, self.rank, g.shape[1], u.dtype), g)
        low, each = slots["m"].shape, (-1, 1, 1)
        m = h(self.beta_1) * ops.reshape(slots["m"], r.shape) + (1 - h(self.beta_1)) * r
        v = h(self.beta_2) * ops.reshape(slots["v"], r.shape) + (1 - h(self.beta_2)) * r * r
        over = 1 if self.scale_type == "channel" else (1, 2)
        scaled = g * _norm(m / (ops.sqrt(v) + h(self.epsilon)), over) / (_norm(r, over) + 1e-8)
        length, before = _norm(scaled, (1, 2)), ops.reshape(slots["length"], each)
        limit = ops.maximum(1.0, length / (before + 1e-8) / h(self.growth_limit))
        limit = ops.where(before > 0, limit, ops.ones_like(limit))
        rate = h.learning_rate * ops.sqrt(h.bias_correction(self.beta_2)) / h.bias_correction(self.beta_1)
        step = rate * h(self.scale) ** 0.5 * scaled / limit
        step = from_matrices(ops.transpose(step, (0, 2, 1)) if tall else step, u.shape, h.kernel)
        length = ops.reshape(length / limit, slots["length"].shape)
        return step, {"m": ops.reshape(m, low), "v": ops.reshape(v, low), "length": length}


def _norm(x: Tensor, axis: int | tuple[int, int]) -> Tensor:
    return ops.sqrt(ops.sum(x * x, axis=axis, keepdims=True))


@register(
    "optimizer",
    paper="Zhu et al., arXiv 2412.05270, algorithm 1",
    parity="apollo_torch.apollo.AdamW 1.0.3, with the same projections",
    cases=(
        {"learning_rate": 0.01, "rank": 2},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.9,
            "epsilon": 1e-4,
            "rank": 1,
            "scale": 128.0,
            "scale_type": "tensor",
            "projection_frequency": 7,
            "growth_limit": 1.1,
            "seed": 3,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "rank": Choice([64, 256]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class APOLLO(Optimizer):
    """APOLLO: the gradient, scaled by channel as Adam scales a random projection of it to a few dimensions.

    ```text
    r = P g                               P: rank × (the shorter side of the kernel), from N(0, 1 / rank)
    m ← β₁ m + (1 - β₁) r                 v ← β₂ v + (1 - β₂) r²
    s = ‖m / (√v + ε)‖ / ‖r‖              for each channel, or one for the whole matrix (scale_type)
    g' = s g                              ‖g'‖ at most growth_limit times that of the update before
    θ ← θ - η √(1 - β₂ᵗ) / (1 - β₁ᵗ) √scale g' - η λ θ
    ```

    A kernel is seen as the matrix from a unit's inputs to its outputs, as its layer has them. Channels are the places
    along its longer side, of n elements. State: m and v with rank × n elements, and one more for ‖g'‖; all start at 0.
    P is not stored, but computed again in every step from `seed` and the number of the update, and is another one after
    every `projection_frequency` updates; kernels of one shape share it. Vectors, embeddings and kernels whose shorter
    side is not longer than `rank` are trained by Adam.

    `rank=1, scale=128, scale_type="tensor"` is the paper's APOLLO-Mini. As in the authors' code, 1e-8 is added to the
    norms that are divided by, and ε is added before the bias correction. After a gradient of 0, that code limits the
    next ‖g'‖ to about 1e-8, and this optimizer does not limit it. The authors decay the weights after the step, this
    optimizer before it. The authors project the layers of attention and feed-forward blocks only and leave the last
    layer to Adam, as `groups=[Group("head", rule="AdamW")]` does. pytorch-optimizer's APOLLO scales the projected
    gradient and projects it back, which is another algorithm.

    When to use it: for large kernels where state has to be near that of plain SGD, at rates like those of `AdamW`.

    When not to use it: if there is memory for `AdamW`; with kernels not much larger than the rank.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        rank: The dimensions of the projection, >= 1; a quarter of the shorter side in the paper.
        scale: Factor whose root the steps of kernels are multiplied by, >= 0, or a schedule.
        scale_type: `"channel"` or `"tensor"`.
        projection_frequency: Updates >= 1 until another projection is drawn.
        growth_limit: Largest growth >= 1 of ‖g'‖ in one update, or a schedule.
        seed: Seed of the projections, >= 0.
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
    model.compile(optimizer=ok.optimizers.APOLLO(0.01, rank=2), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-6,
        rank: int = 256,
        scale: float | Schedule = 1.0,
        scale_type: str = "channel",
        projection_frequency: int = 200,
        growth_limit: float | Schedule = 1.01,
        seed: int = 0,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = APOLLORule(beta_1, beta_2, epsilon, rank, scale, scale_type, projection_frequency, growth_limit, seed)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

"""Optimizers whose second moments are smaller than the weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KERNEL, TABLE, VECTOR, KernelAxes, as_matrices, from_matrices, matrix_shape
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, is_dynamic, number
from keras_optkit.optimizers.rules.adam import AdamRule
from keras_optkit.optimizers.rules.memory import factored, product
from keras_optkit.optimizers.rules.muon import patterns
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class CAMEVectorRule(Rule):
    """`v ← β₂ v + (1 - β₂) (g² + ε₁); m ← β₁ m + (1 - β₁) û; θ ← θ - η m`, with û = g / √v, no longer than d."""

    layout = "per_parameter"
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    beta_3: Value = number(0.9999, 0, 1, closed="left")
    epsilon_1: Value = number(1e-30)
    epsilon_2: Value = number(1e-16)
    clip_threshold: Value = number(1.0, 0, closed="neither")

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def clipped(self, u: Tensor, v: Tensor, h: Hyper) -> Tensor:
        """û."""
        u = u / ops.sqrt(v)
        return u / ops.maximum(1.0, ops.sqrt(h.mean(u * u)) / h(self.clip_threshold))

    def momentum(self, u: Tensor, slots: Slots, h: Hyper) -> Tensor:
        """M of this step."""
        return h(self.beta_1) * slots["m"] + (1 - h(self.beta_1)) * u

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        v = h(self.beta_2) * slots["v"] + (1 - h(self.beta_2)) * (u * u + h(self.epsilon_1))
        m = self.momentum(self.clipped(u, v, h), slots, h)
        return h.learning_rate * m, {"m": m, "v": v}


@dataclass(frozen=True)
class CAMERule(CAMEVectorRule):
    """The same with v from its means over rows and columns, and with m divided by √S, S that of `(û - m)²`."""

    layout = "whole"

    def routes(self) -> Mapping[str, Rule]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"vector": CAMEVectorRule(**fields)}

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        maps, rows, columns = matrix_shape(w.shape, w.axes)
        sides = {"row": shaped(maps, rows), "column": shaped(maps, columns)}
        return {"m": moment(), **sides, **{f"residual_{name}": side for name, side in sides.items()}}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        new = factored(as_matrices(u * u + h(self.epsilon_1), h.kernel), slots, h(self.beta_2))
        v = from_matrices(product(new["row"], new["column"]), u.shape, h.kernel)
        clipped = self.clipped(u, v, h)
        m = self.momentum(clipped, slots, h)
        residual = as_matrices(ops.square(clipped - m) + h(self.epsilon_2), h.kernel)
        names = ("residual_row", "residual_column")
        new |= factored(residual, slots, h(self.beta_3), names)
        s = from_matrices(product(*(new[name] for name in names)), u.shape, h.kernel)
        return h.learning_rate * m / ops.sqrt(s), {"m": m, **new}


@register(
    "optimizer",
    paper="Luo et al., arXiv 2307.02047",
    parity="pytorch_optimizer.CAME (convolution and attention kernels as the matrices that they are)",
    cases=(
        {"learning_rate": 0.001},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.9,
            "beta_3": 0.95,
            "epsilon_1": 1e-8,
            "epsilon_2": 1e-4,
            "clip_threshold": 0.5,
        },
    ),
    space={
        "learning_rate": Float(1e-5, 1e-2, log=True),
        "beta_3": Choice([0.999, 0.9999]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class CAME(Optimizer):
    """CAME: Adafactor with momentum, whose steps are shorter where û and its running mean disagree.

    ```text
    row    ← β₂ row + (1 - β₂) mean over columns of (g² + ε₁)
    column ← β₂ column + (1 - β₂) mean over rows of (g² + ε₁)
    v = row column / mean(row)                vectors:  v ← β₂ v + (1 - β₂) (g² + ε₁)
    û = g / √v                                û ← û / max(1, rms(û) / d)
    m ← β₁ m + (1 - β₁) û
    S: from means over rows and columns of (û - m)² + ε₂, as v, with β₃
    θ ← θ - η m / √S - η λ θ                  vectors:  θ ← θ - η m - η λ θ
    ```

    State: m in the shape of θ, and of a kernel two elements for each row and each column; of a vector v, too. All start
    at 0, and nothing is corrected for that, as in the paper: S is small at first, and the first steps are long. Kernels
    are seen as matrices as in `Adafactor`; pytorch-optimizer factors the last two axes of kernels with more.

    When to use it: where state has to be small and `Adafactor` is unstable; it keeps a momentum besides.

    When not to use it: if there is memory for `AdamW`; with the learning rate of `AdamW`, which is too large.

    Args:
        learning_rate: η >= 0, or a schedule of the update count; with a warm-up.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        beta_3: β₃ in [0, 1), or a schedule: the decay of S.
        epsilon_1: ε₁ >= 0, or a schedule.
        epsilon_2: ε₂ >= 0, or a schedule.
        clip_threshold: d > 0, or a schedule: the largest root mean square of û.
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
    model.compile(optimizer=ok.optimizers.CAME(2e-4, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.0002,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        beta_3: float | Schedule = 0.9999,
        epsilon_1: float | Schedule = 1e-30,
        epsilon_2: float | Schedule = 1e-16,
        clip_threshold: float | Schedule = 1.0,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = CAMERule(beta_1, beta_2, beta_3, epsilon_1, epsilon_2, clip_threshold)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@dataclass(frozen=True)
class SM3Rule(Rule):
    """`ν = min over the axes of μ, plus g²; θ ← θ - η g / √(ν + ε); μ ← max over all other axes of ν`."""

    layout = "whole"
    momentum: Value = number(0.9, 0, 1, closed="left")
    epsilon: Value = number(1e-30)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        rank = len(w.shape)
        sides = {f"mu_{i}": shaped(*(d if i == j else 1 for j, d in enumerate(w.shape))) for i in range(rank)}
        kept = {"m": moment()} if is_dynamic(self.momentum) or self.momentum else {}
        return {**kept, **(sides or {"mu_0": shaped()})}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        rank = len(u.shape) - 1
        nu = slots["mu_0"]
        for i in range(1, rank):
            nu = ops.minimum(nu, slots[f"mu_{i}"])
        nu = nu + u * u
        new = {}
        for i in range(max(rank, 1)):
            others = tuple(j + 1 for j in range(rank) if j != i)
            new[f"mu_{i}"] = ops.max(nu, axis=others, keepdims=True, initial=0.0) if others else nu
        step = ops.divide_no_nan(u, ops.sqrt(nu + h(self.epsilon)))
        if "m" in slots:
            step = new["m"] = h(self.momentum) * slots["m"] + (1 - h(self.momentum)) * step
        return h.learning_rate * step, new


@register(
    "optimizer",
    paper="Anil, Gupta, Koren and Singer, arXiv 1901.11150, algorithm SM3-II",
    parity="pytorch_optimizer.SM3",
    cases=({"learning_rate": 0.1}, {"learning_rate": 0.1, "momentum": 0.0, "epsilon": 1e-3}),
    space={
        "learning_rate": Float(1e-3, 1.0, log=True),
        "momentum": Choice([0.0, 0.9, 0.95]),
    },
)
class SM3(Optimizer):
    """SM3: Adagrad with one accumulator for each place along each axis, instead of one for each element.

    ```text
    ν = min over the axes of μ, plus g²
    m ← γ m + (1 - γ) g / √(ν + ε)          0 where ν is
    θ ← θ - η m - η λ θ
    μ of a place along an axis ← the largest ν at this place
    ```

    Each axis has a vector μ, which starts at 0: of a kernel of 512 × 2048 elements, 2560. A vector has as many as it
    has elements, and is trained as in Adagrad. m has the shape of θ; with `momentum=0` there is none. The paper's
    momentum is of steps, too. ε is not in the paper, where 0 / 0 = 0; 1e-30 leaves that as it is.

    When to use it: for sparse or structured gradients, as of large embeddings, in little memory.

    When not to use it: in long training, where μ, which only grows, makes steps ever shorter; where an axis has no
    structure of its own, since ν is then far above the sum of an element's squares.

    Args:
        learning_rate: η >= 0, or a schedule of the update count; with a warm-up.
        momentum: γ in [0, 1), or a schedule.
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
    model.compile(optimizer=ok.optimizers.SM3(0.1), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.1,
        momentum: float | Schedule = 0.9,
        epsilon: float | Schedule = 1e-30,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(learning_rate, SM3Rule(momentum, epsilon), weight_decay=weight_decay, **common)


#: Paths of the kernels that have one second moment for each head.
HEADS = (r"(^|/)(query|key|query_dense|key_dense|q_proj|k_proj)/kernel$",)


@dataclass(frozen=True)
class BlockAdamRule(Rule):
    """`m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) mean over the block of g²; θ ← θ - η m̂ / (√v̂ + ε)`."""

    layout = "whole"
    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def block(self, rank: int, axes: KernelAxes | None) -> tuple[int, ...]:
        """The axes of a parameter that a block extends along: all of a vector, all but the first of a table."""
        return tuple(range(rank))

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        block = self.block(len(w.shape), w.axes)
        return {"m": moment(), "v": shaped(*(1 if i in block else d for i, d in enumerate(w.shape)))}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2 = h(self.beta_1), h(self.beta_2)
        axes = tuple(i + 1 for i in self.block(len(u.shape) - 1, h.kernel))
        size = max(1, math.prod(u.shape[i] for i in axes))
        m = beta_1 * slots["m"] + (1 - beta_1) * u
        v = beta_2 * slots["v"] + (1 - beta_2) * ops.sum(u * u, axis=axes, keepdims=True) / size
        root = ops.sqrt(v / h.bias_correction(self.beta_2)) + h(self.epsilon)
        return h.learning_rate * m / h.bias_correction(self.beta_1) / root, {"m": m, "v": v}


class RowAdamRule(BlockAdamRule):
    """One block for each row of a table."""

    def block(self, rank: int, axes: KernelAxes | None) -> tuple[int, ...]:
        return tuple(range(1, rank))


class HeadAdamRule(BlockAdamRule):
    """One block for each place along the first axis of the outputs."""

    def block(self, rank: int, axes: KernelAxes | None) -> tuple[int, ...]:
        return tuple(i for i in range(rank) if axes is None or i != axes.columns()[0])


@dataclass(frozen=True)
class AdamMiniRule(BlockAdamRule):
    """The same with one block for each unit of a kernel."""

    head_layers: tuple[str, ...] | None = patterns(HEADS)

    def routes(self) -> Mapping[str, Rule]:
        betas = (self.beta_1, self.beta_2, self.epsilon)
        return {
            "bias": AdamRule(*betas),
            "scale": BlockAdamRule(*betas),
            "row": RowAdamRule(*betas),
            "head": HeadAdamRule(*betas),
        }

    def route(self, w: Weight) -> str:
        if w.role == VECTOR:
            scales = any(path.rpartition("/")[2] in ("gamma", "scale") for path in w.paths)
            return "scale" if scales else "bias"
        named = any(re.search(pattern, path) for pattern in self.head_layers or () for path in w.paths)
        heads = w.role == KERNEL and w.axes is not None and len(w.axes.columns()) > 1
        return "row" if w.role == TABLE else "head" if named and heads else ""

    def block(self, rank: int, axes: KernelAxes | None) -> tuple[int, ...]:
        return tuple(range(rank - 1)) if axes is None else axes.inputs


@register(
    "optimizer",
    paper="Zhang et al., arXiv 2406.16793, algorithm 1, with the blocks of version 1.1 of its code",
    parity="adam_mini.Adam_mini 1.1.1",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-3},
    ),
    space={
        "learning_rate": Float(1e-5, 1e-1, log=True),
        "beta_2": Choice([0.95, 0.99, 0.999]),
        "weight_decay": Float(1e-4, 1.0, log=True),
    },
)
class AdamMini(Optimizer):
    """Adam-mini: Adam with one second moment for each block of a parameter, instead of one for each element.

    ```text
    m ← β₁ m + (1 - β₁) g                                       m̂ = m / (1 - β₁ᵗ)
    v ← β₂ v + (1 - β₂) (mean of g² over the block)             v̂ = v / (1 - β₂ᵗ)
    θ ← θ - η m̂ / (√v̂ + ε) - η λ θ
    ```

    The blocks are:

    - of the kernels of queries and keys: the heads;
    - of other kernels: the units, that is, the weights of one output each;
    - of embeddings: the rows, one for each token;
    - the scale of a normalisation is one block; each element of another vector is one, as in the authors' code.

    m has the shape of θ; v has one element for each block, so that the state is about half of Adam's. Both start at 0.
    Which axes are outputs is what layers tell (`optimizer.explain`), and heads are known where a kernel has an axis for
    them, as in Keras's `MultiHeadAttention`; other queries and keys have a block for each unit. The authors' code knows
    layers by names in torch instead, and pytorch-optimizer has the blocks of an earlier version: the heads of queries
    and keys, the elements of embeddings and of the last layer, and all other kernels as a whole.

    When to use it: where Adam's state is too large, and its rates and recipes are to be kept: it has half of it.

    When not to use it: where memory is not short; `Lion` and `SM3` need as little or less.

    Args:
        learning_rate: η >= 0, or a schedule of the update count; as for `AdamW`.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        head_layers: Regular expressions; kernels whose path matches one have a block for each head. None for no kernel.
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
    model.compile(optimizer=ok.optimizers.AdamMini(1e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-8,
        head_layers: Sequence[str] | None = HEADS,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = AdamMiniRule(beta_1, beta_2, epsilon, head_layers)  # type: ignore[arg-type]
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

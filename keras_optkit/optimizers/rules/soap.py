"""SOAP: Adam in the eigenbases of Shampoo's preconditioners."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, choice, count, number
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


@dataclass(frozen=True)
class SOAPVectorRule(Rule):
    """`m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) g²; θ ← (θ - η (√c₂ / c₁) m / (√v + ε)) (1 - η λ)`.

    A parameter's first gradient moves nothing.
    """

    layout = "elementwise"
    uses_first = True
    handles_decay = True
    beta_1: Value = number(0.95, 0, 1, closed="left")
    beta_2: Value = number(0.95, 0, 1, closed="left")
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def step(self, adam: Tensor, p: Tensor, h: Hyper) -> Tensor:
        """The step for `m / (√v + ε)`."""
        c_1, c_2 = (h.bias_correction(beta, skipped=1) for beta in (self.beta_1, self.beta_2))
        step = h.learning_rate * ops.sqrt(c_2) / c_1 * adam
        step = step + h.learning_rate * h.weight_decay * (p - step)
        return ops.where(h.first, ops.zeros_like(step), step)

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        m = h(self.beta_1) * slots["m"] + (1 - h(self.beta_1)) * u
        v = h(self.beta_2) * slots["v"] + (1 - h(self.beta_2)) * u * u
        new = {name: ops.where(h.first, slots[name], x) for name, x in (("m", m), ("v", v))}
        return self.step(m / (ops.sqrt(v) + h(self.epsilon)), p, h), new


@dataclass(frozen=True)
class SOAPRule(SOAPVectorRule):
    """The same with v, and the division by its root, in the eigenbases Q of the running means L of `g gᵀ` by axis."""

    layout = "whole"
    decomposes = True
    shampoo_beta: Value | None = number(None, 0, 1, closed="left", optional=True)
    precondition_frequency: int = count(10)
    max_precondition_dim: int = count(10000)
    initial_basis: str = choice("gradient", ("gradient", "identity"))

    def routes(self) -> Mapping[str, Rule]:
        return {"vector": SOAPVectorRule(self.beta_1, self.beta_2, self.epsilon)}

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        sides = {i: shaped(d, d) for i, d in enumerate(w.shape) if d <= self.max_precondition_dim}
        squares = {f"{name}_{i}": side for i, side in sides.items() for name in ("gram", "basis")}
        return {"m": moment(), "v": moment(signed=False), **squares}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        axes = [i for i in range(len(u.shape) - 1) if f"gram_{i}" in slots]
        old = {i: slots[f"basis_{i}"] for i in axes}
        m = h(self.beta_1) * slots["m"] + (1 - h(self.beta_1)) * u
        v = h(self.beta_2) * slots["v"] + (1 - h(self.beta_2)) * ops.square(turned(u, old, back=False))
        adam = turned(turned(m, old, back=False) / (ops.sqrt(v) + h(self.epsilon)), old, back=True)
        grams = self.grams(u, {i: slots[f"gram_{i}"] for i in axes}, old, h)
        new_v, bases = h.every(self.precondition_frequency, lambda: _iterated(v, grams, old), lambda: (v, old), at=1)
        first = ops.any(h.first)
        begun = ops.cond(first, lambda: self.begun(grams), lambda: dict(old))
        new = {"m": ops.where(h.first, slots["m"], m), "v": ops.where(h.first, slots["v"], new_v)}
        fresh = ops.reshape(h.first, (-1, 1, 1))
        for i in axes:
            new |= {f"gram_{i}": grams[i], f"basis_{i}": ops.where(fresh, begun[i], bases[i])}
        return self.step(adam, p, h), new

    def gram_beta(self) -> Value:
        """The decay β of the means L."""
        return self.beta_2 if self.shampoo_beta is None else self.shampoo_beta

    def grams(self, u: Tensor, grams: dict[int, Tensor], bases: dict[int, Tensor], h: Hyper) -> dict[int, Tensor]:
        """The means L with this gradient."""
        beta = h(self.gram_beta())
        return {i: beta * gram + (1 - beta) * gram_along(u, i) for i, gram in grams.items()}

    def begun(self, grams: dict[int, Tensor]) -> dict[int, Tensor]:
        """The first bases."""
        if self.initial_basis == "identity":
            return {i: ops.broadcast_to(ops.eye(g.shape[-1], dtype=g.dtype), g.shape) for i, g in grams.items()}
        return {i: ops.flip(ops.eigh(g)[1], axis=-1) for i, g in grams.items()}  # largest eigenvalues first


@dataclass(frozen=True)
class KLSOAPRule(SOAPRule):
    """The same with `L ← (1 - w) L + w g Λ⁻¹ gᵀ / d` by axis, Λ and d those of the other axes, and w without a bias."""

    epsilon: Value = number(1e-8, closed="neither")

    def grams(self, u: Tensor, grams: dict[int, Tensor], bases: dict[int, Tensor], h: Hyper) -> dict[int, Tensor]:
        roots = {}
        for i, gram in grams.items():
            values = ops.maximum(ops.sum(bases[i] * ops.matmul(gram, bases[i]), axis=1), h(self.epsilon))
            along = (values.shape[0], *[1] * i, -1, *[1] * (len(u.shape) - 2 - i))
            roots[i] = ops.reshape(ops.sqrt(max(1, values.shape[1]) * values), along)
        weight = (1 - h(self.gram_beta())) / h.bias_correction(self.gram_beta())
        new = {}
        for i, gram in grams.items():
            others = turned(u, {j: basis for j, basis in bases.items() if j != i}, back=False)
            for j in roots:
                others = others / roots[j] if j != i else others
            new[i] = gram + weight * (gram_along(ops.where(h.first, u, others), i) - gram)
        return new


def _by_axis(x: Tensor, axis: int) -> Tensor:
    """`(k, *shape)` as matrices with one row for each place along an axis."""
    moved = ops.moveaxis(x, axis + 1, 1)
    return ops.reshape(moved, (*moved.shape[:2], math.prod(moved.shape[2:])))


def gram_along(x: Tensor, axis: int) -> Tensor:
    """The products `xᵢ xᵢᵀ` of each parameter, in which xᵢ has one row for each place along an axis."""
    rows = _by_axis(x, axis)
    return ops.matmul(rows, ops.transpose(rows, (0, 2, 1)))


def turned(x: Tensor, bases: dict[int, Tensor], *, back: bool) -> Tensor:
    """X times a matrix along each of its axes: `Qᵀ x`, x in the bases Q of its axes, or `Q x`, back from there."""
    for axis, basis in bases.items():
        shape = ops.moveaxis(x, axis + 1, 1).shape
        turned = ops.matmul(basis if back else ops.transpose(basis, (0, 2, 1)), _by_axis(x, axis))
        x = ops.moveaxis(ops.reshape(turned, shape), 1, axis + 1)
    return x


def _iterated(v: Tensor, grams: dict[int, Tensor], bases: dict[int, Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    """The bases after one power iteration, sorted by eigenvalue, and v in the new order."""
    new = {}
    for axis, basis in bases.items():
        product = ops.matmul(grams[axis], basis)
        order = ops.argsort(-ops.sum(basis * product, axis=1), axis=-1)
        indices = ops.expand_dims(order, 1)
        new[axis] = ops.qr(ops.take_along_axis(product, indices, axis=2))[0]
        places = ops.reshape(order, (order.shape[0], *[1] * axis, -1, *[1] * (len(v.shape) - 2 - axis)))
        v = ops.take_along_axis(v, places, axis=axis + 1)
    return v, new


@register(
    "optimizer",
    paper="Vyas et al., arXiv 2409.11321, algorithm 3",
    parity="pytorch_optimizer.SOAP, without its rounding of QR to float32",
    cases=(
        {"learning_rate": 0.01, "max_precondition_dim": 3, "initial_basis": "identity"},
        {
            "learning_rate": 0.01,
            "beta_1": 0.9,
            "beta_2": 0.8,
            "shampoo_beta": 0.7,
            "precondition_frequency": 3,
            "max_precondition_dim": 4,
            "initial_basis": "identity",
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "precondition_frequency": Choice([1, 10, 50]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class SOAP(Optimizer):
    """SOAP: Adam in the eigenbases of Shampoo's preconditioners.

    ```text
    for each axis i of a kernel:   Lᵢ ← β Lᵢ + (1 - β) gᵢ gᵢᵀ      gᵢ: g with axis i as rows, all others as columns
    every n updates:               Qᵢ ← the orthogonal part of Lᵢ Qᵢ (QR), in the order of its eigenvalues
    g' = g, and m' = m, in the bases Qᵢ
    m ← β₁ m + (1 - β₁) g                                          v ← β₂ v + (1 - β₂) g'²
    s = m' / (√v + ε), back in the first basis
    θ ← (θ - η √(1 - β₂ᵗ⁻¹) / (1 - β₁ᵗ⁻¹) s) (1 - η λ)
    ```

    A parameter's first gradient moves nothing: it only makes L, whose eigenvectors are the first bases. L and Q are
    those of the gradients before this one, as in the authors' implementation. State: m and v in the shape of θ, and for
    each axis of d elements two matrices of d × d; for a square matrix three times that of Adam. Vectors are trained
    without bases. Weight decay is taken after the step, as in the reference.

    The first bases are not reproducible where the first gradient has a repeated eigenvalue, as rectangular matrices
    have (0, of the longer side): rounding then decides about the basis, and after 50 updates weights differ by a
    hundredth. `initial_basis="identity"` begins with the axes themselves and is as reproducible as Adam.

    When to use it: if as few updates as possible are wanted, each of which takes long anyway.

    When not to use it: on kernels with long axes without a `max_precondition_dim` that excludes them (QR takes d³), or
    where a step of the model takes less time than its optimizer would.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        shampoo_beta: β in [0, 1), or a schedule; None for β₂.
        epsilon: ε >= 0, or a schedule.
        precondition_frequency: n >= 1.
        max_precondition_dim: Axes with more elements than this keep their own basis.
        initial_basis: `"gradient"`, the eigenvectors of the first L, or `"identity"`.
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
    model.compile(optimizer=ok.optimizers.SOAP(3e-3, max_precondition_dim=2048), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.003,
        beta_1: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.95,
        shampoo_beta: float | Schedule | None = None,
        epsilon: float | Schedule = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        initial_basis: str = "gradient",
        weight_decay: float | Schedule | None = 0.01,
        **common: Any,
    ):
        rule = SOAPRule(
            beta_1, beta_2, epsilon, shampoo_beta, precondition_frequency, max_precondition_dim, initial_basis
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@register(
    "optimizer",
    paper="Lin, Lowe, Dangel, Eschenhagen, Xu and Grosse, arXiv 2509.03378 (KL-SOAP)",
    parity="heavyball.KLSOAP, without the shift of its QR",
    cases=(
        {"learning_rate": 0.01, "max_precondition_dim": 3, "initial_basis": "identity"},
        {
            "learning_rate": 0.01,
            "beta_1": 0.9,
            "beta_2": 0.8,
            "shampoo_beta": 0.7,
            "epsilon": 1e-10,
            "precondition_frequency": 3,
            "max_precondition_dim": 4,
            "initial_basis": "identity",
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "precondition_frequency": Choice([1, 10, 50]),
        "weight_decay": Float(1e-4, 1e-1, log=True),
    },
)
class KLSOAP(Optimizer):
    """KL-SOAP: SOAP with the bases of a covariance of Kronecker form that is nearest by the KL divergence.

    ```text
    for each axis i of a kernel:   Lᵢ ← (1 - w) Lᵢ + w gᵢ (⊗ 1 / (dⱼ λⱼ)) gᵢᵀ      j: all other axes, g in their bases
                                   λᵢ = diag(Qᵢᵀ Lᵢ Qᵢ), at least ε                w = (1 - β) / (1 - βᵗ)
    ```

    All else is as in `SOAP`, which has Lᵢ ← β Lᵢ + (1 - β) gᵢ gᵢᵀ: what a gradient adds along one axis counts less
    where the other axes have large gradients anyway. dⱼ is the length of axis j. As in the reference, the first Lᵢ is
    gᵢ gᵢᵀ, and λ is that of the present L and Q; the paper also has a running mean of it. The reference takes
    this sum for matrices only and SOAP's for kernels with more axes; here these have the paper's form for tensors.
    Weight decay is taken after the step. State: that of `SOAP`.

    The first bases are as little reproducible as those of SOAP, and λ of a first gradient that does not have full rank
    is ε: `initial_basis="identity"` has neither.

    When to use it: where `SOAP` pays off: few updates are wanted, each of which takes long anyway.

    When not to use it: where `SOAP` is too slow already; it adds products with Q in every update.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        shampoo_beta: β in [0, 1), or a schedule; None for β₂.
        epsilon: ε > 0, or a schedule: that of Adam, and the least λ.
        precondition_frequency: n >= 1.
        max_precondition_dim: Axes with more elements than this keep their own basis, and have no λ.
        initial_basis: `"gradient"`, the eigenvectors of the first L, or `"identity"`.
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
    model.compile(optimizer=ok.optimizers.KLSOAP(3e-3, max_precondition_dim=2048), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.003,
        beta_1: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.95,
        shampoo_beta: float | Schedule | None = None,
        epsilon: float | Schedule = 1e-8,
        precondition_frequency: int = 10,
        max_precondition_dim: int = 10000,
        initial_basis: str = "gradient",
        weight_decay: float | Schedule | None = 0.01,
        **common: Any,
    ):
        rule = KLSOAPRule(
            beta_1, beta_2, epsilon, shampoo_beta, precondition_frequency, max_precondition_dim, initial_basis
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

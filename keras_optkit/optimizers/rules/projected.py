"""AdamP and SGDP: steps without the part that only makes scale-invariant weights longer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR, as_matrices, from_matrices
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, number
from keras_optkit.optimizers.rules.adam_family import moments
from keras_optkit.optimizers.slots import Initial, moment
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float


def _units(x: Tensor, h: Hyper) -> Tensor:
    """Kernels `(k, *shape)` as `(k, maps, inputs, outputs)`, and tables as `(k, rows, columns, 1)`."""
    k, *shape = x.shape
    if h.kernel is None:
        return ops.reshape(x, (k, shape[0], math.prod(shape[1:]), 1))
    matrices = as_matrices(x, h.kernel)
    n, rows, columns = matrices.shape
    return ops.reshape(matrices, (k, n // k, rows, columns))


def _from_units(units: Tensor, shape: Any, h: Hyper) -> Tensor:
    if h.kernel is None:
        return ops.reshape(units, shape)
    k, maps, rows, columns = units.shape
    return from_matrices(ops.reshape(units, (k * maps, rows, columns)), shape, h.kernel)


def projected(step: Tensor, u: Tensor, p: Tensor, h: Hyper, delta: Any, epsilon: Any) -> tuple[Tensor, Tensor]:
    """Steps without their component along the weights, for parameters whose gradients hardly have one, and for which.

    By unit, where the cosines of all units are below `delta / √n` with n the elements of each; otherwise for the
    parameter as a whole, if its cosine is.
    """
    found, near, (s, g, w) = None, None, (_units(x, h) for x in (step, u, p))
    for axes in ((2,), (1, 2, 3)):
        length, size = (ops.sqrt(ops.sum(x * x, axis=axes, keepdims=True)) for x in (w, g))
        cosine = ops.abs(ops.sum(w * g, axis=axes, keepdims=True))
        cosine = cosine / (ops.maximum(length, epsilon) * ops.maximum(size, epsilon))
        limit = delta / max(math.prod(w.shape[axis] for axis in axes), 1) ** 0.5
        small = ops.max(cosine, axis=(1, 2, 3), keepdims=True, initial=0.0) < limit
        direction = w / (length + epsilon)
        tangential = s - direction * ops.sum(direction * s, axis=axes, keepdims=True)
        if found is None:
            found, near = ops.where(small, tangential, s), small
        else:
            found, near = ops.where(near, found, ops.where(small, tangential, s)), ops.logical_or(near, small)
    return _from_units(found, p.shape, h), ops.reshape(near, (-1, *[1] * (len(p.shape) - 1)))


class ProjectedRule(Rule):
    """Base of rules that project steps; vectors are routed to the same rule without that."""

    layout = "whole"
    handles_decay = True
    epsilon: Value
    delta: Value
    decay_ratio: Value

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def projected(self, s: Tensor, u: Tensor, p: Tensor, h: Hyper) -> tuple[Tensor, Any]:
        """The step, and the factor on the decay."""
        s, near = projected(s, u, p, h, h(self.delta), h(self.epsilon))
        return s, ops.where(near, h(self.decay_ratio) * ops.ones_like(p), ops.ones_like(p))


class NotProjected:
    """Makes a rule of vectors of one that projects."""

    layout = "elementwise"

    def routes(self) -> Mapping[str, Rule]:
        return {}

    def route(self, w: Weight) -> str:
        return ""

    def projected(self, s: Tensor, u: Tensor, p: Tensor, h: Hyper) -> tuple[Tensor, Any]:
        return s, 1.0


@dataclass(frozen=True)
class AdamPRule(ProjectedRule):
    """`s = m̂ / (√v̂ + ε); θ ← θ - η Π(s) - η λ r θ`, with Π and r for weights whose gradients are orthogonal to them."""

    beta_1: Value = number(0.9, 0, 1, closed="left")
    beta_2: Value = number(0.999, 0, 1, closed="left")
    epsilon: Value = number(1e-8, closed="neither")
    delta: Value = number(0.1)
    decay_ratio: Value = number(0.1)
    nesterov: bool = flag(False)

    def routes(self) -> Mapping[str, Rule]:
        fields = (self.beta_1, self.beta_2, self.epsilon, self.delta, self.decay_ratio, self.nesterov)
        return {"vector": AdamPVectorRule(*fields)}

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, epsilon = h(self.beta_1), h(self.epsilon)
        m, v = moments(u, slots, beta_1, h(self.beta_2))
        mean = (beta_1 * m + (1 - beta_1) * u if self.nesterov else m) / h.bias_correction(self.beta_1)
        s = mean / (ops.sqrt(v / h.bias_correction(self.beta_2)) + epsilon)
        s, ratio = self.projected(s, u, p, h)
        return h.learning_rate * (s + h.weight_decay * ratio * p), {"m": m, "v": v}


@dataclass(frozen=True)
class AdamPVectorRule(NotProjected, AdamPRule):
    """The same without the projection."""


@register(
    "optimizer",
    paper="Heo, Chun, Oh, Han, Yun, Kim, Uh and Ha, arXiv 2006.08217 (AdamP), with the test by unit of its code",
    parity="pytorch_optimizer.AdamP",
    cases=(
        {"learning_rate": 0.01},
        {
            "learning_rate": 0.01,
            "beta_1": 0.8,
            "beta_2": 0.9,
            "epsilon": 1e-4,
            "delta": 2.0,
            "decay_ratio": 0.3,
            "nesterov": True,
            "weight_decay": 0.1,
        },
    ),
    space={
        "learning_rate": Float(1e-5, 1e-1, log=True),
        "beta_1": Choice([0.85, 0.9, 0.95]),
        "weight_decay": Float(1e-4, 1.0, log=True),
    },
)
class AdamP(Optimizer):
    """AdamP: AdamW whose steps do not lengthen weights that are followed by a normalisation.

    ```text
    s = m̂ / (√v̂ + ε)          m̂ and v̂ as in Adam;  nesterov: β₁ m + (1 - β₁) g instead of m
    if |cos(θ, g)| < δ / √n:   θ ← θ - η (s - (s · θ) θ / ‖θ‖²) - η λ r θ
    otherwise:                 θ ← θ - η s - η λ θ
    ```

    Where a normalisation follows, the scale of θ does not matter and g is orthogonal to θ. Momentum is not, so it makes
    θ longer and thereby the effective rate smaller. The step is therefore projected, and decay, which then acts on the
    effective rate only, is r times as strong. The test and the projection are by unit (output of a kernel, row of an
    embedding), where the cosines of all units pass, or else for the whole parameter; n is the number of elements of
    either. So it is in the authors' code; the paper has one test. Vectors (biases, scales) are updated by AdamW. m and
    v have the shape of θ and start at 0.

    When to use it: in place of `AdamW` in models with normalisation layers, whose weights would otherwise only grow.

    When not to use it: in models without normalisation, where it is AdamW with a test in each update.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε > 0, or a schedule; also the least norm.
        delta: δ >= 0, or a schedule: the threshold of the cosine.
        decay_ratio: r >= 0, or a schedule: factor on the decay of projected parameters.
        nesterov: Whether to look one step ahead.
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
    model.compile(optimizer=ok.optimizers.AdamP(1e-3, weight_decay=0.01), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        beta_1: float | Schedule = 0.9,
        beta_2: float | Schedule = 0.999,
        epsilon: float | Schedule = 1e-8,
        delta: float | Schedule = 0.1,
        decay_ratio: float | Schedule = 0.1,
        nesterov: bool = False,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = AdamPRule(beta_1, beta_2, epsilon, delta, decay_ratio, nesterov)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@dataclass(frozen=True)
class SGDPRule(ProjectedRule):
    """`v ← γ v + g; θ ← θ - η Π(v) - η λ r / (1 - γ) θ`, with Π and r as in AdamP."""

    momentum: Value = number(0.9, 0, 1, closed="left")
    nesterov: bool = flag(False)
    epsilon: Value = number(1e-8, closed="neither")
    delta: Value = number(0.1)
    decay_ratio: Value = number(0.1)

    def routes(self) -> Mapping[str, Rule]:
        return {"vector": SGDPVectorRule(self.momentum, self.nesterov, self.epsilon, self.delta, self.decay_ratio)}

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return {"v": moment()}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        gamma = h(self.momentum)
        v = gamma * slots["v"] + u
        s, ratio = self.projected(gamma * v + u if self.nesterov else v, u, p, h)
        return h.learning_rate * (s + h.weight_decay / (1 - gamma) * ratio * p), {"v": v}


@dataclass(frozen=True)
class SGDPVectorRule(NotProjected, SGDPRule):
    """The same without the projection."""


@register(
    "optimizer",
    paper="Heo, Chun, Oh, Han, Yun, Kim, Uh and Ha, arXiv 2006.08217 (SGDP), with the test by unit of its code",
    parity="pytorch_optimizer.SGDP",
    cases=(
        {"learning_rate": 0.01},
        {
            "learning_rate": 0.01,
            "momentum": 0.8,
            "nesterov": True,
            "epsilon": 1e-4,
            "delta": 2.0,
            "decay_ratio": 0.3,
            "weight_decay": 0.1,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1.0, log=True),
        "momentum": Choice([0.9, 0.95]),
        "weight_decay": Float(1e-6, 1e-2, log=True),
    },
)
class SGDP(Optimizer):
    """SGDP: SGD with momentum whose steps do not lengthen weights that are followed by a normalisation.

    ```text
    v ← γ v + g          s = v;  nesterov: g + γ v
    if |cos(θ, g)| < δ / √n:   θ ← θ - η (s - (s · θ) θ / ‖θ‖²) - η λ r / (1 - γ) θ
    otherwise:                 θ ← θ - η s - η λ / (1 - γ) θ
    ```

    Test and projection are those of `AdamP`; see there. v has the shape of θ and starts at 0. The learning rate is
    outside the velocity, as in torch. The decay is decoupled but divided by 1 - γ, as in the authors' code: so λ is
    that of an L2 penalty for SGD with momentum, which goes through the velocity.

    When to use it: in place of `SGD` with momentum in models with normalisation layers.

    When not to use it: in models without normalisation, where it is SGD with a test in each update.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        nesterov: Whether to look one step ahead.
        epsilon: The least norm, > 0, or a schedule.
        delta: δ >= 0, or a schedule: the threshold of the cosine.
        decay_ratio: r >= 0, or a schedule: factor on the decay of projected parameters.
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
    model.compile(optimizer=ok.optimizers.SGDP(0.1, nesterov=True, weight_decay=1e-5), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        momentum: float | Schedule = 0.9,
        nesterov: bool = False,
        epsilon: float | Schedule = 1e-8,
        delta: float | Schedule = 0.1,
        decay_ratio: float | Schedule = 0.1,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = SGDPRule(momentum, nesterov, epsilon, delta, decay_ratio)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

"""Optimizers whose steps are scaled to the size of each parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, flag, is_dynamic, number
from keras_optkit.optimizers.slots import Initial, moment, shaped
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

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

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

    When to use it: for batches of many thousands, where `AdamW` no longer trains well.

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


@dataclass(frozen=True)
class LARSVectorRule(Rule):
    """`v ← γ v + η (g + λ θ); θ ← θ - v`."""

    layout = "elementwise"
    handles_decay = True
    momentum: Value = number(0.9, 0, 1, closed="left")
    nesterov: bool = flag(False)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"v": moment()} if is_dynamic(self.momentum) or self.momentum else {}

    def moved(self, u: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        """The step for the decayed gradient."""
        u = h.learning_rate * u
        if "v" not in slots:
            return u, {}
        v = h(self.momentum) * slots["v"] + u
        return (h(self.momentum) * v + u if self.nesterov else v), {"v": v}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        return self.moved(u + h.weight_decay * p, slots, h)


@dataclass(frozen=True)
class LARSRule(LARSVectorRule):
    """`v ← γ v + η κ ‖θ‖ / (‖g‖ + λ ‖θ‖) (g + λ θ); θ ← θ - v`."""

    layout = "per_parameter"
    trust_coefficient: Value = number(0.01)

    def routes(self) -> Mapping[str, Rule]:
        return {"vector": LARSVectorRule(self.momentum, self.nesterov)}

    def route(self, w: Weight) -> str:
        return "vector" if w.role == VECTOR else ""

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        size, length = ops.sqrt(h.sum(p * p)), ops.sqrt(h.sum(u * u))
        length = length + h.weight_decay * size
        ratio = h(self.trust_coefficient) * ops.divide_no_nan(size, length)
        ratio = ops.where(size * length > 0, ratio, ops.ones_like(size))
        return self.moved(ratio * (u + h.weight_decay * p), slots, h)


@register(
    "optimizer",
    paper="You, Gitman and Ginsburg, arXiv 1708.03888, algorithm 1",
    parity="pytorch_optimizer.LARS",
    cases=(
        {"learning_rate": 0.1, "trust_coefficient": 0.1},
        {"learning_rate": 0.01, "trust_coefficient": 0.5, "momentum": 0.8, "nesterov": True},
        {"learning_rate": 0.1, "momentum": 0.0, "trust_coefficient": 0.001},
    ),
    space={
        "learning_rate": Float(1e-2, 1e1, log=True),
        "momentum": Choice([0.9, 0.95]),
        "weight_decay": Float(1e-6, 1e-3, log=True),
    },
)
class LARS(Optimizer):
    """LARS: momentum SGD whose steps are scaled to the norm of each kernel, for very large batches.

    ```text
    κ' = κ ‖θ‖ / (‖g‖ + λ ‖θ‖)            1 where ‖θ‖ or the denominator is 0
    v ← γ v + η κ' (g + λ θ)              vectors:  v ← γ v + η (g + λ θ)
    θ ← θ - v                             nesterov: θ ← θ - γ v - η κ' (g + λ θ)
    ```

    The norms are over a whole parameter; v has the shape of θ and starts at 0. The weight decay is inside the momentum
    and the ratio, as in the paper. Biases and the scales and shifts of normalisations are not scaled, as is usual since
    large-batch ResNets: their norms start at or near 0, and steps relative to them would be far too short. The learning
    rate is inside the momentum, as in the paper; timm and pytorch-optimizer have it outside, which differs only when
    the rate changes. optax divides by ‖g + λ θ‖ instead.

    When to use it: for convolutional networks with batches of many thousands, where SGD no longer trains well.

    When not to use it: with batches that SGD trains well with. For transformers, take `LAMB`. A kernel that is
    initialised with zeros takes its first step with the full η. κ is 0.001 in the paper, which goes with large η, tuned
    for large batches; the defaults here are for a first try, in which vectors must not move too far either.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. It is also the rate of vectors, in plain SGD.
        momentum: γ in [0, 1), or a schedule.
        trust_coefficient: κ >= 0, or a schedule: η κ is the length of a step relative to that of θ.
        nesterov: Whether to use Nesterov momentum.
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
    model.compile(optimizer=ok.optimizers.LARS(0.1, weight_decay=1e-4), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.1,
        momentum: float | Schedule = 0.9,
        trust_coefficient: float | Schedule = 0.01,
        nesterov: bool = False,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(
            learning_rate, LARSRule(momentum, nesterov, trust_coefficient), weight_decay=weight_decay, **common
        )


@dataclass(frozen=True)
class NovoGradRule(Rule):
    """`v ← β₂ v + (1 - β₂) ‖g‖²; m ← β₁ m + g / (√v + ε) + λ θ; θ ← θ - η m`."""

    layout = "whole"
    uses_first = True
    handles_decay = True
    beta_1: Value = number(0.95, 0, 1, closed="left")
    beta_2: Value = number(0.98, 0, 1, closed="left")
    epsilon: Value = number(1e-8)
    grad_averaging: bool = flag(False)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": shaped()}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_1, beta_2, square = h(self.beta_1), h(self.beta_2), h.sum(u * u)
        v = beta_2 * ops.reshape(slots["v"], square.shape) + (1 - beta_2) * square
        v = ops.where(h.first, square, v)
        r = u / (ops.sqrt(v) + h(self.epsilon)) + h.weight_decay * p
        if self.grad_averaging:
            r = ops.where(h.first, r, (1 - beta_1) * r)
        m = beta_1 * slots["m"] + r
        return h.learning_rate * m, {"m": m, "v": ops.reshape(v, slots["v"].shape)}


@register(
    "optimizer",
    paper="Ginsburg et al., arXiv 1905.11286",
    parity="pytorch_optimizer.NovoGrad",
    cases=(
        {"learning_rate": 0.01},
        {"learning_rate": 0.1, "beta_1": 0.9, "beta_2": 0.5, "epsilon": 1e-3, "grad_averaging": True},
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "beta_1": Choice([0.9, 0.95]),
        "beta_2": Choice([0.25, 0.98]),
        "weight_decay": Float(1e-4, 1e-2, log=True),
    },
)
class NovoGrad(Optimizer):
    """NovoGrad: momentum of gradients that are divided by their norm, with one second moment for each parameter.

    ```text
    v ← β₂ v + (1 - β₂) ‖g‖²              in a parameter's first update  v ← ‖g‖²
    m ← β₁ m + g / (√v + ε) + λ θ         grad_averaging: later than that, times 1 - β₁ what is added to m
    θ ← θ - η m
    ```

    The norm is over a whole parameter, and v is a single number for it; m has the shape of θ and starts at 0. So the
    state is half of Adam's. The weight decay is inside the momentum, as in the paper. There is no bias correction: v
    starts with the first gradient.

    When to use it: for large batches where Adam's state is too large: it has half of it.

    When not to use it: where the elements of a parameter have gradients of very different sizes, such as embeddings.

    Args:
        learning_rate: η >= 0, or a schedule of the update count. Without `grad_averaging`, the norm of a step is about
            η / (1 - β₁) while gradients keep their size.
        beta_1: β₁ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        epsilon: ε >= 0, or a schedule.
        grad_averaging: Whether m is a running mean instead of a sum.
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
    model.compile(optimizer=ok.optimizers.NovoGrad(0.01, weight_decay=0.001), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.01,
        beta_1: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.98,
        epsilon: float | Schedule = 1e-8,
        grad_averaging: bool = False,
        weight_decay: float | Schedule | None = None,
        **common: Any,
    ):
        rule = NovoGradRule(beta_1, beta_2, epsilon, grad_averaging)
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)

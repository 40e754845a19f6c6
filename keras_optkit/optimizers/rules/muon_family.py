"""Relatives of Muon: momentum whose matrices are orthogonalized, with a second moment, or under another norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KERNEL, TABLE, VECTOR, as_matrices, by_shape, from_matrices, matrix_shape
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Weight, count, flag, number
from keras_optkit.optimizers.rules.muon import (
    KELLER_JORDAN,
    MuonRule,
    orthogonalized,
    warn_of_unknown_output,
    widening,
)
from keras_optkit.optimizers.slots import Initial, moment, shaped
from keras_optkit.registry import register
from keras_optkit.space import Choice, Float

#: The least norm that Scion divides a matrix by before it is orthogonalized.
SMALLEST_NORM = 1e-7


def _resized(x: Tensor, size: Any, epsilon: Any) -> Tensor:
    """Matrices with a Frobenius norm of `size`."""
    return x * (size / (_norm(x) + epsilon))


def _norm(x: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(x * x, axis=(1, 2), keepdims=True))


@dataclass(frozen=True)
class NorMuonRule(MuonRule):
    """Muon's O, of which each unit is divided by the root of `v ← β₂ v + (1 - β₂) mean(o²)`."""

    beta_2: Value = number(0.95, 0, 1, closed="left")
    epsilon_2: Value = number(1e-10)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        maps, _, units = matrix_shape(w.shape, w.axes)
        return {"m": moment(), "v": shaped(maps, units)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_2, epsilon = h(self.beta_2), h(self.epsilon_2)
        x, m = self.looked_ahead(u, slots, h)
        o = self.orthogonal(x, h)
        n, rows, columns = o.shape
        squares = ops.sum(o * o, axis=1) / max(rows, 1)
        v = beta_2 * slots["v"] + (1 - beta_2) * ops.reshape(squares, slots["v"].shape)
        normal = o / (ops.sqrt(ops.reshape(v, (n, 1, columns))) + epsilon)
        size = 0.2 * (rows * columns) ** 0.5 if self.scaling == "moonlight" else widening(rows, columns) * _norm(o)
        step = h.learning_rate * _resized(normal, size, epsilon)
        return from_matrices(step, u.shape, h.kernel), {"m": m, "v": v}


@dataclass(frozen=True)
class AdaMuonRule(MuonRule):
    """Muon's O, of the signs of its momentum, divided by the root of `v ← β₂ v + (1 - β₂) O²`."""

    beta_2: Value = number(0.95, 0, 1, closed="left")
    epsilon_2: Value = number(1e-8)
    sign_momentum: bool = flag(True)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment(), "v": moment(signed=False)}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        beta_2, epsilon = h(self.beta_2), h(self.epsilon_2)
        x, m = self.looked_ahead(u, slots, h)
        o = self.orthogonal(ops.sign(x) if self.sign_momentum else x, h)
        _, rows, columns = o.shape
        v = beta_2 * slots["v"] + (1 - beta_2) * from_matrices(o * o, u.shape, h.kernel)
        adapted = o / (ops.sqrt(as_matrices(v, h.kernel)) + epsilon)
        step = h.learning_rate * _resized(adapted, 0.2 * (rows * columns) ** 0.5, epsilon)
        return from_matrices(step, u.shape, h.kernel), {"m": m, "v": v}


@dataclass(frozen=True)
class ScionVectorRule(Rule):
    """`m ← γ m + (1 - γ) g; θ ← θ - η ρ lmo(m)`, and with the constraint `- η θ`; lmo for vectors is `m / rms(m)`."""

    layout = "per_parameter"
    momentum: Value = number(0.9, 0, 1, closed="left")
    radius: Value = number(1.0, 0, closed="neither")
    constrained: bool = flag(False)
    epsilon: Value = number(1e-8)

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        return {"m": moment()}

    def lmo(self, m: Tensor, h: Hyper) -> Tensor:
        """The point of the unit ball that goes furthest along m."""
        return m / (ops.sqrt(h.mean(m * m)) + h(self.epsilon))

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        gamma = h(self.momentum)
        m = gamma * slots["m"] + (1 - gamma) * u
        direction = h(self.radius) * self.lmo(m, h)
        return h.learning_rate * (direction + p if self.constrained else direction), {"m": m}


@dataclass(frozen=True)
class ScionSignRule(ScionVectorRule):
    """The same with `sign(m) / inputs`; the rows of an embedding have one input."""

    layout = "whole"

    def lmo(self, m: Tensor, h: Hyper) -> Tensor:
        inputs = 1 if h.kernel is None else matrix_shape(m.shape[1:], h.kernel)[1]
        return ops.sign(m) / max(inputs, 1)


@dataclass(frozen=True)
class ScionRule(ScionVectorRule):
    """The same with m orthogonalized, times √(outputs / inputs)."""

    layout = "whole"
    output_radius: Value = number(1.0, 0, closed="neither")
    ns_steps: int = count(5)
    sign_embeddings: bool = flag(True)
    sign_output: bool = flag(True)

    def routes(self) -> Mapping[str, Rule]:
        common = self.momentum, self.radius, self.constrained, self.epsilon
        sign = ScionSignRule(self.momentum, self.output_radius, self.constrained)
        return {"vector": ScionVectorRule(*common), "sign": sign}

    def route(self, w: Weight) -> str:
        if w.role == KERNEL and w.output is None and self.sign_output:
            warn_of_unknown_output(self, "moves by signs", "sign_output")
        by_sign = self.sign_embeddings if w.role == TABLE else w.output and self.sign_output
        return "vector" if w.role == VECTOR else "sign" if by_sign else ""

    def lmo(self, m: Tensor, h: Hyper) -> Tensor:
        axes = h.kernel or by_shape(len(m.shape) - 1)
        matrices = as_matrices(m, axes)
        _, rows, columns = matrices.shape
        window = 1
        for axis in axes.inputs:
            window *= m.shape[axis + 1] if axis in axes.outputs else 1
        scale = (columns / max(rows // max(window, 1), 1)) ** 0.5 / max(window, 1)
        done = orthogonalized(matrices, [KELLER_JORDAN] * self.ns_steps, SMALLEST_NORM)
        return scale * from_matrices(done, m.shape, axes)


@register(
    "optimizer",
    paper="Li, Liu, Liang, Chen and Zhao, arXiv 2510.05491, algorithm 1",
    parity="pytorch_optimizer.NorMuon, without its rounding to bfloat16",
    cases=(
        {"learning_rate": 0.01, "exclude_output": False},
        {
            "learning_rate": 0.02,
            "momentum": 0.9,
            "beta_2": 0.8,
            "nesterov": False,
            "scaling": "keller_jordan",
            "ns_steps": 3,
            "epsilon_2": 1e-4,
            "adam_lr_ratio": 0.5,
            "exclude_output": False,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "momentum": Choice([0.9, 0.95, 0.98]),
        "beta_2": Choice([0.9, 0.95]),
        "weight_decay": Float(1e-3, 1.0, log=True),
    },
)
class NorMuon(Optimizer):
    """NorMuon: Muon whose units take steps of about the same length; AdamW for all parameters that are not matrices.

    ```text
    m ← γ m + (1 - γ) g
    O = orthogonalized γ m + (1 - γ) g  (nesterov), or m
    for each unit j, an output:   vⱼ ← β₂ vⱼ + (1 - β₂) mean over inputs of O²
    Ô = O / (√v + ε₂)
    θ ← θ - η s Ô / (‖Ô‖ + ε₂)    s = 0.2 √(rows columns)               ("moonlight")
                                  s = ‖O‖ √max(1, columns / rows)       ("keller_jordan")
    ```

    m has the shape of θ, and v one element for each output, both 0 at first: little more than half of Adam's state. The
    paper's rows are outputs, which are columns in Keras. "moonlight" is the paper's scale, with which the root mean
    square of a step is 0.2 η, so that rates and decays of AdamW are right; "keller_jordan" is that of the authors'
    code. Only the code looks ahead (`nesterov`), not the paper. Which parameters are orthogonalized, as which matrices,
    and what is trained by AdamW is as in `Muon`.

    When not to use it: for models of few or small matrices, or to fine-tune weights that Adam has trained.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        nesterov: Whether to look one step ahead.
        scaling: `"moonlight"` or `"keller_jordan"`, s above.
        coefficients: Of the iterations, `"keller_jordan"` or `"polar_express"`; see `Muon`.
        ns_steps: How many iterations, at least 1.
        epsilon: The least norm that a matrix is divided by before it is orthogonalized.
        epsilon_2: ε₂ >= 0, or a schedule.
        adam_lr_ratio: Factor >= 0 on the learning rate of AdamW.
        adam_beta_1: β₁ of AdamW in [0, 1), or a schedule.
        adam_beta_2: β₂ of AdamW in [0, 1), or a schedule.
        adam_epsilon: ε of AdamW >= 0, or a schedule.
        exclude_layers: Regular expressions; kernels whose path matches one are trained by AdamW.
        exclude_embeddings: Whether embeddings are trained by AdamW.
        exclude_output: Whether the kernel of the last layer is trained by AdamW.
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
    model.compile(optimizer=ok.optimizers.NorMuon(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        momentum: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.95,
        nesterov: bool = True,
        scaling: str = "moonlight",
        coefficients: str = "keller_jordan",
        ns_steps: int = 5,
        epsilon: float | Schedule = 1e-7,
        epsilon_2: float | Schedule = 1e-10,
        adam_lr_ratio: float = 1.0,
        adam_beta_1: float | Schedule = 0.9,
        adam_beta_2: float | Schedule = 0.95,
        adam_epsilon: float | Schedule = 1e-8,
        exclude_layers: Sequence[str] | None = None,
        exclude_embeddings: bool = True,
        exclude_output: bool = True,
        weight_decay: float | Schedule | None = 0.1,
        **common: Any,
    ):
        rule = NorMuonRule(
            momentum=momentum,
            nesterov=nesterov,
            scaling=scaling,
            coefficients=coefficients,
            ns_steps=ns_steps,
            epsilon=epsilon,
            adam_lr_ratio=adam_lr_ratio,
            adam_beta_1=adam_beta_1,
            adam_beta_2=adam_beta_2,
            adam_epsilon=adam_epsilon,
            exclude_layers=exclude_layers,  # type: ignore[arg-type]
            exclude_embeddings=exclude_embeddings,
            exclude_output=exclude_output,
            beta_2=beta_2,
            epsilon_2=epsilon_2,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@register(
    "optimizer",
    paper="Si, Zhang and Shen, arXiv 2507.11005, algorithm 1",
    parity="pytorch_optimizer.AdaMuon, without its rounding to bfloat16 and with the signs of the paper",
    cases=(
        {"learning_rate": 0.01, "exclude_output": False},
        {
            "learning_rate": 0.02,
            "momentum": 0.9,
            "beta_2": 0.8,
            "nesterov": True,
            "sign_momentum": False,
            "ns_steps": 3,
            "epsilon_2": 1e-4,
            "adam_lr_ratio": 0.5,
            "exclude_output": False,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "momentum": Choice([0.9, 0.95, 0.98]),
        "beta_2": Choice([0.95, 0.99]),
        "weight_decay": Float(1e-3, 1.0, log=True),
    },
)
class AdaMuon(Optimizer):
    """AdaMuon: Muon with a second moment for each element; AdamW for all parameters that are not matrices.

    ```text
    m ← γ m + (1 - γ) g
    O = orthogonalized sign(m)
    v ← β₂ v + (1 - β₂) O²
    Ô = O / (√v + ε₂)
    θ ← θ - η 0.2 √(rows columns) Ô / (‖Ô‖ + ε₂)
    ```

    m and v have the shape of θ and start at 0, as in Adam. The root mean square of a step is 0.2 η, so that rates and
    decays of AdamW are right. The paper has one β for m and v. Its first version, and timm, orthogonalize m and not its
    signs (`sign_momentum=False`); there the authors' code looks ahead (`nesterov`) and corrects the bias of v, which
    the division by ‖Ô‖ takes out again. Norms are over each matrix. Which parameters are orthogonalized, as which
    matrices, and what is trained by AdamW is as in `Muon`.

    When not to use it: for models of few or small matrices; where only Muon's smaller state fits into memory.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        beta_2: β₂ in [0, 1), or a schedule.
        sign_momentum: Whether the signs of m are orthogonalized, or m itself.
        nesterov: Whether γ m + (1 - γ) g stands for m in O.
        coefficients: Of the iterations, `"keller_jordan"` or `"polar_express"`; see `Muon`.
        ns_steps: How many iterations, at least 1.
        epsilon: The least norm that a matrix is divided by before it is orthogonalized.
        epsilon_2: ε₂ >= 0, or a schedule.
        adam_lr_ratio: Factor >= 0 on the learning rate of AdamW.
        adam_beta_1: β₁ of AdamW in [0, 1), or a schedule.
        adam_beta_2: β₂ of AdamW in [0, 1), or a schedule.
        adam_epsilon: ε of AdamW >= 0, or a schedule.
        exclude_layers: Regular expressions; kernels whose path matches one are trained by AdamW.
        exclude_embeddings: Whether embeddings are trained by AdamW.
        exclude_output: Whether the kernel of the last layer is trained by AdamW.
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
    model.compile(optimizer=ok.optimizers.AdaMuon(1e-3), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        momentum: float | Schedule = 0.95,
        beta_2: float | Schedule = 0.95,
        sign_momentum: bool = True,
        nesterov: bool = False,
        coefficients: str = "keller_jordan",
        ns_steps: int = 5,
        epsilon: float | Schedule = 1e-7,
        epsilon_2: float | Schedule = 1e-8,
        adam_lr_ratio: float = 1.0,
        adam_beta_1: float | Schedule = 0.9,
        adam_beta_2: float | Schedule = 0.95,
        adam_epsilon: float | Schedule = 1e-8,
        exclude_layers: Sequence[str] | None = None,
        exclude_embeddings: bool = True,
        exclude_output: bool = True,
        weight_decay: float | Schedule | None = 0.1,
        **common: Any,
    ):
        rule = AdaMuonRule(
            momentum=momentum,
            nesterov=nesterov,
            sign_momentum=sign_momentum,
            coefficients=coefficients,
            ns_steps=ns_steps,
            epsilon=epsilon,
            adam_lr_ratio=adam_lr_ratio,
            adam_beta_1=adam_beta_1,
            adam_beta_2=adam_beta_2,
            adam_epsilon=adam_epsilon,
            exclude_layers=exclude_layers,  # type: ignore[arg-type]
            exclude_embeddings=exclude_embeddings,
            exclude_output=exclude_output,
            beta_2=beta_2,
            epsilon_2=epsilon_2,
        )
        super().__init__(learning_rate, rule, weight_decay=weight_decay, **common)


@register(
    "optimizer",
    paper="Pethick, Xie, Antonakopoulos, Zhu, Silveti-Falls and Cevher, arXiv 2502.07529, algorithms 1 and 2",
    parity="pytorch_optimizer.SCION, without its rounding to bfloat16",
    cases=(
        {"learning_rate": 0.01, "sign_output": False},
        {
            "learning_rate": 0.02,
            "momentum": 0.5,
            "constrained": True,
            "radius": 3.0,
            "output_radius": 16.0,
            "ns_steps": 3,
            "epsilon": 1e-4,
            "sign_embeddings": False,
            "sign_output": False,
        },
    ),
    space={
        "learning_rate": Float(1e-4, 1e-1, log=True),
        "momentum": Choice([0.5, 0.9, 0.95]),
        "radius": Float(1.0, 100.0, log=True),
    },
)
class Scion(Optimizer):
    """Scion: momentum whose steps have a fixed size in a norm that suits the layer.

    ```text
    m ← γ m + (1 - γ) g
    θ ← θ - η ρ lmo(m)                      and with the constraint  θ ← (1 - η) θ - η ρ lmo(m)
    kernels           lmo(m) = √(outputs / inputs) orthogonalized m, over the window of a convolution
    the last kernel   lmo(m) = sign(m) / inputs
    embeddings        lmo(m) = sign(m)
    vectors           lmo(m) = m / (rms(m) + ε)
    ```

    m has the shape of θ and starts at 0: half of Adam's state, and there is no AdamW beside it. lmo(m) is the point of
    the unit ball of a norm that goes furthest along m: the spectral norm for hidden layers, the largest element for the
    first and the last one. ρ is `radius`, and `output_radius` for what moves by signs. The paper's momentum is 1 - γ.

    With `constrained`, weights stay in the balls of radius ρ if they start there, and weight decay makes these smaller:
    ρ / (1 + λ). The reference ignores it there. The authors take radii of 1 (MLP, last layer 1024), 8 (CNN, last layer
    128) and 50 (transformer, last layer and embeddings 3000). Kernels are seen as the same matrices as in `Muon`; the
    number of a convolution's inputs does not count its window, by whose size lmo(m) is divided. Weights that start
    outside the balls (the paper has an initialization of its own) are drawn into them at the rate η.

    When not to use it: with a rate that was tuned for Adam; with the constraint for fine-tuning, since it pulls all
    weights to 0.

    Args:
        learning_rate: η >= 0, or a schedule of the update count.
        momentum: γ in [0, 1), or a schedule.
        constrained: Whether the weights are kept in the ball.
        radius: ρ > 0, or a schedule.
        output_radius: ρ for the kernel of the last layer and for embeddings.
        ns_steps: How many iterations orthogonalize a matrix, at least 1; with the coefficients of Keller Jordan.
        epsilon: ε >= 0, or a schedule.
        sign_embeddings: Whether embeddings move by signs, or as kernels do.
        sign_output: Whether the kernel of the last layer moves by signs, or as other kernels do. Where the optimizer
            does not know the model, a warning says so; call `optimizer.build(model)`.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.Scion(0.01, output_radius=16.0), loss="mse")
    ```
    """

    def __init__(
        self,
        learning_rate: float | Schedule = 0.001,
        momentum: float | Schedule = 0.9,
        constrained: bool = False,
        radius: float | Schedule = 1.0,
        output_radius: float | Schedule = 1.0,
        ns_steps: int = 5,
        epsilon: float | Schedule = 1e-8,
        sign_embeddings: bool = True,
        sign_output: bool = True,
        **common: Any,
    ):
        rule = ScionRule(momentum, radius, constrained, epsilon, output_radius, ns_steps, sign_embeddings, sign_output)
        super().__init__(learning_rate, rule, **common)

"""Sharpness-aware minimization: the gradient where the loss is highest nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import VECTOR
from keras_optkit.optimizers.around import Around, inner_rule
from keras_optkit.optimizers.inner import Inner
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, Wrapper, flag, number
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import register
from keras_optkit.space import Choice


@dataclass(frozen=True)
class Ascent(Transform):
    """`ε = ρ g / ‖g‖`, or, adaptive, `ε = ρ θ² g / ‖|θ| g‖`, with the norm over all parameters."""

    rho: Value = number(0.05)
    adaptive: bool = flag(False)

    def scale(self, p: Tensor, h: Hyper) -> Any:
        """T in `ε = ρ T² g / ‖T g‖`."""
        return ops.abs(p) if self.adaptive else 1.0

    def radius(self, h: Hyper) -> Any:
        """The present value of ρ."""
        return h(self.rho)

    def contribute(self, u: Tensor, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return {"squares": ops.square(self.scale(p, h) * u)}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        norm, scale = ops.cast(ops.sqrt(h.totals["squares"]), u.dtype), self.scale(p, h)
        return self.radius(h) / (norm + 1e-12) * (scale * (scale * u))


@dataclass(frozen=True)
class SAMRule(Wrapper):
    """The inner rule, with the gradient at `θ + ε`."""

    inner_rule: Rule = inner_rule()
    rho: Value = number(0.05)
    adaptive: bool = flag(False)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner_rule.needs | {"second_gradient"}

    @property
    def handles_decay(self) -> bool:  # type: ignore[override]
        return self.inner_rule.handles_decay

    def perturbation(self) -> Transform:
        return Ascent(self.rho, self.adaptive)

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        return self.inner_rule.update(u, slots, p, h)


@register(
    "optimizer",
    paper="Foret, Kleiner, Mobahi and Neyshabur, arXiv 2010.01412, algorithm 1 (adaptive: Kwon et al., 2102.11600)",
    parity="pytorch_optimizer.SAM",
    cases=(
        {"inner": {"class_name": "SGD", "config": {"momentum": 0.9}}, "learning_rate": 0.01},
        {"inner": {"class_name": "Adam", "config": {}}, "learning_rate": 0.01, "rho": 0.5, "adaptive": True},
    ),
    space={"rho": Choice([0.02, 0.05, 0.1, 0.2])},
)
class SAM(Around):
    """SAM: minimises the largest loss in a neighbourhood of the weights, so that it ends in flat minima.

    ```text
    ε = ρ g / ‖g‖,  g = ∇L(θ)                            the norm is that of all parameters together
    adaptive (ASAM):  ε = ρ θ² g / ‖|θ| g‖               the neighbourhood is relative to each weight
    θ ← θ - (step of the inner optimizer with ∇L(θ + ε), decay of θ included)
    ```

    Each training step computes the gradient twice, on the same batch, and takes twice as long. `fit` and
    `train_on_batch` do so, also with a `train_step` of your own as long as that makes one update: it is run twice, and
    what it does to the weights is the second run's. Logs and metrics are those at θ; so are the batch statistics of
    `BatchNormalization`, as the paper's authors recommend. Both runs draw the same random numbers from the layers'
    seeds, so that dropout is the same. What Keras does not track happens twice in a step: a `tf.Variable` or a Python
    counter that `train_step` counts, and what `tf.random` draws. A metric that is updated after the update is that of
    the weights before it. An update inside `tf.cond` is refused. In a loop of your own, with TensorFlow:

    ```python
    import keras
    import tensorflow as tf

    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    optimizer = ok.optimizers.SAM(ok.optimizers.SGD(0.1))
    x, variables = tf.ones((8, 4)), model.trainable_variables


    def gradient():
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, variables)


    with optimizer.perturbed(gradient(), variables):
        second = gradient()
    optimizer.apply(second, variables)
    ```

    Everything around the rule sees the second gradient: clipping, `transforms`, `skip_nonfinite`, accumulation. With
    accumulation each micro-batch has a perturbation of its own, as with m-sharpness in the paper; over the replicas of
    a strategy it is that of the global batch. Parameters of a group with another rule are neither moved nor counted
    in the norm; `SAM` can be the rule of a group. The other settings of the inner optimizer are taken over, as in
    `Lookahead`. The perturbation needs a copy of the weights during the step, and no state.

    The factor `θ²` of the adaptive form is applied to all parameters, as in the parity reference. `ASAM` is that of the
    authors, who add 0.01 to |θ| of kernels and leave other parameters as in plain SAM.

    When to use it: if test accuracy counts more than time, for a model that overfits; each step takes about twice as
    long.

    When not to use it: where a step must not cost twice as much; with weights in half precision without
    `master_weights`, which ρ is too small to move; for a model that is trained by several optimizers, which is refused.
    On JAX, state without a gradient that a `train_step` of your own changes after the update, such as the weights of a
    teacher, is that of the first run; on TensorFlow that of the second.

    Args:
        inner: An optimizer of this package that has not been used yet, its name, or its config; see `Lookahead`.
        rho: ρ >= 0, or a schedule: how far the weights are moved. 0.05 is the paper's; `adaptive` wants values about
            ten times as large. With 0 it is the inner optimizer.
        adaptive: Whether the neighbourhood is that of ASAM.
        learning_rate: That of the inner optimizer if None; otherwise as in every optimizer.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range, an `inner` that is unknown, used already or averages by itself, or a
            keyword that is given twice with different values; in `apply`, if no gradient was given to `perturbed`.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.SAM(ok.optimizers.SGD(0.1, momentum=0.9), rho=0.05), loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "AdamW",
        rho: float | Schedule = 0.05,
        adaptive: bool = False,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(inner, learning_rate, lambda rule: SAMRule(rule, rho, adaptive), **common)


@dataclass(frozen=True)
class KernelAscent(Ascent):
    """`ε = ρ T² g / ‖T g‖` with `T = |θ| + η` for kernels and embeddings, and T = 1 for other parameters."""

    layout = "whole"
    eta: Value = number(0.01)

    def scale(self, p: Tensor, h: Hyper) -> Any:
        return 1.0 if h.role == VECTOR else ops.abs(p) + h(self.eta)


@dataclass(frozen=True)
class ASAMRule(SAMRule):
    """The inner rule, with the gradient at `θ + ε`, where ε is relative to the weights of kernels."""

    adaptive: bool = flag(True)
    eta: Value = number(0.01)

    def perturbation(self) -> Transform:
        return KernelAscent(self.rho, self.adaptive, self.eta)


@register(
    "optimizer",
    paper="Kwon, Kim, Park and Choi, arXiv 2102.11600, algorithm 1, with the element-wise operator",
    parity="pytorch_optimizer.SAM (adaptive for kernels; eta=0)",
    cases=(
        {"inner": {"class_name": "SGD", "config": {"momentum": 0.9}}, "learning_rate": 0.01},
        {"inner": {"class_name": "Adam", "config": {}}, "learning_rate": 0.01, "rho": 0.3, "eta": 0.1},
    ),
    space={"rho": Choice([0.2, 0.5, 1.0, 2.0])},
)
class ASAM(Around):
    """ASAM: SAM in a neighbourhood that is relative to each weight, so that rescaling layers does not change it.

    ```text
    ε = ρ T² g / ‖T g‖,  g = ∇L(θ)         the norm is that of all parameters together
    T = |θ| + η    for kernels and embeddings
    T = 1          for biases, and the scales and shifts of normalisations
    θ ← θ - (step of the inner optimizer with ∇L(θ + ε), decay of θ included)
    ```

    In everything else it is `SAM`. There, `adaptive=True` has `T = |θ|` for all parameters, which is what
    pytorch_optimizer calls adaptive. η and T are those of the authors' code, except that it counts the scales of
    normalisations among the weights. The paper's other operator, a norm for each filter, is not here.

    When to use it: as `SAM`, for layers whose weights differ much in size.

    When not to use it: as `SAM`.

    Args:
        inner: An optimizer of this package that has not been used yet, its name, or its config; see `Lookahead`.
        rho: ρ >= 0, or a schedule. The paper has 0.5 for CIFAR-10 and 1 for CIFAR-100.
        eta: η >= 0, or a schedule: how far weights of 0 are moved.
        learning_rate: That of the inner optimizer if None; otherwise as in every optimizer.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: As `SAM`.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.ASAM(ok.optimizers.SGD(0.1, momentum=0.9), rho=0.5), loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "AdamW",
        rho: float | Schedule = 0.5,
        eta: float | Schedule = 0.01,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        super().__init__(inner, learning_rate, lambda rule: ASAMRule(rule, rho, eta=eta), **common)


@dataclass(frozen=True)
class TiedAscent(Ascent):
    """SAM's, with a radius that is a linear function of the learning rate."""

    rho_min: Value = number(0.0)
    max_learning_rate: float | None = number(None, fixed=True, optional=True)
    min_learning_rate: float = number(0.0, fixed=True)

    def radius(self, h: Hyper) -> Any:
        if self.max_learning_rate is None:
            return h(self.rho)
        share = (h.base_rate - self.min_learning_rate) / (self.max_learning_rate - self.min_learning_rate)
        return h(self.rho_min) + (h(self.rho) - h(self.rho_min)) * share


@dataclass(frozen=True)
class SurrogateGap(Transform):
    """`g₂ - α (g₁ - (g₁·g₂ / g₂·g₂) g₂)`, where g₁ is the first gradient and the products are over all parameters."""

    alpha: Value = number(0.4)

    def contribute(self, u: Tensor, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return {"product": h.gradient * u, "squares": ops.square(u)}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        along = ops.cast(ops.divide_no_nan(h.totals["product"], h.totals["squares"]), u.dtype)
        return u - h(self.alpha) * (h.gradient - along * u)


@dataclass(frozen=True)
class GSAMRule(SAMRule):
    """The inner rule, with a gradient made of those at θ and at `θ + ε`."""

    alpha: Value = number(0.4)
    rho_min: Value = number(0.0)
    max_learning_rate: float | None = number(None, fixed=True, optional=True)
    min_learning_rate: float = number(0.0, fixed=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        high, low = self.max_learning_rate, self.min_learning_rate
        if high is not None and high <= low:
            raise ValueError(f"max_learning_rate must be > min_learning_rate={low!r}, or None, got {high!r}.")

    def perturbation(self) -> Transform:
        return TiedAscent(self.rho, self.adaptive, self.rho_min, self.max_learning_rate, self.min_learning_rate)

    def combination(self) -> Transform:
        return SurrogateGap(self.alpha)


@register(
    "optimizer",
    paper="Zhuang et al., arXiv 2203.08065, algorithm 1",
    parity="pytorch_optimizer.GSAM",
    cases=(
        {"inner": {"class_name": "SGD", "config": {"momentum": 0.9}}, "learning_rate": 0.01},
        {
            "inner": {"class_name": "Adam", "config": {}},
            "learning_rate": 0.01,
            "rho": 0.5,
            "rho_min": 0.1,
            "alpha": 0.2,
            "adaptive": True,
            "max_learning_rate": 0.02,
        },
    ),
    space={"rho": Choice([0.05, 0.1, 0.3, 0.6]), "alpha": Choice([0.1, 0.2, 0.4])},
)
class GSAM(Around):
    """GSAM: SAM that also closes the gap between the largest loss nearby and the loss itself.

    ```text
    ε = ρₜ g₁ / ‖g₁‖,  g₁ = ∇L(θ),  g₂ = ∇L(θ + ε)
    g⊥ = g₁ - (g₁·g₂ / ‖g₂‖²) g₂                         the part of g₁ that is orthogonal to g₂
    θ ← θ - (step of the inner optimizer with g₂ - α g⊥, decay of θ included)
    ρₜ = ρ_min + (ρ - ρ_min) (ηₜ - η_min) / (η_max - η_min)
    ```

    Products and norms are over all parameters together. The step along `-α g⊥` does not change `L(θ + ε)` to first
    order and raises `L(θ)`, which makes the difference of the two smaller. It costs what `SAM` costs; what is said
    there about `fit`, loops of your own (`perturbed`), accumulation (each micro-batch is decomposed on its own),
    replicas and groups holds here, too. Clipping, `transforms` and `skip_nonfinite` see `g₂ - α g⊥`.

    ηₜ is the learning rate of the optimizer, without the factors of groups and layers. The paper ties ρ to it; give
    `max_learning_rate` to do so, usually the peak of the schedule. During a warmup from 0, ρ grows with the rate. The
    paper's ρ is between 0.02 and 0.6, and its α between 0.01 and 0.4 (table 6); both are worth a search.

    When to use it: if `SAM` helps, and there is time to tune α as well.

    When not to use it: as `SAM`. With α = 0 and a constant ρ it is SAM.

    Args:
        inner: An optimizer of this package that has not been used yet, its name, or its config; see `Lookahead`.
        rho: ρ >= 0, or a schedule: how far the weights are moved at the rate `max_learning_rate`.
        alpha: α >= 0, or a schedule.
        rho_min: How far they are moved at the rate `min_learning_rate`, >= 0.
        max_learning_rate: η_max > `min_learning_rate`; None: ρ does not depend on the rate.
        min_learning_rate: η_min >= 0.
        adaptive: Whether the neighbourhood is that of `SAM` with `adaptive=True`.
        learning_rate: That of the inner optimizer if None; otherwise as in every optimizer.
        **common: The keywords of every optimizer; see `keras_optkit.optimizers.Optimizer`.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: As `SAM`, and for rates that are not in order.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    rate = ok.schedules.Cosine(0.1, 1000)
    optimizer = ok.optimizers.GSAM(ok.optimizers.SGD(rate, momentum=0.9), rho=0.1, rho_min=0.02, max_learning_rate=0.1)
    model.compile(optimizer=optimizer, loss="mse")
    ```
    """

    def __init__(
        self,
        inner: Inner = "AdamW",
        rho: float | Schedule = 0.05,
        alpha: float | Schedule = 0.4,
        rho_min: float | Schedule = 0.0,
        max_learning_rate: float | None = None,
        min_learning_rate: float = 0.0,
        adaptive: bool = False,
        learning_rate: float | Schedule | None = None,
        **common: Any,
    ):
        rates = max_learning_rate, min_learning_rate
        super().__init__(
            inner, learning_rate, lambda rule: GSAMRule(rule, rho, adaptive, alpha, rho_min, *rates), **common
        )

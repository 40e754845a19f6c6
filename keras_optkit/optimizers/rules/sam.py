"""Sharpness-aware minimization: the gradient where the loss is highest nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

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

    def contribute(self, u: Tensor, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return {"squares": ops.square(p * u if self.adaptive else u)}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        norm = ops.cast(ops.sqrt(h.totals["squares"]), u.dtype)
        return h(self.rho) / (norm + 1e-12) * (ops.square(p) * u if self.adaptive else u)


@dataclass(frozen=True)
class SAMRule(Wrapper):
    """The inner rule, with the gradient at `θ + ε`."""

    needs = frozenset({"second_gradient"})
    inner_rule: Rule = inner_rule()
    rho: Value = number(0.05)
    adaptive: bool = flag(False)

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

    The factor `θ²` of the adaptive form is applied to all parameters, as in the parity reference. The authors of ASAM
    add 0.01 to |θ| of kernels and leave biases and normalisations as in plain SAM.

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

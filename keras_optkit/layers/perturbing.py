"""Layers that perturb kernels or residual branches in training."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments, backend
from keras_optkit.layers.own_step import OwnStep, rate_or_schedule
from keras_optkit.layers.reparametrization import INNER, KernelWrapper
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["DropConnect", "ShakeDrop"]


@register(
    "layer",
    paper="Wan et al. 2013, Regularization of neural networks using DropConnect",
    parity="the formula is the reference",
    tags=("folds", "random"),
    cases=({"layer": keras.layers.Dense(4, **INNER), "rate": 0.3, "seed": 7},),
    space={"rate": Float(0.0, 0.5)},
)
class DropConnect(OwnStep, KernelWrapper):
    """Drops single weights of the kernels of a layer, instead of activations.

    In training the layer is called with w = v m / (1 - p), with m ~ Bernoulli(1 - p) for each weight, and at inference
    with v, the wrapped layer's kernel variable. There is one mask for the whole batch in each call, for all time steps
    of a recurrent layer too, where the paper draws one for each example. At inference the paper approximates the mean
    of the activations over the masks; here it is that of the weights, as in dropout. At rate 1 nothing is kept.

    Shapes: those of the layer.

    When not to use it: with batches of few examples, which all see the same mask; on small layers.

    Args:
        layer: Any layer with kernels: dense, convolution, recurrent, attention, embedding (whose single elements are
            dropped). A regularizer of the kernel penalises v.
        rate: The fraction p of the weights to drop, in [0, 1].
        seed: An int makes the masks repeatable. The state of the generator is saved with the layer.
        **kwargs: `name` and so on, as for every Keras layer. The dtype policy is that of the layer.

    Raises:
        TypeError: `layer` is not a layer, or is a model or wrapped in this way already; an argument is of another type.
        ValueError: `layer` has no kernels, or has a constraint or LoRA on one; `rate` is outside [0, 1]; `dtype` is not
            that of the layer.

    Source: Wan et al. 2013, Regularization of neural networks using DropConnect, equation 2.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.DropConnect(keras.layers.LSTM(8), rate=0.5, seed=1)
    assert layer(keras.ops.ones((2, 5, 4)), training=True).shape == (2, 8)
    ```
    """

    def __init__(self, layer: Any, rate: float, seed: int | None = None, **kwargs: Any) -> None:
        rate, seed = arguments.real("rate", rate, 0, 1), arguments.seed("seed", seed)
        super().__init__(layer, **kwargs)
        self.rate = rate
        self.seed = seed
        self.seed_generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape: Any = None) -> None:
        """Builds the layer and finds its kernels."""
        KernelWrapper.build(self, input_shape)

    def _formed(self, part: Any, v: Any, training: bool) -> Any:
        if not training or self.rate == 0:
            return v
        keep = keras.random.uniform(v.shape, dtype=part.dtype, seed=self.seed_generator) >= self.rate
        return ops.where(keep, v / max(1 - self.rate, 1e-30), ops.zeros_like(v))


@register(
    "layer",
    paper="1802.02375",
    parity="the formula is the reference",
    tags=("random",),
    cases=({"rate": 0.5, "seed": 7}, {"rate": 0.3, "alpha": 0.5, "per": "element", "seed": 7}),
    space={"rate": Float(0.0, 0.5)},
)
class ShakeDrop(OwnStep, FromSignature, keras.layers.Layer):
    """Multiplies a residual branch by random factors, by others in the backward pass.

    In training, y = (b + a - b a) x, and the gradient for x is (b + c - b c) times that for y. b ~ Bernoulli(1 - p) is
    drawn once for each call: with b = 1 nothing changes. a is uniform in [-alpha, alpha] and c in [0, beta], for each
    example or each element. At inference y = (1 - p) x, the expectation. Put it at the end of a residual branch, before
    the addition, after a batch normalisation, with rates that grow with depth (`stochastic_depth_rates`). In half
    precision it draws in float32.

    Shapes: the first axis of the input has the examples; the output has the shape, dtype and mask of the input.

    When not to use it: outside of residual branches; in short runs, since it needs many epochs; without batch
    normalisation in the branch, where training may diverge.

    Args:
        rate: The probability p with which the branch is perturbed, in [0, 1], or a `LearningRateSchedule` of the
            layer's own step that gives it (what is outside is taken as the nearer end). The paper ends with 0.5.
        alpha: The largest size of the factor a, 0 or more.
        beta: The largest factor c, 0 or more.
        per: "example", or "element", for which a and c are drawn.
        seed: An int makes the factors repeatable. The state of the generator is saved with the layer.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `rate` is neither a number nor a schedule, `alpha` or `beta` is not a number, `seed` no integer.
        ValueError: `rate` is a number outside [0, 1], `alpha` or `beta` is negative, or `per` is unknown.

    Source: Yamada et al. 2018, arXiv 1802.02375, equation 6, with a in [-1, 1] and c in [0, 1].

    Example:
    ```python
    import keras
    import keras_optkit as ok

    inputs = x = keras.Input((8,))
    for rate in ok.layers.stochastic_depth_rates(0.5, depth=3):
        branch = keras.layers.BatchNormalization()(keras.layers.Dense(8)(x))
        x = x + ok.layers.ShakeDrop(rate)(branch)
    model = keras.Model(inputs, x)
    ```
    """

    def __init__(
        self,
        rate: Any,
        alpha: float = 1.0,
        beta: float = 1.0,
        per: str = "example",
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        rate, seed = rate_or_schedule("rate", rate), arguments.seed("seed", seed)
        alpha = arguments.real("alpha", alpha, 0, closed="left")
        beta = arguments.real("beta", beta, 0, closed="left")
        per = arguments.choice("per", per, ("example", "element"))
        super().__init__(**kwargs)
        self.rate, self.alpha, self.beta, self.per, self.seed = rate, alpha, beta, per, seed
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator(seed)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the input."""
        return input_shape

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Perturbs in training, and advances the step of a schedule."""
        dtype = at_least_float32(inputs.dtype)
        x = ops.cast(inputs, dtype)
        if not training:
            scheduled = isinstance(self.rate, LearningRateSchedule)
            rate = ops.cast(self.current_rate, dtype) if scheduled else self.rate
            return ops.cast(x * (1.0 - rate), inputs.dtype)
        with backend.after(inputs):
            rate = self.next_rate(dtype)
            shape = ops.shape(x) if self.per == "element" else (ops.shape(x)[0], *[1] * (len(x.shape) - 1))
            keep = keras.random.uniform((), dtype=dtype, seed=self.seed_generator) >= rate
            a = keras.random.uniform(shape, -self.alpha, self.alpha, dtype=dtype, seed=self.seed_generator)
            c = keras.random.uniform(shape, 0.0, self.beta, dtype=dtype, seed=self.seed_generator)
        one = ops.ones_like(a)
        forward, backward = ops.where(keep, one, a), ops.where(keep, one, c)  # b + a - b a with b = 1 and b = 0
        shown = x * backward
        return ops.cast(shown + ops.stop_gradient(x * forward - shown), inputs.dtype)

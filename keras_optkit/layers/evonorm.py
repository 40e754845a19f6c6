"""Layers that normalise and activate in one formula, found by an evolutionary search."""

from __future__ import annotations

from typing import Any

from keras import ops

from keras_optkit import arguments, backend
from keras_optkit.layers.response import PerChannel
from keras_optkit.registry import register
from keras_optkit.space import Choice

__all__ = ["EvoNormB0", "EvoNormS0"]


class _EvoNorm(PerChannel):
    """What both share: γ, β and v, and variances over positions that a mask does not hide."""

    def __init__(self, axis: int, epsilon: float, **kwargs: Any) -> None:
        super().__init__(axis, **kwargs)
        self.epsilon = arguments.real("epsilon", epsilon, 0, closed="neither")

    def build(self, input_shape: Any) -> None:
        """Makes γ, β and v."""
        channels = self._channels(input_shape)
        self.gamma = self._vector("gamma", channels, "ones")
        self.beta = self._vector("beta", channels, "zeros")
        self.v = self._vector("gamma_activation", channels, "ones")

    def _seen(self, x: Any, mask: Any) -> Any:
        """1 for each element of `x` that counts, and 0 where the mask hides it."""
        if mask is None:
            return ops.ones_like(x)
        if len(mask.shape) >= len(x.shape):
            raise ValueError(f"mask must have fewer axes than the inputs' {len(x.shape)}, got shape {mask.shape}.")
        seen = ops.reshape(mask, (*ops.shape(mask), *[1] * (len(x.shape) - len(mask.shape))))
        return ops.broadcast_to(ops.cast(seen, x.dtype), ops.shape(x))

    def _affine(self, x: Any) -> Any:
        return self._along(self.gamma, x) * x + self._along(self.beta, x)


def _variance(x: Any, seen: Any, axes: list[int]) -> Any:
    """The biased variance over axes of what is seen."""
    x = ops.where(seen > 0, x, ops.zeros_like(x))
    count = ops.maximum(ops.sum(seen, axes, keepdims=True), 1.0)
    centred = (x - ops.sum(x, axes, keepdims=True) / count) * seen
    return ops.sum(ops.square(centred), axes, keepdims=True) / count


@register(
    "layer",
    paper="2004.02967",
    parity="the formula is the reference",
    cases=({"groups": 2}, {"groups": 3, "axis": 1, "epsilon": 1e-3}),
    space={"groups": Choice([8, 16, 32])},
)
class EvoNormS0(_EvoNorm):
    """Group normalisation and a Swish-like activation in one, without statistics of the batch.

    y = γ x σ(v x) / sqrt(s² + ε) + β, with the sigmoid σ, vectors v, γ and β along `axis`, and s² the variance of each
    example over all positions and the channels of a group. v and γ start at 1, β at 0. Masked positions do not enter
    s². Half precision is computed in float32.

    Shapes: `(batch, ..., channels)`, the channels along `axis`; the output has the shape, dtype and mask of the input.

    When not to use it: followed by another activation; on groups of one element, whose variance is 0.

    Args:
        groups: The number of groups, which divides the channels.
        axis: The axis of the channels, not the batch: -1, or 1 for channels first.
        epsilon: ε, above 0.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `groups` or `axis` is not an integer, or `epsilon` is not a number.
        ValueError: `groups` is below 1 or does not divide the channels, `axis` is the batch or not one of the input, or
            `epsilon` is not above 0.

    Source: Liu et al. 2020, arXiv 2004.02967, table 1 (EvoNorm-S0).

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.EvoNormS0(groups=8)
    assert layer(keras.ops.ones((2, 4, 4, 16))).shape == (2, 4, 4, 16)
    ```
    """

    def __init__(self, groups: int = 32, axis: int = -1, epsilon: float = 1e-5, **kwargs: Any) -> None:
        groups = arguments.integer("groups", groups, 1)
        super().__init__(axis, epsilon, **kwargs)
        self.groups = groups

    def build(self, input_shape: Any) -> None:
        """Makes γ, β and v."""
        channels = self._channels(input_shape)
        if channels % self.groups:
            raise ValueError(f"groups must divide the {channels} channels, got {self.groups}.")
        super().build(input_shape)

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Normalises each example by itself."""
        x = self._wide(inputs)
        rank, shape = len(x.shape), ops.shape(x)
        axis = self.axis % rank
        split = (*shape[:axis], self.groups, shape[axis] // self.groups, *shape[axis + 1 :])
        parted, seen = (ops.reshape(part, split) for part in (x, self._seen(x, mask)))
        variance = _variance(parted, seen, [each for each in range(1, rank + 1) if each != axis])
        normed = ops.reshape(parted / ops.sqrt(variance + self.epsilon), shape)
        return ops.cast(self._affine(normed * ops.sigmoid(self._along(self.v, x) * x)), inputs.dtype)


@register(
    "layer",
    paper="2004.02967",
    parity="the formula is the reference",
    cases=({}, {"axis": 1, "momentum": 0.5, "epsilon": 1e-3}),
    space={"momentum": Choice([0.9, 0.99])},
)
class EvoNormB0(_EvoNorm):
    """Batch normalisation and an activation in one.

    y = γ x / max(sqrt(s_b² + ε), v x + sqrt(s_i² + ε)) + β, with vectors v, γ and β along `axis`, s_b² the variance of
    each channel over the batch and all positions, and s_i² over the positions of an example. Inference uses a moving
    average for s_b², which moves by m s² + (1 - m) s_b² with the `momentum` m in each call in training. v and γ start
    at 1, β at 0. Masked positions do not enter the variances. Half precision is computed in float32.

    Shapes: `(batch, ..., channels)`, the channels along `axis`; the output has the shape, dtype and mask of the input.

    When not to use it: followed by another activation; with small batches (`EvoNormS0`); with averaged weights, since
    the pass over data that renews the statistics of batch normalisation does not know its moving variance. Replicas of
    a distribution strategy each normalise with their own part of the batch.

    Args:
        axis: The axis of the channels, not the batch: -1, or 1 for channels first.
        momentum: m, in [0, 1].
        epsilon: ε, above 0.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `axis` is not an integer, or `momentum` or `epsilon` is not a number.
        ValueError: `axis` is the batch or not one of the input, `momentum` is outside [0, 1], or `epsilon` is not above
            0.

    Source: Liu et al. 2020, arXiv 2004.02967, table 1 (EvoNorm-B0).

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.EvoNormB0()
    assert layer(keras.ops.ones((2, 4, 4, 3)), training=True).shape == (2, 4, 4, 3)
    ```
    """

    def __init__(self, axis: int = -1, momentum: float = 0.9, epsilon: float = 1e-5, **kwargs: Any) -> None:
        momentum = arguments.real("momentum", momentum, 0, 1)
        super().__init__(axis, epsilon, **kwargs)
        self.momentum = momentum

    def build(self, input_shape: Any) -> None:
        """Makes γ, β, v and the moving variance."""
        super().build(input_shape)
        shape = (self._channels(input_shape),)
        self.moving_variance = self.add_weight(
            name="moving_variance",
            shape=shape,
            initializer="ones",
            trainable=False,
            autocast=False,
            aggregation="mean",
        )

    def call(self, inputs: Any, training: bool = False, mask: Any = None) -> Any:
        """Normalises; in training it updates the moving variance."""
        x = self._wide(inputs)
        rank = len(x.shape)
        axis, seen = self.axis % rank, self._seen(x, mask)
        positions = [each for each in range(1, rank) if each != axis]
        if training and self.trainable:
            with backend.after(inputs):
                variance = _variance(x, seen, [0, *positions])
                moved = ops.cast(ops.reshape(variance, (-1,)), self.moving_variance.dtype) * (1 - self.momentum)
                self.moving_variance.assign(self.moving_variance * self.momentum + moved)
        else:
            variance = self._along(self.moving_variance, x)
        of_example = _variance(x, seen, positions) if positions else ops.zeros_like(x)
        activation = self._along(self.v, x) * x + ops.sqrt(of_example + self.epsilon)
        divisor = ops.maximum(ops.sqrt(variance + self.epsilon), activation)
        return ops.cast(self._affine(x / divisor), inputs.dtype)

"""Layers that normalise."""

from __future__ import annotations

from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Choice

__all__ = ["GhostBatchNormalization"]


@register(
    "layer",
    paper="1705.08741; 1502.03167",
    parity="keras.layers.BatchNormalization",
    cases=(
        {},
        {"ghost_batch_size": 2},
        {"ghost_batch_size": 3, "axis": 1, "momentum": 0.5, "center": False, "scale": False},
    ),
    space={"ghost_batch_size": Choice([16, 32, 64, 128])},
)
class GhostBatchNormalization(FromSignature, keras.layers.BatchNormalization):
    """Batch normalisation with the statistics of small parts of the batch.

    In training x̂ = (x - μ_B) / sqrt(σ²_B + ε), y = γ x̂ + β, with the mean and the (biased) variance of example x's
    ghost batch B. Of n examples, in their order, the first `ghost_batch_size` are one ghost batch, and so on; what is
    left over at the end joins the last one, so that none is smaller than asked for unless the whole batch is. (A rest
    of a single example, alone, would be normalised to zero.)

    The moving statistics take one step per call towards the mean of the ghost batches' means and variances, each
    weighted by its number of values; the paper takes one step per ghost batch in turn. Inference uses them, as in
    Keras. Masked positions do not enter the statistics. Half precision is computed in float32.

    `ghost_batch_size=None` is `keras.layers.BatchNormalization`, exactly.

    Shapes: the output has the shape, dtype and mask of the input.

    When not to use it: for batches of 32 and fewer, where ghost batches make the statistics noisier than they are.

    Args:
        ghost_batch_size: Examples per ghost batch, 2 or more, or None.
        **kwargs: Those of `keras.layers.BatchNormalization`: `axis`, `momentum`, `epsilon`, `center`, `scale`, ...;
            `renorm` and `synchronized` only with `ghost_batch_size=None`.

    Raises:
        TypeError: `ghost_batch_size` is not an integer.
        ValueError: `ghost_batch_size` is below 2; it is given with `renorm` or `synchronized`, or with the batch as
            `axis`; `momentum` is outside [0, 1] or `epsilon` is not above 0.

    Source: Hoffer et al. 2017, arXiv 1705.08741, algorithm 1; Ioffe and Szegedy 2015, arXiv 1502.03167, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.GhostBatchNormalization(ghost_batch_size=2)
    y = layer(keras.ops.reshape(keras.ops.arange(8.0), (4, 2)), training=True)
    assert abs(float(y[0, 0] + y[1, 0])) < 1e-6  # centred in each pair of examples
    ```
    """

    def __init__(self, ghost_batch_size: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ghost_batch_size = arguments.integer("ghost_batch_size", ghost_batch_size, 2, optional=True)
        arguments.real("momentum", self.momentum, 0, 1)
        arguments.real("epsilon", self.epsilon, 0, closed="neither")
        for name in ("renorm", "synchronized"):
            if ghost_batch_size is not None and getattr(self, name):
                raise ValueError(
                    f"{name} must be False with a ghost_batch_size, got {name}=True and {ghost_batch_size=}."
                )

    def build(self, input_shape: Any) -> None:
        """Makes Keras's variables."""
        if self.ghost_batch_size is not None and self.axis % len(input_shape) == 0:
            raise ValueError(f"axis must not be the batch (0) with a ghost_batch_size, got axis={self.axis}.")
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalises; in training it updates the moving statistics."""
        if self.ghost_batch_size is None or not (training and self.trainable):
            return super().call(inputs, training=training, mask=mask)
        ops, rank = keras.ops, len(inputs.shape)
        if mask is not None and len(mask.shape) != rank - 1:
            raise ValueError(f"mask must have one axis less than the inputs' {inputs.shape}, got shape {mask.shape}.")
        x = ops.cast(inputs, at_least_float32(inputs.dtype))

        axis = self.axis % rank
        within = [i for i in range(1, rank) if i != axis]
        examples = ops.shape(x)[0]
        last = ops.maximum(examples // self.ghost_batch_size - 1, 0)
        ghost = ops.minimum(ops.arange(examples) // self.ghost_batch_size, last)

        def total(values: Any) -> Any:  # of each ghost batch; as many places as examples, since sizes must be static
            if mask is not None:
                values = ops.where(ops.expand_dims(mask, -1), values, 0.0)
            return ops.segment_sum(ops.sum(values, within, keepdims=True), ghost, num_segments=examples)

        def per_example(values: Any) -> Any:
            return ops.take(values, ghost, axis=0)

        count = total(ops.ones_like(x))
        divisor = ops.maximum(count, 1.0)
        mean = total(x) / divisor
        centred = x - per_example(mean)
        variance = total(ops.square(centred)) / divisor

        others = [i for i in range(rank) if i != axis]
        for moving, statistic in ((self.moving_mean, mean), (self.moving_variance, variance)):
            average = ops.sum(statistic * count, others) / ops.maximum(ops.sum(count, others), 1.0)
            moving.assign(moving * self.momentum + ops.cast(average, moving.dtype) * (1.0 - self.momentum))

        broadcast = [-1 if i == axis else 1 for i in range(rank)]
        outputs = centred * per_example(ops.rsqrt(variance + self.epsilon))
        if self.scale:
            outputs = outputs * ops.reshape(ops.cast(self.gamma, x.dtype), broadcast)
        if self.center:
            outputs = outputs + ops.reshape(ops.cast(self.beta, x.dtype), broadcast)
        return ops.cast(outputs, self.compute_dtype)

"""Layers that drop structures in training: whole branches, blocks of a feature map."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras.optimizers.schedules import LearningRateSchedule, PolynomialDecay

from keras_optkit import arguments, backend
from keras_optkit.layers.own_step import OwnStep, rate_or_schedule
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float, Int

__all__ = ["DropBlock", "DropPath", "stochastic_depth_rates"]


class _Drop(OwnStep, FromSignature, keras.layers.Layer):
    """A layer that multiplies by a random mask in training, and is the identity at inference."""

    def __init__(self, rate: float | LearningRateSchedule, seed: int | None = None, **kwargs: Any) -> None:
        rate, seed = rate_or_schedule("rate", rate), arguments.seed("seed", seed)
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        self.supports_masking = True
        self.seed_generator = keras.random.SeedGenerator(seed)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the input."""
        return input_shape

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Drops in training, and advances the step of a schedule."""
        if not training or (not isinstance(self.rate, LearningRateSchedule) and self.rate == 0):
            return inputs
        dtype = at_least_float32(inputs.dtype)
        with backend.after(inputs):
            factor = self._factor(inputs, self.next_rate(dtype), dtype)
        # what is dropped is zero even where the input is not finite, and sends no gradient back
        return keras.ops.where(factor > 0, inputs * keras.ops.cast(factor, inputs.dtype), keras.ops.zeros_like(inputs))

    def _factor(self, inputs: Any, rate: Any, dtype: str) -> Any:
        """What the input is multiplied by: 0 where it is dropped."""
        raise NotImplementedError


@register(
    "layer",
    paper="1603.09382",
    parity="the formula of timm.layers.DropPath, in NumPy",
    tags=("random",),
    cases=({"rate": 0.3, "seed": 7}, {"rate": PolynomialDecay(0.0, 4, end_learning_rate=0.6), "seed": 7}),
    space={"rate": Float(0.0, 0.5)},
)
class DropPath(_Drop):
    """Drops whole examples of a residual branch (stochastic depth).

    y = x r / (1 - p) with one r ~ Bernoulli(1 - p) for each example in training, y = x at inference. Put it at the end
    of a residual branch, before the addition: an example whose branch is dropped passes by the shortcut alone. At rate
    1 nothing is kept. The masks are drawn in float32 at least, so that half precision meets any rate.

    Shapes: the first axis of the input has the examples; the output has the shape, dtype and mask of the input.

    When not to use it: outside of residual branches, where it sets whole examples to zero; in narrow or short networks,
    which lack capacity rather than regularisation; in a layer that is called several times in one training step, if
    the rate is a schedule, since each call counts as a step.

    Args:
        rate: The fraction p of the examples to drop, in [0, 1], or a `LearningRateSchedule` of the layer's own step
            that gives it (what is outside is taken as the nearer end). See `stochastic_depth_rates`.
        seed: An int makes the masks repeatable. The state of the generator is saved with the layer.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `rate` is neither a number nor a schedule, or `seed` is not an integer.
        ValueError: `rate` is a number outside [0, 1].

    Source: Huang et al. 2016, arXiv 1603.09382, in the inverted form.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    inputs = x = keras.Input((8,))
    for rate in ok.layers.stochastic_depth_rates(0.2, depth=4):
        branch = keras.layers.Dense(8, activation="relu")(x)
        x = x + ok.layers.DropPath(rate)(branch)
    model = keras.Model(inputs, x)
    ```
    """

    def _factor(self, inputs: Any, rate: Any, dtype: str) -> Any:
        ops = keras.ops
        shape = (ops.shape(inputs)[0], *[1] * (len(inputs.shape) - 1))
        keep = keras.random.uniform(shape, dtype=dtype, seed=self.seed_generator) >= rate
        return ops.cast(keep, dtype) * ops.divide_no_nan(1.0, 1.0 - rate)


def stochastic_depth_rates(rate: float, depth: int) -> list[float]:
    """The rates of `DropPath` for each block of a network, which grow linearly with depth.

    p_l = l p / L for the blocks l = 1, ..., L, so that the last one has the full rate: early blocks make what all later
    ones need. (Some other implementations begin at exactly 0.)

    Args:
        rate: The rate p of the last block, in [0, 1].
        depth: The number L of blocks, at least 1.

    Returns:
        A list of `depth` rates.

    Raises:
        TypeError: An argument is not a number, or `depth` is not an integer.
        ValueError: `rate` is outside [0, 1], or `depth` is below 1.

    Source: Huang et al. 2016, arXiv 1603.09382, section 3.

    Example:
    ```python
    import keras_optkit as ok

    assert ok.layers.stochastic_depth_rates(0.5, depth=4) == [0.125, 0.25, 0.375, 0.5]
    ```
    """
    rate, depth = arguments.real("rate", rate, 0, 1), arguments.integer("depth", depth, 1)
    return [rate * (block / depth) for block in range(1, depth + 1)]


@register(
    "layer",
    paper="1810.12890",
    parity="the paper's algorithm 1, in NumPy",
    tags=("random",),
    cases=(
        {"rate": 0.3, "block_size": 3, "seed": 7},
        {"rate": PolynomialDecay(0.0, 4, end_learning_rate=0.6), "block_size": 2, "data_format": "channels_first"},
    ),
    space={"rate": Float(0.0, 0.3), "block_size": Int(3, 9)},
)
class DropBlock(_Drop):
    """Drops contiguous blocks of feature maps, in one, two or three dimensions.

    In training each position where a whole block fits becomes the corner of a dropped block with probability
    γ = p Π f_i / Π (b_i (f_i - b_i + 1)), for feature maps of sizes f_i and blocks of sizes b_i, separately in each
    channel. Then y = x m / mean(m), with m = 0 in the blocks and 1 elsewhere, and the mean over the whole batch. At
    inference y = x. Neighbours of a feature map hold nearly the same, so that single dropped ones, as dropout has, are
    no loss; blocks are. Where blocks overlap, less than the fraction p is dropped, as in the paper.

    Shapes: `(batch, *sizes, channels)`, or with "channels_first" `(batch, channels, *sizes)`, with one to three sizes;
    the output has the shape, dtype and mask of the input. A block is cut to a size that is smaller. Sizes that are
    not known when the layer is traced must not be smaller than the block.

    When not to use it: after dense layers, where neighbours have nothing in common (`keras.layers.Dropout`); from the
    first step on at the full rate, which slows training: give a schedule that starts at 0.

    Args:
        rate: About the fraction p of the elements to drop, in [0, 1], or a `LearningRateSchedule` of the layer's own
            step that gives it (what is outside is taken as the nearer end).
        block_size: The size of a block along each axis, at least 1; at 1 it is dropout, whose scale is the kept
            fraction's.
        data_format: "channels_last" or "channels_first"; None (default) is `keras.config.image_data_format()`.
        seed: An int makes the masks repeatable. The state of the generator is saved with the layer.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `rate` is neither a number nor a schedule; `block_size` or `seed` is not an integer.
        ValueError: `rate` is a number outside [0, 1], `block_size` is below 1, `data_format` is unknown, or the input
            has not one to three sizes.

    Source: Ghiasi, Lin and Le 2018, arXiv 1810.12890, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    rate = keras.optimizers.schedules.PolynomialDecay(0.0, decay_steps=1000, end_learning_rate=0.1)
    layer = ok.layers.DropBlock(rate, block_size=3, seed=1)
    assert layer(keras.ops.ones((2, 8, 8, 4)), training=True).shape == (2, 8, 8, 4)
    ```
    """

    def __init__(
        self,
        rate: float | LearningRateSchedule,
        block_size: int = 7,
        data_format: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if data_format is not None:
            arguments.choice("data_format", data_format, ("channels_last", "channels_first"))
        block_size = arguments.integer("block_size", block_size, 1)
        super().__init__(rate, seed, **kwargs)
        self.block_size = block_size
        self.data_format = data_format or keras.config.image_data_format()

    def build(self, input_shape: Any) -> None:
        """Checks the rank."""
        if not 3 <= len(input_shape) <= 5:
            raise ValueError(f"The input must have one to three sizes besides batch and channels, got {input_shape}.")
        super().build(input_shape)

    def _factor(self, inputs: Any, rate: Any, dtype: str) -> Any:
        ops, rank = keras.ops, len(inputs.shape)
        first = self.data_format == "channels_first"
        shape = ops.shape(inputs)
        batch, channels, sizes = shape[0], shape[1 if first else -1], shape[2:] if first else shape[1:-1]
        blocks = tuple(min(self.block_size, size) if isinstance(size, int) else self.block_size for size in sizes)
        places = [size - block + 1 for size, block in zip(sizes, blocks, strict=True)]

        # one axis after the other, since the product of all sizes may not fit into an int32
        gamma = rate / math.prod(blocks)
        for size, place in zip(sizes, places, strict=True):
            gamma = gamma * (ops.cast(size, dtype) / ops.cast(place, dtype))
        corners = keras.random.uniform((batch, *places, channels), dtype=dtype, seed=self.seed_generator) < gamma
        around = [(0, 0), *((block - 1, block - 1) for block in blocks), (0, 0)]
        dropped = ops.max_pool(
            ops.pad(ops.cast(corners, "float32"), around),
            blocks,
            strides=1,
            padding="valid",
            data_format="channels_last",
        )
        keep = ops.cast(1.0 - dropped, dtype)  # TensorFlow pools three dimensions in float32 only
        if first:
            keep = ops.transpose(keep, (0, rank - 1, *range(1, rank - 1)))
        return keep * ops.divide_no_nan(1.0, ops.mean(keep))

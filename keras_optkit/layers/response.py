"""Layers that scale channels, and those that normalise each example by itself."""

from __future__ import annotations

from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.precision import at_least_float32
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["FilterResponseNormalization", "GlobalResponseNormalization", "LayerScale"]


class _PerChannel(FromSignature, keras.layers.Layer):
    """A layer with vectors along one axis of its input, which computes in float32 at least."""

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        axis = arguments.integer("axis", axis)
        if axis == 0:
            raise ValueError("axis must not be the batch (0), got 0.")
        super().__init__(**kwargs)
        self.axis = axis
        self.supports_masking = True

    def compute_output_shape(self, input_shape: Any) -> Any:
        """That of the input."""
        return input_shape

    def _channels(self, input_shape: Any) -> int:
        """The number of channels of an input."""
        rank = len(input_shape)
        if not -rank < self.axis < rank:
            raise ValueError(f"axis must be one of the input's {rank} besides the batch, got axis={self.axis}.")
        if input_shape[self.axis] is None:
            raise ValueError(f"The size of axis={self.axis} must be known, got an input of shape {input_shape}.")
        return int(input_shape[self.axis])

    def _vector(self, name: str, channels: int, initializer: Any) -> Any:
        # kept from autocasting, which would round what is computed in float32
        return self.add_weight(name=name, shape=(channels,), initializer=initializer, autocast=False)

    def _along(self, vector: Any, x: Any) -> Any:
        """A vector in the shape that broadcasts along the axis of `x`, and of its dtype."""
        shape = [1] * len(x.shape)
        shape[self.axis] = -1
        return keras.ops.cast(keras.ops.reshape(vector, shape), x.dtype)

    def _wide(self, inputs: Any) -> Any:
        return keras.ops.cast(inputs, at_least_float32(inputs.dtype))

    def _squares(self, x: Any, mask: Any, *, mean: bool) -> Any:
        """The sum or mean of x² over all positions of each example that the mask, if there is one, does not hide."""
        ops, rank = keras.ops, len(x.shape)
        positions = [axis for axis in range(1, rank) if axis != self.axis % rank]
        squares = ops.square(x)
        if mask is not None:
            if len(mask.shape) > rank:
                raise ValueError(f"mask must not have more axes than the inputs' {rank}, got shape {mask.shape}.")
            seen = ops.cast(ops.reshape(mask, (*ops.shape(mask), *[1] * (rank - len(mask.shape)))), "bool")
            squares = ops.where(seen, squares, ops.zeros_like(squares))
            count = ops.sum(ops.cast(ops.broadcast_to(seen, ops.shape(x)), x.dtype), positions, keepdims=True)
        if not mean:
            return ops.sum(squares, positions, keepdims=True)
        if mask is None:
            return ops.mean(squares, positions, keepdims=True)
        return ops.sum(squares, positions, keepdims=True) / ops.maximum(count, 1.0)


@register(
    "layer",
    paper="2103.17239",
    parity="the formula is the reference",
    cases=({}, {"initial_value": 0.5, "axis": 1}),
    space={"initial_value": Float(1e-6, 1.0, log=True)},
)
class LayerScale(_PerChannel):
    """Multiplies each channel by a learned factor that starts small.

    y = λ x, with a vector λ along `axis`. Put it at the end of a residual branch, before `DropPath` and the addition:
    each block then starts close to the identity, so that deep networks train from the first step on.

    Shapes: the output has the shape, dtype and mask of the input.

    When not to use it: outside of residual branches, where it makes the signal vanish; with `weight_decay` on λ, which
    keeps it near zero (optimizers of this package decay no vectors by default).

    Args:
        initial_value: λ at the start. The paper has 0.1 up to 18 blocks, 1e-5 up to 24, and 1e-6 beyond.
        axis: The axis of the channels, not the batch.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `initial_value` is not a number, or `axis` is not an integer.
        ValueError: `initial_value` is not finite, or `axis` is the batch or not one of the input.

    Source: Touvron et al. 2021, arXiv 2103.17239, section 2.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.Input((8,))
    y = x + ok.layers.LayerScale(1e-4)(keras.layers.Dense(8)(x))
    ```
    """

    def __init__(self, initial_value: float = 1e-5, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(axis, **kwargs)
        self.initial_value = arguments.real("initial_value", initial_value)

    def build(self, input_shape: Any) -> None:
        """Makes λ."""
        start = keras.initializers.Constant(self.initial_value)
        self.scale = self._vector("gamma", self._channels(input_shape), start)

    def call(self, inputs: Any) -> Any:
        """Scales, in float32 at least: float16 has too few digits for a factor of 1e-6."""
        x = self._wide(inputs)
        return keras.ops.cast(x * self._along(self.scale, x), inputs.dtype)


@register(
    "layer",
    paper="2301.00808",
    parity="the formula of timm.layers.GlobalResponseNorm, in NumPy",
    cases=({}, {"axis": 1}),
)
class GlobalResponseNormalization(_PerChannel):
    """Lets the channels of each example compete by their norms, as in ConvNeXt V2.

    y = x + γ x n + β, with n = g / (mean of g over the channels + ε) and g the L2 norm of each channel over all
    positions of the example. γ and β are vectors that start at 0, where the layer is the identity. Masked positions do
    not enter the norms. Half precision is computed in float32.

    Shapes: `(batch, ..., channels)`, the channels along `axis`; the output has the shape, dtype and mask of the input.

    When not to use it: as a replacement for batch or layer normalisation, since it does not fix the scale of its
    output; where a later position must not have an influence on an earlier one (causal models).

    Args:
        axis: The axis of the channels, not the batch: -1, or 1 for channels first.
        epsilon: ε, above 0.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `axis` is not an integer, or `epsilon` is not a number.
        ValueError: `axis` is the batch or not one of the input, or `epsilon` is not above 0.

    Source: Woo et al. 2023, arXiv 2301.00808, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.GlobalResponseNormalization()
    x = keras.ops.ones((2, 4, 4, 3))
    assert float(keras.ops.max(keras.ops.abs(layer(x) - x))) == 0.0  # the identity, at the start
    ```
    """

    def __init__(self, axis: int = -1, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(axis, **kwargs)
        self.epsilon = arguments.real("epsilon", epsilon, 0, closed="neither")

    def build(self, input_shape: Any) -> None:
        """Makes γ and β."""
        channels = self._channels(input_shape)
        self.gamma = self._vector("gamma", channels, "zeros")
        self.beta = self._vector("beta", channels, "zeros")

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Normalises each example by itself."""
        ops, x = keras.ops, self._wide(inputs)
        squares = self._squares(x, mask, mean=False)
        some = squares > 0  # the root has no gradient at 0
        norm = ops.where(some, ops.sqrt(ops.where(some, squares, ops.ones_like(squares))), ops.zeros_like(squares))
        share = norm / (ops.mean(norm, self.axis, keepdims=True) + self.epsilon)
        outputs = x + self._along(self.gamma, x) * (x * share) + self._along(self.beta, x)
        return ops.cast(outputs, inputs.dtype)


@register(
    "layer",
    paper="1911.09737",
    parity="the formula of timm.layers.FilterResponseNormTlu2d, in NumPy",
    cases=({}, {"axis": 1, "threshold": False, "learn_epsilon": True, "epsilon": 1e-4}),
)
class FilterResponseNormalization(_PerChannel):
    """Normalises each channel of each example by its mean square, and cuts off below a learned threshold.

    ν² = mean of x² over all positions of the example, x̂ = x / sqrt(ν² + |ε|), y = max(γ x̂ + β, τ). No mean is taken
    off, which is why the activation, a "thresholded linear unit", learns its threshold τ; it takes the place of ReLU.
    Nothing depends on the batch. γ starts at 1, β and τ at 0. Masked positions do not enter ν². Half precision is
    computed in float32.

    Shapes: `(batch, ..., channels)`, the channels along `axis`; the output has the shape, dtype and mask of the input.

    When not to use it: followed by another activation (then `threshold=False`); on inputs of one position, such as
    after global pooling, unless `learn_epsilon=True`, since x̂ is then only a sign; without a warmup of the learning
    rate, which the paper found necessary in many networks.

    Args:
        axis: The axis of the channels, not the batch: -1, or 1 for channels first.
        epsilon: ε, above 0; with `learn_epsilon` what it starts at (the paper has 1e-4 then).
        threshold: Whether to apply the thresholded linear unit.
        learn_epsilon: Whether ε is learned for each channel; its size |ε| is what is added.
        **kwargs: `name`, `dtype` and so on, as for every Keras layer.

    Raises:
        TypeError: `axis` is not an integer, `epsilon` is not a number, or a switch is not True or False.
        ValueError: `axis` is the batch or not one of the input, or `epsilon` is not above 0.

    Source: Singh and Krishnan 2019, arXiv 1911.09737, equations 1 to 3.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = ok.layers.FilterResponseNormalization()
    y = layer(keras.ops.ones((2, 4, 4, 3)) * 7.0)
    assert abs(float(y[0, 0, 0, 0]) - 1.0) < 1e-5
    ```
    """

    def __init__(
        self,
        axis: int = -1,
        epsilon: float = 1e-6,
        threshold: bool = True,
        learn_epsilon: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, **kwargs)
        self.epsilon = arguments.real("epsilon", epsilon, 0, closed="neither")
        self.threshold = arguments.boolean("threshold", threshold)
        self.learn_epsilon = arguments.boolean("learn_epsilon", learn_epsilon)

    def build(self, input_shape: Any) -> None:
        """Makes γ, β, τ and, if it is learned, ε."""
        channels = self._channels(input_shape)
        self.gamma = self._vector("gamma", channels, "ones")
        self.beta = self._vector("beta", channels, "zeros")
        self.tau = self._vector("beta_threshold", channels, "zeros") if self.threshold else None
        start = keras.initializers.Constant(self.epsilon)
        self.gamma_epsilon = self._vector("gamma_epsilon", channels, start) if self.learn_epsilon else None

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Normalises each example by itself."""
        ops, x = keras.ops, self._wide(inputs)
        epsilon = self.epsilon
        if self.gamma_epsilon is not None:
            epsilon = ops.abs(self._along(self.gamma_epsilon, x))
        outputs = x / ops.sqrt(self._squares(x, mask, mean=True) + epsilon)
        outputs = self._along(self.gamma, x) * outputs + self._along(self.beta, x)
        if self.tau is not None:
            outputs = ops.maximum(outputs, self._along(self.tau, x))
        return ops.cast(outputs, inputs.dtype)

"""Initializers of biases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.initializers.asking import asking_layer
from keras_optkit.initializers.base import Seed, Seeded, Shaped, another
from keras_optkit.kernels import by_shape, in_equation, in_layer, recurrent_units
from keras_optkit.precision import at_least_float32
from keras_optkit.private import sublayers
from keras_optkit.registry import register


@register(
    "initializer",
    paper="torch.nn.Linear.reset_parameters",
    parity="torch.nn.Linear, torch.nn.Conv2d; scipy.stats.uniform",
    tags=("bias",),
    cases=({"fan_in": 6}, {"fan_in": 9, "seed": 7}),
)
class BiasUniform(Seeded):
    """Biases as torch has them: uniform, within one over the root of the kernel's fan-in.

    b ~ U(-1/sqrt(fan_in), +1/sqrt(fan_in)).

    Keras tells the initializer of a bias nothing but the bias's shape, so the fan-in is read off the kernel of the
    layer that is being built: `Dense`, `EinsumDense`, all convolutions, and layers of your own that have made their
    `kernel` before the bias. As in torch, a recurrent layer's is its number of units. Where that is not known, it
    raises: give `fan_in`, or set the biases of a built model with `torch_biases`.

    torch takes the fan-in of a transposed convolution for that of the reverse one, from its outputs; this does not.
    The kernels that go with these biases in torch are `LeCunUniform(gain=3**-0.5)`.

    When not to use it: without a reason, such as a model that is ported from torch; zeros are at least as good in most
    comparisons, and SIREN is an exception.

    Args:
        fan_in: The number of inputs of a unit, >= 1. Default: that of the layer that is being built.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `fan_in` is below 1. When called: the fan-in is not known, the shape is a scalar's, or the dtype is
            not floating point.

    Source: `torch.nn.Linear` and torch's convolutions.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    bias, kernel = ok.initializers.BiasUniform(), ok.initializers.LeCunUniform(gain=3**-0.5)
    layer = keras.layers.Dense(10, kernel_initializer=kernel, bias_initializer=bias)
    layer.build((None, 100))
    assert keras.ops.max(abs(layer.bias)) <= 0.1
    ```
    """

    def __init__(self, fan_in: int | None = None, seed: Seed = None) -> None:
        super().__init__(seed)
        self.fan_in = arguments.integer("fan_in", fan_in, 1, optional=True)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        limit = 1 / math.sqrt(self._fan_in(shape))
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=seed)

    def _fan_in(self, shape: tuple[int, ...]) -> int:
        if self.fan_in is not None:
            return self.fan_in
        found = _fan_in_of(asking_layer())
        if found is None:
            raise ValueError(
                f"fan_in must be an integer where no layer with a kernel is being built, got fan_in=None for a bias of "
                f"shape={shape}. Or use keras_optkit.initializers.torch_biases(model)."
            )
        return found


def _fan_in_of(layer: Any) -> int | None:
    """The fan-in of a layer's kernel, or of what torch takes for it; None if it has none (yet)."""
    if not isinstance(layer, keras.layers.Layer):
        return None
    if recurrent_units(layer) and hasattr(layer, "units"):  # torch has no convolutional ones
        return recurrent_units(layer)
    kernel = _kernel_of(layer)
    if kernel is None or len(kernel.shape) < 2:
        return None
    shape = tuple(kernel.shape)
    is_einsum = isinstance(layer, keras.layers.EinsumDense)
    axes = in_equation(layer.equation) if is_einsum else in_layer(layer, shape) or by_shape(len(shape))
    return max(axes.fans(shape)[0], 1)


def _kernel_of(layer: Any) -> Any:
    """The kernel in front of a layer's bias, which Keras's layers do not show while they are being built."""
    for name in ("pointwise_kernel", "kernel"):
        kernel = getattr(layer, name, None)
        if kernel is None and not sublayers(layer):
            kernel = next((v for v in layer.weights if v.name == name), None)
        if kernel is not None:
            return kernel
    return None


def torch_biases(layer: keras.layers.Layer, seed: int | None = None) -> int:
    """Sets the biases of a built model, or layer, to those that torch begins with: U(-1/sqrt(fan_in), +1/sqrt(fan_in)).

    Every layer with a kernel and a bias counts, at any depth: `Dense`, `EinsumDense`, convolutions and recurrent cells,
    whose forget biases are no longer 1. torch adds two biases in a recurrent cell, so that a cell with one has the sum
    of two draws here. Normalizations keep theirs, and so does attention, which begins with zeros in torch, too.

    When not to use it: on trained weights, and without a reason; see `BiasUniform`.

    Args:
        layer: A built model or layer.
        seed: An int gives the same values each time. None: other values, repeatable by `keras.utils.set_random_seed`.

    Returns:
        How many biases were set.

    Raises:
        TypeError: `layer` is not a Keras model or layer, or `seed` is not an integer.
        ValueError: It is not built.

    Source: `torch.nn.Linear`, torch's convolutions and recurrent layers.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
    assert ok.initializers.torch_biases(model, seed=1) == 2
    ```
    """
    if not isinstance(layer, keras.layers.Layer):
        raise TypeError(f"layer must be a Keras model or layer, got {layer!r} of type {type(layer).__name__}.")
    arguments.seed("seed", seed)
    if not layer.built:
        raise ValueError(f"layer must be built, got {layer.name!r}, which is not. Call it on a batch, or build(shape).")
    layers = [layer, *sublayers(layer)]
    in_attention = {id(below) for each in layers if isinstance(each, _ATTENTION) for below in sublayers(each)}
    found = [(each, _fan_in_of(each)) for each in layers if _has_bias(each) and id(each) not in in_attention]
    chosen = {id(each.bias): (each, fan_in) for each, fan_in in found if fan_in is not None}
    for index, (each, fan_in) in enumerate(chosen.values()):
        bias, dtype = each.bias, at_least_float32(each.bias.dtype)
        both = 2 if recurrent_units(each) and len(bias.shape) == 1 else 1
        draws = [BiasUniform(fan_in, another(seed, 2 * index + i))(bias.shape, dtype=dtype) for i in range(both)]
        bias.assign(ops.cast(sum(draws[1:], draws[0]), bias.dtype))
    return len(chosen)


#: Their projections are layers inside.
_ATTENTION = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)


def _has_bias(layer: Any) -> bool:
    return isinstance(getattr(layer, "bias", None), keras.Variable)


@register(
    "initializer",
    paper="1708.02002",
    parity="scipy.special.logit",
    tags=("bias", "constant", "deterministic"),
    cases=(
        {},
        {"prior": 0.2},
        {"prior": [0.1, 0.2, 0.3, 0.4, 0.5]},
        {"prior": [10, 20, 30, 40, 1], "activation": "softmax"},
    ),
)
class BiasPrior(Shaped):
    """Biases of an output layer with which the model begins at the frequencies of the classes.

    ```text
    sigmoid    b = log(p / (1 - p)) = -log((1 - p) / p)
    softmax    b = log(p),  p = prior / sum(prior)
    ```

    With small weights the first predictions then are the prior, and the first updates need not learn it. Focal loss
    starts at p = 0.01 for all classes, so that the many negative examples do not swamp the loss.

    When not to use it: in front of another activation than sigmoid or softmax, or without one where the loss is not
    computed from logits.

    Args:
        prior: With sigmoid, the probability of each class, in (0, 1): one for all outputs, or a list with one for each.
            With softmax, the frequency or the count of each class, above 0, as a list.
        activation: "sigmoid" or "softmax": what makes probabilities of the outputs, in the layer or in the loss.

    Raises:
        TypeError: `prior` is neither a number nor a list of numbers.
        ValueError: A value is out of range, or "softmax" is given one number. When called: the list has another length
            than the shape's last axis, the shape is a scalar's, or the dtype is not floating point.

    Source: Lin et al. 2017, arXiv 1708.02002, section 4.1, for sigmoid.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    prior = ok.initializers.BiasPrior([900, 80, 20], activation="softmax")  # how often each class occurs
    layer = keras.layers.Dense(3, "softmax", kernel_initializer="zeros", bias_initializer=prior)
    print(layer(keras.ops.ones((1, 4))))  # [[0.9, 0.08, 0.02]]
    ```
    """

    def __init__(self, prior: float | Sequence[float] = 0.01, activation: str = "sigmoid") -> None:
        self.activation = arguments.choice("activation", activation, ("sigmoid", "softmax"))
        high = 1.0 if activation == "sigmoid" else math.inf
        if isinstance(prior, Mapping):
            raise TypeError(f"prior must be a number or a list in the order of the classes, got {prior!r}.")
        if isinstance(prior, np.ndarray):
            prior = prior.tolist()
        if not isinstance(prior, Sequence) or isinstance(prior, str | bytes):
            if activation == "softmax":
                raise ValueError(f"prior must be a list with a value for each class with softmax, got {prior!r}.")
            self.prior: Any = arguments.real("prior", prior, 0, high, closed="neither")
            return
        if not prior:
            raise ValueError(f"prior must be a number or a list of at least one, got {prior!r}.")
        self.prior = [arguments.real(f"prior[{i}]", each, 0, high, closed="neither") for i, each in enumerate(prior)]

    def _values(self, shape: tuple[int, ...], dtype: str) -> Any:
        if isinstance(self.prior, list):
            if shape[-1] != len(self.prior):
                raise ValueError(
                    f"prior must have as many values as the last axis of shape={shape}, got {len(self.prior)}: "
                    f"{self.prior!r}."
                )
            total = math.fsum(self.prior)
            biases = [math.log(p / total) if self.activation == "softmax" else _logit(p) for p in self.prior]
        else:
            biases = [_logit(self.prior)]
        return ops.broadcast_to(ops.convert_to_tensor(biases, at_least_float32(dtype)), shape)


def _logit(probability: float) -> float:
    return math.log(probability) - math.log1p(-probability)

"""Layer-sequential unit-variance initialization: kernels that fit a batch of data."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.calls import folded_steps, replaced
from keras_optkit.initializers.base import another
from keras_optkit.initializers.orthogonal import orthogonal as orthogonal_kernel
from keras_optkit.kernels import by_shape, role
from keras_optkit.precision import at_least_float32
from keras_optkit.private import global_seed, set_global_seed, sublayers

_LAYERS = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)


def lsuv(
    model: keras.Model,
    batch: Any,
    *,
    orthogonal: bool = True,
    tolerance: float = 0.02,
    max_iterations: int = 10,
    training: bool = False,
    seed: int | None = None,
) -> dict[str, float]:
    """Scales the kernels of a model, layer by layer, until each layer's output has a variance of 1 on a batch.

    ```text
    W_l ← an orthogonal matrix                                      if `orthogonal`
    repeat  W_l ← W_l / sqrt(Var(W_l x_l + b_l))                    until |Var - 1| < tolerance
    ```

    for the layers l in the order in which the model calls them, where x_l is what the layers before, scaled already,
    make of the batch. The variance is over all elements of the output, before the activation. Layers are `Dense`,
    `EinsumDense`, so each kernel of attention, and all convolutions, at any depth; a separable convolution's pointwise
    kernel is scaled. Layers that are frozen (`trainable=False`) or recurrent, and embeddings, keep their weights. A
    layer that is called several times is scaled by its first call; one in `TimeDistributed`, by all steps together.

    It takes one forward pass, without compiling anything. What is not a kernel of these layers stays as it is:
    biases, optimizer, metrics, statistics of batch normalizations, random states of the model and of Keras. If
    something fails, the model is as before.

    When not to use it: on trained weights; and with batch normalization behind each layer, which does the same in each
    step.

    Args:
        model: A built model.
        batch: One batch of inputs, as the model is called with; a few hundred examples, preprocessed as for training.
        orthogonal: Draw the kernels again, as `Orthogonal` does; False: keep their directions.
        tolerance: How far a variance may be from 1, above 0.
        max_iterations: How often a kernel may be scaled, >= 1. Once is enough where biases are 0.
        training: Whether the model is called as in training: with dropout, and batches' own statistics in batch
            normalizations.
        seed: An int gives the same orthogonal matrices each time. None: others, repeatable by
            `keras.utils.set_random_seed`.

    Returns:
        The variance of each layer's output, by the layer's path, in the order of the calls. Of layers with one path the
        second is "path (2)".

    Raises:
        TypeError: `model` is not a Keras model, or an argument is of the wrong type.
        ValueError: The model is not built, a value is out of range, no layer was called, or a layer's output is
            constant or not finite, or does not come within the tolerance. (With large biases there may be no scale.)
        RuntimeError: A layer is called inside a compiled function, or a loop, where its output cannot be read.

    Source: Mishkin and Matas 2015, arXiv 1511.06422, algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((256, 20), mean=3.0, seed=0)
    layers = [keras.layers.Dense(64, "relu") for _ in range(10)]
    model = keras.Sequential([keras.Input((20,)), *layers, keras.layers.Dense(1)])
    variances = ok.initializers.lsuv(model, x)
    assert all(abs(variance - 1) < 0.02 for variance in variances.values())
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    arguments.boolean("orthogonal", orthogonal)
    arguments.boolean("training", training)
    arguments.real("tolerance", tolerance, 0, closed="neither")
    arguments.integer("max_iterations", max_iterations, 1)
    arguments.seed("seed", seed)
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which is not. Call it on a batch, or build(shape).")
    layers = {id(each): each for each in [model, *sublayers(model)] if _can_be_scaled(each)}
    kernels = [(kernel, layer) for layer in layers.values() for kernel in _kernels_of(layer)]
    found: dict[int, float] = {}

    def scale(layer: Any, output: Any) -> Any:
        """Scales a layer's kernel by its first output, and returns what the output is then."""
        if id(layer) in found:
            return output
        y, change = _unit_variance(layer, output, tolerance, max_iterations)
        kernel = _kernels_of(layer)[-1]
        kernel.assign(ops.cast(ops.cast(kernel, at_least_float32(kernel.dtype)) * change, kernel.dtype))
        found[id(layer)] = float(np.var(y))
        return ops.cast(ops.convert_to_tensor(y, at_least_float32(output.dtype)), output.dtype)

    before = [(v, ops.copy(ops.convert_to_tensor(v))) for v in model.variables]
    state, changed = global_seed(), set()
    try:
        if orthogonal:
            for index, (kernel, layer) in enumerate(kernels):
                kernel.assign(_drawn(kernel, layer, another(seed, index)))
        with _seen(layers.values(), scale), folded_steps([model, *sublayers(model)]):
            model(batch, training=training)
        if not found:
            raise ValueError(f"model must call a layer that has a kernel and is trainable, got {model.name!r}.")
        changed = {id(kernel) for kernel, layer in kernels if id(layer) in found}  # others were not called
    finally:
        for variable, value in before:
            if id(variable) not in changed:
                variable.assign(value)
        set_global_seed(state)
    variances: dict[str, float] = {}
    for key, variance in found.items():
        path, number = layers[key].path, 1
        while path in variances:  # of layers with one name
            number += 1
            path = f"{layers[key].path} ({number})"
        variances[path] = variance
    return variances


def _drawn(kernel: Any, layer: Any, seed: int | None) -> Any:
    """Orthogonal values for a kernel."""
    shape, dtype = tuple(kernel.shape), at_least_float32(kernel.dtype)
    axes = role(kernel, layer)[1] or by_shape(len(shape))
    seed = random.randint(1, 10**9) if seed is None else seed
    return ops.cast(orthogonal_kernel(shape, axes, dtype, seed), kernel.dtype)


def _kernels_of(layer: Any) -> list[Any]:
    """The kernel that scales a layer's output, and before it the depthwise one of a separable convolution."""
    if hasattr(layer, "pointwise_kernel"):
        return [layer.depthwise_kernel, layer.pointwise_kernel]
    return [layer.kernel]


def _can_be_scaled(layer: Any) -> bool:
    """Whether its kernel is to be scaled, and is one variable of floating-point numbers: not quantized, no LoRA."""
    if not isinstance(layer, _LAYERS) or not layer.trainable or not layer.built:
        return False
    kernel = _kernels_of(layer)[-1]
    return isinstance(kernel, keras.Variable) and keras.backend.is_float_dtype(kernel.dtype)


def _seen(layers: Any, tell: Callable[[Any, Any], Any]) -> contextlib.AbstractContextManager[None]:
    """Has the layers' outputs before the activation go through a function, in their place."""

    def through(layer: Any, activation: Any) -> Callable[[Any], Any]:
        def activated(x: Any) -> Any:
            x = tell(layer, x)
            return x if activation is None else activation(x)

        return activated

    return replaced(layers, "activation", through)


def _unit_variance(layer: Any, output: Any, tolerance: float, max_iterations: int) -> tuple[np.ndarray, float]:
    """The output with a kernel that is scaled to a variance of 1, and the scale."""
    try:
        y = np.asarray(ops.convert_to_numpy(ops.cast(output, at_least_float32(output.dtype))), "float64")
    except Exception as error:
        raise RuntimeError(
            f"The output of layer {layer.path!r} cannot be read, since it is called in a compiled function or in a "
            f"loop. Set layer.trainable = False to leave it out."
        ) from error
    bias = getattr(layer, "bias", None)
    b = np.zeros(()) if bias is None else _bias(layer, bias, y.ndim)
    linear, change = y - b, 1.0
    for _ in range(max_iterations + 1):
        variance = float(np.var(y))
        if not np.isfinite(variance) or variance == 0:
            raise ValueError(
                f"The output of layer {layer.path!r} must vary on this batch, got a variance of {variance}."
            )
        if abs(variance - 1) < tolerance:
            return y, change
        change /= variance**0.5
        y = change * linear + b
    raise ValueError(
        f"The variance of the output of layer {layer.path!r} must come within {tolerance} of 1 in {max_iterations} "
        f"iterations, got {variance}. Its bias may be too large; set it to zero."
    )


def _bias(layer: Any, bias: Any, rank: int) -> np.ndarray:
    value = np.asarray(ops.convert_to_numpy(ops.cast(bias, at_least_float32(bias.dtype))), "float64")
    if getattr(layer, "data_format", None) == "channels_first":
        return value.reshape(-1, *[1] * (rank - 2))
    return value

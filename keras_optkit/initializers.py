"""Initializers with exact claims: the stated standard deviation is the one that is drawn, for every kernel."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras

from keras_optkit import arguments
from keras_optkit.kernels import KernelAxes, by_shape, in_layer
from keras_optkit.precision import at_least_float32
from keras_optkit.private import current_layer, sublayers
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature

__all__ = ["HeNormal", "HeUniform", "Orthogonal", "RandomNormal", "RandomUniform", "XavierNormal", "XavierUniform"]

Seed: TypeAlias = int | keras.random.SeedGenerator | None

_DTYPES = ("float16", "bfloat16", "float32", "float64")

# Standard deviation of a standard normal variable cut off at two: 1 - 2 * 2 phi(2) / P(|z| < 2) is its variance.
_TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


class _Seeded(FromSignature, keras.initializers.Initializer):
    """Seeds, shapes and dtypes, which all our initializers treat the same."""

    def __init__(self, seed: Seed = None) -> None:
        if not isinstance(seed, keras.random.SeedGenerator):
            seed = arguments.seed("seed", seed)
        self.seed = seed

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """Draws a tensor of this shape and floating-point dtype (default: `keras.config.floatx()`)."""
        shape = tuple(int(size) for size in shape)
        dtype = arguments.choice("dtype", keras.backend.standardize_dtype(dtype), _DTYPES)
        if not shape:
            raise ValueError(f"{type(self).__name__} needs a shape of rank 1 or more, got the scalar's shape=().")
        # Keras would draw one seed per instance, and give two layers that share an instance the same weights. Python's
        # generator is where Keras draws such seeds from too: keras.utils.set_random_seed makes them repeatable.
        seed = random.randint(1, 10**9) if self.seed is None else self.seed
        # A uniform bfloat16 takes 128 values, their mean off centre: half precision is drawn in float32 and rounded.
        values = self._draw(shape, at_least_float32(dtype), seed)
        return keras.ops.cast(values, dtype)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        """The values, in float32 or float64."""
        raise NotImplementedError


@register(
    "initializer",
    paper="the plain normal distribution",
    parity="scipy.stats.norm",
    tags=("variance",),
    cases=({}, {"mean": 1.0, "stddev": 2.0, "seed": 7}),
    twin=lambda _in, _out, stddev=0.05, **_: stddev,
)
class RandomNormal(_Seeded):
    """Normal values of a given mean and standard deviation, whatever the shape.

    W ~ N(mean, stddev²), not truncated.

    When not to use it: for the kernels of deep networks. A scale that ignores the fans makes signals vanish or explode
    with depth. It is the baseline to measure `XavierNormal` and `HeNormal` against, and right for embeddings.

    Args:
        mean: The mean.
        stddev: The standard deviation, above 0.
        seed: An int gives the same values at every call with the same shape, so in two layers of one shape too. A
            `keras.random.SeedGenerator` gives new values at every call, and so does None (default), which
            `keras.utils.set_random_seed` makes repeatable.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `stddev` is not above 0. When called: the shape is a scalar's, or the dtype is not floating point.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Embedding(1000, 16, embeddings_initializer=ok.initializers.RandomNormal(stddev=0.02))
    ```
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, seed: Seed = None) -> None:
        super().__init__(seed)
        self.mean = arguments.real("mean", mean)
        self.stddev = arguments.real("stddev", stddev, 0, closed="neither")

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        return keras.random.normal(shape, self.mean, self.stddev, dtype=dtype, seed=seed)


@register(
    "initializer",
    paper="the plain uniform distribution",
    parity="scipy.stats.uniform",
    tags=("variance",),
    cases=({}, {"minval": 0.0, "maxval": 2.0, "seed": 7}),
    twin=lambda _in, _out, minval=-0.05, maxval=0.05, **_: (maxval - minval) / 12**0.5,
)
class RandomUniform(_Seeded):
    """Uniform values between two bounds, whatever the shape.

    W ~ U(minval, maxval).

    When not to use it: for the kernels of deep networks, as `RandomNormal` says.

    Args:
        minval: The lower bound.
        maxval: The upper bound, above `minval`.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `maxval` is not above `minval`. When called: the shape is a scalar's, or the dtype is not floating
            point.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_initializer=ok.initializers.RandomUniform(-0.1, 0.1, seed=1))
    ```
    """

    def __init__(self, minval: float = -0.05, maxval: float = 0.05, seed: Seed = None) -> None:
        super().__init__(seed)
        self.minval = arguments.real("minval", minval)
        self.maxval = arguments.real("maxval", maxval, self.minval, closed="neither")

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        return keras.random.uniform(shape, self.minval, self.maxval, dtype=dtype, seed=seed)


class _Kernel(_Seeded, keras.initializers.VarianceScaling):
    """An initializer that must know which axes of the kernel are inputs and which are outputs.

    A `VarianceScaling` in name only: `EinsumDense`, and so attention, tells no other class its kernel's fan axes. It
    does so by building a copy with `from_config({**config, "input_axes": ..., "output_axes": ...})`.
    """

    def __init__(
        self, seed: Seed = None, *, input_axes: Sequence[int] | None = None, output_axes: Sequence[int] | None = None
    ) -> None:
        super().__init__(seed)
        if (input_axes is None) != (output_axes is None):
            raise ValueError(
                "input_axes and output_axes must be given together or not at all, "
                f"got input_axes={input_axes!r} and output_axes={output_axes!r}."
            )
        self.input_axes = _axes("input_axes", input_axes)
        self.output_axes = _axes("output_axes", output_axes)
        self._seen: dict[tuple[int, ...], KernelAxes] = {}

    def _inherited_config(self) -> dict[str, Any]:
        return {}  # not VarianceScaling's scale, mode and distribution

    def _kernel_axes(self, shape: tuple[int, ...]) -> KernelAxes:
        """The axes as given; else as the layer that asks has them; else by the shape."""
        if self.input_axes is not None and self.output_axes is not None:
            if max(self.input_axes + self.output_axes, default=0) >= len(shape):
                raise ValueError(
                    f"input_axes and output_axes must name axes 0 to {len(shape) - 1} of shape={shape}, "
                    f"got input_axes={self.input_axes} and output_axes={self.output_axes}."
                )
            return KernelAxes(self.input_axes, self.output_axes)
        if len(shape) < 2:
            raise ValueError(
                f"{type(self).__name__} needs a shape of rank 2 or more, or input_axes and output_axes, to tell inputs "
                f"from outputs, got shape={shape}. For a vector use RandomNormal or RandomUniform."
            )
        # A subclassed model makes its variables only after its layers have been called symbolically. The layer is to be
        # seen in that call, which asks for placeholder values, and no longer when the variable is made.
        layer = current_layer()
        found = in_layer(layer, shape)
        if found is None and isinstance(layer, keras.layers.Layer) and not sublayers(layer):
            found = by_shape(len(shape))  # it is not one around the layer that asks
        if found is not None:
            self._seen[shape] = found
        return self._seen.get(shape) or by_shape(len(shape))


def _axes(name: str, axes: Sequence[int] | None) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of integers or None, got {axes!r}.")
    return tuple(arguments.integer(f"{name}[{i}]", axis, 0) for i, axis in enumerate(axes))


class _Xavier:
    @staticmethod
    def _variance(fan_in: int, fan_out: int) -> float:
        return 2 / max(fan_in + fan_out, 1)


class _He:
    @staticmethod
    def _variance(fan_in: int, _fan_out: int) -> float:
        return 2 / max(fan_in, 1)


class _Scaled(_Kernel):
    """A mean of 0 and a variance that depends on the fans."""

    _variance: Callable[[int, int], float]

    def _std(self, shape: tuple[int, ...]) -> float:
        return math.sqrt(self._variance(*self._kernel_axes(shape).fans(shape)))


class _Uniform(_Scaled):
    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        limit = math.sqrt(3) * self._std(shape)
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=seed)


class _Normal(_Scaled):
    def __init__(
        self,
        seed: Seed = None,
        *,
        truncated: bool = False,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.truncated = arguments.boolean("truncated", truncated)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        std = self._std(shape)
        if self.truncated:
            return keras.random.truncated_normal(shape, 0.0, std / _TRUNCATED_STD, dtype=dtype, seed=seed)
        return keras.random.normal(shape, 0.0, std, dtype=dtype, seed=seed)


@register(
    "initializer",
    paper="Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks",
    parity="keras.initializers.GlorotUniform; scipy.stats.uniform",
    tags=("variance",),
    twin=lambda fan_in, fan_out, **_: (2 / (fan_in + fan_out)) ** 0.5,
)
class XavierUniform(_Xavier, _Uniform):
    """Uniform values that keep the variance of signals and of gradients, on a compromise of both.

    W ~ U(-a, +a) with a = sqrt(6 / (fan_in + fan_out)), so std = sqrt(2 / (fan_in + fan_out)).

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeUniform`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: Glorot and Bengio 2010, equation 16.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(10, kernel_initializer=ok.initializers.XavierUniform(seed=1))
    ```
    """


@register(
    "initializer",
    paper="Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks",
    parity="keras.initializers.GlorotNormal (truncated); scipy.stats.norm",
    tags=("variance",),
    cases=({}, {"truncated": True, "seed": 7}),
    twin=lambda fan_in, fan_out, **_: (2 / (fan_in + fan_out)) ** 0.5,
)
class XavierNormal(_Xavier, _Normal):
    """Normal values that keep the variance of signals and of gradients, on a compromise of both.

    W ~ N(0, std²) with std = sqrt(2 / (fan_in + fan_out)). Not truncated unless asked, while Keras's `GlorotNormal` is.

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeNormal`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        truncated: Cut the distribution off at two standard deviations of the normal variable that is cut, and widen it
            so that the standard deviation after the cut is the one above (Keras's only form).
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: Glorot and Bengio 2010, equation 12.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(10, kernel_initializer=ok.initializers.XavierNormal())
    ```
    """


@register(
    "initializer",
    paper="1502.01852",
    parity="keras.initializers.HeUniform; scipy.stats.uniform",
    tags=("variance",),
    twin=lambda fan_in, _out, **_: (2 / fan_in) ** 0.5,
)
class HeUniform(_He, _Uniform):
    """Uniform values that keep the variance of signals through ReLU layers.

    W ~ U(-a, +a) with a = sqrt(6 / fan_in), so std = sqrt(2 / fan_in).

    When not to use it: with tanh, sigmoid or no activation, where signals would grow from layer to
    layer: see `XavierUniform`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: He et al. 2015, arXiv 1502.01852, equation 10, with a uniform distribution of that variance.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(64, activation="relu", kernel_initializer=ok.initializers.HeUniform(seed=1))
    ```
    """


@register(
    "initializer",
    paper="1502.01852",
    parity="keras.initializers.HeNormal (truncated); scipy.stats.norm",
    tags=("variance",),
    cases=({}, {"truncated": True, "seed": 7}),
    twin=lambda fan_in, _out, **_: (2 / fan_in) ** 0.5,
)
class HeNormal(_He, _Normal):
    """Normal values that keep the variance of signals through ReLU layers.

    W ~ N(0, std²) with std = sqrt(2 / fan_in). Not truncated unless asked, while Keras's `HeNormal` is.

    When not to use it: with tanh, sigmoid or no activation, where signals would grow from layer to
    layer: see `XavierNormal`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        truncated: Cut the distribution off at two standard deviations of the normal variable that is cut, and widen it
            so that the standard deviation after the cut is the one above (Keras's only form).
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: He et al. 2015, arXiv 1502.01852, equation 10.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(32, 3, activation="relu", kernel_initializer=ok.initializers.HeNormal())
    ```
    """


@register(
    "initializer",
    paper="1312.6120",
    parity="keras.initializers.Orthogonal; numpy.linalg",
    tags=("orthogonal",),
    cases=({}, {"gain": 2.0, "seed": 7}),
    twin=lambda gain=1.0, **_: gain,
)
class Orthogonal(_Kernel):
    """Kernels whose rows or columns, whichever are fewer, are orthogonal and of length `gain`.

    The kernel is read as a matrix W, with the side of its last axis (the outputs, in a kernel (*window, in, out)) as
    columns: W^T W = gain² I for a tall matrix, W W^T = gain² I for a wide one. A depthwise or grouped kernel holds one
    such matrix for each channel or group, and that of an LSTM, GRU or ConvLSTM one for each gate, where Keras's
    `Orthogonal` makes one matrix of all gates. The matrices are drawn uniformly (Haar measure).

    When not to use it: for very wide kernels, where the decomposition takes long (a 4096 x 4096 kernel: seconds). A
    convolution with such a kernel does not keep the norm of an image, only of each window.

    Args:
        gain: The length of the rows or columns, above 0; sqrt(2) before a ReLU.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is not above 0, or only one of `input_axes` and `output_axes` is given. When called: the
            shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

    Source: Saxe et al. 2013, arXiv 1312.6120; uniform draws by the sign correction of Mezzadri 2006, math-ph/0609050.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(32, 3, kernel_initializer=ok.initializers.Orthogonal(gain=2**0.5))
    ```
    """

    def __init__(
        self,
        gain: float = 1.0,
        seed: Seed = None,
        *,
        input_axes: Sequence[int] | None = None,
        output_axes: Sequence[int] | None = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.gain = arguments.real("gain", gain, 0, closed="neither")

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        axes = self._kernel_axes(shape)
        last = len(shape) - 1
        split = (*shape[:-1], axes.groups, shape[-1] // axes.groups)  # the last axis becomes (groups, last / groups)
        inputs, outputs = ({axis + (axis == last) for axis in side} for side in (axes.inputs, axes.outputs))
        columns = inputs - outputs if last + 1 in inputs - outputs else outputs - inputs
        rows = (inputs | outputs) - columns
        order = [*sorted(set(range(last + 2)) - rows - columns), *sorted(rows), *sorted(columns)]
        m, n = (math.prod(split[axis] for axis in side) for side in (rows, columns))
        maps = math.prod(shape) // max(m * n, 1)

        q, r = keras.ops.qr(keras.random.normal((maps, max(m, n), min(m, n)), dtype=dtype, seed=seed))
        diagonal = keras.ops.diagonal(r, axis1=-2, axis2=-1)
        ones = keras.ops.ones_like(diagonal)
        q = q * keras.ops.where(diagonal < 0, -ones, ones)[:, None, :]
        if m < n:
            q = keras.ops.swapaxes(q, -1, -2)
        kernel = keras.ops.reshape(q, [split[axis] for axis in order])
        inverse = sorted(range(last + 2), key=order.__getitem__)
        return self.gain * keras.ops.reshape(keras.ops.transpose(kernel, inverse), shape)

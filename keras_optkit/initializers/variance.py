"""Variances that depend on a kernel's true fans: Xavier, He and LeCun."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.initializers.base import Axes, Seed, SeededOfKernel
from keras_optkit.initializers.distributions import TRUNCATED_STD
from keras_optkit.initializers.gains import checked_gain, gain_of
from keras_optkit.registry import register


class _Scaled(SeededOfKernel):
    """A mean of 0 and a variance that depends on the fans."""

    def _variance(self, fan_in: int, fan_out: int) -> float:
        """Of a gain of 1."""
        raise NotImplementedError

    def _gain(self) -> float:
        raise NotImplementedError

    def _std(self, shape: tuple[int, ...]) -> float:
        return self._gain() * math.sqrt(self._variance(*self._kernel_axes(shape).fans(shape)))


class _Uniform(_Scaled):
    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        limit = math.sqrt(3) * self._std(shape)
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=seed)


class _Normal(_Scaled):
    truncated: bool

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        std = self._std(shape)
        if self.truncated:
            return keras.random.truncated_normal(shape, 0.0, std / TRUNCATED_STD, dtype=dtype, seed=seed)
        return keras.random.normal(shape, 0.0, std, dtype=dtype, seed=seed)


class _WithGain(_Scaled):
    def __init__(
        self, seed: Seed = None, *, gain: float | str = 1.0, input_axes: Axes = None, output_axes: Axes = None
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.gain = checked_gain(gain)

    def _gain(self) -> float:
        return gain_of(self.gain)


class _NormalWithGain(_Normal, _WithGain):
    def __init__(
        self,
        seed: Seed = None,
        *,
        gain: float | str = 1.0,
        truncated: bool = False,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        _WithGain.__init__(self, seed, gain=gain, input_axes=input_axes, output_axes=output_axes)
        self.truncated = arguments.boolean("truncated", truncated)


class _WithSlope(_Scaled):
    def __init__(
        self, seed: Seed = None, *, negative_slope: float = 0.0, input_axes: Axes = None, output_axes: Axes = None
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.negative_slope = arguments.real("negative_slope", negative_slope)

    def _gain(self) -> float:
        return 1 / math.sqrt(1 + self.negative_slope**2)


class _NormalWithSlope(_Normal, _WithSlope):
    def __init__(
        self,
        seed: Seed = None,
        *,
        negative_slope: float = 0.0,
        truncated: bool = False,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        _WithSlope.__init__(self, seed, negative_slope=negative_slope, input_axes=input_axes, output_axes=output_axes)
        self.truncated = arguments.boolean("truncated", truncated)


class _Xavier(_Scaled):
    def _variance(self, fan_in: int, fan_out: int) -> float:
        return 2 / max(fan_in + fan_out, 1)


class _He(_Scaled):
    def _variance(self, fan_in: int, fan_out: int) -> float:  # noqa: ARG002 (the form of Xavier's)
        return 2 / max(fan_in, 1)


class _LeCun(_Scaled):
    def _variance(self, fan_in: int, fan_out: int) -> float:  # noqa: ARG002 (the form of Xavier's)
        return 1 / max(fan_in, 1)


@register(
    "initializer",
    paper="Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks",
    parity="keras.initializers.GlorotUniform; scipy.stats.uniform",
    tags=("variance",),
    twin=lambda fan_in, fan_out, gain=1.0, **_: gain * (2 / (fan_in + fan_out)) ** 0.5,
)
class XavierUniform(_Xavier, _Uniform, _WithGain):
    """Uniform values that keep the variance of signals and of gradients, on a compromise of both.

    W ~ U(-a, +a) with a = gain sqrt(6 / (fan_in + fan_out)), so std = gain sqrt(2 / (fan_in + fan_out)).

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeUniform`, or
    `gain="relu"`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        gain: A factor above 0, or the name of an activation, whose `calculate_gain` is the factor.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

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
    cases=({}, {"truncated": True, "gain": 2.0, "seed": 7}),
    twin=lambda fan_in, fan_out, gain=1.0, **_: gain * (2 / (fan_in + fan_out)) ** 0.5,
)
class XavierNormal(_Xavier, _NormalWithGain):
    """Normal values that keep the variance of signals and of gradients, on a compromise of both.

    W ~ N(0, std²) with std = gain sqrt(2 / (fan_in + fan_out)). Not truncated unless asked, while Keras's
    `GlorotNormal` is.

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeNormal`, or
    `gain="relu"`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        gain: A factor above 0, or the name of an activation, whose `calculate_gain` is the factor.
        truncated: Cut the distribution off at two standard deviations of the normal variable that is cut, and widen it
            so that the standard deviation after the cut is the one above (Keras's only form).
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

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
    twin=lambda fan_in, _out, negative_slope=0.0, **_: (2 / (1 + negative_slope**2) / fan_in) ** 0.5,
)
class HeUniform(_He, _Uniform, _WithSlope):
    """Uniform values that keep the variance of signals through ReLU layers.

    W ~ U(-a, +a) with a = sqrt(6 / ((1 + s²) fan_in)), so std = sqrt(2 / ((1 + s²) fan_in)), with s = `negative_slope`.

    When not to use it: with tanh, sigmoid or no activation, where signals would grow from layer to
    layer: see `XavierUniform`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        negative_slope: The slope of a leaky ReLU below 0.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: He et al. 2015, arXiv 1502.01852, equations 10 and 14, and 15 for a slope, with a uniform
    distribution of that variance.

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
    cases=({}, {"truncated": True, "negative_slope": 0.5, "seed": 7}),
    twin=lambda fan_in, _out, negative_slope=0.0, **_: (2 / (1 + negative_slope**2) / fan_in) ** 0.5,
)
class HeNormal(_He, _NormalWithSlope):
    """Normal values that keep the variance of signals through ReLU layers.

    W ~ N(0, std²) with std = sqrt(2 / ((1 + s²) fan_in)) and s = `negative_slope`. Not truncated unless asked, while
    Keras's `HeNormal` is.

    When not to use it: with tanh, sigmoid or no activation, where signals would grow from layer to
    layer: see `XavierNormal`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        negative_slope: The slope of a leaky ReLU below 0.
        truncated: Cut the distribution off at two standard deviations of the normal variable that is cut, and widen it
            so that the standard deviation after the cut is the one above (Keras's only form).
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: He et al. 2015, arXiv 1502.01852, equations 10 and 14, and 15 for a slope.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(32, 3, activation="relu", kernel_initializer=ok.initializers.HeNormal())
    ```
    """


@register(
    "initializer",
    paper="LeCun, Bottou, Orr and Müller 1998, Efficient BackProp",
    parity="keras.initializers.LecunUniform; scipy.stats.uniform",
    tags=("variance",),
    cases=({}, {"gain": 2.0, "seed": 7}),
    twin=lambda fan_in, _out, gain=1.0, **_: gain * (1 / fan_in) ** 0.5,
)
class LeCunUniform(_LeCun, _Uniform, _WithGain):
    """Uniform values that keep the variance of signals through linear and self-normalizing layers.

    W ~ U(-a, +a) with a = gain sqrt(3 / fan_in), so std = gain / sqrt(fan_in).

    torch's `Linear` and convolutions begin with U(-1/sqrt(fan_in), +1/sqrt(fan_in)), which is `gain=3**-0.5`; their
    biases are `BiasUniform`.

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeUniform`, or
    `gain="relu"`.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        gain: A factor above 0, or the name of an activation, whose `calculate_gain` is the factor.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

    Source: LeCun et al. 1998, equation 16.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(64, activation="tanh", kernel_initializer=ok.initializers.LeCunUniform(gain="tanh"))
    ```
    """


@register(
    "initializer",
    paper="LeCun, Bottou, Orr and Müller 1998, Efficient BackProp; 1706.02515",
    parity="keras.initializers.LecunNormal (truncated); scipy.stats.norm",
    tags=("variance",),
    cases=({}, {"truncated": True, "gain": 2.0, "seed": 7}),
    twin=lambda fan_in, _out, gain=1.0, **_: gain * (1 / fan_in) ** 0.5,
)
class LeCunNormal(_LeCun, _NormalWithGain):
    """Normal values that keep the variance of signals through linear and self-normalizing layers.

    W ~ N(0, std²) with std = gain / sqrt(fan_in). Not truncated unless asked, while Keras's `LecunNormal` is.

    When not to use it: for ReLU layers, where half of the variance is lost at each layer: see `HeNormal`, or
    `gain="relu"`, which is the same.

    Args:
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        gain: A factor above 0, or the name of an activation, whose `calculate_gain` is the factor.
        truncated: Cut the distribution off at two standard deviations of the normal variable that is cut, and widen it
            so that the standard deviation after the cut is the one above (Keras's only form).
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

    Source: LeCun et al. 1998, equation 16; for SELU, Klambauer et al. 2017, arXiv 1706.02515.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(64, activation="selu", kernel_initializer=ok.initializers.LeCunNormal())
    ```
    """

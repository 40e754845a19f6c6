"""Distributions that do not depend on the shape: normal, uniform, truncated normal."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.initializers.base import Seed, Seeded
from keras_optkit.registry import register

#: Standard deviation of a standard normal variable cut off at two: 1 - 2 * 2 phi(2) / P(|z| < 2) is its variance.
TRUNCATED_STD = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))


@register(
    "initializer",
    paper="the plain normal distribution",
    parity="scipy.stats.norm",
    tags=("variance",),
    cases=({}, {"mean": 1.0, "stddev": 2.0, "seed": 7}),
    twin=lambda _in, _out, stddev=0.05, **_: stddev,
)
class RandomNormal(Seeded):
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
class RandomUniform(Seeded):
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


@register(
    "initializer",
    paper="the normal distribution cut off at two standard deviations",
    parity="keras.initializers.TruncatedNormal; torch.nn.init.trunc_normal_; scipy.stats.truncnorm",
    tags=("variance",),
    cases=({}, {"mean": 1.0, "stddev": 2.0, "corrected": False, "seed": 7}),
    twin=lambda _in, _out, stddev=0.05, corrected=True, **_: stddev * (1 if corrected else 0.879625661034239),
)
class RandomTruncatedNormal(Seeded):
    """Normal values without the tails, whatever the shape.

    W ~ N(mean, s²) with values farther than 2 s from the mean drawn again, and s = stddev / 0.8796, so that `stddev` is
    the standard deviation of what is drawn.

    Keras's `TruncatedNormal(mean, stddev)` and torch's `trunc_normal_(w, mean, std, mean - 2 std, mean + 2 std)` have
    s = stddev, and draw values of a standard deviation that is 12 % smaller: `corrected=False` does, too.

    When not to use it: for the kernels of deep networks, as `RandomNormal` says, unless a recipe names the standard
    deviation, as those of vision Transformers and BERT do (0.02, not corrected).

    Args:
        mean: The mean.
        stddev: The standard deviation, above 0.
        corrected: Whether `stddev` is that of the values that are drawn; False: of the normal variable that is cut.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `stddev` is not above 0. When called: the shape is a scalar's, or the dtype is not floating point.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    start = ok.initializers.RandomTruncatedNormal(stddev=0.02)
    layer = keras.layers.Embedding(1000, 16, embeddings_initializer=start)
    ```
    """

    def __init__(self, mean: float = 0.0, stddev: float = 0.05, corrected: bool = True, seed: Seed = None) -> None:
        super().__init__(seed)
        self.mean = arguments.real("mean", mean)
        self.stddev = arguments.real("stddev", stddev, 0, closed="neither")
        self.corrected = arguments.boolean("corrected", corrected)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        std = self.stddev / TRUNCATED_STD if self.corrected else self.stddev
        return keras.random.truncated_normal(shape, self.mean, std, dtype=dtype, seed=seed)

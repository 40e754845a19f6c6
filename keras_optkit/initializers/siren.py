"""Kernels of networks with sines."""

from __future__ import annotations

import math
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.initializers.base import Axes, Seed, SeededOfKernel
from keras_optkit.registry import register


@register(
    "initializer",
    paper="2006.09661",
    parity="scipy.stats.uniform",
    tags=("variance",),
    cases=({}, {"first": True, "seed": 7}),
    twin=lambda fan_in, _out, omega_0=30.0, first=False, **_: (
        (1 / fan_in if first else (6 / fan_in) ** 0.5 / omega_0) / 3**0.5
    ),
)
class SIREN(SeededOfKernel):
    """Kernels of layers x -> sin(omega_0 (W x + b)), for signals that are the same at every depth.

    ```text
    first layer      W ~ U(-1 / fan_in, +1 / fan_in)
    hidden layers    W ~ U(-sqrt(6 / fan_in) / omega_0, +sqrt(6 / fan_in) / omega_0)
    ```

    The first layer is the one that sees coordinates, which should be in [-1, 1]; `omega_0` then is the frequency of
    its sines. The authors' code draws biases as torch does: see `BiasUniform`.

    When not to use it: without sines, and without the factor omega_0 inside of them: hidden layers would be linear.

    Args:
        omega_0: The factor in the sine, above 0. The same in the activation; 1 for sin(W x + b).
        first: Whether it is the first layer, whose values do not depend on `omega_0`.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `omega_0` is not above 0, or only one of `input_axes` and `output_axes` is given. When called: the
            shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

    Source: Sitzmann et al. 2020, arXiv 2006.09661, section 3.2 and its supplement; the first
    layer as in the authors' code.

    Example:
    ```python
    import keras
    import keras_optkit as ok


    def sine(x):
        return keras.ops.sin(30.0 * x)


    first = keras.layers.Dense(64, sine, kernel_initializer=ok.initializers.SIREN(first=True))
    hidden = keras.layers.Dense(64, sine, kernel_initializer=ok.initializers.SIREN(omega_0=30.0))
    model = keras.Sequential([keras.Input((2,)), first, hidden, keras.layers.Dense(3)])
    ```
    """

    def __init__(
        self,
        omega_0: float = 30.0,
        first: bool = False,
        seed: Seed = None,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.omega_0 = arguments.real("omega_0", omega_0, 0, closed="neither")
        self.first = arguments.boolean("first", first)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        fan_in = max(self._kernel_axes(shape).fans(shape)[0], 1)
        limit = 1 / fan_in if self.first else math.sqrt(6 / fan_in) / self.omega_0
        return keras.random.uniform(shape, -limit, limit, dtype=dtype, seed=seed)

"""Kernels in which few weights of each unit are not zero."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import keras
from keras import ops

from keras_optkit import arguments
from keras_optkit.initializers.base import Axes, Seed, SeededOfKernel, another
from keras_optkit.kernels import from_matrices, matrix_shape
from keras_optkit.registry import register

_CONNECTIONS = 15


def _twin(
    inputs: int, connections: int | None = None, sparsity: float | None = None, stddev: float = 1.0, **_: Any
) -> tuple[int, float]:
    """How many weights of a unit are not zero, and their standard deviation."""
    zeros = -int(-inputs * Fraction(str(sparsity)) // 1) if sparsity else inputs - min(connections or 15, inputs)
    return inputs - zeros, stddev


@register(
    "initializer",
    paper="Martens 2010, Deep learning via Hessian-free optimization, section 5",
    parity="torch.nn.init.sparse_",
    tags=("sparse",),
    cases=({}, {"connections": 4, "stddev": 0.5, "seed": 7}, {"sparsity": 0.3, "stddev": 0.01}),
    twin=_twin,
)
class Sparse(SeededOfKernel):
    """Each unit is connected to a few inputs, which are chosen at random, with normal weights; the others are 0.

    Of the fan_in weights of a unit, `connections` are drawn from N(0, stddev²); or, with `sparsity`,
    fan_in - ceil(sparsity fan_in). How large the input of a unit is then does not depend on the width of the layer
    before, and units differ from each other.

    torch's `sparse_` has zeros for each *column* of a matrix (out, in), that is for each input and not for each unit.
    It counts them as `sparsity` does here, and its default standard deviation is 0.01.

    When not to use it: to make training or prediction cheaper; the zeros are ordinary weights, which are trained. For
    convolutions with small windows `HeNormal` is the usual choice.

    Args:
        connections: How many weights of a unit are not zero, >= 1; all if there are not as many. Default: 15, unless
            `sparsity` is given.
        sparsity: The share of a unit's weights that are zero, in [0, 1), rounded up to whole weights.
        stddev: The standard deviation of the others, above 0.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A value is out of range, both of `connections` and `sparsity` are given, or only one of `input_axes`
            and `output_axes`. When called: the shape is a scalar's, or a vector's without axes, or the dtype is not
            floating point.

    Source: Martens 2010, section 5, with 15 connections; unit normal weights as in Sutskever et al. 2013.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, activation="tanh", kernel_initializer=ok.initializers.Sparse(connections=3))
    layer.build((None, 20))
    print(keras.ops.sum(keras.ops.cast(layer.kernel != 0, "int32"), axis=0))  # 3 for each unit
    ```
    """

    def __init__(
        self,
        connections: int | None = None,
        sparsity: float | None = None,
        stddev: float = 1.0,
        seed: Seed = None,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.connections = arguments.integer("connections", connections, 1, optional=True)
        self.sparsity = arguments.real("sparsity", sparsity, 0, 1, closed="left", optional=True)
        if connections is not None and sparsity is not None:
            raise ValueError(
                "connections and sparsity must not be given together, "
                f"got connections={connections!r} and sparsity={sparsity!r}."
            )
        self.stddev = arguments.real("stddev", stddev, 0, closed="neither")

    def _connected(self, inputs: int) -> int:
        if self.sparsity is None:
            return min(self.connections or _CONNECTIONS, inputs)
        found = inputs - math.ceil(self.sparsity * inputs - 1e-9)  # 0.55 * 100 is a little more than 55
        if inputs and not found:
            raise ValueError(f"sparsity must leave a unit of {inputs} inputs a weight, got {self.sparsity}.")
        return found

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        axes = self._kernel_axes(shape)
        matrices = matrix_shape(shape, axes)
        # the order of random values is a random permutation of a unit's inputs
        order = ops.argsort(keras.random.uniform(matrices, dtype="float32", seed=another(seed, 1)), axis=1)
        weights = keras.random.normal(matrices, 0.0, self.stddev, dtype=dtype, seed=seed)
        chosen = ops.where(order < self._connected(matrices[1]), weights, ops.zeros_like(weights))
        return ops.squeeze(from_matrices(chosen, (1, *shape), axes), 0)

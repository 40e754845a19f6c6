"""Kernels that are orthogonal matrices."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_optkit.initializers.base import Axes, Seed, SeededOfKernel, centered, centered_shape
from keras_optkit.initializers.gains import checked_gain, gain_of
from keras_optkit.kernels import KernelAxes, matrix_shape
from keras_optkit.registry import register


def haar(count: int, rows: int, columns: int, dtype: str, seed: Any) -> Any:
    """Matrices with orthonormal rows or columns, whichever are fewer, drawn uniformly: (count, rows, columns)."""
    shape = (count, max(rows, columns), min(rows, columns))
    q, r = ops.qr(keras.random.normal(shape, dtype=dtype, seed=seed))
    diagonal = ops.diagonal(r, axis1=-2, axis2=-1)
    ones = ops.ones_like(diagonal)
    q = q * ops.where(diagonal < 0, -ones, ones)[:, None, :]
    return ops.swapaxes(q, -1, -2) if rows < columns else q


def orthogonal(shape: tuple[int, ...], axes: KernelAxes, dtype: str, seed: Any) -> Any:
    """A kernel of this shape with a matrix for each of its maps, whose columns are the side of the last axis."""
    last = len(shape) - 1
    split = (*shape[:-1], axes.groups, shape[-1] // axes.groups)  # the last axis becomes (groups, last / groups)
    inputs, outputs = ({axis + (axis == last) for axis in side} for side in (axes.inputs, axes.outputs))
    columns = inputs - outputs if last + 1 in inputs - outputs else outputs - inputs
    rows = (inputs | outputs) - columns
    order = [*sorted(set(range(last + 2)) - rows - columns), *sorted(rows), *sorted(columns)]
    m, n = (math.prod(split[axis] for axis in side) for side in (rows, columns))
    maps = math.prod(shape) // max(m * n, 1)

    kernel = ops.reshape(haar(maps, m, n, dtype, seed), [split[axis] for axis in order])
    inverse = sorted(range(last + 2), key=order.__getitem__)
    return ops.reshape(ops.transpose(kernel, inverse), shape)


@register(
    "initializer",
    paper="1312.6120",
    parity="keras.initializers.Orthogonal; numpy.linalg",
    tags=("orthogonal",),
    cases=({}, {"gain": 2.0, "seed": 7}),
    twin=lambda gain=1.0, **_: gain,
)
class Orthogonal(SeededOfKernel):
    """Kernels whose rows or columns, whichever are fewer, are orthogonal and of length `gain`.

    The kernel is read as a matrix W, with the side of its last axis (the outputs, in a kernel (*window, in, out)) as
    columns: W^T W = gain² I for a tall matrix, W W^T = gain² I for a wide one. A depthwise or grouped kernel holds one
    such matrix for each channel or group, and that of an LSTM, GRU or ConvLSTM one for each gate, where Keras's
    `Orthogonal` makes one matrix of all gates. The matrices are drawn uniformly (Haar measure).

    When not to use it: for very wide kernels, where the decomposition takes long (a 4096 x 4096 kernel: seconds). A
    convolution with such a kernel does not keep the norm of an image, only of each window.

    Args:
        gain: The length of the rows or columns, above 0, or the name of an activation, whose `calculate_gain` it is.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

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
        gain: float | str = 1.0,
        seed: Seed = None,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.gain = checked_gain(gain)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        return gain_of(self.gain) * orthogonal(shape, self._kernel_axes(shape), dtype, seed)


@register(
    "initializer",
    paper="1806.05393",
    parity="numpy.linalg",
    tags=("centered", "orthogonal"),
    cases=({}, {"gain": 2.0, "seed": 7}),
    twin=lambda gain=1.0, **_: gain,
)
class DeltaOrthogonal(SeededOfKernel):
    """Convolutions that keep the norm of images: an orthogonal matrix in the middle of the window, and zeros around it.

    W[middle] = gain Q and W = 0 elsewhere, where Q has orthonormal rows or columns, whichever are fewer, between the
    channels in and out, and is drawn uniformly (Haar measure). With `gain=1`, padding "same", a stride of 1 and at
    least as many channels out as in, the output of the convolution has the norm of its input, whatever its size. With
    fewer out than in, the gradient keeps its norm. A kernel without a window is that of `Orthogonal`.

    The middle of a window of even size k is the position (k - 1) // 2, which padding "same" leaves in place. Grouped
    and depthwise convolutions hold one matrix for each group or channel.

    When not to use it: where a convolution must see its window from the first update on, as in shallow networks; it
    begins as a convolution with a window of 1. It is made for networks of hundreds of layers with tanh or ReLU and
    without normalization.

    Args:
        gain: The length of the rows or columns, above 0, or the name of an activation, whose `calculate_gain` it is.
        seed: An int, a `keras.random.SeedGenerator` or None, as for `RandomNormal`.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, or only one of `input_axes` and `output_axes` is given.
            When called: the shape is a scalar's, or a vector's without axes, or the dtype is not floating point.

    Source: Xiao et al. 2018, arXiv 1806.05393, the delta-orthogonal kernels, which there have at least as many channels
    out as in.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    start = ok.initializers.DeltaOrthogonal(seed=1)
    layer = keras.layers.Conv2D(8, 3, padding="same", kernel_initializer=start)
    x = keras.random.normal((1, 9, 9, 4), seed=0)
    print(keras.ops.sum(x**2), keras.ops.sum(layer(x) ** 2))  # the same
    ```
    """

    def __init__(
        self,
        gain: float | str = 1.0,
        seed: Seed = None,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(seed, input_axes=input_axes, output_axes=output_axes)
        self.gain = checked_gain(gain)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        axes = self._kernel_axes(shape)
        count, rows, columns = matrix_shape(centered_shape(shape, axes), axes)
        return gain_of(self.gain) * centered(haar(count, rows, columns, dtype, seed), shape, axes)

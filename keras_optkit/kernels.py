"""Which axes of a layer's kernel are inputs and which are outputs.

This is decided here for all: initializers need the fans, and optimizers that treat a kernel as a matrix need to know
which. Shapes do not tell: a depthwise kernel looks like any other, a transposed convolution has its outputs first, the
kernels of attention have three axes, and its biases two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops


class KernelAxes(NamedTuple):
    """Which axes of a kernel a unit's inputs, and an input's outputs, run over.

    A convolution's window is in both; an axis in neither (the channels of a depthwise kernel) numbers separate maps.
    `groups` splits the last axis into that many separate maps, those of a grouped convolution or of gates.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int = 1

    def fans(self, shape: Sequence[int]) -> tuple[int, int]:
        """Fan-in and fan-out of a kernel of this shape."""
        fan_in, fan_out = (math.prod(shape[axis] for axis in axes) for axes in (self.inputs, self.outputs))
        return fan_in, fan_out // self.groups

    def separate(self, rank: int) -> tuple[int, ...]:
        """The axes that number separate maps."""
        return tuple(axis for axis in range(rank) if axis not in self.inputs and axis not in self.outputs)

    def columns(self) -> tuple[int, ...]:
        """The outputs without a window, which goes with the inputs where a kernel is seen as a matrix."""
        return tuple(axis for axis in self.outputs if axis not in self.inputs)


def by_shape(rank: int) -> KernelAxes:
    """Keras's layout of dense and convolution kernels: (*window, in, out)."""
    window = tuple(range(rank - 2))
    return KernelAxes((*window, rank - 2), (*window, rank - 1))


def of_layout(layout: str, rank: int) -> KernelAxes:
    """The axes of a kernel of layout "standard", "transposed" (*window, out, in) or "depthwise" (*window, in, out)."""
    window, last = tuple(range(rank - 2)), rank - 1
    if layout == "transposed":
        return KernelAxes((*window, last), (*window, last - 1))
    return KernelAxes(window, (*window, last)) if layout == "depthwise" else by_shape(rank)


def recurrent_units(layer: Any) -> int:
    """The units, or filters, of each gate of a recurrent layer or cell; 0 for other layers."""
    recurrent = hasattr(layer, "recurrent_initializer") and hasattr(layer, "state_size")
    return int(getattr(layer, "units", None) or getattr(layer, "filters", None) or 0) if recurrent else 0


def in_layer(layer: Any, shape: tuple[int, ...]) -> KernelAxes | None:
    """The axes of `layer`'s kernel of this shape, or None where there is nothing to know but the shape."""
    units = recurrent_units(layer)
    if units and shape[-1] % units == 0:
        return by_shape(len(shape))._replace(groups=shape[-1] // units)  # its gates side by side
    if len(shape) < 3 or getattr(layer, "kernel_size", None) != shape[:-2]:
        return None
    layers = keras.layers
    depthwise = isinstance(layer, layers.DepthwiseConv1D | layers.DepthwiseConv2D)
    # The pointwise kernel of a separable convolution has a window of 1, so the depthwise one is known by a larger one,
    # or by how many channels it makes of each.
    separable = isinstance(layer, layers.SeparableConv1D | layers.SeparableConv2D) and (
        max(layer.kernel_size) > 1 or layer.filters != shape[-1] == layer.depth_multiplier
    )
    if depthwise or separable:
        return of_layout("depthwise", len(shape))
    if isinstance(layer, layers.Conv1DTranspose | layers.Conv2DTranspose | layers.Conv3DTranspose):
        return of_layout("transposed", len(shape))
    if isinstance(layer, layers.Conv1D | layers.Conv2D | layers.Conv3D):
        return by_shape(len(shape))._replace(groups=layer.groups)
    return None


def in_equation(equation: str) -> KernelAxes:
    """The axes of the kernel of `keras.layers.EinsumDense`, whose equation names all of them: "abc,cde->abde"."""
    given, found = equation.replace("...", "").replace(" ", "").split("->")
    inputs, kernel = given.split(",")
    return KernelAxes(
        tuple(place for place, axis in enumerate(kernel) if axis in inputs and axis not in found),
        tuple(place for place, axis in enumerate(kernel) if axis in found and axis not in inputs),
    )


def matrix_shape(shape: Sequence[int], axes: KernelAxes | None) -> tuple[int, int, int]:
    """How many matrices a kernel is, and their rows and columns; see `as_matrices`."""
    axes = axes or by_shape(len(shape))
    rows, columns, count = (
        math.prod(shape[axis] for axis in found) for found in (axes.inputs, axes.columns(), axes.separate(len(shape)))
    )
    return count * axes.groups, rows, columns // axes.groups


def as_matrices(x: Any, axes: KernelAxes | None) -> Any:
    """Kernels of one shape as matrices from inputs to outputs, `(k, *shape)` to `(n, rows, columns)`.

    A convolution's window is in the rows, and each separate map is a matrix by itself: n is k times their number.
    Without axes, as for the table of an embedding, the last axis has the columns.
    """
    shape = tuple(x.shape)
    axes = axes or by_shape(len(shape) - 1)
    count, rows, columns = matrix_shape(shape[1:], axes)
    apart = ops.transpose(ops.reshape(x, _split(shape, axes)), _order(len(shape) - 1, axes))
    return ops.reshape(apart, (shape[0] * count, rows, columns))


def from_matrices(matrices: Any, shape: Sequence[int], axes: KernelAxes | None) -> Any:
    """The inverse of `as_matrices`, to kernels of this shape, `(k, *shape)`."""
    axes = axes or by_shape(len(shape) - 1)
    split, order = _split(shape, axes), _order(len(shape) - 1, axes)
    back = sorted(range(len(order)), key=order.__getitem__)
    return ops.reshape(ops.transpose(ops.reshape(matrices, [split[axis] for axis in order]), back), shape)


def _split(shape: Sequence[int], axes: KernelAxes) -> tuple[int, ...]:
    """The shape with the axis of groups apart, before that of the outputs in each."""
    return (*shape[:-1], axes.groups, shape[-1] // axes.groups)


def _order(rank: int, axes: KernelAxes) -> tuple[int, ...]:
    """The axes of the split shape: which kernel, which separate map, the inputs, the outputs."""
    last = rank - 1

    def placed(found: Sequence[int]) -> list[int]:  # the leading axis before, that of groups before the last
        return [axis + 1 + (axis == last) for axis in found]

    return (0, *placed(axes.separate(rank)), rank, *placed(axes.inputs), *placed(axes.columns()))


#: What a variable is for its layer.
KERNEL, TABLE, VECTOR = "kernel", "table", "vector"


def is_state(variable: Any, layer: Any) -> bool:
    """Whether a variable is a layer's state and not a weight; of a frozen layer, nothing is."""
    return layer.trainable and not variable.trainable


def role(variable: Any, layer: Any = None) -> tuple[str, KernelAxes | None]:
    """What a variable is for its layer, and of a kernel the axes.

    A kernel is a linear map, a table the rows of an embedding, and a vector everything else, of whatever rank: biases,
    those of attention among them, and the scales and shifts of a normalisation.

    Args:
        variable: A variable of a built layer.
        layer: The layer that it belongs to itself; None where it is not known, and the shape and the name decide.
    """
    shape = tuple(variable.shape)
    if len(shape) < 2:
        return VECTOR, None
    layers = keras.layers
    if isinstance(layer, layers.Embedding):
        return TABLE, None
    if isinstance(layer, layers.EinsumDense):
        return (VECTOR, None) if variable is layer.bias else (KERNEL, in_equation(layer.equation))
    if isinstance(layer, layers.BatchNormalization | layers.LayerNormalization | layers.GroupNormalization):
        return VECTOR, None
    name = str(variable.name).rsplit("/", 1)[-1].partition(":")[0]
    if "bias" in name or name.startswith(("beta", "gamma")):
        return VECTOR, None
    if "embedding" in name and layer is None:
        return TABLE, None
    return KERNEL, in_layer(layer, shape) or by_shape(len(shape))

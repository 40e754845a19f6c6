"""Kernels that nothing is drawn for: identities and Hadamard matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.initializers.base import Axes, OfKernel, centered, centered_shape
from keras_optkit.initializers.gains import checked_gain, gain_of
from keras_optkit.kernels import KernelAxes, matrix_shape
from keras_optkit.registry import register


def _hadamard(inputs: int, outputs: int) -> np.ndarray:
    """ZerO's matrix, in plain NumPy: the twin of the initializer's."""
    if outputs <= inputs:
        return np.eye(inputs, outputs)
    full: np.ndarray = np.ones((1, 1))
    while len(full) < outputs:
        full = np.kron([[1, 1], [1, -1]], full) / 2**0.5
    return full[:inputs, :outputs]


class _Exact(OfKernel):
    """One matrix in the middle of the window of every map, and zeros around it."""

    def _values(self, shape: tuple[int, ...], dtype: str) -> Any:
        axes = self._maps(shape)
        count, rows, columns = matrix_shape(centered_shape(shape, axes), axes)
        matrix = ops.convert_to_tensor(self._matrix(rows, columns), dtype)
        return centered(ops.broadcast_to(matrix, (count, rows, columns)), shape, axes)

    def _maps(self, shape: tuple[int, ...]) -> KernelAxes:
        return self._kernel_axes(shape)

    def _matrix(self, inputs: int, outputs: int) -> np.ndarray:
        raise NotImplementedError


@register(
    "initializer",
    paper="torch.nn.init.dirac_; Zagoruyko and Komodakis, arXiv 1706.00388",
    parity="torch.nn.init.dirac_",
    tags=("deterministic", "centered", "exact"),
    cases=({}, {"gain": 0.5}),
    twin=lambda inputs, outputs, gain=1.0, **_: gain * np.eye(inputs, outputs),
)
class Dirac(_Exact):
    """Convolutions, and other layers, that begin as the identity.

    W[middle] = gain I and W = 0 elsewhere: output channel i is input channel i, for as many as there are of both, and
    further outputs are 0. With padding "same" and a stride of 1 the image stays where it is. Each group of a grouped
    convolution, and each channel of a depthwise one, is an identity by itself. A dense kernel is I.

    The middle of a window of even size k is the position (k - 1) // 2, which padding "same" leaves in place, where
    torch's `dirac_` has k // 2. With odd sizes they are equal.

    When not to use it: for all layers of a plain network: channels beyond those of the input would stay 0 until the
    gradient tells them apart. It is made for layers that are added to a trained network, and for residual branches.

    Args:
        gain: The values on the diagonal, above 0, or the name of an activation, whose `calculate_gain` it is.
        groups: How many maps lie side by side in the kernel's last axis. Default: as many as the layer has.
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: `gain` is neither above 0 nor an activation, `groups` is below 1, or only one of `input_axes` and
            `output_axes` is given. When called: `groups` does not divide the last axis, or that one has the
            inputs, as in transposed convolutions, the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: `torch.nn.init.dirac_`.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(4, 3, padding="same", kernel_initializer=ok.initializers.Dirac())
    x = keras.random.normal((1, 5, 5, 4), seed=0)
    print(float(keras.ops.max(abs(layer(x) - x))))  # 0.0
    ```
    """

    def __init__(
        self,
        gain: float | str = 1.0,
        groups: int | None = None,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(input_axes=input_axes, output_axes=output_axes)
        self.gain = checked_gain(gain)
        self.groups = arguments.integer("groups", groups, 1, optional=True)

    def _maps(self, shape: tuple[int, ...]) -> KernelAxes:
        axes = self._kernel_axes(shape)
        if self.groups is None:
            return axes
        last = len(shape) - 1
        if last not in axes.outputs or last in axes.inputs:
            raise ValueError(f"groups must be None where a kernel's last axis has its inputs, got {self.groups}.")
        if shape[-1] % self.groups:
            raise ValueError(f"groups must divide the last axis of shape={shape}, got groups={self.groups}.")
        return axes._replace(groups=self.groups)

    def _matrix(self, inputs: int, outputs: int) -> np.ndarray:
        return gain_of(self.gain) * np.eye(inputs, outputs)


@register(
    "initializer",
    paper="2110.12661",
    parity="scipy.linalg.hadamard",
    tags=("deterministic", "centered", "exact"),
    cases=({},),
    twin=lambda inputs, outputs, **_: _hadamard(inputs, outputs),
)
class ZerO(_Exact):
    """Kernels of zeros, ones and a Hadamard matrix, without anything random.

    ```text
    no more outputs than inputs    W = I,  the first rows of an identity, for as many outputs as there are
    more outputs than inputs       W = 2^(-m/2) H_m,  its first rows and columns,  m = ceil(log2(outputs))
    H_0 = [1],  H_m = [[H_(m-1), H_(m-1)], [H_(m-1), -H_(m-1)]]
    ```

    A convolution has this matrix in the middle of its window and zeros around it. Identities alone would keep the
    rank of what a network learns at the number of its inputs; the Hadamard matrix, where a layer widens, does not.

    The factor is the one of the authors' code, with which H_m is orthonormal; the paper's text has 2^(-(m-1)/2), that
    is sqrt(2) times as large.

    When not to use it: alone in a network without skip connections; the method also sets the last layer of each
    residual branch, and the output layer, to zero (`"zeros"`), and an identity keeps signals only where the activation
    does.

    Args:
        input_axes: The kernel's axes that a unit's inputs run over. Default: as the layer has them, or (*window, in)
            of a kernel (*window, in, out).
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise, (*window, out).

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: Only one of `input_axes` and `output_axes` is given. When called: the shape is a scalar's, or a
            vector's without axes, or the dtype is not floating point.

    Source: Zhao, Schäfer and Anandkumar 2021, arXiv 2110.12661, algorithms 1 and 2.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    widening = keras.layers.Dense(64, kernel_initializer=ok.initializers.ZerO())
    x = keras.ops.ones((1, 16))
    print(keras.ops.sum(x**2), keras.ops.sum(widening(x) ** 2))  # 16.0 and 16.0
    ```
    """

    def __init__(self, *, input_axes: Axes = None, output_axes: Axes = None) -> None:
        super().__init__(input_axes=input_axes, output_axes=output_axes)

    def _matrix(self, inputs: int, outputs: int) -> np.ndarray:
        if outputs <= inputs:
            return np.eye(inputs, outputs)
        exponent = (outputs - 1).bit_length()
        common = np.bitwise_count(np.arange(inputs)[:, None] & np.arange(outputs))  # bits that both numbers have
        return 2 ** (-exponent / 2) * np.where(common % 2, -1.0, 1.0)

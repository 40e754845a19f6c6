"""Penalties on kernels as matrices: on their rows and columns, and on their singular values."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.kernels import KernelAxes, as_matrices, in_equation, of_layout
from keras_optkit.registry import register
from keras_optkit.regularizers.base import as_loss, checked_factor, root, wide
from keras_optkit.saving import FromSignature
from keras_optkit.space import Choice, Float

__all__ = ["GroupLasso", "NuclearNorm", "Orthogonality", "SpectralNorm"]

_SPACE = {"factor": Float(1e-6, 1e-1, log=True)}
_LAYOUTS = ("standard", "transposed", "depthwise")


class OfKernel(FromSignature, keras.regularizers.Regularizer):
    """A penalty on a kernel whose axes are known: Keras gives a regularizer the variable, and not the layer.

    With `layout` "standard" a kernel is (*window, inputs, units), as of dense layers, convolutions, recurrent layers
    and embeddings (whose rows are the inputs), with "transposed" (*window, units, inputs), and with "depthwise"
    (*window, channels, multiplier), a map for each channel. Of an `EinsumDense` the layout is its equation. `groups`
    are as many maps side by side in the last axis: of a convolution with `groups`, or the gates of a recurrent layer.
    """

    def __init__(self, factor: float = 0.01, layout: str = "standard", groups: int = 1) -> None:
        self.factor = checked_factor("factor", factor)
        self.layout = layout
        if not (isinstance(layout, str) and layout.count("->") == 1 == layout.partition("->")[0].count(",")):
            arguments.choice("layout, if it is no equation of EinsumDense,", layout, _LAYOUTS)
        self.groups = arguments.integer("groups", groups, 1)
        if self.groups > 1 and layout != "standard":
            raise ValueError(f'groups must be 1 unless layout="standard", got {groups} and {layout!r}.')

    def __call__(self, x: Any) -> Any:
        """The penalty on the tensor or variable `x`."""
        kernel = wide(x)
        shape = tuple(kernel.shape)
        return as_loss(self.factor * self._penalty(kernel, self._axes(shape)), x)

    def _axes(self, shape: tuple[int, ...]) -> KernelAxes:
        if "->" in self.layout:
            letters = self.layout.replace("...", "").replace(" ", "").partition("->")[0].partition(",")[2]
            if len(letters) != len(shape):
                raise ValueError(
                    f"layout must be the equation of the layer, whose kernel is {shape}, got {self.layout!r}."
                )
            return in_equation(self.layout)
        least = 3 if self.layout == "depthwise" else 2
        if len(shape) < least:
            raise ValueError(
                f"A kernel of layout {self.layout!r} must have {least} axes or more, got shape {shape}; use the "
                f"regularizer on kernels only."
            )
        if shape[-1] % self.groups:
            raise ValueError(f"groups must divide the last axis of the kernel, {shape}, got {self.groups}.")
        return of_layout(self.layout, len(shape))._replace(groups=self.groups)

    def _penalty(self, kernel: Any, axes: KernelAxes) -> Any:
        """The penalty, without its factor, on a kernel in float32 or float64."""
        raise NotImplementedError


@register(
    "regularizer",
    paper="Yuan and Lin 2006, Model selection and estimation in regression with grouped variables; 1608.03665",
    parity="the formula is the reference",
    tags=("nonnegative", "zero_at_zero"),
    cases=({}, {"factor": 0.5, "by": "input"}),
    space={**_SPACE, "by": Choice(["unit", "input"])},
)
class GroupLasso(OfKernel):
    """The sum of the lengths of groups of weights, which makes whole units or inputs zero (structured sparsity).

    Ω(w) = factor Σ_g sqrt(m) ‖w_g‖, a scalar of the weights' dtype, with a group g for each unit (its weights from all
    inputs, over the window) or for each input (its weights to all units), and m the size of a group. A group of zeros
    has the gradient 0. Half precision is computed in float32.

    When not to use it: for zeros anywhere (`L1`); for exact zeros, unless you cut off what is small afterwards, since
    gradient steps oscillate around zero; before a normalisation, which scales the units up again.

    Args:
        factor: The factor λ, 0 or more.
        by: "unit" or "input".
        layout: "standard" for kernels of dense layers, convolutions, recurrent layers, and for embeddings, whose inputs
            are the rows; "transposed" for transposed convolutions, "depthwise" for depthwise ones (whose inputs are
            the channels); of an `EinsumDense` its equation.
        groups: Maps side by side in the last axis: the `groups` of a convolution, the gates of a recurrent layer.

    Raises:
        TypeError: `factor` is not a number, or `groups` is not an integer.
        ValueError: `factor` is negative, infinite or NaN, `by` or `layout` is unknown, or `groups` is below 1; when
            called, the weights do not have this layout.

    Source: Yuan and Lin 2006, Model selection and estimation in regression with grouped variables, section 2; for
    convolutions Wen et al. 2016, arXiv 1608.03665, section 3.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(8, 3, kernel_regularizer=ok.regularizers.GroupLasso(1e-4))
    ```
    """

    def __init__(self, factor: float = 0.01, by: str = "unit", layout: str = "standard", groups: int = 1) -> None:
        super().__init__(factor, layout, groups)
        self.by = arguments.choice("by", by, ("unit", "input"))

    def _penalty(self, kernel: Any, axes: KernelAxes) -> Any:
        along = axes.inputs if self.by == "unit" else axes.outputs
        shape = list(kernel.shape)
        if axes.groups > 1 and self.by == "input":  # an input of one of the maps, to its units
            kernel = ops.reshape(kernel, [*shape[:-1], axes.groups, shape[-1] // axes.groups])
            shape, along = list(kernel.shape), (*along[:-1], len(shape))
        size = math.prod(shape[axis] for axis in along)
        return size**0.5 * ops.sum(root(ops.sum(ops.square(kernel), along)))


@register(
    "regularizer",
    paper="1810.09102",
    parity="the formula is the reference",
    tags=("nonnegative",),
    cases=({}, {"mode": "double", "factor": 0.5}, {"mode": "srip"}),
    space={**_SPACE, "mode": Choice(["soft", "double", "srip"])},
)
class Orthogonality(OfKernel):
    """How far the weights of the units are from orthonormal.

    With W the kernel as a matrix, (inputs with the window, units), "soft" is factor ‖WᵀW - I‖²_F. "double" adds
    factor ‖WWᵀ - I‖²_F, for kernels with more units than inputs, whose columns cannot all be orthogonal. "srip", the
    spectral restricted isometry property, is factor σ(WᵀW - I), the largest absolute eigenvalue, estimated as
    ‖A²v‖ / ‖Av‖ with A = WᵀW - I and a random vector v, which is the same in every step. Separate maps (groups, gates,
    channels of a depthwise kernel) are matrices of their own, whose penalties are added up. It is a scalar of the
    weights' dtype. Half precision is computed in float32.

    When not to use it: on the last layer of a classifier; with a large `weight_decay`, which pulls the other way.

    Args:
        factor: The factor λ, 0 or more. The paper lowers it during training.
        mode: "soft", "double" or "srip".
        layout: See `GroupLasso`.
        groups: See `GroupLasso`.

    Raises:
        TypeError: `factor` is not a number, or `groups` is not an integer.
        ValueError: `factor` is negative, infinite or NaN, `mode` or `layout` is unknown, or `groups` is below 1; when
            called, the weights do not have this layout.

    Source: Bansal, Chen and Wang 2018, arXiv 1810.09102, equations 2, 3, 5 and 6. There v is drawn in each step.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Conv2D(8, 3, kernel_regularizer=ok.regularizers.Orthogonality(1e-4, mode="srip"))
    ```
    """

    def __init__(self, factor: float = 0.01, mode: str = "soft", layout: str = "standard", groups: int = 1) -> None:
        super().__init__(factor, layout, groups)
        self.mode = arguments.choice("mode", mode, ("soft", "double", "srip"))

    def _penalty(self, kernel: Any, axes: KernelAxes) -> Any:
        matrices = as_matrices(ops.expand_dims(kernel, 0), axes)
        transposed = ops.transpose(matrices, (0, 2, 1))
        off = _off_identity(ops.matmul(transposed, matrices))
        if self.mode == "srip":
            u = ops.matmul(off, _random(off))
            lengths = [ops.sqrt(_positive(ops.sum(ops.square(x), (1, 2)))) for x in (ops.matmul(off, u), u)]
            some = ops.sum(ops.square(u), (1, 2)) > 0  # else W is orthonormal
            return ops.sum(ops.where(some, lengths[0] / lengths[1], ops.zeros_like(lengths[0])))
        total = ops.sum(ops.square(off))
        if self.mode == "double":
            total = total + ops.sum(ops.square(_off_identity(ops.matmul(matrices, transposed))))
        return total


def _off_identity(grams: Any) -> Any:
    return grams - ops.eye(grams.shape[-1], dtype=grams.dtype)


def _positive(squares: Any) -> Any:
    """The squares, and 1 instead of 0, at which a root has no gradient and divides nothing."""
    return ops.where(squares > 0, squares, ops.ones_like(squares))


def _random(matrices: Any) -> Any:
    """A random column for matrices to be multiplied by, the same on every backend and in every step."""
    vector = np.random.default_rng(0).normal(size=(1, matrices.shape[-1], 1))
    column = ops.cast(ops.convert_to_tensor(vector, matrices.dtype), matrices.dtype)
    return ops.broadcast_to(column, (matrices.shape[0], *column.shape[1:]))


@register(
    "regularizer",
    paper="1705.10941",
    parity="numpy.linalg.norm(W, 2), and the formula",
    tags=("nonnegative", "zero_at_zero"),
    cases=({}, {"factor": 0.5, "power_iterations": 2}),
    space=_SPACE,
)
class SpectralNorm(OfKernel):
    """The square of the largest singular value, which makes a layer less sensitive to changes of its input.

    Ω(w) = factor σ(W)² / 2, a scalar of the weights' dtype, with W the kernel as a matrix, (inputs with the window,
    units), and σ = ‖W v‖ after `power_iterations` from a random vector, which is the same in every step:
    v ← WᵀW v / ‖WᵀW v‖. The gradient is factor σ u vᵀ with u = W v / σ. Separate maps (groups, gates, channels of a
    depthwise kernel) are matrices of their own, whose penalties are added up. Half precision is computed in float32.

    When not to use it: for a bound that holds in every step (`keras_optkit.layers.SpectralNormalization`). σ is
    estimated from below.

    Args:
        factor: The factor λ, 0 or more.
        layout: See `GroupLasso`.
        groups: See `GroupLasso`.
        power_iterations: At least 1. The paper has one in each step, and keeps v from step to step; a regularizer has
            no variables to keep it in, so that more are needed.

    Raises:
        TypeError: `factor` is not a number, or `groups` or `power_iterations` is not an integer.
        ValueError: `factor` is negative, infinite or NaN, `layout` is unknown, or `groups` or `power_iterations` is
            below 1; when called, the weights do not have this layout.

    Source: Yoshida and Miyato 2017, arXiv 1705.10941, section 3 and algorithm 1.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_regularizer=ok.regularizers.SpectralNorm(0.01))
    ```
    """

    def __init__(
        self, factor: float = 0.01, layout: str = "standard", groups: int = 1, power_iterations: int = 10
    ) -> None:
        super().__init__(factor, layout, groups)
        self.power_iterations = arguments.integer("power_iterations", power_iterations, 1)

    def _penalty(self, kernel: Any, axes: KernelAxes) -> Any:
        matrices = as_matrices(ops.expand_dims(kernel, 0), axes)
        still = ops.stop_gradient(matrices)
        v = _random(matrices)
        for _ in range(self.power_iterations):
            v = ops.matmul(ops.transpose(still, (0, 2, 1)), ops.matmul(still, v))
            v = v / ops.sqrt(_positive(ops.sum(ops.square(v), 1, keepdims=True)))
        return 0.5 * ops.sum(ops.square(ops.matmul(matrices, ops.stop_gradient(v))))


@register(
    "regularizer",
    paper="Fazel, Hindi and Boyd 2001, A rank minimization heuristic with application to minimum order system",
    parity="numpy.linalg.norm(W, 'nuc')",
    tags=("nonnegative", "zero_at_zero"),
    cases=({}, {"factor": 0.5}),
    space=_SPACE,
)
class NuclearNorm(OfKernel):
    """The sum of the singular values, which lowers the rank of a kernel.

    Ω(w) = factor Σ σ_i(W), a scalar of the weights' dtype, with W the kernel as a matrix, (inputs with the window,
    units). The gradient is factor U Vᵀ over the singular values above the rounding errors (of those below it is 0, one
    of the subgradients). Separate maps (groups, gates, channels of a depthwise kernel) are matrices of their own, whose
    penalties are added up. Half precision is computed in float32.

    When not to use it: on large kernels, since each step has a singular value decomposition, which XLA does slowly on
    CPUs; for exact low rank, unless you cut off what is small afterwards.

    Args:
        factor: The factor λ, 0 or more.
        layout: See `GroupLasso`.
        groups: See `GroupLasso`.

    Raises:
        TypeError: `factor` is not a number, or `groups` is not an integer.
        ValueError: `factor` is negative, infinite or NaN, `layout` is unknown, or `groups` is below 1; when called, the
            weights do not have this layout.

    Source: Fazel, Hindi and Boyd 2001, A rank minimization heuristic with application to minimum order system
    approximation.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    layer = keras.layers.Dense(8, kernel_regularizer=ok.regularizers.NuclearNorm(1e-4))
    ```
    """

    def _penalty(self, kernel: Any, axes: KernelAxes) -> Any:
        matrices = as_matrices(ops.expand_dims(kernel, 0), axes)
        still = ops.stop_gradient(matrices)
        u, values, vt = ops.svd(still, full_matrices=False)
        least = max(matrices.shape[1:]) * float(np.finfo(keras.backend.standardize_dtype(matrices.dtype)).eps)
        kept = ops.cast(values > least * ops.max(values, -1, keepdims=True), matrices.dtype)
        # the gradient of <U Vᵀ, W>, whose value is the sum, is U Vᵀ: that of the decomposition is not needed
        direction = ops.matmul(u * ops.expand_dims(kept, 1), vt)
        return ops.sum(ops.stop_gradient(direction) * matrices)

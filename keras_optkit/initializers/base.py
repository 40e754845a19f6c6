"""What initializers have in common: shapes, dtypes, seeds, and which axes of a kernel are inputs and outputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_optkit import arguments
from keras_optkit.initializers.asking import asking_layer
from keras_optkit.kernels import KernelAxes, by_shape, from_matrices, in_equation, in_layer
from keras_optkit.precision import at_least_float32
from keras_optkit.saving import FromSignature, constructor_parameters

Seed: TypeAlias = int | keras.random.SeedGenerator | None
Axes: TypeAlias = Sequence[int] | None

_DTYPES = ("float16", "bfloat16", "float32", "float64")


class Shaped(FromSignature, keras.initializers.Initializer):
    """Shapes and dtypes, which all our initializers treat the same."""

    def __call__(self, shape: Sequence[int], dtype: Any = None) -> Any:
        """A tensor of this shape and floating-point dtype (default: `keras.config.floatx()`)."""
        if isinstance(shape, int | float | str) or shape is None:
            raise TypeError(f"shape must be a list or tuple of integers, got {shape!r}.")
        shape = tuple(arguments.integer(f"shape[{i}]", size, 0) for i, size in enumerate(shape))
        dtype = arguments.choice("dtype", keras.backend.standardize_dtype(dtype), _DTYPES)
        if not shape:
            raise ValueError(f"{type(self).__name__} needs a shape of rank 1 or more, got the scalar's shape=().")
        # A uniform bfloat16 takes 128 values, their mean off centre: half precision is drawn in float32 and rounded.
        return ops.cast(self._values(shape, at_least_float32(dtype)), dtype)

    def _values(self, shape: tuple[int, ...], dtype: str) -> Any:
        """The values, in float32 or float64."""
        raise NotImplementedError


class Seeded(Shaped):
    """An initializer that draws."""

    def __init__(self, seed: Seed = None) -> None:
        if not isinstance(seed, keras.random.SeedGenerator):
            seed = arguments.seed("seed", seed)
        self.seed = seed

    def _values(self, shape: tuple[int, ...], dtype: str) -> Any:
        # Keras would draw one seed per instance, and give two layers that share an instance the same weights. Python's
        # generator is where Keras draws such seeds from too: keras.utils.set_random_seed makes them repeatable.
        seed = random.randint(1, 10**9) if self.seed is None else self.seed
        return self._draw(shape, dtype, seed)

    def _draw(self, shape: tuple[int, ...], dtype: str, seed: Any) -> Any:
        """The values, in float32 or float64."""
        raise NotImplementedError


class OfKernel(Shaped, keras.initializers.VarianceScaling):
    """An initializer that must know which axes of the kernel are inputs and which are outputs.

    A `VarianceScaling` in name only: `EinsumDense`, and so attention, tells no other class its kernel's fan axes. It
    does so by building a copy with `from_config({**config, "seed": ..., "input_axes": ..., "output_axes": ...})`.
    """

    seed: Any = None

    def __init__(self, *, input_axes: Axes = None, output_axes: Axes = None) -> None:
        if (input_axes is None) != (output_axes is None):
            raise ValueError(
                "input_axes and output_axes must be given together or not at all, "
                f"got input_axes={input_axes!r} and output_axes={output_axes!r}."
            )
        self.input_axes = _axes("input_axes", input_axes)
        self.output_axes = _axes("output_axes", output_axes)

    def _inherited_config(self) -> dict[str, Any]:
        return {}  # not VarianceScaling's scale, mode and distribution

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Builds the object that `get_config` described; a seed is for those that draw."""
        left_out = {"seed"} - set(constructor_parameters(cls))
        return super().from_config({k: v for k, v in config.items() if k not in left_out}, custom_objects)

    def _kernel_axes(self, shape: tuple[int, ...]) -> KernelAxes:
        """The axes as given; else as the layer that asks has them; else by the shape."""
        if self.input_axes is not None and self.output_axes is not None:
            if max(self.input_axes + self.output_axes, default=0) >= len(shape):
                raise ValueError(
                    f"input_axes and output_axes must name axes 0 to {len(shape) - 1} of shape={shape}, "
                    f"got input_axes={self.input_axes} and output_axes={self.output_axes}."
                )
            return _with_separate_maps(KernelAxes(self.input_axes, self.output_axes))
        if len(shape) < 2:
            raise ValueError(
                f"{type(self).__name__} needs a shape of rank 2 or more, or input_axes and output_axes, to tell inputs "
                f"from outputs, got shape={shape}. For a vector use RandomNormal or RandomUniform."
            )
        return in_layer(asking_layer(), shape) or by_shape(len(shape))


class SeededOfKernel(Seeded, OfKernel):
    """An initializer of kernels that draws."""

    def __init__(self, seed: Seed = None, *, input_axes: Axes = None, output_axes: Axes = None) -> None:
        Seeded.__init__(self, seed)
        OfKernel.__init__(self, input_axes=input_axes, output_axes=output_axes)


def _with_separate_maps(axes: KernelAxes) -> KernelAxes:
    """The axes that `EinsumDense` gave, which counts those of separate maps ("b" of "abc,bcd->abd") as outputs."""
    layer = asking_layer()
    if isinstance(layer, keras.layers.EinsumDense):
        known = in_equation(layer.equation)
        if known.inputs == axes.inputs and set(known.outputs) < set(axes.outputs):
            return known
    return axes


def _axes(name: str, axes: Axes) -> tuple[int, ...] | None:
    if axes is None:
        return None
    if not isinstance(axes, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of integers or None, got {axes!r}.")
    found = tuple(arguments.integer(f"{name}[{i}]", axis, 0) for i, axis in enumerate(axes))
    if len(set(found)) < len(found):
        raise ValueError(f"{name} must not name an axis twice, got {axes!r}.")
    return found


def centered_shape(shape: tuple[int, ...], axes: KernelAxes) -> tuple[int, ...]:
    """The shape of the middle of a kernel's window."""
    return tuple(1 if axis in axes.inputs and axis in axes.outputs else size for axis, size in enumerate(shape))


def centered(matrices: Any, shape: tuple[int, ...], axes: KernelAxes) -> Any:
    """A kernel that is zero but in the middle of its window, where it is these matrices from inputs to outputs.

    The middle of an even window is the position that padding "same" leaves in place with a stride of 1.
    """
    middle = centered_shape(shape, axes)
    kernel = ops.squeeze(from_matrices(matrices, (1, *middle), axes), 0)
    missing = [size - inner for size, inner in zip(shape, middle, strict=True)]
    return ops.pad(kernel, [(each // 2, each - each // 2) for each in missing])


def another(seed: Any, index: int) -> Any:
    """A seed for a further draw, which an integer needs: it gives the same random bits to every draw.

    A `SeedGenerator` gives others by itself.
    """
    return (seed + index * 0x9E3779B9) % 2**32 if isinstance(seed, int) else seed

"""Where tensors are on the devices of a mesh: the layouts of `keras.distribution`, which JAX has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_optkit.backend.variables import handle

Tensor = Any


@dataclass(frozen=True)
class Placement:
    """The layout of a weight, and of its state, on the devices of a mesh.

    Attributes:
        weight: The weight's `jax.sharding.NamedSharding`.
        over: The axis of the mesh that state is additionally spread over; None if it has the weight's layout.
    """

    weight: Any
    over: str | None = None

    @property
    def is_split(self) -> bool:
        """Whether no device holds the whole weight."""
        return not self.weight.is_fully_replicated

    @property
    def is_one_of_several(self) -> bool:
        """Whether XLA may lay out what is computed from the weight otherwise, since not all of a step is alike."""
        axes = [size for size in self.weight.mesh.shape.values() if size > 1]
        return self.is_split or self.over is not None or len(axes) > 1

    @property
    def parts(self) -> int:
        """How many parts state is spread in."""
        return 1 if self.over is None else self.weight.mesh.shape[self.over]

    @property
    def whole(self) -> Any:
        """The layout of a tensor that every device holds."""
        return self._sharding(())

    def like_weight(self, first_axes: int = 0) -> Any:
        """The layout of a tensor in the shape of the weight, but for some axes before that are not split."""
        return self._sharding((*[None] * first_axes, *self.weight.spec))

    def of_state(self, shape: Sequence[int], *, as_weight: bool, stacked: bool = False) -> Any:
        """The layout of state.

        Args:
            shape: Its shape.
            as_weight: Whether that is the weight's, whose layout it then has. Of other shapes every device holds all.
            stacked: Whether it is that of several weights, which it is split by if that can be.
        """
        spec: list[Any] = [*self.weight.spec] if as_weight else []
        spec += [None] * (len(shape) - len(spec))
        axis = None if self.over is None or self.over in _names(spec) else self._divided(shape, spec, stacked)
        if axis is not None:
            spec[axis] = (*_names([spec[axis]]), self.over) if spec[axis] else self.over
        return self._sharding(spec)

    def spreads(self, layout: Any) -> bool:
        """Whether a layout has the axis that state is to be spread over."""
        return self.over in _names(layout.spec)

    def _divided(self, shape: Sequence[int], spec: Sequence[Any], stacked: bool) -> int | None:
        """The axis to split in `parts`: one that is whole, if there is such, and the longest of these."""
        there = [math.prod(self.weight.mesh.shape[name] for name in _names([entry])) for entry in spec]
        fits = [i for i, size in enumerate(shape) if size and size % (there[i] * self.parts) == 0]
        if stacked and 0 in fits:
            return 0
        return min(fits, key=lambda i: (there[i] > 1, -shape[i]), default=None)

    def _sharding(self, spec: Sequence[Any]) -> Any:
        import jax

        return jax.sharding.NamedSharding(self.weight.mesh, jax.sharding.PartitionSpec(*spec))


def _names(spec: Sequence[Any]) -> list[str]:
    """The axes of the mesh that a tensor is split over."""
    return [name for entry in spec if entry for name in (entry if isinstance(entry, tuple) else (entry,))]


def placement(variable: Any) -> Placement | None:
    """Where a weight is; None if it is on one device."""
    if keras.config.backend() != "jax":
        return None
    import jax

    sharding = getattr(handle(variable), "sharding", None)
    return Placement(sharding) if isinstance(sharding, jax.sharding.NamedSharding) else None


def data_axis() -> str | None:
    """The axis of the mesh that batches are split over; None without a distribution."""
    distribution = keras.distribution.distribution()
    return None if distribution is None else distribution.batch_dim_name


def placed(tensor: Tensor, sharding: Any) -> Tensor:
    """The same tensor, in a compiled step laid out like this."""
    import jax

    return jax.lax.with_sharding_constraint(tensor, sharding)


def computed(tensor: Tensor) -> Tensor:
    """The same tensor; how the result is laid out does not count for what it is computed from."""
    import jax

    return jax.lax.optimization_barrier(tensor)

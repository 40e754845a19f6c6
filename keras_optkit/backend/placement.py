"""The layouts of tensors on a mesh of devices, as set by `keras.distribution`. JAX only."""

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
        over: The axis of the mesh that state is also spread over; None if state has the weight's layout.
    """

    weight: Any
    over: str | None = None

    @property
    def is_split(self) -> bool:
        """Whether no device holds the whole weight."""
        return not self.weight.is_fully_replicated

    @property
    def is_one_of_several(self) -> bool:
        """Whether XLA may choose another layout for what is computed from the weight."""
        axes = [size for size in self.weight.mesh.shape.values() if size > 1]
        return self.is_split or self.over is not None or len(axes) > 1

    @property
    def parts(self) -> int:
        """The number of parts that state is split into."""
        return 1 if self.over is None else self.weight.mesh.shape[self.over]

    @property
    def whole(self) -> Any:
        """The layout of a tensor that every device holds in full."""
        return self._sharding(())

    def like_weight(self, first_axes: int = 0) -> Any:
        """The layout of a tensor in the shape of the weight, after some leading axes that are not split."""
        return self._sharding((*[None] * first_axes, *self.weight.spec))

    def of_state(self, shape: Sequence[int], *, as_weight: bool, stacked: bool = False) -> Any:
        """The layout of state.

        Args:
            shape: Its shape.
            as_weight: Whether it is the weight's shape. If so, state is split like the weight, else only by `over`.
            stacked: Whether its first axis counts stacked weights. If so, that axis is split if possible.
        """
        spec: list[Any] = [*self.weight.spec] if as_weight else []
        spec += [None] * (len(shape) - len(spec))
        axis = None if self.over is None or self.over in _names(spec) else self._divided(shape, spec, stacked)
        if axis is not None:
            spec[axis] = (*_names([spec[axis]]), self.over) if spec[axis] else self.over
        return self._sharding(spec)

    def spreads(self, layout: Any) -> bool:
        """Whether a layout contains the axis of the mesh that state is spread over."""
        return self.over in _names(layout.spec)

    def _divided(self, shape: Sequence[int], spec: Sequence[Any], stacked: bool) -> int | None:
        """The axis to split into `parts`: the longest that fits, if possible one that is not split yet; else None."""
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
    """The placement of a weight; None if it is on one device."""
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
    """The same tensor, with this layout in a compiled step."""
    import jax

    return jax.lax.with_sharding_constraint(tensor, sharding)


def computed(tensor: Tensor) -> Tensor:
    """The same tensor, behind a barrier: the layout of the result does not affect what it is computed from."""
    import jax

    return jax.lax.optimization_barrier(tensor)

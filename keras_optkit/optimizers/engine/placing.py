"""Weights and state on the devices of a mesh: which of them can share a bucket, and where each of them is.

State in the shape of a weight has the weight's layout, as Keras's own has. A weight that is split over devices is alone
in its bucket, since a tensor that it shared with others could not have its layout. All other state is held by every
device, or with `shard_state` spread over the axis of the mesh that batches are split over.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import tree

from keras_optkit import backend
from keras_optkit.backend import Placement
from keras_optkit.optimizers.engine.gradients import Grad
from keras_optkit.optimizers.engine.packing import PACK_BELOW, Bucket
from keras_optkit.optimizers.engine.plan import Plan, layout_for
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.groups import keras_path
from keras_optkit.optimizers.rule import Tensor

#: The parts with a tensor that is stored for each bucket, or several by name.
_STORED = ("accumulated", "average", "master", "product", "slots")


@dataclass(frozen=True)
class Places:
    """Where variables are, for packing them.

    Attributes:
        each: Of each variable.
    """

    each: Sequence[Placement | None]

    def alone(self, i: int) -> bool:
        """Whether a variable is split over devices, and so is in a bucket of its own."""
        place = self.each[i]
        return place is not None and place.is_split

    def flat(self, i: int, shape: Sequence[int]) -> bool:
        """Whether the state of a variable can be spread in no other way than laid out as one row, with zeros behind."""
        place = self.each[i]
        if place is None or place.over is None or place.is_split:
            return False
        return not place.spreads(place.of_state(shape, as_weight=True))

    def given_to(self, buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
        """The buckets, with their places."""
        return tuple(replace(bucket, placement=self.each[bucket.indices[0]]) for bucket in buckets)


def places(variables: Sequence[Any], *, shard_state: bool) -> Places:
    """Where variables are.

    Raises:
        ValueError: If state cannot be spread.
    """
    found = [backend.placement(variable) for variable in variables]
    if not shard_state:
        return Places(found)
    axis = backend.data_axis()
    if keras.config.backend() != "jax" or axis is None:
        raise ValueError(
            "shard_state must be False without a distribution, got True: on the JAX backend, call "
            "keras.distribution.set_distribution(...) before the model is made, and train under it, or set "
            f"optimizer.shard_state = False before training. The backend is {keras.config.backend()}, the distribution "
            f"{keras.distribution.distribution()!r}."
        )
    for variable, place in zip(variables, found, strict=True):
        if place is None or axis not in place.weight.mesh.axis_names:
            raise ValueError(
                "shard_state must be False for weights that are not on the mesh of the distribution, got True, and "
                f"{keras_path(variable)} is not on one with the axis {axis!r}. Make the model after "
                "keras.distribution.set_distribution(...)."
            )
    return Places([place and replace(place, over=axis) for place in found])


def warn_unless_spread(name: str, buckets: Sequence[Bucket], state: State, variables: Sequence[Any]) -> None:
    """Warns of state of more than a few elements that `shard_state` cannot spread."""
    left = []
    for b, bucket in enumerate(buckets):
        place = bucket.placement
        if place is None or place.over is None:
            continue
        held = tree.flatten([getattr(state, name)[b] for name in _STORED if state.has(name)])
        for shape in sorted({tuple(variable.shape) for variable in held}):
            if math.prod(shape) >= PACK_BELOW and not place.spreads(bucket.layout(shape)):
                left.append(f"{shape} of {keras_path(variables[bucket.indices[0]])} ({place.parts} parts)")
    if left:
        warnings.warn(
            f"shard_state=True of {name} leaves state as it is that has no axis to be split: {', '.join(left)}.",
            stacklevel=2,
        )


def like_state(plan: Plan, grads: Sequence[Grad | None]) -> list[Grad | None]:
    """Gradients laid out as the state that is updated with them.

    XLA might lay them out as what they are computed from, and gather the new weights and all new state instead. Those
    of small parameters that are laid end to end are on every device: their parts would have to be sent to others.
    """
    found = list(grads)
    for b, (bucket, grad) in enumerate(zip(plan.buckets, grads, strict=True)):
        place = bucket.placement
        if grad is None or place is None or not place.is_one_of_several:
            continue
        shape = tuple(grad.value.shape)
        if bucket.form == "flat":
            layout = place.whole
        elif _needs_whole(plan, bucket, place) or (bucket.form == "stacked" and bucket.alone):
            layout = _of_weights(bucket, place, len(shape))
        else:
            layout = bucket.layout(shape)
        extras = {name: backend.placed(extra, layout) for name, extra in grad.extras.items()}
        found[b] = grad._replace(value=backend.placed(grad.value, layout), extras=extras)
    return found


def gathered(plan: Plan, state: State) -> State:
    """The state to update from, in which what a rule needs whole is not spread.

    An element-wise rule is computed by each device for its part. Of other rules the sums and products over a spread
    tensor would take XLA a communication for each; there, state is gathered once and computed as if it was not spread.
    """

    def whole(bucket: Bucket, place: Placement, x: Tensor) -> Tensor:
        return _together(bucket, place, x) if _needs_whole(plan, bucket, place) else x

    return _mapped(plan.buckets, state, whole, _STORED)


def collected(plan: Plan, state: State) -> State:
    """The state after a micro-batch, with the sums laid out as their variables are."""
    return _mapped(plan.buckets, state, lambda bucket, _, x: _stored(bucket, x), ("accumulated", "product"))


def updated(plan: Plan, state: State) -> State:
    """The state after an update, laid out as its variables are; what was gathered is spread after all arithmetic."""

    def again(bucket: Bucket, place: Placement, x: Tensor) -> Tensor:
        if _needs_whole(plan, bucket, place):
            x = backend.computed(_together(bucket, place, x))
        return _stored(bucket, x)

    return _mapped(plan.buckets, state, again, _STORED)


def joined(plan: Plan, state: State) -> State:
    """The state after a step, with weights laid out as their variables are, and once where they share a bucket.

    This and `updated` hold also in steps that nobody tells which layouts to return.
    """

    def weights(bucket: Bucket, place: Placement, x: Tensor) -> Tensor:
        return backend.placed(x, _of_weights(bucket, place, len(x.shape)))

    return _mapped(plan.buckets, state, weights, ("weights",))


def _stored(bucket: Bucket, x: Tensor) -> Tensor:
    return backend.placed(x, bucket.layout(tuple(x.shape)))


def _mapped(
    buckets: Sequence[Bucket],
    state: State,
    function: Callable[[Bucket, Placement, Tensor], Tensor],
    names: Sequence[str],
) -> State:
    """The state with a function of the tensors of those buckets that XLA may lay out in several ways."""
    parts: dict[str, Any] = {name: list(getattr(state, name)) for name in names if state.has(name)}
    for b, bucket in enumerate(buckets):
        place = bucket.placement
        if place is not None and place.is_one_of_several:
            for part in parts.values():
                part[b] = tree.map_structure(functools.partial(function, bucket, place), part[b])
    return state._replace(**parts)


def _of_weights(bucket: Bucket, place: Placement, rank: int) -> Any:
    """The layout of the weights of a bucket as one tensor."""
    return place.like_weight(rank - len(bucket.shapes[0])) if bucket.alone else place.whole


def _needs_whole(plan: Plan, bucket: Bucket, place: Placement) -> bool:
    """Whether the state of a bucket is gathered for an update."""
    if place.over is None or bucket.form == "bare" or _parts_are_parameters(bucket, place):
        return False
    return layout_for(plan.rule(bucket), plan.transforms) != "elementwise"


def _parts_are_parameters(bucket: Bucket, place: Placement) -> bool:
    """Whether the state of a stack is spread so that each device has that of some parameters."""
    return bucket.form == "stacked" and len(bucket.indices) % place.parts == 0


def _together(bucket: Bucket, place: Placement, x: Tensor) -> Tensor:
    """Stored state laid out as it would be if it were not spread."""
    return backend.placed(x, replace(bucket, placement=replace(place, over=None)).layout(tuple(x.shape)))

"""Which parameters are updated together: a bucket is one tensor for the rule, and several variables for the model.

Many small tensors cost far more than one of the same total size, in tracing and in every step. Small parameters of a
rule that does not look at shapes are therefore laid end to end; for other rules, parameters of one shape are stacked.
Large parameters stay alone, since copying them together would cost more than it saves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.rule import Weight

Tensor = Any
Shape = tuple[int, ...]

#: Parameters with fewer elements than this are laid end to end.
PACK_BELOW = 2**16

#: Parameters of one shape are stacked up to so many elements together: batches of large products gain nothing.
STACK_BELOW = 2**20

#: How many small parameters of one shape are packed by themselves. XLA compiles each part of a tensor that it is split
#: into, but equal ones once; so where the whole step is always compiled, buckets are made that equal each other.
REPEATED = None if backend.TENSORFLOW else 8


@dataclass(frozen=True)
class Bucket:
    """Parameters that are updated as one tensor.

    Attributes:
        indices: Their positions in the optimizer's list of variables.
        shapes: Their shapes.
        dtype: Their dtype.
        treatment: What distinguishes them from the other parameters: rate, decay.
        form: How they become one tensor: "flat", laid end to end as `(1, n)`; "stacked", as `(k, *shape)`; or "bare", a
            single parameter as it is, where the layout is not "whole". (It could have the leading axis, too, but XLA
            updates a variable in place only if nothing, not even a reshape, stands between it and the arithmetic.)
        since: The update count at which they joined; their own updates are counted from there.
        weight: What their rule is told about them; where they are laid end to end, about the first of them.
        placement: Where they are on the devices of a mesh; None where there is none.
    """

    indices: tuple[int, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    treatment: Treatment
    form: str
    since: int = 0
    weight: Weight = Weight(())
    placement: backend.Placement | None = None

    @property
    def alone(self) -> bool:
        """Whether it is a single parameter, whose state is stored in the parameter's own shape."""
        return self.form != "flat" and len(self.shapes) == 1

    @property
    def rule(self) -> tuple[int, str]:
        """Which rule updates them."""
        return self.treatment.rule, self.treatment.route

    @property
    def stored_shape(self) -> Shape:
        """The shape that its state is stored in."""
        if self.form == "flat":
            return (1, self._size + self._padding)
        return self.stacked_shape(self.shapes[0])

    @property
    def joined_shape(self) -> Shape:
        """The shape of the one tensor."""
        return {"flat": (1, self._size), "stacked": (len(self.shapes), *self.shapes[0])}.get(self.form, self.shapes[0])

    @property
    def _size(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def _padding(self) -> int:
        """How many zeros are stored behind state that is laid end to end, so that it is spread in equal parts."""
        return 0 if self.placement is None else -self._size % self.placement.parts

    def layout(self, shape: Shape) -> Any:
        """Where state that is stored in this shape is on the devices of a mesh; None where there is none."""
        if self.placement is None:
            return None
        as_weight, stacked = self.alone and shape == self.stored_shape, self.form == "stacked" and not self.alone
        return self.placement.of_state(shape, as_weight=as_weight, stacked=stacked)

    def stacked_shape(self, shape: Shape) -> Shape:
        """The shape that state of this shape for each parameter is stored in, in a bucket that is not flat."""
        return shape if self.alone else (len(self.shapes), *shape)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor made of one tensor for each parameter."""
        if self.form == "bare":
            return tensors[0]
        if self.form == "stacked":
            return ops.expand_dims(tensors[0], 0) if self.alone else ops.stack(tensors)
        parts = [t if len(t.shape) == 1 else ops.reshape(t, (-1,)) for t in tensors]
        return ops.reshape(backend.concatenate(parts), (1, -1))

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        if self.form == "bare":
            return [tensor]
        if self.form == "stacked":
            return [tensor[0]] if self.alone else list(ops.unstack(tensor, len(self.shapes)))
        parts = backend.split(ops.reshape(tensor, (-1,)), [math.prod(shape) for shape in self.shapes])
        return [p if len(shape) == 1 else ops.reshape(p, shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def separate(self, stored: np.ndarray) -> list[np.ndarray]:
        """Of stored state on the host, the views that are those of each parameter."""
        if self.alone:
            return [stored]
        if self.form == "stacked":
            return [stored[i, ...] for i in range(len(self.shapes))]
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = np.split(np.reshape(stored, (-1,)), ends)[:-1]  # but for zeros at the end
        return [np.reshape(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def view(self, stored: Tensor) -> Tensor:
        """Stored state in the form of the one tensor."""
        if self.form == "flat" and self._padding:
            return stored[:, : self._size]
        return self.join([stored]) if self.alone else stored

    def stored(self, tensor: Tensor) -> Tensor:
        """The inverse of `view`."""
        if self.form == "flat" and self._padding:
            return ops.pad(tensor, [(0, 0), (0, self._padding)])
        return self.split(tensor)[0] if self.alone else tensor

    def mask(self, present: Collection[int], hits: Mapping[int, Tensor]) -> Any:
        """True for the elements to update, in a shape that broadcasts.

        Args:
            present: Places in the bucket of the parameters that are to be updated.
            hits: For some of them, by place, where: a tensor of the parameter's shape.
        """
        if hits:
            full = [np.full(shape, place in present) for place, shape in enumerate(self.shapes)]
            return self.join([hits.get(place, mask) for place, mask in enumerate(full)])
        flags = np.array([place in present for place in range(len(self.shapes))])
        if self.form == "flat":
            return np.repeat(flags, [math.prod(shape) for shape in self.shapes])[None]
        return flags[0] if self.form == "bare" else flags.reshape(-1, *[1] * len(self.shapes[0]))

    def over_parameters(self, x: Tensor, *, mean: bool = False) -> Tensor:
        """The sum or mean over each parameter of a tensor in this form, in a shape that broadcasts with it."""
        if self.form != "flat":
            axes = tuple(range(1 if self.form == "stacked" else 0, len(x.shape)))
            total = ops.sum(x, axis=axes, keepdims=True)
            # the mean is not `ops.mean`, which computes in float32 on JAX
            return total / max(1, math.prod(x.shape[axis] for axis in axes)) if mean else total
        # parameters of one size are next to each other; slices of each would take XLA seconds to compile
        parts = []
        blocks = self._blocks()
        lengths = [count * size for count, size in blocks]
        for part, (count, size) in zip(backend.split(ops.reshape(x, (-1,)), lengths), blocks, strict=True):
            sums = ops.sum(ops.reshape(part, (count, size)), axis=1, keepdims=True)
            sums = sums / max(size, 1) if mean else sums
            parts.append(ops.reshape(ops.broadcast_to(sums, (count, size)), (-1,)))
        return ops.reshape(backend.concatenate(parts), (1, -1))

    def spread(self, values: Tensor) -> Tensor:
        """One value for each parameter, `(k,)`, in a shape that broadcasts with the one tensor."""
        if self.form == "bare":
            return values[0]
        if self.form == "stacked":
            return ops.reshape(values, (-1, *[1] * len(self.shapes[0])))
        parts = []
        blocks = self._blocks()
        for part, (count, size) in zip(backend.split(values, [count for count, _ in blocks]), blocks, strict=True):
            wide = ops.broadcast_to(ops.expand_dims(part, 1), (count, size))
            parts.append(ops.reshape(wide, (-1,)))
        return ops.reshape(backend.concatenate(parts), (1, -1))

    def _blocks(self) -> list[tuple[int, int]]:
        """How many parameters of which size follow each other."""
        sizes = [math.prod(shape) for shape in self.shapes]
        return [(len(list(same)), size) for size, same in itertools.groupby(sizes)]

    def moved(self, first: int) -> Bucket:
        """The same bucket in a list of variables that has `first` others before."""
        return replace(self, indices=tuple(first + i for i in self.indices))

    def member(self, place: int) -> int:
        """The index of the parameter that an element of the one tensor belongs to, given by its flat position."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        return self.indices[int(np.searchsorted(ends, place, side="right"))]


def pack(
    weights: Sequence[Weight],
    treatments: Sequence[Treatment | None],
    *,
    layout: Callable[[Treatment], str],
    below: int = PACK_BELOW,
    alone: Callable[[int], bool] = lambda _: False,
    flat: Callable[[int], bool] = lambda _: False,
    since: Sequence[int] | None = None,
    repeated: int | None = None,
) -> tuple[Bucket, ...]:
    """Sorts parameters into buckets of one dtype, treatment and age, in the order of their first members.

    Parameters without a treatment are in no bucket: they are frozen. Those that are `alone` are in a bucket of their
    own, those that are `flat` as one row. `layout` is that of the rule of a treatment. If `repeated` is given, so many
    flat ones of one shape have a bucket of their own, again and again, and what is left of each shape is laid end to
    end.
    """
    members: dict[Hashable, list[int]] = {}
    forms = {}
    ages = [0] * len(weights) if since is None else since
    for i, (weight, treatment) in enumerate(zip(weights, treatments, strict=True)):
        if treatment is None:
            continue
        kind, size = layout(treatment), math.prod(weight.shape)
        by_itself = alone(i) or (kind != "whole" and size >= below)
        forms[i] = "stacked" if kind == "whole" else "bare" if by_itself and not flat(i) else "flat"
        of_form = (weight.shape, weight.role, weight.axes) if forms[i] == "stacked" else forms[i]
        members.setdefault((weight.dtype, treatment, ages[i], of_form, i if by_itself else None), []).append(i)
    shapes = [weight.shape for weight in weights]
    parts = [
        part
        for group in members.values()
        for part in (
            _stacks(group, shapes)
            if forms[group[0]] == "stacked"
            else [group]
            if repeated is None or forms[group[0]] == "bare"
            else _in_equal_parts(group, shapes, repeated)
        )
    ]

    def bucket(part: list[int]) -> Bucket:
        first = part[0]
        treatment = cast(Treatment, treatments[first])
        if forms[first] == "flat" and layout(treatment) == "per_parameter":  # see `over_parameters`
            part = sorted(part, key=lambda i: math.prod(shapes[i]))
        known = weights[first]._replace(paths=(), output=None)
        of_part = tuple(shapes[i] for i in part)
        return Bucket(tuple(part), of_part, known.dtype, treatment, forms[first], ages[first], known)

    return tuple(map(bucket, parts))


def _stacks(members: list[int], shapes: Sequence[Shape]) -> list[list[int]]:
    """Members of one shape, so many together as `STACK_BELOW` allows."""
    most = max(1, STACK_BELOW // max(1, math.prod(shapes[members[0]])))
    return [members[n : n + most] for n in range(0, len(members), most)]


def _in_equal_parts(members: Sequence[int], shapes: Sequence[Shape], size: int) -> list[list[int]]:
    """Lists of `size` members of one shape, and one of those that are left."""
    of_shape: dict[Shape, list[int]] = {}
    for i in members:
        of_shape.setdefault(shapes[i], []).append(i)
    parts = [same[n : n + size] for same in of_shape.values() for n in range(0, len(same) - size + 1, size)]
    left = sorted(i for same in of_shape.values() for i in same[len(same) // size * size :])
    return sorted([*parts, left] if left else parts)

"""Which parameters are updated together: a bucket is one tensor for the rule, and several variables for the model.

Many small tensors cost far more than one of the same total size, in tracing and in every step. Small parameters of an
element-wise rule are therefore laid end to end; for other rules parameters of one shape are stacked. Large parameters
stay alone, since copying them together would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.groups import Treatment

Tensor = Any
Shape = tuple[int, ...]

#: Element-wise parameters with fewer numbers than this are packed.
PACK_BELOW = 2**16

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
            single parameter of an element-wise rule as it is. (It could have the leading axis, too, but XLA updates a
            variable in place only if nothing, not even a reshape, stands between the variable and the arithmetic.)
        since: The update count at which they joined; their own updates are counted from there.
    """

    indices: tuple[int, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    treatment: Treatment
    form: str
    since: int = 0

    @property
    def alone(self) -> bool:
        """Whether it is a single parameter, whose state is stored in the parameter's own shape."""
        return self.form != "flat" and len(self.shapes) == 1

    @property
    def stored_shape(self) -> Shape:
        """The shape that its state is stored in."""
        if self.form == "flat":
            return (1, sum(map(math.prod, self.shapes)))
        return self.shapes[0] if self.alone else (len(self.shapes), *self.shapes[0])

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
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        parts = np.split(np.reshape(stored, (-1,)), ends)
        return [np.reshape(part, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def view(self, stored: Tensor) -> Tensor:
        """Stored state in the form of the one tensor."""
        return self.join([stored]) if self.alone else stored

    def stored(self, tensor: Tensor) -> Tensor:
        """The inverse of `view`."""
        return self.split(tensor)[0] if self.alone else tensor

    def mask(self, present: Collection[int], hits: Mapping[int, Tensor]) -> Any:
        """True for the numbers to update, in a shape that broadcasts.

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

    def moved(self, first: int) -> Bucket:
        """The same bucket in a list of variables that has `first` others before."""
        return replace(self, indices=tuple(first + i for i in self.indices))

    def member(self, place: int) -> int:
        """The index of the parameter that a number of the one tensor belongs to, given by its place in it, flat."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        return self.indices[int(np.searchsorted(ends, place, side="right"))]


def pack(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    treatments: Sequence[Treatment | None],
    *,
    elementwise: Callable[[Treatment], bool],
    below: int = PACK_BELOW,
    alone: Callable[[int], bool] = lambda _: False,
    since: Sequence[int] | None = None,
    repeated: int | None = None,
) -> tuple[Bucket, ...]:
    """Sorts parameters into buckets of one dtype, treatment and age, in the order of their first members.

    Parameters without a treatment are in no bucket: they are frozen. Those that are `alone` share with none.
    `elementwise` says whether the rule of a treatment is. If `repeated` is given, so many flat ones of one shape have a
    bucket of their own, again and again, and what is left of each shape is laid end to end.
    """
    members: dict[Hashable, list[int]] = {}
    forms = {}
    ages = [0] * len(shapes) if since is None else since
    for i, (shape, treatment) in enumerate(zip(shapes, treatments, strict=True)):
        if treatment is None:
            continue
        flat = elementwise(treatment)
        by_itself = alone(i) or (flat and math.prod(shape) >= below)
        forms[i] = "stacked" if not flat else "bare" if by_itself else "flat"
        key = (dtypes[i], treatment, ages[i], shape if forms[i] == "stacked" else forms[i], i if by_itself else None)
        members.setdefault(key, []).append(i)
    if repeated is not None:
        members = {
            (key, part): found
            for key, group in members.items()
            for part, found in enumerate(
                _in_equal_parts(group, shapes, repeated) if forms[group[0]] == "flat" else [group]
            )
        }
    return tuple(
        Bucket(
            tuple(m),
            tuple(shapes[i] for i in m),
            dtypes[m[0]],
            cast(Treatment, treatments[m[0]]),
            forms[m[0]],
            ages[m[0]],
        )
        for m in members.values()
    )


def _in_equal_parts(members: Sequence[int], shapes: Sequence[Shape], size: int) -> list[list[int]]:
    """Lists of `size` members of one shape, and one of those that are left."""
    of_shape: dict[Shape, list[int]] = {}
    for i in members:
        of_shape.setdefault(shapes[i], []).append(i)
    parts = [same[n : n + size] for same in of_shape.values() for n in range(0, len(same) - size + 1, size)]
    left = sorted(i for same in of_shape.values() for i in same[len(same) // size * size :])
    return sorted([*parts, left] if left else parts)

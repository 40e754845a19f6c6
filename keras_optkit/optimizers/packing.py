"""Which parameters are updated together: a bucket is one tensor for the rule, and several variables for the model.

Many small tensors cost far more than one of the same total size, in tracing and in every step. Small parameters of an
element-wise rule are therefore laid end to end; for other rules parameters of one shape are stacked. Large parameters
stay alone, since copying them together would cost more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from keras import ops

Tensor = Any
Shape = tuple[int, ...]

#: Element-wise parameters with fewer numbers than this are packed.
PACK_BELOW = 2**16


@dataclass(frozen=True)
class Bucket:
    """Parameters that are updated as one tensor.

    Attributes:
        indices: Their positions in the optimizer's list of variables.
        shapes: Their shapes.
        dtype: Their dtype.
        decayed: Whether weight decay applies to them.
        flat: Laid end to end as `(1, n)`; otherwise stacked as `(k, *shape)`.
    """

    indices: tuple[int, ...]
    shapes: tuple[Shape, ...]
    dtype: str
    decayed: bool
    flat: bool

    @property
    def shape(self) -> Shape:
        """The shape of the one tensor."""
        return (1, sum(map(math.prod, self.shapes))) if self.flat else (len(self.shapes), *self.shapes[0])

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor made of one tensor for each parameter."""
        if self.flat:
            return ops.concatenate([ops.reshape(t, (1, -1)) for t in tensors], axis=1)
        return ops.stack(tensors) if len(tensors) > 1 else ops.expand_dims(tensors[0], 0)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The inverse of `join`."""
        if not self.flat:
            return [tensor[i] for i in range(len(self.shapes))]
        parts, start = [], 0
        for shape in self.shapes:
            stop = start + math.prod(shape)
            parts.append(ops.reshape(tensor[0, start:stop], shape))
            start = stop
        return parts

    def only(self, members: Sequence[int]) -> Bucket:
        """The bucket with some of its parameters, given by their places in it."""
        return replace(
            self, indices=tuple(self.indices[i] for i in members), shapes=tuple(self.shapes[i] for i in members)
        )


def pack(
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    decayed: Sequence[bool],
    *,
    elementwise: bool,
    below: int = PACK_BELOW,
) -> tuple[Bucket, ...]:
    """Sorts parameters into buckets of one dtype and one treatment, in the order of their first members."""
    members: dict[Hashable, list[int]] = {}
    for i, shape in enumerate(shapes):
        flat = elementwise and math.prod(shape) < below
        alone = elementwise and not flat
        key = (dtypes[i], decayed[i], "flat" if flat else shape, i if alone else None)
        members.setdefault(key, []).append(i)
    return tuple(
        Bucket(tuple(m), tuple(shapes[i] for i in m), dtypes[m[0]], decayed[m[0]], flat=key[2] == "flat")  # type: ignore[index]
        for key, m in members.items()
    )

"""Gradients that are not finite, for `skip_nonfinite`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops, tree

from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.rule import Tensor


class Nonfinite(NamedTuple):
    """What `skip_nonfinite` has met.

    Attributes:
        skipped: How many updates were left out because of a non-finite gradient.
        in_a_row: How many of them are the last ones.
        variable: Path of the first variable with such a gradient in the last of them; None if there was none.
    """

    skipped: int
    in_a_row: int
    variable: str | None


def first_bad(grads: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Whether all gradients are finite, and (bucket, place in it) of the first element that is not.

    One pass, without a condition, since XLA takes seconds to compile both branches for many buckets.
    """
    places, sizes = [], []
    for _, values in grads:
        flags = ops.isfinite(ops.reshape(values, (-1,)))
        size = ops.shape(flags)[0]  # of rows it may be known in the step alone
        numbered = ops.where(flags, size, ops.arange(size, dtype="int32"))
        places.append(ops.cast(ops.min(numbered, initial=size), "int32"))  # there may be none
        sizes.append(ops.cast(size, "int32"))
    found = ops.stack(places)
    finite = ops.equal(found, ops.stack(sizes))
    first = ops.argmin(ops.cast(finite, "int32"))
    numbers = ops.convert_to_tensor([b for b, _ in grads], "int32")
    return ops.all(finite), ops.stack([ops.take(numbers, first), ops.take(found, first)])


def unless_nonfinite(state: State, new: State, finite: Any, position: Any) -> State:
    """The new state if all gradients are finite, else the old one; what was met is counted."""
    counts: Any = state.nonfinite
    kept = tree.map_structure(lambda old, value: value if value is old else ops.where(finite, value, old), state, new)
    bad = ops.cast(ops.logical_not(finite), counts["skipped"].dtype)
    bucket, place = ops.unstack(ops.cast(position, counts["bucket"].dtype), 2)
    return kept._replace(
        nonfinite={
            "skipped": counts["skipped"] + bad,
            "in_a_row": (counts["in_a_row"] + bad) * bad,
            "bucket": ops.where(finite, counts["bucket"], bucket),
            "place": ops.where(finite, counts["place"], place),
        }
    )

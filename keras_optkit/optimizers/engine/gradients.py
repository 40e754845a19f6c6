"""From the gradients of variables to those of buckets: checked, summed, joined, accumulated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from keras import ops, tree

from keras_optkit import backend
from keras_optkit.backend import Rows
from keras_optkit.kernels import TABLE
from keras_optkit.optimizers.engine.codecs import Signed
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.engine.state import State, functions_of_weights
from keras_optkit.optimizers.groups import keras_path
from keras_optkit.optimizers.rule import Tensor, treats_rows_alone
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.precision import at_least_float32

#: What there is of a parameter's gradient: nothing, some rows, or all of it.
NONE, ROWS, WHOLE = range(3)


class Grad(NamedTuple):
    """The gradients of the parameters of a bucket.

    Attributes:
        value: The gradients joined into one tensor, `(k, *shape)` or `(1, n)`; 0 where there is none.
        mask: True for the elements to update, in a shape that broadcasts; None: all.
        given: For each parameter, whether there is a gradient; see `NONE`.
        extras: What else there is, joined like the gradients, by name: "first", the first of two gradients, and
            "product", that with the Hessian.
    """

    value: Tensor
    mask: Any
    given: tuple[int, ...]
    extras: Mapping[str, Tensor] = {}


class Parts(NamedTuple):
    """The same before it is joined.

    Attributes:
        grads: For each parameter its gradient, or None.
        extras: By name the same of what else there is.
    """

    grads: list[Any]
    extras: dict[str, list[Any]]


# -- as they are given ------------------------------------------------------------------------------------------------


def different(variables: Iterable[Any]) -> list[Any]:
    """The variables, each once."""
    return list({backend.key(v): v for v in variables}.values())


def checked(place: int, gradient: Any, variable: Any) -> Any:
    """A gradient as a tensor or as rows, and raises if it is not one of this variable."""
    if gradient is None:
        return None
    gradient = backend.as_gradient(gradient)
    shape, dtype = tuple(variable.shape), getattr(gradient.dtype, "name", str(gradient.dtype))
    if not dtype.startswith(("float", "bfloat", "int", "uint")):
        raise TypeError(f"grads[{place}], of {keras_path(variable)}, must have real numbers, got {dtype}.")
    if not backend.may_have_shape(gradient, shape):
        raise ValueError(
            f"grads[{place}] must have the shape {shape} of {keras_path(variable)}, got "
            f"{backend.described_shape(gradient)}."
        )
    return gradient


def summed(grads: list[Any], variables: list[Any]) -> tuple[list[Any], list[Any]]:
    """One gradient for each different variable: those of a variable that is given twice are added up."""
    found = different(variables)
    if len(found) == len(variables):
        return grads, variables
    sums: dict[int, Any] = {}
    for gradient, variable in zip(grads, variables, strict=True):
        key = backend.key(variable)
        if gradient is not None:
            gradient = backend.cast(gradient, at_least_float32(variable.dtype))
        sums[key] = backend.add(sums.get(key), gradient, tuple(variable.shape))
    return [sums[backend.key(v)] for v in found], found


# -- by buckets -------------------------------------------------------------------------------------------------------


def of_buckets(
    plan: Plan,
    state: State,
    grads: list[Any],
    extras: Mapping[str, list[Any]] | None = None,
    *,
    dense: bool = False,
) -> list[Parts | Rows | None]:
    """The gradients of each bucket, in the dtype to compute in and summed over the replicas; all `dense`, or lazy.

    Args:
        plan: How.
        state: The variables.
        grads: Those of the parameters.
        extras: What else there is of them, by name; see `Grad`.
        dense: Whether to return no `Rows`.
    """
    ready = _ready(plan, grads, dense=dense)
    for theirs in (extras or {}).values():
        ready += _ready(plan, theirs, dense=True)
    ready = backend.sum_over_replicas(ready)
    names = ["", *(extras or {})]
    of = {name: ready[n * len(grads) : (n + 1) * len(grads)] for n, name in enumerate(names)}

    def found(b: int, bucket: Bucket) -> Parts | Rows | None:
        parts = {name: [of[name][i] for i in bucket.indices] for name in names if _wants(plan, bucket, name)}
        return _rows_or_parts(plan, state, b, parts.pop(""), parts)

    return [found(b, bucket) for b, bucket in enumerate(plan.buckets)]


def _ready(plan: Plan, grads: list[Any], *, dense: bool) -> list[Any]:
    ready: list[Any] = [None] * len(grads)
    for bucket in plan.buckets:
        lazy = not dense and plan.keywords.sparse == "lazy" and _treats_rows_alone(plan, bucket)
        for i, shape in zip(bucket.indices, bucket.shapes, strict=True):
            if grads[i] is not None:
                keep = lazy and backend.is_sparse(grads[i])
                grad = grads[i] if keep else backend.dense(grads[i], shape)
                ready[i] = backend.cast(grad, at_least_float32(bucket.dtype))
    return ready


def _wants(plan: Plan, bucket: Bucket, name: str) -> bool:
    """Whether the update of a bucket takes this extra; "" is the gradient."""
    if name == "first":
        return plan.rules[bucket.rule[0], ""].rule.combination() is not None
    return name != "product" or plan.rule(bucket).random_vector() is not None


def _treats_rows_alone(plan: Plan, bucket: Bucket) -> bool:
    """Whether some rows of a parameter can be updated as if the others were not there."""
    combined = plan.rules[bucket.rule[0], ""].rule.combination() is not None
    alone = treats_rows_alone(plan.rule(bucket)) and not combined
    return alone and all(_changes_rows_alone(transform, bucket) for transform in plan.transforms)


def _changes_rows_alone(transform: Transform, bucket: Bucket) -> bool:
    """Whether a transform may be handed some rows; sums are over them, and right for gradients, which others have not.

    Units are the rows of an embedding, but of a kernel the rows are inputs of all units.
    """
    if transform.layout != "elementwise" and transform.changes == "step":
        return False
    return transform.rows and (transform.layout != "whole" or bucket.weight.role == TABLE)


def _rows_or_parts(
    plan: Plan, state: State, b: int, parts: list[Any], extras: dict[str, list[Any]]
) -> Rows | Parts | None:
    if all(g is None for g in parts):
        return None
    if not (backend.is_sparse(parts[0]) and can_take_rows(plan, state, b)):
        return Parts(parts, extras)
    rows = backend.rows(parts[0], plan.buckets[b].shapes[0][1:])
    scale = plan.keywords.loss_scale_factor
    return rows if scale is None else rows._replace(values=rows.values / scale)


def can_take_rows(plan: Plan, state: State, b: int) -> bool:
    """Whether nothing has to look at the rows without a gradient, or would treat equal rows differently."""
    bucket, keywords = plan.buckets[b], plan.keywords
    looks = state.has("accumulated") or state.has("evaluating") or state.has("master")
    looks = looks or plan.constraints[b] is not None or bool(functions_of_weights(plan.rule(bucket), bucket))
    rounds = keywords.stochastic_rounding and (
        bucket.dtype == "bfloat16" or keywords.slot_dtype not in (None, "float32")
    )
    looks = looks or any(isinstance(slot, Signed) for slot in state.slots[b].values())  # a block has parts of rows
    return bucket.alone and not looks and not rounds


def join(plan: Plan, b: int, given_parts: Parts) -> Grad:
    """The gradient of a bucket, unscaled."""
    parts = given_parts.grads
    bucket, scale = plan.buckets[b], plan.keywords.loss_scale_factor
    given = tuple(NONE if g is None else ROWS if backend.is_sparse(g) else WHOLE for g in parts)
    hits = {place: backend.touched(parts[place], bucket.shapes[place]) for place, g in enumerate(given) if g == ROWS}

    def joined(parts: list[Any]) -> Tensor:
        dense = [
            ops.zeros(shape, at_least_float32(bucket.dtype)) if g is None else backend.dense(g, shape)
            for g, shape in zip(parts, bucket.shapes, strict=True)
        ]
        return bucket.join(dense) if scale is None else bucket.join(dense) / scale

    mask = None if min(given) == WHOLE else bucket.mask([place for place, g in enumerate(given) if g], hits)
    return Grad(joined(parts), mask, given, {name: joined(theirs) for name, theirs in given_parts.extras.items()})


def values(grad: Any) -> Tensor:
    """The values of a Grad, of Rows or of a tensor."""
    return grad.values if isinstance(grad, Rows) else grad.value if isinstance(grad, Grad) else grad


def total(grad: Grad | Rows, x: Tensor) -> Tensor:
    """The sum of `x`, which is in the shape of the gradient, over what has one; each row of Rows counts once."""
    mask = grad.first if isinstance(grad, Rows) else grad.mask
    return ops.sum(x if mask is None else ops.where(mask, x, ops.zeros_like(x)))


def sum_of_rows(rows: Rows, x: Tensor, *, mean: bool) -> Tensor:
    """The sum over a parameter of which all other rows are zeros."""
    if mean:
        raise ValueError("A transform that asks for h.mean must say rows = False: it needs all rows of an embedding.")
    return total(rows, x)


# -- over micro-batches -----------------------------------------------------------------------------------------------


def collect(plan: Plan, state: State, grads: list[Grad | None]) -> State:
    """Adds the gradients of one micro-batch to those of the others."""
    sums, given = [], []
    for bucket, a, seen, g in zip(plan.buckets, state.accumulated, state.given, grads, strict=True):
        sums.append(a if g is None else a + bucket.stored(g.value))
        given.append(seen if g is None else ops.maximum(seen, np.array(g.given, "int32")))
    product = [
        {name: a if g is None else a + bucket.stored(g.extras[name]) for name, a in theirs.items()}
        for bucket, theirs, g in zip(plan.buckets, state.product, grads, strict=bool(state.product))
    ]
    return state._replace(accumulated=sums, given=given, micro=state.micro + 1, product=product or ())


def means(plan: Plan, state: State, grads: list[Grad | None]) -> list[Grad | None]:
    """The mean gradients of the micro-batches, the last of which had `grads`."""
    found: list[Grad | None] = []
    for bucket, a, given, last in zip(plan.buckets, state.accumulated, state.given, grads, strict=True):
        sums = bucket.view(a)
        mask = _given_mask(bucket, sums, given, last.given if last else (NONE,) * len(bucket.indices))
        count = ops.cast(state.micro, sums.dtype)
        held = state.product[len(found)] if state.has("product") else {}
        extras = {name: bucket.view(total) / count for name, total in held.items()}
        found.append(Grad(sums / count, mask, (), extras))
    return found


def _given_mask(bucket: Bucket, sums: Tensor, given: Tensor, last: tuple[int, ...]) -> Any:
    """The mask of a mean gradient: for a parameter with gradients of rows only, rows of zeros count as missing.

    Which gradients there were before is known only inside the step; whether this call has all of them, already now.
    """
    if min(last) == WHOLE:
        return None
    if bucket.form == "stacked":  # where gradients of some rows count as whole ones
        return bucket.spread(ops.equal(given, WHOLE))
    hits = {}
    for place, part in enumerate(bucket.split(sums)):
        if last[place] != WHOLE:
            rows = ops.logical_and(ops.equal(given[place], ROWS), backend.nonzero_rows(part))
            hits[place] = ops.logical_or(ops.equal(given[place], WHOLE), rows)
    return bucket.mask(range(len(last)), hits)


def cleared(state: State) -> State:
    """The state with no micro-batch in it."""
    return state._replace(
        accumulated=[ops.zeros_like(a) for a in state.accumulated],
        given=[ops.zeros_like(given) for given in state.given],
        micro=ops.zeros_like(state.micro),
        product=tree.map_structure(ops.zeros_like, state.product),
    )

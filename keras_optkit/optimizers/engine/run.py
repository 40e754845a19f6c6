"""How a step is run: reading variables, compiling, assigning the results, on one device or on several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

from keras import ops, tree

from keras_optkit import backend
from keras_optkit.backend import TENSORFLOW, Rows, handle, tensor
from keras_optkit.optimizers.engine import averages, gradients, placing, update
from keras_optkit.optimizers.engine.gradients import Parts
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan, present
from keras_optkit.optimizers.engine.state import PER_BUCKET, State
from keras_optkit.optimizers.rule import Slots, Tensor, Value
from keras_optkit.precision import at_least_float32

if TENSORFLOW:
    import tensorflow as tf

#: The state that a micro-batch changes.
_COLLECTED = ("accumulated", "given", "micro", "product")


def run(plan: Plan, state: State, grads: list[Any], *, fuse: bool = False, flush: bool = False) -> None:
    """Makes one call of `Optimizer.apply`: adds up gradients, and updates the weights if that is due.

    Args:
        plan: How.
        state: The variables.
        grads: For each bucket `Rows`, or the `Parts` of its parameters, summed over replicas; None where there is no
            gradient.
        fuse: Whether to compile the update with XLA where the function that it is part of is not compiled. Inside a
            replica every device updates its own copies of the variables alike.
        flush: Whether to update with what the micro-batches so far have left, and add nothing.
    """
    if not TENSORFLOW:
        _run_pure(plan, state, grads, flush)
        return
    if not tf.distribute.has_strategy():
        _run(plan, state, grads, fuse, flush)
        return
    handles = [handle(v) for v in tree.flatten(state)]
    backend.refuse_foreign(tree.flatten(state))

    def on_device(_: Any, grads: list[Any], handles: list[Any]) -> None:
        _run(plan, tree.pack_sequence_as(state, handles), grads, fuse, flush)

    def across_replicas(strategy: Any, grads: list[Any]) -> None:
        strategy.extended.update(handles[0], on_device, args=(grads, handles), group=False)

    context = tf.distribute.get_replica_context()
    if context is None:  # flushing, or a strategy with one replica; the others have been refused by now
        across_replicas(tf.distribute.get_strategy(), grads)
    else:
        context.merge_call(across_replicas, args=(grads,))


def perturbed(plan: Plan, state: State, grads: list[Any]) -> list[Tensor | None]:
    """The weights of each bucket to compute the second gradient at; None where they do not change.

    Computed in every replica in the same way; nothing is assigned.

    Args:
        plan: How.
        state: The variables.
        grads: As for `run`, but with no `Rows`.
    """
    before, dynamic = _read(plan.buckets, state), plan.dynamic()
    read = present(dynamic, before.iterations, before.multiplier)
    return update.perturbed(plan, before, _together(plan, grads), dynamic, read)


def _combines(plan: Plan) -> bool:
    """Whether a rule makes one gradient of two."""
    return any(routed.rule.combination() is not None for routed in plan.rules.values())


def _combined(plan: Plan, state: State, grads: list[Any]) -> list[Any]:
    """The gradients of this micro-batch that are updated with."""
    if not _combines(plan) or all(grad is None for grad in grads):
        return grads
    before, dynamic = _read(plan.buckets, state), plan.dynamic()
    return update.combined(plan, before, grads, dynamic, present(dynamic, before.iterations, before.multiplier))


def values(state: State, *, slots: bool) -> State:
    """The values of the state that exists once and, if they are wanted, of the slots."""
    return _scalars(state)._replace(slots=tree.map_structure(tensor, state.slots) if slots else ())


def change(function: Callable[[State], State], buckets: Sequence[Bucket], state: State) -> None:
    """Runs a pure function of the state on the values of the variables in it and assigns what has changed."""
    before = _read(buckets, state)
    _write(buckets, state, before, function(before))


# -- what both backends do --------------------------------------------------------------------------------------------


def _is_due(plan: Plan, state: State) -> Tensor:
    """Whether there have been enough micro-batches."""
    return state.micro >= plan.keywords.gradient_accumulation_steps


def _is_outdated(state: State) -> Tensor:
    """Whether the model holds weights that training does not continue from."""
    return ops.equal(state.evaluating, 1)


def _renewed(plan: Plan, state: State) -> State:
    return averages.swapped(plan, state, evaluating=False)


def _grads(plan: Plan, state: State, grads: list[Any]) -> list[Any]:
    """The gradients to update with."""
    return gradients.means(plan, state, grads) if plan.keywords.gradient_accumulation_steps else grads


# -- JAX --------------------------------------------------------------------------------------------------------------


def _run_pure(plan: Plan, state: State, grads: list[Any], flush: bool) -> None:
    joined = placing.like_state(plan, _combined(plan, state, _together(plan, grads)))
    accumulates, dynamic = plan.keywords.gradient_accumulation_steps and not flush, plan.dynamic()
    before = _read(plan.buckets, state)
    after = placing.collected(plan, gradients.collect(plan, before, joined)) if accumulates else before

    def updated() -> State:
        ready = placing.gathered(plan, after)
        if state.has("evaluating"):
            ready = ops.cond(_is_outdated(ready), lambda: _renewed(plan, ready), lambda: ready)
        given, read = _grads(plan, ready, joined), present(dynamic, ready.iterations, ready.multiplier)
        new = update.update(plan, ready, given, dynamic, update.prepare(plan, ready, given, dynamic, read))
        return placing.updated(plan, new)

    new = ops.cond(_is_due(plan, after), updated, lambda: after) if accumulates else updated()
    _write(plan.buckets, state, before, placing.joined(plan, new))


# -- TensorFlow -------------------------------------------------------------------------------------------------------


def _run(plan: Plan, state: State, grads: list[Any], fuse: bool, flush: bool) -> None:
    fuse = fuse and not tf.executing_eagerly()
    given = [] if tf.executing_eagerly() else [g.values if backend.is_sparse(g) else g for g in _tensors_in(grads)]
    # where data end, TensorFlow runs a step up to what needs the batch that is missing; without this it would count
    computed = tf.group(*given) if given else None
    if _combines(plan):
        grads = _combined(plan, state, _together(plan, grads))
    limit = plan.keywords.skip_nonfinite
    if plan.keywords.gradient_accumulation_steps and not flush:
        grads = _together(plan, grads)
        before = _read(plan.buckets, state, only=_COLLECTED)
        _write(plan.buckets, state, before, gradients.collect(plan, before, grads), once=computed)
        # `_is_due` has waited for the gradients
        _if(_is_due(plan, _scalars(state)), lambda: _update(plan, state, grads, fuse, None))
    else:
        _update(plan, state, grads, fuse, computed)
    if limit:
        too_many = (
            f"{plan.name}: {limit} non-finite gradients in a row, as many as skip_nonfinite allows. The weights are "
            "those before them; optimizer.nonfinite names the first such variable."
        )
        tf.debugging.Assert(_scalars(state).nonfinite["in_a_row"] < limit, [too_many])


def _update(plan: Plan, state: State, grads: list[Any], fuse: bool, awaited: Any) -> None:
    """One update, `awaited` being the operation that counters wait for."""
    buckets, dynamic = plan.buckets, plan.dynamic()
    rows = {b: grad for b, grad in enumerate(grads) if isinstance(grad, Rows)}
    # XLA compiles each part of a tensor by itself, so that parameters are joined and split outside of it; and before it
    # overwrites what something else needs the old value of, it copies that, so that this is read and assigned outside
    reused = [plan.rule(bucket).reuses if fuse and b not in rows else frozenset() for b, bucket in enumerate(buckets)]
    inside = {b for b, bucket in enumerate(buckets) if bucket.alone and "weights" not in reused[b]}
    if state.has("evaluating"):
        _if(_is_outdated(_scalars(state)), lambda: change(lambda s: _renewed(plan, s), buckets, state))
    scalars = _scalars(state)
    read = present(dynamic, scalars.iterations, scalars.multiplier) if dynamic else []
    outer = _together(plan, grads, without=inside if fuse and not rows else ())
    prepared = None
    if rows:

        def weights(b: int) -> Tensor:
            bucket, variables = buckets[b], state.weights[b]
            if b in rows:
                found = bucket.view(tf.gather(handle(variables[0]), rows[b].indices))
            else:
                found = bucket.join([tensor(v) for v in variables])
            return ops.cast(found, at_least_float32(bucket.dtype))

        prepared = update.prepare(plan, scalars, outer, dynamic, read, weights)

    def compute(joined: list[Any], slots: list[Slots], grads: list[Any], read: list[Tensor], prepared: Any) -> Any:
        before = _read(buckets, state, joined=joined, slots=slots, without=rows)
        given = _grads(plan, before, _together(plan, grads))
        ready = prepared if rows else update.prepare(plan, before, given, dynamic, read)
        new = update.update(plan, before, given, dynamic, ready)
        if not fuse:
            return _write(buckets, state, before, new, once=awaited)
        return _write(buckets, state, before, new, keep=inside, reused=reused)

    if fuse:
        compute = tf.function(compute, jit_compile=True, autograph=False)
    joined = [
        None if b in inside or b in rows else bucket.join([tensor(v) for v in state.weights[b]])
        for b, bucket in enumerate(buckets)
    ]
    outside = [
        {name: tree.map_structure(tensor, slots[name]) for name in slots if name in names}
        for slots, names in zip(state.slots, reused, strict=False)
    ]
    dense = [None if b in rows else grad for b, grad in enumerate(outer)]
    with _once_there(awaited if fuse else None):
        kept = compute(joined, outside, dense, read, prepared)
    for b, (weights, slots) in enumerate(kept):
        if weights is not None:
            _assign_all(state.weights[b], buckets[b].split(weights))
        for name, new in slots.items():
            _assign_all(tree.flatten(state.slots[b][name]), tree.flatten(new))
    for b, grad in rows.items():
        _write_rows(plan, state, b, grad, dynamic, prepared)


def _together(plan: Plan, grads: list[Any], *, without: Collection[int] = ()) -> list[Any]:
    """The gradients of the buckets, joined but for those in `without`, which are joined elsewhere."""
    return [
        gradients.join(plan, b, grad) if isinstance(grad, Parts) and b not in without else grad
        for b, grad in enumerate(grads)
    ]


def _if(condition: Tensor, action: Callable[[], None]) -> None:
    def act() -> bool:
        action()
        return True

    tf.cond(condition, act, lambda: False)


def _once_there(operation: Any) -> contextlib.AbstractContextManager[Any]:
    """A scope in which everything waits for an operation, if there is one."""
    return contextlib.nullcontext() if operation is None else tf.control_dependencies([operation])


def _tensors_in(grads: Sequence[Any]) -> list[Any]:
    """All gradients in those of the buckets."""
    lists = [[grad.values] if isinstance(grad, Rows) else grad.grads for grad in grads if grad is not None]
    return [grad for parts in lists for grad in parts if grad is not None]


def _write_rows(plan: Plan, state: State, b: int, grad: Rows, dynamic: list[Value], prepared: Any) -> None:
    variables = {"weights": state.weights[b][0], **state.slots[b]}

    def take(name: str) -> Any:
        return tree.map_structure(lambda v: tf.gather(handle(v), grad.indices), variables[name])

    new = update.update_rows(plan, b, take, state.slots[b], dynamic, prepared)
    for name, values in new.items():
        for variable, rows in zip(tree.flatten(variables[name]), tree.flatten(values), strict=True):
            handle(variable).scatter_update(tf.IndexedSlices(rows, grad.indices))


# -- reading and assigning --------------------------------------------------------------------------------------------


def _read(
    buckets: Sequence[Bucket],
    state: State,
    *,
    joined: Sequence[Tensor | None] | None = None,
    slots: Sequence[Slots] | None = None,
    without: Collection[int] = (),
    only: Collection[str] | None = None,
) -> State:
    """The state as tensors; None for the weights and slots of the buckets in `without`.

    Weights in `joined` and slots in `slots` have been read.
    """
    view: dict[str, Any] = {}
    for name, part in state._asdict().items():
        if only is not None and name not in only:
            continue
        if name == "weights":
            view[name] = [
                None
                if b in without
                else bucket.join([tensor(v) for v in part[b]])
                if joined is None or joined[b] is None
                else joined[b]
                for b, bucket in enumerate(buckets)
            ]
        elif name == "slots":
            view[name] = [
                {
                    slot: tree.map_structure((lambda _: None) if b in without else tensor, held)
                    if slots is None or slot not in slots[b]
                    else slots[b][slot]
                    for slot, held in of_bucket.items()
                }
                for b, of_bucket in enumerate(part)
            ]
        else:
            view[name] = tree.map_structure(tensor, part)
    return State(**view)


def _write(
    buckets: Sequence[Bucket],
    state: State,
    before: State,
    after: State,
    *,
    keep: Collection[int] | None = None,
    reused: Sequence[Collection[str]] | None = None,
    once: Any = None,
) -> list[tuple[Tensor | None, Slots]]:
    """Assigns what has changed, and returns for each bucket what was left out: its weights or None, and slots.

    Args:
        buckets: The buckets.
        state: The variables.
        before: Their values.
        after: Their new values.
        keep: If given, the weights of the buckets not in it are returned and not assigned.
        reused: If given, for each bucket which of its slots are returned and not assigned.
        once: On TensorFlow the operation that what does not depend on gradients, such as a counter, waits for.
    """
    weights: list[Tensor | None] = [None] * len(buckets)
    for b, (bucket, old, new) in enumerate(zip(buckets, before.weights, after.weights, strict=False)):
        if new is old:
            continue
        if keep is not None and b not in keep:
            weights[b] = new
        else:
            _assign_all(state.weights[b], bucket.split(new))
    slots: list[Slots] = [{} for _ in buckets]
    for b, names in enumerate(reused or ()):
        slots[b] = {name: new for name, new in after.slots[b].items() if name in names} if names else {}
    if any(slots):
        kept = zip(after.slots, before.slots, slots, strict=True)
        others = [{**new, **{name: old[name] for name in left}} for new, old, left in kept]
        after = after._replace(slots=others)
    for name in State._fields:
        old, new = getattr(before, name), getattr(after, name)
        if name == "weights" or old is new:
            continue
        for variable, a, b in zip(*map(tree.flatten, (getattr(state, name), old, new)), strict=True):
            if a is not b:
                with _once_there(once):
                    variable.assign(b)
    return list(zip(weights, slots, strict=True))


def _assign_all(variables: Sequence[Any], values: Sequence[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        handle(variable).assign(value) if TENSORFLOW else variable.assign(value)


def _scalars(state: State) -> State:
    """The state that exists once, such as counters."""
    parts = dict.fromkeys(PER_BUCKET, ())
    return tree.map_structure(tensor, state._replace(**parts))

"""One update of the weights, as pure functions of the state, the gradients and what is fixed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_optkit.backend import Rows
from keras_optkit.optimizers.engine import gradients, noise, nonfinite, rounding
from keras_optkit.optimizers.engine.gradients import Grad
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan, RuleId, memo
from keras_optkit.optimizers.engine.state import State, begun, functions_of_weights, of_rule
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.hyper import Product
from keras_optkit.optimizers.rate import scaled_rate
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Value, contributes, layout_of, measured, slots_of
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.precision import at_least_float32, scalar_dtype


class Prepared(NamedTuple):
    """What the updates of all buckets of one step have in common."""

    iterations: Tensor  # before the update
    rate: Tensor
    read: list[Tensor]  # the present values of the hyperparameters that are schedules or variables
    before: dict[str, Tensor]  # the rules' scalars
    scalars: dict[str, Tensor]  # and after `measure`
    changed: list[Tensor | None]  # the gradients of the buckets, after the transforms
    finite: Tensor | None  # whether all gradients are
    position: Tensor | None  # (bucket, place in it) of the first element that is not


class Ready(NamedTuple):
    """What a rule is given for one bucket, except for `Hyper`."""

    u: Tensor | None  # the gradient, after the transforms; None where there is none
    slots: Slots
    p: Tensor
    mask: Any
    updates: Tensor | None  # of each parameter, for rules that ask `h.first`
    product: Tensor | None = None  # with the Hessian, for rules that need it


def prepare(
    plan: Plan,
    state: State,
    grads: list[Any],
    dynamic: list[Value],
    read: list[Tensor],
    weights: Callable[[int], Tensor] | None = None,
) -> Prepared:
    """What needs all gradients, or is the same for all of them.

    Args:
        plan: How.
        state: The state.
        grads: The gradients of the buckets.
        dynamic: The hyperparameters that are schedules or variables.
        read: Their present values.
        weights: Gives the weights of a bucket, or of its rows that have gradients; None if they are in the state.
    """
    finite = position = None
    if plan.keywords.skip_nonfinite:
        present = [(b, gradients.values(g)) for b, g in enumerate(grads) if g is not None]
        present += [(b, x) for b, g in enumerate(grads) if isinstance(g, Grad) for x in g.extras.values()]
        finite, position = nonfinite.first_bad(present)
    prepared = begun_step(plan, state, grads, dynamic, read)._replace(finite=finite, position=position)
    changed = prepared.changed
    remembered = memo(dynamic, read)
    for transform in plan.of("gradient"):
        of_bucket = weights or (lambda b: rounding.widened(plan, state, b))
        changed = _changed(plan, prepared, transform, grads, of_bucket, remembered)
        prepared = prepared._replace(changed=changed)
    rules = [r for r, routed in plan.rules.items() if routed.rule.scalars() and not contributes(routed.rule)]
    return _measured(plan, prepared, {r: {} for r in rules}, remembered)


def begun_step(plan: Plan, state: State, grads: list[Any], dynamic: list[Value], read: list[Tensor]) -> Prepared:
    """What is known before the transforms."""
    scheduled = None if plan.schedule is None else read[dynamic.index(plan.schedule)]
    multiplier = ops.cast(state.multiplier, scalar_dtype())
    rate = multiplier if scheduled is None else scaled_rate(scheduled, multiplier)
    old = dict(state.scalars)
    given = [
        bucket.view(g.values) if isinstance(g, Rows) else g if g is None else gradients.values(g)
        for bucket, g in zip(plan.buckets, grads, strict=True)
    ]
    return Prepared(state.iterations, rate, read, old, old, given, None, None)


def perturbed(
    plan: Plan, state: State, grads: list[Any], dynamic: list[Value], read: list[Tensor]
) -> list[Tensor | None]:
    """The weights of each bucket to compute the second gradient at; None where they stay as they are."""
    moved: list[Tensor | None] = [None] * len(grads)
    for b, by in _changed_by_rules(plan, state, grads, dynamic, read, lambda rule: rule.perturbation()):
        p, mask = rounding.widened(plan, state, b), grads[b].mask
        p = p + by if mask is None else ops.where(mask, p + by, p)
        moved[b] = rounding.narrowed(plan, p, b, state.iterations)
    return moved


def combined(plan: Plan, state: State, grads: list[Any], dynamic: list[Value], read: list[Tensor]) -> list[Grad | None]:
    """The gradients to update with, from the first and the second ones, for rules that have a `combination`."""
    found = list(grads)
    for b, u in _changed_by_rules(plan, state, grads, dynamic, read, lambda rule: rule.combination()):
        extras = {name: extra for name, extra in grads[b].extras.items() if name != "first"}
        found[b] = grads[b]._replace(value=u, extras=extras)
    return found


def _changed_by_rules(
    plan: Plan,
    state: State,
    grads: list[Any],
    dynamic: list[Value],
    read: list[Tensor],
    transform_of: Callable[[Rule], Transform | None],
) -> Iterator[tuple[int, Tensor]]:
    """Each bucket whose rule has such a transform, and its gradient after it.

    The sums are over all parameters of one rule, those that it routes to others included.
    """
    prepared, remembered = begun_step(plan, state, grads, dynamic, read), memo(dynamic, read)
    for number in dict.fromkeys(bucket.rule[0] for bucket in plan.buckets):
        transform = transform_of(plan.rules[number, ""].rule)
        if transform is None:
            continue
        theirs: list[Any] = [g if b.rule[0] == number else None for b, g in zip(plan.buckets, grads, strict=True)]
        of_bucket = functools.partial(rounding.widened, plan, state)
        changed = _changed(plan, prepared, transform, theirs, of_bucket, remembered)
        yield from ((b, u) for b, u in enumerate(changed) if u is not None)


def _changed(
    plan: Plan,
    prepared: Prepared,
    transform: Transform,
    grads: list[Any],
    weights: Callable[[int], Tensor],
    remembered: dict[Any, Tensor],
) -> list[Tensor | None]:
    """The gradients of the buckets after one more transform."""
    totals: dict[str, Tensor] = {}
    given = []
    for b, (bucket, grad, u) in enumerate(zip(plan.buckets, grads, prepared.changed, strict=True)):
        if grad is None:
            continue
        sums = functools.partial(gradients.sum_of_rows, grad) if isinstance(grad, Rows) else bucket.over_parameters
        first = grad.extras.get("first") if isinstance(grad, Grad) else None
        h = hyper(plan, prepared, remembered, bucket)
        normal = noise.of_bucket(plan, bucket, h)
        h = h.for_transform(transform.layout, bucket.weight, sums, gradient=first, _normal=normal)
        p = weights(b)
        for name, part in transform.contribute(u, p, h).items():
            total = ops.cast(gradients.total(grad, part), scalar_dtype())
            totals[name] = totals.get(name, 0.0) + total
        given.append((b, u, p, h))
    changed: list[Tensor | None] = [None] * len(grads)
    for b, u, p, h in given:
        h.totals = totals
        changed[b] = transform.changed(u, p, h)
    return changed


def _measured(
    plan: Plan, prepared: Prepared, sums: dict[RuleId, dict[str, Tensor]], remembered: dict[Any, Tensor]
) -> Prepared:
    """With the new scalars of the rules that `sums` are for."""
    new = dict(prepared.scalars)
    for r, theirs in sums.items():
        h = hyper(plan, prepared, remembered, rule=r)
        for name, value in measured(plan.rules[r].rule, h, theirs).items():
            key = of_rule(r, name)
            new[key] = ops.cast(value, prepared.before[key].dtype)
    return prepared._replace(scalars=new)


def _contributions(
    plan: Plan, prepared: Prepared, ready: Sequence[Ready | None], remembered: dict[Any, Tensor]
) -> dict[RuleId, dict[str, Tensor]]:
    """What the parameters of each rule contribute, summed; rules that do not contribute are left out."""
    sums: dict[RuleId, dict[str, Tensor]] = {r: {} for r, x in plan.rules.items() if contributes(x.rule)}
    for bucket, theirs in zip(plan.buckets, ready, strict=True):
        if bucket.rule not in sums or theirs is None or theirs.u is None:
            continue
        h = hyper(plan, prepared, remembered, bucket, updates=theirs.updates, product=theirs.product)
        parts = plan.rule(bucket).contribute(theirs.u, theirs.slots, theirs.p, h)
        for name, part in parts.items():
            there = part if theirs.mask is None else ops.where(theirs.mask, part, ops.zeros_like(part))
            total = ops.cast(ops.sum(there), scalar_dtype())
            sums[bucket.rule][name] = sums[bucket.rule].get(name, 0.0) + total
    return {r: found for r, found in sums.items() if found}


def hyper(
    plan: Plan,
    prepared: Prepared,
    remembered: dict[Any, Tensor],
    bucket: Bucket | None = None,
    *,
    rule: RuleId = (0, ""),
    updates: Tensor | None = None,
    product: Tensor | None = None,
) -> Hyper:
    """What a rule is told, for the parameters of a bucket or (for `measure`) for the whole model."""
    number, route = rule if bucket is None else bucket.rule
    treatment = Treatment(rule=number, route=route) if bucket is None else bucket.treatment
    routed = plan.rules[number, route]
    own = routed.weight_decay if treatment.weight_decay is None else treatment.weight_decay
    decay = plan.keywords.weight_decay if own is None else own
    lr_scale = treatment.lr_scale * routed.lr_scale
    layout, names = layout_of(routed.rule), {name: of_rule((number, route), name) for name in routed.rule.scalars()}
    return Hyper(
        prepared.iterations,
        prepared.rate if lr_scale == 1 else prepared.rate * lr_scale,
        scalar_dtype() if bucket is None else at_least_float32(bucket.dtype),
        weight_decay=decay if treatment.decayed and decay is not None else 0.0,
        scalars={name: prepared.scalars[key] for name, key in names.items()},
        before={name: prepared.before[key] for name, key in names.items()},
        memo=remembered,
        since=0 if bucket is None else bucket.since,
        kernel=None if bucket is None or layout != "whole" else bucket.weight.axes,
        sums=None if bucket is None or layout == "elementwise" else bucket.over_parameters,
        first=None if bucket is None or updates is None else bucket.spread(ops.equal(updates, 0)),
        base_rate=prepared.rate,
        product=None if bucket is None or product is None else _product(plan, bucket, prepared.iterations, product),
    )


def _product(plan: Plan, bucket: Bucket, iterations: Tensor, value: Tensor) -> Product:
    return Product(plan.rule(bucket).random_vector(), value, lambda: bucket.join(plan.vector(bucket, iterations)))


def update(plan: Plan, state: State, grads: list[Any], dynamic: list[Value], prepared: Prepared) -> State:
    """One update of the weights; buckets whose weights are None are left to `update_rows`."""
    keywords, remembered = plan.keywords, memo(dynamic, prepared.read)
    ready = [_ready(plan, state, b, grad, u) for b, (grad, u) in enumerate(zip(grads, prepared.changed, strict=True))]
    prepared = _measured(plan, prepared, _contributions(plan, prepared, ready, remembered), remembered)
    weights, slots = list(state.weights), list(state.slots)
    average, master, updates = list(state.average), list(state.master), list(state.updates)
    for b, (bucket, theirs) in enumerate(zip(plan.buckets, ready, strict=True)):
        if theirs is None:
            continue
        u, wide, p, mask, counted, product = theirs
        if u is not None:
            h = hyper(plan, prepared, remembered, bucket, updates=counted, product=product)
            p, wide = apply_rule(plan, bucket, u, wide, p, h, mask)
            p = _constrained(plan, b, p, mask)
            if counted is not None:
                updates[b] = {"updates": counted + _had_gradients(bucket, mask)}
        if keywords.use_ema:
            average[b] = bucket.stored(_averaged(plan, state, b, p))
        weights[b] = rounding.narrowed(plan, p, b, state.iterations)
        if keywords.master_weights and state.master[b]:
            master[b] = {"master": bucket.stored(p)}
        slots[b] = rounding.narrow_slots(plan, wide, state.slots[b], b, state.iterations)
    new = state._replace(
        iterations=state.iterations + 1,
        weights=weights,
        slots=slots,
        average=average if keywords.use_ema else (),
        master=master if keywords.master_weights else (),
        scalars=prepared.scalars if state.has("scalars") else (),
        updates=updates if state.has("updates") else (),
    )
    if keywords.skip_nonfinite:
        new = nonfinite.unless_nonfinite(state, new, prepared.finite, prepared.position)
    return gradients.cleared(new) if keywords.gradient_accumulation_steps else new


def _ready(plan: Plan, state: State, b: int, grad: Any, u: Tensor | None) -> Ready | None:
    """What the rule of a bucket is handed; None where nothing changes, or rows alone do."""
    bucket = plan.buckets[b]
    looks = plan.keywords.use_ema or functions_of_weights(plan.rule(bucket), bucket)
    if state.weights[b] is None or (grad is None and not looks):
        return None
    p = rounding.widened(plan, state, b)
    wide = begun(plan.rule(bucket), rounding.wide_slots(state.slots[b], bucket), p, bucket, state.iterations)
    if grad is None:
        return Ready(None, wide, p, None, None)
    counted = state.updates[b]["updates"] if plan.rule(bucket).uses_first else None
    return Ready(u, wide, p, grad.mask, counted, grad.extras.get("product"))


def _had_gradients(bucket: Bucket, mask: Any) -> Any:
    """1 for each parameter of which at least one element is updated."""
    if mask is None:
        return np.ones((len(bucket.indices),), "int32")
    if bucket.form == "flat":
        flags = [ops.any(part) if math.prod(part.shape) else np.True_ for part in bucket.split(mask)]
        return ops.stack([ops.cast(flag, "int32") for flag in flags])
    return ops.cast(ops.any(ops.reshape(mask, (len(bucket.indices), -1)), axis=1), "int32")


def update_rows(
    plan: Plan, b: int, take: Any, slots: Slots, dynamic: list[Value], prepared: Prepared
) -> dict[str, Tensor]:
    """One update of some rows of a parameter that is alone in its bucket; the new rows by name of the state."""
    bucket = plan.buckets[b]
    weights = take("weights")
    p = bucket.view(ops.cast(weights, at_least_float32(bucket.dtype)))
    held = {name: take(name) for name in slots}
    h = hyper(plan, prepared, memo(dynamic, prepared.read), bucket)
    p, new = apply_rule(plan, bucket, prepared.changed[b], rounding.wide_slots(held, bucket), p, h, prepared.finite)
    stored = rounding.narrow_slots(plan, new, held, b, prepared.iterations)
    return {"weights": bucket.stored(ops.cast(p, weights.dtype)), **stored}


def apply_rule(
    plan: Plan, bucket: Bucket, u: Tensor, slots: Slots, p: Tensor, h: Hyper, mask: Any
) -> tuple[Tensor, Slots]:
    """Parameters and slots after the rule and the decoupled decay; where the mask is False, as they were."""
    rule = plan.rule(bucket)
    missing = set(slots_of(rule, bucket.weight)) - set(slots)
    if missing:
        raise ValueError(
            f"{plan.name} was built without the state {sorted(missing)} that {rule!r} needs. Give a "
            "hyperparameter that switches state on a value other than 0 before the optimizer is built."
        )
    step, new = rule.update(u, slots, p, h)
    if set(new) != set(slots):
        raise ValueError(f"{type(rule).__name__}.update returned the slots {sorted(new)}, expected {sorted(slots)}.")
    after = plan.of("step")
    for transform in after:
        more = {"gradient": u, "_normal": noise.of_bucket(plan, bucket, h)}
        told = h.for_transform(transform.layout, bucket.weight, bucket.over_parameters, **more)
        step = transform.changed(step, p, told)
    if h.decays and not (rule.handles_decay or any(t.handles_decay for t in after)):
        step = step + h.learning_rate * h.weight_decay * p
    if mask is None:
        return p - step, new
    kept = {name: ops.where(_mask_of_slot(mask, p, old), new[name], old) for name, old in slots.items()}
    return ops.where(mask, p - step, p), kept


def _mask_of_slot(mask: Any, p: Tensor, slot: Tensor) -> Any:
    """A mask for state that may have another shape than the parameters; it then is by parameter alone."""
    if tuple(slot.shape) == tuple(p.shape) or not np.shape(mask):
        return mask
    return ops.reshape(mask, (-1, *[1] * (len(slot.shape) - 1)))


def _constrained(plan: Plan, b: int, p: Tensor, mask: Any) -> Tensor:
    bucket, constraint = plan.buckets[b], plan.constraints[b]
    if constraint is None:
        return p
    constrained = bucket.join([constraint(bucket.split(p)[0])])
    known = not plan.keywords.gradient_accumulation_steps or mask is None
    return constrained if known else ops.where(ops.any(mask), constrained, p)


def _averaged(plan: Plan, state: State, b: int, p: Tensor) -> Tensor:
    bucket = plan.buckets[b]
    started = ops.cast(state.iterations > bucket.since, scalar_dtype())
    momentum = started * plan.keywords.ema_momentum  # the first update sets the average
    average = bucket.view(state.average[b])
    return ops.cast(momentum, p.dtype) * average + ops.cast(1 - momentum, p.dtype) * p

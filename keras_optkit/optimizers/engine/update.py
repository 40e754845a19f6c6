"""One update of the weights, as pure functions of the state, the gradients and what is fixed."""

from __future__ import annotations

from typing import Any, NamedTuple

from keras import ops

from keras_optkit.backend import Rows
from keras_optkit.optimizers.engine import gradients, nonfinite, rounding
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan, memo
from keras_optkit.optimizers.engine.state import State, begun, functions_of_weights, of_rule
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.rate import scaled_rate
from keras_optkit.optimizers.rule import Hyper, Slots, Tensor, Value
from keras_optkit.precision import at_least_float32, scalar_dtype


class Prepared(NamedTuple):
    """What the updates of all buckets of one step have in common."""

    iterations: Tensor  # before the update
    rate: Tensor
    read: list[Tensor]  # the present values of the hyperparameters that are schedules or variables
    scalars: dict[str, Tensor]  # the rules', after `measure`
    factor: Tensor | None  # of clipping by global norm
    finite: Tensor | None  # whether all gradients are
    position: Tensor | None  # (bucket, place in it) of the first number that is not


def prepare(plan: Plan, state: State, grads: list[Any], dynamic: list[Value], read: list[Tensor]) -> Prepared:
    """What needs all gradients, or is the same for all of them."""
    factor = finite = position = None
    keywords = plan.keywords
    if keywords.global_clipnorm is not None:
        total = sum(ops.cast(gradients.sum_of_squares(g), scalar_dtype()) for g in grads if g is not None)
        factor = shrink(total, keywords.global_clipnorm)
    if keywords.skip_nonfinite:
        present = [(b, gradients.values(g)) for b, g in enumerate(grads) if g is not None]
        finite, position = nonfinite.first_bad(present)
    scheduled = None if plan.schedule is None else read[dynamic.index(plan.schedule)]
    multiplier = ops.cast(state.multiplier, scalar_dtype())
    rate = multiplier if scheduled is None else scaled_rate(scheduled, multiplier)
    old: Any = state.scalars
    prepared = Prepared(state.iterations, rate, read, dict(old), factor, finite, position)
    if state.has("scalars"):
        remembered = memo(dynamic, read)
        new = {
            of_rule(r, name): value
            for r, rule in plan.rules.items()
            for name, value in rule.measure(hyper(plan, prepared, remembered, rule=r)).items()
        }
        prepared = prepared._replace(scalars={name: ops.cast(new[name], v.dtype) for name, v in old.items()})
    return prepared


def hyper(
    plan: Plan, prepared: Prepared, remembered: dict[Any, Tensor], bucket: Bucket | None = None, rule: int = 0
) -> Hyper:
    """What a rule is told, for the parameters of a bucket or (for `measure`) for the whole model."""
    treatment = Treatment(rule=rule) if bucket is None else bucket.treatment
    decay = plan.keywords.weight_decay if treatment.weight_decay is None else treatment.weight_decay
    names = plan.rules[treatment.rule].scalars()
    return Hyper(
        prepared.iterations,
        prepared.rate if treatment.lr_scale == 1 else prepared.rate * treatment.lr_scale,
        scalar_dtype() if bucket is None else at_least_float32(bucket.dtype),
        weight_decay=decay if treatment.decayed and decay is not None else 0.0,
        scalars={name: prepared.scalars[of_rule(treatment.rule, name)] for name in names},
        memo=remembered,
        since=0 if bucket is None else bucket.since,
    )


def update(plan: Plan, state: State, grads: list[Any], dynamic: list[Value], prepared: Prepared) -> State:
    """One update of the weights; buckets whose weights are None are left to `update_rows`."""
    keywords, remembered = plan.keywords, memo(dynamic, prepared.read)
    weights, slots = list(state.weights), list(state.slots)
    average, master = list(state.average), list(state.master)
    for b, bucket in enumerate(plan.buckets):
        looks = keywords.use_ema or functions_of_weights(plan.rules, bucket)
        if state.weights[b] is None or (grads[b] is None and not looks):
            continue
        p = rounding.widened(plan, state, b)
        wide = begun(plan.rules, rounding.wide_slots(state.slots[b], bucket), p, bucket, state.iterations)
        if grads[b] is not None:
            u = clip(plan, bucket, grads[b].value, prepared.factor)
            p, wide = apply_rule(plan, bucket, u, wide, p, hyper(plan, prepared, remembered, bucket), grads[b].mask)
            p = _constrained(plan, b, p, grads[b].mask)
        if keywords.use_ema:
            average[b] = bucket.stored(_averaged(plan, state, b, p))
        weights[b] = rounding.narrowed(plan, p, b, state.iterations)
        if keywords.master_weights and state.master[b]:
            master[b] = {"master": bucket.stored(p)}
        kept = rounding.narrow_slots(plan, wide, state.slots[b], b, state.iterations)
        slots[b] = {name: bucket.stored(slot) for name, slot in kept.items()}
    new = state._replace(
        iterations=state.iterations + 1,
        weights=weights,
        slots=slots,
        average=average if keywords.use_ema else (),
        master=master if keywords.master_weights else (),
        scalars=prepared.scalars if state.has("scalars") else (),
    )
    if keywords.skip_nonfinite:
        new = nonfinite.unless_nonfinite(state, new, prepared.finite, prepared.position)
    return gradients.cleared(new) if keywords.gradient_accumulation_steps else new


def update_rows(
    plan: Plan, b: int, take: Any, rows: Rows, slots: Slots, dynamic: list[Value], prepared: Prepared
) -> dict[str, Tensor]:
    """One update of some rows of a parameter that is alone in its bucket; the new rows by name of the state."""
    bucket = plan.buckets[b]
    weights = take("weights")
    p = ops.cast(weights, at_least_float32(bucket.dtype))
    held = {name: take(name) for name in slots}
    h = hyper(plan, prepared, memo(dynamic, prepared.read), bucket)
    u = clip(plan, bucket, rows, prepared.factor)
    p, new = apply_rule(plan, bucket, u, rounding.wide_slots(held, bucket), p, h, prepared.finite)
    return {
        "weights": ops.cast(p, weights.dtype),
        **rounding.narrow_slots(plan, new, held, b, prepared.iterations),
    }


def apply_rule(
    plan: Plan, bucket: Bucket, u: Tensor, slots: Slots, p: Tensor, h: Hyper, mask: Any
) -> tuple[Tensor, Slots]:
    """Parameters and slots after the rule and the decoupled decay; where the mask is False, as they were."""
    rule = plan.rule(bucket)
    missing = set(rule.slots()) - set(slots)
    if missing:
        raise ValueError(
            f"{plan.name} was built without the state {sorted(missing)} that {rule!r} needs. Give a "
            "hyperparameter that switches state on a value other than 0 before the optimizer is built."
        )
    step, new = rule.update(u, slots, p, h)
    if set(new) != set(slots):
        raise ValueError(f"{type(rule).__name__}.update returned the slots {sorted(new)}, expected {sorted(slots)}.")
    if h.decays and not rule.handles_decay:
        step = step + h.learning_rate * h.weight_decay * p
    if mask is None:
        return p - step, new
    return ops.where(mask, p - step, p), {name: ops.where(mask, new[name], old) for name, old in slots.items()}


def clip(plan: Plan, bucket: Bucket, grad: Tensor | Rows, factor: Tensor | None) -> Tensor:
    """The gradient of a bucket, or of some rows, after clipping."""
    u, keywords = gradients.values(grad), plan.keywords
    if keywords.clipvalue is not None:
        return ops.clip(u, -keywords.clipvalue, keywords.clipvalue)
    if keywords.clipnorm is not None:
        if isinstance(grad, Rows):
            return u * shrink(gradients.sum_of_squares(grad), keywords.clipnorm)
        return bucket.join([g * shrink(gradients.sum_of_squares(g), keywords.clipnorm) for g in bucket.split(u)])
    return u if factor is None else u * ops.cast(factor, u.dtype)


def shrink(sum_of_squares: Tensor, limit: float) -> Tensor:
    """The factor that brings a tensor with this sum of squares down to the norm `limit`; NaN goes through."""
    return limit / ops.maximum(ops.sqrt(sum_of_squares), limit)


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

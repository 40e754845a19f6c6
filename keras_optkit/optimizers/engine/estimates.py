"""The learning rates that rules have found, for those who look on; no part of an update."""

from __future__ import annotations

from collections.abc import Mapping

from keras import ops

from keras_optkit.optimizers.engine import rounding
from keras_optkit.optimizers.engine.plan import Plan, RuleId, memo, present
from keras_optkit.optimizers.engine.state import State, of_rule
from keras_optkit.optimizers.engine.update import begun_step, hyper
from keras_optkit.optimizers.rule import Rule, Slots, Tensor, Weight, estimates, slots_of
from keras_optkit.optimizers.slots import Fill
from keras_optkit.precision import scalar_dtype


def estimates_of(plan: Plan, state: State, before: State) -> dict[RuleId, Tensor]:
    """For each rule that finds its learning rate the factor on the optimizer's that it has found.

    Where the elements have factors of their own, it is the median (of two, the larger one) over all parameters of the
    rule.

    Args:
        plan: How updates are made.
        state: The state, without the weights; of an optimizer that is not built, counter and multiplier alone.
        before: The state that exists once, before the update whose factors are wanted.
    """
    rules = {r: routed.rule for r, routed in plan.rules.items() if estimates(routed.rule)}
    dynamic = plan.dynamic()
    read = present(dynamic, before.iterations, before.multiplier)
    remembered, prepared = memo(dynamic, read), begun_step(plan, before, [None] * len(plan.buckets), dynamic, read)
    initial = {of_rule(r, name): value for r, rule in rules.items() for name, value in rule.scalars().items()}
    prepared = prepared._replace(before=_scalars(initial, before), scalars=_scalars(initial, state))
    found = {}
    for r, rule in rules.items():
        theirs = [
            rule.estimate(rounding.wide_slots(slots, bucket), hyper(plan, prepared, remembered, bucket))
            for bucket, slots in zip(plan.buckets, state.slots, strict=False)
            if bucket.rule == r
        ] or [rule.estimate(_initial_slots(rule), hyper(plan, prepared, remembered, rule=r))]
        values = [ops.reshape(ops.cast(part, scalar_dtype()), (-1,)) for part in theirs]
        ordered = ops.sort(ops.concatenate(values))
        found[r] = ordered[ordered.shape[0] // 2]
    return found


def _scalars(initial: Mapping[str, float], state: State) -> dict[str, Tensor]:
    given = state.scalars if state.has("scalars") else {}
    return {key: given.get(key, ops.convert_to_tensor(value, scalar_dtype())) for key, value in initial.items()}


def _initial_slots(rule: Rule) -> Slots:
    """One element of each slot, as before the first update; those initialised from the weights are 0 until then."""
    values = {n: v.value if isinstance(v, Fill) else 0.0 for n, v in slots_of(rule, Weight((1,))).items()}
    return {name: ops.full((1,), value, scalar_dtype()) for name, value in values.items()}

"""Swapping between the training weights and the evaluation weights."""

from __future__ import annotations

import functools
from typing import Any

from keras import ops, tree

from keras_optkit.optimizers.engine import rounding
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.rate import scaled_rate
from keras_optkit.optimizers.rule import Hyper, Tensor


def swapped(plan: Plan, state: State, *, evaluating: bool) -> State:
    """The state after the model's training weights are swapped for the evaluation weights, or back."""
    weights, slots, average = list(state.weights), list(state.slots), list(state.average)
    memo: dict[Any, Tensor] = {}
    rate = state.multiplier
    if plan.schedule is not None and not plan.keywords.use_ema:
        rate = scaled_rate(plan.schedule(state.iterations), state.multiplier)
    for b, bucket in enumerate(plan.buckets):
        if not plan.averages(bucket):
            continue
        wide = rounding.widened(plan, state, b)
        begun = state.iterations > bucket.since  # parameters may have joined since the last update
        if plan.keywords.use_ema:
            other = bucket.view(state.average[b])
            average[b] = ops.where(begun, bucket.stored(wide), state.average[b])
        else:
            rule, old = plan.rule(bucket), state.slots[b]
            h = Hyper(state.iterations, rate, wide.dtype, memo=memo, since=bucket.since)
            held = rounding.wide_slots(old, bucket)
            other, held = (rule.eval_value if evaluating else rule.train_value)(wide, held, h)
            held = rounding.narrow_slots(plan, held, old, b, state.iterations)
            slots[b] = tree.map_structure(functools.partial(ops.where, begun), held, old)
        weights[b] = ops.cast(ops.where(begun, other, wide), bucket.dtype)
    return state._replace(
        weights=weights,
        slots=slots,
        average=average if plan.keywords.use_ema else (),
        evaluating=ops.full_like(state.evaluating, int(evaluating)),
    )

"""Casts between the dtypes that weights and slots are stored in and the dtype of the computation."""

from __future__ import annotations

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.rule import Slots, Tensor
from keras_optkit.precision import at_least_float32


def widened(plan: Plan, state: State, b: int) -> Tensor:
    """The weights of a bucket in the dtype of the computation: the masters, where they round to the weights."""
    bucket, weights = plan.buckets[b], state.weights[b]
    wide = ops.cast(weights, at_least_float32(bucket.dtype))
    if not (plan.keywords.master_weights and state.master[b]):
        return wide
    master = bucket.view(ops.convert_to_tensor(state.master[b]["master"]))
    # weights that a callback or a file has set take precedence over their masters
    return ops.where(ops.equal(ops.cast(master, bucket.dtype), weights), master, wide)


def narrowed(plan: Plan, p: Tensor, b: int, iterations: Tensor) -> Tensor:
    """Updated weights in their own dtype."""
    return rounded(p, plan.buckets[b].dtype, (b, iterations), at_random=plan.keywords.stochastic_rounding)


def wide_slots(slots: Slots, bucket: Bucket) -> Slots:
    """Slots in the dtype of the computation."""
    return {name: ops.cast(bucket.view(slot), at_least_float32(bucket.dtype)) for name, slot in slots.items()}


def narrow_slots(plan: Plan, slots: Slots, old: Slots, b: int, iterations: Tensor) -> Slots:
    """Slots in the dtypes that they are stored in."""
    at_random = plan.keywords.stochastic_rounding
    kept = {name: keras.backend.standardize_dtype(old[name].dtype) for name in slots}
    seeds = {name: (b + (place << 16), iterations) for place, name in enumerate(slots, 1)}
    return {name: rounded(slot, kept[name], seeds[name], at_random=at_random) for name, slot in slots.items()}


def rounded(x: Tensor, dtype: str, seed: tuple[int, Tensor], *, at_random: bool) -> Tensor:
    """`x` in another dtype, rounded at random if `at_random` and the dtype is bfloat16."""
    if keras.backend.standardize_dtype(x.dtype) == dtype:
        return x
    if not (at_random and dtype == "bfloat16"):
        return ops.cast(x, dtype)
    # a bfloat16 is the upper half of a float32: noise added to the lower half carries over with the right probability
    x = ops.cast(x, "float32")
    noise = ops.bitwise_and(backend.random_bits(x.shape, seed), 0xFFFF)
    return ops.cast(ops.view(ops.bitwise_and(ops.view(x, "int32") + noise, -0x10000), "float32"), dtype)

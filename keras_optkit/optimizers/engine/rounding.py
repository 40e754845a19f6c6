"""Casts between the dtypes that weights and slots are stored in and the dtype of the computation."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.engine.codecs import Codec
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
    """Stored slots in the dtype of the computation, in the form of the one tensor."""
    decoded = {name: s.decode(bucket) if isinstance(s, Codec) else bucket.view(s) for name, s in slots.items()}
    return {name: ops.cast(slot, at_least_float32(bucket.dtype)) for name, slot in decoded.items()}


def narrow_slots(plan: Plan, slots: Slots, old: Slots, b: int, iterations: Tensor) -> Slots:
    """The inverse of `wide_slots`: slots as they are stored, in the dtypes and codecs of `old`."""
    seeds = {name: (b + (place << 16), iterations) for place, name in enumerate(slots, 1)}
    at_random = plan.keywords.stochastic_rounding
    return {n: stored_as(old[n], x, plan.buckets[b], seeds[n] if at_random else None) for n, x in slots.items()}


def stored_as(old: Any, x: Tensor, bucket: Bucket, seed: tuple[Any, Any] | None = None) -> Any:
    """A slot as `old` is stored, rounded at random if a seed is given."""
    if isinstance(old, Codec):
        return old.encode(bucket, x, None if seed is None else backend.random_bits(x.shape, seed))
    dtype = keras.backend.standardize_dtype(old.dtype)
    return bucket.stored(rounded(x, dtype, seed or (0, 0), at_random=seed is not None))


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

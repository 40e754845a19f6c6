"""Random numbers for transforms, which depend on nothing but a seed, a parameter and an update."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.rule import Hyper, Tensor


def normal(shape: Sequence[int], dtype: str, seed: int, place: int, update: Tensor) -> Tensor:
    """Independent standard normal numbers, of at most 5.2 in size.

    Args:
        shape: Their shape.
        dtype: A dtype of at least 32 bits; the numbers are the same in all of them, up to rounding.
        seed: Any integer.
        place: The place of the parameter.
        update: The number of the update, as a tensor.
    """
    # neighbouring seeds and places must not be neighbours here, nor what stochastic rounding has
    stream = int.from_bytes(hashlib.blake2b(f"{seed}, {place}".encode(), digest_size=4).digest(), "little") >> 1
    bits = ops.bitwise_and(backend.random_bits(shape, (stream, ops.cast(update, "int32"))), 0x7FFFFF)
    # the middles of 2²³ equal parts of (-1, 1), which float32 represents
    uniform = (2 * ops.cast(bits, dtype) + (1 - 2**23)) / 2**23
    return math.sqrt(2) * ops.erfinv(uniform)


def of_bucket(plan: Plan, bucket: Bucket, h: Hyper) -> Callable[[int, str], Tensor]:
    """For the parameters of a bucket, their numbers of this update as a function of seed and dtype."""

    def joined(seed: int, dtype: str) -> Tensor:
        of_each = zip(bucket.indices, bucket.shapes, strict=True)
        return bucket.join([normal(shape, dtype, seed, plan.places[i], h.updates) for i, shape in of_each])

    return joined

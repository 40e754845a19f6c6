"""Random numbers for transforms, which depend on nothing but a seed, a parameter and an update."""

from __future__ import annotations

from collections.abc import Callable

from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.random_numbers import normal
from keras_optkit.optimizers.rule import Hyper, Tensor


def of_bucket(plan: Plan, bucket: Bucket, h: Hyper) -> Callable[[int, str], Tensor]:
    """For the parameters of a bucket, their numbers of this update as a function of seed and dtype."""

    def joined(seed: int, dtype: str) -> Tensor:
        of_each = zip(bucket.indices, bucket.shapes, strict=True)
        return bucket.join([normal(shape, dtype, seed, plan.places[i], h.updates) for i, shape in of_each])

    return joined

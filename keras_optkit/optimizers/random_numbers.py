"""Random numbers as a function of a seed, a parameter and an update; the vectors that Hessians are multiplied by."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.rule import Fields, Tensor, choice, count

#: How the elements of a random vector are distributed; all with the mean 0 and the variance 1.
DISTRIBUTIONS = ("normal", "rademacher")


def bits(shape: Sequence[int], seed: int, place: int, update: Tensor) -> Tensor:
    """Random int32 numbers, all bits of them.

    Args:
        shape: Their shape.
        seed: Any integer.
        place: The place of the parameter in the model's order.
        update: The number of the update, as a tensor.
    """
    # neighbouring seeds and places must not be neighbours here, nor what stochastic rounding has
    stream = int.from_bytes(hashlib.blake2b(f"{seed}, {place}".encode(), digest_size=4).digest(), "little") >> 1
    return backend.random_bits(shape, (stream, ops.cast(update, "int32")))


def normal(shape: Sequence[int], dtype: str, seed: int, place: int, update: Tensor) -> Tensor:
    """Independent standard normal numbers, of at most 5.2 in size, from the same arguments as `bits`.

    The dtype has at least 32 bits; the numbers are the same in all of them, up to rounding.
    """
    # the middles of 2²³ equal parts of (-1, 1), which float32 represents
    uniform = (2 * ops.cast(ops.bitwise_and(bits(shape, seed, place, update), 0x7FFFFF), dtype) + (1 - 2**23)) / 2**23
    return math.sqrt(2) * ops.erfinv(uniform)


@dataclass(frozen=True)
class RandomVector(Fields):
    """A vector v with `E[v vᵀ] = I`, a function of the seed and of how many updates there have been.

    So it needs no state, and micro-batches and replicas have the same one.

    Attributes:
        distribution: "normal", or "rademacher": 1 or -1, each with probability 1/2.
        every: The product with it is computed for the updates 1, every + 1, ...
        seed: Another seed gives other vectors.
    """

    distribution: str = choice("normal", DISTRIBUTIONS)
    every: int = count(1, 1)
    seed: int = count(0, 0)

    def is_due(self, iterations: Tensor) -> Any:
        """Whether there is a product in the update after so many; True where there always is one."""
        return True if self.every == 1 else ops.equal(ops.mod(iterations, self.every), 0)

    def products(self, iterations: Tensor, since: int) -> Tensor:
        """How many products there have been with the one of this update, for parameters that joined at `since`."""
        return ops.floor_divide(iterations, self.every) + (1 - math.ceil(since / self.every))

    def part(self, shape: Sequence[int], dtype: str, iterations: Tensor, place: int) -> Tensor:
        """The part of the vector for the parameter at this place in the model's order."""
        if self.distribution == "normal":
            return normal(shape, dtype, self.seed, place, iterations)
        return ops.cast(ops.where(bits(shape, self.seed, place, iterations) < 0, -1, 1), dtype)

"""The random vectors that Hessians are multiplied by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.rule import Fields, Tensor, choice, count

#: How the elements of a random vector are distributed; all with the mean 0 and the variance 1.
DISTRIBUTIONS = ("normal", "rademacher")


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
        seed = (self.seed * 0x9E3779B1 + place) % 2**31, ops.cast(iterations, "int32")
        if self.distribution == "rademacher":
            return ops.cast(ops.where(backend.random_bits(shape, seed) < 0, -1, 1), dtype)
        uniform = (ops.cast(backend.random_bits((2, *shape), seed), dtype) + (2.0**31 + 0.5)) * 2.0**-32
        return ops.sqrt(-2.0 * ops.log(uniform[0])) * ops.cos(2 * math.pi * uniform[1])  # Box and Muller

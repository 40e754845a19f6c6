"""What NonFiniteGuard has seen, and the error when it was too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Tensor = Any


@dataclass(frozen=True)
class Failure:
    """One failure that `NonFiniteGuard` has seen.

    Attributes:
        epoch: Its epoch, counted from 0.
        batch: Its batch in this epoch, counted from 0.
        kind: What was wrong: `"loss"` (not finite), `"spike"`, `"gradient"` or `"weight"` (not finite).
        loss: The loss of this batch; NaN also where the training step does not show it.
        limit: The loss above which it would have been a spike; infinity if there was no limit yet.
        layer: Path of the first layer that was bad, or None if none was, or none was found.
        in_data: Whether the batch itself was found to hold values that are not finite.
        where: What was bad first in words: the data, a layer, the loss function, a gradient or a weight.
    """

    epoch: int
    batch: int
    kind: str
    loss: float
    limit: float
    layer: str | None
    in_data: bool
    where: str

    def __str__(self) -> str:
        at = "" if math.isnan(self.loss) else f", at a loss of {self.loss:g}"
        what = {
            "loss": f"the loss is {self.loss:g}",
            "spike": f"the loss is {self.loss:g}, a spike above {self.limit:g}",
            "gradient": f"gradients are not finite{at}",
            "weight": f"the update has made weights that are not finite{at}",
        }[self.kind]
        return f"{what}, in batch {self.batch + 1} of epoch {self.epoch + 1}; {self.where}"


class TrainingDivergedError(FloatingPointError):
    """Raised by `NonFiniteGuard` when it gives up; the model then has the last good state.

    Attributes:
        failure: The last failure, a `Failure`.
        failures: All failures of this `fit`, in order.
    """

    def __init__(self, message: str, failures: Sequence[Failure]):
        super().__init__(message)
        self.failures = list(failures)
        self.failure = self.failures[-1]

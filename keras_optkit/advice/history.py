"""What a run has measured so far, as much of it as rules need, whatever its length."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from statistics import median

from keras_optkit.advice.measured import ModelReport

#: How many writes are kept, of the first ones and of the last ones.
FIRST, RECENT = 10, 20
LOSS, RATE, CLIP_RATE = "train/loss", "train/learning_rate", "train/clip_rate"
GRADIENT, RATIO, NONFINITE = "gradient_norm/", "update_ratio/", "nonfinite/"
TOTAL_GRADIENT = "train/gradient_norm"


class History:
    """The values of the first and the last writes of a run, and what is known of those in between.

    A write in which the loss or the gradient is not finite is counted, and its other values are left out.

    Args:
        model: What was measured of the model when the run began; without layers if nothing was.

    Attributes:
        first: The values by tag of the first writes, with the step.
        recent: Those of the last ones.
        count: The number of writes.
        step: The step of the last write.
        epochs: The number of epochs that have ended.
        bad_since: The step since which the loss or the gradient has not been finite; None if it is.
        bad_layers: The layers whose gradients were not finite then, in the order of the model.
        bad_loss: The loss that is not finite.
        zero_since: By tag of a learning rate, since which step it has been 0, and in how many writes.
        peaks: By tag of a learning rate, the largest one.
    """

    def __init__(self, model: ModelReport | None = None):
        self.model = ModelReport() if model is None else model
        self.first: list[tuple[int, Mapping[str, float]]] = []
        self.recent: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=RECENT)
        self.count = self.step = self.epochs = 0
        self.bad_since: int | None = None
        self.bad_layers: list[str] = []
        self.bad_loss: float | None = None
        self.zero_since: dict[str, tuple[int, int]] = {}
        self.peaks: dict[str, float] = {}

    def add(self, step: int, values: Mapping[str, float], *, of_epoch: bool = False) -> None:
        """Adds what was written at a step."""
        self.step = max(self.step, step)
        if of_epoch:
            self.epochs += 1
            of_epoch_loss = values.get("epoch/loss", 0.0)
            if not math.isfinite(of_epoch_loss):
                self._add_bad(step, of_epoch_loss, [])
            return
        self.count += 1
        losses = [value for tag, value in values.items() if _is(tag, LOSS)]
        loss = next((value for value in losses if not math.isfinite(value)), None)
        layers = [tag.removeprefix(NONFINITE) for tag, value in values.items() if tag.startswith(NONFINITE) and value]
        if loss is not None or layers or not math.isfinite(values.get(TOTAL_GRADIENT, 0.0)):
            self._add_bad(step, loss, layers)
            return
        self.bad_since, self.bad_loss, self.bad_layers = None, None, []
        for tag, value in values.items():
            if _is(tag, RATE):
                since, writes = self.zero_since.pop(tag, (step, 0))
                if value == 0:
                    self.zero_since[tag] = since, writes + 1
                self.peaks[tag] = max(self.peaks.get(tag, 0.0), value)
        if len(self.first) < FIRST:
            self.first.append((step, values))
        self.recent.append((step, values))

    def _add_bad(self, step: int, loss: float | None, layers: list[str]) -> None:
        if self.bad_since is None:
            self.bad_since, self.bad_layers = step, layers
        self.bad_loss = self.bad_loss if loss is None else loss

    # -- for rules ----------------------------------------------------------------------------------------------------

    def level(self, tag: str) -> float | None:
        """The median of the last values of a tag, of those that are finite; None without one."""
        return _median(values.get(tag) for _, values in self.recent)

    def start(self, tag: str) -> float | None:
        """The median of the first five values."""
        return _median(values.get(tag) for _, values in self.first[:5])

    def now(self, tag: str) -> float | None:
        """The median of the last five values."""
        return _median(values.get(tag) for _, values in list(self.recent)[-5:])

    def layers(self, prefix: str) -> list[str]:
        """The layers that the last write has a value of, in the order of the model."""
        return [
            tag.removeprefix(prefix) for tag in (self.recent[-1][1] if self.recent else ()) if tag.startswith(prefix)
        ]

    def tags(self, name: str) -> list[str]:
        """The tags of a value in the last write: one, or one for each optimizer."""
        return [tag for tag in (self.recent[-1][1] if self.recent else ()) if _is(tag, name)]

    @property
    def rate(self) -> float | None:
        """The learning rate of the last writes, of the first optimizer."""
        tags = self.tags(RATE)
        return self.level(tags[0]) if tags else None


def _is(tag: str, name: str) -> bool:
    return tag == name or tag.startswith(f"{name}/")


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None and math.isfinite(value)]
    return median(found) if found else None

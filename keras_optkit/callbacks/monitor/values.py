"""The values that `TrainingMonitor` writes, by tag, of what a step has computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_optkit.callbacks.monitor import estimates
from keras_optkit.callbacks.monitor.host import hyperparameters, skipped
from keras_optkit.callbacks.monitor.step import CHANGE, GRADIENT, NONFINITE, WEIGHT, Reading
from keras_optkit.optimizers.of_model import used_optimizers_of

#: The clip rate is that of so many updates, the last ones that were written.
CLIP_WINDOW = 20

#: Decay of the running means that the gradient noise scale is computed from, for each write.
NOISE_DECAY = 0.9


class Values:
    """Turns what steps have computed into values by tag.

    Attributes:
        clips: By the tag of a clip rate, whether clipping has changed the gradients of the last writes.
        noise: The running means that the gradient noise scale is the ratio of.
    """

    def __init__(self) -> None:
        self.clips: dict[str, list[float]] = {}
        self.noise: list[float] = []

    def state(self) -> dict[str, Any]:
        """The running shares and means."""
        return {"clips": {tag: list(window) for tag, window in self.clips.items()}, "noise": list(self.noise)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Sets what `state` has returned."""
        self.clips = {tag: list(window) for tag, window in state["clips"].items()}
        self.noise = list(state["noise"])

    def of(self, read: Reading, model: Any) -> dict[str, float]:
        """All values of an update, but for time and memory."""
        values = self._of_optimizers(read, model)
        if "loss" in read.scalars:
            values["train/loss"] = read.scalars["loss"]
        if read.layers:
            values |= self._of_layers(read.layers)
        if "half_squares" in read.scalars:
            values |= self._of_halves(read)
        for kind, by_layer in read.activations.items():
            values |= {f"activation_{kind}/{layer}": value for layer, value in by_layer.items()}
        count = skipped(model)
        if count is not None:
            values["train/skipped"] = count
        return values | hyperparameters(model)

    def _of_optimizers(self, read: Reading, model: Any) -> dict[str, float]:
        """What there is for each optimizer that has made an update; its name is in the tag where there are several."""
        optimizers = used_optimizers_of(model)
        names = {id(optimizer): name for name, optimizer in optimizers.items()}
        values = {}
        for optimizer, scalars in read.updates:
            for scalar, value in (scalars | estimates.effective_rates(scalars)).items():
                what, *place = scalar.split("/")
                tag = "/".join([tag_of(f"train/{what}", names.get(id(optimizer), ""), optimizers), *place])
                if what == "clipped":
                    tag = tag.replace("clipped", "clip_rate", 1)
                    self.clips[tag] = [*self.clips.get(tag, []), value][-CLIP_WINDOW:]
                    value = sum(self.clips[tag]) / len(self.clips[tag])
                values[tag] = value
        return values

    def _of_layers(self, layers: Mapping[str, np.ndarray]) -> dict[str, float]:
        totals = np.sum(list(layers.values()), axis=0)
        values = {
            "train/gradient_norm": math.sqrt(totals[GRADIENT]),
            "train/weight_norm": math.sqrt(totals[WEIGHT]),
            "train/update_ratio": _ratio(totals),
            "train/nonfinite": totals[NONFINITE],
        }
        for name, column in layers.items():
            values[f"gradient_norm/{name}"] = math.sqrt(column[GRADIENT])
            values[f"weight_norm/{name}"] = math.sqrt(column[WEIGHT])
            values[f"update_ratio/{name}"] = _ratio(column)
            if column[NONFINITE]:  # a chart for a layer only if there is something to see
                values[f"nonfinite/{name}"] = column[NONFINITE]
        return values

    def _of_halves(self, read: Reading) -> dict[str, float]:
        """The gradient noise scale, from running means of the two quantities that it is the ratio of."""
        big, small = read.scalars["examples"], read.scalars["half_examples"]
        if small < 1:
            return {}
        of_big, of_small = sum(column[GRADIENT] for column in read.layers.values()), read.scalars["half_squares"]
        squared_norm = (big * of_big - small * of_small) / (big - small)
        variance = (of_small - of_big) / (1 / small - 1 / big)
        if not math.isfinite(squared_norm + variance):
            return {}
        old = self.noise or [squared_norm, variance]
        self.noise = [
            NOISE_DECAY * mean + (1 - NOISE_DECAY) * new
            for mean, new in zip(old, (squared_norm, variance), strict=True)
        ]
        norm, noise = self.noise
        return {"train/noise_scale": noise / norm} if norm > 0 else {}


def tag_of(tag: str, name: str, optimizers: Mapping[str, Any]) -> str:
    """A tag, with the name of the optimizer if there are several."""
    return f"{tag}/{name}" if len(optimizers) > 1 else tag


def _ratio(column: np.ndarray) -> float:
    """The norm of the change divided by that of the weights; 0 / 0 is 0, since nothing has changed."""
    change, weight = float(column[CHANGE]), float(column[WEIGHT])  # which say nothing of infinities
    if change == 0:
        return 0.0
    return math.sqrt(change / weight) if weight else math.inf

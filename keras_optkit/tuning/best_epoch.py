"""What a search looks at while a model is trained: the objective, and whether the loss is still finite."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.errors import FailedTrialError, FatalTypeError, FatalValueError

from keras_optkit import arguments


def names_of(objective: keras_tuner.Objective) -> list[str]:
    """The metrics that an objective is made of: several, where an oracle has several objectives."""
    return list(getattr(objective, "name_to_direction", [objective.name]))


def worst_of(objective: keras_tuner.Objective) -> dict[str, float]:
    """The worst value of each metric that an objective is made of."""
    directions = getattr(objective, "name_to_direction", {}) | {objective.name: objective.direction}
    return {name: -math.inf if direction == "max" else math.inf for name, direction in directions.items()}


def forget_frames(error: BaseException | None) -> None:
    """Lets go of what an error refers to through its traceback: the model, which may be what filled the memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def numbers_of(logs: Mapping[str, Any] | None) -> dict[str, float]:
    """What is one number in the logs of an epoch; callbacks may put anything else into them."""
    found = {}
    for name, value in (logs or {}).items():
        array = np.asarray(value)
        if array.size == 1 and array.dtype.kind in "biuf":
            found[name] = float(array.item())
    return found


class BestEpoch(keras.callbacks.Callback):
    """Keeps the model of the best epoch, and ends the run when the loss or the objective is no longer finite.

    An epoch whose logs do not have the objective is skipped, e.g. one without validation (`validation_freq`).

    Args:
        objective: What is best.
        save: Keeps the model.
        to_beat: The model is kept only when it is better than this, too.
        max_size: The most elements that the weights may have.

    Attributes:
        history: Each epoch, counted from 1, and its metrics.
        patient: Whether the objective may be missing although there was a validation, since a callback may be the one
            that puts it into the logs.
    """

    stateless = True  # for `Resume`: the search keeps what is known of a run that is paused

    def __init__(
        self,
        objective: keras_tuner.Objective,
        save: Callable[[keras.Model], Any],
        to_beat: float | None,
        max_size: int | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.save = save
        self.to_beat = to_beat
        self.max_size = max_size
        self.patient = False
        self.epochs = 0
        self.history: list[tuple[int, dict[str, float]]] = []
        self.best_epoch: int | None = None
        self.metrics: dict[str, float] = {}
        self.failure = ""
        self._seen: dict[str, None] = {}  # names, in order

    @property
    def score(self) -> float | None:
        """The best value of the objective so far."""
        return self.metrics.get(self.objective.name)

    def check_size(self, model: keras.Model) -> None:
        """Raises if a model that is built is too large.

        Raises:
            keras_tuner.errors.FailedTrialError: With its size.
        """
        if self.max_size is None or not model.built:
            return
        size = sum(math.prod(weight.shape) for weight in model.weights)
        if size > self.max_size:
            raise FailedTrialError(f"The model has {size} elements, more than max_model_size={self.max_size}.")

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002  (Keras's interface)
        """Looks at the size of a model that `fit` has built."""
        self.check_size(self.model)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Looks at the epoch's metrics."""
        self.epochs += 1
        self.check_size(self.model)  # again: its first batch may have built it
        metrics = numbers_of(logs)
        self.history.append((epoch + 1, dict(metrics)))
        self._seen.update(dict.fromkeys(metrics))
        wanted = names_of(self.objective)
        for watched in ("loss", "val_loss", *wanted):
            if not math.isfinite(metrics.get(watched, 0.0)):
                self.failure = f"{watched} is {metrics[watched]} in epoch {epoch + 1}."
                self.model.stop_training = True
                return
        missing = [name for name in wanted if name not in metrics]
        for name in missing:
            if (logs or {}).get(name) is not None:
                raise FatalTypeError(f"objective {name!r} must be one number, got {logs[name]!r} in the logs.")  # type: ignore[index]
        if missing:
            validated = any(name.startswith("val_") for name in metrics)
            if not self.patient and (validated or not missing[0].startswith("val_")):
                raise FatalValueError(self.missing())
            return
        metrics[self.objective.name] = score = float(self.objective.get_value(metrics))
        if self.score is None or self.objective.better_than(score, self.score):
            self.metrics, self.best_epoch = metrics, epoch + 1
            if self.to_beat is None or self.objective.better_than(score, self.to_beat):
                self.save(self.model)

    def get_state(self) -> dict[str, Any]:
        """What a run that is paused is continued with, as JSON holds it."""
        return {"history": self.history, "metrics": self.metrics, "best_epoch": self.best_epoch}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues a run."""
        self.history = [(epoch, dict(metrics)) for epoch, metrics in state["history"]]
        self.epochs = len(self.history)
        self.metrics, self.best_epoch = dict(state["metrics"]), state["best_epoch"]
        self._seen = {name: None for _, metrics in self.history for name in metrics}

    def missing(self) -> str:
        """What to say where no epoch had the objective, with the names that there were."""
        names = names_of(self.objective)
        name = next((name for name in names if name not in self._seen), names[0])
        known = ", ".join(map(repr, self._seen))
        return f"objective must be a metric of the training ({known}), got {name!r}.{arguments.near(name, self._seen)}"


def take(returned: Any, watch: BestEpoch, others_have_it: bool) -> None:
    """Raises if a run has no score; a `fit` of the hypermodel's own may return one, or metrics.

    Args:
        returned: What `fit` has returned.
        watch: What has watched it.
        others_have_it: Whether another trial had the objective.
    """
    if not watch.epochs and isinstance(returned, int | float | np.floating | dict):
        watch.on_epoch_end(0, returned if isinstance(returned, dict) else {watch.objective.name: returned})
    if watch.failure or not watch.epochs:
        raise FailedTrialError(watch.failure or "No epoch was finished.")
    if watch.best_epoch is None:
        if getattr(watch.model, "stop_training", False) or others_have_it:  # a later epoch may have it
            raise FailedTrialError(f"No epoch had the objective: {watch.missing()}")
        raise FatalValueError(watch.missing())

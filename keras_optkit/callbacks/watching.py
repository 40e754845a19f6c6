"""The value in the logs that a callback goes by: whether it is there, smoothed, and which of two is the better one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks import others
from keras_optkit.direction import by_name
from keras_optkit.fit.run import Run, running_fit

MODES = ("auto", "min", "max")


def checked_monitor(monitor: Any) -> str:
    """Returns the argument `monitor` if it is a name."""
    if not isinstance(monitor, str):
        raise TypeError(f"monitor must be the name of a value in the logs, got {monitor!r}.")
    return monitor


def direction(model: Any, monitor: str) -> str:
    """Whether the monitored value should go down ("min") or up ("max").

    Keras knows for its losses and metrics, and is asked by showing its own EarlyStopping two epochs. For other names
    the words in them decide.
    """
    asked = keras.callbacks.EarlyStopping(monitor, patience=2, mode="auto")
    asked.set_model(model)
    asked.on_train_begin()
    try:
        for epoch, value in enumerate((1.0, 0.0)):
            asked.on_epoch_end(epoch, {monitor: value})
        return "min" if asked.best == 0 else "max"
    except ValueError:
        found = by_name(monitor)
        if found is None:
            raise ValueError(
                f"mode='auto' cannot tell whether monitor={monitor!r} should go down or up. Pass mode='min' or 'max'."
            ) from None
        return found


def _validates(fit: Run) -> bool:
    own = fit.arguments.get("validation_data") is not None or bool(fit.arguments.get("validation_split"))
    return own or any(getattr(callback, "validates", False) for callback in fit.listed())


class Watched:
    """A monitored value, for the time of one `fit`.

    It need not be in the logs of every epoch: a validation may take place in every second one, and a callback may add a
    score of its own when it has one. Epochs without it are skipped. A name that no epoch can have is an error as early
    as that is known: when training begins, if it is one of a validation and there is none; after the first epoch that
    could have had it; or, where a callback might add it, with a warning then and an error when training ends.

    Args:
        model: The model that is trained.
        monitor: Name in the logs.
        mode: `"min"`, `"max"` or `"auto"`, which is resolved when the first value comes.
        min_delta: A change that is not larger than this does not count as an improvement.

    Attributes:
        seen: Whether there has been a value.
    """

    def __init__(self, model: Any, monitor: str, mode: str, min_delta: float = 0.0):
        self._model, self._monitor, self._min_delta = model, monitor, min_delta
        self.mode = mode
        self.seen = False
        self._names: set[str] = set()
        self._missed = 0  # epochs that could have had a value
        self._awaited = 0  # and those without validation
        self._last: Mapping[str, Any] = {}

    def begin_training(self) -> None:
        """Called when training begins.

        Raises:
            ValueError: If it is known already that there will be no such value.
        """
        fit = running_fit(self._model)
        if fit is None or others.may_log(self._model, fit):
            return
        if self._lacks_validation(fit) and others.logs_metrics(self._model):
            raise self._unknown([])

    def begin_epoch(self) -> None:
        """Called when an epoch begins, and when training ends.

        Raises:
            ValueError: If the value was added to the logs of the last epoch when it had been looked for already.
        """
        last, self._last = self._last, {}
        if last.get(self._monitor) is not None:
            raise ValueError(
                f"monitor={self._monitor!r} is added to the logs by a callback that comes later in the list of "
                "callbacks. Put that callback first."
            )

    def value(self, logs: Mapping[str, Any] | None) -> float | None:
        """The value at the end of an epoch; None if this epoch has none but another one may.

        Raises:
            ValueError: If no epoch can have it, with the names that there are, or if it is not one number.
        """
        logs = {} if logs is None else logs
        self._names.update(logs)
        if logs.get(self._monitor) is None:
            self._pass_over(logs)
            return None
        self.seen = True
        if self.mode == "auto":
            self.mode = direction(self._model, self._monitor)
        value = np.asarray(logs[self._monitor])
        if value.size != 1 or value.dtype.kind not in "biuf":
            what = f"of shape {value.shape}" if value.size != 1 else repr(logs[self._monitor])
            raise ValueError(f"monitor={self._monitor!r} must be one number, got one {what}.")
        return float(value.item())

    def _pass_over(self, logs: Mapping[str, Any]) -> None:
        """Raises, or warns, unless another epoch may well have the value."""
        self._last = logs
        fit = running_fit(self._model)
        of_validation = self._monitor.startswith("val_")
        if of_validation and (fit is None or _validates(fit)) and not any(name.startswith("val_") for name in logs):
            self._awaited += 1
            return
        self._missed += 1
        if self.seen or self._missed > 1 or self._monitor in logs:
            return
        error = self._unknown(self._names)
        if fit is not None and not others.may_log(self._model, fit):
            raise error
        warnings.warn(f"{error} Epochs are skipped until a callback adds it to the logs.", stacklevel=4)

    def end_training(self) -> None:
        """Called when training has come to its end.

        Raises:
            ValueError: If no epoch had the value.

        Warns:
            UserWarning: If none could have had it.
        """
        self.begin_epoch()
        if self.seen or self._model.stop_training:
            return
        if self._missed:
            raise self._unknown(self._names)
        if self._awaited:
            warnings.warn(
                f"There was no value of monitor={self._monitor!r}, since no epoch had a validation.", stacklevel=4
            )

    def _lacks_validation(self, fit: Run) -> bool:
        return self._monitor.startswith("val_") and not _validates(fit)

    def _unknown(self, names: Collection[str]) -> ValueError:
        fit = running_fit(self._model)
        without = fit is not None and self._lacks_validation(fit)
        hint = " fit was given no validation data, so that no name begins with 'val_'."
        listed = ", " + ", ".join(map(repr, sorted(names))) if names else ""
        return ValueError(
            f"monitor must be one of the names in the logs{listed}, got {self._monitor!r}."
            f"{hint if without else arguments.near(self._monitor, names)}"
        )

    def is_usable(self, value: float) -> bool:
        """Whether it is neither NaN nor infinite in the wrong direction."""
        return not math.isnan(value) and value != (math.inf if self.mode == "min" else -math.inf)

    def improves(self, value: float, reference: float | None) -> bool:
        """Whether it is better than another value; any value is that is usable, if the other is None."""
        if not self.is_usable(value):
            return False
        return reference is None or self._is_beyond(value, reference, self._min_delta, down=self.mode == "min")

    def is_worse(self, value: float, reference: float, by: float) -> bool:
        """Whether it is worse than another value by more than `by`."""
        return self._is_beyond(value, reference, by, down=self.mode == "max")

    @staticmethod
    def _is_beyond(value: float, reference: float, by: float, *, down: bool) -> bool:
        return value + by < reference if down else value - by > reference


class Smoothed:
    """An exponential average without bias."""

    def __init__(self, decay: float):
        self.decay, self.sum, self.weight = decay, 0.0, 0.0

    def add(self, value: float, count: int) -> float:
        """Adds a value that stands for `count` of them, and returns the average."""
        kept = self.decay**count
        self.sum = kept * self.sum + (1 - kept) * value
        self.weight = kept * self.weight + (1 - kept)
        return self.sum / self.weight

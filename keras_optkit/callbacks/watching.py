"""The value in the logs that a callback goes by: whether it is there, and which of two is the better one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks.callback import running_fit

_DOWN = {"loss", "error", "mse", "mae", "rmse"}
_UP = {"acc", "accuracy", "auc", "precision", "recall", "f1", "iou", "r2"}

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
        words = set(re.split(r"[^a-z0-9]+", monitor.lower()))
        if bool(words & _DOWN) == bool(words & _UP):
            raise ValueError(
                f"mode='auto' cannot tell whether monitor={monitor!r} should go down or up. Pass mode='min' or 'max'."
            ) from None
        return "min" if words & _DOWN else "max"


class Watched:
    """A monitored value, for the time of one `fit`.

    Args:
        model: The model that is trained.
        monitor: Name in the logs.
        mode: `"min"`, `"max"` or `"auto"`, which is made out when the first value comes.
        min_delta: A change that is not larger than this is no improvement.
    """

    def __init__(self, model: Any, monitor: str, mode: str, min_delta: float = 0.0):
        self._model, self._monitor, self._min_delta = model, monitor, min_delta
        self.mode = mode

    def value(self, logs: Mapping[str, Any] | None) -> float | None:
        """The value at the end of an epoch; None if that had no validation but another one may.

        Raises:
            ValueError: If there is no such value, with the names that there are, or if it is no number.
        """
        logs = logs or {}
        if self._monitor not in logs:
            self._refuse_unless_passed_over(logs)
            return None
        if self.mode == "auto":
            self.mode = direction(self._model, self._monitor)
        value = np.asarray(logs[self._monitor])
        if value.size != 1:
            raise ValueError(f"monitor={self._monitor!r} must be one number, got one of shape {value.shape}.")
        return float(value.item())

    def _refuse_unless_passed_over(self, logs: Mapping[str, Any]) -> None:
        """Raises, unless the value is one of a validation that did not take place in this epoch but may in another."""
        fit = running_fit(self._model)
        validates = (
            fit is None or fit.arguments.get("validation_data") is not None or fit.arguments.get("validation_split")
        )
        validated = any(name.startswith("val_") for name in logs)
        of_validation = self._monitor.startswith("val_")
        if of_validation and validates and not validated:
            return
        hint = " fit was given no validation data, so that no name begins with 'val_'."
        raise ValueError(
            f"monitor must be one of the names in the logs, {', '.join(map(repr, sorted(logs)))}, "
            f"got {self._monitor!r}.{hint if of_validation and not validates else arguments.near(self._monitor, logs)}"
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

"""Stopping training when the model no longer gets better."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, running_fit
from keras_optkit.registry import register

_DOWN = {"loss", "error", "mse", "mae", "rmse"}
_UP = {"acc", "accuracy", "auc", "precision", "recall", "f1", "iou", "r2"}


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


@register(
    "callback",
    paper="Prechelt 1998, Early stopping, but when?, criterion UP",
    parity="keras.callbacks.EarlyStopping, where every value is finite",
    cases=({"monitor": "loss"}, {"monitor": "val_loss", "patience": 1, "restore_best_weights": True}),
)
class EarlyStopping(Callback):
    """Stops training when a monitored value has not improved for `patience` epochs in a row.

    ```text
    improved:  value < best - min_delta   (mode "min")        value > best + min_delta   (mode "max")
    stop when `patience` epochs in a row have not improved; the first epoch never stops
    ```

    It takes the arguments of `keras.callbacks.EarlyStopping` and decides alike where every value is finite. Beyond it:

    - NaN is never the best and counts as an epoch without improvement, and so does infinity in the wrong direction.
    - A `monitor` that does not exist raises at the end of the first epoch that could have it, with the names that do.
      Epochs without the monitored value because of `validation_freq` are passed over: they neither count nor stop.
    - With `restore_best_weights` the model has the best weights after every `fit`: stopped early, run to its last
      epoch, or left by an exception or Ctrl-C. They are a copy, with non-trainable ones (BatchNormalization's moving
      statistics) as they were at the end of that epoch; the state of the optimizer is not restored. With an optimizer
      that averages weights (`use_ema=True`) the weights that were measured are restored, not the average.

    `mode="auto"` asks Keras, which knows its own losses and metrics; for another name its words decide ("loss",
    "error", "mse", "mae", "rmse" go down, "acc", "accuracy", "auc", "precision", "recall", "f1", "iou", "r2" up), and
    where they do not, it raises.

    When not to use it: with a schedule that ends at a fixed step, whose best weights come last.

    Args:
        monitor: Name in the logs, e.g. `"val_loss"` or `"val_accuracy"`.
        min_delta: A change that is not larger than this is no improvement; >= 0.
        patience: Epochs without improvement after which training stops; 0 and 1 both stop at the first.
        verbose: 1 prints what happened, 0 is silent.
        mode: `"min"`, `"max"` or `"auto"`.
        baseline: The wait only starts anew with values better than this; None for none.
        restore_best_weights: Whether the model ends with the weights of the best epoch.
        start_from_epoch: Epochs before this number, counted from 0, are not looked at.

    Attributes:
        best: The best value, or None.
        best_epoch: Its epoch, counted from 0, or None.
        stopped_epoch: The epoch at whose end training was stopped, or 0.
        stop_reason: Why training ended, in words, epochs counted from 1 as in the progress bar; None while it runs.
        wait: Epochs without improvement, up to now.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; while training, for an unknown monitor.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    stopping = ok.callbacks.EarlyStopping("loss", patience=2, min_delta=0.01, restore_best_weights=True)
    model.fit(x, x[:, :1], epochs=50, callbacks=[stopping], verbose=0)
    print(stopping.best, stopping.best_epoch, stopping.stop_reason)
    ```
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ):
        super().__init__()
        if not isinstance(monitor, str):
            raise TypeError(f"monitor must be the name of a value in the logs, got {monitor!r}.")
        self.monitor = monitor
        self.min_delta = arguments.real("min_delta", min_delta, 0)
        self.patience = arguments.integer("patience", patience, 0)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self.mode = arguments.choice("mode", mode, ("auto", "min", "max"))
        self.baseline = arguments.real("baseline", baseline, optional=True)
        self.restore_best_weights = arguments.boolean("restore_best_weights", restore_best_weights)
        self.start_from_epoch = arguments.integer("start_from_epoch", start_from_epoch, 0)
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch = 0
        self.stop_reason: str | None = None
        self.wait = 0
        self._best_weights: list[np.ndarray] | None = None
        self._direction: str | None = None
        self._training = False

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._reset()
        self._training = True

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        logs = logs or {}
        if self.monitor not in logs:
            self._refuse_unless_passed_over(logs)
            return
        if self._direction is None:
            self._direction = direction(self.model, self.monitor) if self.mode == "auto" else self.mode
        if epoch < self.start_from_epoch:
            return
        value = np.asarray(logs[self.monitor])
        if value.size != 1:
            raise ValueError(f"monitor={self.monitor!r} must be one number, got one of shape {value.shape}.")
        self._look_at(epoch, value.item())

    def _refuse_unless_passed_over(self, logs: Mapping[str, Any]) -> None:
        """Raises, unless the value is one of a validation that did not take place in this epoch but may in another."""
        fit = running_fit(self.model)
        validates = (
            fit is None or fit.arguments.get("validation_data") is not None or fit.arguments.get("validation_split")
        )
        validated = any(name.startswith("val_") for name in logs)
        if self.monitor.startswith("val_") and validates and not validated:
            return
        without = "" if validates else " fit was given no validation data, so that no name begins with 'val_'."
        raise ValueError(
            f"monitor must be one of the names in the logs, {', '.join(map(repr, sorted(logs)))}, "
            f"got {self.monitor!r}.{without or arguments.near(self.monitor, logs)}"
        )

    def _look_at(self, epoch: int, value: float) -> None:
        self.wait += 1
        if self._improves(value, self.best):
            self.best, self.best_epoch = value, epoch
            if self.restore_best_weights:
                # copies: what the backend hands out may be the memory of the variable itself
                self._best_weights = [np.array(weight) for weight in self.model.get_weights()]
            if self.baseline is None or self._improves(value, self.baseline):
                self.wait = 0
        elif self.wait >= self.patience and epoch > 0:
            self.stopped_epoch = epoch
            past = "was never finite" if self.best is None else f"was {self.best:g} in {self._best_epoch_in_words()}"
            self.stop_reason = f"{self.monitor} {past} and has not improved for {self.wait} epochs."
            self.model.stop_training = True

    def _best_epoch_in_words(self) -> str:
        return "no epoch" if self.best_epoch is None else f"epoch {self.best_epoch + 1}"

    def _improves(self, value: float, reference: float | None) -> bool:
        down = self._direction == "min"
        if math.isnan(value) or value == (math.inf if down else -math.inf):
            return False
        if reference is None:
            return True
        return value + self.min_delta < reference if down else value - self.min_delta > reference

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end("Training was stopped by something else." if self.model.stop_training else "The last epoch is over.")

    def on_train_failure(self, error: BaseException) -> None:  # noqa: D102
        self._end(f"{type(error).__name__}: {error}")

    def _end(self, reason: str) -> None:
        if not self._training:
            return
        self._training = False
        self.stop_reason = self.stop_reason or reason
        message = f"{type(self).__name__}: {self.stop_reason}"
        if self._best_weights is not None:
            self.model.set_weights(self._best_weights)
            self._best_weights = None
            message += f" The weights of {self._best_epoch_in_words()} are restored."
        if self.verbose:
            print(message)

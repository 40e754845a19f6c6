"""Stopping training when the model no longer gets better, is good enough, or diverges."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks import bundle
from keras_optkit.callbacks.callback import Callback
from keras_optkit.callbacks.watching import MODES, Smoothed, Watched, checked_monitor
from keras_optkit.registry import register


@register(
    "callback",
    paper="Prechelt 1998, Early stopping, but when?, criterion UP",
    parity="keras.callbacks.EarlyStopping, where every value is finite",
    cases=({"monitor": "loss"}, {"monitor": "val_loss", "patience": 1, "restore_best_weights": True, "smoothing": 0.5}),
)
class EarlyStopping(Callback):
    """Stops training when a monitored value has not improved for `patience` epochs in a row.

    ```text
                mode "min"                       mode "max"
    improved:   value < best - min_delta         value > best + min_delta
    reached:    value <= target                  value >= target
    diverged:   value > best + divergence        value < best - divergence        or not finite

    stop when the target is reached, or when `divergence_patience` epochs in a row have diverged, or when `patience`
    epochs in a row have not improved, with which the first value never stops
    ```

    It takes the arguments of `keras.callbacks.EarlyStopping` and decides the same as long as all values are finite. In
    addition:

    - NaN is never the best and counts as an epoch without improvement, and so does infinity in the wrong direction.
    - Epochs without the monitored value are skipped: they neither count nor stop. The value may come from a validation
      in every second epoch (`validation_freq`), or from a callback that adds it to `logs` in its `on_epoch_end`; that
      callback has to come earlier in the list.
    - A `monitor` that no epoch can have raises, with the names that exist: before training, if it begins with "val_"
      and `fit` has no validation data; at the end of the first epoch that could have it; or, if one of your own
      callbacks might add it to `logs`, when `fit` ends, with a warning after that first epoch.
    - With `restore_best_weights` the model has the best weights after every `fit`: stopped early, run to its last
      epoch, or left by an exception or Ctrl-C. They are a copy, with non-trainable ones (BatchNormalization's moving
      statistics) as they were at the end of that epoch; the state of the optimizer is not restored. With an optimizer
      that averages weights (`use_ema=True`) the weights that were measured are restored, not the average. They are
      kept in memory or, with a path, in a file, which is always whole and stays after `fit`.
    - `target` and `divergence` end a run that is good enough, or that diverges.
    - With `smoothing` β it goes by an average of the values v, `s ← β s + (1 - β) v`, `value = s / (1 - β^t)`, over
      about 1 / (1 - β) of them, so that one lucky epoch neither is the best nor ends the wait. What is not finite is
      left out of it.
    - With `keras_optkit.callbacks.Resume` it continues after an interruption as if there had been none.

    `mode="auto"` asks Keras, which knows its own losses and metrics; for another name its words decide ("loss",
    "error", "mse", "mae", "rmse" go down, "acc", "accuracy", "auc", "precision", "recall", "f1", "iou", "r2" up), and
    where they do not, it raises.

    When not to use it: with a schedule that ends at a fixed step, whose best weights come last.

    Args:
        monitor: Name in the logs, e.g. `"val_loss"` or `"val_accuracy"`.
        min_delta: A change that is not larger than this does not count as an improvement; >= 0.
        patience: Epochs without improvement after which training stops; 0 and 1 both stop at the first.
        verbose: 1 prints what happened, 0 is silent.
        mode: `"min"`, `"max"` or `"auto"`.
        baseline: Only values better than this restart the wait; None for none.
        restore_best_weights: Whether the model ends with the weights of the best epoch. A path of a file, whose
            directory is made where there is none, keeps them there instead of in memory; `numpy.load` reads it.
        start_from_epoch: Epochs before this one, counted from 0, are ignored.
        target: Training stops when the value is as good as this; None for none.
        divergence: A difference > 0 to the best value; an epoch that is worse by more has diverged, and so has one
            whose value is NaN or infinite in the wrong direction. With a very large number it is these alone. None:
            nothing is taken as diverged.
        divergence_patience: Epochs in a row that have to diverge, at least 1.
        smoothing: In [0, 1): β, the decay of the average that it goes by; 0 for the values themselves.

    Attributes:
        best: The best value, or None; with `smoothing` the best average.
        best_epoch: Its epoch, counted from 0, or None.
        stopped_epoch: The epoch at whose end training was stopped, or 0; `stop_reason` says whether it was.
        stop_reason: Why training ended, in words, epochs counted from 1 as in the progress bar; None while it runs.
        wait: Epochs without improvement, up to now.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; before, while or after training, for an unknown monitor.
        OSError: While training, if the best weights cannot be written; the file has those of before then.

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
        restore_best_weights: bool | str | os.PathLike[str] = False,
        start_from_epoch: int = 0,
        target: float | None = None,
        divergence: float | None = None,
        divergence_patience: int = 1,
        smoothing: float = 0.0,
    ):
        super().__init__()
        self.monitor = checked_monitor(monitor)
        self.min_delta = arguments.real("min_delta", min_delta, 0)
        self.patience = arguments.integer("patience", patience, 0)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self.mode = arguments.choice("mode", mode, MODES)
        self.baseline = arguments.real("baseline", baseline, optional=True)
        self.restore_best_weights = _flag_or_path(restore_best_weights)
        self.start_from_epoch = arguments.integer("start_from_epoch", start_from_epoch, 0)
        self.target = arguments.real("target", target, optional=True)
        self.divergence = arguments.real("divergence", divergence, 0, closed="neither", optional=True)
        self.divergence_patience = arguments.integer("divergence_patience", divergence_patience, 1)
        self.smoothing = arguments.real("smoothing", smoothing, 0, 1, closed="left")
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.stopped_epoch = 0
        self.stop_reason: str | None = None
        self.wait = 0
        self._diverged_for = 0
        self._smoothed = Smoothed(self.smoothing)
        self._best_weights = _best_weights(self.restore_best_weights)
        self._watched: Watched | None = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._reset()
        self._watched = Watched(self.model, self.monitor, self.mode, self.min_delta)
        self._watched.begin_training()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        assert self._watched is not None
        self._watched.begin_epoch()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: D102
        assert self._watched is not None
        value = self._watched.value(logs)
        if value is not None and epoch >= self.start_from_epoch:
            reason = self._look_at(self._watched, epoch, value)
            if reason is not None:
                self.stopped_epoch, self.stop_reason = epoch, reason
                self.model.stop_training = True

    def _look_at(self, watched: Watched, epoch: int, value: float) -> str | None:
        """Takes notice of a value, and returns why training is to stop, if it is."""
        self.wait += 1
        if self.smoothing and math.isfinite(value):
            value = self._smoothed.add(value, 1)
        improved = watched.improves(value, self.best)
        diverged = self._diverges(watched, value)
        self._diverged_for = self._diverged_for + 1 if diverged else 0
        if improved:
            if self._best_weights is not None:
                self._best_weights.keep(self.model.get_weights())
            self.best, self.best_epoch = value, epoch
            if self.baseline is None or watched.improves(value, self.baseline):
                self.wait = 0
        if self.target is not None and watched.is_usable(value) and not watched.is_worse(value, self.target, 0.0):
            return f"{self._what()} was {value:g} in epoch {epoch + 1} and has reached the target {self.target:g}."
        if diverged and self._diverged_for >= self.divergence_patience:
            return f"{self._what()} has diverged: it was {value:g} in epoch {epoch + 1}, and {self._best_in_words()}."
        first = self.best is None and self.wait == 1
        if not improved and self.wait >= self.patience and not first:
            return f"{self._what()} {self._best_in_words()} and has not improved for {self.wait} epochs."
        return None

    def _diverges(self, watched: Watched, value: float) -> bool:
        if self.divergence is None:
            return False
        if not watched.is_usable(value):
            return True
        return self.best is not None and watched.is_worse(value, self.best, self.divergence)

    def _what(self) -> str:
        return f"The average of {self.monitor}" if self.smoothing else self.monitor

    def _best_in_words(self) -> str:
        return "was never finite" if self.best is None else f"was {self.best:g} in {self._best_epoch_in_words()}"

    def _best_epoch_in_words(self) -> str:
        return "no epoch" if self.best_epoch is None else f"epoch {self.best_epoch + 1}"

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if self._watched is not None:
            self._watched.end_training()
        self._end("Training was stopped by something else." if self.model.stop_training else "The last epoch is over.")

    def on_train_failure(self, error: BaseException) -> None:  # noqa: D102
        self._end(f"{type(error).__name__}: {error}")

    def _end(self, reason: str) -> None:
        if self._watched is None:
            return
        self._watched = None
        self.stop_reason = self.stop_reason or reason
        message = f"{type(self).__name__}: {self.stop_reason}"
        weights, self._best_weights = self._kept(), None
        if weights is not None:
            self.model.set_weights(weights)
            message += f" The weights of {self._best_epoch_in_words()} are restored."
        if self.verbose:
            print(message)

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far, with the best weights."""
        seen = self._watched is not None and self._watched.seen
        return {
            **{name: getattr(self, name) for name in _STATE},
            **{"smoothed": vars(self._smoothed), "best_weights": self._kept(), "seen": seen},
        }

    def _kept(self) -> list[np.ndarray] | None:
        return None if self._best_weights is None or self.best_epoch is None else self._best_weights.get()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from there; a file with the best weights is written again.

        Args:
            state: What `state_dict` returned.
        """
        for name in _STATE:
            setattr(self, name, state[name])
        vars(self._smoothed).update(state["smoothed"])
        if self._watched is not None:
            self._watched.seen = state["seen"]
        if state["best_weights"] is not None and self._best_weights is not None:
            self._best_weights.keep(state["best_weights"])


_STATE = ("best", "best_epoch", "stopped_epoch", "stop_reason", "wait", "_diverged_for")


class _BestWeights(Protocol):
    """Where the weights of the best epoch are."""

    def keep(self, weights: list[Any]) -> None:
        """Takes a copy."""

    def get(self) -> list[np.ndarray]:
        """What was kept last."""


class _InMemory:
    def keep(self, weights: list[Any]) -> None:
        # copies: what the backend hands out may be the memory of the variable itself
        self._weights = [np.array(weight) for weight in weights]

    def get(self) -> list[np.ndarray]:
        return self._weights


class _OnDisk:
    def __init__(self, path: str):
        self._path = Path(path)

    def keep(self, weights: list[Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        bundle.write(self._path, bundle.pack({"weights": [np.asarray(weight) for weight in weights]}))

    def get(self) -> list[np.ndarray]:
        return bundle.read(self._path)["weights"]


def _best_weights(where: bool | str) -> _BestWeights | None:
    if isinstance(where, bool):
        return _InMemory() if where else None
    return _OnDisk(where)


def _flag_or_path(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str | os.PathLike):
        raise TypeError(
            f"restore_best_weights must be True, False or the path of a file, got {value!r} of type "
            f"{type(value).__name__}."
        )
    return arguments.path("restore_best_weights", value)

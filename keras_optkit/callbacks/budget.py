"""Stopping training when its time is up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback
from keras_optkit.registry import register


@register(
    "callback",
    paper="Wall-clock time by a monotonic clock",
    cases=({"budget": 3600}, {"budget": 0, "stop_after": "epoch"}),
)
class TimeBudget(Callback):
    """Stops training when its time is up.

    The time runs from the first epoch of `fit` on, validation and other callbacks included, by a monotonic clock. Each
    `fit` has the whole budget; time that was used before an interruption counts in a `fit` that
    `keras_optkit.callbacks.Resume` continues, up to the moment that it continues from.

    With `stop_after="batch"` training ends, in the middle of an epoch, with the first batch that begins after the
    budget has run out; with `steps_per_execution=k` that is k batches. What `fit` does at the end of an epoch, such as
    validation, comes on top, so leave time for it. No batch waits for the clock: the device may still be working on
    earlier batches.

    With `stop_after="epoch"` training ends with the last epoch that fits: after an epoch, if the longest one so far
    would not fit into what is left. The first epoch always runs to its end, however long it takes.

    When not to use it: with a schedule that has to reach its end; make that shorter instead.

    Args:
        budget: Seconds, at least 0, or a `datetime.timedelta`.
        stop_after: `"batch"` or `"epoch"`, as above.
        verbose: 1 prints that training was stopped, 0 is silent.

    Attributes:
        budget: The budget in seconds.
        used: Seconds used so far.
        stop_reason: Why this callback has stopped training, in words; None if it has not.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    from datetime import timedelta

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    budget = ok.callbacks.TimeBudget(timedelta(hours=2), stop_after="epoch")
    model.fit(x, x[:, :1], epochs=2, callbacks=[budget], verbose=0)
    print(budget.used, budget.stop_reason)
    ```
    """

    def __init__(self, budget: float | timedelta, stop_after: str = "batch", verbose: int = 0):
        super().__init__()
        seconds = budget.total_seconds() if isinstance(budget, timedelta) else budget
        self.budget = arguments.real("budget", seconds, 0)
        self.stop_after = arguments.choice("stop_after", stop_after, ("batch", "epoch"))
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self._reset()

    def _reset(self) -> None:
        self.stop_reason: str | None = None
        self._before = 0.0  # what was used before the clock began to run
        self._running_since: float | None = None
        self._epoch_began = 0.0
        self._longest_epoch = 0.0

    @property
    def used(self) -> float:
        """Seconds used so far."""
        return self._before + (0.0 if self._running_since is None else time.monotonic() - self._running_since)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._reset()
        self._running_since = time.monotonic()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._epoch_began = self.used

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Looks at the clock; `on_train_batch_end` would make Keras wait for every step."""
        if self.stop_after == "batch" and self.stop_reason is None and self.used >= self.budget:
            self._stop(f"The {_words(self.budget)} of the time budget are used up.")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        used = self.used
        self._longest_epoch = max(self._longest_epoch, used - self._epoch_began)
        if self.stop_after == "epoch" and used + self._longest_epoch > self.budget:
            self._stop(
                f"{_words(used)} of the time budget of {_words(self.budget)} are used, and the longest epoch took "
                f"{_words(self._longest_epoch)}."
            )

    def _stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.model.stop_training = True
        if self.verbose:
            print(f"{type(self).__name__}: {reason}")

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._end()

    def _end(self) -> None:
        self._before, self._running_since = self.used, None

    def state_dict(self) -> dict[str, Any]:
        """The time used so far, and by which epoch."""
        times = {"used": self.used, "epoch_began": self._epoch_began, "longest_epoch": self._longest_epoch}
        return {"seconds": times | {"stop_reason": self.stop_reason}}  # which names durations

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts on from there.

        Args:
            state: What `state_dict` returned.
        """
        times = state["seconds"]
        self._before, self._running_since = times["used"], time.monotonic()
        self._epoch_began, self._longest_epoch = times["epoch_began"], times["longest_epoch"]
        self.stop_reason = times["stop_reason"]


def _words(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))

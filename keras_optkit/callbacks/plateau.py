"""Lowering the learning rate when the model no longer gets better."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.callbacks.watching import MODES, Smoothed, Watched, checked_monitor
from keras_optkit.fit.hooks import around
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import named_optimizers_of, paths_of, used_optimizers_of
from keras_optkit.registry import register


@register(
    "callback",
    paper="He et al., arXiv 1512.03385, section 3.4 (the rate is divided when the error plateaus)",
    parity="keras.callbacks.ReduceLROnPlateau, where every value is finite; torch.optim.lr_scheduler.ReduceLROnPlateau",
    cases=({"monitor": "loss", "patience": 3}, {"monitor": "loss", "patience": 3, "unit": "update", "factor": 0.5}),
)
class ReduceLROnPlateau(Callback):
    """Lowers the learning rate when a monitored value has not improved for `patience` epochs, or updates, in a row.

    ```text
    improved:  value < best - min_delta   (mode "min")        value > best + min_delta   (mode "max")
    η ← max(factor η, min_lr)   when `patience` in a row have not improved; then `cooldown` are ignored
    ```

    It takes the arguments of `keras.callbacks.ReduceLROnPlateau` and sets the same learning rates as long as all values
    are finite. In addition:

    - It works over any schedule with the optimizers of this package, whose rate is the schedule's times a multiplier:
      the multiplier is lowered, and the schedule continues. `min_lr` applies at the moment the rate is lowered.
    - NaN is never the best and does not count as an improvement, and neither does infinity in the wrong direction.
    - Epochs without the monitored value are skipped, and a `monitor` that no epoch can have raises, as with
      `EarlyStopping`.
    - It lowers the rates of all optimizers that update the model: the one it was compiled with, those that it holds as
      attributes, in lists or dicts, and those inside `keras.optimizers.MultiOptimizer`.
    - With `unit="update"` it counts updates of the weights instead of epochs and goes by the loss of the batches,

    ```text
    s ← smoothing^n s + (1 - smoothing^n) l,        value = s / (1 - smoothing^t)
    ```

    with l the mean loss over the examples since the last check, n the updates since then, usually 1, and t all updates.
    It checks after every batch that made an update, which makes `fit` wait for the step; with `steps_per_execution=k`
    after every k. What callbacks evaluate within an epoch is left out. Once a batch of an epoch had a loss that is not
    finite, Keras's sums do not give the losses of the rest of this epoch, and they are skipped.

    As with Keras's callback, the learning rate is added to the logs of the epoch, before it is lowered; with several
    optimizers it is one for each, `learning_rate_` and the name of the attribute that holds it:
    `learning_rate_d_optimizer`, `learning_rate_optimizers/0`. The parts of a `keras.optimizers.MultiOptimizer` are
    numbered. An optimizer that `compile()` made and that makes no update is left out.

    When not to use it: with `ScheduleHyperparameters` on the learning rate, which would be overwritten.

    Args:
        monitor: Name in the logs, e.g. `"val_loss"`; with `unit="update"` it must be `"loss"`.
        factor: Factor on the learning rate, in (0, 1).
        patience: Epochs (updates) without improvement after which the rate is lowered; 0 and 1 both act at the first.
        verbose: 1 prints when the rate is lowered, 0 is silent.
        mode: `"min"`, `"max"` or `"auto"`, as in `EarlyStopping`.
        min_delta: A change that is not larger than this does not count as an improvement; >= 0.
        cooldown: Epochs (updates) after a reduction in which those without improvement are not counted.
        min_lr: The rate is not lowered below this; >= 0.
        unit: `"epoch"` or `"update"`.
        smoothing: In [0, 1): decay per update of the average with `unit="update"`; it averages over about
            1 / (1 - smoothing) updates.

    Attributes:
        best: The best value, or None.
        wait: Epochs (updates) without improvement, up to now.
        cooldown_counter: Epochs (updates) left of the cooldown.

    Raises:
        TypeError: For a value of a wrong type; when training begins, for an optimizer of Keras with a schedule as its
            learning rate, which cannot be set.
        ValueError: For a value out of range; when training begins, for a model without optimizers; before, while or
            after training, for an unknown monitor, as with `EarlyStopping`.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=ok.optimizers.SGD(ok.schedules.Cosine(0.1, steps=40)), loss="mse")
    plateau = ok.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=2, min_delta=0.1)
    model.fit(x, x[:, :1], batch_size=16, epochs=8, callbacks=[plateau], verbose=0)
    print(model.optimizer.learning_rate)  # half of the schedule's, or a quarter
    ```
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
        unit: str = "epoch",
        smoothing: float = 0.98,
    ):
        super().__init__()
        self.monitor = checked_monitor(monitor)
        self.factor = arguments.real("factor", factor, 0, 1, closed="neither")
        self.patience = arguments.integer("patience", patience, 0)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self.mode = arguments.choice("mode", mode, MODES)
        self.min_delta = arguments.real("min_delta", min_delta, 0)
        self.cooldown = arguments.integer("cooldown", cooldown, 0)
        self.min_lr = arguments.real("min_lr", min_lr, 0)
        self.unit = arguments.choice("unit", unit, ("epoch", "update"))
        self.smoothing = arguments.real("smoothing", smoothing, 0, 1, closed="left")
        if unit == "update":
            if monitor != "loss":
                raise ValueError(f"monitor must be 'loss' with unit='update', got {monitor!r}.")
            # only here, since a callback that has it makes Keras wait for every step
            self.on_train_batch_end = self._on_train_batch_end
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.wait = 0
        self.cooldown_counter = 0
        self._smoothed = Smoothed(self.smoothing)
        self._losses: _Losses | None = None  # while training, by updates

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._detach_losses()
        optimizers = named_optimizers_of(self.model)
        if not optimizers:
            raise ValueError(
                f"ReduceLROnPlateau lowers the learning rates of the optimizers that a model was compiled with or "
                f"holds as attributes, and model {self.model.name!r} has none."
            )
        _settable(optimizers)  # which of them make updates is not known yet
        self._reset()
        by_update = self.unit == "update"
        self._watched = Watched(self.model, self.monitor, "min" if by_update else self.mode, self.min_delta)
        if by_update:
            self._losses = _Losses(self)
        else:
            self._watched.begin_training()
        self._seen_updates = self._updates()

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._watched.begin_epoch()
        if self._losses is not None:
            self._losses.begin_epoch()

    def _on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        assert self._losses is not None
        updates = self._updates()
        count, self._seen_updates = updates - self._seen_updates, updates
        if count < 0:  # since another optimizer of the model counts from now on
            count = 1
        loss = self._losses.mean_since() if count else None
        if loss is not None:
            self._look_at(self._smoothed.add(loss, count), count, f"update {updates}")

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:  # noqa: D102
        logs = {} if logs is None else logs
        for path, optimizer in self._optimizers().items():
            logs["learning_rate" + (path and f"_{path}")] = _rate(optimizer)
        if self.unit == "epoch":
            value = self._watched.value(logs)
            if value is not None:
                self._look_at(value, 1, f"epoch {epoch + 1}")

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._detach_losses()
        if self.unit == "epoch":
            self._watched.end_training()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._detach_losses()

    def _detach_losses(self) -> None:
        if self._losses is not None:
            self._losses.detach()
        self._losses = None

    def _look_at(self, value: float, count: int, when: str) -> None:
        if self.cooldown_counter:
            self.cooldown_counter = max(self.cooldown_counter - count, 0)
        if self._watched.improves(value, self.best):
            self.best, self.wait = value, 0
        elif not self.cooldown_counter:
            self.wait += count
            if self.wait >= self.patience and self._reduce(when):
                self.cooldown_counter, self.wait = self.cooldown, 0

    def _reduce(self, when: str) -> bool:
        """Lowers the rates; False if none is above `min_lr`."""
        optimizers = self._optimizers()
        above = {path: o for path, o in optimizers.items() if np.float32(_rate(o)) > np.float32(self.min_lr)}
        for path, optimizer in above.items():
            old = _rate(optimizer)
            optimizer.learning_rate = max(old * self.factor, self.min_lr)
            if self.verbose:
                whose = path and f" of {path}"
                print(f"{type(self).__name__}: {when}, learning rate{whose} {old:g} -> {_rate(optimizer):g}")
        return bool(above)

    def _optimizers(self) -> dict[str, Any]:
        """All that update weights of the model, by their paths."""
        return _settable(used_optimizers_of(self.model))

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far; the learning rate itself is in the state of the optimizer."""
        return {
            "best": self.best,
            "wait": self.wait,
            "cooldown_counter": self.cooldown_counter,
            "smoothed": vars(self._smoothed),
            "losses": None if self._losses is None else self._losses.state(),
            "updates": self._seen_updates,
            "seen": self._watched.seen,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Args:
            state: What `state_dict` returned.
        """
        self.best, self.wait, self.cooldown_counter = state["best"], state["wait"], state["cooldown_counter"]
        vars(self._smoothed).update(state["smoothed"])
        self._watched.seen = state["seen"]
        if self._losses is not None and state["losses"] is not None:
            self._losses.set_state(state["losses"])
        self._seen_updates = state["updates"]


class _Losses:
    """The losses of single batches, from the sums that Keras makes of them since an epoch began.

    What another callback evaluates in between goes into the same sums, which then begin at zero; so what has come
    together before is kept, and what is added meanwhile is left out.
    """

    #: The methods of a model that change the sums, besides the training step.
    _CHANGING = ("evaluate", "test_on_batch", "reset_metrics")

    def __init__(self, callback: Callback):
        self._callback = callback  # asked for its model, Keras on JAX fills the variables
        self._inside = False
        self._remove = [around(callback.model, name, self._left_out) for name in self._CHANGING]
        self.begin_epoch()

    def detach(self) -> None:
        """Ends it."""
        for remove in self._remove:
            remove()

    def begin_epoch(self) -> None:
        self._seen: list[float] | None = [0.0, 0.0]  # None: what the sums are when they are next looked at
        self._since = [0.0, 0.0]

    def state(self) -> list[list[float] | None]:
        """What `set_state` takes."""
        return [self._seen, self._since]

    def set_state(self, state: list[Any]) -> None:
        self._seen, self._since = state

    def mean_since(self) -> float | None:
        """The mean over the examples since it was last asked for; None if it is not finite."""
        self._take()
        (total, count), self._since = self._since, [0.0, 0.0]
        return total / count if count > 0 and math.isfinite(total) else None

    def _take(self) -> None:
        now = self._sums()
        seen = now if self._seen is None else self._seen
        self._since = [since + new - old for since, new, old in zip(self._since, now, seen, strict=True)]
        self._seen = now

    @contextlib.contextmanager
    def _left_out(self, *_: Any, **__: Any) -> Iterator[None]:
        outermost, self._inside = not self._inside, True
        if outermost:
            self._take()
        seen = None  # after an exception there may be nothing to look at
        try:
            yield
            seen = self._sums() if outermost else None
        finally:
            if outermost:
                self._inside, self._seen = False, seen

    def _sums(self) -> list[float]:
        model = self._callback.model
        trackers = [m for m in model.metrics if m.name == "loss" and isinstance(m, keras.metrics.Mean)]
        if not trackers:
            raise ValueError(
                f"unit='update' needs the metric 'loss' that Keras's train_step updates, and model {model.name!r} has "
                "none."
            )
        return [number(trackers[0].total), number(trackers[0].count)]


def _rate(optimizer: Any) -> float:
    return float(ops.convert_to_numpy(optimizer.learning_rate))


def _settable(optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that update weights, by their paths; a MultiOptimizer may have none before the model is built.

    Raises:
        TypeError: If the rate of one cannot be set.
    """
    found = {path: o for path, o in paths_of(optimizers).items() if not isinstance(o, keras.optimizers.MultiOptimizer)}
    for optimizer in found.values():
        if not isinstance(optimizer, Optimizer) and not isinstance(optimizer.learning_rate, keras.Variable):
            raise TypeError(
                f"ReduceLROnPlateau cannot lower the learning rate of this {type(optimizer).__name__}, which is a "
                "schedule. Make it with a number, or take keras_optkit.optimizers, whose rate can be set over any "
                "schedule."
            )
    return found

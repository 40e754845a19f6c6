"""Going back to a good state when the loss becomes NaN, infinite or far too large."""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.callbacks.guard.cause import Found, look_at, owner, refuse_what_is_not_finite
from keras_optkit.callbacks.guard.failure import Failure, TrainingDivergedError
from keras_optkit.callbacks.guard.sensor import SCALARS, Sensor
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.state import Copies, TrainingState, generators_now
from keras_optkit.fit.run import running_fit
from keras_optkit.fit.steps import attach, detach, is_built
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import innermost, optimizers_of
from keras_optkit.registry import register

Tensor = Any


#: Makes the median absolute deviation of normal numbers their standard deviation: 1 / Φ⁻¹(3/4).
_MAD_TO_SIGMA = 1.4826

#: The deviation is taken to be at least this share of the losses, now and when training began: where they hardly
#: differ, or are next to nothing, noise would be a spike.
_LEAST_SIGMA = 0.01


@dataclass(frozen=True)
class _Copy:
    """A state of training, and the epoch whose metrics are in it; -1: none has begun, and they may not be built."""

    epoch: int
    state: TrainingState
    memory: Copies = dataclasses.field(default_factory=Copies)

    @classmethod
    def of(cls, model: Any, epoch: int, memory: Copies) -> _Copy:
        memory.restart()
        # random generators are not set back: data that are drawn with them would be the bad ones again
        return cls(epoch, dataclasses.replace(TrainingState.of(model, memory), generators={}), memory)

    def to_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "state": copy.deepcopy(vars(self.state))}  # the memory is used again

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> _Copy:
        return cls(saved["epoch"], TrainingState(**saved["state"]))


@register(
    "callback",
    paper="Chowdhery et al. 2022, arXiv 2204.02311, section 5.1 (going back, skipping data); "
    "Iglewicz and Hoaglin 1993, How to detect and handle outliers (robust z-score)",
    tags=("passive",),
    cases=({}, {"every": 2, "spike": None, "find_layer": False, "verbose": 0}),
)
class NonFiniteGuard(Callback):
    """Goes back to the last good state when a loss, gradient or weight is not finite, or the loss jumps.

    A batch is bad if its loss, a gradient or, after the update, a weight is NaN or infinite, or if its loss L is a
    spike among the last `window` good losses l:

    ```text
    L > median(l) + spike · s,   s = max(1.4826 · median(|l - median(l)|), 0.01 · |median(l)|, 0.01 · |median(l₀)|)
    ```

    that is, if its robust z-score is above `spike`; l₀ are the first `window` good losses of this `fit`, so that the
    noise of small losses is not a spike. A low loss never is one. Then

    1. the last good state of the model, the optimizer with its update count, and the running metrics is restored,
       bitwise, from a copy in the host's memory;
    2. training continues with the *next* batch of the data: those since the good state are skipped;
    3. the learning rate is multiplied by `rate_factor`, until `recover_after` batches were good; it is not if the batch
       itself holds NaN or infinity, against which a lower rate does not help;
    4. the n-th bad batch in a row, or in all, ends `fit` with `TrainingDivergedError`, which says which layer and batch
       were bad. "In a row" means without a new good state in between.

    A copy is made every `every` batches, after the first good batch of each epoch, and where layers are unfrozen; it
    counts as good once the next batch is. It takes as much of the host's memory as model and optimizer, for a moment
    twice that. As long as all is well nothing else happens: weights and metrics are those of a run without the guard.

    *The first bad layer* is found by running the model on the bad batch once more, eagerly and from the good state; if
    all layers are finite there, it is the one whose gradient or weight was not finite in the step, and of several
    gradients the one nearest to the loss. With several replicas or `steps_per_execution > 1` on TensorFlow the batch is
    not available, and there is only the latter.

    *The learning rate* is lowered by the multiplier of our optimizers, also below a schedule. Keras's optimizers must
    have a number: with a schedule only `rate_factor=1` works. A rate that another callback has set since the copy, such
    as `ReduceLROnPlateau`, is kept.

    *Several optimizers*, as in a GAN: the gradients of each count, and the rates of all are lowered. A training step
    that does not show its loss is guarded by gradients and weights alone.

    *A model that its first step builds* is built before it, on TensorFlow by tracing the step once more, so that there
    is a first state to go back to.

    *Together with others*: gradients that are not finite are not a failure if something else skips such updates, that
    is, with a `LossScaleOptimizer` (so overflows under mixed precision are not failures) and with our `skip_nonfinite`;
    the loss and the weights still count. With `gradient_accumulation_steps` micro-batches are batches here, and sums
    that are not finite are undone with the rest. `EarlyStopping`, `ReduceLROnPlateau` and `History` see metrics without
    the bad batches; those with them only if no batch is left in the epoch, before or after.

    When not to use it: with `keras.callbacks.TerminateOnNaN`, which stops at the first NaN; for data with NaN
    everywhere, which should be cleaned; or if a batch may well have a loss far above the others (then `spike=None`).
    `keras.callbacks.LearningRateScheduler` sets the rate again and so undoes the lowering; use `rate_factor=1` with it.
    On JAX with `steps_per_execution > 1` only the last step of each execution is checked.

    Args:
        every: Batches between two copies, at least 1.
        spike: Robust z-score above which a finite loss is a spike, > 0; None: only what is not finite counts.
        window: Good losses that a spike is measured by, at least 3; before so many there are no spikes. With
            `steps_per_execution=k` every k-th is among them.
        rate_factor: Factor on the learning rate after a failure, in (0, 1]; 1 leaves it unchanged.
        recover_after: Good batches after which one such factor is taken back, at least 1; None: never.
        max_in_a_row: The failure in a row that ends `fit`, at least 1.
        max_total: The failure of one `fit` in all that ends it, at least 1; None: no limit.
        find_layer: Whether each batch is kept while it is trained on, to search for the layer. On TensorFlow, a last
            batch of another size then makes the step be traced once more.
        verbose: 1 prints a line for every failure, 0 is silent.

    Attributes:
        failures: The failures of the present or last `fit`, a list of `Failure`.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range; when training begins, if weights are not finite, or if `rate_factor` is
            below 1 and the rate cannot be lowered.
        RuntimeError: While training, on another backend than TensorFlow and JAX, or with a `train_step` that goes
            through neither `optimizer.scale_loss` (on JAX: the metric "loss") nor `optimizer.apply` (on JAX:
            `optimizer.stateless_apply`); or where an eager step that cannot be traced builds the model, and is bad.
        TrainingDivergedError: While training, when the guard gives up.

    Example:
    ```python
    import keras
    import numpy as np
    import keras_optkit as ok

    x = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    y = x[:, :1].copy()
    y[40] = np.nan
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    guard = ok.callbacks.NonFiniteGuard(every=2)
    history = model.fit(x, y, batch_size=16, shuffle=False, epochs=2, callbacks=[guard], verbose=0)
    print(guard.failures[0])  # the loss is nan, in batch 3 of epoch 1; the targets of the batch are not finite
    assert np.all(np.isfinite(history.history["loss"]))
    ```
    """

    def __init__(
        self,
        every: int = 25,
        spike: float | None = 20.0,
        window: int = 50,
        rate_factor: float = 0.5,
        recover_after: int | None = 100,
        max_in_a_row: int = 3,
        max_total: int | None = None,
        find_layer: bool = True,
        verbose: int = 1,
    ):
        super().__init__()
        self.every = arguments.integer("every", every, 1)
        self.spike = arguments.real("spike", spike, 0, closed="neither", optional=True)
        self.window = arguments.integer("window", window, 3)
        self.rate_factor = arguments.real("rate_factor", rate_factor, 0, 1, closed="right")
        self.recover_after = arguments.integer("recover_after", recover_after, 1, optional=True)
        self.max_in_a_row = arguments.integer("max_in_a_row", max_in_a_row, 1)
        self.max_total = arguments.integer("max_total", max_total, 1, optional=True)
        self.find_layer = arguments.boolean("find_layer", find_layer)
        self.verbose = arguments.choice("verbose", verbose, (0, 1))
        self._sensor: Any = None
        self._reset()

    def _reset(self) -> None:
        self.failures: list[Failure] = []
        self._good: _Copy | None = None
        self._candidate: _Copy | None = None  # good if the next batch is
        self._spare = Copies()  # memory for the next copy, which is not that of the good one
        self._losses: deque[float] = deque(maxlen=self.window)
        self._level = 0.0  # of the first losses
        self._limit = math.inf
        self._epoch = 0
        self._first_of_epoch = False
        self._reset_metrics = False
        self._said_blind = False
        self._in_a_row = 0
        self._since_copy = self._since_rate = 0  # good batches
        self._before_lowering: list[list[float]] = []  # the rates, for each lowering that has not been taken back

    # -- the beginning and the end ------------------------------------------------------------------------------------

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()
        self._reset()
        model = self.model
        self._watched = model  # on JAX, asking for self.model ends the epoch's quick way from step to step
        self._parts = [part for optimizer in optimizers_of(model) for part in innermost(optimizer)]
        self._refuse_what_cannot_be_lowered()
        self._weights = list(model.trainable_variables)
        refuse_what_is_not_finite(self._weights)
        self._train_function: Any = None
        self._sensor = attach(model, "NonFiniteGuard", lambda: Sensor(model))
        self._sensor.begin_fit(self.find_layer, None if self._can_be_copied() else self._take_first_copy)
        self._look_anew()

    def _refuse_what_cannot_be_lowered(self) -> None:
        if self.rate_factor == 1:
            return
        driven = running_fit(self._watched)
        for callback in driven.callbacks if driven else ():
            if isinstance(callback, ScheduleHyperparameters) and "learning_rate" in callback.schedules:
                raise ValueError(
                    "rate_factor must be 1 if ScheduleHyperparameters drives the learning rate, "
                    f"got {self.rate_factor!r}."
                )
        for part, rate in zip(self._parts, self._rates, strict=True):
            if rate is None:
                raise ValueError(
                    f"rate_factor must be 1 for {part!r}, whose learning rate is not a number that "
                    f"could be lowered, got {self.rate_factor!r}. Our optimizers can be lowered below a schedule."
                )

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._end()

    def _end(self) -> None:
        """Lets go of everything but the failures."""
        if self._sensor is not None:
            detach(self._sensor)
        self._sensor = self._watched = self._train_function = None
        self._parts, self._weights = [], []
        self._good = self._candidate = None
        self._spare = Copies()

    @property
    def _rates(self) -> list[keras.Variable | None]:
        """For each optimizer the variable that its rate is proportional to; None for a schedule of Keras's."""
        rates = [p._multiplier if isinstance(p, Optimizer) else getattr(p, "learning_rate", None) for p in self._parts]
        return [rate if isinstance(rate, keras.Variable) else None for rate in rates]

    # -- batch by batch -----------------------------------------------------------------------------------------------

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._epoch = epoch
        self._first_of_epoch = True
        self._reset_metrics = False
        if self._can_be_copied():
            self._take_first_copy()

    def _can_be_copied(self) -> bool:
        """Whether there are weights already; on TensorFlow the first step may make them."""
        return keras.config.backend() == "jax" or is_built(self._watched) or self._updates() > 0

    def _take_first_copy(self) -> None:
        """The state that training begins with."""
        if self._good is None:
            self._parts = [part for optimizer in optimizers_of(self._watched) for part in innermost(optimizer)]
            self._weights = list(self._watched.trainable_variables)
            refuse_what_is_not_finite(self._weights)
            self._good = _Copy.of(self.model, -1, Copies())

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._begun_at = batch
        if self._reset_metrics:
            self.model.reset_metrics()
            self._reset_metrics = False
        if self._watched.train_function is not self._train_function:  # somebody has had it made again
            self._look_at_what_is_trained()
            self._train_function = self._watched.train_function

    def _look_at_what_is_trained(self) -> None:
        """The state from before a layer was unfrozen cannot be set any more; that of now is no worse."""
        before, self._weights = self._weights, list(self._watched.trainable_variables)
        if before and [id(weight) for weight in before] != [id(weight) for weight in self._weights]:
            self._good = _Copy.of(self.model, -1 if self._first_of_epoch else self._epoch, Copies())
            self._candidate = None

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        if not self._sensor.sees:
            raise RuntimeError(
                "NonFiniteGuard sees neither loss nor gradients of a train_step that does not go through "
                "optimizer.scale_loss and optimizer.apply (on JAX: the metric 'loss' and optimizer.stateless_apply)."
            )
        if self.spike is not None and not (self._sensor.sees_loss or self._said_blind):
            self._said_blind = True
            warnings.warn(
                "NonFiniteGuard does not see the loss, as train_step does not call optimizer.scale_loss (on JAX: does "
                "not update the metric 'loss'). It checks gradients and weights, and finds no spikes; pass spike=None "
                "if this is intended.",
                stacklevel=2,
            )
        seen = number(self._sensor["seen"])
        if math.isnan(seen):
            self._go_on_from_good(batch)
        else:
            self._take_as_good(seen, batch + 1 - self._begun_at)
        self._sensor.batch = None

    def _take_as_good(self, loss: float, batches: int) -> None:
        if self._candidate is not None:
            if self._good is not None:
                self._spare = self._good.memory
            self._good, self._candidate = self._candidate, None
            self._in_a_row = 0
        self._losses.append(loss)
        self._set_limit()
        self._since_copy += batches
        self._since_rate += batches
        if self.recover_after and self._before_lowering and self._since_rate >= self.recover_after:
            self._raise_rate()
        if self._first_of_epoch or self._since_copy >= self.every:
            self._candidate = _Copy.of(self.model, self._epoch, self._spare)
            self._first_of_epoch, self._since_copy = False, 0

    def _go_on_from_good(self, batch: int) -> None:
        model, good = self.model, self._good
        if good is None:  # an eager step that cannot be traced has built the model, and changed it
            raise RuntimeError(
                f"NonFiniteGuard has no good state to go back to: model {model.name!r} was built by batch {batch + 1}, "
                "which was bad. Build it before `fit`, for example by calling it on a batch."
            )
        # The learning rate stays as it is, and so do random numbers. Python's and NumPy's generators are not touched,
        # since the thread that makes the batches may be drawing from them.
        state = dataclasses.replace(good.state, generators={"keras": generators_now()["keras"]})
        rates = [number(rate) for rate in self._rates if rate is not None]
        same_epoch = good.epoch == self._epoch
        state.into(model, metrics=same_epoch)
        failure = self._failure(batch)  # runs the model, and that leaves traces
        state.into(model, metrics=same_epoch)
        self._set_rates(rates)
        self._reset_metrics = not same_epoch  # with the next batch: without one, the epoch has no metrics
        self._candidate = None
        self._since_copy = 0
        self._in_a_row += 1
        self.failures.append(failure)
        self._give_up_if_too_many()
        lowered = self.rate_factor < 1 and not failure.in_data
        if lowered:
            self._lower_rate(rates)
        self._look_anew()
        if self.verbose:
            rate = f", with {self.rate_factor:g} of the learning rate" if lowered else ""
            print(f"\nNonFiniteGuard: {failure}. Training continues from update {self._updates()}{rate}.")

    def _give_up_if_too_many(self) -> None:
        total = len(self.failures)
        if self._in_a_row >= self.max_in_a_row:
            why = f"{self._in_a_row} failures in a row (max_in_a_row={self.max_in_a_row})"
        elif self.max_total is not None and total >= self.max_total:
            why = f"{total} failures (max_total={self.max_total})"
        else:
            return
        raise TrainingDivergedError(
            f"Training is given up after {why}. The last one: {self.failures[-1]}. The model has the last good state, "
            f"that of update {self._updates()}.",
            self.failures,
        )

    def _set_limit(self) -> None:
        if self.spike is not None and len(self._losses) == self.window:
            if not self._level:
                self._level = abs(statistics.median(self._losses))
            self._limit = limit_of(self._losses, self.spike, self._level)
            self._sensor["limit"] = self._limit

    def _look_anew(self) -> None:
        """Resets what the step keeps to its values before the first step."""
        for name in SCALARS:
            self._sensor[name] = 0.0
        self._sensor["limit"] = self._limit

    # -- the learning rate --------------------------------------------------------------------------------------------

    def _set_rates(self, values: Sequence[float]) -> None:
        for rate, value in zip([rate for rate in self._rates if rate is not None], values, strict=True):
            rate.assign(value)

    def _lower_rate(self, rates: list[float]) -> None:
        self._since_rate = 0
        self._before_lowering.append(rates)
        self._set_rates([rate * self.rate_factor for rate in rates])

    def _raise_rate(self) -> None:
        """Takes the last lowering back; a rate that somebody has set meanwhile is not raised above the former one."""
        self._since_rate = 0
        _ = self.model  # on JAX, has Keras fill the variables
        former = self._before_lowering.pop()
        self._set_rates([min(number(r) / self.rate_factor, f) for r, f in zip(self._rates, former, strict=True)])

    # -- where it was -------------------------------------------------------------------------------------------------

    def _failure(self, batch: int) -> Failure:
        sensor = self._sensor
        values = {name: number(sensor[name]) for name in ("bad_loss", "bad_gradient", "bad_weight", "behind")}
        loss, behind = values["bad_loss"], int(values["behind"])
        gradient, weight = (
            sensor.variables[int(place) - 1] if place else None
            for place in (values["bad_gradient"], values["bad_weight"])
        )
        if not math.isfinite(loss):
            kind = "loss"
        elif loss > self._limit:
            kind = "spike"
        else:
            kind = "weight" if gradient is None else "gradient"
        if not sensor.sees_loss:
            loss = math.nan
        found = None
        if sensor.batch is not None and behind == 0 and kind != "spike":
            found = look_at(self._watched, sensor.batch)
        if found is None or (found.failed and (gradient is not None or weight is not None)):
            found = self._seen_in_step(gradient, weight)
        return Failure(self._epoch, batch - behind, kind, loss, self._limit, found.layer, found.in_data, found.where)

    def _seen_in_step(self, gradient: Any, weight: Any) -> Found:
        if gradient is None and weight is None:
            return Found("no layer is known to be at fault")
        what, variable = ("value", weight) if gradient is None else ("gradient", gradient)
        layer = owner(self._watched, variable)
        return Found(f"the {what} of {variable.path!r} in layer {layer!r} is not finite", layer)

    # -- continuing in another process --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the guard knows, the copy of the good state included: as large as model and optimizer."""
        return {
            "good": None if self._good is None else self._good.to_dict(),
            "candidate": None if self._candidate is None else self._candidate.to_dict(),
            "failures": [dataclasses.asdict(failure) for failure in self.failures],
            "losses": list(self._losses),
            "level": self._level,
            "limit": self._limit,
            "first_of_epoch": self._first_of_epoch,
            "reset_metrics": self._reset_metrics,
            "in_a_row": self._in_a_row,
            "since_copy": self._since_copy,
            "since_rate": self._since_rate,
            "before_lowering": [list(rates) for rates in self._before_lowering],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`.

        Args:
            state: What `state_dict` has returned.
        """
        self._good, self._candidate = (
            None if state[name] is None else _Copy.from_dict(state[name]) for name in ("good", "candidate")
        )
        self._spare = Copies()
        self.failures = [Failure(**failure) for failure in state["failures"]]
        self._losses = deque(state["losses"], maxlen=self.window)
        self._level, self._limit = state["level"], state["limit"]
        self._first_of_epoch, self._reset_metrics = state["first_of_epoch"], state["reset_metrics"]
        self._in_a_row = state["in_a_row"]
        self._since_copy, self._since_rate = state["since_copy"], state["since_rate"]
        self._before_lowering = [list(rates) for rates in state["before_lowering"]]
        self._weights = []  # what is trained may be set after this, and the copies fit it
        self._look_anew()


def limit_of(losses: Sequence[float] | deque[float], z: float, level: float) -> float:
    """The loss whose robust z-score among `losses` is z; infinity where it has none, because all are 0.

    Args:
        losses: The last good ones.
        z: The score.
        level: What losses were like when training began.
    """
    middle = statistics.median(losses)
    deviation = _MAD_TO_SIGMA * statistics.median(abs(loss - middle) for loss in losses)
    sigma = max(deviation, _LEAST_SIGMA * abs(middle), _LEAST_SIGMA * level)
    return middle + z * sigma if sigma > 0 else math.inf

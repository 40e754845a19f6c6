"""`find_learning_rate`: the learning rate range test."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments
from keras_optkit.callbacks.callback import number
from keras_optkit.finding import curve
from keras_optkit.finding.trial import as_found, batches, build, checked_model, run, used_optimizers
from keras_optkit.fit.steps import compile_anew
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import innermost, optimizers_of
from keras_optkit.precision import scalar_dtype
from keras_optkit.private import schedule_of

Tensor = Any

#: A sweep ends when the weights have not been updated in so many batches (times those of an accumulation).
PATIENCE = 40


@dataclass(frozen=True, eq=False)
class LearningRates:
    """The result of a sweep over learning rates.

    Attributes:
        learning_rates: The rate of each update, in order.
        losses: The loss of its batch, with regularisation, before the update; under gradient accumulation the mean of
            its micro-batches.
        smoothed: The exponential mean of the losses to both sides; see `find_learning_rate`.
        rule: Name of the rule that `suggestion` is from.
        suggestions: The rate that each rule suggests; empty if no rate can be read off the curve.
        ended: Why the sweep ended before the highest rate, or "".
        doubt: What is wrong with the curve, or "".
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    rule: str
    suggestions: Mapping[str, float] = field(default_factory=dict)
    ended: str = ""
    doubt: str = ""

    @property
    def suggestion(self) -> float | None:
        """The rate that the chosen rule suggests; None where there is none."""
        return self.suggestions.get(self.rule)

    def table(self) -> str:
        """The sweep and the suggestions as text; the chosen one is marked."""
        rates = self.learning_rates
        lines = [f"{len(rates)} updates, learning rates {rates[0]:.2e} to {rates[-1]:.2e}", ""]
        lines += [f"{name:<9} {rate:.2e}{' *' * (name == self.rule)}" for name, rate in self.suggestions.items()]
        lines += [f"The sweep ended early: {self.ended}."] * bool(self.ended)
        lines += [f"{self.doubt[:1].upper()}{self.doubt[1:]}."] * bool(self.doubt)
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"LearningRates(suggestion={self.suggestion!r}, updates={len(self.losses)})"

    def plot(self, ax: Any = None) -> Any:
        """Draws losses over learning rates, on a logarithmic axis, and marks the suggestions. Needs matplotlib.

        Args:
            ax: Matplotlib axes to draw on; new ones when left out.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        ax = ax or plt.subplots()[1]
        ax.semilogx(self.learning_rates, self.losses, color="0.75", linewidth=1, label="loss of each batch")
        ax.semilogx(self.learning_rates, self.smoothed, color="C0", label="smoothed")
        for i, (name, rate) in enumerate(self.suggestions.items(), 1):
            style = "-" if name == self.rule else ":"
            ax.axvline(rate, color=f"C{i}", linestyle=style, label=f"{name}: {rate:.1e}")
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
        ax.legend()
        return ax


def find_learning_rate(
    model: keras.Model,
    data: Any,
    *,
    optimizer: Any = None,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    batch_size: int | None = None,
    class_weight: Mapping[int, float] | None = None,
    rule: str = "steepest",
    smoothing: float | None = None,
    stop_factor: float = 4.0,
    seed: int = 0,
    verbose: str | int = "auto",
) -> LearningRates:
    """Finds a learning rate: trains with a rate that rises from update to update, and reads it off the losses.

    ```text
    rate of update i     η_i = low (high / low)^(i / (steps - 1))        i = 0 ... steps - 1
    smoothed loss        s_i = Σ_j β^|i-j| l_j / Σ_j β^|i-j|
    ```

    l_i is the loss of the i-th batch alone, before it is trained on, at the weights that the rates up to η_{i-1} have
    made. Keras's logs hold the mean since the epoch began instead, which keeps falling after the loss has begun to
    rise, so that the rate that is read off it is too high. For the same reason the exponential mean is taken to both
    sides: one of the past alone lags by β / (1 - β) updates.

    With m the place of the least s_i, the rules are

    | rule | suggests |
    |---|---|
    | `"steepest"` | η_i of the most negative (s_{i+1} - s_{i-1}) / (ln η_{i+1} - ln η_{i-1}), 0 < i < m |
    | `"minimum"` | η_m / 10 |
    | `"valley"` | η_i one third into the run of s_{i+1} < s_i that falls furthest |
    | `"slide"` | η_i of the largest i < m whose slope, as for `"steepest"`, is at least a quarter of the steepest |

    The sweep ends early when a loss is not finite or, after the first tenth, when the bias-corrected mean of the losses
    so far is above `M + (stop_factor - 1) |M|`, M being its least value; that is `stop_factor` times M where losses are
    positive. Losses above that limit count as the limit in s.

    There is no suggestion, but a warning, where s does not fall for at least two points and by 1.5 standard deviations
    of l - s.

    Afterwards everything is bitwise as it was found, also after an exception or Ctrl-C: weights, moving statistics,
    optimizer with its update count and rate or schedule, metrics, seeds in layers, the generators of Python, NumPy and
    Keras, `history`, and the compiled training step. Two things are new: an optimizer that was not built is, with the
    state that it begins with, and so are the metrics. The data cannot be restored: the batches of a generator are used
    up, and a `tf.data.Dataset` that shuffles continues with its own order.

    One rate is swept for the whole optimizer: groups keep their `lr_scale`. It replaces a schedule, and its multiplier,
    for the time of the sweep. Where a model trains with several optimizers, by a `train_step` of its own or with
    Keras's `MultiOptimizer`, `optimizer` says whose rate is swept; the others keep theirs. Under gradient accumulation,
    an update of the weights has one rate, and an update that loss scaling skips is tried again with the same one. With
    several replicas, losses and batches are those of all. `steps_per_execution` is 1 meanwhile.

    When not to use it: with an optimizer that has no rate to find (Adafactor's relative steps); for the two sides of a
    GAN, whose losses do not fall; or near the end of training, where hardly anything falls.

    Args:
        model: A compiled model. Callbacks take no part in the sweep.
        data: A tuple `(x,)`, `(x, y)` or `(x, y, sample_weight)` of arrays, which are shuffled and taken as often as it
            needs; or a `tf.data.Dataset`, `PyDataset`, DataLoader or generator of batches. One that ends is begun
            again, which a generator cannot.
        optimizer: The optimizer whose rate is swept, one that the model holds. None: the one that it trains with, if
            there are not several.
        low: The first rate, > 0.
        high: The last rate, above `low`.
        steps: The number of updates, at least 10.
        batch_size: For arrays; 32 if None.
        class_weight: As in `fit`.
        rule: The rule of `LearningRates.suggestion`.
        smoothing: β in [0, 1), 0 being none. None: `1 - 10 / steps`, so that s is the mean of a tenth of
            the sweep or so.
        stop_factor: See above, > 1.
        seed: Seed of the order of arrays.
        verbose: 0 is silent, 1 and "auto" show a progress bar, 2 a line.

    Returns:
        Rates, losses and suggestions, as a table with `print` and as a plot.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, a model that is not compiled, or that trains with several optimizers of
            which none was chosen, an optimizer without a learning rate, a training step without a loss in its logs, a
            first loss that is not finite, or data that end too early and cannot be begun again.

    Source: Smith 2017, arXiv 1506.01186, section 3.3 (range test), here with an exponential sweep; the rules are in
    general use, `"valley"` and `"slide"` in the form above.

    Example:
    ```python
    import keras
    import numpy as np

    import keras_optkit as ok

    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 8)).astype("float32")
    y = x[:, :1] - 2 * x[:, 1:2]
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(), loss="mse")
    found = ok.find_learning_rate(model, (x, y), low=1e-5, high=3.0, verbose=0)
    print(found)
    model.optimizer.learning_rate = found.suggestion
    model.fit(x, y, verbose=0)
    ```
    """
    checked_model(model)
    if not isinstance(optimizer, keras.optimizers.Optimizer | None):
        raise TypeError(
            f"optimizer must be an optimizer or None, got {optimizer!r} of type {type(optimizer).__name__}."
        )
    arguments.real("low", low, 0, closed="neither")
    arguments.real("high", high, low, closed="neither")
    arguments.integer("steps", steps, 10)
    arguments.choice("rule", rule, tuple(curve.RULES))
    arguments.real("smoothing", smoothing, 0, 1, closed="left", optional=True)
    beta = 1 - 10 / steps if smoothing is None else smoothing
    arguments.real("stop_factor", stop_factor, 1, closed="neither")
    arguments.choice("verbose", verbose, ("auto", 0, 1, 2))
    given = batches(data, batch_size, seed) | {"class_weight": _checked_class_weight(class_weight, data)}
    given["x"] = build(model, given["x"])
    sweep = Sweep(np.geomspace(low, high, steps), _swept_optimizer(model, optimizer))
    # Keras would begin an iterator again with the batches that it has looked at first
    recorder = Recorder(sweep, beta, stop_factor, verbose, again=not isinstance(data, Iterator))
    with as_found(model):
        model.steps_per_execution = 1
        with _following(sweep, model):
            run(model, [recorder], **given)
    result = _result(recorder, rule, beta, stop_factor)
    if result.doubt:
        warnings.warn(f"find_learning_rate: {result.doubt}.", stacklevel=2)
    return result


def _swept_optimizer(model: Any, chosen: Any) -> Any:
    """The optimizer that updates the weights whose rate is swept: the one that was chosen, or the only one."""
    if chosen is None:
        found = [inner for optimizer in used_optimizers(model) for inner in innermost(optimizer)]
        if len(found) > 1:
            raise ValueError(
                f"optimizer must be one of the {len(found)} that model may train with, "
                f"{', '.join(_named(one) for one in found)}; got None."
            )
    else:
        held = [inner for outer in optimizers_of(model) for inner in innermost(outer)]
        found = [inner for inner in innermost(chosen) if any(inner is one for one in held)]
        if len(found) != 1:
            raise ValueError(
                f"optimizer must be one that model holds, {', '.join(_named(one) for one in held)}; got {chosen!r}."
            )
    if not hasattr(found[0], "learning_rate"):
        raise ValueError(f"model must have an optimizer with a learning rate, got {type(found[0]).__name__}.")
    return found[0]


def _named(optimizer: Any) -> str:
    return f"{type(optimizer).__name__} ({optimizer.name!r})"


def _checked_class_weight(class_weight: Any, data: Any) -> Any:
    if class_weight is None:
        return None
    if not isinstance(class_weight, Mapping):
        raise TypeError(
            f"class_weight must be a dict of class to weight, or None, got {class_weight!r} of type "
            f"{type(class_weight).__name__}."
        )
    if isinstance(data, tuple) and len(data) > 1 and tree.is_nested(data[1]):
        raise ValueError("class_weight must be None for a model with several outputs.")
    return {
        arguments.integer("each class of class_weight", number_of_class): arguments.real(
            f"class_weight[{number_of_class}]", weight
        )
        for number_of_class, weight in class_weight.items()
    }


class Sweep(LearningRateSchedule):
    """A table of rates, one for each update of an optimizer since it was made; the last one ever after."""

    def __init__(self, rates: np.ndarray, optimizer: Any):
        self.rates = rates
        self.optimizer = optimizer
        self.batches_of_an_update = optimizer.gradient_accumulation_steps or 1
        self._first = number(optimizer.iterations)
        ours = isinstance(optimizer, Optimizer)
        #: Whether the optimizer has a number, which is set before every update, and no schedule, to be replaced.
        self.by_number = isinstance(optimizer.learning_rate, keras.Variable)
        # Keras counts micro-batches for schedules, but not in its public `iterations`
        self._steps_of_an_update = 1 if ours else self.batches_of_an_update
        self._dtype = scalar_dtype() if ours else keras.config.floatx()  # Keras's Muon does not cast its rate

    def place(self) -> int:
        """Which of the rates is that of the next update."""
        return number(self.optimizer.iterations) - self._first

    def __call__(self, step: Any) -> Tensor:
        """The rate of the update after `step` others, as the optimizer counts them for its schedules."""
        updates = ops.convert_to_tensor(step) // self._steps_of_an_update
        place = ops.clip(updates - self._first, 0, len(self.rates) - 1)
        return ops.cast(ops.take(ops.convert_to_tensor(self.rates, scalar_dtype()), place), self._dtype)


@contextlib.contextmanager
def _following(sweep: Sweep, model: Any) -> Iterator[None]:
    """Has an optimizer with a schedule follow the sweep instead."""
    if sweep.by_number:
        yield
        return
    optimizer = sweep.optimizer
    found = optimizer._schedule if isinstance(optimizer, Optimizer) else schedule_of(optimizer)
    optimizer.learning_rate = sweep
    try:
        compile_anew(model)
        yield
    finally:
        optimizer.learning_rate = found


class Recorder(keras.callbacks.Callback):
    """Notes the loss of every batch, and ends the training when the sweep is over.

    Batches at the same weights, the micro-batches of an accumulation or those whose update was skipped, have one rate
    and one loss, their mean.
    """

    def __init__(self, sweep: Sweep, beta: float, stop_factor: float, verbose: str | int, *, again: bool):
        super().__init__()
        self.ended = ""
        self._again = again
        self._sweep, self._beta, self._stop_factor = sweep, beta, stop_factor
        self._losses: dict[int, list[float]] = {}  # by the place in the sweep
        self._place = 0
        self._seen = 0
        self._bar = keras.utils.Progbar(
            len(sweep.rates),
            verbose=1 if verbose == "auto" else int(verbose),
            stateful_metrics=("learning_rate", "loss"),
        )

    @property
    def losses(self) -> np.ndarray:
        """The losses so far, one for each rate."""
        return np.array([np.mean(here) for here in self._losses.values()])

    @property
    def rates(self) -> np.ndarray:
        """The rates of the losses: where data end, TensorFlow may count an update that there was no batch for."""
        return self._sweep.rates[list(self._losses)]

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self._seen = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        self.model.reset_metrics()  # so that what the step puts into its logs is of this batch alone
        self._place = min(self._next_place(), len(self._sweep.rates) - 1)
        if self._sweep.by_number:
            self._sweep.optimizer.learning_rate.assign(self._sweep.rates[self._place])

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._seen += 1
        loss, here = self._loss(logs or {}), self._place
        if not math.isfinite(loss):
            return self._end("the loss was no longer finite")
        self._losses.setdefault(here, []).append(loss)
        done = self._next_place()
        if done > here:
            self._bar.update(done, [("learning_rate", self._sweep.rates[here]), ("loss", loss)], finalize=False)
        if done >= len(self._sweep.rates):
            return self._end()
        if self._has_diverged():
            return self._end("the loss had risen above the limit")
        tries = PATIENCE * self._sweep.batches_of_an_update
        if done == here and len(self._losses[here]) >= tries:
            return self._end(f"there was no update in {tries} batches")
        return None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002, D102
        if not self.model.stop_training and not (self._seen and self._again):
            raise ValueError(
                f"data must give enough batches for {len(self._sweep.rates)} updates, since they cannot be begun "
                f"again; they ended after {len(self._losses)}. Give fewer steps."
            )

    def _next_place(self) -> int:
        assert self.model is not None  # asking for the model has Keras fill its variables on JAX
        return self._sweep.place()

    def _loss(self, logs: Mapping[str, Any]) -> float:
        """The metric outside the step, as in the logs of an epoch; inside it may be that of one replica."""
        metrics = self.model.get_metrics_result()
        found = metrics if set(metrics) == set(logs) else logs
        if "loss" not in found:
            raise ValueError(f"model must have a training step with 'loss' in its logs, got {sorted(found)}.")
        return float(ops.convert_to_numpy(found["loss"]))

    def _has_diverged(self) -> bool:
        losses = self.losses
        if len(losses) <= len(self._sweep.rates) // 10:
            return False
        return bool(curve.running(losses, self._beta)[-1] > curve.limit(losses, self._beta, self._stop_factor))

    def _end(self, reason: str = "") -> None:
        self.ended = reason
        self.model.stop_training = True
        self._bar.update(len(self._losses), finalize=True)


def _result(recorder: Recorder, rule: str, beta: float, stop_factor: float) -> LearningRates:
    losses = recorder.losses
    if not len(losses):
        raise ValueError("model must have a finite loss on the first batch, at the weights that it has; it has not.")
    rates = recorder.rates
    capped = np.minimum(losses, curve.limit(losses, beta, stop_factor))
    smoothed = curve.smooth(capped, beta)
    suggestions: dict[str, float] = {}
    doubt = ""
    if not curve.falls(capped, smoothed):
        doubt = (
            f"no learning rate from {rates[0]:.2e} to {rates[-1]:.2e} makes the loss fall clearly, so that none is "
            "suggested; try another range, more steps or larger batches"
        )
    else:
        suggestions = {name: suggest(rates, smoothed) for name, suggest in curve.RULES.items()}
        if not recorder.ended and np.argmin(smoothed) == len(smoothed) - 1:
            doubt = "the loss still falls at the highest rate, so that the suggestions may be too low; raise high"
    return LearningRates(rates, losses, smoothed, rule, suggestions, recorder.ended, doubt)

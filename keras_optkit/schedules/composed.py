"""Schedules around others, and those that are made of parts."""

from __future__ import annotations

import math
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay

from keras_optkit import arguments
from keras_optkit.registry import register
from keras_optkit.schedules import curves
from keras_optkit.schedules.decays import Cosine, Linear
from keras_optkit.schedules.schedule import Schedule, Tensor, schedule_or_number, value_of
from keras_optkit.space import Choice, Float


@register(
    "schedule",
    paper="Goyal et al., arXiv 1706.02677, section 2.2 (gradual warm-up)",
    parity="torch.optim.lr_scheduler.SequentialLR of LinearLR and the schedule",
    tags=("epochs",),
    cases=(
        {"schedule": 0.1, "steps": 10},
        {"schedule": Cosine(0.1, 90, final=0.01), "steps": 10, "start": 0.02},
        {"schedule": PiecewiseConstantDecay([3], [0.1, 0.01]), "steps": 4},
    ),
)
class Warmup(Schedule):
    """Raises a hyperparameter linearly to where a schedule, or a number, begins, and then follows it.

    ```text
    η_t = start + (s(0) - start) t / T     for t < T
    η_t = s(t - T)                         afterwards
    ```

    t is the number of updates made before. The schedule s starts to count when the warm-up is over, so that a cosine of
    900 updates behind a warm-up of 100 ends at update 1000. With `start=0` the very first update of a learning rate
    does nothing; give `start` a positive value where that matters.

    When to use it: with adaptive optimizers, whose first estimates are poor, and with large batches.

    When not to use it: with plain SGD on a small network, where it only costs updates.

    Args:
        schedule: What follows: any Keras `LearningRateSchedule`, or a number.
        steps: T >= 1, the length of the warm-up in updates; with `steps_per_epoch`, in epochs.
        start: Value at the first update, >= 0.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction. It is for
            this schedule's own `steps`; the schedule inside has its own.

    Raises:
        TypeError: If `schedule` is neither a schedule nor a number, or for another value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    optimizer = keras.optimizers.AdamW(ok.schedules.Warmup(1e-3, steps=500))
    decay = keras.optimizers.schedules.ExponentialDecay(1e-3, 1000, 0.9)
    print(float(ok.schedules.Warmup(decay, steps=500)(250)))  # half of 1e-3
    ```
    """

    def __init__(
        self,
        schedule: LearningRateSchedule | float,
        steps: int,
        start: float = 0.0,
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.schedule = schedule_or_number("schedule", schedule)
        self.steps = self._length("steps", steps)
        self.start = arguments.real("start", start, 0)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        steps = self._updates(self.steps)
        rising = curves.line(curves.share(step, steps), self.start, value_of(self.schedule, 0))
        return ops.where(step < steps, rising, value_of(self.schedule, curves.since(step, steps)))


@register(
    "schedule",
    paper="torch SequentialLR; optax.join_schedules",
    parity="torch.optim.lr_scheduler.SequentialLR; optax.join_schedules",
    tags=("epochs",),
    cases=(
        {"schedules": [Linear(0.01, 10, final=0.1), Cosine(0.1, 30)], "boundaries": [10]},
        {"schedules": [0.1, PiecewiseConstantDecay([3], [0.1, 0.01]), 0.5], "boundaries": [4, 11]},
    ),
)
class Sequence(Schedule):
    """Several schedules, one after the other.

    ```text
    η_t = s_i(t - b_i)     with b_i <= t < b_(i+1),  b_0 = 0
    ```

    t is the number of updates made before, and b_1, b_2, ... are the boundaries. Every schedule starts to count when
    its turn begins. Between two of them the value may jump.

    When to use it: for a run in phases, such as a second decay after an extension.

    When not to use it: for a warm-up, where `Warmup` finds the value that it has to reach; for constant values, which
    are a `Piecewise`.

    Args:
        schedules: A list of Keras `LearningRateSchedule`s, numbers >= 0 or both.
        boundaries: The updates at which the next one takes over, rising, >= 1, one less than there are schedules; with
            `steps_per_epoch`, epochs.
        steps_per_epoch: Updates in an epoch, >= 1, if `boundaries` are in epochs, which may then be fractions. It is
            for this schedule's own boundaries; the schedules inside have their own.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, boundaries that do not rise, or another number of schedules.

    Example:
    ```python
    import keras_optkit as ok

    rate = ok.schedules.Sequence([0.1, ok.schedules.Cosine(0.1, steps=100)], boundaries=[900])
    print([float(rate(step)) for step in (0, 900, 1000)])
    ```
    """

    lengths = ("boundaries",)

    def __init__(
        self,
        schedules: list[LearningRateSchedule | float],
        boundaries: list[int],
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        if not isinstance(schedules, list | tuple):
            raise TypeError(
                f"schedules must be a list of schedules and numbers, got {schedules!r} of type "
                f"{type(schedules).__name__}."
            )
        self.schedules = [schedule_or_number(f"schedules[{i}]", each) for i, each in enumerate(schedules)]
        self.boundaries = self._boundaries("boundaries", boundaries)
        if len(self.schedules) != len(self.boundaries) + 1:
            raise ValueError(
                f"schedules must have one entry more than the {len(self.boundaries)} boundaries, got "
                f"{len(self.schedules)}."
            )

    def value(self, step: Any) -> Tensor:  # noqa: D102
        value = value_of(self.schedules[0], step)
        for boundary, schedule in zip(map(self._updates, self.boundaries), self.schedules[1:], strict=True):
            value = ops.where(step < boundary, value, value_of(schedule, curves.since(step, boundary)))
        return value


@register(
    "schedule",
    paper="a product and a sum",
    parity="the formula",
    cases=(
        {"schedule": Cosine(0.1, 40), "factor": 0.5},
        {"schedule": Cosine(0.1, 40, final=0.01), "factor": -1.0, "offset": 0.99},
        {"schedule": PiecewiseConstantDecay([3], [0.1, 0.01]), "factor": Linear(1.0, 10), "offset": 0.001},
    ),
    space={"factor": Float(0.1, 10.0, log=True)},
)
class Scale(Schedule):
    """A schedule times a factor, which may be a schedule too, plus an offset.

    ```text
    η_t = factor s(t) + offset
    ```

    t is the number of updates made before. The factor may be below 0, so that `Scale(s, -1.0, offset=1.0)` is a
    momentum that rises while s falls; that the value suits its hyperparameter is not checked.

    When to use it: for one curve with several heights, as for a rate and a decay; for the product of two curves.

    When not to use it: for a factor on the rate of some parameters (`ok.Group(lr_scale=...)`), or for one that depends
    on the loss (`ok.callbacks.ReduceLROnPlateau`, which works over any schedule).

    Args:
        schedule: Any Keras `LearningRateSchedule`.
        factor: A finite number or a schedule.
        offset: A finite number.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value that is not finite.

    Example:
    ```python
    import keras_optkit as ok

    rate = ok.schedules.Cosine(0.1, steps=100)
    decay = ok.schedules.Scale(rate, factor=0.05)
    momentum = ok.schedules.Scale(rate, factor=-1.0, offset=0.95)  # 0.85 at the peak, 0.95 at the end
    print(float(decay(0)), round(float(momentum(0)), 4), float(momentum(100)))
    ```
    """

    lengths = ()

    def __init__(self, schedule: LearningRateSchedule, factor: LearningRateSchedule | float = 1.0, offset: float = 0.0):
        if not isinstance(schedule, LearningRateSchedule):
            raise TypeError(
                f"schedule must be a LearningRateSchedule, got {schedule!r} of type {type(schedule).__name__}."
            )
        self.schedule = schedule
        self.factor = schedule_or_number("factor", factor, -math.inf)
        self.offset = arguments.real("offset", offset)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return value_of(self.factor, step) * value_of(self.schedule, step) + self.offset


@register(
    "schedule",
    paper="Hu et al., arXiv 2404.06395 (WSD); the tail 1-sqrt: Hägele et al., arXiv 2405.18392",
    parity="pytorch_optimizer.get_wsd_schedule; the exponential tail: optax.exponential_decay",
    tags=("epochs", "settles"),
    cases=(
        {"peak": 0.1, "steps": 100, "warmup_steps": 10, "decay_steps": 20},
        {"peak": 0.1, "steps": 20, "warmup_steps": 0, "decay_steps": 20, "final": 0.01, "anneal": "linear"},
        {"peak": 0.1, "steps": 30, "warmup_steps": 20, "decay_steps": 10, "initial": 0.05, "anneal": "cosine"},
        {"peak": 0.1, "steps": 30, "warmup_steps": 1, "decay_steps": 9, "final": 1e-3, "anneal": "exponential"},
    ),
    space={"peak": Float(1e-5, 1.0, log=True), "anneal": Choice(["1-sqrt", "linear", "cosine"])},
)
class WarmupStableDecay(Schedule):
    """A rise, a constant value for most of the run, and a fall at its end.

    ```text
    η_t = initial + (peak - initial) t / W       for t < W
    η_t = peak                                   for W <= t < T - D
    η_t = tail(z),   z = (t - T + D) / D         for T - D <= t < T,  final afterwards

    "1-sqrt"        final + (peak - final) (1 - sqrt(z))
    "linear"        final + (peak - final) (1 - z)
    "cosine"        final + (peak - final) (1 + cos(π z)) / 2
    "exponential"   peak (final / peak)^z
    ```

    t is the number of updates made before; T, W and D are `steps`, `warmup_steps` and `decay_steps`.

    When to use it: if a run may be extended. Save a checkpoint before the fall; a longer run resumes from there with
    a larger T and has lost nothing but the fall.

    When not to use it: if the length is known and final, where a `Cosine` needs no choice of D.

    Args:
        peak: The constant value, >= 0.
        steps: T, the number of updates of the whole run, at least W + D; with `steps_per_epoch`, of epochs.
        warmup_steps: W >= 0, the length of the rise, in the same unit.
        decay_steps: D >= 1, the length of the fall, in the same unit; 10 to 20 % of T are common.
        initial: Value at the first update, >= 0.
        final: Value at T and afterwards, >= 0.
        anneal: The form of the fall: `"1-sqrt"`, `"linear"`, `"cosine"`, or `"exponential"`, which needs `peak` and
            `final` above 0.
        steps_per_epoch: Updates in an epoch, >= 1, if lengths are in epochs, which may then be fractions.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, or if W + D is more than T.

    Example:
    ```python
    import keras_optkit as ok

    rate = ok.schedules.WarmupStableDecay(0.1, steps=1000, warmup_steps=50, decay_steps=200)
    print([round(float(rate(step)), 4) for step in (0, 25, 50, 800, 850, 1000)])
    ```
    """

    lengths = ("steps", "warmup_steps", "decay_steps")

    def __init__(
        self,
        peak: float,
        steps: int,
        warmup_steps: int,
        decay_steps: int,
        initial: float = 0.0,
        final: float = 0.0,
        anneal: str = "1-sqrt",
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.peak = arguments.real("peak", peak, 0)
        self.steps = self._length("steps", steps)
        self.warmup_steps = self._length("warmup_steps", warmup_steps, 0)
        self.decay_steps = self._length("decay_steps", decay_steps)
        self.initial = arguments.real("initial", initial, 0)
        self.final = arguments.real("final", final, 0)
        self.anneal = arguments.choice("anneal", anneal, ("1-sqrt", "linear", "cosine", "exponential"))
        if self._updates(warmup_steps) + self._updates(decay_steps) > self._updates(steps):
            raise ValueError(
                f"steps must be at least warmup_steps + decay_steps, got {steps!r} with {warmup_steps!r} and "
                f"{decay_steps!r}."
            )
        if anneal == "exponential" and not (self.peak > 0 and self.final > 0):
            raise ValueError(
                f"peak and final must be above 0 with anneal='exponential', got peak={peak!r} and final={final!r}."
            )

    def value(self, step: Any) -> Tensor:  # noqa: D102
        rise, fall = self._updates(self.warmup_steps), self._updates(self.decay_steps)
        begin = self._updates(self.steps) - fall
        tail = curves.ANNEAL[self.anneal](curves.share(curves.since(step, begin), fall), self.peak, self.final)
        if rise:
            rising = curves.line(curves.share(step, rise), self.initial, self.peak)
            tail = ops.where(step < rise, rising, tail)
        return tail

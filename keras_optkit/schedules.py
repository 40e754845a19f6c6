"""Schedules: how a learning rate, or any other hyperparameter, changes with the number of optimizer updates."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay

from keras_optkit import arguments
from keras_optkit.precision import scalar_dtype
from keras_optkit.registry import register
from keras_optkit.saving import FromSignature

__all__ = ["Cosine", "Linear", "OneCycle", "Schedule", "Warmup"]

Tensor = Any


class Schedule(FromSignature, LearningRateSchedule):
    """Base class of schedules: a function of the number of optimizer updates made so far.

    A subclass stores its constructor's arguments under their own names, which are its config too, and computes the
    schedule in `value`. It works wherever Keras takes a `LearningRateSchedule`, and in
    `ok.callbacks.ScheduleHyperparameters` for any hyperparameter.

    Values are float64 (on JAX without `jax_enable_x64` float32), so that steps beyond 2^24 are still told apart;
    optimizers cast them to the dtype of each variable. Keras's Muon does not: drive its `learning_rate` with
    `ScheduleHyperparameters` instead.

    Example:
    ```python
    import keras_optkit as ok
    from keras import ops
    from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay


    class Reciprocal(ok.schedules.Schedule):
        def __init__(self, initial):
            self.initial = initial

        def value(self, step):
            return self.initial / (1 + self.real(step))


    print([float(Reciprocal(0.5)(step)) for step in range(3)])
    ```
    """

    def __call__(self, step: Any) -> Tensor:
        """The value for update number `step`, counted from 0.

        Args:
            step: An int, a NumPy integer, or an integer tensor or variable, of any shape.

        Returns:
            A tensor of the shape of `step`.
        """
        return self.real(self.value(int(step) if isinstance(step, Integral) else ops.convert_to_tensor(step)))

    def value(self, step: Any) -> Tensor:
        """The formula; `step` is an int or an integer tensor."""
        raise NotImplementedError(f"{type(self).__name__} must define value(step).")

    @staticmethod
    def real(x: Any) -> Tensor:
        """`x` as a tensor of the dtype that schedules compute in."""
        if isinstance(x, Real):  # ops.cast would take a Python float through float32
            return ops.convert_to_tensor(x, dtype=scalar_dtype())
        return ops.cast(x, scalar_dtype())

    def plot(self, steps: int, ax: Any = None) -> Any:
        """Draws the values for updates 0 to `steps`.

        Args:
            steps: The last update to draw, at least 1.
            ax: Matplotlib axes to draw on; new ones when left out.

        Returns:
            The axes.
        """
        import matplotlib.pyplot as plt

        shown = np.unique(np.linspace(0, arguments.integer("steps", steps, 1), 500).astype(int))
        ax = ax or plt.subplots()[1]
        ax.plot(shown, [float(ops.convert_to_numpy(self(step))) for step in shown], label=type(self).__name__)
        ax.set_xlabel("optimizer updates")
        return ax


def _share(step: Any, steps: float) -> Tensor:
    """How much of `steps` is over, from 0 to 1."""
    return ops.clip(Schedule.real(step) / steps, 0.0, 1.0)


def _line(share: Tensor, first: Any, last: Any) -> Tensor:
    return first + (last - first) * share


def _half_cosine(share: Tensor, first: Any, last: Any) -> Tensor:
    return last + (first - last) * (1 + ops.cos(np.pi * share)) / 2


_ANNEAL: dict[str, Callable[[Tensor, Any, Any], Tensor]] = {"cosine": _half_cosine, "linear": _line}

_CASES = (
    {"initial": 0.1, "steps": 100},
    {"initial": 0.1, "steps": 7, "final": 0.01},
    {"initial": 0, "steps": 1, "final": 1},
)


class _Between(Schedule):
    """A schedule that goes from one value to another in a number of updates."""

    def __init__(self, initial: float, steps: int, final: float = 0.0):
        self.initial = arguments.real("initial", initial, 0)
        self.steps = arguments.integer("steps", steps, 1)
        self.final = arguments.real("final", final, 0)


@register(
    "schedule",
    paper="torch LinearLR; Keras PolynomialDecay with power 1",
    parity="torch.optim.lr_scheduler.LinearLR",
    tags=("settles",),
    cases=_CASES,
)
class Linear(_Between):
    """A straight line from one value to another.

    ```text
    η_t = initial + (final - initial) t / T     for t < T,  final afterwards
    ```

    t is the number of updates made before, so the first update has `initial` and the one after T updates `final`.

    When not to use it: if the length of training is not known; T has to be known beforehand.

    Args:
        initial: Value at the first update.
        steps: T >= 1, the number of updates until `final` is reached.
        final: Value from then on.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    optimizer = keras.optimizers.SGD(ok.schedules.Linear(0.1, steps=1000))
    print(float(ok.schedules.Linear(0.1, steps=1000)(500)))  # 0.05
    ```
    """

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return _line(_share(step, self.steps), self.initial, self.final)


@register(
    "schedule",
    paper="Loshchilov and Hutter, arXiv 1608.03983, eq. 5 (one cycle, no restart)",
    parity="torch.optim.lr_scheduler.CosineAnnealingLR; keras.optimizers.schedules.CosineDecay",
    tags=("settles",),
    cases=_CASES,
)
class Cosine(_Between):
    """Half a cosine from one value to another: flat at both ends, steepest in the middle.

    ```text
    η_t = final + (initial - final) (1 + cos(π t / T)) / 2     for t < T,  final afterwards
    ```

    t is the number of updates made before. Keras's `CosineDecay(initial, T, alpha)` is the same curve with
    `final = alpha * initial`, computed in float32.

    When not to use it: if training may end early or be extended; the curve is right for its own T only.

    Args:
        initial: Value at the first update, the peak of a learning rate.
        steps: T >= 1, the number of updates until `final` is reached.
        final: Value from then on.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Warmup(ok.schedules.Cosine(0.1, steps=900, final=0.001), steps=100)
    print([round(float(schedule(step)), 4) for step in (0, 50, 100, 550, 1000)])
    ```
    """

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return _half_cosine(_share(step, self.steps), self.initial, self.final)


@register(
    "schedule",
    paper="Goyal et al., arXiv 1706.02677, section 2.2 (gradual warm-up)",
    parity="torch.optim.lr_scheduler.SequentialLR of LinearLR and the schedule",
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

    When not to use it: with plain SGD on a small network, where it only costs updates.

    Args:
        schedule: What follows: any Keras `LearningRateSchedule`, or a number.
        steps: T >= 1, the length of the warm-up in updates.
        start: Value at the first update.

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

    def __init__(self, schedule: LearningRateSchedule | float, steps: int, start: float = 0.0):
        if not isinstance(schedule, LearningRateSchedule):
            schedule = arguments.real("schedule", schedule, 0)
        self.schedule = schedule
        self.steps = arguments.integer("steps", steps, 1)
        self.start = arguments.real("start", start, 0)

    def _after(self, step: Any) -> Tensor:
        return self.real(self.schedule(step) if callable(self.schedule) else self.schedule)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        since = max(step - self.steps, 0) if isinstance(step, int) else ops.maximum(step - self.steps, 0)
        rising = _line(_share(step, self.steps), self.start, self._after(0))
        return ops.where(step < self.steps, rising, self._after(since))


@register(
    "schedule",
    paper="Smith and Topin, arXiv 1708.07120; phases as in torch",
    parity="torch.optim.lr_scheduler.OneCycleLR",
    tags=("settles",),
    cases=(
        {"peak": 0.1, "steps": 100},
        {"peak": 0.1, "steps": 101, "pct_start": 0.25, "anneal": "linear"},
        {"peak": 0.1, "steps": 60, "initial": 0.02, "final": 1e-3, "three_phase": True},
        {"peak": 0.85, "steps": 40, "initial": 0.95, "final": 0.95, "anneal": "linear", "three_phase": True},
    ),
)
class OneCycle(Schedule):
    """One rise to a peak and one fall far below the start, for a whole training run.

    ```text
    knots           (0, initial)  (p T - 1, peak)                        (T - 1, final)
    three phases    (0, initial)  (p T - 1, peak)  (2 p T - 2, initial)  (T - 1, final)
    ```

    Between two knots the value follows half a cosine or a straight line; p is `pct_start`. The knots are torch's: the
    T-th update, whose t is T - 1, is the one that has `final`. `torch.optim.lr_scheduler.OneCycleLR` with `div_factor`
    and `final_div_factor` has `initial = peak / div_factor` and `final = initial / final_div_factor`; the defaults here
    are torch's. The momentum that goes down while the rate goes up is `momentum(low, high)`.

    When not to use it: if the number of updates is not known beforehand, or training may be extended.

    Args:
        peak: The largest learning rate, best found with a learning rate range test.
        steps: T, the number of updates of the whole run.
        initial: Value at the first update; `peak / 25` when None.
        final: Value at the last update and afterwards; `initial / 10000` when None.
        pct_start: p in (0, 1), the share (not percentage) of the updates spent rising.
        anneal: `"cosine"` or `"linear"`.
        three_phase: Whether to come down to `initial` as fast as it rose, and only then to `final`.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, or if a phase would be empty.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss="mse")
    rate = ok.schedules.OneCycle(0.1, steps=20)
    cycle = ok.callbacks.ScheduleHyperparameters({"learning_rate": rate, "momentum": rate.momentum(0.85, 0.95)})
    model.fit(keras.ops.ones((40, 4)), keras.ops.ones((40, 1)), batch_size=2, callbacks=[cycle], verbose=0)
    ```
    """

    def __init__(
        self,
        peak: float,
        steps: int,
        initial: float | None = None,
        final: float | None = None,
        pct_start: float = 0.3,
        anneal: str = "cosine",
        three_phase: bool = False,
    ):
        self.peak = arguments.real("peak", peak, 0)
        self.steps = arguments.integer("steps", steps, 2)
        self.initial = arguments.real("initial", initial, 0, optional=True)
        self.final = arguments.real("final", final, 0, optional=True)
        self.pct_start = arguments.real("pct_start", pct_start, 0, 1, closed="neither")
        self.anneal = arguments.choice("anneal", anneal, tuple(_ANNEAL))
        self.three_phase = arguments.boolean("three_phase", three_phase)
        times, _ = self._knots()
        if any(end <= begin for begin, end in pairwise(times)):
            raise ValueError(
                f"pct_start={pct_start!r} of steps={steps!r} leaves a phase empty: they would end at updates "
                f"{', '.join(f'{t:g}' for t in times[1:])}, which must be above 0 and rising."
            )

    def _knots(self) -> tuple[list[float], list[float]]:
        initial = self.peak / 25 if self.initial is None else self.initial
        final = initial / 1e4 if self.final is None else self.final
        rise = self.pct_start * self.steps
        if self.three_phase:
            return [0.0, rise - 1, 2 * rise - 2, self.steps - 1.0], [initial, self.peak, initial, final]
        return [0.0, rise - 1, self.steps - 1.0], [initial, self.peak, final]

    def value(self, step: Any) -> Tensor:  # noqa: D102
        times, values = self._knots()
        t, between = self.real(step), _ANNEAL[self.anneal]
        result = None
        for (begin, end), (first, last) in reversed(list(zip(pairwise(times), pairwise(values), strict=True))):
            phase = between(_share(t - begin, end - begin), first, last)
            result = phase if result is None else ops.where(t <= end, phase, result)
        return result

    def momentum(self, low: float = 0.85, high: float = 0.95) -> OneCycle:
        """The cycle of the momentum (SGD) or β₁ (Adam) that belongs to this cycle of the learning rate.

        It falls from `high` to `low` while the rate rises, rises back while the rate falls, and in a third phase stays
        at `high`.
        """
        low = arguments.real("low", low, 0, 1, closed="left")
        high = arguments.real("high", high, low, 1, closed="left")
        return OneCycle(low, self.steps, high, high, self.pct_start, self.anneal, self.three_phase)

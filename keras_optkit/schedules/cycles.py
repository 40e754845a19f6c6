"""Schedules that rise and fall, once or again and again."""

from __future__ import annotations

from bisect import bisect
from itertools import pairwise
from typing import Any

import numpy as np
from keras import ops

from keras_optkit import arguments
from keras_optkit.registry import register
from keras_optkit.schedules import curves
from keras_optkit.schedules.schedule import Schedule, Tensor
from keras_optkit.space import Choice, Float

#: Restarts are counted up to here, the end of an int32.
_LAST = 2**31 - 1


@register(
    "schedule",
    paper="Loshchilov and Hutter, arXiv 1608.03983, eq. 5 (SGDR)",
    parity="torch.optim.lr_scheduler.CosineAnnealingWarmRestarts; Keras CosineDecayRestarts",
    tags=("epochs",),
    cases=(
        {"initial": 0.1, "steps": 10},
        {"initial": 0.1, "steps": 7, "final": 0.01, "t_mul": 1, "m_mul": 0.5},
        {"initial": 0.1, "steps": 1, "final": 0.02, "t_mul": 3},
    ),
    space={"initial": Float(1e-4, 1.0, log=True), "t_mul": Choice([1, 2]), "m_mul": Float(0.5, 1.0)},
)
class CosineRestarts(Schedule):
    """Half a cosine from one value to another, again and again, in periods that may become longer.

    ```text
    η_t = final + m_mul^n (initial - final) (1 + cos(π c / T_n)) / 2,     T_n = steps t_mul^n
    ```

    t is the number of updates made before, n the number of restarts until then, and c the number of updates since the
    last one. The value jumps up in the first update of a period and is never `final` itself. The arguments are those
    of Keras's `CosineDecayRestarts`, whose `alpha` is `final / initial`; torch's `T_0` and `T_mult` are `steps` and
    `t_mul`, which is 1 there by default.

    When to use it: if a run may end at one of several times, each the end of a period; for snapshots to be averaged.

    When not to use it: if the number of updates is known; one `Cosine` over all of them is usually better.

    Args:
        initial: Value at the first update, >= 0.
        steps: Number of updates of the first period, >= 1; with `steps_per_epoch`, of epochs.
        final: Value that each period ends at, >= 0.
        t_mul: Factor from each period's length to the next one's, an integer >= 1.
        m_mul: Factor from the height of each period over `final` to the next one's, in (0, 1].
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.CosineRestarts(0.1, steps=10, t_mul=2)
    print([round(float(schedule(step)), 4) for step in (0, 5, 9, 10, 20, 30)])  # restarts at 10 and 30
    ```
    """

    def __init__(
        self,
        initial: float,
        steps: int,
        final: float = 0.0,
        t_mul: int = 2,
        m_mul: float = 1.0,
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.initial = arguments.real("initial", initial, 0)
        self.steps = self._length("steps", steps)
        self.final = arguments.real("final", final, 0)
        self.t_mul = arguments.integer("t_mul", t_mul, 1)
        self.m_mul = arguments.real("m_mul", m_mul, 0, 1, closed="right")

    def _begins(self) -> list[int]:
        """The first updates of the periods, where these are of different lengths."""
        begins, length = [0], self._updates(self.steps)
        while begins[-1] + length < _LAST:
            begins.append(begins[-1] + length)
            length *= self.t_mul
        return begins

    def _period(self, step: Any) -> tuple[Any, Any, Any]:
        """How many restarts there were, the updates since the last one, and those of the present period.

        In whole numbers, since a logarithm may be off by one restart.
        """
        first = self._updates(self.steps)
        if self.t_mul == 1:
            return *curves.cycle(step, first), first
        begins = self._begins()
        lengths = [first * self.t_mul**n for n in range(len(begins))]
        if isinstance(step, int):
            n = bisect(begins, step) - 1
            return n, step - begins[n], lengths[n]
        step, known = ops.cast(step, "int"), ops.convert_to_tensor(begins, dtype="int")
        n = ops.sum(ops.cast(ops.expand_dims(step, -1) >= known, "int32"), axis=-1) - 1
        return n, step - ops.take(known, n), ops.take(self.real(np.array(lengths)), n)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        n, now, length = self._period(step)
        height = curves.power(self.m_mul, self.real(n)) * (self.initial - self.final)
        return curves.half_cosine(curves.share(now, length), self.final + height, self.final)


@register(
    "schedule",
    paper="Smith, arXiv 1506.01186, section 3",
    parity="torch.optim.lr_scheduler.CyclicLR",
    tags=("epochs",),
    cases=(
        {"initial": 0.01, "peak": 0.1, "steps": 10},
        {"initial": 0.01, "peak": 0.1, "steps": 4, "steps_down": 3, "mode": "triangular2"},
        {"initial": 0.95, "peak": 0.85, "steps": 5, "mode": "exp_range", "gamma": 0.9},
    ),
    space={"peak": Float(1e-3, 1.0, log=True), "mode": Choice(["triangular", "triangular2"])},
)
class Cyclic(Schedule):
    """Up a straight line and down again, over and over.

    ```text
    η_t = initial + (peak - initial) h s     h: 0 to 1 in S_up updates and back to 0 in S_down
    s = 1  ("triangular"),     s = 2^(-n)  ("triangular2"),     s = gamma^t  ("exp_range")
    ```

    t is the number of updates made before and n the number of cycles that are over. The momentum that falls while the
    rate rises is a `Cyclic` with the same lengths, from the high value to the low one. `steps` is the `step_size` of
    TensorFlow Addons, and torch's `step_size_up`.

    When to use it: to visit large and small rates by turns, where the best one is not known.

    When not to use it: if the number of updates is known; `OneCycle` or `Cosine` end at a small rate.

    Args:
        initial: Value at the ends of a cycle, >= 0.
        peak: Value in between, >= 0.
        steps: S_up >= 1, the number of updates from `initial` to `peak`; with `steps_per_epoch`, of epochs.
        steps_down: S_down >= 1, the number of updates back, in the same unit; None for `steps`.
        mode: `"triangular"`, `"triangular2"` or `"exp_range"`.
        gamma: Factor of `"exp_range"` for each update, in (0, 1].
        steps_per_epoch: Updates in an epoch, >= 1, if lengths are in epochs, which may then be fractions.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Cyclic(0.01, 0.1, steps=50, mode="triangular2")
    momentum = ok.schedules.Cyclic(0.95, 0.85, steps=50)
    print([round(float(schedule(step)), 4) for step in (0, 50, 100, 150)])  # the second peak is half as high
    ```
    """

    lengths = ("steps", "steps_down")

    def __init__(
        self,
        initial: float,
        peak: float,
        steps: int,
        steps_down: int | None = None,
        mode: str = "triangular",
        gamma: float = 1.0,
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.initial = arguments.real("initial", initial, 0)
        self.peak = arguments.real("peak", peak, 0)
        self.steps = self._length("steps", steps)
        self.steps_down = None if steps_down is None else self._length("steps_down", steps_down)
        self.mode = arguments.choice("mode", mode, ("triangular", "triangular2", "exp_range"))
        self.gamma = arguments.real("gamma", gamma, 0, 1, closed="right")

    def value(self, step: Any) -> Tensor:  # noqa: D102
        up = self._updates(self.steps)
        down = up if self.steps_down is None else self._updates(self.steps_down)
        n, now = curves.cycle(step, up + down)
        height = ops.where(now < up, curves.share(now, up), 1 - curves.share(curves.since(now, up), down))
        if self.mode == "triangular2":
            height = height * curves.power(0.5, self.real(n))
        elif self.mode == "exp_range":
            height = height * curves.power(self.gamma, self.real(step))
        return curves.line(height, self.initial, self.peak)


@register(
    "schedule",
    paper="Smith and Topin, arXiv 1708.07120; phases as in torch",
    parity="torch.optim.lr_scheduler.OneCycleLR",
    tags=("epochs", "settles"),
    cases=(
        {"peak": 0.1, "steps": 100},
        {"peak": 0.1, "steps": 101, "pct_start": 0.25, "anneal": "linear"},
        {"peak": 0.1, "steps": 60, "initial": 0.02, "final": 1e-3, "three_phase": True},
        {"peak": 0.85, "steps": 40, "initial": 0.95, "final": 0.95, "anneal": "linear", "three_phase": True},
    ),
    space={"peak": Float(1e-4, 1.0, log=True), "pct_start": Float(0.1, 0.45)},
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

    When to use it: for short runs with a large rate in the middle, in which the first and last updates must be small.

    When not to use it: if the number of updates is not known beforehand, or training may be extended.

    Args:
        peak: The largest learning rate, best found with a learning rate range test.
        steps: T >= 2, the number of updates of the whole run; with `steps_per_epoch`, of epochs.
        initial: Value at the first update; `peak / 25` when None.
        final: Value at the last update and afterwards; `initial / 10000` when None.
        pct_start: p in (0, 1), the share (not percentage) of the updates spent rising.
        anneal: `"cosine"` or `"linear"`.
        three_phase: Whether to come down to `initial` as fast as it rose, and only then to `final`.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

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
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.peak = arguments.real("peak", peak, 0)
        self.steps = self._length("steps", steps, 2)
        self.initial = arguments.real("initial", initial, 0, optional=True)
        self.final = arguments.real("final", final, 0, optional=True)
        self.pct_start = arguments.real("pct_start", pct_start, 0, 1, closed="neither")
        self.anneal = arguments.choice("anneal", anneal, ("cosine", "linear"))
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
        steps = self._updates(self.steps)
        rise = self.pct_start * steps
        if self.three_phase:
            return [0.0, rise - 1, 2 * rise - 2, steps - 1.0], [initial, self.peak, initial, final]
        return [0.0, rise - 1, steps - 1.0], [initial, self.peak, final]

    def value(self, step: Any) -> Tensor:  # noqa: D102
        times, values = self._knots()
        t, between = self.real(step), curves.ANNEAL[self.anneal]
        result = None
        for (begin, end), (first, last) in reversed(list(zip(pairwise(times), pairwise(values), strict=True))):
            phase = between(curves.share(t - begin, end - begin), first, last)
            result = phase if result is None else ops.where(t <= end, phase, result)
        return result

    def momentum(self, low: float = 0.85, high: float = 0.95) -> OneCycle:
        """The cycle of the momentum (SGD) or β₁ (Adam) that belongs to this cycle of the learning rate.

        It falls from `high` to `low` while the rate rises, rises back while the rate falls, and in a third phase stays
        at `high`.
        """
        low = arguments.real("low", low, 0, 1, closed="left")
        high = arguments.real("high", high, low, 1, closed="left")
        return OneCycle(
            low, self.steps, high, high, self.pct_start, self.anneal, self.three_phase, self.steps_per_epoch
        )

"""Schedules that go one way: from one value to another, or down for as long as training lasts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from keras import ops

from keras_optkit import arguments
from keras_optkit.registry import register
from keras_optkit.schedules import curves
from keras_optkit.schedules.schedule import Schedule, Tensor
from keras_optkit.space import Float

_CASES = (
    {"initial": 0.1, "steps": 100},
    {"initial": 0.1, "steps": 7, "final": 0.01},
    {"initial": 0, "steps": 1, "final": 1},
)
_INITIAL = {"initial": Float(1e-5, 1.0, log=True)}


class _Between(Schedule):
    """A schedule that goes from one value to another in a number of updates."""

    def __init__(self, initial: float, steps: int, final: float = 0.0, steps_per_epoch: int | None = None):
        self._set_epochs(steps_per_epoch)
        self.initial = arguments.real("initial", initial, 0)
        self.steps = self._length("steps", steps)
        self.final = arguments.real("final", final, 0)

    def _share(self, step: Any) -> Tensor:
        return curves.share(step, self._updates(self.steps))


@register(
    "schedule",
    paper="torch LinearLR; Keras PolynomialDecay with power 1",
    parity="torch.optim.lr_scheduler.LinearLR; optax.linear_schedule",
    tags=("ends", "epochs", "monotone", "settles"),
    cases=_CASES,
    space=_INITIAL,
)
class Linear(_Between):
    """A straight line from one value to another.

    ```text
    η_t = initial + (final - initial) t / T     for t < T,  final afterwards
    ```

    t is the number of updates made before, so the first update has `initial` and the one after T updates `final`.

    When to use it: to end at 0 after a known number of updates; for a hyperparameter that is to rise, such as dropout.

    When not to use it: if the length of training is not known; T has to be known beforehand.

    Args:
        initial: Value at the first update, >= 0.
        steps: T >= 1, the number of updates until `final` is reached; with `steps_per_epoch`, of epochs.
        final: Value from then on, >= 0.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    optimizer = keras.optimizers.SGD(ok.schedules.Linear(0.1, steps=1000))
    print(float(ok.schedules.Linear(0.1, steps=1000)(500)))  # 0.05
    print(float(ok.schedules.Linear(0.1, steps=10, steps_per_epoch=100)(500)))  # the same: 10 epochs of 100 updates
    ```
    """

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return curves.line(self._share(step), self.initial, self.final)


@register(
    "schedule",
    paper="Loshchilov and Hutter, arXiv 1608.03983, eq. 5 (one cycle, no restart)",
    parity="torch.optim.lr_scheduler.CosineAnnealingLR; optax.cosine_decay_schedule; Keras CosineDecay",
    tags=("ends", "epochs", "monotone", "settles"),
    cases=_CASES,
    space=_INITIAL,
)
class Cosine(_Between):
    """Half a cosine from one value to another: flat at both ends, steepest in the middle.

    ```text
    η_t = final + (initial - final) (1 + cos(π t / T)) / 2     for t < T,  final afterwards
    ```

    t is the number of updates made before. Keras's `CosineDecay(initial, T, alpha)` is the same curve with
    `final = alpha * initial`, computed in float32.

    When to use it: as the default for a known number of updates, usually behind a `Warmup`.

    When not to use it: if training may end early or be extended; the curve is right for its own T only.

    Args:
        initial: Value at the first update, the peak of a learning rate, >= 0.
        steps: T >= 1, the number of updates until `final` is reached; with `steps_per_epoch`, of epochs.
        final: Value from then on, >= 0.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

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
        return curves.half_cosine(self._share(step), self.initial, self.final)


@register(
    "schedule",
    paper="torch PolynomialLR; Keras PolynomialDecay",
    parity="torch.optim.lr_scheduler.PolynomialLR; optax.polynomial_schedule; Keras PolynomialDecay",
    tags=("ends", "epochs", "monotone", "settles"),
    cases=({"initial": 0.1, "steps": 100}, {"initial": 0.1, "steps": 7, "final": 0.2, "power": 0.5}),
    space=_INITIAL | {"power": Float(0.5, 3.0)},
)
class Polynomial(_Between):
    """A power of the share of updates that is left.

    ```text
    η_t = final + (initial - final) (1 - t / T)^power     for t < T,  final afterwards
    ```

    t is the number of updates made before. With `power=1` it is `Linear`; above 1 it is steep at first and flat at the
    end, below 1 the other way round. The default of Keras, torch and many papers is another one, so give `power` where
    you reproduce them: 1 in Keras and torch, 0.9 in much work on segmentation.

    When to use it: where the recipe that you follow has it.

    When not to use it: if the length of training is not known; T has to be known beforehand.

    Args:
        initial: Value at the first update, >= 0.
        steps: T >= 1, the number of updates until `final` is reached; with `steps_per_epoch`, of epochs.
        final: Value from then on, >= 0.
        power: The exponent, > 0.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Polynomial(0.1, steps=100, power=2.0)
    print(float(schedule(50)))  # a quarter of 0.1
    ```
    """

    def __init__(
        self,
        initial: float,
        steps: int,
        final: float = 0.0,
        power: float = 2.0,
        steps_per_epoch: int | None = None,
    ):
        super().__init__(initial, steps, final, steps_per_epoch)
        self.power = arguments.real("power", power, 0, closed="neither")

    def value(self, step: Any) -> Tensor:  # noqa: D102
        left = ops.power(1 - self._share(step), self.real(self.power))
        return curves.line(left, self.final, self.initial)


@register(
    "schedule",
    paper="Chen, Wolfe and Kyrillidis, arXiv 2107.04197 (reflected exponential)",
    parity="pytorch_optimizer.REXScheduler, but for its first update, which has its `min_lr`",
    tags=("ends", "epochs", "monotone", "settles"),
    cases=_CASES,
    space=_INITIAL,
)
class REX(_Between):
    """A high rate for most of the run and a fast fall at its end.

    ```text
    η_t = final + (initial - final) (1 - z) / (1/2 + (1 - z)/2),   z = t / T     for t < T,  final afterwards
    ```

    t is the number of updates made before. Halfway through it is at two thirds, where `Linear` and `Cosine` are at one
    half.

    When to use it: for a small, fixed budget of updates, the case it was proposed for.

    When not to use it: if the length of training is not known; T has to be known beforehand.

    Args:
        initial: Value at the first update, >= 0.
        steps: T >= 1, the number of updates until `final` is reached; with `steps_per_epoch`, of epochs.
        final: Value from then on, >= 0.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.REX(0.3, steps=100)
    print(round(float(schedule(50)), 6))  # 0.2
    ```
    """

    def value(self, step: Any) -> Tensor:  # noqa: D102
        left = 1 - self._share(step)
        return curves.line(left / (0.5 + left / 2), self.final, self.initial)


class _Decaying(Schedule):
    """A schedule that multiplies by the same factor again and again."""

    def __init__(
        self,
        initial: float,
        steps: int,
        decay_rate: float,
        final: float = 0.0,
        steps_per_epoch: int | None = None,
    ):
        self._set_epochs(steps_per_epoch)
        self.initial = arguments.real("initial", initial, 0)
        self.steps = self._length("steps", steps)
        self.decay_rate = arguments.real("decay_rate", decay_rate, 0, 1, closed="right")
        self.final = arguments.real("final", final, 0)
        if final > initial:
            raise ValueError(f"final must be at most initial={initial!r}, got {final!r}.")

    def _decayed(self, exponent: Tensor) -> Tensor:
        return ops.maximum(self.initial * curves.power(self.decay_rate, exponent), self.real(self.final))


@register(
    "schedule",
    paper="Keras ExponentialDecay; torch ExponentialLR",
    parity="torch.optim.lr_scheduler.ExponentialLR; optax.exponential_decay; Keras ExponentialDecay",
    tags=("epochs", "monotone"),
    cases=(
        {"initial": 0.1, "steps": 100, "decay_rate": 0.5},
        {"initial": 0.1, "steps": 7, "decay_rate": 0.9, "final": 0.01},
    ),
    space=_INITIAL | {"decay_rate": Float(0.5, 0.99)},
)
class Exponential(_Decaying):
    """The same factor in every update.

    ```text
    η_t = max(initial decay_rate^(t / S), final)
    ```

    t is the number of updates made before and S is `steps`. For the same factor in jumps, see `Step`.

    When to use it: if the length of training is not known, and the rate should fall all the time.

    When not to use it: if the length is known; a schedule that ends there usually does better.

    Args:
        initial: Value at the first update, >= 0.
        steps: S >= 1, the number of updates that together multiply by `decay_rate`; with `steps_per_epoch`, of epochs.
        decay_rate: Factor for S updates, in (0, 1].
        final: The value does not fall below this; in [0, initial].
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Exponential(0.1, steps=100, decay_rate=0.25)
    print(round(float(schedule(50)), 6))  # 0.05
    ```
    """

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return self._decayed(self.real(step) / self._updates(self.steps))


@register(
    "schedule",
    paper="He et al., arXiv 1512.03385, section 3.4 (the rate is divided by 10); torch StepLR",
    parity="torch.optim.lr_scheduler.StepLR; optax.exponential_decay(staircase=True)",
    tags=("epochs", "monotone"),
    cases=(
        {"initial": 0.1, "steps": 30},
        {"initial": 0.1, "steps": 7, "decay_rate": 0.5, "final": 0.01},
    ),
    space=_INITIAL | {"decay_rate": Float(0.1, 0.5)},
)
class Step(_Decaying):
    """A factor every so many updates, and constant in between.

    ```text
    η_t = max(initial decay_rate^floor(t / S), final)
    ```

    t is the number of updates made before and S is `steps`, so update number S is the first with the lower value. For
    jumps at updates of your choice, see `Piecewise`.

    When to use it: to reproduce a recipe that lowers the rate every so many epochs, with `steps_per_epoch`.

    When not to use it: in new work with a known number of updates; `Cosine` has no time of its jumps to be tuned.

    Args:
        initial: Value at the first update, >= 0.
        steps: S >= 1, the number of updates between two jumps; with `steps_per_epoch`, of epochs.
        decay_rate: Factor of a jump, in (0, 1].
        final: The value does not fall below this; in [0, initial].
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Step(0.1, steps=30, decay_rate=0.1, steps_per_epoch=50)  # every 30 epochs
    print([round(float(schedule(30 * 50 * k)), 6) for k in range(3)])
    ```
    """

    def __init__(
        self,
        initial: float,
        steps: int,
        decay_rate: float = 0.1,
        final: float = 0.0,
        steps_per_epoch: int | None = None,
    ):
        super().__init__(initial, steps, decay_rate, final, steps_per_epoch)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        jumps, _ = curves.cycle(step, self._updates(self.steps))
        return self._decayed(self.real(jumps))


@register(
    "schedule",
    paper="torch MultiStepLR; Keras PiecewiseConstantDecay, which jumps one update later",
    parity="torch.optim.lr_scheduler.MultiStepLR; optax.piecewise_constant_schedule",
    tags=("epochs", "settles"),
    cases=({"boundaries": [3, 8], "values": [0.1, 0.02, 0.05]}, {"boundaries": [1], "values": [0, 1]}),
)
class Piecewise(Schedule):
    """One value after the other, each from an update of your choice.

    ```text
    η_t = values[i]     with i the number of boundaries that are <= t
    ```

    t is the number of updates made before, so after `boundaries[0]` updates the next one has `values[1]`, as in torch
    and optax. Keras's `PiecewiseConstantDecay` has the old value for this update, and jumps one update later.

    When to use it: to reproduce a recipe with jumps at fixed epochs, with `steps_per_epoch`.

    When not to use it: in new work with a known number of updates; `Cosine` has no time of its jumps to be tuned. For
    schedules instead of numbers, use `Sequence`.

    Args:
        boundaries: The updates at which the value changes, rising, >= 1; with `steps_per_epoch`, epochs.
        values: The values, >= 0, one more than there are boundaries.
        steps_per_epoch: Updates in an epoch, >= 1, if `boundaries` are in epochs, which may then be fractions.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, boundaries that do not rise, or another number of values.

    Example:
    ```python
    import keras_optkit as ok

    schedule = ok.schedules.Piecewise([100, 150], [0.1, 0.01, 0.001])
    print([float(schedule(step)) for step in (99, 100, 150)])
    ```
    """

    lengths = ("boundaries",)

    def __init__(self, boundaries: Sequence[int], values: Sequence[float], steps_per_epoch: int | None = None):
        self._set_epochs(steps_per_epoch)
        self.boundaries = self._boundaries("boundaries", boundaries)
        if not isinstance(values, list | tuple):
            raise TypeError(f"values must be a list of numbers, got {values!r} of type {type(values).__name__}.")
        self.values = [arguments.real(f"values[{i}]", value, 0) for i, value in enumerate(values)]
        if len(self.values) != len(self.boundaries) + 1:
            raise ValueError(
                f"values must have one entry more than the {len(self.boundaries)} boundaries, got {len(self.values)}."
            )

    def value(self, step: Any) -> Tensor:  # noqa: D102
        value = self.real(self.values[0])
        for boundary, later in zip(self.boundaries, self.values[1:], strict=True):
            value = ops.where(step < self._updates(boundary), value, self.real(later))
        return value


@register(
    "schedule",
    paper="Vaswani et al., arXiv 1706.03762, eq. 3, behind its warm-up",
    parity="the formula of the paper",
    tags=("epochs", "monotone"),
    cases=({"initial": 0.1, "steps": 100}, {"initial": 0.1, "steps": 7}),
    space=_INITIAL,
)
class InverseSquareRoot(Schedule):
    """Falls with the inverse square root of the number of updates, without an end.

    ```text
    η_t = initial / sqrt(1 + t / S)
    ```

    t is the number of updates made before and S is `steps`. The schedule of the Transformer, which rises in S updates
    to `peak` and has `peak sqrt(S / t)` afterwards, is `Warmup(InverseSquareRoot(peak, S), S)`.

    When to use it: if the length of training is not known; for sparse features and long runs.

    When not to use it: if the length is known; a schedule that ends near 0 usually does better. `WarmupStableDecay`
    can be decided to end at any time.

    Args:
        initial: Value at the first update, >= 0.
        steps: S >= 1, the time scale: after 3 S updates the value has halved. With `steps_per_epoch`, in epochs.
        steps_per_epoch: Updates in an epoch, >= 1, if `steps` is in epochs, which may then be a fraction.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range.

    Example:
    ```python
    import keras_optkit as ok

    rate = ok.schedules.Warmup(ok.schedules.InverseSquareRoot(1e-3, steps=4000), steps=4000)
    print(float(rate(4000)), float(rate(16000)))  # 0.001 0.0005
    ```
    """

    def __init__(self, initial: float, steps: int, steps_per_epoch: int | None = None):
        self._set_epochs(steps_per_epoch)
        self.initial = arguments.real("initial", initial, 0)
        self.steps = self._length("steps", steps)

    def value(self, step: Any) -> Tensor:  # noqa: D102
        return self.initial / ops.sqrt(1 + self.real(step) / self._updates(self.steps))

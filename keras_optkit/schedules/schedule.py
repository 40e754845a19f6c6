"""The base of schedules."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments
from keras_optkit.saving import FromSignature, constructor_parameters
from keras_optkit.schedules import curves

Tensor = Any


class Schedule(FromSignature, LearningRateSchedule):
    """Base class of schedules: a function of the number of optimizer updates made so far.

    A subclass stores its constructor's arguments under their own names, which are its config too, and computes the
    schedule in `value`. It works wherever Keras takes a `LearningRateSchedule`, and in
    `ok.callbacks.ScheduleHyperparameters` for any hyperparameter.

    Values are float64 (on JAX without `jax_enable_x64` float32), so that steps beyond 2^24 are still told apart;
    optimizers cast them to the dtype of each variable. Keras's Muon does not: drive its `learning_rate` with
    `ScheduleHyperparameters` instead.

    Attributes:
        lengths: Names of the arguments that are numbers of updates, or of epochs where `steps_per_epoch` is given.
        steps_per_epoch: The number of updates in an epoch; None where lengths are in updates.

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

    lengths: ClassVar[tuple[str, ...]] = ("steps",)
    steps_per_epoch: int | None = None

    def __call__(self, step: Any) -> Tensor:
        """The value for update number `step`, counted from 0; a negative one counts as 0.

        Args:
            step: An int, a NumPy integer, or an integer tensor or variable, of any shape.

        Returns:
            A tensor of the shape of `step`.

        Raises:
            TypeError: If `step` is a string, None or another object that is not a number.
        """
        if step is None or isinstance(step, str | bytes | Mapping | LearningRateSchedule):
            raise TypeError(f"step must be a number of updates, got {step!r} of type {type(step).__name__}.")
        step = int(step) if isinstance(step, Integral) else ops.convert_to_tensor(step)
        return self.real(self.value(curves.since(step, 0)))

    def value(self, step: Any) -> Tensor:
        """The formula; `step` is an int or an integer tensor, at least 0."""
        raise NotImplementedError(f"{type(self).__name__} must define value(step).")

    def __repr__(self) -> str:
        """The call that makes this schedule; arguments that have their defaults are left out."""
        known = constructor_parameters(type(self))
        given = {name: getattr(self, name) for name in known}
        shown = [f"{name}={value!r}" for name, value in given.items() if not _is(value, known[name].default)]
        return f"{type(self).__name__}({', '.join(shown)})"

    @staticmethod
    def real(x: Any) -> Tensor:
        """`x` as a tensor of the dtype that schedules compute in."""
        return curves.real(x)

    def plot(self, steps: int, ax: Any = None) -> Any:
        """Draws the values for updates 0 to `steps`. Needs matplotlib.

        Args:
            steps: The last update to draw, at least 1.
            ax: Matplotlib axes to draw on; new ones when left out.

        Returns:
            The axes.

        Raises:
            ImportError: Without matplotlib.
        """
        shown = np.unique(np.linspace(0, arguments.integer("steps", steps, 1), 500).astype(int))
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(f"{type(self).__name__}.plot needs matplotlib: pip install matplotlib") from error
        ax = ax or plt.subplots()[1]
        ax.plot(shown, [float(ops.convert_to_numpy(self(step))) for step in shown], label=type(self).__name__)
        ax.set_xlabel("optimizer updates")
        return ax

    def _set_epochs(self, steps_per_epoch: int | None) -> None:
        """Sets the unit of lengths, before `_length` checks them."""
        self.steps_per_epoch = arguments.integer("steps_per_epoch", steps_per_epoch, 1, optional=True)

    def _length(self, name: str, value: Any, low: int = 1) -> Any:
        """Returns `value` if it is a length of at least `low` updates, in the unit of this schedule."""
        if self.steps_per_epoch is None:
            return arguments.integer(name, value, low)
        value = arguments.real(name, value, 0)
        if self._updates(value) < low:
            raise ValueError(
                f"{name} must be at least {low} update{'s' * (low != 1)}, got {value!r} epochs of "
                f"steps_per_epoch={self.steps_per_epoch} updates, which is {self._updates(value)}."
            )
        return value

    def _boundaries(self, name: str, values: Any) -> list[Any]:
        """Returns the places of changes, in the unit of this schedule, if there are any and they rise."""
        if not isinstance(values, list | tuple):
            raise TypeError(f"{name} must be a list of lengths, got {values!r} of type {type(values).__name__}.")
        checked = [self._length(f"{name}[{i}]", value) for i, value in enumerate(values)]
        updates = [self._updates(value) for value in checked]
        if not updates or any(later <= sooner for sooner, later in pairwise(updates)):
            raise ValueError(f"{name} must be a list of at least one length, each above the last, got {values!r}.")
        return checked

    def _updates(self, length: Any) -> int:
        """A length in updates."""
        return length if self.steps_per_epoch is None else round(length * self.steps_per_epoch)


def _is(value: Any, default: Any) -> bool:
    """Whether an argument has its default; arrays, which have none, are compared in no way."""
    return value is default or (isinstance(value, bool | int | float | str) and value == default)


def schedule_or_number(name: str, value: Any, low: float = 0) -> Any:
    """Returns `value` if it is a schedule, or a finite number of at least `low`."""
    if isinstance(value, LearningRateSchedule):
        return value
    if isinstance(value, bool | int | float | np.number):
        return arguments.real(name, value, low)
    raise TypeError(
        f"{name} must be a LearningRateSchedule or a finite number, got {value!r} of type {type(value).__name__}."
    )


def value_of(schedule: Any, step: Any) -> Tensor:
    """The value of a schedule, ours or Keras's, or a number."""
    return curves.real(schedule(step) if isinstance(schedule, LearningRateSchedule) else schedule)

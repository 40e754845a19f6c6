"""The learning rate: a number, a schedule with a factor on it, or a function without arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit import arguments
from keras_optkit.optimizers.rule import Tensor, is_dynamic
from keras_optkit.precision import scalar_dtype


class OfFunction(Schedule):
    """A learning rate that is a function without arguments, as a schedule that does not look at the update count."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def __call__(self, step: Any) -> Any:
        return self.function()


def scaled_rate(scheduled: Tensor, multiplier: Tensor) -> Tensor:
    """The rate of a schedule; a negative multiplier is the negative of a rate that has replaced the schedule."""
    return ops.where(multiplier < 0, -multiplier, ops.cast(scheduled, scalar_dtype()) * multiplier)


def is_schedule(value: Any) -> bool:
    """Whether a learning rate is a schedule or a function."""
    return isinstance(value, Schedule) or (callable(value) and not is_dynamic(value))


def schedule_and_multiplier(learning_rate: Any) -> tuple[Schedule | None, float]:
    """The argument `learning_rate` as a schedule, if it is one or a function, and the factor on it, or the number."""
    if isinstance(learning_rate, Schedule):
        return learning_rate, 1.0
    if is_schedule(learning_rate):
        arguments.without_arguments("learning_rate", learning_rate)
        return OfFunction(learning_rate), 1.0
    try:
        return None, arguments.real("learning_rate", learning_rate, 0)
    except TypeError:
        raise TypeError(
            "learning_rate must be a number >= 0, a keras LearningRateSchedule or a function without arguments, got "
            f"{learning_rate!r} of type {type(learning_rate).__name__}."
        ) from None

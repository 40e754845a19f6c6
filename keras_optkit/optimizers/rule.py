"""The contract of an update rule: a frozen dataclass of hyperparameters with pure methods, and no variables.

A rule sees tensors with a leading axis, `(k, *shape)`: k parameters of one shape are updated as one tensor. What is
computed "per parameter" is therefore reduced over all axes but the first, and matrix products batch for free. An
element-wise rule may also be handed many parameters of any shapes, flattened into one `(1, n)` tensor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit import arguments
from keras_optkit.precision import scalar_dtype

Tensor = Any
Slots = dict[str, Tensor]
#: A hyperparameter: a number, a schedule of the update count, or a scalar variable.
Value = Any
#: The initial value of a slot: a number that fills it, or a function of the parameters `(k, *shape)`.
Initial = float | Callable[[Tensor], Tensor]


def is_dynamic(value: Value) -> bool:
    """Whether a hyperparameter is known only inside the step."""
    return isinstance(value, Schedule | keras.Variable)


def number(default: float, low: float = 0.0, high: float = float("inf"), closed: str = "both") -> Any:
    """Declares a field that holds a real number in an interval, a schedule of it, or a scalar variable."""

    def check(name: str, value: Value) -> Value:
        return value if is_dynamic(value) else arguments.real(name, value, low, high, closed=closed)

    return dataclasses.field(default=default, metadata={"check": check})


def flag(default: bool) -> Any:
    """Declares a field that is True or False."""
    return dataclasses.field(default=default, metadata={"check": arguments.boolean})


class Hyper:
    """What a rule is told about the present step, in the dtype that it computes in.

    Attributes:
        step: t, the number of this update, counted from 1.
        learning_rate: The learning rate of this update, which the rule multiplies into its result.
    """

    def __init__(self, iterations: Tensor, learning_rate: Tensor, dtype: str, memo: dict[Any, Tensor] | None = None):
        self._iterations = iterations
        self._dtype = dtype
        self._memo = {} if memo is None else memo
        self.step = ops.cast(iterations + 1, scalar_dtype())
        self.learning_rate = ops.cast(learning_rate, dtype)

    def __call__(self, value: Value) -> Any:
        """The present value of a hyperparameter: numbers stay Python numbers, schedules are read at this step."""
        return ops.cast(self._exact(value), self._dtype) if is_dynamic(value) else value

    def bias_correction(self, beta: Value) -> Tensor:
        """`1 - beta**t`, without the cancellation that costs float32 half of its digits when beta is near 1.

        Where beta is a schedule its present value is taken for all steps, as torch and optax do.
        """
        key = id(beta) if is_dynamic(beta) else beta
        if key not in self._memo:
            decay = ops.convert_to_tensor(self._exact(beta), dtype=scalar_dtype())
            self._memo[key] = -ops.expm1(self.step * ops.log(decay))
        return ops.cast(self._memo[key], self._dtype)

    def _exact(self, value: Value) -> Any:
        if isinstance(value, Schedule):
            return ops.cast(value(self._iterations), scalar_dtype())
        return ops.cast(value, scalar_dtype()) if is_dynamic(value) else value


@dataclass(frozen=True)
class Rule:
    """Base of the update rules.

    Subclasses are frozen dataclasses whose fields, made with `number` and `flag`, are the hyperparameters; each is
    checked when the rule is made. `elementwise` says that every number is updated on its own.
    """

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check")
            if check is not None:
                object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    def slots(self) -> Mapping[str, Initial]:
        """Names and initial values of the state kept for every parameter."""
        return {}

    def update(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
        """Turns the gradient `u` into the step that is subtracted from the parameters `p`, and the slots into new ones.

        Args:
            u: Gradients, `(k, *shape)`, reduced over replicas, accumulated and clipped.
            slots: One tensor for each name in `slots()`.
            p: The parameters before the step, `(k, *shape)`.
            h: Step count, learning rate and the present values of hyperparameters.

        Returns:
            The step, with the learning rate in it, and the new slots under the same names.
        """
        raise NotImplementedError

"""The contract of an update rule: a frozen dataclass of hyperparameters with pure methods, and no variables.

A rule sees tensors with a leading axis, `(k, *shape)`: k parameters of one shape are updated as one tensor. What is
computed "per parameter" is therefore reduced over all axes but the first, and matrix products batch for free. An
element-wise rule is handed tensors of any shape: many parameters flattened into one `(1, n)`, or one as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import math
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
#: The initial value of a slot: a number that fills it, or a function of the parameters `(k, *shape)`, which is computed
#: in their first update.
Initial = float | Callable[[Tensor], Tensor]


def is_dynamic(value: Value) -> bool:
    """Whether a hyperparameter is known only inside the step."""
    return isinstance(value, Schedule | keras.Variable)


def number(
    default: float, low: float = 0.0, high: float = float("inf"), closed: str = "both", *, fixed: bool = False
) -> Any:
    """Declares a field that holds a real number in an interval, a schedule of it, or a scalar variable.

    With `fixed` it holds a number alone: one that state begins with, or that weights are recovered with.
    """

    def check(name: str, value: Value) -> Value:
        return value if is_dynamic(value) and not fixed else arguments.real(name, value, low, high, closed=closed)

    return dataclasses.field(default=default, metadata={"check": check})


def flag(default: bool) -> Any:
    """Declares a field that is True or False."""
    return dataclasses.field(default=default, metadata={"check": arguments.boolean})


class Hyper:
    """What a rule is told about the present step, in the dtype that it computes in.

    Attributes:
        step: t, the number of this update for these parameters, counted from 1.
        learning_rate: The learning rate of this update for these parameters, which the rule multiplies into its result.
        weight_decay: λ of this update for these parameters, 0 where there is none. Only a rule that says
            `handles_decay` has to look at it.
        decays: Whether there is a decay.
        scalars: The rule's state for the whole model, as `measure` has left it.
    """

    def __init__(
        self,
        iterations: Tensor,
        learning_rate: Tensor,
        dtype: str,
        *,
        weight_decay: Any = 0.0,
        scalars: Mapping[str, Tensor] | None = None,
        memo: dict[Any, Tensor] | None = None,
        since: int = 0,
    ):
        self._iterations = iterations
        self._dtype = dtype
        self._memo = {} if memo is None else memo
        self._since = since
        self.step = ops.cast(iterations + (1 - since), scalar_dtype())
        self.learning_rate = ops.cast(learning_rate, dtype)
        self.weight_decay = self(weight_decay)
        self.decays = is_dynamic(weight_decay) or bool(weight_decay)
        self.scalars = dict(scalars or {})

    def __call__(self, value: Value) -> Any:
        """The present value of a hyperparameter: numbers stay Python numbers, schedules are read at this step."""
        return ops.cast(self.exact(value), self._dtype) if is_dynamic(value) else value

    def at_rate(self, learning_rate: Tensor) -> Hyper:
        """The same step with another learning rate, for a rule inside of a rule."""
        other = copy.copy(self)
        other.learning_rate = learning_rate
        return other

    def scalar(self, name: str) -> Tensor:
        """One of the rule's scalars in the dtype of the computation."""
        return ops.cast(self.scalars[name], self._dtype)

    def bias_correction(self, beta: Value) -> Tensor:
        """`1 - beta**t`, without the cancellation that costs float32 half of its digits when beta is near 1.

        Where beta is a schedule its present value is taken for all steps, as torch and optax do.
        """
        key = ("correction", self._since, id(beta) if is_dynamic(beta) else beta)
        if key not in self._memo:
            self._memo[key] = -ops.expm1(self.step * self._log(beta))
        return ops.cast(self._memo[key], self._dtype)

    def _log(self, beta: Value) -> Any:
        if is_dynamic(beta):
            return ops.log(self.exact(beta))
        return math.log(beta) if beta else -math.inf  # of 0.999 in float32, as on JAX, it would have 5 digits

    def exact(self, value: Value) -> Any:
        """The present value in the dtype for scalars; schedules are read once in a step."""
        if not is_dynamic(value):
            return value
        key = ("value", id(value))
        if key not in self._memo:
            present = value(self._iterations) if isinstance(value, Schedule) else value
            self._memo[key] = ops.cast(present, scalar_dtype())
        return self._memo[key]


@dataclass(frozen=True)
class Rule:
    """Base of the update rules.

    Subclasses are frozen dataclasses whose fields, made with `number` and `flag`, are the hyperparameters; each is
    checked when the rule is made.

    Attributes:
        elementwise: Whether every number is updated on its own.
        handles_decay: Whether `update` itself subtracts the decoupled decay `η λ θ`, or what stands in its place.
        averages: Whether the weights to evaluate at are others than those of training; then there are `eval_value` and
            `train_value`.
    """

    elementwise: ClassVar[bool] = False
    handles_decay: ClassVar[bool] = False
    averages: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check")
            if check is not None:
                object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    def hyperparameters(self) -> list[Value]:
        """The values of all fields, and of those of rules in fields."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [v for value in values for v in (value.hyperparameters() if isinstance(value, Rule) else [value])]

    def slots(self) -> Mapping[str, Initial]:
        """Names and initial values of the state kept for every parameter."""
        return {}

    def scalars(self) -> Mapping[str, float]:
        """Names and initial values of the state kept once for the whole model."""
        return {}

    def measure(self, h: Hyper) -> dict[str, Tensor]:
        """The new scalars of this update, from the old ones in `h.scalars`; computed before any `update`."""
        return dict(h.scalars)

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

    def eval_value(self, p: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        """The parameters to evaluate at, and the slots to keep meanwhile, from those of training."""
        raise NotImplementedError

    def train_value(self, x: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        """The inverse of `eval_value`: the parameters and slots that training goes on from."""
        raise NotImplementedError

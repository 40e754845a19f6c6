"""What a rule is told about a step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.kernels import KernelAxes
from keras_optkit.precision import scalar_dtype

if TYPE_CHECKING:
    from keras_optkit.optimizers.rule import Weight

Tensor = Any
#: A hyperparameter: a number, a schedule of the update count, or a scalar variable.
Value = Any


def is_dynamic(value: Value) -> bool:
    """Whether a hyperparameter is known only inside the step."""
    return isinstance(value, Schedule | keras.Variable)


class Product(NamedTuple):
    """A product of the Hessian with a random vector, for the parameters of a bucket.

    Attributes:
        vector: The `RandomVector`.
        value: The product.
        draw: Returns the part of the vector that belongs to these parameters.
    """

    vector: Any
    value: Tensor
    draw: Callable[[], Tensor]


class Hyper:
    """What a rule is told about the current step, in the dtype that it computes in.

    Attributes:
        step: t, the number of this update of the optimizer since these parameters joined it, counted from 1, in the
            dtype for scalars: cast what you compute from it to the dtype of the gradients.
        learning_rate: The learning rate of this update for these parameters, which the rule multiplies into its result.
        base_rate: The optimizer's learning rate of this update, without factors of groups, layers, routes or
            rules around.
        weight_decay: λ of this update for these parameters, 0 where there is none. Only a rule that sets
            `handles_decay` needs it.
        decays: Whether there is a decay.
        scalars: The rule's state for the whole model, as `measure` has left it.
        before: The same before `measure`.
        kernel: For kernels in the layout "whole", which axes of `shape` are inputs and outputs; None for others.
        role: For transforms in the layout "whole", the role of the parameters in their layers; see `Weight`.
        totals: For transforms, the sums of what they have contributed, by name.
        gradient: For transforms of steps, the gradient that the rule was given; for the `combination` of a rule, the
            first gradient.
    """

    role: str | None = None
    totals: Mapping[str, Tensor] = MappingProxyType({})
    gradient: Tensor | None = None

    def __init__(
        self,
        iterations: Tensor,
        learning_rate: Tensor,
        dtype: str,
        *,
        weight_decay: Any = 0.0,
        scalars: Mapping[str, Tensor] | None = None,
        before: Mapping[str, Tensor] | None = None,
        memo: dict[Any, Tensor] | None = None,
        since: int = 0,
        kernel: KernelAxes | None = None,
        sums: Callable[..., Tensor] | None = None,
        first: Tensor | None = None,
        base_rate: Tensor | None = None,
        product: Product | None = None,
    ):
        self._iterations = iterations
        self._dtype = dtype
        self._memo = {} if memo is None else memo
        self._since = since
        self.step = ops.cast(iterations + (1 - since), scalar_dtype())
        self.learning_rate = ops.cast(learning_rate, dtype)
        self.base_rate = self.learning_rate if base_rate is None else ops.cast(base_rate, dtype)
        self.weight_decay = self(weight_decay)
        self.decays = is_dynamic(weight_decay) or bool(weight_decay)
        self.scalars = dict(scalars or {})
        self.before = dict(self.scalars if before is None else before)
        self.kernel = kernel
        self._sums = sums
        self._first = first
        self._product = product
        self._normal: Callable[[int, str], Tensor] | None = None

    @property
    def updates(self) -> Tensor:
        """How many updates the optimizer has made before this one."""
        return self._iterations

    def __call__(self, value: Value) -> Any:
        """The current value of a hyperparameter: numbers stay Python numbers, schedules are read at this step."""
        return ops.cast(self.exact(value), self._dtype) if is_dynamic(value) else value

    def at_rate(self, learning_rate: Tensor) -> Hyper:
        """The same step with another learning rate, for a rule inside of a rule."""
        return self._with(learning_rate=learning_rate)

    def for_transform(self, layout: str, weight: Weight, sums: Callable[..., Tensor], **more: Any) -> Hyper:
        """The same step for a transform of this layout, which is told more than rules are."""
        role, kernel = (weight.role, weight.axes) if layout == "whole" else (None, None)
        return self._with(role=role, kernel=kernel, _sums=None if layout == "elementwise" else sums, **more)

    def _with(self, **changed: Any) -> Hyper:
        other = copy.copy(self)
        vars(other).update(changed)
        return other

    def scalar(self, name: str, *, before: bool = False) -> Tensor:
        """One of the rule's scalars in the dtype of the computation, as it is after or before `measure`."""
        return ops.cast((self.before if before else self.scalars)[name], self._dtype)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over each parameter, in a shape that broadcasts with it."""
        return self._over_parameters(x, mean=False)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of `x` over each parameter, in a shape that broadcasts with it."""
        return self._over_parameters(x, mean=True)

    def _over_parameters(self, x: Tensor, *, mean: bool) -> Tensor:
        if self._sums is None:
            raise ValueError(
                'h.sum and h.mean are for rules and transforms with layout = "per_parameter" or "whole", got an '
                "element-wise one."
            )
        return self._sums(x, mean=mean)

    def normal(self, seed: int) -> Tensor:
        """For transforms with `rows = False`: independent standard normal numbers, in the form of the parameters.

        They are a function of the seed, of the update count and of the parameter's place in the model alone: the same
        however parameters are packed, in every replica, and in a run that is resumed.
        """
        if self._normal is None:
            raise ValueError("h.normal is for transforms, got a rule.")
        return self._normal(seed, self._dtype)

    @property
    def first(self) -> Tensor:
        """Where this is a parameter's first update, in a shape that broadcasts; parameters may miss some updates."""
        if self._first is None:
            raise ValueError("h.first is for rules with uses_first = True, for which the engine counts updates.")
        return self._first

    def every(self, n: int, compute: Callable[[], Any], keep: Callable[[], Any], *, at: int = 0) -> Any:
        """`compute()` in the updates t with `t mod n = at mod n`, else `keep()`; only one of the two is executed.

        Args:
            n: A whole number >= 1.
            compute: Returns tensors, in any structure.
            keep: Returns tensors of the same structure, shapes and dtypes.
            at: In which of each n updates.
        """
        if n == 1:
            return compute()
        return ops.cond(ops.equal(ops.mod(ops.cast(self.step, "int32"), n), at % n), compute, keep)

    def with_product(self, compute: Callable[[Tensor, Tensor], Any], keep: Callable[[], Any]) -> Any:
        """`compute(v, Hv)` in the updates in which the product is due, else `keep()`; only one of the two is executed.

        For rules that need "hessian_vector". Both tensors are in the shape of the gradient.

        Args:
            compute: Returns tensors, in any structure.
            keep: Returns tensors of the same structure, shapes and dtypes.
        """
        product = self._of_hessian()
        due = product.vector.is_due(self._iterations)
        if due is True:
            return compute(product.draw(), product.value)
        return ops.cond(due, lambda: compute(product.draw(), product.value), keep)

    @property
    def products(self) -> Tensor:
        """How many products with the Hessian these parameters have had, in the dtype for scalars.

        The one of this update counts. For parameters that joined after the optimizer's first update it is 0 at first.
        """
        return ops.cast(self._of_hessian().vector.products(self._iterations, self._since), scalar_dtype())

    def _of_hessian(self) -> Product:
        if self._product is None:
            raise ValueError('h.with_product and h.products are for rules that say needs = {"hessian_vector"}.')
        return self._product

    def bias_correction(self, beta: Value, *, skipped: int = 0, products: bool = False) -> Tensor:
        """`1 - beta**t`, without the cancellation that costs float32 half of its digits when beta is near 1.

        If beta is a schedule, its current value is used for all steps, as in torch and optax.

        Args:
            beta: A number, a schedule or a variable; or a tensor computed from one, such as `1 - h.exact(value)` in the
                convention in which β is the weight of the new value.
            skipped: How many of the first updates do not count; in these, the result is that of the first one that
                counts.
            products: Whether t counts the products with the Hessian instead of the updates.
        """
        if products:
            return ops.cast(-ops.expm1(ops.maximum(self.products, 1) * self._log(beta)), self._dtype)
        key = ("correction", self._since, id(beta) if is_dynamic(beta) else beta, skipped)
        if ops.is_tensor(beta):  # may be another one of the same id tomorrow
            return ops.cast(self._correction(beta, skipped), self._dtype)
        if key not in self._memo:
            self._memo[key] = self._correction(beta, skipped)
        return ops.cast(self._memo[key], self._dtype)

    def _correction(self, beta: Any, skipped: int) -> Tensor:
        counted = ops.maximum(self.step - skipped, 1) if skipped else self.step
        return -ops.expm1(counted * self._log(beta))

    def _log(self, beta: Value) -> Any:
        if is_dynamic(beta) or ops.is_tensor(beta):
            return ops.log(ops.cast(self.exact(beta), scalar_dtype()))
        return math.log(beta) if beta else -math.inf  # of 0.999 in float32, as on JAX, it would have 5 digits

    def exact(self, value: Value) -> Any:
        """The current value in the dtype for scalars; numbers stay Python numbers, and schedules are read once."""
        if not is_dynamic(value):
            return value
        key = ("value", id(value))
        if key not in self._memo:
            present = value(self._iterations) if isinstance(value, Schedule) else value
            self._memo[key] = ops.cast(present, scalar_dtype())
        return self._memo[key]

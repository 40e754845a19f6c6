"""The contract of an update rule: a frozen dataclass of hyperparameters with pure methods, and no variables.

A rule's `layout` says which tensors it is given. With "whole" they have a leading axis, `(k, *shape)`: k parameters of
one shape are updated as one tensor, so that matrix products batch for free. With "elementwise" they have any shape:
many parameters laid end to end as `(1, n)`, or one as it is. "per_parameter" is the same for rules that also need sums
over each parameter, which `h.sum` and `h.mean` give in either form.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from keras_optkit import arguments
from keras_optkit.kernels import VECTOR, KernelAxes
from keras_optkit.optimizers.hyper import Hyper, Tensor, Value, is_dynamic
from keras_optkit.optimizers.slots import Fill, FromWeights, Initial, as_initial

if TYPE_CHECKING:
    from keras_optkit.optimizers.random_numbers import RandomVector
    from keras_optkit.optimizers.transforms.transform import Transform

__all__ = [
    "LAYOUTS",
    "NEEDS",
    "Fields",
    "Hyper",
    "Routed",
    "Rule",
    "Slots",
    "Tensor",
    "Value",
    "Weight",
    "Wrapper",
    "as_routed",
    "checked_needs",
    "choice",
    "contributes",
    "count",
    "estimates",
    "flag",
    "is_dynamic",
    "layout_of",
    "measured",
    "name_of",
    "number",
    "rule_for",
    "slots_of",
    "treats_rows_alone",
]

Slots = dict[str, Tensor]

#: Which tensors a rule is given; see above.
LAYOUTS = ("elementwise", "per_parameter", "whole")

#: What a rule may need from who drives the step, besides the gradient.
NEEDS = ("second_gradient", "hessian_vector")


class Weight(NamedTuple):
    """What a rule is told about a parameter before there is a step: when its route is chosen and its state is made.

    Attributes:
        shape: Its shape.
        dtype: Its dtype.
        role: What it is for its layer: "kernel" (a linear map), "table" (the rows of an embedding) or "vector"
            (everything else, of whatever rank: the biases of attention are vectors).
        axes: Of a kernel which axes are inputs and outputs, by the layer where it is known; see `keras_optkit.kernels`.
        paths: Its paths in the model, and the one that Keras gives it. Only where the route is chosen.
        output: Whether it is the kernel of the model's last layer; None where the optimizer does not know the model.
            Only where the route is chosen.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    role: str = VECTOR
    axes: KernelAxes | None = None
    paths: tuple[str, ...] = ()
    output: bool | None = None


def number(
    default: Any = dataclasses.MISSING,
    low: float = 0.0,
    high: float = float("inf"),
    closed: str = "both",
    *,
    fixed: bool = False,
    optional: bool = False,
) -> Any:
    """Declares a field that holds a real number in an interval, a schedule of it, or a scalar variable.

    With `fixed` it holds only a number: one that state is initialised with, or that weights are recovered with. With
    `optional` it may be None. Without a default it must be given.
    """

    def check(name: str, value: Value) -> Value:
        if is_dynamic(value) and not fixed:
            return value
        return arguments.real(name, value, low, high, closed=closed, optional=optional)

    return dataclasses.field(default=default, metadata={"check": check})


def count(default: int, low: int = 1) -> Any:
    """Declares a field that holds a whole number of at least `low`."""
    return dataclasses.field(
        default=default, metadata={"check": lambda name, value: arguments.integer(name, value, low)}
    )


def choice(default: str, allowed: tuple[str, ...]) -> Any:
    """Declares a field that holds one of some strings."""
    return dataclasses.field(
        default=default, metadata={"check": lambda name, value: arguments.choice(name, value, allowed)}
    )


def flag(default: bool) -> Any:
    """Declares a field that is True or False."""
    return dataclasses.field(default=default, metadata={"check": arguments.boolean})


@dataclass(frozen=True)
class Fields:
    """Base of frozen dataclasses of hyperparameters, each of which is checked when one is made."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check = field.metadata.get("check")
            if check is not None:
                object.__setattr__(self, field.name, check(field.name, getattr(self, field.name)))

    def hyperparameters(self) -> list[Value]:
        """The values of all fields, and of those of rules in fields."""
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return [v for value in values for v in (value.hyperparameters() if isinstance(value, Fields) else [value])]


@dataclass(frozen=True)
class Rule(Fields):
    """Base of the update rules.

    Subclasses are frozen dataclasses whose fields, made with `number` and `flag`, are the hyperparameters; each is
    checked when the rule is made.

    Attributes:
        layout: "elementwise" if every element is updated on its own; "per_parameter" if a rule also needs sums over
            each parameter, by `h.sum` or `h.mean`; "whole" if it needs the parameters in their shapes, with a leading
            axis. "" leaves it to `elementwise`.
        elementwise: `elementwise = True` is short for `layout = "elementwise"`, and otherwise "whole" is meant.
        uses_first: Whether `update` asks `h.first`.
        reuses: The slots, and "weights", of which XLA needs the old value for more than the new one. It would copy it
            before it is overwritten; so the compiled update is handed it and returns the new one. It only changes how
            fast an update is, and `examples/benchmarks/copies.py` finds which they are.
        decomposes: Whether it has an eigenvalue or QR decomposition, which takes XLA on CPUs many times as long as
            TensorFlow: `fuse="auto"` does not compile it.
        handles_decay: Whether `update` itself subtracts the decoupled decay `η λ θ`, or a replacement for it.
        needs: What the caller of the step must provide. With "second_gradient", `update` is given the gradient at the
            weights that `perturbation` leads to; with "hessian_vector", it finds in `h.with_product` the product of the
            Hessian with the vector that `random_vector` describes.
        averages: Whether the evaluation weights differ from the training weights; then there are `eval_value` and
            `train_value`.
    """

    layout: ClassVar[str] = ""
    elementwise: ClassVar[bool] = False
    uses_first: ClassVar[bool] = False
    reuses: ClassVar[frozenset[str]] = frozenset()
    decomposes: ClassVar[bool] = False
    handles_decay: ClassVar[bool] = False
    averages: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()

    def perturbation(self) -> Transform | None:
        """The transform from the first gradient to what is added to the weights before the second is computed.

        For rules that need a second gradient. It sees the gradient of the micro-batch, with no transform before it.
        """
        return None

    def combination(self) -> Transform | None:
        """The transform from the second gradient to what is updated with; in it, `h.gradient` is the first gradient.

        For rules that need a second gradient; None: the second one alone. It sees those of the micro-batch, before
        anything else.
        """
        return None

    def random_vector(self) -> RandomVector | None:
        """The vector v to multiply the Hessian by, for rules that need "hessian_vector"."""
        return None

    def routes(self) -> Mapping[str, Rule | Routed]:
        """Other rules that some parameters are updated by, under names of their own."""
        return {}

    def route(self, w: Weight) -> str:
        """The name in `routes()` of the rule for a parameter; "" for this one."""
        return ""

    def slots(self, w: Weight) -> Mapping[str, Initial]:
        """Names and initial values of the state kept for every parameter.

        `keras_optkit.optimizers.slots` has what they may be. A rule whose state is the same for all parameters may
        leave out the argument: `def slots(self)`. State that differs between parameters, by their shape or by what they
        are, needs the layout "whole".
        """
        return {}

    def scalars(self) -> Mapping[str, float]:
        """Names and initial values of the state kept once for the whole model."""
        return {}

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        """The terms, by name, whose sums over all parameters of this rule with a gradient `measure` is given.

        Parameters that are routed to another rule, or in groups with another rule, do not count.

        Args:
            u: Gradients, after clipping, as in `update`.
            slots: The slots before the update.
            p: The parameters before the update.
            h: With the old scalars.

        Returns:
            Tensors in the shape of `u`, which are not summed yet.
        """
        raise NotImplementedError

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The new scalars of this update, from the old ones in `h.scalars`; computed before any `update`.

        A rule that contributes nothing may leave out the second argument: `def measure(self, h)`. For one that does,
        the scalars do not change if none of its parameters has a gradient.

        Args:
            h: With the old scalars.
            sums: Of what `contribute` returned, by name.
        """
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

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        """For rules that find their learning rate: the factor on `h.learning_rate` that they have found.

        It is what `Optimizer.explain` and `TrainingMonitor` show, and is not part of an update. Either one number, from
        `h.scalar`, or one for each element, from the slots after the update.

        Args:
            slots: The slots after the update; before the first one their initial values, in any shape.
            h: With the scalars before and after `measure`.
        """
        raise NotImplementedError

    def eval_value(self, p: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        """The parameters to evaluate at, and the slots to keep meanwhile, from those of training."""
        raise NotImplementedError

    def train_value(self, x: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        """The inverse of `eval_value`: the parameters and slots that training continues from."""
        raise NotImplementedError


@dataclass(frozen=True)
class Routed:
    """A rule that some parameters of another rule are updated by, with a rate and a decay of their own.

    Attributes:
        rule: The rule.
        lr_scale: Factor on the learning rate.
        weight_decay: A decay of its own; None for the optimizer's.
    """

    rule: Rule
    lr_scale: float = 1.0
    weight_decay: Value | None = None


@dataclass(frozen=True)
class Wrapper(Rule):
    """Base of rules around another one, which is the field `inner_rule`.

    Forwards the inner rule's layout, needs and what goes with them, state, routes and sums; the wrapper itself sets
    `handles_decay` and `averages`. A parameter that the inner rule routes to another rule is updated by this wrapper
    around that rule.
    """

    def inner(self) -> Rule:
        """The rule inside."""
        return self.inner_rule  # type: ignore[attr-defined]

    @property
    def layout(self) -> str:  # type: ignore[override]
        return layout_of(self.inner())

    @property
    def uses_first(self) -> bool:  # type: ignore[override]
        return self.inner().uses_first

    @property
    def reuses(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner().reuses

    @property
    def decomposes(self) -> bool:  # type: ignore[override]
        return self.inner().decomposes

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.inner().needs

    def perturbation(self) -> Transform | None:
        return self.inner().perturbation()

    def combination(self) -> Transform | None:
        return self.inner().combination()

    def random_vector(self) -> RandomVector | None:
        return self.inner().random_vector()

    def routes(self) -> Mapping[str, Rule | Routed]:
        inside = {name: as_routed(route) for name, route in self.inner().routes().items()}
        wrapped = {name: dataclasses.replace(self, inner_rule=route.rule) for name, route in inside.items()}  # type: ignore[call-arg]
        return {name: dataclasses.replace(route, rule=wrapped[name]) for name, route in inside.items()}

    def route(self, w: Weight) -> str:
        return self.inner().route(w)

    def slots(self, w: Weight | None = None) -> Mapping[str, Initial]:
        return slots_of(self.inner(), w)

    def scalars(self) -> Mapping[str, float]:
        return self.inner().scalars()

    def contribute(self, u: Tensor, slots: Slots, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return self.inner().contribute(u, slots, p, h)

    def measure(self, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return measured(self.inner(), h, sums)

    def estimate(self, slots: Slots, h: Hyper) -> Tensor:
        return self.inner().estimate(slots, h)


# -- what is read from a rule -----------------------------------------------------------------------------------------


def layout_of(rule: Rule) -> str:
    """Which tensors a rule is given."""
    layout = rule.layout or ("elementwise" if rule.elementwise else "whole")
    return arguments.choice(f"layout of {type(rule).__name__}", layout, LAYOUTS)


def slots_of(rule: Rule, w: Weight | None) -> dict[str, Fill | FromWeights]:
    """Names and initial values of the state for a parameter; without it, of a rule for which all are alike."""
    slots: Any = rule.slots
    found = slots(w) if _takes(type(rule).slots, 2) else slots()
    initial = {name: as_initial(value) for name, value in found.items()}
    own = [name for name, value in initial.items() if isinstance(value, Fill) and value.shape is not None]
    if own and layout_of(rule) != "whole":
        raise ValueError(
            f'{type(rule).__name__}.slots: state in a shape of its own ({", ".join(own)}) needs layout = "whole", got '
            f"{layout_of(rule)!r}."
        )
    return initial


def contributes(rule: Rule) -> bool:
    """Whether a rule needs sums over the whole model."""
    return _innermost(rule).contribute is not Rule.contribute


def estimates(rule: Rule) -> bool:
    """Whether a rule finds its learning rate."""
    return _innermost(rule).estimate is not Rule.estimate


def _innermost(rule: Rule) -> type[Rule]:
    """The class of a rule, or of the one inside all its wrappers."""
    while isinstance(rule, Wrapper):
        rule = rule.inner()
    return type(rule)


def treats_rows_alone(rule: Rule) -> bool:
    """Whether some rows of a parameter can be updated as if the others were not there."""
    whole = rule.uses_first or contributes(rule) or "hessian_vector" in rule.needs
    return layout_of(rule) == "elementwise" and not whole


def measured(rule: Rule, h: Hyper, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The new scalars of a rule."""
    return rule.measure(h, sums) if _takes(type(rule).measure, 3) else rule.measure(h)  # type: ignore[call-arg]


def rule_for(rule: Rule, w: Weight) -> Rule:
    """The rule that a parameter is updated by."""
    name = rule.route(w)
    return as_routed(rule.routes()[name]).rule if name else rule


def name_of(rule: Rule) -> str:
    """The name of a rule, with those inside: "SAMRule(AdamRule)"."""
    inside = f"({name_of(rule.inner())})" if isinstance(rule, Wrapper) else ""
    return f"{type(rule).__name__}{inside}"


def checked_needs(rule: Rule) -> None:
    """Raises if a rule needs something unknown, or does not say which second gradient or which product it needs.

    Raises:
        ValueError: If so.
    """
    name = type(rule).__name__
    for need in rule.needs:
        arguments.choice(f"needs of {name}", need, NEEDS)
    for need, method in (("second_gradient", "perturbation"), ("hessian_vector", "random_vector")):
        found = getattr(rule, method)()
        if (need in rule.needs) != (found is not None):
            raise ValueError(
                f"{name} must say needs = {{{need!r}}} and have a `{method}`, or neither, got needs={set(rule.needs)} "
                f"and {method}() = {found!r}."
            )
    if rule.combination() is not None and "second_gradient" not in rule.needs:
        raise ValueError(f"{name} has a `combination`, so it must say needs = {{'second_gradient'}}.")


def as_routed(route: Rule | Routed) -> Routed:
    """A route with its rate and decay."""
    return Routed(route) if isinstance(route, Rule) else route


@functools.cache
def _takes(method: Callable[..., Any], count: int) -> bool:
    return len(inspect.signature(method).parameters) >= count

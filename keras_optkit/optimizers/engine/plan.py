"""What is fixed while a step is traced: how the parameters are packed and how each of them is updated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.random_numbers import RandomVector
from keras_optkit.optimizers.rule import LAYOUTS, Hyper, Routed, Rule, Tensor, Value, as_routed, is_dynamic, layout_of
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.precision import at_least_float32, scalar_dtype

#: Of which rule: the number in `Treatment`, and the name of the route, "" for the rule itself.
RuleId = tuple[int, str]
Rules = Mapping[RuleId, Routed]


def with_routes(rules: Mapping[int, Rule]) -> dict[RuleId, Routed]:
    """Rules by number, with those that they route parameters to."""
    found = {(number, ""): Routed(rule) for number, rule in rules.items()}
    for number, rule in rules.items():
        found |= {(number, name): as_routed(route) for name, route in rule.routes().items()}
    return found


def layout_for(rule: Rule, transforms: Iterable[Transform]) -> str:
    """The layout of the tensors given to a rule and the transforms around it: that of whichever needs most."""
    own = [transform for transform in (rule.perturbation(), rule.combination()) if transform is not None]
    around = [*transforms, *own]
    return max([layout_of(rule), *(t.layout for t in around)], key=LAYOUTS.index)


@dataclass(frozen=True)
class Keywords:
    """The keywords of `Optimizer` that its steps and its state depend on."""

    weight_decay: Value | None
    gradient_accumulation_steps: int | None
    use_ema: bool
    ema_momentum: float
    skip_nonfinite: int | None
    sparse: str
    master_weights: bool
    stochastic_rounding: bool
    slot_dtype: str | None
    loss_scale_factor: float | None


@dataclass(frozen=True)
class Plan:
    """How an optimizer makes its updates.

    Attributes:
        name: Its name, for messages.
        buckets: Which parameters are updated together.
        constraints: For each bucket that of its variable, or None; variables with one are alone in their buckets.
        rules: Its rule as number 0, those that groups have of their own under their numbers in `Treatment`, and those
            that these route parameters to.
        keywords: Its keywords.
        schedule: That of the learning rate, or None.
        transforms: Of gradients and of steps.
        places: The place of each parameter in the model's order, which random numbers depend on.
    """

    name: str
    buckets: Sequence[Bucket]
    constraints: Sequence[Any]
    rules: Rules
    keywords: Keywords
    schedule: Schedule | None
    transforms: Sequence[Transform] = ()
    places: Sequence[int] = ()

    def rule(self, bucket: Bucket) -> Rule:
        """The rule of a bucket."""
        return self.rules[bucket.rule].rule

    def dynamic(self) -> list[Value]:
        """The hyperparameters that are known only inside the step."""
        own = [bucket.treatment.weight_decay for bucket in self.buckets]
        routed = self.rules.values()
        values = [value for r in routed for value in (r.weight_decay, *r.rule.hyperparameters())]
        values += [value for transform in self.transforms for value in transform.hyperparameters()]
        return [v for v in [self.schedule, self.keywords.weight_decay, *own, *values] if is_dynamic(v)]

    def of(self, changes: str) -> list[Transform]:
        """The transforms of gradients, or of steps."""
        return [t for t in self.transforms if t.changes == changes]

    def vectors(self) -> list[RandomVector]:
        """The different random vectors that a Hessian is multiplied by."""
        found = (routed.rule.random_vector() for routed in self.rules.values())
        return list(dict.fromkeys(vector for vector in found if vector is not None))

    def vector(self, bucket: Bucket, iterations: Tensor) -> list[Tensor]:
        """The parts of the random vector for the parameters of a bucket, in the precision of the weights."""
        drawn, wide = self.rule(bucket).random_vector(), at_least_float32(bucket.dtype)
        assert drawn is not None
        parts = [
            drawn.part(shape, wide, iterations, self.places[i])
            for i, shape in zip(bucket.indices, bucket.shapes, strict=True)
        ]
        return parts if wide == bucket.dtype else [ops.cast(ops.cast(part, bucket.dtype), wide) for part in parts]

    def averages(self, bucket: Bucket) -> bool:
        """Whether the evaluation weights of a bucket differ from its training weights."""
        return self.keywords.use_ema or self.rule(bucket).averages


def memo(dynamic: Sequence[Value], read: Sequence[Tensor]) -> dict[Any, Tensor]:
    """What `Hyper` remembers at the start of a step: the current values of schedules."""
    return {("value", id(value)): tensor for value, tensor in zip(dynamic, read, strict=True)}


def present(dynamic: Sequence[Value], iterations: Tensor, multiplier: Tensor) -> list[Tensor]:
    """The current values of hyperparameters."""
    h = Hyper(iterations, multiplier, scalar_dtype())
    return [h.exact(value) for value in dynamic]

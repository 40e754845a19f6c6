"""Base and helpers for optimizers around another optimizer, and for their rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from keras_optkit.optimizers.inner import Inner, built_from, described, is_same, plain, shared, with_present
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Rule, Slots, Tensor, Wrapper
from keras_optkit.optimizers.slots import Initial
from keras_optkit.saving import constructor_parameters


def inner_rule() -> Any:
    """Declares the field that holds the rule inside."""
    return dataclasses.field(metadata={"check": plain})


def inner_step(rule: Rule, u: Tensor, slots: Slots, p: Tensor, decayed: Tensor, h: Hyper) -> tuple[Tensor, Slots]:
    """The step of a rule at `p` and its new slots; if it leaves the decoupled decay to others, that is of `decayed`."""
    step, new = rule.update(u, slots, p, h)
    if h.decays and not rule.handles_decay:
        step = step + h.learning_rate * h.weight_decay * decayed
    return step, new


def with_own(inner: Mapping[str, Initial], name: str, initial: Initial) -> dict[str, Initial]:
    """The slots of the rule inside, and one of the rule around it.

    Raises:
        ValueError: If the rule inside has a slot of that name.
    """
    if name in inner:
        raise ValueError(f"the inner rule has a slot {name!r}, which is a slot of the rule around it, too; rename it.")
    return {**inner, name: initial}


def without(slots: Slots, name: str) -> Slots:
    """The slots of the rule inside."""
    return {key: slot for key, slot in slots.items() if key != name}


class Keeping(Wrapper):
    """Base of rules around another one that keep the weights to evaluate at in a slot."""

    averages = True
    handles_decay = True
    kept: ClassVar[str]  # its name

    def eval_value(self, p: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        return slots[self.kept], {**slots, self.kept: p}

    def train_value(self, x: Tensor, slots: Slots, h: Hyper) -> tuple[Tensor, Slots]:
        return self.eval_value(x, slots, h)


class Around(Optimizer):
    """An optimizer around the rule of another one, whose other settings it takes over."""

    def __init__(self, inner: Inner, learning_rate: Any, make_rule: Callable[[Rule], Rule], /, **given: Any):
        optimizer = built_from("inner", inner)
        if learning_rate is not None:
            given = {**given, "learning_rate": learning_rate}
        settings = _taken_over(type(self).__name__, optimizer, given)
        super().__init__(settings.pop("learning_rate"), make_rule(plain("inner", optimizer.rule)), **settings)
        self._held.inner = described(optimizer)

    @property
    def inner(self) -> dict[str, Any]:
        """The config of the inner optimizer without the keywords that it shares with this one, which are set here."""
        return with_present(self._held.inner, self.inner_rule)


def _taken_over(outer: str, inner: Optimizer, given: dict[str, Any]) -> dict[str, Any]:
    """The keywords that all optimizers have: those given to the wrapper, and for the others what `inner` has."""
    parameters = constructor_parameters(type(inner))
    settings = {}
    for name in shared():
        if name == "name":
            settings[name] = given.get(name)
            continue
        own = inner._config_value(name) if name == "learning_rate" else getattr(inner, name)
        settings[name] = given.get(name, own)
        default = parameters[name].default
        if name in given and not (is_same(own, default) or is_same(own, given[name])):
            raise ValueError(
                f"{name} is given twice: {outer} has {given[name]!r} and the inner {type(inner).__name__} {own!r}. "
                "Give it to one of the two."
            )
    return settings

"""Optimizers as arguments of others: given as an object, a name or a config, and used for their rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any

import keras

from keras_optkit import arguments
from keras_optkit.optimizers.rule import Rule
from keras_optkit.registry import cards
from keras_optkit.saving import constructor_parameters

if TYPE_CHECKING:
    from keras_optkit.optimizers.optimizer import Optimizer

#: An optimizer of this package, its name, or its config.
Inner = Any


def built_from(argument: str, inner: Inner) -> Optimizer:
    """The optimizer that was given as `argument`, not used yet.

    Raises:
        TypeError: If `inner` is neither an optimizer nor a name nor a config.
        ValueError: If it is unknown, or has state already.
    """
    from keras_optkit.optimizers.optimizer import Optimizer  # which has groups, which have optimizers

    if isinstance(inner, Optimizer):
        if inner.built:
            raise ValueError(f"{argument} must be a fresh optimizer, got {inner.name!r}, which has state already.")
        return inner
    described: Any = {"class_name": inner} if isinstance(inner, str) else inner
    if not (isinstance(described, Mapping) and isinstance(described.get("class_name"), str)):
        raise TypeError(f"{argument} must be an optimizer of keras_optkit, its name or its config, got {inner!r}.")
    name = described.get("registered_name") or described["class_name"]
    known = {card.name.lower(): card.make for card in cards("optimizer", package=None)}
    found = known.get(name.lower()) or keras.saving.get_registered_object(name)
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        names = [card.name for card in cards("optimizer")]
        raise ValueError(
            f"{argument} must be an optimizer of keras_optkit, got {name!r}.{arguments.near(name, names)} "
            f"Known by name: {', '.join(names)}."
        )
    return found.from_config(dict(described.get("config", {})))


def plain(argument: str, rule: Any) -> Rule:
    """Returns `rule`; raises if it is not a rule or averages on its own."""
    if not isinstance(rule, Rule):
        raise TypeError(f"{argument} must be a keras_optkit.optimizers.Rule, got {rule!r}.")
    if rule.averages:
        raise ValueError(f"{argument} must be a rule without an average of its own, got {rule!r}.")
    return rule


def shared() -> list[str]:
    """The keywords that all optimizers have, the learning rate among them."""
    from keras_optkit.optimizers.optimizer import Optimizer

    return ["learning_rate", *constructor_parameters(Optimizer)]


def described(optimizer: Optimizer) -> dict[str, Any]:
    """The config of an optimizer without the keywords that it shares with all others."""
    description = keras.optimizers.serialize(optimizer)
    description["config"] = {k: v for k, v in description["config"].items() if k not in shared()}
    return description


def with_present(description: dict[str, Any], rule: Rule) -> dict[str, Any]:
    """A description with the present hyperparameters of the rule in it."""
    present = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    config = {name: present.get(name, value) for name, value in description["config"].items()}
    return description | {"config": keras.saving.serialize_keras_object(config)}


def is_same(a: Any, b: Any) -> bool:
    """Whether two values of a keyword mean the same."""
    if isinstance(a, keras.Variable) or isinstance(b, keras.Variable):
        return a is b
    if isinstance(a, float) and isinstance(b, Real):
        return math.isclose(a, b, rel_tol=1e-6)  # the rate may have been rounded to float32
    return a is b or keras.saving.serialize_keras_object(a) == keras.saving.serialize_keras_object(b)

"""Groups: parameters that are found by their paths and are trained with rates and decays of their own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from keras_optkit import arguments
from keras_optkit.optimizers.inner import Inner, built_from, described, is_same, plain, shared
from keras_optkit.optimizers.rule import Rule
from keras_optkit.registry import PACKAGE
from keras_optkit.saving import FromSignature, constructor_parameters


@dataclass(frozen=True)
class Treatment:
    """What may differ between parameters that are updated by one rule.

    Attributes:
        lr_scale: Factor on the learning rate.
        decayed: Whether weight decay applies at all.
        weight_decay: A decay of its own; None for the optimizer's.
        rule: 0 for the optimizer's rule, n for that of its n-th group.
    """

    lr_scale: float = 1.0
    decayed: bool = True
    weight_decay: float | None = None
    rule: int = 0


@keras.saving.register_keras_serializable(package=PACKAGE)
class Group(FromSignature):
    """Parameters whose paths match a pattern, and what is different for them.

    A parameter belongs to the first group of `groups=[...]` that matches its path; those that no group matches are
    trained as usual. A pattern is looked for anywhere in the path (`re.search`), since Keras changes the beginning of
    paths when a model is saved and loaded: "sequential/dense/kernel" becomes "dense/kernel". `optimizer.explain(model)`
    shows which parameter is in which group.

    A group may have another update rule, given as an optimizer. Only the rule of that optimizer is used, with its own
    hyperparameters: learning rate, clipping, accumulation and all other common keywords are those of the optimizer that
    has the groups, so there is one rate and one schedule for all, and `lr_scale` is where the rule needs another one.

    When not to use it: to freeze whole layers for good; `layer.trainable = False` also saves their gradients' time.

    Args:
        match: A regular expression that is looked for in the variable's path, such as `"encoder/"` or `"bias$"`.
        lr_scale: Factor >= 0 on the learning rate, which decay is multiplied by, too.
        weight_decay: A decay λ >= 0 for this group in the place of the optimizer's; None for the optimizer's. What
            `decay_mask` spares stays spared.
        trainable: False freezes the group: no update, no state, and its gradients do not count when clipping.
        rule: An optimizer of this package that has not been used yet, its name (`"SGD"`) or its config, whose rule
            these parameters are updated with; None for the rule of the others. Its common keywords must be left at
            their defaults, and the rule must not average by itself.
        required: Whether it is an error if no variable matches. False is for those that join later, as with
            `keras_optkit.callbacks.Unfreeze`.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, a pattern that is no regular expression, or a `rule` that is unknown,
            averages by itself or was given keywords that are those of the whole.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")]
    )
    momentum = ok.optimizers.SGD(momentum=0.9)
    groups = [ok.Group("body/", lr_scale=0.1, rule=momentum), ok.Group("bias$", weight_decay=0.0)]
    optimizer = ok.optimizers.AdamW(1e-3, groups=groups)
    print(optimizer.explain(model))
    ```
    """

    def __init__(
        self,
        match: str,
        lr_scale: float = 1.0,
        weight_decay: float | None = None,
        trainable: bool = True,
        rule: Inner = None,
        required: bool = True,
    ):
        self.match = checked_pattern("match", match)
        self.lr_scale = arguments.real("lr_scale", lr_scale, 0)
        self.weight_decay = arguments.real("weight_decay", weight_decay, 0, optional=True)
        self.trainable = arguments.boolean("trainable", trainable)
        self.required = arguments.boolean("required", required)
        self.rule: dict[str, Any] | None = None
        self.own_rule: Rule | None = None
        if rule is not None:
            self.rule, self.own_rule = _described_and_rule(rule)

    def __repr__(self) -> str:
        return f"Group({', '.join(f'{name}={value!r}' for name, value in self.get_config().items())})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.get_config() == self.get_config()

    def __hash__(self) -> int:
        return hash((self.match, self.lr_scale, self.weight_decay, self.trainable))


def _described_and_rule(inner: Inner) -> tuple[dict[str, Any], Rule]:
    optimizer = built_from("rule", inner)
    parameters = constructor_parameters(type(optimizer))
    for name in set(shared()) - {"name"}:
        value = optimizer._config_value(name) if name == "learning_rate" else getattr(optimizer, name)
        if not is_same(value, parameters[name].default):
            raise ValueError(
                f"rule must leave {name} to the optimizer that has the groups, got a {type(optimizer).__name__} with "
                f"{name}={value!r}. A group may have its own lr_scale, weight_decay and trainable."
            )
    return described(optimizer), plain("rule", optimizer.rule)


def checked_pattern(name: str, pattern: Any) -> str:
    """Returns the argument `name` if it is a regular expression."""
    if not isinstance(pattern, str):
        raise TypeError(f"{name} must be a regular expression, got {pattern!r} of type {type(pattern).__name__}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} must be a regular expression, got {pattern!r}: {error}.") from error
    return pattern


def checked_groups(groups: Any) -> list[Group] | None:
    """Returns the argument `groups` as a list, and raises if it is not one of Groups."""
    if groups is None:
        return None
    if isinstance(groups, Group) or not isinstance(groups, Sequence) or not all(isinstance(g, Group) for g in groups):
        raise TypeError(f"groups must be a list of keras_optkit.Group or None, got {groups!r}.")
    return list(groups)


def assign_groups(groups: Sequence[Group], paths: Sequence[str]) -> list[Group | None]:
    """The first group that matches, for each path.

    Raises:
        ValueError: If a pattern matches no path at all and is required to, with the paths that come near it.
    """
    for group in groups:
        if group.required and not any(re.search(group.match, path) for path in paths):
            raise ValueError(
                f"groups: the pattern {group.match!r} matches none of the {len(paths)} variables. "
                f"Nearest: {', '.join(map(repr, near_misses(group.match, paths)))}."
            )
    return [next((g for g in groups if re.search(g.match, path)), None) for path in paths]


def near_misses(pattern: str, paths: Sequence[str], count: int = 5) -> list[str]:
    """The paths that a pattern which matches none of them comes nearest to."""
    words = "/".join(re.findall(r"[\w/]+", pattern)).lower()

    def likeness(path: str) -> float:
        parts = [path, *path.split("/")]
        return max(difflib.SequenceMatcher(None, words, part.lower()).ratio() for part in parts)

    return sorted(paths, key=likeness, reverse=True)[:count]


def depths(paths: Sequence[str]) -> list[int]:
    """For each path the position of its layer, counted from 0 in the order in which layers first appear.

    The layer is the first part of the path after the beginning that all paths share, so that in a model made of blocks
    a block is a layer, and a model's own name makes no difference.
    """
    split = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    order: dict[str, int] = {}
    return [order.setdefault("".join(parts[shared : shared + 1]), len(order)) for parts in split]


def treatments(
    paths: Sequence[str],
    ranks: Sequence[int],
    groups: Sequence[Group] | None,
    layer_decay: float | None,
    decay_mask: str,
) -> tuple[list[Treatment | None], list[Group | None]]:
    """How each parameter is treated, None for frozen ones, and which group it is in."""
    found = assign_groups(groups or (), paths)
    scales = [1.0] * len(paths)
    if layer_decay is not None:
        layers = depths(paths)
        scales = [layer_decay ** (max(layers, default=0) - layer) for layer in layers]
    rules = {id(g): place for place, g in enumerate(groups or (), 1) if g.own_rule is not None}
    result: list[Treatment | None] = []
    for group, scale, rank in zip(found, scales, ranks, strict=True):
        decayed = decay_mask == "all" or rank > 1
        if group is None:
            result.append(Treatment(scale, decayed))
        elif group.trainable:
            rule = rules.get(id(group), 0)
            result.append(Treatment(scale * group.lr_scale, decayed, group.weight_decay, rule))
        else:
            result.append(None)
    return result, found


class Explained(NamedTuple):
    """How one variable is trained; a row of `Explanation`."""

    path: str
    shape: tuple[int, ...]
    group: str
    rule: str
    learning_rate: float
    weight_decay: float
    state_bytes: int


class Explanation(NamedTuple):
    """How every variable is trained. Printing it shows a table.

    Attributes:
        rows: One `Explained` for each variable, in the order in which the optimizer has them.
    """

    rows: tuple[Explained, ...]

    def __str__(self) -> str:
        head = ("variable", "shape", "group", "rule", "rate", "decay", "state, bytes")
        total = f"{sum(row.state_bytes for row in self.rows):,}"
        cells = [
            (r.path, str(r.shape), r.group, r.rule, f"{r.learning_rate:g}", f"{r.weight_decay:g}", f"{r.state_bytes:,}")
            for r in self.rows
        ]
        table = [head, *cells, (f"{len(self.rows)} variables", "", "", "", "", "", total)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = []
        for line in table:
            left = [cell.ljust(width) for cell, width in zip(line[:4], widths[:4], strict=True)]
            right = [cell.rjust(width) for cell, width in zip(line[4:], widths[4:], strict=True)]
            lines.append("  ".join([*left, *right]).rstrip())
        return "\n".join(lines)

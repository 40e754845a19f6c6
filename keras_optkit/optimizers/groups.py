"""Groups: parameters that are found by their paths, with their own rates and decays."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras

from keras_optkit import arguments, backend
from keras_optkit.kernels import VECTOR, role
from keras_optkit.optimizers.inner import Inner, built_from, described, is_same, plain, shared
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.rule import Rule, Weight
from keras_optkit.registry import PACKAGE
from keras_optkit.saving import FromSignature

#: A factor of `layer_decay` below this is worth a warning.
SMALL = 1e-3

_UNKNOWN = (
    " These are Keras's paths, since the optimizer does not know the model; in a loop of your own, call "
    "optimizer.build(model) first."
)


@dataclass(frozen=True)
class Treatment:
    """What may differ between parameters that are updated by one rule.

    Attributes:
        lr_scale: Factor on the learning rate.
        decayed: Whether weight decay applies at all.
        weight_decay: A decay of its own; None for the optimizer's.
        rule: 0 for the optimizer's rule, n for that of its n-th group.
        route: The name of the rule that this one routes them to; "" for none.
    """

    lr_scale: float = 1.0
    decayed: bool = True
    weight_decay: float | None = None
    rule: int = 0
    route: str = ""


@keras.saving.register_keras_serializable(package=PACKAGE)
class Group(FromSignature):
    """Parameters whose paths match a pattern, with settings of their own.

    A parameter belongs to the first group of `groups=[...]` that matches its path; those that no group matches are
    trained as usual. The path is that of its layer, as in `keras_optkit.callbacks.Unfreeze`, and its name: the names of
    the layers, nested models included, that contain it, without that of the whole model, as in
    "backbone/block5/conv/kernel". A pattern is looked for anywhere in it (`re.search`). A layer that is in several
    places is found under each of its paths. `optimizer.explain(model)` shows which parameter is in which group.

    A group may match frozen layers, which join when they are unfrozen. The model is known from `compile` on. In your
    own loop call `optimizer.build(model)` before the first step; the paths are those of Keras's variables otherwise,
    which lack the names of nested models.

    A group may have another update rule, given as an optimizer. Only the rule of that optimizer is used, with its own
    hyperparameters: learning rate, clipping, accumulation and all other common keywords are those of the optimizer that
    has the groups, so there is one rate and one schedule for all, and `lr_scale` is where the rule needs another one.

    When not to use it: to freeze whole layers for good; `layer.trainable = False` also saves their gradients' time.

    Args:
        match: A regular expression that is looked for in the variable's path, such as `"^encoder/"` or `"bias$"`.
        lr_scale: Factor >= 0 on the learning rate, which decay is multiplied by, too.
        weight_decay: A decay λ >= 0 for this group instead of the optimizer's; None for the optimizer's. What
            `decay_mask` spares stays spared.
        trainable: False freezes the group: no update, no state, and its gradients do not count when clipping.
        rule: An optimizer of this package that has not been used yet, its name (`"SGD"`) or its config, whose rule
            these parameters are updated with; None for the rule of the others. Its common keywords must be left at
            their defaults, and the rule must not average by itself.
        required: Whether it is an error if no variable of the model matches, frozen ones included. False is for a
            pattern that some models have no layers for.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: For a value out of range, a pattern that is not a regular expression, or a `rule` that is unknown,
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
        self.match = arguments.pattern("match", match)
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
    description = described(optimizer)
    # has the defaults, if need be those of its inner optimizer
    untold: Any = type(optimizer).from_config(dict(description["config"]))
    for name in set(shared()) - {"name"}:
        value, default = (
            each._config_value(name) if name == "learning_rate" else getattr(each, name) for each in (optimizer, untold)
        )
        if not is_same(value, default):
            raise ValueError(
                f"rule must leave {name} to the optimizer that has the groups, got a {type(optimizer).__name__} with "
                f"{name}={value!r}. A group may have its own lr_scale, weight_decay and trainable."
            )
    return description, plain("rule", optimizer.rule)


def checked_blocks(blocks: Any, layer_decay: float | None) -> int | str | None:
    """Returns the argument `layer_blocks` if it is a number of blocks or a pattern, and there is something to decay."""
    if blocks is None:
        return None
    if layer_decay is None:
        raise ValueError(f"layer_blocks says what layer_decay counts, and must be None without it, got {blocks!r}.")
    if isinstance(blocks, str):
        return arguments.pattern("layer_blocks", blocks)
    try:
        return arguments.integer("layer_blocks", blocks, 1)
    except TypeError:
        raise TypeError(
            f"layer_blocks must be an integer at least 1, a regular expression or None, got {blocks!r} of type "
            f"{type(blocks).__name__}."
        ) from None


def checked_groups(groups: Any) -> list[Group] | None:
    """Returns the argument `groups` as a list, and raises if it is not one of Groups."""
    if groups is None:
        return None
    if isinstance(groups, Group) or not isinstance(groups, Sequence) or not all(isinstance(g, Group) for g in groups):
        raise TypeError(f"groups must be a list of keras_optkit.Group or None, got {groups!r}.")
    return list(groups)


def assign_groups(
    groups: Sequence[Group], paths: Sequence[Sequence[str]], known: Sequence[str], hint: str = ""
) -> list[Group | None]:
    """The first group that matches, for each variable.

    Args:
        groups: The groups.
        paths: The paths of each variable.
        known: Those of all variables that there are, also of such that are not trained now.
        hint: What the error says besides.

    Raises:
        ValueError: If a pattern matches none of the known paths and is required to, with those that come near it.
    """
    for group in groups:
        if group.required and not any(re.search(group.match, path) for path in known):
            raise ValueError(
                f"groups: the pattern {group.match!r} matches none of the {len(known)} variables. "
                f"Nearest: {', '.join(map(repr, near_misses(group.match, known)))}.{hint}"
            )
    return [next((g for g in groups if any(re.search(g.match, path) for path in theirs)), None) for theirs in paths]


def near_misses(pattern: str, paths: Sequence[str], count: int = 5) -> list[str]:
    """The paths that a pattern which matches none of them comes nearest to."""
    words = "/".join(re.findall(r"[\w/]+", pattern)).lower()

    def likeness(path: str) -> float:
        parts = [path, *path.split("/")]
        return max(difflib.SequenceMatcher(None, words, part.lower()).ratio() for part in parts)

    return sorted(paths, key=likeness, reverse=True)[:count]


class Places:
    """Where variables are in the model that an optimizer trains, or, where it does not know one, by Keras's own paths.

    Attributes:
        paths: The paths of each variable, the one to show first.
        known: The paths of all variables of the model.
    """

    def __init__(self, variables: Sequence[Any], model: Any):
        by_keras = [keras_path(v) for v in variables]
        tree = None if model is None else LayerTree.of(model)
        found = [[] if tree is None else tree.paths_of(v) for v in variables]
        self.paths = [paths or [other] for paths, other in zip(found, by_keras, strict=True)]
        if tree is not None and any(found):
            self._tree, self._keys, self.hint = tree, [backend.key(v) for v in variables], ""
        else:  # no model, or another one
            self._tree, self._keys, self.hint = LayerTree.of_paths(by_keras), list(range(len(by_keras))), _UNKNOWN
        self._of_keras = bool(self.hint)
        self.known = list(dict.fromkeys([*self._tree.all_paths(), *(path for paths in self.paths for path in paths)]))

    def weights(self, variables: Sequence[Any]) -> list[Weight]:
        """What rules are told about the variables, which are those of here."""
        nodes = [None if self._of_keras else self._tree.layer_of(v) for v in variables]
        found = []
        for variable, node, paths in zip(variables, nodes, self.paths, strict=True):
            kind, axes = role(variable, node and node.layer)
            dtype = keras.backend.standardize_dtype(variable.dtype)
            found.append(Weight(tuple(variable.shape), dtype, kind, axes, (*paths, keras_path(variable))))
        if self._of_keras:
            return found
        last = self._tree.last_kernel({backend.key(v) for v in variables if self._tree.layer_of(v)})
        return [w._replace(output=backend.key(v) in last) for w, v in zip(found, variables, strict=True)]

    def scales(self, layer_decay: float, blocks: int | str | None) -> list[float]:
        """The factor of each variable, 1 for the last block that one of them is in.

        Raises:
            ValueError: If `blocks` is a pattern that matches no layer.
        """
        layers = [node.path for node in self._tree.nodes if node.own]
        if isinstance(blocks, str) and not any(re.search(blocks, f"{path}/") for path in layers):
            raise ValueError(
                f"layer_blocks: the pattern {blocks!r} matches none of the {len(layers)} layers. "
                f"Nearest: {', '.join(map(repr, near_misses(blocks, layers)))}.{self.hint}"
            )
        depth = self._tree.depths(blocks)
        found = [depth.get(key, max(depth.values())) for key in self._keys]  # those outside the model decay nothing
        scales = [layer_decay ** (max(found, default=0) - mine) for mine in found]
        small = min(scales, default=1.0)
        if small < SMALL:
            warnings.warn(
                f"layer_decay={layer_decay} multiplies the learning rate of {self.paths[scales.index(small)][0]!r} by "
                f"{small:.1g}, which hardly trains it. Count fewer blocks with layer_blocks, or decay less; "
                "optimizer.explain(model) shows all rates.",
                stacklevel=2,
            )
        return scales


def keras_path(variable: Any) -> str:
    """The path that Keras gives a variable."""
    return getattr(variable, "path", variable.name)


def treatments(
    places: Places,
    weights: Sequence[Weight],
    rules: Mapping[int, Rule],
    groups: Sequence[Group] | None,
    layer_decay: float | None,
    layer_blocks: int | str | None,
    decay_mask: str,
) -> tuple[list[Treatment | None], list[Group | None]]:
    """How each parameter is treated, None for frozen ones, and which group it is in."""
    found = assign_groups(groups or (), places.paths, places.known, places.hint)
    scales = [1.0] * len(weights) if layer_decay is None else places.scales(layer_decay, layer_blocks)
    numbers = {id(g): place for place, g in enumerate(groups or (), 1) if g.own_rule is not None}
    result: list[Treatment | None] = []
    for group, scale, weight in zip(found, scales, weights, strict=True):
        if group is not None and not group.trainable:
            result.append(None)
            continue
        number = numbers.get(id(group), 0)
        decayed = decay_mask == "all" or weight.role != VECTOR
        lr_scale, own = (1.0, None) if group is None else (group.lr_scale, group.weight_decay)
        result.append(Treatment(scale * lr_scale, decayed, own, number, _route(rules[number], weight)))
    return result, found


def _route(rule: Rule, weight: Weight) -> str:
    name = rule.route(weight)
    if name and name not in rule.routes():
        raise ValueError(f"{type(rule).__name__}.route must return a name in routes(), got {name!r} for {weight}.")
    return name


def path_pattern(path: str) -> str:
    """A pattern for this path alone, also where Keras adds to its beginning or drops that, as it does when loading."""
    first, _, rest = path.partition("/")
    dropped = f"({re.escape(first)}/)?{re.escape(rest)}" if "/" in rest else re.escape(path)
    return f"^{dropped}$|/{re.escape(path)}$"

"""A search space: parameters by name, and conditions between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from keras_optkit import arguments
from keras_optkit.space.constraints import Constraint, parsed
from keras_optkit.space.parameters import TYPES, Bool, Choice, Parameter, Points, Values

CONSTRAINTS = "constraints"  # the key in a config

_DRAWS = 10_000  # random points that violate a constraint before the rest is looked through
_COUNTED = 100_000  # combinations that are looked through


class Space(Mapping[str, Parameter]):
    """What a search may vary: a mapping from names to `Float`, `Int`, `Bool` and `Choice`.

    It is data: it compares equal to a space with the same parameters, prints as the call that makes it, and goes to
    JSON and back with `get_config` and `from_config`. A parameter with `when=` is conditional; where its condition does
    not hold it is neither sampled, shown nor counted, so that two points that differ in nothing active are one point.

    Args:
        parameters: The mapping. A registered algorithm's default space is `card.space`.
        constraints: Expressions that must be true of every point, e.g. `["second_units <= first_units"]`, made of
            names of parameters, constants, `+ - * / // %`, comparisons, `in`, `and`, `or` and `not`. Other points are
            never proposed. One that names an inactive parameter does not apply. They are strings so that they are saved
            with the space. None: all points are allowed.
        more: Further parameters by keyword.

    Raises:
        TypeError: If a value is not `Float`, `Int`, `Bool` or `Choice`, if a name is not a string, or if `constraints`
            is not a list of strings.
        ValueError: If there is no parameter at all, if a name is given twice or is the name of a dict method, if a
            `when=` names an unknown parameter, a value that it cannot have, or leads round in a cycle, or if a
            constraint is no expression over the parameters. Where no point meets the constraints, methods that give
            points say so.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.Space(
        optimizer=ok.tuning.Choice(["SGD", "Adam"]),
        learning_rate=ok.tuning.Float(1e-4, 1e-1, log=True, step=10),
        momentum=ok.tuning.Choice([0.0, 0.9], when={"optimizer": "SGD"}),
    )
    assert space.size == 2 * 4 + 4
    assert ok.tuning.Space.from_config(space.get_config()) == space
    assert all(("momentum" in hp) == (hp.optimizer == "SGD") for hp in space.grid())

    funnel = ok.tuning.Space(
        first=ok.tuning.Int(1, 3), second=ok.tuning.Int(1, 3), constraints=["second < first"]
    )
    assert list(funnel.grid()) == [{"first": 2, "second": 1}, {"first": 3, "second": 1}, {"first": 3, "second": 2}]
    ```
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter] | None = None,
        /,
        *,
        constraints: Sequence[str] | None = None,
        **more: Parameter,
    ) -> None:
        given = {} if parameters is None else parameters
        if not isinstance(given, Mapping):
            raise TypeError(f"Space takes a mapping from names to parameters, got {given!r} of {type(given).__name__}.")
        twice = [name for name in given if name in more]
        if twice:
            raise ValueError(f"Each parameter must be given once, got {', '.join(map(repr, twice))} twice.")
        self._parameters: dict[str, Any] = {**given, **more}
        if not self._parameters:
            raise ValueError("Space must have at least one parameter, got none.")
        for name, parameter in self._parameters.items():
            if not isinstance(name, str):
                raise TypeError(f"The name of a parameter must be a string, got {name!r} of {type(name).__name__}.")
            if not name or hasattr(dict, name):
                raise ValueError(
                    f"The name of a parameter must not be empty or the name of a dict method, got {name!r}."
                )
            if name == CONSTRAINTS:
                raise ValueError(f"The name of a parameter must not be {CONSTRAINTS!r}, which configs have as a key.")
            if not isinstance(parameter, Parameter):
                raise TypeError(
                    f"{name} must be a Float, Int, Bool or Choice, got {parameter!r} of type "
                    f"{type(parameter).__name__}."
                )
        for name, parameter in self._parameters.items():
            for parent, values in (parameter.when or {}).items():
                self._check_condition(name, parent, values)
        self._order = self._parents_first()
        self._constraints: tuple[Constraint, ...] = () if constraints is None else parsed(constraints, self)

    @property
    def constraints(self) -> tuple[str, ...]:
        """The expressions that must be true of every point."""
        return tuple(constraint.text for constraint in self._constraints)

    def allows(self, values: Mapping[str, Any]) -> bool:
        """Whether a point meets all constraints."""
        return all(constraint.holds(values) for constraint in self._constraints)

    def _check_condition(self, name: str, parent: str, values: tuple[Any, ...]) -> None:
        arguments.choice(f"The key of {name}'s when=", parent, self._parameters)
        if self[parent].size == math.inf:
            raise ValueError(
                f"{name}'s when= must depend on parameters with a finite number of values, got {parent!r}, "
                f"which is {self[parent]!r}."
            )
        for value in values:
            arguments.choice(f"{name}'s when[{parent!r}]", value, self[parent].grid())

    def _parents_first(self) -> tuple[str, ...]:
        """The names in their order, except that each comes after those that its `when=` depends on."""
        order: list[str] = []
        rest = list(self)
        while rest:
            ready = next((name for name in rest if set(self[name].when or ()) <= set(order)), None)
            if ready is None:
                raise ValueError(f"The when= conditions must not form a cycle, got one among {', '.join(rest)}.")
            order.append(ready)
            rest.remove(ready)
        return tuple(order)

    def __getitem__(self, name: str) -> Any:
        return self._parameters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Space) and self.constraints != other.constraints:
            return False
        return dict(self) == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __or__(self, other: Mapping[str, Parameter]) -> Space:
        """The parameters and constraints of both; the same name in both raises ValueError."""
        if not isinstance(other, Mapping):
            return NotImplemented
        also = other.constraints if isinstance(other, Space) else ()
        return Space(dict(self), constraints=(*self.constraints, *also), **other)

    def __repr__(self) -> str:
        also = f", constraints={list(self.constraints)!r}" if self._constraints else ""
        if all(name.isidentifier() for name in self):
            return f"Space({', '.join(f'{name}={parameter!r}' for name, parameter in self.items())}{also})"
        return f"Space({self._parameters!r}{also})"

    def get_config(self) -> dict[str, Any]:
        """The space as JSON-ready values: name to the parameter's `get_config()`, and the constraints, if any."""
        config: dict[str, Any] = {name: parameter.get_config() for name, parameter in self.items()}
        return {**config, CONSTRAINTS: list(self.constraints)} if self._constraints else config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Space:
        """The space that `get_config` described."""
        parameters = {}
        entries = dict(config)
        constraints = entries.pop(CONSTRAINTS, None)
        for name, entry in entries.items():
            given = dict(entry)
            kind = arguments.choice(f"{name}'s type", given.pop("type", None), TYPES)
            parameters[name] = TYPES[kind](**given)
        return cls(parameters, constraints=constraints)

    def parents_first(self) -> tuple[str, ...]:
        """The names, each after those that its `when=` depends on."""
        return self._order

    def active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether the condition of parameter `name` holds, given the values of those it depends on."""
        conditions = self[name].when or {}
        return all(parent in values and values[parent] in allowed for parent, allowed in conditions.items())

    @property
    def size(self) -> int | float:
        """The number of points, inactive parameters not counted: an int, or `math.inf` if a range is continuous.

        With constraints, and more than 100,000 points without them, it is the number without them.
        """
        if not self._constraints or not self.is_listable:
            return self._combinations
        return sum(1 for _ in self._walk({name: self[name].grid() for name in self}))

    @property
    def is_listable(self) -> bool:
        """Whether all points can be listed: a finite number, with constraints at most 100,000 to check."""
        most = _COUNTED if self._constraints else math.inf
        return self._combinations < math.inf and self._combinations <= most

    @property
    def _combinations(self) -> int | float:
        """The number of points without constraints."""
        parents = {parent for parameter in self._parameters.values() for parent in parameter.when or ()}

        def count(values: dict[str, Any], names: tuple[str, ...]) -> int | float:
            if not names:
                return 1
            name, rest = names[0], names[1:]
            if not self.active(name, values):
                return count(values, rest)
            if name not in parents:  # all its values lead to the same number of points
                return self[name].size * count(values, rest)
            return sum(count({**values, name: value}, rest) for value in self[name].grid())

        return count({}, self._order)

    def defaults(self) -> Values:
        """The point at which every active parameter has its default: the one it was given, or else its first value.

        It need not meet the constraints.
        """

        def default(parameter: Any) -> Any:
            if parameter.default is not None:
                return parameter.default
            return parameter.grid()[0] if isinstance(parameter, Choice | Bool) else parameter.low

        return self._point(default)

    def sample(self, rng: np.random.Generator | int | None = None) -> Values:
        """One point at random: each active parameter is drawn by itself.

        Args:
            rng: A NumPy generator, or a seed for a new one.

        Raises:
            ValueError: If no point meets the constraints, or none of 10,000 random ones does.
        """
        generator = np.random.default_rng(rng)
        for _ in range(_DRAWS if self._constraints else 1):
            values = self._point(lambda parameter: parameter.sample(generator))
            if self.allows(values):
                return values
        if not self.is_listable:
            raise ValueError(
                f"None of {_DRAWS} random points meets the constraints {list(self.constraints)!r}. Choose ranges "
                "of which more is allowed."
            )
        rest = list(self.grid())
        return rest[int(generator.integers(len(rest)))]

    def _point(self, pick: Any) -> Values:
        values: dict[str, Any] = {}
        for name in self._order:
            if self.active(name, values):
                values[name] = pick(self[name])
        return self._ordered(values)

    def _ordered(self, values: Mapping[str, Any]) -> Values:
        return Values({name: values[name] for name in self if name in values})

    def grid(self, points: Points = None) -> Iterator[Values]:
        """All points, the last parameter varying fastest.

        Args:
            points: How many values to take of a continuous range (a `Float` without `step`), one number for all or a
                mapping from names to numbers.

        Raises:
            TypeError: If `points` is not an int or a mapping.
            ValueError: If a range is continuous and has no number of points, if `points` names another parameter, or if
                no point meets the constraints.
        """
        continuous = [name for name in self if self[name].size == math.inf]
        counts: dict[str, Any] = dict(points) if isinstance(points, Mapping) else dict.fromkeys(continuous, points)
        for name, count in counts.items():
            arguments.choice("The key of points", name, continuous)
            arguments.integer("points", count, 2, optional=True)
        missing = [name for name in continuous if counts.get(name) is None]
        if missing:
            raise ValueError(
                f"A grid needs a finite number of values of every parameter, got the continuous {missing[0]}="
                f"{self[missing[0]]!r}. Give it a step, or say how many values to take with points=."
            )
        walk = self._walk({name: self[name].grid(counts.get(name)) for name in self})
        first = next(walk, None)
        if first is None:
            raise ValueError(f"No point meets the constraints {list(self.constraints)!r}.")
        return itertools.chain([first], walk)

    def _walk(self, grids: Mapping[str, Sequence[Any]]) -> Iterator[Values]:
        """All points with these values that meet the constraints."""
        order = self._order
        # A constraint is looked at as soon as all that it names have values, so that less is walked through.
        due: list[list[Constraint]] = [[] for _ in order]
        for constraint in self._constraints:
            due[max(order.index(name) for name in constraint.names)].append(constraint)

        def walk(values: dict[str, Any], i: int) -> Iterator[Values]:
            if i == len(order):
                yield self._ordered(values)
                return
            name = order[i]
            for value in grids[name] if self.active(name, values) else (None,):
                point = values if value is None else {**values, name: value}
                if all(constraint.holds(point) for constraint in due[i]):
                    yield from walk(point, i + 1)

        return walk({}, 0)

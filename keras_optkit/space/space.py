"""A search space: parameters by name, and conditions between them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from keras_optkit import arguments
from keras_optkit.space.parameters import TYPES, Choice, Parameter, Points, Values


class Space(Mapping[str, Parameter]):
    """What a search may vary: a mapping from names to `Float`, `Int` and `Choice`.

    It is data: it compares equal to a space with the same parameters, prints as the call that makes it, and goes to
    JSON and back with `get_config` and `from_config`. A parameter with `when=` is conditional; where its condition does
    not hold it is neither sampled, shown nor counted, so that two points that differ in nothing active are one point.

    Args:
        parameters: The mapping. A registered algorithm's default space is `card.space`.
        more: Further parameters by keyword.

    Raises:
        TypeError: If a value is not `Float`, `Int` or `Choice`, or if a name is not a string.
        ValueError: If there is no parameter at all, if a name is given twice or is the name of a dict method, or if a
            `when=` names an unknown parameter, a value that it cannot have, or leads round in a cycle.

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
    ```
    """

    def __init__(self, parameters: Mapping[str, Parameter] | None = None, /, **more: Parameter) -> None:
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
            if not isinstance(parameter, Parameter):
                raise TypeError(
                    f"{name} must be a Float, Int or Choice, got {parameter!r} of type {type(parameter).__name__}."
                )
        for name, parameter in self._parameters.items():
            for parent, values in (parameter.when or {}).items():
                self._check_condition(name, parent, values)
        self._order = self._parents_first()

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

    def __repr__(self) -> str:
        if all(name.isidentifier() for name in self):
            return f"Space({', '.join(f'{name}={parameter!r}' for name, parameter in self.items())})"
        return f"Space({self._parameters!r})"

    def get_config(self) -> dict[str, Any]:
        """The space as JSON-ready values: name to the parameter's `get_config()`."""
        return {name: parameter.get_config() for name, parameter in self.items()}

    @classmethod
    def from_config(cls, config: Mapping[str, Mapping[str, Any]]) -> Space:
        """The space that `get_config` described."""
        parameters = {}
        for name, entry in config.items():
            given = dict(entry)
            kind = arguments.choice(f"{name}'s type", given.pop("type", None), TYPES)
            parameters[name] = TYPES[kind](**given)
        return cls(parameters)

    def parents_first(self) -> tuple[str, ...]:
        """The names, each after those that its `when=` depends on."""
        return self._order

    def active(self, name: str, values: Mapping[str, Any]) -> bool:
        """Whether the condition of parameter `name` holds, given the values of those it depends on."""
        conditions = self[name].when or {}
        return all(parent in values and values[parent] in allowed for parent, allowed in conditions.items())

    @property
    def size(self) -> int | float:
        """The number of points, inactive parameters not counted: an int, or `math.inf` if a range is continuous."""
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
        """The point at which every active parameter has its default: the one it was given, or else its first value."""

        def default(parameter: Any) -> Any:
            if parameter.default is not None:
                return parameter.default
            return parameter.grid()[0] if isinstance(parameter, Choice) else parameter.low

        return self._point(default)

    def sample(self, rng: np.random.Generator | int | None = None) -> Values:
        """One point at random: each active parameter is drawn by itself.

        Args:
            rng: A NumPy generator, or a seed for a new one.
        """
        generator = np.random.default_rng(rng)
        return self._point(lambda parameter: parameter.sample(generator))

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
            ValueError: If a range is continuous and has no number of points, or if `points` names another parameter.
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
        grids = {name: self[name].grid(counts.get(name)) for name in self}

        def walk(values: dict[str, Any], names: tuple[str, ...]) -> Iterator[Values]:
            if not names:
                yield self._ordered(values)
            elif not self.active(names[0], values):
                yield from walk(values, names[1:])
            else:
                for value in grids[names[0]]:
                    yield from walk({**values, names[0]: value}, names[1:])

        return walk({}, self._order)

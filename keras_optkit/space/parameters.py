"""The parameters of a search space, and the values that a trial has for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from statistics import NormalDist
from typing import Any, ClassVar

import numpy as np

from keras_optkit import arguments

Points = int | Mapping[str, int] | None

_SCALARS = (bool, int, float, str)


class Values(dict[str, Any]):
    """The hyperparameters of one trial: a dict that can also be read as attributes.

    `hp["units"]` and `hp.units` are the same. A hyperparameter whose condition (`when=`) does not hold is absent:
    `"momentum" in hp` is False, `hp.momentum` raises AttributeError, and `hp.get("momentum", 0.0)` gives a default.

    Example:
    ```python
    import keras_optkit as ok

    hp = ok.tuning.Values(units=32)
    assert hp.units == hp["units"] == 32
    ```
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            active = ", ".join(map(repr, self)) or "none"
            raise AttributeError(f"No hyperparameter {name!r} is active in this trial; active: {active}.") from None

    def __repr__(self) -> str:
        return f"Values({dict.__repr__(self)})"


def _scalar(name: str, value: Any) -> Any:
    """`value` as a bool, int, float or str of Python: what JSON, KerasTuner and TensorBoard's HParams can hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if not isinstance(value, _SCALARS):
        raise TypeError(f"{name} must be a bool, int, float or str, got {value!r} of type {type(value).__name__}.")
    if isinstance(value, float):
        arguments.real(name, value)
    return value


def _conditions(when: Any) -> dict[str, tuple[Any, ...]] | None:
    """`when` with every allowed value in a tuple."""
    if when is None:
        return None
    allowed = "a mapping from the name of a parameter to its value or a list of its values"
    if not isinstance(when, Mapping):
        raise TypeError(f"when must be {allowed}, or None, got {when!r} of type {type(when).__name__}.")
    if not when:
        raise ValueError(f"when must be {allowed}, or None, got an empty mapping.")
    found = {}
    for parent, values in when.items():
        if not isinstance(parent, str):
            raise TypeError(f"when must be {allowed}, or None, got the key {parent!r} of type {type(parent).__name__}.")
        listed = tuple(values) if isinstance(values, list | tuple) else (values,)
        if not listed:
            raise ValueError(f"when[{parent!r}] must name at least one value, got {values!r}.")
        found[parent] = tuple(_scalar(f"when[{parent!r}]", value) for value in listed)
    return found


@dataclass(frozen=True, repr=False)
class Parameter:
    """What `Float`, `Int`, `Bool` and `Choice` have in common."""

    prior: ClassVar[tuple[str, ...]] = ()  # the fields that say which values are likely

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments with the class's name as `"type"`, ready for JSON."""
        config: dict[str, Any] = {"type": type(self).__name__}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in self.prior and value is None:
                continue  # as configs were before there were priors
            if f.name == "when" and value is not None:
                value = {parent: list(values) for parent, values in value.items()}
            config[f.name] = list(value) if isinstance(value, tuple) else value
        return config

    @property
    def has_prior(self) -> bool:
        """Whether some values are more likely than others by `weights=` or `normal=`."""
        return any(getattr(self, name) is not None for name in self.prior)

    @property
    def size(self) -> int | float:
        """How many values there are: an int, or `math.inf` for a continuous range."""
        return len(self.grid())

    def grid(self, points: int | None = None) -> Sequence[Any]:
        """All values in order; of a continuous range, `points` of them, evenly spaced with both ends."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator) -> Any:
        """One value at random."""
        raise NotImplementedError

    def _set(self, **attributes: Any) -> None:
        """Stores normalised arguments, which a frozen dataclass allows only this way."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, repr=False)
class _Range(Parameter):
    """Numbers between two ends."""

    low: Any
    high: Any
    log: Any = False
    step: Any = None
    default: Any = None
    when: Any = None
    normal: Any = None

    prior: ClassVar[tuple[str, ...]] = ("normal",)
    number: ClassVar[Any]  # the check of one argument, `arguments.real` or `arguments.integer`

    def __post_init__(self) -> None:
        if not isinstance(self.log, bool) and self.log != "reverse":
            raise TypeError(f'log must be True, False or "reverse", got {self.log!r}.')
        log = bool(self.log)
        low, high = self.number("low", self.low), self.number("high", self.high)
        if log and low <= 0:
            raise ValueError(f"low must be greater than 0 where log={self.log!r}, got {low!r}.")
        if low > high:
            raise ValueError(f"high must be at least low={low!r}, got {high!r}.")
        step = self.number("step", self.step, optional=True)
        if step is not None and step <= (1 if log else 0):
            rule = f"a factor greater than 1 where log={self.log!r}" if log else "greater than 0"
            raise ValueError(f"step must be {rule}, or None, got {step!r}.")
        self._set(low=low, high=high, step=step, when=_conditions(self.when))
        if step is not None and low < high and self.size == 1:
            most = f"high / low = {high / low:g}" if log else f"high - low = {high - low:g}"
            raise ValueError(f"step must be at most {most}, or None, got {step!r}.")
        default = self.number("default", self.default, optional=True)
        if default is not None:
            if not low <= default <= high:
                raise ValueError(f"default must be a number in [{low!r}, {high!r}] or None, got {default!r}.")
            if self.size < math.inf and default not in self.grid():
                raise ValueError(f"default must be one of the values that step={step!r} reaches, got {default!r}.")
        self._set(default=default, normal=self._checked_normal())

    def _checked_normal(self) -> tuple[float, float] | None:
        if self.normal is None:
            return None
        if not isinstance(self.normal, list | tuple) or len(self.normal) != 2:
            raise TypeError(f"normal must be a pair (mean, standard deviation) or None, got {self.normal!r}.")
        if self.log == "reverse":
            raise ValueError(f'normal must be None where log="reverse", got {self.normal!r}.')
        mean = float(arguments.real("normal[0]", self.normal[0], self.low, self.high))
        std = float(arguments.real("normal[1]", self.normal[1]))
        if std <= (1 if self.log else 0):
            rule = "a factor greater than 1 where log=True" if self.log else "greater than 0"
            raise ValueError(f"normal[1], the standard deviation, must be {rule}, got {std!r}.")
        return mean, std

    def _count(self) -> int:
        """The number of steps' values that fit between the ends (both included)."""
        steps = math.log(self.high / self.low, self.step) if self.log else (self.high - self.low) / self.step
        return math.floor(steps + 1e-9) + 1

    def mirrored(self, value: Any) -> Any:
        """The value as far from `high` as this one is from `low`; with `log="reverse"` its logarithm is even."""
        return self.low + self.high - value

    def _scaled(self) -> tuple[NormalDist, Any]:
        """The normal distribution, and the function of values that it is of."""
        scale = math.log if self.log else float
        return NormalDist(scale(self.normal[0]), scale(self.normal[1])), scale

    def _from_grid(self, rng: np.random.Generator) -> Any:
        grid = self.grid()
        if self.normal is None:
            return grid[int(rng.integers(len(grid)))]
        distribution, scale = self._scaled()
        z = np.array([distribution.zscore(scale(value)) for value in grid])
        weights = np.exp((np.min(z**2) - z**2) / 2)
        return grid[int(rng.choice(len(grid), p=weights / weights.sum()))]

    def _from_normal(self, rng: np.random.Generator, low: float, high: float) -> float:
        """A value of the normal distribution, cut off at the ends."""
        distribution, scale = self._scaled()
        share = rng.uniform(distribution.cdf(scale(low)), distribution.cdf(scale(high)))
        value = distribution.inv_cdf(min(max(share, 1e-300), 1 - 1e-16))
        return min(max(math.exp(value) if self.log else value, low), high)


@dataclass(frozen=True, repr=False)
class Float(_Range):
    """A real number between `low` and `high`, both included.

    Args:
        low: Least value.
        high: Greatest value.
        log: False: uniform on [low, high]. True: the logarithm is uniform, so that every factor of ten is equally
            likely; use it for learning rates and decay strengths. `"reverse"`: the same seen from `high`, so that most
            values are near it; use it for momenta close to 1. Both need `low` > 0.
        step: Only the values low, low + step, low + 2 step, ... up to `high`; with `log`, low, low * step, ....
            They are rounded to 12 significant digits. None: any value, so a grid search needs to be told how many.
        default: The value that `Space.defaults` takes; `low` when left out.
        when: The parameter exists only where these other parameters have these values, e.g. `{"optimizer": "SGD"}` or
            `{"layers": [2, 3]}`; all entries must hold.
        normal: What is likely, if you know it: a pair (mean, standard deviation) of a normal distribution, cut off at
            both ends. With `log`, of the logarithm: the mean is a value and the deviation a factor, so that
            `(1e-3, 3.0)` is between 1e-3 / 3 and 1e-3 * 3 two times in three. None: as `log` says.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If `low` > `high`, if `log` and `low` <= 0, if `step` leaves nothing to choose from, if `default`
            is not one of the values, or if the mean of `normal` is outside of the range.

    Example:
    ```python
    import keras_optkit as ok

    learning_rate = ok.tuning.Float(1e-4, 1e-1, log=True)
    assert learning_rate.grid(points=4) == (0.0001, 0.001, 0.01, 0.1)
    assert ok.tuning.Float(0.0, 0.5, step=0.25).grid() == (0.0, 0.25, 0.5)
    likely = ok.tuning.Float(1e-4, 1e-1, log=True, normal=(1e-3, 3.0))
    ```
    """

    @staticmethod
    def number(name: str, value: Any, *, optional: bool = False) -> Any:
        """Checks one argument."""
        value = arguments.real(name, value, optional=optional)
        return value if value is None else float(value)

    @property
    def size(self) -> int | float:
        """How many values there are: an int, or `math.inf` for a continuous range."""
        if self.low == self.high:
            return 1
        return math.inf if self.step is None else self._count()

    def grid(self, points: int | None = None) -> tuple[float, ...]:
        """All values in order; of a continuous range, `points` of them, evenly spaced with both ends.

        Raises:
            ValueError: If the range is continuous and `points` is None.
        """
        if self.low == self.high:
            return (self.low,)
        if self.step is not None:
            n, step = self._count(), self.step
        elif points is None:
            raise ValueError(f"{self!r} has no finite grid: give it a step, or give the grid a number of points.")
        else:
            n = arguments.integer("points", points, 2)
            step = (self.high / self.low) ** (1 / (n - 1)) if self.log else (self.high - self.low) / (n - 1)
        values = [self.low * step**i if self.log else self.low + i * step for i in range(n)]
        if self.log == "reverse":
            values = [self.mirrored(value) for value in reversed(values)]
        # 0.1 + 2 * 0.1 is to be 0.3, and the last point is to be `high`, not a neighbouring float.
        return tuple(min(max(float(f"{value:.12g}"), self.low), self.high) for value in values)

    def sample(self, rng: np.random.Generator) -> float:
        """One value at random."""
        if self.size < math.inf:
            return self._from_grid(rng)
        if self.normal is not None:
            return self._from_normal(rng, self.low, self.high)
        if not self.log:
            return float(rng.uniform(self.low, self.high))
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        value = self.mirrored(value) if self.log == "reverse" else value
        return min(max(value, self.low), self.high)


@dataclass(frozen=True, repr=False)
class Int(_Range):
    """An integer between `low` and `high`, both included.

    Args:
        low: Least value.
        high: Greatest value.
        log: False: all values are equally likely. True: P(k) is proportional to log(k + 1) - log(k), so that every
            doubling is about equally likely. `"reverse"`: the same seen from `high`. Both need `low` > 0.
        step: Only the values low, low + step, ... up to `high`; with `log`, low, low * step, ....
        default: The value that `Space.defaults` takes; `low` when left out.
        when: The parameter exists only where these other parameters have these values, as for `Float`.
        normal: What is likely, as for `Float`, rounded to whole numbers. None: as `log` says.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If `low` > `high`, if `log` and `low` <= 0, if `step` leaves nothing to choose from, or if `default`
            is not one of the values.

    Example:
    ```python
    import keras_optkit as ok

    assert list(ok.tuning.Int(1, 3).grid()) == [1, 2, 3]
    assert list(ok.tuning.Int(16, 128, log=True, step=2).grid()) == [16, 32, 64, 128]
    ```
    """

    number = staticmethod(arguments.integer)

    def grid(self, points: int | None = None) -> Sequence[int]:  # noqa: ARG002  (always finite)
        """All values in order."""
        if self.log and self.step is not None:
            values = tuple(self.low * self.step**i for i in range(self._count()))
            return tuple(map(self.mirrored, reversed(values))) if self.log == "reverse" else values
        return range(self.low, self.high + 1, self.step or 1)

    def sample(self, rng: np.random.Generator) -> int:
        """One value at random."""
        if self.step is None and self.normal is not None:
            return min(max(round(self._from_normal(rng, self.low - 0.5, self.high + 0.5)), self.low), self.high)
        if self.log and self.step is None:
            value = math.floor(math.exp(rng.uniform(math.log(self.low), math.log(self.high + 1))))
            value = min(max(value, self.low), self.high)
            return self.mirrored(value) if self.log == "reverse" else value
        return self._from_grid(rng)


@dataclass(frozen=True, repr=False)
class Bool(Parameter):
    """False or True.

    Args:
        default: The value that `Space.defaults` takes; False when left out.
        when: The parameter exists only where these other parameters have these values, as for `Float`.

    Raises:
        TypeError: If `default` is not a bool, or `when` not a mapping.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.Space(dropout=ok.tuning.Bool(), rate=ok.tuning.Float(0.1, 0.5, when={"dropout": True}))
    assert space.defaults() == {"dropout": False}
    ```
    """

    default: Any = None
    when: Any = None

    def __post_init__(self) -> None:
        if self.default is not None:
            arguments.boolean("default", self.default)
        self._set(when=_conditions(self.when))

    def grid(self, points: int | None = None) -> tuple[bool, bool]:  # noqa: ARG002  (always finite)
        """Both values."""
        return (False, True)

    def sample(self, rng: np.random.Generator) -> bool:
        """One value at random."""
        return bool(rng.integers(2))


@dataclass(frozen=True, repr=False)
class Choice(Parameter):
    """One of a list of values.

    Args:
        values: A list or tuple of bools, of numbers or of strings (whole numbers among floats become floats). For "none
            of these" use a string such as `"none"`, since None has no place in TensorBoard's HParams.
        default: The value that `Space.defaults` takes; the first when left out.
        when: The parameter exists only where these other parameters have these values, as for `Float`.
        weights: How likely each value is, as numbers greater than 0, relative to their sum. None: all the same.

    Raises:
        TypeError: If `values` is not a list or tuple, if its values are of different types, or if `weights` are not
            numbers.
        ValueError: If `values` is empty or repeats itself, if `default` is not in it, or if there are more or fewer
            `weights` than values, or one is not greater than 0.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.tuning.Choice(["SGD", "Adam"], default="Adam")
    momentum = ok.tuning.Float(0.5, 0.99, when={"optimizer": "SGD"})
    assert optimizer.size == 2
    likely = ok.tuning.Choice(["relu", "gelu", "selu"], weights=[3, 3, 1])
    ```
    """

    values: Any
    default: Any = None
    when: Any = None
    weights: Any = None

    prior: ClassVar[tuple[str, ...]] = ("weights",)

    def __post_init__(self) -> None:
        if not isinstance(self.values, list | tuple):
            raise TypeError(
                f"values must be a list or tuple, got {self.values!r} of type {type(self.values).__name__}."
            )
        values = tuple(_scalar(f"values[{i}]", value) for i, value in enumerate(self.values))
        if not values:
            raise ValueError(f"values must have at least one entry, got {self.values!r}.")
        kinds = {type(value) for value in values}
        if kinds == {int, float}:
            values, kinds = tuple(map(float, values)), {float}
        if len(kinds) > 1:
            names = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise TypeError(f"values must all be bools, all numbers or all strings, got {self.values!r} ({names}).")
        if len(set(values)) < len(values):
            raise ValueError(f"values must all differ, got {self.values!r}.")
        default = self.default
        if default is not None:
            default = values[values.index(arguments.choice("default", default, values))]
        self._set(values=values, default=default, when=_conditions(self.when), weights=self._checked_weights(values))

    def _checked_weights(self, values: tuple[Any, ...]) -> tuple[float, ...] | None:
        if self.weights is None:
            return None
        if not isinstance(self.weights, list | tuple):
            raise TypeError(f"weights must be a list of a number for each value or None, got {self.weights!r}.")
        if len(self.weights) != len(values):
            raise ValueError(f"weights must be {len(values)} numbers, as many as values, got {self.weights!r}.")
        weights = tuple(float(arguments.real(f"weights[{i}]", weight)) for i, weight in enumerate(self.weights))
        if min(weights) <= 0:
            raise ValueError(f"weights must be greater than 0, got {self.weights!r}; leave out what must not be drawn.")
        return weights

    def grid(self, points: int | None = None) -> tuple[Any, ...]:  # noqa: ARG002  (always finite)
        """All values in order."""
        return self.values

    def sample(self, rng: np.random.Generator) -> Any:
        """One value at random, by `weights`, or all equally likely."""
        if self.weights is None:
            return self.values[int(rng.integers(len(self.values)))]
        weights = np.array(self.weights)
        return self.values[int(rng.choice(len(self.values), p=weights / weights.sum()))]


TYPES = {cls.__name__: cls for cls in (Float, Int, Bool, Choice)}

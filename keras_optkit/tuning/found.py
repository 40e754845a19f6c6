"""Spaces from KerasTuner's own: from its `HyperParameters`, and from what a build function asks them for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import keras_tuner

from keras_optkit.private import clear_session
from keras_optkit.space import Bool, Choice, Float, Int, Parameter, Space

_FEW = 8  # values that are all tried at once; of more, the ends and the middle come first
_MOST = 64  # values that are tried where the calls of the build function depend on them
_BUILDS = 300
_CHECKS = 8  # random points at which what was found is compared with what is asked for

When = dict[str, list[Any]]


def parameter_of(hp: Any) -> Parameter:
    """One of KerasTuner's hyperparameters, without its conditions."""
    kind = type(hp).__name__
    if kind == "Fixed":
        return Choice([hp.value])
    if kind == "Boolean":
        return Bool(default=bool(hp.default) or None)
    if kind == "Choice":
        values = list(dict.fromkeys(hp.values))
        return Choice(values, default=None if hp.default == values[0] else hp.default)
    if kind not in ("Float", "Int"):
        raise TypeError(f"Hyperparameter {hp.name!r} must be Int, Float, Choice, Boolean or Fixed, got {hp!r}.")
    log = {"linear": False, "log": True, "reverse_log": "reverse"}[hp.sampling]
    step = None if kind == "Int" and not log and hp.step == 1 else hp.step
    if step is not None and (hp.min_value * step if log else hp.min_value + step) > hp.max_value:
        return Choice([hp.min_value])
    made = (Float if kind == "Float" else Int)(hp.min_value, hp.max_value, log, step)
    default = hp.default
    known = made.size == math.inf or default in made.grid()  # KerasTuner takes one between two steps, too
    return replace(made, default=default if known and default != hp.min_value else None)


def _conditions(hp: Any, parameters: Mapping[str, Parameter]) -> When | None:
    """The conditions that KerasTuner knows of; None if they never hold."""
    when: When = {}
    for condition in hp.conditions:
        parent = parameters.get(condition.name)
        known = condition.values if parent is None or parent.size == math.inf else parent.grid()
        values = [value for value in condition.values if value in known]
        when[condition.name] = [value for value in when.get(condition.name, values) if value in values]
    return None if any(not values for values in when.values()) else when


def _either(name: str, first: When, second: When) -> When:
    """The condition that one of two holds, if it can be said with `when=`."""
    different = [parent for parent in {**first, **second} if first.get(parent) != second.get(parent)]
    if not different or not first or not second:
        return {} if different else first
    (parent, *others) = different
    if others or parent not in first or parent not in second:
        raise ValueError(
            f"Hyperparameter {name!r} is asked for under the conditions {first} and {second}, which "
            "a Space cannot hold for one name: give it two names."
        )
    return {**first, parent: list(dict.fromkeys([*first[parent], *second[parent]]))}


def _space(entries: Iterable[Any], inferred: Mapping[str, When] | None = None) -> Space:
    """The space of KerasTuner's hyperparameters, in their order."""
    parameters: dict[str, Parameter] = {}
    conditions: dict[str, When] = {}
    for hp in entries:
        parameter, when = parameter_of(hp), _conditions(hp, parameters)
        if when is None:
            continue
        if hp.name not in parameters:
            parameters[hp.name], conditions[hp.name] = parameter, when
        elif parameters[hp.name] != parameter:
            raise ValueError(
                f"Hyperparameter {hp.name!r} is asked for as {parameters[hp.name]!r} and as {parameter!r}: give it two "
                "names."
            )
        else:
            conditions[hp.name] = _either(hp.name, conditions[hp.name], when)
    for name, more in (inferred or {}).items():
        for parent, values in more.items():
            both = [value for value in conditions[name].get(parent, values) if value in values]
            conditions[name][parent] = both or values
    return Space({name: _under(p, conditions[name]) for name, p in parameters.items()})


def _under(parameter: Any, when: When) -> Any:
    return replace(parameter, when=when or None)


def space_of(hyperparameters: keras_tuner.HyperParameters) -> Space:
    """The space of KerasTuner's `HyperParameters`, with the conditions that these know of.

    Raises:
        TypeError: If one is of another class than KerasTuner's.
        ValueError: If a name has two ranges, or conditions that `when=` cannot say.
    """
    return _space(hyperparameters.space)


def _check_same(entry: Any, known: Iterable[Any]) -> None:
    """Raises if a name is asked for with other values than before, under the same conditions."""
    for other in known:
        first, second = parameter_of(other), parameter_of(entry)
        if entry.conditions == other.conditions and first != second:
            raise ValueError(
                f"Hyperparameter {entry.name!r} is asked for as {first!r} and as {second!r}: give it two names."
            )


class _Run:
    """One call of the build function: what it asked for, in order, and the values it got."""

    def __init__(self, build: Callable[[Any], Any], values: Mapping[str, Any]) -> None:
        hp = keras_tuner.HyperParameters()
        hp.values = dict(values)
        self.error: Exception | None = None
        try:
            build(hp)
        except Exception as error:
            self.error = error
        self.entries = list(hp.space)
        self.names = list(dict.fromkeys(entry.name for entry in self.entries))
        self.values = {name: hp.values[name] for name in self.names if name in hp.values}

    def has(self, name: str) -> bool | None:
        """Whether a name was asked for; None if the run ended before it could be."""
        return True if name in self.names else None if self.error else False


class _Explorer:
    """Calls a build function at different points to see which hyperparameters it asks for where."""

    def __init__(self, build: Callable[[Any], Any]) -> None:
        self._build = build
        self._runs: dict[str, _Run] = {}
        self.entries: dict[str, list[Any]] = {}
        self.parameters: dict[str, Parameter] = {}
        self.seen_at: dict[str, _Run] = {}  # of each name a run in which it is active
        self._new: list[str] = []
        first = self.run({})
        if first.error:
            raise first.error
        self.explore()

    @property
    def runs(self) -> list[_Run]:
        """All calls so far."""
        return list(self._runs.values())

    def run(self, values: Mapping[str, Any]) -> _Run:
        key = repr(sorted(values.items()))
        if key not in self._runs:
            self._runs[key] = run = _Run(self._build, values)
            for entry in run.entries:
                known = self.entries.setdefault(entry.name, [])
                _check_same(entry, known)
                if all(entry.conditions != other.conditions for other in known):
                    known.append(entry)
                if len(known) == 1:
                    self.parameters[entry.name] = parameter_of(known[0])
            for name in run.names:
                if name not in self.seen_at:
                    self.seen_at[name] = run
                    self._new.append(name)
        return self._runs[key]

    def explore(self) -> None:
        """Tries other values of all that was found, and of what is found by that."""
        while self._new:
            name = self._new.pop(0)
            run = self.seen_at[name]
            if name not in run.values:
                wanted = {c.name: c.values[0] for entry in self.entries[name] for c in entry.conditions}
                active = self.run({**run.values, **wanted})
                if name not in active.values:
                    continue
                self.seen_at[name] = run = active
            self.varied(run, name)

    def varied(self, run: _Run, name: str) -> dict[Any, _Run]:
        """Runs with other values of one parameter: with all, if it matters which and there are not too many."""
        parameter = self.parameters[name]
        if len(self._runs) > _BUILDS:
            return {}
        values = list(parameter.grid(2 if parameter.size == math.inf else None))
        few = values if len(values) <= _FEW else [values[0], values[len(values) // 2], values[-1]]
        runs = {value: self.run({**run.values, name: value}) for value in few}
        if len({tuple(other.names) for other in runs.values() if not other.error}) > 1 and len(values) <= _MOST:
            runs = {value: self.run({**run.values, name: value}) for value in values}
        return runs

    def conditions(self) -> dict[str, When]:
        """Of each name, for which values of those asked for before it is asked for."""
        found: dict[str, When] = {}
        for name in list(self.entries):
            run, when = self.seen_at[name], {}
            for parent in run.names[: run.names.index(name)]:
                runs = self.varied(run, parent) if parent in run.values else {}
                present = {value: other.has(name) for value, other in runs.items()}
                if False in present.values() and len(present) == self.parameters[parent].size:
                    when[parent] = [value for value, there in present.items() if there is not False]
            implied = {
                parent
                for parent, values in when.items()
                for other in when
                if set(found.get(other, {}).get(parent, [])) <= set(values) and parent in found.get(other, {})
            }
            found[name] = {parent: values for parent, values in when.items() if parent not in implied}
        if self._new:
            self.explore()
            return self.conditions()
        return found


def found_space(build: Callable[[Any], Any]) -> Space:
    """The space of a KerasTuner build function: it is called at several points to see what it asks `hp` for.

    Conditions are those of `hp.conditional_scope`, `parent_name=` and `if`: a call that is only made for some values of
    a hyperparameter has these as its `when=`. A call whose condition is not found, since it depends on several
    hyperparameters at a time or on a range of more than 64 values, is searched at all points.

    Raises:
        ValueError: If `build` asks for no hyperparameter, or for one name in two ways.
        Exception: What `build` raises with the defaults.
    """
    explorer = _Explorer(build)
    conditions = explorer.conditions()

    def space() -> Space:
        if not explorer.entries:
            raise ValueError("build must ask hp for hyperparameters where space is None, got one that asks for none.")
        entries = [entry for name in explorer.entries for entry in explorer.entries[name]]
        return _space(entries, conditions)

    def checked(found: Space) -> Space:
        """Without the conditions of what was asked for where they do not hold: there is more than the one found."""
        explorer.explore()  # of what the last calls have asked for first
        conditions.update({name: {} for name in explorer.entries if name not in found})
        for run in explorer.runs:
            conditions.update({n: {} for n in run.values if n in found and not found.active(n, run.values)})
        return space()

    found = checked(space())
    for seed in range(_CHECKS):
        explorer.run(found.sample(seed))
        found = checked(found)
    clear_session()
    return found

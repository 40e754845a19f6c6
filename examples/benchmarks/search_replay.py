"""Searches replayed on a table of learning curves: who trains which row of the table, from which epoch to which.

A search is a series of parts, `(row, begin, end)`: the row is trained from epoch `begin` to epoch `end`. Strategies
that propose points of the whole space, rather than rows, are given the nearest row that they have not had, and are told
the values of that row as if they had proposed them.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import keras_tuner
import numpy as np
import optuna

import keras_optkit as ok
from keras_optkit.tuning import Bool, Choice, Float, Int, Space
from keras_optkit.tuning.pruners import ASHA, PASHA, Hyperband, RungPruner, Standing
from keras_optkit.tuning.samplers import Study, distribution, params_of, point_of, sampler_of

optuna.logging.set_verbosity(optuna.logging.WARNING)

Part = tuple[int, int, int]
OBJECTIVE = "score"


@dataclass
class Table:
    """What is known of all points.

    Attributes:
        space: What the points are of.
        points: One for each row.
        scores: The objective, to be large, of each row after each epoch.
    """

    space: Space
    points: Sequence[Mapping[str, Any]]
    scores: np.ndarray

    def __post_init__(self) -> None:
        self.best = np.maximum.accumulate(self.scores, axis=1)
        self.places = np.array([self.place(point) for point in self.points])
        self.wide = np.array([self._is_unordered(name) for name in self.space])

    def __len__(self) -> int:
        return len(self.points)

    @property
    def epochs(self) -> int:
        """Of each row."""
        return self.scores.shape[1]

    def _is_unordered(self, name: str) -> bool:
        parameter = self.space[name]
        return isinstance(parameter, Choice | Bool) and any(isinstance(v, str) for v in parameter.grid())

    def place(self, point: Mapping[str, Any]) -> list[float]:
        """A point with each hyperparameter from 0 to 1, as it is searched; values without an order are 0, 1, 2, ..."""
        found = []
        for name, parameter in self.space.items():
            if isinstance(parameter, Choice | Bool):
                values = list(parameter.grid())
                index = values.index(point[name])
                found.append(float(index) if self._is_unordered(name) else index / max(len(values) - 1, 1))
            elif isinstance(parameter, Float | Int):
                scale = math.log if parameter.log else float
                low, high = scale(parameter.low), scale(parameter.high)
                found.append((scale(point[name]) - low) / (high - low))
        return found

    def nearest(self, point: Mapping[str, Any], tried: Sequence[int]) -> int | None:
        """The nearest row that was not tried; other values without an order are 1 away from each other."""
        if len(tried) >= len(self):
            return None
        apart = np.abs(self.places - self.place(point))
        apart[:, self.wide] = apart[:, self.wide] > 0
        distances = np.square(apart).sum(axis=1)
        distances[list(tried)] = np.inf
        return int(np.argmin(distances))


# Without a model of the scores


def in_order(table: Table, seed: int) -> Iterator[int]:
    """The rows in random order."""
    yield from map(int, np.random.default_rng(seed).permutation(len(table)))


def with_pruner(pruner: RungPruner, strategy: str | None = None) -> Callable[[Table, int], Iterator[Part]]:
    """A search of this package with a pruner: `strategy` proposes points; None: they are random."""

    def parts(table: Table, seed: int) -> Iterator[Part]:
        order = in_order(table, seed)
        rows: list[int] = []
        standings: list[Standing] = []
        top, left = 1, None  # how many new trials may come
        while True:
            i = pruner.promoted(standings, table.epochs, top, left)
            if i is None and left == 0:
                return
            if i is None:
                row = next(order, None) if strategy is None else proposed(table, rows, standings, strategy, seed)
                if row is None:
                    left = 0
                    continue
                rows.append(row)
                standings.append(Standing((), True))
                i = len(rows) - 1
            costs, rungs = standings[i].costs, pruner.rungs(table.epochs, i)
            begin, end = rungs[len(costs) - 1] if costs else 0, rungs[len(costs)]
            yield rows[i], begin, end
            curve = {epoch: -float(table.scores[rows[i], epoch - 1]) for epoch in range(1, end + 1)}
            costs = (*costs, -float(table.best[rows[i], end - 1]))
            standings[i] = Standing(costs, len(costs) < len(rungs), curve)
            top = pruner.grown(top, standings, table.epochs)

    return parts


def proposed(table: Table, rows: Sequence[int], standings: Sequence[Standing], strategy: str, seed: int) -> int | None:
    """What `OptunaOracle` proposes after these trials: paused ones are pruned ones to Optuna, with their epochs."""
    study = Study(sampler_of(strategy, seed, 1), ["maximize"])
    for row, standing in zip(rows, standings, strict=True):
        params = params_of(table.space, table.points[row], None)
        if standing.paused:
            study.add(table.space, params, pruned={epoch: -cost for epoch, cost in standing.curve.items()})
        else:
            study.tell(study.add(table.space, params), [-min(standing.costs)])
    _, params = study.ask(table.space, np.random.SeedSequence(seed, spawn_key=(len(rows),)))
    return table.nearest(point_of(table.space, params), rows)


# Others


def optuna_default(table: Table, seed: int) -> Iterator[Part]:
    """Optuna's default, TPE, without a pruner."""
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    ranges = {name: distribution(parameter) for name, parameter in table.space.items()}
    states = optuna.trial.TrialState
    rows: list[int] = []
    while True:
        trial = study.ask(ranges)
        row = table.nearest(point_of(table.space, trial.params), rows)
        study.tell(trial, state=states.FAIL)  # the row is told instead
        if row is None:
            return
        rows.append(row)
        yield row, 0, table.epochs
        params = params_of(table.space, table.points[row], None)
        value = float(table.best[row, -1])
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))


class Enough(keras_tuner.errors.FatalError):
    """The epochs are spent."""


class Replayed(keras_tuner.Tuner):
    """KerasTuner's own tuner, with rows of a table instead of trainings."""

    def begin(self, table: Table, budget: int) -> None:
        """Sets what the trials are."""
        self.table, self.left = table, budget
        self.parts: list[Part] = []
        self.rows: dict[str, int] = {}

    def run_trial(self, trial: Any, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002, D102
        values = trial.hyperparameters.values
        parent = values.get("tuner/trial_id")
        if parent:
            row: int | None = self.rows[parent]
        else:
            row = self.table.nearest(values, list(self.rows.values()))
        if row is None:
            raise Enough
        self.rows[trial.trial_id] = row
        self.oracle.trials[trial.trial_id].hyperparameters.values.update(self.table.points[row])
        values.update(self.table.points[row])
        begin, end = values.get("tuner/initial_epoch", 0), values.get("tuner/epochs", self.table.epochs)
        self.parts.append((row, begin, end))
        self.left -= end - begin
        if self.left <= 0:
            raise Enough
        return {OBJECTIVE: float(self.table.best[row, end - 1])}


def of_keras_tuner(oracle: str, **arguments: Any) -> Callable[[Table, int, int], list[Part]]:
    """A search by a stock oracle of KerasTuner."""

    def parts(table: Table, seed: int, budget: int) -> list[Part]:
        hypermodel = ok.tuning.HyperModel(_nothing, table.space)
        given = dict(arguments) if oracle == "HyperbandOracle" else {"max_trials": len(table), **arguments}
        if oracle == "HyperbandOracle":
            given |= {"max_epochs": table.epochs, "hyperband_iterations": 100}
        with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
            made = getattr(keras_tuner.oracles, oracle)(
                objective=keras_tuner.Objective(OBJECTIVE, "max"),
                hyperparameters=hypermodel.hyperparameters(),
                seed=seed + 1,  # to KerasTuner 0 is no seed
                **given,
            )
            tuner = Replayed(oracle=made, hypermodel=hypermodel, directory=directory, project_name="replay")
            tuner.begin(table, budget)
            with contextlib.suppress(Enough):
                tuner.search(verbose=0)
        return tuner.parts

    return parts


def _nothing(values: Any) -> keras.Model:  # noqa: ARG001
    """KerasTuner builds a model to look for hyperparameters."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


METHODS: dict[str, Callable[..., Iterable[Part]]] = {
    "KerasTuner RandomSearch": of_keras_tuner("RandomSearchOracle"),
    "KerasTuner BayesianOptimization": of_keras_tuner("BayesianOptimizationOracle"),
    "KerasTuner Hyperband": of_keras_tuner("HyperbandOracle"),
    "Optuna": optuna_default,
    "ASHA": with_pruner(ASHA()),
    "PASHA": with_pruner(PASHA()),
    "Hyperband": with_pruner(Hyperband()),
    "TPE, ASHA": with_pruner(ASHA(), "tpe"),
    "TPE, PASHA": with_pruner(PASHA(), "tpe"),
}


def replayed(name: str, table: Table, seed: int, budget: int) -> list[Part]:
    """The parts of a search until its epochs are spent."""
    method = METHODS[name]
    if name.startswith("KerasTuner"):
        return list(method(table, seed, budget))
    found, spent = [], 0
    for part in method(table, seed):
        found.append(part)
        spent += part[2] - part[1]
        if spent >= budget:
            break
    return found


def epochs_to(table: Table, parts: Iterable[Part], target: float, budget: float) -> float:
    """After how many epochs a score is reached; infinite if it is not within the budget."""
    spent = 0
    for row, begin, end in parts:
        reached = np.flatnonzero(table.scores[row, begin:end] >= target)
        if reached.size and spent + reached[0] + 1 <= budget:
            return float(spent + reached[0] + 1)
        spent += end - begin
    return math.inf


def best_of(table: Table, parts: Iterable[Part], budget: int) -> float:
    """The best score within the budget."""
    best, left = -math.inf, budget
    for row, begin, end in parts:
        seen = table.scores[row, begin : min(end, begin + left)]
        best = max(best, float(seen.max(initial=-math.inf)))
        left -= len(seen)
    return best

"""How much of the score each hyperparameter explains, by Optuna's fANOVA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_optkit import arguments
from keras_optkit.space import Bool, Choice, Parameter
from keras_optkit.tuning.export import needed
from keras_optkit.tuning.samplers import is_index, quiet

if TYPE_CHECKING:
    from keras_optkit.tuning.result import Result
    from keras_optkit.tuning.trials import Trial

LEAST = 10  # of fewer trials, a forest knows next to nothing
_FORESTS, _TREES = 4, 16  # each forest has other values for what is inactive


def objective_of(result: Result, objective: Any) -> str:
    """The argument `objective`: one of those of the search, which may be left out if there is only one.

    Raises:
        ValueError: If it is none of them.
    """
    if objective is None and len(result.objectives) == 1:
        return next(iter(result.objectives))
    chosen: str = arguments.choice("objective", objective, tuple(result.objectives))
    return chosen


def importance(result: Result, objective: Any = None) -> dict[str, float]:
    """See `Result.importance`."""
    name = objective_of(result, objective)
    optuna = needed("optuna", "result.importance", '"keras-optkit[search]"')
    needed("sklearn", "result.importance", '"keras-optkit[search]"')
    trials = [trial for trial in result.trials if math.isfinite(_score(trial, name))]
    if len(trials) < LEAST:
        raise ValueError(
            f"importance needs at least {LEAST} completed trials, got {len(trials)} of {len(result.trials)}. Run more: "
            "with the same directory= and a larger max_trials= a search continues."
        )
    scores = [_score(trial, name) for trial in trials]
    found = dict.fromkeys(result.space, 0.0)
    wanted = {
        each: parameter
        for each, parameter in result.space.items()
        if parameter.size > 1 and any(each in trial.values for trial in trials)
    }
    if not wanted or min(scores) == max(scores):
        return found
    distributions = {each: _distribution(optuna, parameter) for each, parameter in wanted.items()}
    places = {each: {v: i for i, v in enumerate(p.grid())} for each, p in wanted.items() if _is_listed(p)}
    create = optuna.trial.create_trial
    for seed in range(_FORESTS):
        rng = np.random.default_rng(seed)
        points = [
            {each: _param(p, trial.values.get(each), places.get(each), rng) for each, p in wanted.items()}
            for trial in trials
        ]
        evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=_TREES, seed=seed)
        with quiet(optuna):
            study = optuna.create_study()
            study.add_trials(
                create(params=point, distributions=distributions, value=score)
                for point, score in zip(points, scores, strict=True)
            )
            for each, part in evaluator.evaluate(study).items():  # not normalised to a sum of 1
                found[each] += float(part) / _FORESTS
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _score(trial: Trial, name: str) -> float:
    return trial.metrics.get(name, math.nan) if trial.status == "completed" else math.nan


def _param(parameter: Parameter, value: Any, places: Mapping[Any, int] | None, rng: np.random.Generator) -> float:
    """The coordinate of a value.

    Where a parameter is inactive it does not matter, and any value will do. It is one at random: a fixed one would tell
    the forest whether the condition holds, and so take from its parent what that explains.
    """
    value = parameter.sample(rng) if value is None else value
    return _scaled(parameter, value) if places is None else float(places[value])


def _is_listed(parameter: Parameter) -> bool:
    """Whether its values are known by their index.

    So are those without an order: Optuna would give each a coordinate of its own and take averages over points with
    several values at a time, or none, which do not exist.
    """
    return isinstance(parameter, Choice | Bool) or is_index(parameter)


def _scaled(parameter: Any, value: float) -> float:
    """A value on the axis on which it is searched evenly: Optuna's fANOVA would weigh a range of 0.0001 to 0.1 evenly
    and see hardly anything below 0.01.
    """
    value = parameter.mirrored(value) if parameter.log == "reverse" else value
    return math.log(value) if parameter.log else float(value)


def _distribution(optuna: Any, parameter: Any) -> Any:
    if _is_listed(parameter):
        ends = [-0.5, parameter.size - 0.5]  # as much room for the first and the last as for others
    else:
        ends = sorted(_scaled(parameter, end) for end in (parameter.low, parameter.high))
    return optuna.distributions.FloatDistribution(*ends)

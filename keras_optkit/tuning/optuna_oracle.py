"""`OptunaOracle`: a KerasTuner oracle whose points come from a sampler of Optuna."""

from __future__ import annotations

import math
import random
import warnings
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.trial import TrialStatus

from keras_optkit import arguments
from keras_optkit.private import directory_of
from keras_optkit.space import Space
from keras_optkit.tuning.best_epoch import names_of
from keras_optkit.tuning.books import OtherSearchError
from keras_optkit.tuning.found import space_of
from keras_optkit.tuning.hypermodel import hyperparameters as as_hyperparameters
from keras_optkit.tuning.oracle import VALUES, stream, untried, without_ended
from keras_optkit.tuning.samplers import GaussianProcess, Params, Study, params_of, point_of, sampler_of


class OptunaOracle(keras_tuner.Oracle):
    """Proposes the points that a sampler of Optuna chooses, in any tuner of KerasTuner.

    The sampler is seeded for each trial, by `seed` and the trial's number, and the oracle's file has what it has
    proposed. So a search that is continued proposes what it would have proposed without the interruption (a sampler of
    your own that keeps more than its random generators is asked for all its proposals again). No point is proposed
    twice, points that violate a constraint are not proposed, and a finite space is exhausted exactly once. Trials that
    fail, or whose objective is not finite, are told as failed, and do not end a search; those that a pruner of `Tuner`
    has stopped or paused are told as pruned, with the objective of each epoch.

    Args:
        objective: As for every oracle: a name, a `keras_tuner.Objective`, or a list of them for `"nsga2"`, `"tpe"`,
            `"gp"` and `"qmc"`.
        max_trials: The most trials.
        strategy: `"tpe"`, `"gp"`, `"cma"`, `"nsga2"`, `"qmc"`, or a sampler of Optuna other than its `GPSampler`.
        space: The space. None: the hyperparameters that the tuner finds, as KerasTuner does.
        hyperparameters: As for every oracle; only without `space`.
        allow_new_entries: As for every oracle, where `space` is None.
        tune_new_entries: As for every oracle, where `space` is None.
        seed: Fixes the points. None: drawn with Python's `random`.

    Raises:
        ImportError: If Optuna, or what the strategy needs, is not installed.
        TypeError: If an argument has a wrong type.
        ValueError: If an argument has a wrong value, or if the strategy is not for several objectives.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok
    import keras_tuner
    import numpy as np


    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(hp.Float("learning_rate", 1e-3, 1e-1, sampling="log")), "mse")
        return model


    oracle = ok.tuning.OptunaOracle(keras_tuner.Objective("loss", "min"), max_trials=2, strategy="tpe", seed=0)
    with tempfile.TemporaryDirectory() as directory:
        tuner = keras_tuner.Tuner(oracle=oracle, hypermodel=build, directory=directory)
        tuner.search(np.ones((8, 2)), np.ones((8, 1)), epochs=1, verbose=0)
        print(tuner.get_best_hyperparameters()[0].values)
    ```
    """

    max_trials: int | None

    def __init__(
        self,
        objective: Any = None,
        max_trials: int | None = 10,
        strategy: Any = "tpe",
        *,
        space: Space | None = None,
        hyperparameters: keras_tuner.HyperParameters | None = None,
        allow_new_entries: bool = True,
        tune_new_entries: bool = True,
        seed: int | None = None,
    ) -> None:
        arguments.integer("max_trials", max_trials, 1, optional=True)
        arguments.integer("seed", seed, 0, optional=True)
        if space is not None and not isinstance(space, Space):
            raise TypeError(f"space must be a Space or None, got {space!r}.")
        if space is not None and hyperparameters is not None:
            raise ValueError("hyperparameters must be None where space is given, got both.")
        super().__init__(
            objective=objective,
            max_trials=max_trials,
            hyperparameters=hyperparameters if space is None else as_hyperparameters(space),
            allow_new_entries=allow_new_entries and space is None,
            tune_new_entries=tune_new_entries and space is None,
            max_consecutive_failed_trials=None,  # no number of failures equals None
        )
        self.space: Space | None = None
        self.seed = random.randrange(2**31) if seed is None else seed
        self.strategy = strategy
        sampler_of(strategy, self.seed, len(names_of(self.objective)))
        if space is not None:
            self.take_space(space)
        self._study: Study | GaussianProcess | None = None
        self._told = 0
        self._numbers: dict[str, int] = {}  # in the study, by trial
        self.proposals: dict[str, dict[str, Any]] = {}  # what the sampler needs to continue, by trial

    def take_space(self, space: Space) -> None:
        """Searches a space, with its constraints and with what is likely in it.

        Raises:
            ValueError: If no point meets the constraints, or if the strategy cannot take what is likely.
        """
        space.sample(0)  # raises where no point meets the constraints
        _check_prior(self.strategy, space)
        limits = [int(limit) for limit in (self.max_trials, space.size) if limit is not None and limit < math.inf]
        self.space, self.max_trials = space, min(limits, default=None)

    @property
    def strategy_name(self) -> str:
        """The name of the strategy, or of the sampler's class."""
        return self.strategy if isinstance(self.strategy, str) else type(self.strategy).__name__

    def _sequence(self, number: int, attempt: int) -> np.random.SeedSequence:
        return stream(self.seed, VALUES, number, attempt)

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """KerasTuner's question for the next trial."""
        if self.space is None and not self.hyperparameters.space:  # nothing to search: the defaults, once
            return {"status": TrialStatus.STOPPED} if self.trials else {"status": TrialStatus.RUNNING, "values": {}}
        space = space_of(self.hyperparameters) if self.space is None else self.space
        study = self._caught_up(space)
        proposal = self._proposed(space, study, len(self.start_order))
        if proposal is None:
            return {"status": TrialStatus.STOPPED}
        self._numbers[trial_id], params, rejected = proposal
        self.proposals[trial_id] = {"params": params, "rejected": rejected, "told": self._told}
        return {"status": TrialStatus.RUNNING, "values": dict(point_of(space, params))}

    def _proposed(self, space: Space, study: Study | GaussianProcess, number: int) -> tuple[int, Params, int] | None:
        """A new point: its number in the study, its parameters, and how many were rejected before it."""
        known = [trial.hyperparameters.values for trial in self.trials.values()]
        tried = [{name: values[name] for name in space if name in values} for values in known]
        has_prior = any(parameter.has_prior for parameter in space.values())
        random_first = has_prior and study.completed < study.startup
        for attempt in range(0 if random_first else study.attempts):
            index, params = study.ask(space, self._sequence(number, attempt))
            point = point_of(space, params)
            if point not in tried and space.allows(point):
                return index, params, attempt
            study.tell(index, None)
        rng = np.random.default_rng(self._sequence(number, study.attempts))
        left = untried(space, tried, rng)
        if left is None:
            return None
        attempts = 0 if random_first else study.attempts
        params = params_of(space, left, rng if study.asks_for_all else None)
        index, params = study.ask(space, self._sequence(number, attempts), params)
        return index, params, attempts

    def _caught_up(self, space: Space) -> Study | GaussianProcess:
        """The study, which knows what has ended."""
        partial = {trial_id: found for trial_id in self.start_order if (found := self._intermediate(trial_id))}
        if partial and isinstance(self._study, Study) and self._study.is_stateless:
            self._study = None  # of a trial that is paused Optuna can be told only when its study is made
        if self._study is None:
            directions = [f"{direction}imize" for direction in self._directions().values()]
            sampler = sampler_of(self.strategy, self.seed, len(directions))
            self._study = GaussianProcess(directions) if sampler is None else Study(sampler, directions)
            self._told, self._numbers = 0, {}
            for number, trial_id in enumerate(self.start_order):
                if trial_id not in self.proposals:  # it ran before the tuner had found a space
                    continue
                if trial_id in partial and isinstance(self._study, Study) and self._study.is_stateless:
                    params = {k: v for k, v in self.proposals[trial_id]["params"].items() if k in space}
                    self._study.add(space, params, pruned=partial[trial_id])
                    continue
                self._tell(self.proposals[trial_id]["told"])
                self._numbers[trial_id] = self._again(space, self._study, number, **self.proposals[trial_id])
        self._tell(len(self.end_order))
        return self._study

    def _again(
        self, space: Space, study: Study | GaussianProcess, number: int, params: Params, rejected: int, **_: Any
    ) -> int:
        """A proposal of an earlier process; returns its number in the study."""
        params = {name: param for name, param in params.items() if name in space}
        if study.is_stateless:
            return study.add(space, params)
        for attempt in range(rejected):
            index, _params = study.ask(space, self._sequence(number, attempt))
            study.tell(index, None)
        return study.ask(space, self._sequence(number, rejected), params)[0]

    def _directions(self) -> dict[str, str]:
        objective = self.objective
        return dict(getattr(objective, "name_to_direction", {objective.name: objective.direction}))

    def _tell(self, count: int) -> None:
        """Tells the study of the first trials that have ended."""
        assert self._study is not None
        for trial_id in self.end_order[self._told : count]:
            if trial_id not in self._numbers:
                continue
            values, epochs = self._values(self.trials[trial_id]), self._intermediate(trial_id)
            self._study.tell(self._numbers[trial_id], values, pruned=epochs)
        self._told = max(self._told, count)

    def _intermediate(self, trial_id: str) -> dict[int, float]:
        """The objective by epoch of a trial that was stopped or is paused; nothing of others."""
        trial = self.trials[trial_id]
        ongoing = any(each.trial_id == trial_id for each in self.ongoing_trials.values())
        if trial.status not in (TrialStatus.STOPPED, TrialStatus.RUNNING) or ongoing:
            return {}
        if len(self._directions()) > 1 or not trial.metrics.exists(self.objective.name):
            return {}
        history = trial.metrics.get_history(self.objective.name)
        return {int(observation.step): float(observation.mean()) for observation in history}

    def _values(self, trial: Any) -> list[float] | None:
        """The objectives of a trial; None if it has failed."""
        if trial.status != TrialStatus.COMPLETED:
            return None
        names = list(self._directions())
        if not all(trial.metrics.exists(name) for name in names):
            return None
        values = [float(trial.metrics.get_best_value(name)) for name in names]
        return values if all(map(math.isfinite, values)) else None

    def update_trial(self, trial_id: str, metrics: dict[str, Any], step: int = 0) -> Any:
        """KerasTuner's hook for the metrics of a trial."""
        with warnings.catch_warnings():  # a NaN is no reason for NumPy to warn: the trial has failed
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
            return super().update_trial(trial_id, metrics, step)

    def score_trial(self, trial: Any) -> None:
        """KerasTuner's hook for the score; one that is not finite makes it a failed trial."""
        last = trial.metrics.get_last_value(self.objective.name)
        if math.isfinite(last):
            super().score_trial(trial)
        else:
            trial.score = math.nan  # KerasTuner's sign of a failure
            trial.message = f"Failed with {dict(trial.hyperparameters.values)}.\n{self.objective.name} is {last}."

    def get_state(self) -> dict[str, Any]:
        """KerasTuner's hook for saving."""
        state = super().get_state()
        return {**state, "optuna": {"strategy": self.strategy_name, "proposals": self.proposals}}

    def set_state(self, state: dict[str, Any]) -> None:
        """KerasTuner's hook for continuing a search.

        Raises:
            ValueError: If the search is one with another strategy.
        """
        saved = state.get("optuna", {"strategy": "random or grid"})
        if saved["strategy"] != self.strategy_name:
            change = f"where strategy was {saved['strategy']!r} and is {self.strategy_name!r}"
            raise OtherSearchError(directory_of(self), change)
        super().set_state(without_ended(state))
        self.proposals = saved["proposals"]
        self._study = None


def _check_prior(strategy: Any, space: Space) -> None:
    with_prior = [name for name, parameter in space.items() if parameter.has_prior]
    if strategy == "qmc" and with_prior:
        raise ValueError(
            f"strategy must not be 'qmc', which covers ranges evenly, where a parameter has weights= or normal=, as "
            f"{with_prior[0]!r} has."
        )

"""The oracles: which point of the space to try next. KerasTuner keeps their books and saves them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.trial import TrialStatus

from keras_optkit.space import Points, Space, Values
from keras_optkit.tuning.hypermodel import hyperparameters

VALUES, TRAINING, SPLIT, AGAIN = range(4)  # what a random stream is for


def stream(seed: int, *key: int) -> np.random.SeedSequence:
    """The random stream of one purpose and trial: independent of all others, and of how many were used before."""
    return np.random.SeedSequence(seed, spawn_key=key)


def without_ended(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an oracle in which no trial that has ended is still to be run.

    KerasTuner saves that a trial has ended before it notes that the trial is no longer running.
    """
    running = {tuner: trial for tuner, trial in state["ongoing_trials"].items() if trial not in state["end_order"]}
    return {**state, "ongoing_trials": running}


class SpaceOracle(keras_tuner.Oracle):
    """An oracle that walks a `Space`; a subclass says which point comes as number n.

    It differs from KerasTuner's own oracles where those surprise: a seed of 0 is a seed, the n-th point depends on the
    seed, on n and on the points tried before and on nothing else (so a continued search proceeds as if it had not been
    interrupted), a finite space is tried completely and without repetition, and failed trials do not end a search.
    """

    def __init__(
        self, space: Space, objective: keras_tuner.Objective, max_trials: int | None, size: float, seed: int | None
    ) -> None:
        limits = [limit for limit in (max_trials, size) if limit is not None and limit < math.inf]
        super().__init__(
            objective=objective,
            max_trials=min(limits, default=None),
            hyperparameters=hyperparameters(space),
            allow_new_entries=False,
            tune_new_entries=False,
            max_consecutive_failed_trials=None,  # no number of failures equals None
        )
        self.space = space
        # Python's generator, as Keras uses for layers without a seed: keras.utils.set_random_seed fixes it.
        self.seed = random.randrange(2**31) if seed is None else seed

    def set_state(self, state: dict[str, Any]) -> None:
        """KerasTuner's hook for continuing a search."""
        super().set_state(without_ended(state))

    def propose(self, number: int) -> Values | None:
        """The point of trial `number`, or None if there is none left."""
        raise NotImplementedError

    def populate_space(self, trial_id: str) -> dict[str, Any]:  # noqa: ARG002  (KerasTuner's interface)
        """KerasTuner's question for the next trial."""
        values = self.propose(len(self.start_order))
        if values is None:
            return {"status": TrialStatus.STOPPED}
        return {"status": TrialStatus.RUNNING, "values": dict(values)}


def untried(space: Space, tried: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> Values | None:
    """A random point that is not among those tried; None if there is none left."""
    for collisions in itertools.count():
        values = space.sample(rng)
        if values not in tried:
            return values
        if collisions == 100 and space.is_listable:
            break  # nearly everything was tried: look at what is left
        if collisions == 10_000:
            return None
    rest = [values for values in space.grid() if values not in tried]
    return rest[int(rng.integers(len(rest)))] if rest else None


class RandomOracle(SpaceOracle):
    """Draws points independently, never the same twice."""

    def __init__(
        self, space: Space, objective: keras_tuner.Objective, max_trials: int | None, seed: int | None
    ) -> None:
        space.sample(0)  # raises where no point meets the constraints
        super().__init__(space, objective, max_trials, space.size, seed)

    def propose(self, number: int) -> Values | None:
        """A point that was not tried before; None once a finite space is exhausted."""
        tried = [trial.hyperparameters.values for trial in self.trials.values()]
        return untried(self.space, tried, np.random.default_rng(stream(self.seed, VALUES, number)))


class GridOracle(SpaceOracle):
    """Walks the grid from its first point to its last."""

    def __init__(
        self,
        space: Space,
        objective: keras_tuner.Objective,
        max_trials: int | None,
        seed: int | None,
        points: Points = None,
    ) -> None:
        count = sum(1 for _ in space.grid(points))  # raises where there is no finite grid
        super().__init__(space, objective, max_trials, count, seed)
        self.points = points

    def propose(self, number: int) -> Values | None:
        """The grid's point with this number; None after the last."""
        return next(itertools.islice(self.space.grid(self.points), number, None), None)

"""The trials of a search, as `Result` has them, and their order."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from keras_optkit.space import Values


@dataclass(frozen=True)
class Trial:
    """One point of the space and its outcome.

    Attributes:
        number: 0, 1, 2, ... in the order in which the trials were started; also in the names of their directories.
        values: The active hyperparameters.
        score: The objective at its best epoch (the mean over executions, if there were several), or None if it failed,
            or was pruned before it had one. An execution is one run: of a fold, where there are folds, with one seed.
        metrics: All metrics at that epoch.
        epochs: Epochs trained, over all executions.
        best_epoch: The epoch with the best objective, counted from 1 (of the best execution), or None.
        seconds: Duration.
        status: `"completed"`, `"pruned"` or `"failed"`. A trial that was pruned has the score of the epochs that it was
            trained; it is the best only where no trial was completed.
        message: Why it failed or was pruned, or "".
        history: For each execution the epochs that were trained, also by a trial that failed: a dict with the numbers
            of the `epochs`, counted from 1, and the `metrics`, a list for each name with None where an epoch did not
            have it. Empty if the trial is one of a version that kept no history.
        scores: The score of each execution, all folds with the first seed before those with the second. A trial that
            was stopped may have fewer. Empty if the trial failed, or is one of a version that kept none.
        best_epochs: The best epoch of each of them.
    """

    number: int
    values: Values
    score: float | None
    metrics: dict[str, float] = field(default_factory=dict)
    epochs: int = 0
    best_epoch: int | None = None
    seconds: float = 0.0
    status: str = "completed"
    message: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    best_epochs: list[int] = field(default_factory=list)

    @property
    def spread(self) -> float | None:
        """The sample standard deviation of `scores`; None of fewer than two.

        s = sqrt(sum((x_i - mean)^2) / (n - 1)). Folds share most of their training data, so that s / sqrt(n) is too
        small for the standard error of the mean.
        """
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None

    @property
    def reason(self) -> str:
        """Why it failed or was pruned, and with which hyperparameters, or ""."""
        return f"{self.message} ({listed(self.values)})" if self.message else ""


def ranked(trials: Sequence[Trial], direction: str) -> list[Trial]:
    """The completed trials, best first, of equal ones the earlier first; the pruned ones, if none was completed.

    After fewer epochs a score is another one: a trial that a pruner has stopped is not compared with complete ones.
    """
    sign = -1 if direction == "max" else 1
    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    completed = [trial for trial in scored if trial.status == "completed"] or scored
    return sorted(completed, key=lambda trial: (sign * trial.score, trial.number))  # type: ignore[operator]


def by_score(trials: Sequence[Trial], direction: str) -> list[Trial]:
    """All trials, best first; those without a score last, the failed ones at the end."""
    sign = -1 if direction == "max" else 1
    scored = sorted((t for t in trials if t.score is not None), key=lambda t: (sign * t.score, t.number))  # type: ignore[operator]
    rest = [trial for trial in trials if trial.score is None]
    return scored + sorted(rest, key=lambda trial: (trial.status == "failed", trial.number))


def pareto(trials: Sequence[Trial], objectives: Mapping[str, str]) -> list[Trial]:
    """The completed trials than which no other is as good in all objectives and better in one."""
    completed = [trial for trial in trials if trial.status == "completed"]
    signs = {name: -1 if direction == "max" else 1 for name, direction in objectives.items()}
    costs = [[sign * trial.metrics[name] for name, sign in signs.items()] for trial in completed]

    def dominates(one: list[float], other: list[float]) -> bool:
        return one != other and all(a <= b for a, b in zip(one, other, strict=True))

    return [
        trial
        for trial, cost in zip(completed, costs, strict=True)
        if not any(dominates(other, cost) for other in costs)
    ]


def listed(values: Mapping[str, Any]) -> str:
    """Hyperparameters in one line."""
    return ", ".join(f"{name}={shown(value)}" for name, value in values.items())


def shown(value: Any) -> str:
    """A value of a table, short."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

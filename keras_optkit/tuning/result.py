"""What a search found: its trials, the best of them, and the model that was trained in it."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import keras

from keras_optkit.space import Space, Values
from keras_optkit.tables import table


@dataclass(frozen=True)
class Trial:
    """One point of the space and its outcome.

    Attributes:
        number: 0, 1, 2, ... in the order in which the trials were started; also in the names of their directories.
        values: The active hyperparameters.
        score: The objective at its best epoch (the mean over executions, if there were several), or None if it failed.
        metrics: All metrics at that epoch.
        epochs: Epochs trained, over all executions.
        best_epoch: The epoch with the best objective, counted from 1 (of the best execution), or None.
        seconds: Duration.
        status: `"completed"` or `"failed"`.
        message: Why it failed, or "".
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

    @property
    def reason(self) -> str:
        """Why it failed and with which hyperparameters, or ""."""
        return f"{self.message} ({listed(self.values)})" if self.message else ""


def ranked(trials: Sequence[Trial], direction: str) -> list[Trial]:
    """The completed trials, best first; of equal ones the earlier first."""
    sign = -1 if direction == "max" else 1
    completed = [trial for trial in trials if trial.score is not None]
    return sorted(completed, key=lambda trial: (sign * trial.score, trial.number))  # type: ignore[operator]


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


class Result:
    """The result of `search`.

    Attributes:
        trials: All trials in the order in which they were started.
        space: The space that was searched.
        objective: Name of the metric that was optimised; `"multi_objective"` for several, the sum of those to minimise
            minus the sum of those to maximise.
        direction: `"max"` or `"min"`.
        objectives: The metrics that were optimised, each with its direction.
        seed: The seed; the same search with it gives the same trials and scores.
        directory: Where the search keeps its state and its best model.
        model_path: The best model's `.keras` file, or a `.weights.h5` file where the model cannot be such a file.
            Without a `directory` of your own it is deleted with this object.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        space: Space,
        objective: str,
        direction: str,
        seed: int,
        directory: Path,
        model_path: Path,
        *,
        objectives: Mapping[str, str] | None = None,
        load: Callable[[], keras.Model] | None = None,
        temporary: bool = False,
    ) -> None:
        self.trials = list(trials)
        self.space = space
        self.objective = objective
        self.direction = direction
        self.objectives = dict(objectives or {objective: direction})
        self.seed = seed
        self.directory = directory
        self.model_path = model_path
        self._load = load
        if temporary:
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @property
    def best_trial(self) -> Trial:
        """The completed trial with the best score; the first of equals."""
        return ranked(self.trials, self.direction)[0]

    @property
    def pareto(self) -> list[Trial]:
        """The completed trials than which none is as good in all objectives and better in one, in order of number."""
        return pareto(self.trials, self.objectives)

    @property
    def best(self) -> Values:
        """The hyperparameters of the best trial."""
        return self.best_trial.values

    @property
    def best_score(self) -> float:
        """The objective of the best trial."""
        assert self.best_trial.score is not None
        return self.best_trial.score

    @cached_property
    def best_model(self) -> keras.Model:
        """The model of the best trial as it was at its best epoch, compiled, loaded from `model_path`.

        A model that Keras cannot make from the file alone, e.g. one with a class or a loss that is not registered with
        `keras.saving.register_keras_serializable`, is built by the build function of the search and given the weights
        and the optimizer's state of the file.

        Raises:
            FileNotFoundError: If the file is no longer there.
            RuntimeError: If the model cannot be loaded in either way.
        """
        return keras.saving.load_model(self.model_path) if self._load is None else self._load()

    def rows(self) -> list[dict[str, Any]]:
        """The trials as plain dicts in the order in which they were started, e.g. for `pandas.json_normalize`."""
        return [asdict(trial) for trial in self.trials]

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the lines of the table: best first, then what failed."""
        head = ["trial", *self.objectives, *self.space, "best epoch", "epochs", "seconds"]
        order = ranked(self.trials, self.direction)
        order += [trial for trial in self.trials if trial.score is None]
        lines = []
        for trial in order:
            scores = [shown(trial.metrics.get(name)) for name in self.objectives]
            if trial.score is None:
                scores[0] = trial.status
            values = [shown(trial.values.get(name)) for name in self.space]
            ends = [shown(trial.best_epoch), str(trial.epochs), f"{trial.seconds:.1f}"]
            lines.append([str(trial.number), *scores, *values, *ends])
        return head, lines

    def _failures(self) -> list[str]:
        return [f"Trial {trial.number} failed: {trial.reason}" for trial in self.trials if trial.status == "failed"]

    def table(self) -> str:
        """The trials as text, best first; what is inactive is blank. `rich.print(result)` shows it in colour."""
        head, lines = self._cells()
        return "\n".join([*table([head, *lines], rule=True), *self._failures()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text  # a str would be read as markup, in which [dense] is a style

        head, lines = self._cells()
        table = Table(*(Column(Text(name), overflow="fold") for name in head))
        for i, line in enumerate(lines):
            table.add_row(*map(Text, line), style="bold green" if i == 0 else "red" if line[1] == "failed" else None)
        return Group(table, *map(Text, self._failures()))

    def __repr__(self) -> str:
        best = f"{self.objective}={self.best_score:.4g} with {dict(self.best)}"
        return f"<Result of {len(self.trials)} trials, best {best}>"

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Any:
        """Draws the score against the number of the trial and against each hyperparameter; returns the figure.

        The line is the best score so far; failed trials are crosses at the bottom.
        """
        import matplotlib.pyplot as plt

        completed = [trial for trial in self.trials if trial.score is not None]
        failed = [trial.number for trial in self.trials if trial.score is None]
        scores = [trial.score for trial in completed]
        figure, axes = plt.subplots(
            1, 1 + len(self.space), figsize=(3.2 * (1 + len(self.space)), 3.2), sharey=True, layout="constrained"
        )
        first, *others = axes
        first.plot([trial.number for trial in completed], scores, "o")
        best = [ranked(completed[: i + 1], self.direction)[0].score for i in range(len(completed))]
        first.step([trial.number for trial in completed], best, where="post", color="grey")
        first.plot(failed, [0.02] * len(failed), "rx", transform=first.get_xaxis_transform())
        first.set(xlabel="trial", ylabel=self.objective)
        first.xaxis.get_major_locator().set_params(integer=True)
        for axis, (name, parameter) in zip(others, self.space.items(), strict=True):
            active = [trial for trial in completed if name in trial.values]
            values = [trial.values[name] for trial in active]
            if any(isinstance(value, bool | str) for value in values):
                values = [str(value) for value in values]
            axis.plot(values, [trial.score for trial in active], "o")
            axis.set(xlabel=name, xscale="log" if getattr(parameter, "log", False) is True else "linear")
        return figure

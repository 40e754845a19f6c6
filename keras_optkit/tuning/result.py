"""What a search found: its trials, the best of them, and the model that was trained in it."""

from __future__ import annotations

import os
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
from keras_optkit.tuning import export, plots
from keras_optkit.tuning.importance import importance


@dataclass(frozen=True)
class Trial:
    """One point of the space and its outcome.

    Attributes:
        number: 0, 1, 2, ... in the order in which the trials were started; also in the names of their directories.
        values: The active hyperparameters.
        score: The objective at its best epoch (the mean over executions, if there were several), or None if it failed,
            or was pruned before it had one.
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


def cells_of(result: Result) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table: best first, then what was pruned, then what failed."""
    own = ["trial", *result.objectives, "best epoch", "epochs trained", "seconds"]
    names = [f"values.{name}" if name in own else name for name in result.space]
    order = ranked(result.trials, result.direction)
    order += [trial for trial in by_score(result.trials, result.direction) if trial not in order]
    lines = []
    for trial in order:
        scores = [shown(trial.metrics.get(name)) for name in result.objectives]
        if trial.score is None:
            scores[0] = trial.status
        elif trial.status == "pruned":
            scores[0] += " (pruned)"
        values = [shown(trial.values.get(name)) for name in result.space]
        ends = [shown(trial.best_epoch), str(trial.epochs), f"{trial.seconds:.1f}"]
        lines.append([str(trial.number), *scores, *values, *ends])
    return [*own[:-3], *names, *own[-3:]], lines


def _style(i: int, score: str) -> str | None:
    """How a line of the table looks."""
    return "bold green" if i == 0 else "red" if score == "failed" else "dim" if "pruned" in score else None


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
        temporary: Whether it is.

    Example:
    ```python
    import tempfile
    from pathlib import Path

    import keras_optkit as ok
    from keras_optkit.tuning import Float, Result, Space, Trial, Values

    # As a search returns it; here of two trials that were never run
    trials = [
        Trial(0, Values(rate=0.01), score=0.8, metrics={"val_accuracy": 0.8}, epochs=3, best_epoch=2),
        Trial(1, Values(rate=9.0), score=None, status="failed", message="loss is nan in epoch 1."),
    ]
    space = Space(rate=Float(1e-3, 10.0, log=True))
    with tempfile.TemporaryDirectory() as directory:
        model_path = Path(directory, "model.keras")
        result = Result(trials, space, "val_accuracy", "max", 0, Path(directory), model_path)
        result.to_csv(Path(directory, "trials.csv"))
        assert Path(directory, "trials.csv").read_text().splitlines()[0].startswith("number,status,score,values.rate,")
    print(result.table())
    assert result.best == {"rate": 0.01}
    ```
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
        self.temporary = temporary
        self._load = load
        if temporary:
            weakref.finalize(self, shutil.rmtree, directory, ignore_errors=True)

    @property
    def best_trial(self) -> Trial:
        """The completed trial with the best score; the first of equals.

        A trial that was pruned is the best only where none was completed, since a budget had ended the search: scores
        after fewer epochs cannot be compared with those of complete trials.

        Raises:
            ValueError: If no trial has a score.
        """
        order = ranked(self.trials, self.direction)
        if not order:
            raise ValueError(f"There is no best trial: of {len(self.trials)} trials none was completed.")
        return order[0]

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
        """The trials as plain dicts in the order in which they were started, without the `history` of their epochs."""
        return [{key: value for key, value in asdict(trial).items() if key != "history"} for trial in self.trials]

    def to_pandas(self) -> Any:
        """The trials as a `pandas.DataFrame`, in the order in which they were started.

        The columns are `number`, `status`, `score`, `values.<name>` for each hyperparameter, `metrics.<name>` for each
        metric of the best epoch, `epochs`, `best_epoch`, `seconds` and `message`. What is missing, since a
        hyperparameter is inactive or a trial has failed, is a missing value; whole numbers and booleans beside it keep
        their types (`Int64`, `boolean`).

        Raises:
            ImportError: Without pandas.
        """
        return export.frame(self)

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Writes the trials as a table of comma-separated values, as a whole or not at all.

        It has a line of names and a line for each trial, in UTF-8, with the columns of `to_pandas`. What is missing is
        empty, and so is an empty string; numbers that are not finite are `nan`, `inf` and `-inf`. The epochs of the
        trials are in `to_json`.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            TypeError: If `path` is no path.
            OSError: If it is a directory's, if its directory does not exist, or if it cannot be written.
        """
        export.write(path, export.csv_of(self))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Writes everything about the trials, and the space, as JSON, as a whole or not at all.

        It is one object: `objective`, `direction`, `objectives`, `seed`, `best` (the number of the best trial),
        `space` as `Space.from_config` reads it, with conditions and constraints, and `trials`. Each of these has the
        fields of `Trial`. A hyperparameter that is inactive is not in `values`; a trial that has failed has the score
        null. JSON has no numbers that are not finite: in `metrics` and `history` they are the strings `"nan"`, `"inf"`
        and `"-inf"`, which Python's `float` reads.

        Args:
            path: The file; one that is there is replaced.

        Raises:
            TypeError: If `path` is no path.
            OSError: If it is a directory's, if its directory does not exist, or if it cannot be written.
        """
        export.write(path, export.json_of(self))

    def _failures(self) -> list[str]:
        return [f"Trial {trial.number} failed: {trial.reason}" for trial in self.trials if trial.status == "failed"]

    def table(self) -> str:
        """The trials as text, best first; what is inactive is blank. `rich.print(result)` shows it in colour."""
        head, lines = cells_of(self)
        return "\n".join([*table([head, *lines], rule=True), *self._failures()])

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text  # a str would be read as markup, in which [dense] is a style

        head, lines = cells_of(self)
        table = Table(*(Column(Text(name), overflow="fold") for name in head))
        for i, line in enumerate(lines):
            table.add_row(*map(Text, line), style=_style(i, line[1]))
        return Group(table, *map(Text, self._failures()))

    def __repr__(self) -> str:
        best = f"{self.objective}={self.best_score:.4g} with {dict(self.best)}"
        return f"<Result of {len(self.trials)} trials, best {best}>"

    def __str__(self) -> str:
        return self.table()

    def importance(self, objective: str | None = None) -> dict[str, float]:
        """How much of the variance of the score each hyperparameter explains, from 0 to 1, the most important first.

        By functional analysis of variance (fANOVA, Hutter, Hoos and Leyton-Brown 2014): a random forest f predicts the
        score from the hyperparameters x, and the part of the i-th is Var(E[f(x) | x_i]) / Var(f(x)), where x is even
        over the whole space, and even in the logarithm where it is searched so. What the parts lack to 1 is explained
        by several hyperparameters together.

        Trials that failed are left out. Where a hyperparameter is inactive it does not matter, so that its part is also
        the smaller the less often it is active. One with a single value explains nothing. The same trials give the same
        numbers.

        It is Optuna's fANOVA rather than its PED-ANOVA, which compares the best tenth of the trials with all, and so
        needs some fifty and says nothing about how much. A loss that is huge in some trials is most of the variance;
        search a smaller range, or choose another objective. Trials of a strategy that learns are mostly near the best
        ones, and tell less about the rest than random ones.

        Args:
            objective: One of `objectives`; it may be left out if there is only one.

        Raises:
            ImportError: Without Optuna and scikit-learn (`pip install "keras-optkit[search]"`).
            ValueError: With fewer than 10 completed trials, or if `objective` is none of those of the search.
        """
        return importance(self, objective)

    def report(self, path: str | os.PathLike[str], *, title: str = "Search") -> None:
        """Writes a page of HTML with all of the result, as a whole or not at all.

        It is one file that loads nothing: the summary and how to continue, the table of all trials, which a click on a
        name sorts, the failures with their reasons, the figures, and how to load the best model.

        Args:
            path: The file; one that is there is replaced.
            title: The heading.

        Raises:
            ImportError: Without matplotlib. The importance needs Optuna, too; without it the page says so.
            TypeError: If an argument has a wrong type.
            OSError: If `path` is a directory's, if its directory does not exist, or if it cannot be written.
        """
        from keras_optkit.tuning.report import report

        report(self, path, title)

    def plot(self) -> Any:
        """Draws the score against the number of the trial and against each hyperparameter; returns the figure.

        The line is the best score so far; failed trials are crosses at the bottom, and pruned ones are left out. With
        several objectives the score is their sum; `plot_history` and `plot_slice` draw each of them.
        """
        export.needed("matplotlib", "result.plot")
        import matplotlib.pyplot as plt

        completed = sorted(ranked(self.trials, self.direction), key=lambda trial: trial.number)
        failed = [trial.number for trial in self.trials if trial.status == "failed"]
        scores = [trial.score for trial in completed]
        figure, axes = plt.subplots(
            1, 1 + len(self.space), figsize=(3.2 * (1 + len(self.space)), 3.2), sharey=True, layout="constrained"
        )
        first, *others = axes
        first.plot([trial.number for trial in completed], scores, "o")
        best = [ranked(completed[: i + 1], self.direction)[0].score for i in range(len(completed))]
        first.step([trial.number for trial in completed], best, where="post", color="grey")
        first.plot(failed, [0.02] * len(failed), "rx", transform=first.get_xaxis_transform())
        first.set(xlabel="trial", ylabel=plots.short(self.objective, 30))
        first.xaxis.get_major_locator().set_params(integer=True)
        for axis, (name, parameter) in zip(others, self.space.items(), strict=True):
            active = [trial for trial in completed if name in trial.values]
            values = [trial.values[name] for trial in active]
            if any(isinstance(value, bool | str) for value in values):
                values = [plots.short(value) for value in values]
            axis.plot(values, [trial.score for trial in active], "o")
            axis.set(
                xlabel=plots.short(name, 30), xscale="log" if getattr(parameter, "log", False) is True else "linear"
            )
        return figure

    def plot_history(self, objective: str | None = None) -> Any:
        """Draws the score of each trial in the order in which they were started, and the best so far.

        Failed trials are crosses at the bottom, pruned ones triangles, which the best so far does not
        count. Scores of which the largest is a thousand times the smallest are on a logarithmic axis, here and in the
        other figures.

        Args:
            objective: One of `objectives`. None: all, beside each other.

        Returns:
            A `matplotlib.figure.Figure`, as from all methods but `plot`; `savefig` writes it.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If `objective` is none of those of the search.
        """
        return plots.history(self, objective)

    def plot_importance(self, objective: str | None = None) -> Any:
        """Draws `importance` as bars.

        Args:
            objective: One of `objectives`. None: all, beside each other.

        Raises:
            ImportError: Without matplotlib, Optuna and scikit-learn.
            ValueError: With fewer than 10 completed trials, or if `objective` is none of those of the search.
        """
        return plots.importances(self, objective)

    def plot_slice(self, names: Sequence[str] | None = None, objective: str | None = None) -> Any:
        """Draws the score against each hyperparameter, in the trials in which it is active.

        Later trials are darker; a ring is around the best one.

        Args:
            names: The hyperparameters. None: all.
            objective: One of `objectives`. None: all.

        Raises:
            ImportError: Without matplotlib.
            TypeError: If `names` is not a list.
            ValueError: If one of them is not in the space, or `objective` none of those of the search.
        """
        return plots.slices(self, names, objective)

    def plot_parallel_coordinates(self, objective: str | None = None) -> Any:
        """Draws each trial as a line through its hyperparameters to its score.

        Better trials are darker, the best is orange, and failed ones are dotted and have no score. Axes are logarithmic
        where the space is; an inactive hyperparameter is below its axis.

        Args:
            objective: One of `objectives`. None: all, and the first of them is what the shades mean.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If `objective` is none of those of the search.
        """
        return plots.parallel(self, objective)

    def plot_pareto_front(self) -> Any:
        """Draws the completed trials by their objectives, each pair of them, and those of `pareto`, with their numbers.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If the search has one objective only.
        """
        return plots.pareto_front(self)

    def plot_learning_curves(self, metric: str | None = None) -> Any:
        """Draws a metric of each epoch of each trial, a line for each execution.

        Args:
            metric: A metric of the training, e.g. `"loss"`. None: the objectives.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If no trial has such a metric.
        """
        return plots.learning_curves(self, metric)

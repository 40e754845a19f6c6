"""What a search found: its trials, the best of them, and the model that was trained in it."""

from __future__ import annotations

import os
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.space import Space, Values
from keras_optkit.tables import table
from keras_optkit.tuning import export, plots
from keras_optkit.tuning.again import Again
from keras_optkit.tuning.importance import importance
from keras_optkit.tuning.trials import Trial, by_score, pareto, ranked, shown


def cells_of(result: Result) -> tuple[list[str], list[list[str]]]:
    """The header and the lines of the table: best first, then what was pruned, then what failed."""
    spread = ["spread"] if len(result.objectives) == 1 and any(len(t.scores) > 1 for t in result.trials) else []
    own = ["trial", *result.objectives, *spread, "best epoch", "epochs trained", "seconds"]
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
        scores += [shown(trial.spread) for _ in spread]
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
        again: Again | None = None,
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
        self._again = again
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

    def _trainer(self) -> Again:
        if self._again is None:
            raise RuntimeError("Nothing can be trained again, since this result was not returned by a search.")
        return self._again

    def rerun(self, number: int) -> Trial:
        """Trains a trial again, alone and in this process, and returns what came out.

        Points, data, folds, seeds and epochs are those of the search, so that the score is the same on the same machine
        as far as training is reproducible there. A trial that was pruned ends after the same epochs. One that has
        failed raises its error, with the whole traceback. `seconds` is 0. It sets the global seeds.

        Args:
            number: Of the trial.

        Raises:
            TypeError: If `number` is no integer.
            ValueError: If there is no trial of this number, or if it continues another one, as with KerasTuner's
                Hyperband.
            RuntimeError: If this result was not returned by a search.
            Exception: What the trial has failed with.
        """
        arguments.integer("number", number)
        known = {trial.number: trial for trial in self.trials}
        if number not in known:
            raise ValueError(f"number must be that of a trial, 0 to {max(known)}, got {number}.")
        return self._trainer().rerun(known[number])

    def retrain_best(
        self,
        data: Any = None,
        *,
        validation: Any = None,
        epochs: int | None = None,
        callbacks: Any = None,
        seed: int | None = None,
        verbose: int = 0,
    ) -> keras.Model:
        """Trains a new model with the best hyperparameters, by default on all of the search's data.

        These include what the search split off for validation, by a fraction or in folds, but not validation data that
        it was given. `best_model` was trained on less. There is no choice of an epoch: the model is that of the last.

        Args:
            data: Arrays (x, y), or a dataset. None: those of the search, with their `sample_weight`.
            validation: Arrays or a dataset to report metrics of; nothing depends on it but callbacks.
            epochs: None: the mean of the best epochs of the best trial's executions, rounded.
            callbacks: A list, or a function as in `search`. None: those of the search; one that monitors a metric of
                validation needs `validation`. `[]`: none.
            seed: Set by `keras.utils.set_random_seed`. None: follows from the seed of the search.
            verbose: As in `fit`.

        Returns:
            The model, compiled.

        Raises:
            TypeError: If an argument has a wrong type.
            ValueError: If an argument has a wrong value.
            RuntimeError: If the last loss is not finite, or if this result was not returned by a search.
        """
        given = {"validation": validation, "epochs": epochs, "callbacks": callbacks, "seed": seed, "verbose": verbose}
        return self._trainer().retrain(self.best_trial, data, **given)

    def rows(self) -> list[dict[str, Any]]:
        """The trials as plain dicts in the order in which they were started, without the `history` of their epochs."""
        return [{key: value for key, value in asdict(trial).items() if key != "history"} for trial in self.trials]

    def to_pandas(self) -> Any:
        """The trials as a `pandas.DataFrame`, in the order in which they were started.

        The columns are `number`, `status`, `score`, `spread` if a trial has several runs, `values.<name>` for each
        hyperparameter, `metrics.<name>` for each metric of the best epoch, `epochs`, `best_epoch`, `seconds` and
        `message`. What is missing, since a hyperparameter is inactive or a trial has failed, is a missing value; whole
        numbers and booleans beside it keep their types (`Int64`, `boolean`).

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

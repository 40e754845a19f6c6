"""`search`: the one call that does everything."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_optkit import arguments
from keras_optkit.direction import by_name
from keras_optkit.space import Float, Int, Points, Space
from keras_optkit.tuning import samplers
from keras_optkit.tuning.best_epoch import names_of
from keras_optkit.tuning.callbacks import Callbacks
from keras_optkit.tuning.data import (
    check_ends,
    checked_data,
    checked_fit_arguments,
    comparable,
    fingerprint,
    fit_data,
    is_dataset,
    samples,
)
from keras_optkit.tuning.folds import check_data, checked_cv, described, random_folds
from keras_optkit.tuning.hypermodel import FIT_ARGUMENTS, HyperModel
from keras_optkit.tuning.optuna_oracle import OptunaOracle
from keras_optkit.tuning.oracle import GridOracle, RandomOracle, SpaceOracle
from keras_optkit.tuning.result import Result
from keras_optkit.tuning.tuner import Tuner

STRATEGIES = ("random", "grid", *samplers.NAMES)


def infer_direction(objective: str) -> str:
    """Whether a metric of this name is to be large ("max") or small ("min").

    Raises:
        ValueError: If the name does not say.
    """
    found = by_name(objective)
    if found is not None:
        return found
    raise ValueError(
        f'direction must be "min" or "max" for the objective {objective!r}, whose name does not say, got None.'
    )


def _goal(objective: Any, direction: str | None) -> keras_tuner.Objective:
    """The argument `objective` with its direction."""
    if isinstance(objective, keras_tuner.Objective) and names_of(objective) == [objective.name]:
        if direction is not None and direction != objective.direction:
            raise ValueError(f"direction must be that of the objective, {objective.direction!r}, got {direction!r}.")
        return objective
    if not isinstance(objective, str):
        kind = type(objective).__name__
        raise TypeError(f"objective must be the name of a metric, got {objective!r} of type {kind}.")
    if direction is None:
        direction = infer_direction(objective)
    return keras_tuner.Objective(objective, arguments.choice("direction", direction, ("max", "min")))


def _goals(objective: Any, direction: Any) -> list[keras_tuner.Objective]:
    """One objective, or several, each with its direction."""
    if not isinstance(objective, list | tuple):
        return [_goal(objective, direction)]
    if len(objective) < 2:
        raise ValueError(f"objective must be a name or a list of at least two, got {objective!r}.")
    if direction is not None:
        raise ValueError(
            f"direction must be None where there are several objectives, got {direction!r}: give a "
            "keras_tuner.Objective where the name does not say."
        )
    goals = [_goal(each, None) for each in objective]
    if len({goal.name for goal in goals}) < len(goals):
        raise ValueError(f"objective must be different metrics, got {objective!r}.")
    return goals


def _check_fit_argument(name: str, parameter: Any, given: int | None) -> None:
    """`batch_size` or `epochs` as a parameter of the space."""
    if given is not None:
        raise ValueError(f"{name} must be None where it is a parameter of the space, got {given!r}.")
    if isinstance(parameter, Float):
        raise TypeError(f"{name} must be an Int or a Choice of integers in the space, got {parameter!r}.")
    for value in (parameter.low,) if isinstance(parameter, Int) else parameter.values:
        arguments.integer(f"{name} in the space", value, 1)


def search(
    build: Callable[..., keras.Model] | keras_tuner.HyperModel,
    space: Space | Mapping[str, Any] | None = None,
    data: Any = None,
    *,
    validation: Any = None,
    strategy: Any = "random",
    max_trials: int | None = None,
    points: Points = None,
    objective: str | keras_tuner.Objective | Sequence[str | keras_tuner.Objective] = "val_accuracy",
    direction: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    fit_arguments: Mapping[str, Any] | None = None,
    cv: Any = None,
    groups: Any = None,
    executions_per_trial: int = 1,
    max_model_size: int | None = None,
    callbacks: Callbacks | None = None,
    pruner: Any = None,
    time_limit: float | None = None,
    max_epochs: int | None = None,
    patience: int | None = None,
    workers: int = 1,
    executor: futures.Executor | None = None,
    trial_time_limit: float | None = None,
    trial_memory_limit: int | None = None,
    storage: str | Path | None = None,
    lease: float = 60.0,
    seed: int | None = None,
    directory: str | Path | None = None,
    log_dir: str | Path | None = None,
    overwrite: bool = False,
    verbose: int = 1,
) -> Result:
    """Trains a model at several points of a space and returns the results.

    Every trial builds a model, trains it with `fit` and is scored by the objective at its best epoch; the model of the
    best epoch of the best trial is kept. A trial that raises, or whose loss is no longer finite, has failed: the table
    says why, it can never be the best, and the search continues.

    Args:
        build: Takes the `Values` of a trial (`hp.learning_rate` or `hp["learning_rate"]`; what is inactive is absent)
            and returns a compiled model. Where `space` is None, a KerasTuner build function, which asks its argument
            for hyperparameters (`hp.Int("units", 8, 32)`), or a `keras_tuner.HyperModel`.
        space: What may vary. A parameter named `batch_size` or `epochs` is handed to `fit`. None: what `build` asks
            for; see `HyperModel`.
        data: Arrays `(x, y)`; with their own validation part `(x, y, x_val, y_val)` or `((x, y), (x_val, y_val))`; or a
            `tf.data.Dataset` or `PyDataset`. x and y may be nested.
        validation: `(x, y)`, `(x, y, sample_weight)`, a dataset, or the fraction of `data` to split off at random, once
            for all trials. When left out and `data` has no validation part: 0.2 of arrays, nothing of a dataset.
        strategy: `"random"` draws points independently and never twice; `"grid"` walks through all in order. With
            Optuna (`pip install "keras-optkit[search]"`): `"qmc"` spreads points evenly; `"tpe"`, `"gp"` and `"cma"`
            learn from the trials so far, and so does `"nsga2"` for several objectives. Or a sampler of Optuna.
        max_trials: The most trials to run. When left out: all of a grid, otherwise 10.
        points: For a grid, how many values to take of a continuous range: a number or a mapping from names to numbers.
        objective: A metric of the training, e.g. `"val_loss"`, or a `keras_tuner.Objective` with name and direction. An
            epoch without it is skipped. A list of them: see `Result.pareto`; the best epoch, and the best trial, are
            those with the lowest sum, what is maximised counted negatively.
        direction: `"max"` or `"min"`; when left out it follows from the objective's name, if that is clear.
        epochs: Epochs per run; 10 when left out.
        batch_size: Batch size of every trial; Keras's 32 when left out.
        fit_arguments: Other arguments of `fit` by name: `{"class_weight": {0: 1.0, 1: 5.0}, "steps_per_epoch": 100}`.
            `sample_weight` is split with the data. Data without an end need `steps_per_epoch` and `validation_steps`.
        cv: Cross-validation: every trial is trained once for each fold, with a new model, and scored by the mean. A
            number of random folds; a splitter of scikit-learn, e.g. `GroupKFold(5)` or `TimeSeriesSplit(5)`, which must
            give the same folds each time; or a list of pairs of indices. `data` must be arrays (x, y), and `validation`
            None. None: no folds. See [Cross-validation](../guide/tuning.md#cross-validation).
        groups: The group of each sample, for splitters that look at it.
        executions_per_trial: Runs per trial with different seeds, of each fold where there is `cv`, scored by their
            mean; see `Trial.scores` and `Trial.spread`.
        max_model_size: The most elements that the weights of a model may have; a trial with more has failed. None: no
            limit.
        callbacks: A function that returns the list of callbacks of one run, new ones each time. It may take the
            trial's values, or the values and the run's log directory (None without `log_dir`).
        pruner: Stops trials that are worse than others. `"asha"`, `"pasha"` and `"hyperband"`, or an object of
            `pruners`, train all trials for a few epochs and promote the best, which continue the very run. `"median"`
            and `"wilcoxon"`, or a pruner of Optuna, stop a trial after an epoch, for good. None: every trial has all
            epochs.
        time_limit: Seconds for the whole search, also in earlier processes where it is continued. The trial that is
            running is stopped at the end of its epoch. None: no limit.
        max_epochs: Epochs for the whole search, over all trials. None: no limit.
        patience: The search ends when so many trials in a row have ended without a new best score; one that is paused
            has not ended. None: it does not.
        workers: How many trials run at a time, each in a process of its own; see
            [Several trials at once](../guide/tuning.md#several-trials-at-once). 1, the default: in this process, unless
            one of the next three is given.
        executor: A `concurrent.futures.Executor` whose processes train the trials, `workers` at a time, e.g. that of a
            Dask cluster. `directory` must be on a disk that they see. None: processes on this machine.
        trial_time_limit: Seconds after which the process of a trial is ended; the trial has failed. None: no limit.
        trial_memory_limit: Bytes that the process of a trial may have in memory, TensorFlow's and the data's included,
            before it is ended; the trial has failed. None: no limit.
        storage: A database that several machines share, each of which starts the same script and takes trials from it:
            `"postgresql://USER@HOST/DATABASE"`, or, for processes of one machine, a path or `"sqlite:///FILE"`. It
            holds everything, models and bundles included, so that `directory` must be None, and one search. `workers`
            are those of one machine. See [Many machines](../howto/many-machines.md). None: one process has the search.
        lease: With `storage`: seconds after which a trial is continued elsewhere whose process is not heard of, from
            its last bundle; one is stored as often.
        seed: Fixes the points, the split, and the seeds of each training (by `keras.utils.set_random_seed`, so that it
            changes the global seeds). When left out it is drawn with Python's `random`; see `Result.seed`.
        directory: Where state and the best model are kept. If a search is there it is continued: finished trials are
            kept, the interrupted one is run again but for its finished folds and runs. The data and the build function
            are not compared. Two searches cannot run in one directory at a time. When left out, a temporary directory
            that lives as long as the result.
        log_dir: Where TensorBoard logs go: for each trial a run `trial_<number>` with its hyperparameters and best
            objective for the HParams table, and the curves of every epoch. None: no logs.
        overwrite: Whether to delete a search in `directory` and the logs of its trials in `log_dir`.
        verbose: 0: silent. 1: two lines a trial. 2: Keras's progress bars, too.

    Returns:
        The trials, the best of them, and its model.

    Raises:
        TypeError: If an argument has a wrong type, or cannot be sent to workers, or `build` returns no compiled model.
        ImportError: If a strategy or a pruner needs Optuna, workers need cloudpickle, or `storage` needs these or
            SQLAlchemy or psycopg, and it is not installed.
        ValueError: If an argument has a wrong value, if a grid has infinitely many points, if training has no
            metric named like the objective, if there is a pruner and several objectives, or if `directory` holds
            another search, or `storage` one with another space, other settings or other data.
        RuntimeError: If all trials failed, from the first error; if another search runs in `directory`, or a file in it
            is damaged; if workers cannot be started; if `overwrite` is True while others train trials of `storage`.
        ConnectionError: If `storage` cannot be opened.
        OSError: If the disk does not take what is to be kept; what is in `directory` can be continued.

    Example:
    ```python
    import keras
    import keras_optkit as ok
    import numpy as np

    x = np.random.default_rng(0).normal(size=(64, 2))
    y = (x[:, 0] > x[:, 1]).astype(int)


    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, activation="sigmoid")])
        model.compile(ok.optimizers.Adam(hp.learning_rate), "binary_crossentropy", metrics=["accuracy"])
        return model


    space = ok.tuning.Space(
        learning_rate=ok.tuning.Float(1e-3, 1e-1, log=True),
        batch_size=ok.tuning.Choice([8, 16]),
    )
    result = ok.tuning.search(build, space, (x, y), max_trials=2, epochs=1, seed=0, verbose=0)
    print(result.table())
    assert set(result.best) == {"learning_rate", "batch_size"}
    ```
    """
    if storage is not None and directory is not None:
        raise ValueError(
            f"directory must be None where storage is given, which holds all that is kept, got {directory!r}."
        )
    hypermodel = HyperModel(build, space)
    space = hypermodel.space
    if isinstance(strategy, str):
        arguments.choice("strategy", strategy, STRATEGIES)
    arguments.integer("max_trials", max_trials, 1, optional=True)
    goals = _goals(objective, direction)
    names = [goal.name for goal in goals]
    arguments.boolean("overwrite", overwrite)
    seed = arguments.integer("seed", seed, 0, optional=True)
    sizes = {"batch_size": batch_size, "epochs": epochs}
    for name in FIT_ARGUMENTS:
        arguments.integer(name, sizes[name], 1, optional=True)
        if name in space:
            _check_fit_argument(name, space[name], sizes[name])
    sizes["epochs"] = 10 if epochs is None else epochs
    validated = next((name for name in names if name.startswith("val_")), names[0])
    if cv is None and groups is not None:
        raise ValueError(f"groups must be None where cv is None, got {type(groups).__name__}.")
    if cv is not None:
        check_data(data, validation)
    arguments.integer("executions_per_trial", executions_per_trial, 1)
    data, validation = checked_data(data, validation, validated)
    cv = None if cv is None else checked_cv(cv, groups, data)
    if is_dataset(data) and (batch_size is not None or "batch_size" in space):
        raise ValueError("batch_size must be left out, also of the space, where data is a dataset, which has its own.")
    others = checked_fit_arguments(fit_arguments, data, None if "epochs" in space else sizes["epochs"])
    check_ends({**others, "x": data, "validation_data": validation}, {"x": "data", "validation_data": "validation"})
    goal: Any = goals if len(goals) > 1 else goals[0]
    most = 10 if max_trials is None else max_trials
    oracle: SpaceOracle | OptunaOracle
    if strategy == "grid":
        oracle = GridOracle(space, goal, max_trials, seed, points)
    elif points is not None:
        raise ValueError(f'points must be None where strategy is not "grid", got {points!r}.')
    elif strategy == "random":
        oracle = RandomOracle(space, goal, most, seed)
    else:
        oracle = OptunaOracle(goal, most, strategy, space=space, seed=seed)
    definition = {
        "strategy": strategy if isinstance(strategy, str) else type(strategy).__name__,
        "points": points,
        "objective": names if len(names) > 1 else names[0],
        "direction": [goal.direction for goal in goals] if len(goals) > 1 else goals[0].direction,
        "validation": validation if isinstance(validation, float) and cv is None else None,
        "cv": described(cv),
        "executions_per_trial": executions_per_trial,
        "fit_arguments": comparable({**others, "sample_weight": None}) if others else None,
        **sizes,
        **({} if seed is None else {"seed": seed}),
    }
    if storage is not None:
        definition |= {"max_model_size": max_model_size}
        definition["data"] = fingerprint({"data": data, "validation": validation, **others})
    with contextlib.ExitStack() as on_failure:
        if directory is None:
            path = tempfile.mkdtemp(prefix="keras_optkit_search_")
            on_failure.callback(shutil.rmtree, path, ignore_errors=True)
        tuner = Tuner(
            oracle,
            hypermodel,
            directory=path if directory is None else directory,
            executions_per_trial=executions_per_trial * (1 if cv is None else cv if isinstance(cv, int) else len(cv)),
            callbacks=callbacks,
            log_dir=log_dir,
            overwrite=overwrite,
            verbose=verbose,
            definition=definition,
            keep_models=1,
            max_model_size=max_model_size,
            pruner=pruner,
            time_limit=time_limit,
            max_epochs=max_epochs,
            patience=patience,
            workers=workers,
            executor=executor,
            trial_time_limit=trial_time_limit,
            trial_memory_limit=trial_memory_limit,
            storage=storage,
            lease=lease,
        )
        tuner.is_temporary = directory is None
        weights = others.pop("sample_weight", None)
        tuner.whole = fit_data(data, None, oracle.seed, weights)
        fit = tuner.whole if cv is not None else fit_data(data, validation, oracle.seed, weights)
        if cv is not None:
            tuner.folds = random_folds(cv, samples("data", data), oracle.seed) if isinstance(cv, int) else cv
        given = {name: size for name, size in sizes.items() if name not in space and size is not None}
        tuner.search(**fit | others, **given)
        result = tuner.result(temporary=directory is None)
        on_failure.pop_all()
    return result

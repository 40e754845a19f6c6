"""`search`: the one call that does everything."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np

from keras_optkit import arguments
from keras_optkit.tuning.hypermodel import FIT_ARGUMENTS, HyperModel
from keras_optkit.tuning.oracle import SPLIT, GridOracle, RandomOracle, SpaceOracle, stream
from keras_optkit.tuning.result import Result
from keras_optkit.tuning.space import Float, Int, Points, Space, Values
from keras_optkit.tuning.tuner import Callbacks, Tuner

STRATEGIES = ("random", "grid")
_WORDS = {
    "min": "loss error crossentropy divergence hinge poisson logcosh perplexity mse mae mape msle "
    "false_positives false_negatives",
    "max": "accuracy acc auc precision recall sensitivity specificity f1_score fbeta_score r2_score iou io_u "
    "true_positives true_negatives",
}


def infer_direction(objective: str) -> str:
    """Whether a metric of this name is to be large ("max") or small ("min").

    Raises:
        ValueError: If the name does not say. (KerasTuner's own rule would minimise F1 and R2.)
    """
    name = objective.removeprefix("val_")
    for direction, words in _WORDS.items():
        if any(name == word or name.endswith(f"_{word}") for word in words.split()):
            return direction
    raise ValueError(
        f'direction must be "min" or "max" for the objective {objective!r}, whose name does not say, got None.'
    )


def _samples(name: str, arrays: Any) -> int:
    """The number of samples of an array, or of a nest of them."""
    shapes = [tuple(getattr(array, "shape", ())) for array in keras.tree.flatten(arrays)]
    counts = {shape[0] if shape else None for shape in shapes}
    if len(counts) != 1 or None in counts:
        raise ValueError(f"{name} must be arrays with one number of samples, got the shapes {shapes}.")
    return counts.pop()  # type: ignore[return-value]


def _pair(name: str, data: Any) -> tuple[Any, Any]:
    """Checks (x, y)."""
    if not isinstance(data, list | tuple) or len(data) != 2:
        raise TypeError(f"{name} must be a pair of arrays (x, y) or a dataset, got {type(data).__name__}.")
    x, y = data
    of_x, of_y = _samples(f"The x of {name}", x), _samples(f"The y of {name}", y)
    if of_x != of_y or not of_x:
        raise ValueError(f"{name} must have as many x as y, and at least one, got {of_x} and {of_y}.")
    return x, y


def _is_dataset(data: Any) -> bool:
    return isinstance(data, keras.utils.PyDataset) or (hasattr(data, "element_spec") and hasattr(data, "cardinality"))


def checked_data(data: Any, validation: Any, objective: str) -> tuple[Any, Any]:
    """The training data and the validation data, each a pair or a dataset; or the fraction to split off, or None."""
    if isinstance(data, tuple) and len(data) == 4:
        data = data[:2], data[2:]
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, tuple) or _is_dataset(d) for d in data):
        if validation is not None:
            raise ValueError("validation must be None where data has a validation part of its own, got both.")
        data, validation = data
    if not _is_dataset(data):
        data = _pair("data", data)
        if validation is None:
            validation = 0.2
        if isinstance(validation, float):
            if _samples("data", data) < 2:
                raise ValueError("data must have at least 2 samples to be split, got 1.")
            return data, arguments.real("validation", validation, 0, 1, closed="neither")
    if validation is None:
        if objective.startswith("val_"):
            raise ValueError(f"validation must be given for the objective {objective!r}, got None.")
        return data, None
    return data, validation if _is_dataset(validation) else _pair("validation", validation)


def fit_data(data: Any, validation: Any, seed: int) -> dict[str, Any]:
    """The arguments x, y and validation_data of `fit`."""
    if isinstance(validation, float):
        order = np.random.default_rng(stream(seed, SPLIT)).permutation(_samples("data", data))
        held_out = min(max(round(validation * len(order)), 1), len(order) - 1)

        def take(index: Any) -> Any:
            return tuple(keras.tree.map_structure(lambda array: np.asarray(array)[index], part) for part in data)

        data, validation = take(order[held_out:]), take(order[:held_out])
    fit = {"x": data} if _is_dataset(data) else {"x": data[0], "y": data[1]}
    if _is_dataset(data) and not isinstance(data, keras.utils.PyDataset):
        fit["shuffle"] = False  # Keras's default, True, makes it warn that a tf.data.Dataset has an order of its own
    return fit if validation is None else {**fit, "validation_data": validation}


def _check_fit_argument(name: str, parameter: Any, given: int | None) -> None:
    """`batch_size` or `epochs` as a parameter of the space."""
    if given is not None:
        raise ValueError(f"{name} must be None where it is a parameter of the space, got {given!r}.")
    if isinstance(parameter, Float):
        raise TypeError(f"{name} must be an Int or a Choice of integers in the space, got {parameter!r}.")
    for value in (parameter.low,) if isinstance(parameter, Int) else parameter.values:
        arguments.integer(f"{name} in the space", value, 1)


def search(
    build: Callable[[Values], keras.Model],
    space: Space | Mapping[str, Any],
    data: Any,
    *,
    validation: Any = None,
    strategy: str = "random",
    max_trials: int | None = None,
    points: Points = None,
    objective: str = "val_accuracy",
    direction: str | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    executions_per_trial: int = 1,
    callbacks: Callbacks | None = None,
    seed: int | None = None,
    directory: str | Path | None = None,
    log_dir: str | Path | None = None,
    overwrite: bool = False,
    verbose: int = 1,
) -> Result:
    """Trains a model at several points of a space and returns what came of it.

    Every trial builds a model, trains it with `fit` and is scored by the objective at its best epoch; the model of the
    best epoch of the best trial is kept. A trial that raises, or whose loss is no longer finite, has failed: the table
    says why, it can never be the best, and the search goes on.

    Args:
        build: Takes the `Values` of a trial (`hp.learning_rate` or `hp["learning_rate"]`; what is inactive is absent)
            and returns a compiled model.
        space: What may vary. A parameter named `batch_size` or `epochs` is handed to `fit`.
        data: Arrays `(x, y)`; with their own validation part `(x, y, x_val, y_val)` or `((x, y), (x_val, y_val))`; or a
            `tf.data.Dataset` or `PyDataset`. x and y may be nested.
        validation: `(x, y)`, a dataset, or the fraction of `data` to split off at random, once for all trials. When
            left out and `data` has no validation part: 0.2 of arrays, nothing of a dataset.
        strategy: `"random"` draws points independently and never twice; `"grid"` walks through all in order.
        max_trials: The most trials to run. When left out: 10 at random, all of a grid.
        points: For a grid, how many values to take of a continuous range: a number or a mapping from names to numbers.
        objective: A metric of the training, e.g. `"val_loss"`.
        direction: `"max"` or `"min"`; when left out it follows from the objective's name, if that is clear.
        epochs: Epochs per training; 10 when left out.
        batch_size: Batch size of every trial; Keras's 32 when left out.
        executions_per_trial: Trainings per trial with different seeds, scored by their mean.
        callbacks: A function that returns the list of callbacks of one training, made anew each time. It may take the
            trial's values, or the values and the training's log directory (None without `log_dir`).
        seed: Fixes the points, the split, and the seeds of each training (by `keras.utils.set_random_seed`, so that it
            changes the global seeds). When left out it is drawn with Python's `random`; see `Result.seed`.
        directory: Where state and the best model are kept. If a search is there it is continued: finished trials are
            kept, the interrupted one is run again. The data and the build function are not compared. When left out, a
            temporary directory that lives as long as the result.
        log_dir: Where TensorBoard logs go: for each trial a run `trial_<number>` with its hyperparameters and best
            objective for the HParams table, and the curves of every epoch. None: no logs.
        overwrite: Whether to delete a search in `directory` and the logs of its trials in `log_dir`.
        verbose: 0: silent. 1: two lines a trial. 2: Keras's progress bars, too.

    Returns:
        The trials, the best of them, and its model.

    Raises:
        TypeError: If an argument has a wrong type, or `build` returns no compiled model.
        ValueError: If an argument has a wrong value, if a grid has infinitely many points, if the trainings have no
            metric named like the objective, or if `directory` holds another search.
        RuntimeError: If all trials failed, from the first error.

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
    hypermodel = HyperModel(build, space)  # type: ignore[arg-type]
    space = hypermodel.space
    arguments.choice("strategy", strategy, STRATEGIES)
    arguments.integer("max_trials", max_trials, 1, optional=True)
    if not isinstance(objective, str):
        kind = type(objective).__name__
        raise TypeError(f"objective must be the name of a metric, got {objective!r} of type {kind}.")
    if direction is None:
        direction = infer_direction(objective)
    arguments.choice("direction", direction, ("max", "min"))
    arguments.boolean("overwrite", overwrite)
    seed = arguments.integer("seed", seed, 0, optional=True)
    fit_arguments = {"batch_size": batch_size, "epochs": epochs}
    for name in FIT_ARGUMENTS:
        arguments.integer(name, fit_arguments[name], 1, optional=True)
        if name in space:
            _check_fit_argument(name, space[name], fit_arguments[name])
    fit_arguments["epochs"] = 10 if epochs is None else epochs
    data, validation = checked_data(data, validation, objective)
    if _is_dataset(data) and (batch_size is not None or "batch_size" in space):
        raise ValueError("batch_size must be left out, also of the space, where data is a dataset, which has its own.")
    goal = keras_tuner.Objective(objective, direction)
    oracle: SpaceOracle
    if strategy == "grid":
        oracle = GridOracle(space, goal, max_trials, seed, points)
    elif points is not None:
        raise ValueError(f'points must be None where strategy is not "grid", got {points!r}.')
    else:
        oracle = RandomOracle(space, goal, 10 if max_trials is None else max_trials, seed)
    definition = {
        "strategy": strategy,
        "points": points,
        "objective": objective,
        "direction": direction,
        "validation": validation if isinstance(validation, float) else None,
        "executions_per_trial": executions_per_trial,
        **fit_arguments,
        **({} if seed is None else {"seed": seed}),
    }
    with contextlib.ExitStack() as on_failure:
        if directory is None:
            path = tempfile.mkdtemp(prefix="keras_optkit_search_")
            on_failure.callback(shutil.rmtree, path, ignore_errors=True)
        tuner = Tuner(
            oracle,
            hypermodel,
            directory=path if directory is None else directory,
            executions_per_trial=executions_per_trial,
            callbacks=callbacks,
            log_dir=log_dir,
            overwrite=overwrite,
            verbose=verbose,
            definition=definition,
        )
        tuner.search(**fit_data(data, validation, oracle.seed), **fit_arguments)
        result = tuner.result(temporary=directory is None)
        on_failure.pop_all()
    return result

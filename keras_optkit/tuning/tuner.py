"""The search itself: `Tuner` runs the trials of a KerasTuner oracle, `search` is the one call that does everything."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import math
import shutil
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.errors import FailedTrialError, FatalError, FatalTypeError, FatalValueError

from keras_optkit import arguments
from keras_optkit.tuning import logs
from keras_optkit.tuning.hypermodel import HyperModel
from keras_optkit.tuning.oracle import TRAINING, stream
from keras_optkit.tuning.result import Result, Trial, ranked, shown
from keras_optkit.tuning.space import Values

Callbacks = Callable[..., list[keras.callbacks.Callback]]


class BestEpoch(keras.callbacks.Callback):
    """Keeps the model of the best epoch, and ends the training when the loss or the objective is no longer finite.

    Args:
        objective: What is best.
        path: Where the model is saved.
        to_beat: The model is saved only when it is better than this, too.
    """

    def __init__(self, objective: keras_tuner.Objective, path: Path, to_beat: float | None) -> None:
        super().__init__()
        self.objective = objective
        self.path = path
        self.to_beat = to_beat
        self.epochs = 0
        self.best_epoch: int | None = None
        self.metrics: dict[str, float] = {}
        self.failure = ""

    @property
    def score(self) -> float | None:
        """The best value of the objective so far."""
        return self.metrics.get(self.objective.name)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the epoch's metrics."""
        self.epochs += 1
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        name = self.objective.name
        if name not in metrics:
            known = ", ".join(map(repr, metrics))
            near = arguments.near(name, metrics)
            raise FatalValueError(f"objective must be a metric of the training ({known}), got {name!r}.{near}")
        for watched in ("loss", "val_loss", name):
            if not math.isfinite(metrics.get(watched, 0.0)):
                self.failure = f"{watched} is {metrics[watched]} in epoch {epoch + 1}."
                self.model.stop_training = True
                return
        if self.score is None or self.objective.better_than(metrics[name], self.score):
            self.metrics, self.best_epoch = metrics, epoch + 1
            if self.to_beat is None or self.objective.better_than(metrics[name], self.to_beat):
                self.model.save(self.path)


def _arity(callbacks: Callbacks | None) -> int:
    """How many of (values, log directory) the factory of callbacks takes: its parameters without defaults."""
    if callbacks is None:
        return 0
    wanted = "callbacks must be a function of (), (hp) or (hp, log_dir) that returns a list of new callbacks"
    if not callable(callbacks):
        raise TypeError(f"{wanted}, since each trial needs its own, e.g. lambda: [...], got {callbacks!r}.")
    parameters = inspect.signature(callbacks).parameters.values()
    count = sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    if count > 2:
        raise TypeError(f"{wanted}, got {callbacks!r} with {count} arguments.")
    return count


def _delete_search(directory: Path) -> None:
    """Deletes what KerasTuner and `Tuner` wrote into a directory, and nothing else."""
    for trial in directory.glob("trial_*/trial.json"):
        shutil.rmtree(trial.parent)
    for state in (*directory.glob("oracle.json"), *directory.glob("tuner*.json")):
        state.unlink()


class Tuner(keras_tuner.Tuner):
    """Runs the trials that an oracle of KerasTuner proposes. `search` makes one; use it directly for other oracles.

    What it does differently from KerasTuner's: every trial is seeded by the oracle's seed and its number; a training
    whose loss is no longer finite ends and its trial has failed; callbacks are made anew for every trial; only the best
    model is kept, as a `.keras` file; HParams are written for every trial.

    Args:
        oracle: Proposes the points, e.g. `keras_tuner.oracles.BayesianOptimizationOracle`.
        hypermodel: What to build.
        directory: Where state and the best model are kept. A search that is there already is continued.
        executions_per_trial: Trainings per trial, with different seeds; the score is their mean.
        callbacks: As in `search`.
        log_dir: As in `search`.
        overwrite: Whether to delete a search in `directory` and the logs of its trials in `log_dir`.
        verbose: 0: silent. 1: two lines a trial. 2: Keras's progress bars, too.
        definition: What besides the space must be unchanged for a search in `directory` to be continued, as JSON-ready
            values.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok
    import keras_tuner
    import numpy as np


    def build(hp):
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(hp.learning_rate), "mse")
        return model


    hypermodel = ok.tuning.HyperModel(build, ok.tuning.Space(learning_rate=ok.tuning.Float(1e-3, 1e-1, log=True)))
    oracle = keras_tuner.oracles.BayesianOptimizationOracle(
        objective=keras_tuner.Objective("loss", "min"),
        max_trials=2,
        hyperparameters=hypermodel.hyperparameters(),
    )
    with tempfile.TemporaryDirectory() as directory:
        tuner = ok.tuning.Tuner(oracle, hypermodel, directory=directory, verbose=0)
        tuner.search(np.ones((8, 2)), np.ones((8, 1)), epochs=1)
        print(tuner.result())
    ```
    """

    def __init__(
        self,
        oracle: keras_tuner.Oracle,
        hypermodel: HyperModel,
        *,
        directory: str | Path,
        executions_per_trial: int = 1,
        callbacks: Callbacks | None = None,
        log_dir: str | Path | None = None,
        overwrite: bool = False,
        verbose: int = 1,
        definition: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(hypermodel, HyperModel):
            raise TypeError(f"hypermodel must be a keras_optkit.tuning.HyperModel, got {hypermodel!r}.")
        arguments.integer("executions_per_trial", executions_per_trial, 1)
        self.arity = _arity(callbacks)
        self.callbacks = callbacks
        self.log_dir = None if log_dir is None else Path(log_dir)
        self.verbose = arguments.choice("verbose", verbose, (0, 1, 2))
        self.definition = json.loads(json.dumps({"space": hypermodel.space.get_config(), **(definition or {})}))
        self.records: dict[str, dict[str, Any]] = {}  # what KerasTuner's trials have no place for, by trial
        self.first_error: Exception | None = None
        self._started = 0.0
        self._used: weakref.WeakSet[keras.callbacks.Callback] = weakref.WeakSet()
        oracle.verbose = 0
        path = Path(directory).absolute()
        if overwrite:
            _delete_search(path)
        with contextlib.redirect_stdout(io.StringIO()):  # KerasTuner prints whether it reloads
            # If it were given the hypermodel here, it would build a model to find the space, which is known.
            super().__init__(
                oracle, directory=str(path.parent), project_name=path.name, executions_per_trial=executions_per_trial
            )
        self.hypermodel = hypermodel
        self._claim_log_dir(overwrite)

    def _claim_log_dir(self, overwrite: bool) -> None:
        """A new search must not write into the runs of an old one."""
        if self.log_dir is None or self.oracle.trials:
            return
        old = [path for path in self.log_dir.glob("trial_*") if any(path.rglob(logs.EVENTS))]
        if old and not overwrite:
            raise ValueError(
                f"log_dir must hold no trials of another search, got {str(self.log_dir)!r} with {len(old)} of them. "
                "Choose another directory, or pass overwrite=True to delete their logs."
            )
        for path in old:
            logs.clear(path)

    # What is saved in the directory besides the oracle's own state

    def get_state(self) -> dict[str, Any]:
        """KerasTuner's hook for saving."""
        return {"definition": self.definition, "records": self.records}

    def set_state(self, state: dict[str, Any]) -> None:
        """KerasTuner's hook for continuing a search.

        Raises:
            ValueError: If the search in the directory is another one.
        """
        old = state["definition"]
        different = [name for name in self.definition if json.dumps(self.definition[name]) != json.dumps(old.get(name))]
        if different:
            changes = "; ".join(f"{name} was {old.get(name)!r} and is {self.definition[name]!r}" for name in different)
            raise ValueError(
                f"directory must be new or hold the same search, got {self.project_dir!r}, where {changes}. "
                "Choose another directory, or pass overwrite=True to start anew."
            )
        self.definition = old
        self.records = state["records"]

    # The course of a search

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Runs all trials; the arguments are those of `model.fit`."""
        if self.records and self.verbose:
            print(f"Continuing the search in {self.project_dir}: {len(self.oracle.end_order)} trials are finished.")
        super().search(*args, **kwargs)

    def number(self, trial: keras_tuner.engine.trial.Trial) -> int:
        """The number of a trial: 0 for the first that was started."""
        return self.oracle.start_order.index(trial.trial_id)

    def on_trial_begin(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """KerasTuner's hook before a trial."""
        super().on_trial_begin(trial)
        self._started = time.perf_counter()
        self.records[trial.trial_id] = {}
        self.save()
        if self.verbose:
            number, total = self.number(trial), self.oracle.max_trials or "?"
            point = self.hypermodel.point(trial.hyperparameters)
            values = ", ".join(f"{name}={shown(value)}" for name, value in point.items())
            print(f"[{number + 1}/{total}] trial {number}: {values}", flush=True)

    def on_trial_end(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """KerasTuner's hook after a trial."""
        record = self.records[trial.trial_id]
        record["seconds"] = time.perf_counter() - self._started
        trial.status = record["status"]
        if trial.status != TrialStatus.COMPLETED:
            trial.metrics = type(trial.metrics)()  # without the placeholder that run_trial returned
        self.save()  # before the oracle notes that the trial has ended, which must not be without its record
        super().on_trial_end(trial)
        trials = self.trials()
        order = ranked(trials, self.oracle.objective.direction)
        kept = [self.oracle.start_order[order[0].number]] if order else []
        for trial_id in self.oracle.end_order:
            if trial_id not in kept:
                self.model_path(trial_id).unlink(missing_ok=True)
        this = next((found for found in trials if found.number == self.number(trial)), None)
        if self.verbose and this is not None:
            epoch = f"{shown(this.score)} in epoch {this.best_epoch}"
            outcome = f"failed: {this.message}" if this.score is None else epoch
            best = f"; best so far {shown(order[0].score)} (trial {order[0].number})" if order else ""
            print(f"    {self.oracle.objective.name} {outcome}, {this.seconds:.1f} s{best}", flush=True)

    def run_trial(self, trial: keras_tuner.engine.trial.Trial, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Builds and trains the model of a trial, `executions_per_trial` times; returns the mean score."""
        record = self.records[trial.trial_id]
        record.update(status=TrialStatus.COMPLETED, epochs=0)
        best: float | None = None
        found = []
        try:
            for execution in range(self.executions_per_trial):
                watch = BestEpoch(self.oracle.objective, self.model_path(trial.trial_id), best)
                try:
                    self._train(trial, execution, watch, args, kwargs)
                finally:
                    record["epochs"] += watch.epochs
                if best is None or self.oracle.objective.better_than(watch.score, best):
                    best, record["best_epoch"] = watch.score, watch.best_epoch
                found.append(watch.metrics)
        except FatalError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, FailedTrialError) else f"{type(error).__name__}: "
            record["message"] = f"{kind}{error}"
            record["status"] = TrialStatus.FAILED if isinstance(error, FailedTrialError) else TrialStatus.INVALID
            self.first_error = self.first_error or error
            # If the exception went on, KerasTuner would print its traceback; on_trial_end tells it of the failure.
            trial.message = traceback.format_exc()
            return {self.oracle.objective.name: -math.inf if self.oracle.objective.direction == "max" else math.inf}
        record["metrics"] = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}
        return {self.oracle.objective.name: record["metrics"][self.oracle.objective.name]}

    def _train(
        self,
        trial: keras_tuner.engine.trial.Trial,
        execution: int,
        watch: BestEpoch,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        keras.backend.clear_session()  # frees the last model, too: it collects garbage
        seed = stream(self.oracle.seed, TRAINING, self.number(trial), execution)
        keras.utils.set_random_seed(int(seed.generate_state(1)[0]))
        values = self.hypermodel.point(trial.hyperparameters)
        with self._session(trial, execution, values) as (directory, metric):
            model = self.hypermodel.build(trial.hyperparameters)
            callbacks = self._callbacks(values, directory)
            if directory is not None:
                callbacks.append(keras.callbacks.TensorBoard(directory, write_graph=False))
            kwargs = {"verbose": 1 if self.verbose == 2 else 0, **kwargs, "callbacks": [*callbacks, watch]}
            self.hypermodel.fit(trial.hyperparameters, model, *args, **kwargs)
            if watch.failure or watch.best_epoch is None:
                raise FailedTrialError(watch.failure or "No epoch was finished.")
            metric(f"best_{watch.objective.name}", watch.score, watch.best_epoch - 1)

    @contextlib.contextmanager
    def _session(
        self, trial: keras_tuner.engine.trial.Trial, execution: int, values: Values
    ) -> Iterator[tuple[Path | None, Callable[[str, Any, int], None]]]:
        """The log directory of one training and a function for the metrics of its HParams."""
        if self.log_dir is None:
            yield None, lambda *_: None
            return
        name = f"trial_{trial.trial_id}"
        directory = self.log_dir / name
        # TensorBoard merges equal names, so those of two searches must differ; and it cuts off long ones at the end.
        group = f"{name} ({self.log_dir.name} in {self.log_dir.parent})"
        if self.executions_per_trial > 1:
            directory /= f"execution_{execution}"
        with logs.hparams_session(directory, group, values) as metric:
            yield directory, metric

    def _callbacks(self, values: Values, directory: Path | None) -> list[keras.callbacks.Callback]:
        if self.callbacks is None:
            return []
        made = self.callbacks(*(values, directory)[: self.arity])
        if not isinstance(made, list | tuple) or not all(isinstance(c, keras.callbacks.Callback) for c in made):
            raise FatalTypeError(f"callbacks must return a list of keras.callbacks.Callback, got {made!r}.")
        again = [callback for callback in made if callback in self._used]
        if again:
            raise FatalValueError(f"callbacks must return new callbacks for every trial, got {again[0]!r} again.")
        self._used.update(made)
        return list(made)

    # What came of it

    def model_path(self, trial_id: str) -> Path:
        """Where the model of a trial is, if it is the best."""
        return Path(self.get_trial_dir(trial_id)) / "model.keras"

    def load_model(self, trial: keras_tuner.engine.trial.Trial) -> keras.Model:
        """The trained model of a trial; only the best is kept."""
        return keras.saving.load_model(self.model_path(trial.trial_id))

    def trials(self) -> list[Trial]:
        """The finished trials in the order in which they were started."""
        found = []
        for number, trial_id in enumerate(self.oracle.start_order):
            if trial_id not in self.oracle.end_order:
                continue
            trial, record = self.oracle.trials[trial_id], self.records[trial_id]
            completed = trial.status == TrialStatus.COMPLETED
            found.append(
                Trial(
                    number=number,
                    values=self.hypermodel.point(trial.hyperparameters),
                    score=float(trial.score) if completed else None,
                    metrics=record["metrics"] if completed else {},
                    epochs=record["epochs"],
                    best_epoch=record["best_epoch"] if completed else None,
                    seconds=record["seconds"],
                    status="completed" if completed else "failed",
                    message=record.get("message", ""),
                )
            )
        return found

    def result(self, *, temporary: bool = False) -> Result:
        """The result.

        Args:
            temporary: Whether the directory is deleted with the result.

        Raises:
            RuntimeError: If all trials failed.
        """
        trials, objective = self.trials(), self.oracle.objective
        order = ranked(trials, objective.direction)
        if not order:
            first = f"; the first: {trials[0].message}" if trials else ""
            raise RuntimeError(f"All {len(trials)} trials failed{first}") from self.first_error
        return Result(
            trials,
            self.hypermodel.space,
            objective.name,
            objective.direction,
            self.oracle.seed,
            Path(self.project_dir),
            self.model_path(self.oracle.start_order[order[0].number]),
            temporary=temporary,
        )

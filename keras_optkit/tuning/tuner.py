"""The search itself: `Tuner` runs the trials of a KerasTuner oracle."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import textwrap
import threading
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
from keras_tuner.errors import FailedTrialError, FatalError, FatalValueError

from keras_optkit import arguments
from keras_optkit.private import clear_session
from keras_optkit.space import Values
from keras_optkit.tuning import books, logs
from keras_optkit.tuning.best_epoch import BestEpoch, forget_frames, names_of, take, worst_of
from keras_optkit.tuning.books import AtomicBooks, OtherSearchError, damaged, path_of
from keras_optkit.tuning.callbacks import Callbacks, Copies, Factory, of_search
from keras_optkit.tuning.data import check_ends, is_dataset
from keras_optkit.tuning.hypermodel import FIT_ARGUMENTS, HyperModel
from keras_optkit.tuning.models import KeptModel
from keras_optkit.tuning.oracle import TRAINING, stream
from keras_optkit.tuning.result import Result, Trial, listed, ranked, shown

_PRINTING = threading.Lock()  # sys.stdout is one for all threads

#: What an oracle that promotes trials, as Hyperband does, adds to their values.
EPOCHS, INITIAL_EPOCH, PARENT = "tuner/epochs", "tuner/initial_epoch", "tuner/trial_id"


class Tuner(keras_tuner.Tuner, AtomicBooks):
    """Runs the trials that an oracle of KerasTuner proposes. `search` makes one; use it directly for other oracles.

    Different from KerasTuner's: every trial is seeded by the oracle's seed and its number; a run whose loss is no
    longer finite ends and its trial has failed; models are kept with their optimizers, as `.keras` files where that is
    possible; HParams are written for every trial. A trial that an oracle such as `keras_tuner.oracles.HyperbandOracle`
    promotes continues the run that it comes from, weights and optimizer, at the epoch where that ended.

    Args:
        oracle: Proposes the points, e.g. `keras_tuner.oracles.BayesianOptimizationOracle`.
        hypermodel: What to build.
        directory: Where state and models are kept. A search that is there already is continued. Only one search at a
            time can run in it.
        executions_per_trial: Runs per trial, with different seeds; the score is their mean.
        callbacks: As in `search`.
        log_dir: As in `search`.
        overwrite: Whether to delete a search in `directory` and the logs of its trials in `log_dir`.
        verbose: 0: silent. 1: two lines a trial. 2: Keras's progress bars, too.
        definition: What else than the space must be unchanged for a search in `directory` to be continued, as
            JSON-ready values.
        max_model_size: The most elements that the weights of a model may have; a trial with more has failed.
        keep_models: Of how many of the best trials the model is kept, for `get_best_models`; None: of all.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument has a wrong value, or if `directory` holds another search.
        RuntimeError: If a file in `directory` is damaged, with its name.

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
        keep_models: int | None = None,
        max_model_size: int | None = None,
    ) -> None:
        if not isinstance(hypermodel, HyperModel):
            raise TypeError(f"hypermodel must be a keras_optkit.tuning.HyperModel, got {hypermodel!r}.")
        arguments.integer("executions_per_trial", executions_per_trial, 1)
        self.keep_models = arguments.integer("keep_models", keep_models, 1, optional=True)
        arguments.integer("max_model_size", max_model_size, 1, optional=True)
        arguments.boolean("overwrite", overwrite)
        self.callbacks = Factory(callbacks)
        path = path_of("directory", directory).absolute()
        self.log_dir = None if log_dir is None else path_of("log_dir", log_dir)
        self.verbose = arguments.choice("verbose", verbose, (0, 1, 2))
        self.definition = json.loads(json.dumps({"space": hypermodel.space.get_config(), **(definition or {})}))
        self.records: dict[str, dict[str, Any]] = {}  # what KerasTuner's trials have no place for, by trial
        self._runs: list[list[tuple[int, dict[str, float]]]] = []  # the epochs of this trial's executions
        self.first_error: Exception | None = None
        self._started = 0.0
        self._used: weakref.WeakSet[keras.callbacks.Callback] = weakref.WeakSet()
        oracle.verbose = 0
        books.keep_books_of(oracle)
        hypermodel.give_space_to(oracle)
        if overwrite:
            with books.locked(path):
                books.delete_search(path)
        with _PRINTING, contextlib.redirect_stdout(io.StringIO()):  # KerasTuner prints whether it reloads
            # If it were given the hypermodel here, it would build a model to find the space, which is known.
            place = {"directory": str(path.parent), "project_name": path.name}
            super().__init__(oracle, **place, executions_per_trial=executions_per_trial, max_model_size=max_model_size)
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
        if "definition" not in state:
            raise OtherSearchError(self.project_dir, "which is one of KerasTuner's own")
        if changes := books.differences(state["definition"], self.definition):
            raise OtherSearchError(self.project_dir, f"where {'; '.join(changes)}")
        self.definition = state["definition"]
        self.records = state["records"]

    def reload(self) -> None:  # type: ignore[override]  # without a name, as KerasTuner has it
        """Reads the state of the search in the directory.

        Raises:
            RuntimeError: If a file of it is damaged or missing, with its name.
            ValueError: If the search in the directory is another one.
        """
        path = Path(self.project_dir)
        books.check_books(path)
        try:
            super().reload()
        except (OtherSearchError, OSError):
            raise
        except Exception as error:  # JSON, but not what was written
            raise damaged(path, f"{type(error).__name__}: {error}") from error
        # A trial that KerasTuner had saved, but not yet noted as started, when the process ended.
        for trial_id in self.oracle.trials.keys() - set(self.oracle.start_order):
            del self.oracle.trials[trial_id]

    # The course of a search

    def search(self, *args: Any, **kwargs: Any) -> None:
        """Runs all trials; the arguments are those of `model.fit`.

        Args:
            *args: Positional arguments of `fit`.
            **kwargs: Keyword arguments of `fit`. `callbacks` are a list, copied for each run as KerasTuner does, or a
                function as in `search`; they come after those of the constructor. `verbose` is about Keras's progress
                bars.

        Raises:
            TypeError: If an argument has a wrong type, or `fit` has none of that name.
            ValueError: If an argument has a wrong value, e.g. data without an end and no `steps_per_epoch`.
            RuntimeError: If another search runs in the directory, or a file in it is damaged.
            OSError: If the disk does not take what is to be kept. What is there can be continued.
        """
        if type(self.hypermodel).fit is HyperModel.fit:
            bound = inspect.signature(keras.Model.fit).bind_partial(None, *args)
            positional = dict(list(bound.arguments.items())[1:])
            if both := positional.keys() & kwargs.keys():
                raise TypeError(f"search got several values for the argument {min(both)!r}.")
            args, kwargs = (), positional | kwargs
        space = self.hypermodel.space
        for name in FIT_ARGUMENTS:
            if name in space and (value := kwargs.get(name)) is not None:
                raise ValueError(f"{name} must be None where it is a parameter of the space, got {value!r}.")
        if "batch_size" in space and is_dataset(kwargs.get("x")):
            raise ValueError("batch_size must be left out of the space where x is a dataset, which has its own.")
        check_ends(kwargs, {"x": "x", "validation_data": "validation_data"})
        of_search(kwargs.get("callbacks"))  # raises now rather than in the first trial
        kwargs.setdefault("verbose", 1 if self.verbose == 2 else 0)
        with books.locked(Path(self.project_dir)):
            if Path(self._get_tuner_fname()).exists():  # another search may have run since this object was made
                self.reload()
            self.save()
            if self.records and self.verbose:
                print(f"Continuing the search in {self.project_dir}: {len(self.oracle.end_order)} trials are finished.")
            super().search(*args, **kwargs)

    def on_search_begin(self) -> None:
        """KerasTuner's hook before the first trial."""
        super().on_search_begin()
        self.oracle.verbose = 0  # KerasTuner takes `verbose` of `fit` for that of its own reports

    def on_search_end(self) -> None:
        """KerasTuner's hook after the last trial."""
        super().on_search_end()
        for trial_id in self.oracle.start_order:
            self._forget_end(trial_id)

    def number(self, trial: keras_tuner.engine.trial.Trial) -> int:
        """The number of a trial: 0 for the first that was started."""
        return self.oracle.start_order.index(trial.trial_id)

    def on_trial_begin(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """KerasTuner's hook before a trial."""
        super().on_trial_begin(trial)
        self._started = time.perf_counter()
        trial.metrics = type(trial.metrics)()  # without those of an attempt that was interrupted
        trial.message = None
        self._runs = []
        self.records[trial.trial_id] = {"epochs": 0, "best_epoch": None, "metrics": {}}
        self.save()
        if self.verbose:
            number, total = self.number(trial), self.oracle.max_trials or "?"
            values = self.hypermodel.point(trial.hyperparameters)
            print(f"[{number + 1}/{total}] trial {number}: {listed(values)}", flush=True)

    def on_trial_end(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """KerasTuner's hook after a trial."""
        record = self.records[trial.trial_id]
        record["seconds"] = time.perf_counter() - self._started
        trial.status = record.get("status", trial.status)  # a subclass may run its trials in its own way
        if trial.status != TrialStatus.COMPLETED:
            trial.metrics = type(trial.metrics)()  # without the placeholder that run_trial returned
        books.write_history(Path(self.get_trial_dir(trial.trial_id)), self._runs)
        self.save()  # before the oracle notes that the trial has ended, which must not be without its record
        super().on_trial_end(trial)
        trials = self._trials(history=False)
        order = ranked(trials, self.oracle.objective.direction)
        kept = [self.oracle.start_order[found.number] for found in order[: self.keep_models]]
        for trial_id in self.oracle.end_order:
            if trial_id not in kept:
                self.kept_model(trial_id).remove()
        parent = trial.hyperparameters.values.get(PARENT)
        if parent is not None and trial.trial_id in self.oracle.end_order:
            self._forget_end(parent)  # nothing else continues it
        this = next((found for found in trials if found.number == self.number(trial)), None)
        if self.verbose and this is not None:
            epoch = f"{shown(this.score)} in epoch {this.best_epoch}"
            outcome = f"failed: {this.message}" if this.score is None else epoch
            best = f"; best so far {shown(order[0].score)} (trial {order[0].number})" if order else ""
            print(f"    {self.oracle.objective.name} {outcome}, {this.seconds:.1f} s{best}", flush=True)

    def run_trial(self, trial: keras_tuner.engine.trial.Trial, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Builds and trains the model of a trial, `executions_per_trial` times; returns the mean score."""
        record = self.records[trial.trial_id]
        record["status"] = TrialStatus.COMPLETED
        objective = self.oracle.objective
        also = of_search(kwargs.pop("callbacks", None))
        best: float | None = None
        found = []
        try:
            for execution in range(self.executions_per_trial):
                watch = BestEpoch(objective, lambda model: self._keep(trial, model), best, self.max_model_size)
                try:
                    self._train(trial, execution, watch, also, args, dict(kwargs))
                finally:
                    record["epochs"] += watch.epochs
                    self._runs.append(watch.history)
                if best is None or objective.better_than(watch.score, best):
                    best, record["best_epoch"] = watch.score, watch.best_epoch
                found.append(watch.metrics)
        except FatalError:
            raise
        except Exception as error:
            kind = "" if isinstance(error, FailedTrialError) else f"{type(error).__name__}: "
            record["message"] = textwrap.shorten(f"{kind}{error}", 500)
            record["status"] = TrialStatus.FAILED if isinstance(error, FailedTrialError) else TrialStatus.INVALID
            self.first_error = self.first_error or error
            # If the exception were passed on, KerasTuner would print its traceback; on_trial_end reports the failure.
            values = self.hypermodel.point(trial.hyperparameters)
            trial.message = f"Failed with {dict(values)}.\n{traceback.format_exc()}"
            forget_frames(error)
            return worst_of(objective)
        common = set.intersection(*map(set, found))
        means = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0] if name in common}
        record["metrics"] = means
        return {name: means[name] for name in {objective.name, *names_of(objective)}}

    def _keep(self, trial: keras_tuner.engine.trial.Trial, model: keras.Model) -> None:
        """Keeps the model of a trial; says once if it is none for a `.keras` file."""
        why_not = self.kept_model(trial.trial_id).save(model)
        if why_not and self.verbose and not any("why_not_keras" in record for record in self.records.values()):
            print(f"    The weights are kept, since the model cannot be a .keras file. {why_not}", flush=True)
        if why_not:
            self.records[trial.trial_id]["why_not_keras"] = why_not

    def _train(
        self,
        trial: keras_tuner.engine.trial.Trial,
        execution: int,
        watch: BestEpoch,
        also: Copies | Factory,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        clear_session()  # frees the last model, too: it collects garbage
        seed = stream(self.oracle.seed, TRAINING, self.number(trial), execution)
        keras.utils.set_random_seed(int(seed.generate_state(1)[0]))
        values, rounds = self.hypermodel.point(trial.hyperparameters), trial.hyperparameters.values
        with self._session(trial, execution, values) as (directory, metric):
            model = self.hypermodel.build(trial.hyperparameters)
            watch.check_size(model)
            run = self._run_name(trial, execution)
            callbacks = self._new([*self.callbacks(values, directory, run), *also(values, directory, run)])
            watch.patient = bool(callbacks)
            if directory is not None:
                callbacks.append(keras.callbacks.TensorBoard(directory, write_graph=False))
            if EPOCHS in rounds:
                if "epochs" in values:
                    raise FatalValueError("epochs must not be a parameter of the space where the oracle sets them.")
                kwargs.update(epochs=rounds[EPOCHS], initial_epoch=rounds[INITIAL_EPOCH])
            if PARENT in rounds:
                self._end(rounds[PARENT], execution).load_into(model)
            watch.set_model(model)
            returned = self.hypermodel.fit(trial.hyperparameters, model, *args, **kwargs, callbacks=[*callbacks, watch])
            take(returned, watch, any(record["metrics"] for record in self.records.values()))
            if EPOCHS in rounds:
                self._end(trial.trial_id, execution).save_weights(model)
            assert watch.best_epoch is not None
            for name in names_of(watch.objective):
                metric(f"best_{name}", watch.metrics[name], watch.best_epoch - 1)

    def _new(self, callbacks: list[Any]) -> list[Any]:
        """Raises if one of the callbacks was in another run."""
        for callback in callbacks:
            if callback in self._used:
                raise FatalValueError(f"callbacks must return new callbacks for every trial, got {callback!r} again.")
        self._used.update(callbacks)
        return callbacks

    def _run_name(self, trial: keras_tuner.engine.trial.Trial, execution: int) -> Path:
        """The directory of one run, below that of all logs."""
        name = Path(f"trial_{trial.trial_id}")
        return name / f"execution_{execution}" if self.executions_per_trial > 1 else name

    @contextlib.contextmanager
    def _session(
        self, trial: keras_tuner.engine.trial.Trial, execution: int, values: Values
    ) -> Iterator[tuple[Path | None, Callable[[str, Any, int], None]]]:
        """The log directory of one training and a function for the metrics of its HParams."""
        if self.log_dir is None:
            yield None, lambda *_: None
            return
        directory = self.log_dir / self._run_name(trial, execution)
        # TensorBoard merges equal names, so those of two searches must differ; and it cuts off long ones at the end.
        group = f"trial_{trial.trial_id} ({self.log_dir.name} in {self.log_dir.parent})"
        with logs.hparams_session(directory, group, values) as metric:
            yield directory, metric

    # The results

    def kept_model(self, trial_id: str) -> KeptModel:
        """The model of a trial, as far as it is kept."""
        return KeptModel(Path(self.get_trial_dir(trial_id)))

    def model_path(self, trial_id: str) -> Path:
        """The file with the model of a trial, if it is kept."""
        return self.kept_model(trial_id).path

    def _end(self, trial_id: str, execution: int) -> KeptModel:
        """The state in which a run of a trial ended, for one that continues it."""
        return KeptModel(Path(self.get_trial_dir(trial_id)), f"end_{execution}")

    def _forget_end(self, trial_id: str) -> None:
        for execution in range(self.executions_per_trial):
            self._end(trial_id, execution).remove()

    def load_model(self, trial: keras_tuner.engine.trial.Trial) -> keras.Model:
        """The trained model of a trial, as it was at its best epoch.

        Raises:
            FileNotFoundError: If it is not kept; see `keep_models`.
            RuntimeError: If it cannot be loaded.
        """
        return self._loader(trial)()

    def _loader(self, trial: keras_tuner.engine.trial.Trial) -> Callable[[], keras.Model]:
        """`load_model` of a trial, without this object, which may hold much more."""
        hypermodel, hp, kept = self.hypermodel, trial.hyperparameters, self.kept_model(trial.trial_id)
        why_not = self.records.get(trial.trial_id, {}).get("why_not_keras", "")
        message = f"No model is kept of trial {self.number(trial)}; keep_models={self.keep_models}. {why_not}".rstrip()

        def load() -> keras.Model:
            if not kept.path.exists():
                raise FileNotFoundError(message)
            return kept.load(lambda: hypermodel.build(hp))

        return load

    def get_best_models(self, num_models: int = 1) -> list[keras.Model]:
        """The trained models of the best trials, best first; fewer, if fewer trials were completed.

        Raises:
            FileNotFoundError: If one of them is not kept; see `keep_models`.
        """
        best = self.oracle.get_best_trials(arguments.integer("num_models", num_models, 1))
        return [self.load_model(trial) for trial in best if trial.status == TrialStatus.COMPLETED]

    def trials(self) -> list[Trial]:
        """The finished trials in the order in which they were started."""
        return self._trials()

    def _trials(self, *, history: bool = True) -> list[Trial]:
        finished, order = set(self.oracle.end_order), enumerate(self.oracle.start_order)
        return [self._trial(number, trial_id, history) for number, trial_id in order if trial_id in finished]

    def _trial(self, number: int, trial_id: str, history: bool) -> Trial:
        trial, record = self.oracle.trials[trial_id], self.records[trial_id]
        completed = trial.status == TrialStatus.COMPLETED
        return Trial(
            number=number,
            values=self.hypermodel.point(trial.hyperparameters),
            score=float(trial.score) if completed else None,
            metrics=record["metrics"] if completed else {},
            epochs=record["epochs"],
            best_epoch=record["best_epoch"] if completed else None,
            seconds=record["seconds"],
            status="completed" if completed else "failed",
            message=record.get("message", ""),
            history=books.read_history(Path(self.get_trial_dir(trial_id))) if history else [],
        )

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
            first = f"; the first: {trials[0].reason}" if trials else ""
            raise RuntimeError(f"All {len(trials)} trials failed{first}") from self.first_error
        best = self.oracle.trials[self.oracle.start_order[order[0].number]]
        return Result(
            trials,
            self.hypermodel.space,
            objective.name,
            objective.direction,
            self.oracle.seed,
            Path(self.project_dir),
            self.model_path(best.trial_id),
            objectives=getattr(objective, "name_to_direction", None),
            load=self._loader(best),
            temporary=temporary,
        )

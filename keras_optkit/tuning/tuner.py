"""The search itself: `Tuner` runs the trials of a KerasTuner oracle."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import json
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.engine.trial import TrialStatus

from keras_optkit import arguments
from keras_optkit.tuning import books, logs
from keras_optkit.tuning.books import AtomicBooks, OtherSearchError, damaged, path_of
from keras_optkit.tuning.callbacks import Callbacks, Factory, of_search
from keras_optkit.tuning.data import check_ends, is_dataset
from keras_optkit.tuning.economy import Economy
from keras_optkit.tuning.folds import Folds
from keras_optkit.tuning.hypermodel import FIT_ARGUMENTS, HyperModel
from keras_optkit.tuning.outcome import Outcome
from keras_optkit.tuning.parallel import Course
from keras_optkit.tuning.shared import Shared
from keras_optkit.tuning.staff import Staff
from keras_optkit.tuning.training import PARENT, Ended, Job, Line, Training
from keras_optkit.tuning.trials import Trial, listed, ranked, shown

_PRINTING = threading.Lock()  # sys.stdout is one for all threads


class Tuner(Outcome, keras_tuner.Tuner, AtomicBooks):
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
        pruner: As in `search`; not with KerasTuner's `HyperbandOracle`, which promotes trials itself.
        time_limit: As in `search`.
        max_epochs: As in `search`.
        patience: As in `search`.
        workers: As in `search`.
        executor: As in `search`.
        trial_time_limit: As in `search`.
        trial_memory_limit: As in `search`.
        storage: As in `search`; `directory` is then where this process works, and must be of its own and new.
        lease: As in `search`.

    Raises:
        TypeError: If an argument has a wrong type.
        ImportError: If `storage` needs a package that is not installed.
        ValueError: If an argument has a wrong value, or if `directory` or `storage` holds another search.
        RuntimeError: If a file in `directory` is damaged, with its name.
        ConnectionError: If `storage` cannot be opened.

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
        self.economy = Economy(pruner, time_limit, max_epochs, patience)
        self.economy.check(oracle)
        self.staff = Staff(workers, executor, trial_time_limit, trial_memory_limit, storage is not None)
        self.staff.check(self.economy)
        if self.staff.is_active and type(self).run_trial is not Tuner.run_trial:
            raise ValueError(f"{self.staff.asked} must be left out where run_trial is another one, as in {type(self)}.")
        if storage is not None and isinstance(oracle, keras_tuner.oracles.HyperbandOracle):
            raise ValueError(f"storage must be None where the oracle is a HyperbandOracle, got {storage!r}.")
        told = {"space": hypermodel.space.get_config(), **(definition or {}), "pruner": self.economy.described}
        self.definition = json.loads(json.dumps(told))
        self.records: dict[str, dict[str, Any]] = {}  # what KerasTuner's trials have no place for, by trial
        self.live: dict[str, dict[int, int]] = {}  # the epochs of the runs of each trial that is running
        self._runs: dict[str, list[list[tuple[int, dict[str, float]]]]] = {}  # the epochs of its executions, likewise
        self._started: dict[str, float] = {}
        self._arrived: dict[str, Ended] = {}
        self.first_error: Exception | None = None
        self.folds: Folds | None = None  # of `search`
        self.whole: dict[str, Any] = {}  # its data, as arguments of fit
        self.trained: Training | None = None
        self.is_temporary = False  # whether the directory is deleted if the search is interrupted
        self._used: weakref.WeakSet[keras.callbacks.Callback] = weakref.WeakSet()
        oracle.verbose = 0
        books.keep_books_of(oracle)
        hypermodel.give_space_to(oracle)
        if overwrite:
            with books.locked(path):
                books.delete_search(path)
        self.shared = None if storage is None else Shared(storage, path, lease)
        with contextlib.nullcontext() if self.shared is None else self.shared.books(clear=overwrite):
            with _PRINTING, contextlib.redirect_stdout(io.StringIO()):  # KerasTuner prints whether it reloads
                # If it were given the hypermodel here, it would build a model to find the space, which is known.
                place = {"directory": str(path.parent), "project_name": path.name}
                sizes = {"executions_per_trial": executions_per_trial, "max_model_size": max_model_size}
                super().__init__(oracle, **place, **sizes)
            self.hypermodel = hypermodel
            if self.shared is not None:
                self.save()  # what is drawn, such as a seed, is that of the first process
        if self.log_dir is not None and not self.oracle.trials:
            logs.claim(self.log_dir, overwrite)

    # What is saved in the directory besides the oracle's own state

    def get_state(self) -> dict[str, Any]:
        """KerasTuner's hook for saving."""
        return {"definition": self.definition, "records": self.records, "economy": self.economy.get_state()}

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
        self.economy.set_state(state.get("economy", self.economy.get_state()))

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
        except OtherSearchError as error:
            if self.shared is None:
                raise
            raise OtherSearchError(self.shared.name, error.difference, "storage") from None
        except OSError:
            raise
        except Exception as error:  # JSON, but not what was written
            raise damaged(path, f"{type(error).__name__}: {error}") from error
        # A trial that KerasTuner had saved, but not yet noted as started, when the process ended.
        for trial_id in self.oracle.trials.keys() - set(self.oracle.start_order):
            del self.oracle.trials[trial_id]
        # One that was paused, which the oracle had not yet noted.
        interrupted = self.oracle.get_state()["retry_queue"]
        kept = (trial_id for trial_id in interrupted if not self._is_paused(trial_id))
        interrupted[:] = sorted(kept, key=self.oracle.start_order.index, reverse=True)  # the last comes first
        if self.shared is not None:
            held = self.shared.held()
            for trial_id in [each for each in interrupted if each in held]:
                interrupted.remove(trial_id)
                self.oracle.ongoing_trials[f"trial {trial_id}"] = self.oracle.trials[trial_id]

    @contextlib.contextmanager
    def open_books(self) -> Iterator[None]:
        """In the block the books are as all processes of the search have left them; then they are stored."""
        if self.shared is None:
            yield
            return
        with self.shared.books():
            self.reload()
            yield

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
        self.economy.check_fit(kwargs, space, self.oracle.objective.name, self.pauses)
        kwargs.setdefault("verbose", 1 if self.verbose == 2 and not self.staff.is_active else 0)
        with books.locked(Path(self.project_dir)):
            if self.shared is None and Path(self._get_tuner_fname()).exists():
                self.reload()  # another search may have run since this object was made
            with self.open_books():
                self.save()
            place = self.project_dir if self.shared is None else self.shared.name
            if self.records and self.verbose:
                print(f"Continuing the search in {place}: {len(self.oracle.end_order)} trials are finished.")
            self.trained = None if args else self.training(args, kwargs)
            try:
                self._search(args, kwargs)
            except KeyboardInterrupt as interrupt:
                if not self.is_temporary or self.shared is not None:
                    interrupt.add_note(f"The search is in {place!r}. Run the script again to continue it.")
                raise
            finally:
                if self.shared is not None:
                    self.shared.close()

    def _search(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs the trials, one after the other or several at a time."""
        if not self.economy.is_active and not self.staff.is_active:
            super().search(*args, **kwargs)
            return
        self.economy.begin()
        self.on_search_begin()
        if self.staff.is_active:
            with self.staff.crew(Path(self.project_dir), self.training(args, kwargs)) as crew:
                Course(self, crew).run()
        else:
            while (trial := self.economy.next_trial(self, self.tuner_id)) is not None:
                self.on_trial_begin(trial)
                self._try_run_and_update_trial(trial, *args, **kwargs)
                self.on_trial_end(trial)
        with self.open_books():
            self.on_search_end()
            self.save()
            if self.shared is not None:
                kept = self._kept(ranked(self._trials(history=False), self.oracle.objective.direction))
                self.shared.tidy(self.oracle.end_order, kept)
                self.shared.fetch_models(kept)

    def on_search_begin(self) -> None:
        """KerasTuner's hook before the first trial."""
        super().on_search_begin()
        self.oracle.verbose = 0  # KerasTuner takes `verbose` of `fit` for that of its own reports

    def on_search_end(self) -> None:
        """KerasTuner's hook after the last trial."""
        super().on_search_end()
        for trial_id in self.oracle.start_order:
            self._forget_end(trial_id)

    def on_trial_begin(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """KerasTuner's hook before a trial."""
        super().on_trial_begin(trial)
        self._started[trial.trial_id] = time.perf_counter()
        trial.metrics = type(trial.metrics)()  # without those of an attempt that was interrupted
        trial.message = None
        record = self.records[trial.trial_id] = self.economy.prepare(self, trial)
        saved = enumerate(record.get("runs", []))
        self.live[trial.trial_id] = {each: len(run["watch"]["history"]) for each, run in saved if "watch" in run}
        self.save()
        if self.verbose:
            number, total = self.number(trial), self.oracle.max_trials or "?"
            values = self.hypermodel.point(trial.hyperparameters)
            after = f" from epoch {record['rung_epochs'][-1] + 1}" if record.get("paused") else ""
            print(f"[{number + 1}/{total}] trial {number}{after}: {listed(values)}", flush=True)

    def on_trial_end(self, trial: keras_tuner.engine.trial.Trial, seconds: float | None = None) -> None:
        """KerasTuner's hook after a trial; `seconds` is how long it took, if that is known."""
        record, started = self.records[trial.trial_id], self._started.pop(trial.trial_id)
        took = time.perf_counter() - started if seconds is None else seconds
        record["seconds"] = record.get("seconds", 0.0) + took
        record["running"] = False
        self.live.pop(trial.trial_id)
        runs = self._runs.pop(trial.trial_id, [])
        trial.status = record.get("status", trial.status)  # a subclass may run its trials in its own way
        if trial.status != TrialStatus.COMPLETED:
            trial.metrics = type(trial.metrics)()  # without the placeholder that run_trial returned
        if trial.status in (TrialStatus.STOPPED, TrialStatus.RUNNING):
            self._note_epochs(trial, runs)
        books.write_history(Path(self.get_trial_dir(trial.trial_id)), runs)
        self.save()  # before the oracle notes that the trial has ended, which must not be without its record
        if trial.status == TrialStatus.RUNNING:
            self._pause(trial)
        else:
            super().on_trial_end(trial)
        if trial.status != TrialStatus.RUNNING and self.pauses:
            self.economy.forget(self, trial.trial_id)
        books.forget_done(Path(self.get_trial_dir(trial.trial_id)))
        self.economy.settle(self)
        trials = self._trials(history=False)
        order = ranked(trials, self.oracle.objective.direction)
        kept = self._kept(order)
        for trial_id in self.oracle.end_order:
            if trial_id not in kept:
                self.kept_model(trial_id).remove()
        if self.shared is not None:
            self.shared.tidy(self.oracle.end_order, kept)
        parent = trial.hyperparameters.values.get(PARENT)
        if parent is not None and trial.trial_id in self.oracle.end_order:
            self._forget_end(parent)  # nothing else continues it
        this = next((found for found in trials if found.number == self.number(trial)), None)
        if this is not None:
            self._report(this, order[0] if order else None, paused=trial.status == TrialStatus.RUNNING)

    def forget_attempt(self, trial_id: str) -> None:
        """Another process continues a trial that was trained here."""
        self.live.pop(trial_id, None)
        self._started.pop(trial_id, None)

    def _report(self, this: Trial, best: Trial | None, *, paused: bool) -> None:
        """Tells the pruner's study and the reader how a trial has ended."""
        self.economy.tell_judges(this.number, this.score, this.status)
        if not self.verbose:
            return
        outcome = f"failed: {this.message}"
        if this.status != "failed":
            outcome = f"{shown(this.score)} in epoch {this.best_epoch}" if this.score is not None else "has no value"
        if this.status == "pruned":
            outcome += f", paused after {this.epochs} epochs" if paused else f", pruned: {this.message}"
        best_so_far = f"; best so far {shown(best.score)} (trial {best.number})" if best else ""
        which = f"trial {this.number}: " if self.staff.is_active else ""
        print(f"    {which}{self.oracle.objective.name} {outcome}, {this.seconds:.1f} s{best_so_far}", flush=True)

    def _pause(self, trial: keras_tuner.engine.trial.Trial) -> None:
        """Has the oracle know that a trial is neither running nor over."""
        ongoing = self.oracle.ongoing_trials
        for tuner_id in [tuner_id for tuner_id, each in ongoing.items() if each.trial_id == trial.trial_id]:
            del ongoing[tuner_id]
        self.oracle.save()

    def _note_epochs(
        self, trial: keras_tuner.engine.trial.Trial, runs: list[list[tuple[int, dict[str, float]]]]
    ) -> None:
        """Has the oracle know the objective of each epoch of a trial that was not trained to its end."""
        name = self.oracle.objective.name
        found = [{epoch: metrics[name] for epoch, metrics in run if name in metrics} for run in runs]
        epochs = sorted(set.intersection(*map(set, found))) if found else []
        trial.metrics.register(name, self.oracle.objective.direction)
        for epoch in epochs:
            trial.metrics.update(name, float(np.mean([run[epoch] for run in found])), step=epoch)
        if epochs:  # once more, since this saves the trial
            value = trial.metrics.get_history(name)[-1].mean()
            self.oracle.update_trial(trial.trial_id, {name: value}, step=epochs[-1])

    def run_trial(self, trial: keras_tuner.engine.trial.Trial, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Builds and trains the model of a trial, `executions_per_trial` times; returns the mean score."""
        ended = self._arrived.pop(trial.trial_id, None)
        if ended is None:
            ended = self.training(args, kwargs).run(self.job(trial), _Direct(self, trial))
        record = self.records[trial.trial_id]
        why_not = ended.record.get("why_not_keras")
        if why_not and self.verbose and not any("why_not_keras" in each for each in self.records.values()):
            print(f"    The weights are kept, since the model cannot be a .keras file. {why_not}", flush=True)
        record.update(ended.record)
        self._runs[trial.trial_id] = ended.runs
        # If the exception were passed on, KerasTuner would print its traceback; on_trial_end reports the failure.
        self.first_error = self.first_error or ended.error
        trial.message = ended.message
        return ended.metrics

    def take(self, trial: keras_tuner.engine.trial.Trial, ended: Ended) -> None:
        """A trial has ended, or was paused, in another process."""
        self._arrived[trial.trial_id] = ended
        self._try_run_and_update_trial(trial)
        self.on_trial_end(trial, ended.seconds)

    def training(self, args: tuple[Any, ...], fit: Mapping[str, Any]) -> Training:
        """What all trials have in common, with arguments of `fit`."""
        return Training(
            self.hypermodel,
            self.oracle.objective,
            self.oracle.seed,
            self.executions_per_trial,
            self.max_model_size,
            [self.callbacks, of_search(fit.get("callbacks"))],
            args,
            {name: value for name, value in fit.items() if name != "callbacks"},
            Path(self.project_dir),
            self.log_dir,
            pauses=self.pauses,
            is_watched=self.economy.is_active or self.staff.is_active,
            asks=self.economy.is_active,
            folds=self.folds,
            every=None if self.shared is None else self.shared.lease,
            used=self._used,
        )

    def job(self, trial: keras_tuner.engine.trial.Trial) -> Job:
        """What a training is told of one trial."""
        return Job(
            trial.trial_id,
            self.number(trial),
            trial.hyperparameters,
            copy.deepcopy(self.records[trial.trial_id]),
            self.economy.target(self, trial),
            any(record["metrics"] for record in self.records.values()),
        )


class _Direct(Line):
    """The line between a search and a training in one process."""

    def __init__(self, tuner: Tuner, trial: keras_tuner.engine.trial.Trial) -> None:
        self._tuner = tuner
        self._trial = trial

    def begin(self, execution: int) -> None:
        self._tuner.economy.begin_run(self._tuner, self._tuner.number(self._trial), execution)

    def tell(self, execution: int, epochs: int, epoch: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        self._tuner.live[self._trial.trial_id][execution] = epochs

    def ask(self, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:
        return self._tuner.economy.verdict(self._tuner, self._tuner.number(self._trial), execution, epoch, metrics)

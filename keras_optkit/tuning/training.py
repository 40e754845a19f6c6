"""The trainings of one trial. They know nothing of the search, so that they can run in another process."""

from __future__ import annotations

import contextlib
import textwrap
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.errors import FailedTrialError, FatalError, FatalValueError

from keras_optkit.private import clear_session
from keras_optkit.space import Values
from keras_optkit.tuning import books, logs
from keras_optkit.tuning.best_epoch import BestEpoch, forget_frames, names_of, take, worst_of
from keras_optkit.tuning.callbacks import Copies, Factory
from keras_optkit.tuning.folds import Folds
from keras_optkit.tuning.hypermodel import HyperModel
from keras_optkit.tuning.models import KeptModel
from keras_optkit.tuning.oracle import TRAINING, stream
from keras_optkit.tuning.paused import Pausable, Stopper, in_known_order, quiet_about_order

RUNG = "a rung"  # the reason of a pause

#: What an oracle that promotes trials, as Hyperband does, adds to their values.
EPOCHS, INITIAL_EPOCH, PARENT = "tuner/epochs", "tuner/initial_epoch", "tuner/trial_id"

#: What of a trial's record the search writes, and not its training.
OF_SEARCH = ("running", "seconds", "judged", "killed")


def trial_directory(directory: Path, trial_id: str) -> Path:
    """Where KerasTuner keeps a trial."""
    return directory / f"trial_{trial_id}"


def run_name(trial_id: str, execution: int, executions: int) -> Path:
    """The directory of one run, below that of all logs."""
    name = Path(f"trial_{trial_id}")
    return name / f"execution_{execution}" if executions > 1 else name


def pausable(directory: Path, trial_id: str, execution: int) -> Pausable:
    """The run of a trial that can be paused."""
    return Pausable(trial_directory(directory, trial_id) / f"run_{execution}")


def end_of(directory: Path, trial_id: str, execution: int) -> KeptModel:
    """The state in which a run of a trial ended, for one that continues it."""
    return KeptModel(trial_directory(directory, trial_id), f"end_{execution}")


@dataclass
class Job:
    """A trial that is to be trained, or trained further.

    Attributes:
        trial_id: KerasTuner's name of it.
        number: 0 for the first trial that was started.
        hyperparameters: Its point.
        record: What the search knows of it.
        target: The epoch after which it is paused.
        others_have_it: Whether another trial had the objective.
        deadline: The time, as `time.time` counts it, at which its run ends with the epoch; only with an executor.
        epochs_left: After so many epochs its run ends; only with an executor.
    """

    trial_id: str
    number: int
    hyperparameters: keras_tuner.HyperParameters
    record: dict[str, Any]
    target: int | None = None
    others_have_it: bool = False
    deadline: float | None = None
    epochs_left: int | None = None


@dataclass
class Ended:
    """What a trial has come to.

    Attributes:
        record: What is new in its record.
        metrics: For the oracle.
        runs: The metrics of each epoch, of each execution.
        message: For the oracle, where it has failed.
        error: Why it has failed.
        seconds: How long it took; None: as long as the search has waited.
    """

    record: dict[str, Any]
    metrics: dict[str, float]
    runs: list[list[tuple[int, dict[str, float]]]] = field(default_factory=list)
    message: str | None = None
    error: Exception | None = None
    seconds: float | None = None


class Line:
    """What a training tells the search while it runs. This one tells nothing."""

    def begin(self, execution: int) -> None:
        """A run begins."""

    def tell(self, execution: int, epochs: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """An epoch, counted from 1, has ended; `epochs` were trained in this run."""

    def ask(self, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:  # noqa: ARG002
        """Why the run is to be ended after this epoch, or ""."""
        return ""

    def kept(self) -> None:
        """What an interrupted trial is continued with is in its directory, and is left as it is until this returns."""


@dataclass
class Training:
    """What all trials of a search have in common.

    Attributes:
        hypermodel: What to build.
        objective: What is best.
        seed: Of the search.
        executions: Runs per trial.
        max_model_size: As in `search`.
        callbacks: Make the callbacks of each run.
        fit: Arguments of `fit`.
        directory: Of the search.
        log_dir: As in `search`.
        pauses: Whether trials are paused at rungs.
        is_watched: Whether the search is told of each epoch.
        asks: Whether it is asked, too, whether to end the run.
        folds: With which rows each execution trains and validates; None: with those of `fit`.
        every: Seconds after which a run that is not paused writes a bundle, too; None: it does not.
        used: The callbacks of all runs so far.
    """

    hypermodel: HyperModel
    objective: keras_tuner.Objective
    seed: int
    executions: int
    max_model_size: int | None
    callbacks: list[Copies | Factory]
    args: tuple[Any, ...]
    fit: dict[str, Any]
    directory: Path
    log_dir: Path | None
    pauses: bool
    is_watched: bool
    asks: bool
    folds: Folds | None = None
    every: float | None = None
    used: weakref.WeakSet[keras.callbacks.Callback] = field(default_factory=weakref.WeakSet)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "used"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, used=weakref.WeakSet())

    def run(self, job: Job, line: Line) -> Ended:
        """Builds and trains the model of a trial, as often as it is to be.

        Raises:
            keras_tuner.errors.FatalError: What ends the search. All other errors make a failed trial.
        """
        record = job.record
        record["status"], record["epochs"] = TrialStatus.COMPLETED, 0
        found: list[dict[str, float]] = []
        best_epochs: list[int | None] = []
        runs: list[list[tuple[int, dict[str, float]]]] = []
        reasons: list[str] = []
        try:
            for execution in range(self.executions):
                best = self._best_of_others(record, execution, found)
                watch = BestEpoch(self.objective, lambda model: self._keep(job, model), best, self.max_model_size)
                try:
                    reasons.append(self._run(job, execution, watch, line))
                finally:
                    record["epochs"] += watch.epochs
                    runs.append(watch.history)
                if watch.score is not None and (best is None or self.objective.better_than(watch.score, best)):
                    record["best_epoch"] = watch.best_epoch
                found.append(watch.metrics)
                best_epochs.append(watch.best_epoch)
                if reasons[-1] not in ("", RUNG):
                    break
        except FatalError:
            raise
        except Exception as error:
            return self._failed(job, runs, error)
        common = set.intersection(*map(set, found))
        means = {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0] if name in common}
        record["metrics"], record["score"] = means, means.get(self.objective.name)
        name = self.objective.name
        record["scores"] = [metrics[name] for metrics in found if name in metrics]
        record["best_epochs"] = [epoch for epoch in best_epochs if epoch is not None]
        metrics = worst_of(self.objective)
        if any(reasons):
            self._stopped(record, [reason for reason in reasons if reason][-1])
        else:
            metrics = {name: means[name] for name in {self.objective.name, *names_of(self.objective)}}
        return Ended(self._changes(record), metrics, runs)

    @staticmethod
    def _changes(record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in record.items() if name not in OF_SEARCH}

    def _failed(self, job: Job, runs: list[list[tuple[int, dict[str, float]]]], error: Exception) -> Ended:
        kind = "" if isinstance(error, FailedTrialError) else f"{type(error).__name__}: "
        job.record["message"] = textwrap.shorten(f"{kind}{error}", 500)
        job.record["status"] = TrialStatus.FAILED if isinstance(error, FailedTrialError) else TrialStatus.INVALID
        values = self.hypermodel.point(job.hyperparameters)
        message = f"Failed with {dict(values)}.\n{traceback.format_exc()}"
        forget_frames(error)
        return Ended(self._changes(job.record), worst_of(self.objective), runs, message, error)

    def _best_of_others(self, record: Mapping[str, Any], execution: int, found: list[dict[str, float]]) -> float | None:
        """The best score of the other runs of a trial so far, one of which the kept model is from."""
        name = self.objective.name
        later = [run.get("watch", {"metrics": {}})["metrics"] for run in record.get("runs", [])[execution + 1 :]]
        scores = [metrics[name] for metrics in [*found, *later] if name in metrics]
        return (max if self.objective.direction == "max" else min)(scores, default=None)

    @staticmethod
    def _stopped(record: dict[str, Any], reason: str) -> None:
        """Notes that a trial was paused, or stopped for good."""
        if reason == RUNG:
            record["status"], record["paused"] = TrialStatus.RUNNING, True
            record["rungs"].append(record["score"])
            record["rung_epochs"].append(max(run["watch"]["history"][-1][0] for run in record["runs"]))
        else:
            record["status"], record["message"] = TrialStatus.STOPPED, reason

    def _keep(self, job: Job, model: keras.Model) -> None:
        """Keeps the model of a trial."""
        if why_not := KeptModel(trial_directory(self.directory, job.trial_id)).save(model):
            job.record["why_not_keras"] = why_not

    def _run(self, job: Job, execution: int, watch: BestEpoch, line: Line) -> str:
        """One execution, unless it had ended before the trial was interrupted; returns as `_train`."""
        trial, rung = trial_directory(self.directory, job.trial_id), len(job.record.get("rungs", []))
        done = books.read_done(trial, execution) if execution + 1 < self.executions else None
        if done is not None and done["rung"] == rung:
            return self._as_noted(job, execution, watch, line, done)
        reason = self._train(job, execution, watch, line)
        if execution + 1 < self.executions and reason in ("", RUNG):
            saved = job.record["runs"][execution] if self.pauses else {}
            state = {"rung": rung, "reason": reason, "watch": watch.get_state(), "saved": saved}
            books.write_done(trial, execution, state)
            if self.every is not None:
                line.kept()
        return reason

    def _as_noted(self, job: Job, execution: int, watch: BestEpoch, line: Line, done: dict[str, Any]) -> str:
        """Takes over an execution, and tells the search what it was told then."""
        known = 0
        if self.pauses:
            saved = job.record["runs"][execution]
            known = len(saved["watch"]["history"]) if "watch" in saved else 0
            saved.update(done["saved"])
        watch.set_state(done["watch"])
        if len(watch.history) == known:  # its run was over at an earlier rung
            return str(done["reason"])
        line.begin(execution)
        for number, (epoch, metrics) in enumerate(watch.history[known:], known + 1):
            line.tell(execution, number, epoch, metrics)
            line.ask(execution, epoch, metrics)  # the answer was to continue; Optuna's pruners remember the question
        return str(done["reason"])

    def _train(self, job: Job, execution: int, watch: BestEpoch, line: Line) -> str:
        """Trains a model; returns why the run was stopped, or "" if it ended by itself."""
        saved: dict[str, Any] = {}
        known = 0
        if self.pauses:
            saved = job.record["runs"][execution]
            known = len(saved["watch"]["history"]) if "watch" in saved else 0
            reached = None if self.every is None else self._reached(job, execution)
            saved.update(reached or {})
            if "watch" in saved:
                watch.set_state(saved["watch"])
            if saved.get("over"):  # it has stopped by itself, and another run of the trial has not
                return ""
        clear_session()  # frees the last model, too: it collects garbage
        line.begin(execution)
        for number, (epoch, metrics) in enumerate(watch.history[known:], known + 1):
            line.tell(execution, number, epoch, metrics)
        seed = stream(self.seed, TRAINING, job.number, execution).generate_state(2)
        keras.utils.set_random_seed(int(seed[0]))
        fit, hp = dict(self.fit), job.hyperparameters
        if self.folds is not None:
            fit = self.folds.of(execution, fit)
        values, rounds = self.hypermodel.point(hp), hp.values
        with self._session(job.trial_id, execution, values, continued="bundle" in saved) as (directory, session):
            model = self.hypermodel.build(hp)
            watch.check_size(model)
            run = run_name(job.trial_id, execution, self.executions)
            callbacks = self._new([each for make in self.callbacks for each in make(values, directory, run)])
            watch.patient = bool(callbacks)
            if directory is not None:
                callbacks.append(keras.callbacks.TensorBoard(directory, write_graph=False))
            if EPOCHS in rounds:
                if "epochs" in values:
                    raise FatalValueError("epochs must not be a parameter of the space where the oracle sets them.")
                fit.update(epochs=rounds[EPOCHS], initial_epoch=rounds[INITIAL_EPOCH])
            if PARENT in rounds:
                end_of(self.directory, rounds[PARENT], execution).load_into(model)
            watch.set_model(model)
            stopper = self._stopper(job, execution, watch, line)
            callbacks += [watch, stopper] if self.is_watched else [watch]
            if self.pauses:
                fit = in_known_order(fit, values.get("batch_size", fit.get("batch_size")), int(seed[1]))
                paused = pausable(self.directory, job.trial_id, execution)
                note = None if self.every is None else self._noting(job, execution, watch, line)
                callbacks.append(paused.callback(saved.get("bundle"), fit, self.every, note))
            with quiet_about_order() if self.pauses else contextlib.nullcontext():
                returned = self.hypermodel.fit(hp, model, *self.args, **fit, callbacks=callbacks)
            if not stopper.reason:
                take(returned, watch, job.others_have_it)
            if EPOCHS in rounds:
                end_of(self.directory, job.trial_id, execution).save_weights(model)
            if stopper.reason == RUNG:
                saved["bundle"] = paused.pause()
            if self.pauses:
                saved.update(watch=watch.get_state(), over=not stopper.reason)
            if session is not None and stopper.reason == RUNG:
                session.is_open = True
            elif session is not None and watch.best_epoch is not None:
                for name in names_of(watch.objective):
                    session.metric(f"best_{name}", watch.metrics[name], watch.best_epoch - 1)
        return stopper.reason

    def _reached(self, job: Job, execution: int) -> dict[str, Any] | None:
        """What an execution is continued with that was interrupted since the last pause."""
        note = books.read_reached(trial_directory(self.directory, job.trial_id), execution)
        if note is None or note["rung"] != len(job.record.get("rungs", [])):
            return None
        saved: dict[str, Any] = note["saved"]
        return saved

    def _noting(self, job: Job, execution: int, watch: BestEpoch, line: Line) -> Callable[[str], None]:
        """Notes each bundle, with what was seen until then, and tells the search from time to time."""
        assert self.every is not None
        trial, rung, every, told = (
            trial_directory(self.directory, job.trial_id),
            len(job.record.get("rungs", [])),
            self.every,
            time.monotonic(),
        )

        def note(bundle: str) -> None:
            nonlocal told
            saved = {"bundle": bundle, "watch": watch.get_state()}
            books.write_reached(trial, execution, {"rung": rung, "saved": saved})
            if time.monotonic() - told >= 0.9 * every:
                line.kept()
                told = time.monotonic()

        return note

    @staticmethod
    def _stopper(job: Job, execution: int, watch: BestEpoch, line: Line) -> Stopper:
        """What ends the run at its rung, or where the search says so."""

        def tell(epoch: int) -> None:
            line.tell(execution, watch.epochs, epoch, watch.history[-1][1])

        def rung(epoch: int) -> str:
            return RUNG if job.target is not None and epoch >= job.target else ""

        def asked(epoch: int) -> str:
            return line.ask(execution, epoch, watch.history[-1][1])

        return Stopper([rung, asked], tell)

    def _new(self, callbacks: list[Any]) -> list[Any]:
        """Raises if one of the callbacks was in another run."""
        for callback in callbacks:
            if callback in self.used:
                raise FatalValueError(f"callbacks must return new callbacks for every trial, got {callback!r} again.")
        self.used.update(callbacks)
        return callbacks

    @contextlib.contextmanager
    def _session(
        self, trial_id: str, execution: int, values: Values, *, continued: bool
    ) -> Iterator[tuple[Path | None, logs.Session | None]]:
        """The log directory of one run and what takes the metrics of its HParams."""
        if self.log_dir is None:
            yield None, None
            return
        directory = self.log_dir / run_name(trial_id, execution, self.executions)
        # TensorBoard merges equal names, so those of two searches must differ; and it cuts off long ones at the end.
        group = f"trial_{trial_id} ({self.log_dir.name} in {self.log_dir.parent})"
        here = continued and directory.exists()  # or it was begun on another machine
        with logs.hparams_session(directory, group, values, continued=here) as session:
            yield directory, session

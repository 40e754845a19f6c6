"""The course of a search whose trials are trained by others: who is sent what, and what becomes of it."""

from __future__ import annotations

import copy
import itertools
import time
from typing import TYPE_CHECKING, Any

from keras_tuner.engine.trial import TrialStatus

from keras_optkit.tuning import logs
from keras_optkit.tuning.best_epoch import worst_of
from keras_optkit.tuning.economy import WAIT
from keras_optkit.tuning.training import Ended, run_name
from keras_optkit.tuning.trials import shown
from keras_optkit.tuning.workers import Crew, Event

if TYPE_CHECKING:
    from keras_optkit.tuning.tuner import Tuner

#: How often a trial is begun again whose process was ended from outside.
_AGAIN = 1

_TICK = 0.1  # seconds


class Course:
    """Runs the trials of a tuner with a crew.

    Trials are started in the order of their numbers, and the oracle alone says what is next, so that points that do not
    depend on scores are those of a search with one worker.

    Args:
        tuner: Of the search.
        crew: What trains the trials.
    """

    def __init__(self, tuner: Tuner, crew: Crew) -> None:
        self._tuner = tuner
        self._crew = crew
        self._running: dict[str, Any] = {}  # KerasTuner's trials
        self._slots: dict[str, str] = {}  # the name by which the oracle knows who runs a trial
        self._runs: dict[str, list[list[tuple[int, dict[str, float]]]]] = {}

    def run(self) -> None:
        """Runs all trials.

        Raises:
            Exception: What has ended the search.
        """
        shared = self._tuner.shared
        is_over = waits = False
        while True:
            while not (is_over or waits) and len(self._running) < self._crew.size:
                trial = self._next()
                is_over, waits = trial is None, trial is WAIT
                if not (is_over or waits):
                    self._submit(trial)
            if self._running:
                for event in self._crew.events():
                    self._take(event)
                    waits = False
            elif is_over or shared is None:
                return
            else:
                time.sleep(_TICK)  # for the trials of others, which may have to be continued here
            if shared is None:
                waits = False
                continue
            for trial_id in shared.lost() & self._running.keys():
                self._crew.stop(trial_id)
                self._drop(trial_id)
                waits = False
            waits = waits and not shared.news()

    def _next(self) -> Any:
        """The next trial, which begins; None if the search ends; `WAIT`."""
        tuner = self._tuner
        with tuner.open_books():
            free = (f"worker{i}" for i in itertools.count())
            slot = next(each for each in free if each not in self._slots.values())
            trial = tuner.economy.next_trial(tuner, slot, self._running or tuner.oracle.ongoing_trials)
            if trial is None or trial is WAIT:
                return trial
            tuner.on_trial_begin(trial)
            if tuner.shared is not None:
                tuner.shared.claim(trial.trial_id)
        self._running[trial.trial_id], self._slots[trial.trial_id] = trial, slot
        return trial

    def _submit(self, trial: Any) -> None:
        record, job = self._tuner.records[trial.trial_id], self._tuner.job(trial)
        saved = enumerate(record.get("runs", []))
        self._tuner.live[trial.trial_id] = {i: len(run["watch"]["history"]) for i, run in saved if "watch" in run}
        self._runs[trial.trial_id] = [copy.copy(run["watch"]["history"]) for run in record.get("runs", []) if run]
        self._tuner.economy.limit(self._tuner, job)
        self._crew.submit(job, record.get("seconds", 0.0))

    def _take(self, event: Event) -> None:
        trial, number = self._running[event.trial_id], self._tuner.number(self._running[event.trial_id])
        match event.kind, event.content:
            case "begin", (execution,):
                self._tuner.economy.begin_run(self._tuner, number, execution)
            case "tell", (execution, epochs, epoch, metrics):
                self._told(event.trial_id, execution, epochs, epoch, metrics)
            case "ask", (execution, epoch, metrics):
                reason = self._tuner.economy.verdict(self._tuner, number, execution, epoch, metrics)
                self._crew.answer(event.trial_id, reason)
            case "kept", ():
                if self._tuner.shared is not None:
                    self._tuner.shared.store(event.trial_id)
                self._crew.answer(event.trial_id, "")
            case "ended", (ended,):
                self._end(event.trial_id, ended)
            case "fatal", (error,):
                raise error
            case "died", (reason, seconds, is_its_own):
                self._died(trial, reason, seconds, is_its_own)

    def _told(self, trial_id: str, execution: int, epochs: int, epoch: int, metrics: dict[str, float]) -> None:
        self._tuner.live[trial_id][execution] = epochs
        runs = self._runs[trial_id]
        runs += [[] for _ in range(execution + 1 - len(runs))]
        runs[execution].append((epoch, metrics))
        if self._tuner.verbose == 2:
            run = f", run {execution}" if self._tuner.executions_per_trial > 1 else ""
            values = ", ".join(f"{name} {shown(value)}" for name, value in metrics.items())
            number = self._tuner.number(self._running[trial_id])
            print(f"    trial {number}{run}, epoch {epoch}: {values}", flush=True)

    def _end(self, trial_id: str, ended: Ended) -> None:
        """Takes the outcome of a trial, unless another process has its lease."""
        tuner = self._tuner
        with tuner.open_books():
            is_ours = tuner.shared is None or tuner.shared.is_ours(trial_id)
            if is_ours:
                del self._running[trial_id], self._slots[trial_id], self._runs[trial_id]
                tuner.take(tuner.oracle.trials[trial_id], ended)
                if tuner.shared is not None:
                    tuner.shared.end(trial_id)
        if not is_ours:
            self._drop(trial_id)

    def _drop(self, trial_id: str) -> None:
        """Forgets a trial that another process continues."""
        number = self._tuner.number(self._running[trial_id])
        del self._running[trial_id], self._slots[trial_id], self._runs[trial_id]
        self._tuner.forget_attempt(trial_id)
        if self._tuner.verbose:
            print(f"    trial {number} is continued by another process, which has its lease", flush=True)

    def _died(self, trial: Any, reason: str, seconds: float, is_its_own: bool) -> None:
        """Of a trial whose process has ended."""
        with self._tuner.open_books():
            record = self._tuner.records[trial.trial_id]
            begins_again = not is_its_own and record.get("killed", 0) < _AGAIN
            if begins_again:
                record["killed"] = record.get("killed", 0) + 1
                self._tuner.save()
        if begins_again:
            if self._tuner.verbose:
                print(f"    trial {self._tuner.number(trial)} begins again. {reason}", flush=True)
            self._submit(trial)
            return
        objective, runs = self._tuner.oracle.objective, self._runs[trial.trial_id]
        again = f" This has happened {record['killed'] + 1} times." if not is_its_own else ""
        values = dict(self._tuner.hypermodel.point(trial.hyperparameters))
        news = {
            "status": TrialStatus.FAILED,
            "epochs": sum(self._tuner.live[trial.trial_id].values()),
            "message": reason + again,
        }
        if self._tuner.log_dir is not None:
            for execution in range(len(runs)):
                logs.failed(self._tuner.log_dir / run_name(trial.trial_id, execution, self._tuner.executions_per_trial))
        message = f"Failed with {values}.\n{news['message']}"
        error = RuntimeError(message)
        self._end(trial.trial_id, Ended(news, worst_of(objective), runs, message, error, seconds))

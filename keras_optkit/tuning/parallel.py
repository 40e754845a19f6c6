"""The course of a search whose trials are trained by others: who is sent what, and what becomes of it."""

from __future__ import annotations

import copy
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
        free = [f"worker{i}" for i in reversed(range(self._crew.size))]
        is_over = False
        while True:
            while not is_over and len(self._running) < self._crew.size:
                slot = next(each for each in reversed(free) if each not in self._slots.values())
                trial = self._tuner.economy.next_trial(self._tuner, slot, self._running)
                if trial is WAIT:
                    break
                if trial is None:
                    is_over = True
                else:
                    self._tuner.on_trial_begin(trial)
                    self._running[trial.trial_id], self._slots[trial.trial_id] = trial, slot
                    self._submit(trial)
            if not self._running:
                return
            for event in self._crew.events():
                self._take(event)

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
            case "ended", (ended,):
                self._end(trial, ended)
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

    def _end(self, trial: Any, ended: Ended) -> None:
        del self._running[trial.trial_id], self._slots[trial.trial_id], self._runs[trial.trial_id]
        self._tuner.take(trial, ended)

    def _died(self, trial: Any, reason: str, seconds: float, is_its_own: bool) -> None:
        """Of a trial whose process has ended."""
        record = self._tuner.records[trial.trial_id]
        if not is_its_own and record.get("killed", 0) < _AGAIN:
            record["killed"] = record.get("killed", 0) + 1
            self._tuner.save()
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
        self._end(trial, Ended(news, worst_of(objective), runs, message, error, seconds))

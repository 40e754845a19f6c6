"""What a search saves: trials that are stopped or paused, and a search that ends where its budget does."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras_tuner
from keras_tuner.engine.trial import TrialStatus

from keras_optkit import arguments
from keras_optkit.tuning import books, logs
from keras_optkit.tuning.epoch_pruners import Judge, pruner_of
from keras_optkit.tuning.paused import can_be_continued
from keras_optkit.tuning.pruners import RungPruner, Standing
from keras_optkit.tuning.training import Job, pausable, run_name

if TYPE_CHECKING:
    from keras_optkit.tuning.tuner import Tuner

WAIT = "wait"  # instead of a trial: there is none before one of those that are running has ended


class Economy:
    """The pruner and the budgets of a search.

    Args:
        pruner: As in `search`.
        time_limit: As in `search`.
        max_epochs: As in `search`.
        patience: As in `search`.
    """

    def __init__(self, pruner: Any, time_limit: float | None, max_epochs: int | None, patience: int | None) -> None:
        self.pruner = pruner_of(pruner)
        self.time_limit = arguments.real("time_limit", time_limit, 0, closed="right", optional=True)
        self.max_epochs = arguments.integer("max_epochs", max_epochs, 1, optional=True)
        self.patience = arguments.integer("patience", patience, 1, optional=True)
        self.rungs: RungPruner | None = self.pruner if isinstance(self.pruner, RungPruner) else None
        self.is_active = any(each is not None for each in (self.pruner, time_limit, max_epochs, patience))
        self._seconds = 0.0  # of earlier processes
        self._began: float | None = None
        self._exhausted = False
        self._said = False
        self._top = 1
        self._epochs = 1
        self._judges: dict[int, Judge] = {}

    @property
    def described(self) -> str | None:
        """The pruner, to see whether a search that is continued has the same."""
        known = self.pruner is None or self.rungs is not None
        return (None if self.pruner is None else repr(self.pruner)) if known else type(self.pruner).__name__

    def check(self, oracle: keras_tuner.Oracle) -> None:
        """Raises if the pruner cannot be used with an oracle.

        Raises:
            ValueError: If there are several objectives, or if the oracle promotes trials itself.
        """
        if self.pruner is not None and hasattr(oracle.objective, "name_to_direction"):
            names = list(oracle.objective.name_to_direction)
            raise ValueError(f"pruner must be None where there are several objectives, got {names!r}.")
        if self.pruner is not None and isinstance(oracle, keras_tuner.oracles.HyperbandOracle):
            raise ValueError("pruner must be None where the oracle promotes trials itself, as HyperbandOracle does.")

    def check_fit(self, fit: Mapping[str, Any], space: Mapping[str, Any], objective: str, pauses: bool) -> None:
        """Raises if a pruner that pauses trials cannot be used with arguments of `fit`.

        Args:
            fit: The arguments.
            space: The space.
            objective: The name of the objective.
            pauses: Whether trials may be continued, by a pruner or by others.

        Raises:
            ValueError: If the epochs are in the space, or do not begin at 0, or if `min_epochs` are more, or come
                before the first validation.
        """
        if self.rungs is not None:
            self._check_rungs(self.rungs, fit, space, objective)
        if pauses and not can_be_continued(fit):
            x = type(fit.get("x")).__name__ + " with steps_per_epoch" * bool(fit.get("steps_per_epoch"))
            warnings.warn(
                f"The order of the data after a pause may be another one, since it is not known where x is {x}. For "
                "trials that continue exactly, give arrays without steps_per_epoch, or a keras_optkit.data.Shuffled or "
                "PerEpoch.",
                stacklevel=4,
            )

    def _check_rungs(self, rungs: RungPruner, fit: Mapping[str, Any], space: Mapping[str, Any], objective: str) -> None:
        kind = type(rungs).__name__
        if "epochs" in space:
            raise ValueError(f"epochs must not be a parameter of the space where pruner is {kind}, which sets them.")
        if fit.get("initial_epoch", 0):
            raise ValueError(f"initial_epoch must be 0 where pruner is {kind}, got {fit['initial_epoch']!r}.")
        self._epochs = fit.get("epochs", 1)
        rungs.rungs(self._epochs)  # raises where there are too few epochs
        frequency = fit.get("validation_freq") or 1
        first = frequency if isinstance(frequency, int) else min(frequency)
        if objective.startswith("val_") and rungs.min_epochs < first:
            raise ValueError(
                f"min_epochs must be at least {first}, since trials have no {objective} before the first validation "
                f"(validation_freq={frequency!r}), got {rungs.min_epochs}."
            )

    # What is saved

    def get_state(self) -> dict[str, Any]:
        """What a search is continued with."""
        return {"seconds": self.seconds, "top": self._top}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues a search."""
        self._seconds, self._top = max(state["seconds"], self.seconds), state["top"]  # others may not be as far
        self._began = None if self._began is None else time.perf_counter()
        self._judges = {}

    @property
    def seconds(self) -> float:
        """How long the search has run, in all processes."""
        return self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)

    def begin(self) -> None:
        """The search begins, or is continued."""
        self._began, self._exhausted, self._said = time.perf_counter(), False, False

    # Budgets

    def _used(self, tuner: Tuner) -> int:
        """The epochs of all trials, including those that are running."""
        live = tuner.live
        return sum(sum(live[each].values()) if each in live else r["epochs"] for each, r in tuner.records.items())

    def spent(self, epochs: int) -> str:
        """Which budget is used up after so many epochs, or ""."""
        if self.time_limit is not None and self.seconds >= self.time_limit:
            return f"time_limit={self.time_limit:g} is used up"
        if self.max_epochs is not None and epochs >= self.max_epochs:
            return f"max_epochs={self.max_epochs} is used up"
        return ""

    def _without_improvement(self, tuner: Tuner) -> int:
        """How many trials have ended since the best one."""
        best, count = None, 0
        for trial_id in tuner.oracle.end_order:
            trial = tuner.oracle.trials[trial_id]
            better = trial.status == TrialStatus.COMPLETED and (
                best is None or tuner.oracle.objective.better_than(trial.score, best)
            )
            best, count = (trial.score, 0) if better else (best, count + (best is not None))
        return count

    def ends(self, tuner: Tuner) -> str:
        """Why the search is to end now, or ""."""
        if reason := self.spent(self._used(tuner)):
            return reason
        if self.patience is not None and self._without_improvement(tuner) >= self.patience:
            return f"no improvement for patience={self.patience} trials"
        return ""

    # The next trial

    def next_trial(self, tuner: Tuner, tuner_id: str, running: Collection[str] = ()) -> Any:
        """The trial to run now; None if the search ends; `WAIT`.

        Args:
            tuner: Of the search.
            tuner_id: Who asks.
            running: The trials that others are running.
        """
        oracle = tuner.oracle
        while True:
            if reason := self.ends(tuner):
                if tuner.verbose and not self._said:
                    print(f"The search ends: {reason}.", flush=True)
                self._said = True
                return None
            interrupted = oracle.get_state()["retry_queue"]
            if self.rungs is not None and not interrupted:
                number = self.rungs.promoted(self._standings(tuner), self._epochs, self._top, self._left(oracle))
                if number is not None:
                    trial = oracle.trials[oracle.start_order[number]]
                    oracle.ongoing_trials[tuner_id] = trial
                    oracle.save()
                    return trial
            trial = oracle.create_trial(tuner_id)
            if trial.status == TrialStatus.STOPPED:
                if self.rungs is not None and not self._exhausted:
                    self._exhausted = True
                    continue
                if running:
                    return WAIT
                if self.rungs is not None:
                    self._end(tuner, [i for i, s in enumerate(self._standings(tuner)) if s.paused])
                return None
            if trial.status != TrialStatus.IDLE:
                return trial
            if running:
                return WAIT

    def _left(self, oracle: keras_tuner.Oracle) -> int | None:
        return 0 if self._exhausted else oracle.remaining_trials()

    def _standings(self, tuner: Tuner, *, curves: bool = False) -> list[Standing]:
        """What the pruner knows of all trials."""
        return [self._standing(tuner, number, curves) for number in range(len(tuner.oracle.start_order))]

    def _standing(self, tuner: Tuner, number: int, curves: bool) -> Standing:
        oracle = tuner.oracle
        trial_id = oracle.start_order[number]
        record, trial = tuner.records.get(trial_id, {}), oracle.trials[trial_id]
        sign = -1 if oracle.objective.direction == "max" else 1

        def cost(score: float | None) -> float:
            return sign * score if score is not None and math.isfinite(score) else math.inf

        costs = [cost(score) for score in record.get("rungs", [])]
        ended = trial_id in oracle.end_order
        rungs = 0 if self.rungs is None else len(self.rungs.rungs(self._epochs, number))
        if ended and trial.status == TrialStatus.COMPLETED:
            costs += [cost(trial.score)] * (rungs - len(costs))  # it may have stopped by itself, between two rungs
        elif ended and trial.status != TrialStatus.STOPPED:
            costs.append(math.inf)
        curve: dict[int, float] = {}
        if curves:
            runs = books.read_history(Path(tuner.get_trial_dir(trial_id)))
            found = [
                dict(zip(run["epochs"], run["metrics"].get(oracle.objective.name, []), strict=False)) for run in runs
            ]
            for epoch in set.intersection(*map(set, found)) if found else ():
                values = [cost(each[epoch]) for each in found]
                if all(map(math.isfinite, values)):
                    curve[epoch] = sum(values) / len(values)
        is_paused = not ended and bool(record.get("paused")) and not record["running"]
        return Standing(tuple(costs), is_paused, curve, running=not ended and not is_paused)

    def settle(self, tuner: Tuner) -> None:
        """After a trial has ended or was paused: ends those that cannot be promoted any more."""
        if self.rungs is None:
            return
        standings = self._standings(tuner, curves=True)
        self._top = self.rungs.grown(self._top, standings, self._epochs)
        self._end(tuner, self.rungs.hopeless(standings, self._epochs, self._top, self._left(tuner.oracle)))

    def _end(self, tuner: Tuner, numbers: list[int]) -> None:
        """Ends paused trials."""
        for number in numbers:
            trial_id = tuner.oracle.start_order[number]
            trial, record = tuner.oracle.trials[trial_id], tuner.records[trial_id]
            trial.status = TrialStatus.STOPPED
            record["message"] = f"not promoted after {record['rung_epochs'][-1]} epochs"
            tuner.save()
            tuner.oracle.end_trial(trial)
            self.end_logs(tuner, trial_id)
            self.forget(tuner, trial_id)
        if numbers:
            tuner.save()

    # One trial

    def prepare(self, tuner: Tuner, trial: Any) -> dict[str, Any]:
        """The record of a trial that begins, or that is continued."""
        record = tuner.records.get(trial.trial_id)
        if record is None or not record.get("paused"):
            record = {"epochs": 0, "best_epoch": None, "metrics": {}}
            if tuner.pauses:
                record |= {"rungs": [], "rung_epochs": [], "runs": [{} for _ in range(tuner.executions_per_trial)]}
                record["seconds"] = 0.0
        record["running"] = True
        return record

    def forget(self, tuner: Tuner, trial_id: str) -> None:
        """Deletes the bundles of a trial that has ended."""
        for execution in range(tuner.executions_per_trial):
            pausable(Path(tuner.project_dir), trial_id, execution).forget()
        tuner.records[trial_id].pop("runs", None)  # which are large

    def end_logs(self, tuner: Tuner, trial_id: str) -> None:
        """Notes in the logs that the runs of a paused trial have ended."""
        if tuner.log_dir is None:
            return
        name = tuner.oracle.objective.name
        for execution, run in enumerate(tuner.records[trial_id]["runs"]):
            watched = run["watch"]
            with logs.ending(tuner.log_dir / run_name(trial_id, execution, tuner.executions_per_trial)) as metric:
                if watched["best_epoch"] is not None:
                    metric(f"best_{name}", watched["metrics"][name], watched["best_epoch"] - 1)

    def target(self, tuner: Tuner, trial: Any) -> int | None:
        """The epoch after which a trial that begins now, or is continued, is paused; None: it is not."""
        if self.rungs is None:
            return None
        reached = tuner.records[trial.trial_id]["rungs"]
        return self.rungs.rungs(self._epochs, tuner.number(trial))[len(reached)]

    def limit(self, tuner: Tuner, job: Job) -> None:
        """Writes what is left of the budgets into a job that cannot ask for it while it runs."""
        if self.time_limit is not None:
            job.deadline = time.time() + self.time_limit - self.seconds
        if self.max_epochs is not None:
            own = sum(tuner.live.get(job.trial_id, {}).values())
            job.epochs_left = self.max_epochs - self._used(tuner) + own

    def begin_run(self, tuner: Tuner, number: int, execution: int) -> None:
        """A run of a trial begins, which Optuna's pruner will judge."""
        if self.pruner is not None and self.rungs is None:
            self._judge(tuner, execution).begin(number)
            tuner.records[tuner.oracle.start_order[number]]["judged"] = execution + 1

    def verdict(self, tuner: Tuner, number: int, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:
        """Why the run of a trial is to be ended after an epoch, or ""."""
        value: Any = metrics.get(tuner.oracle.objective.name)
        judged = self.pruner is not None and self.rungs is None and value is not None
        if judged and self._judge(tuner, execution).stops(number, epoch, value):
            return f"stopped by {type(self.pruner).__name__} after epoch {epoch}"
        spent = self.spent(self._used(tuner))
        return f"{spent} after epoch {epoch}" if spent else ""

    def _judge(self, tuner: Tuner, execution: int) -> Judge:
        """The judge of runs with this number, which knows all that have ended."""
        if execution not in self._judges:
            oracle = tuner.oracle
            judge = self._judges[execution] = Judge(self.pruner, oracle.objective.direction, oracle.seed)
            ended = {trial.number: trial for trial in tuner.trials()}
            numbers = [oracle.start_order.index(trial_id) for trial_id in oracle.end_order]
            known = [ended[number] for number in numbers if self._judged(tuner, number) > execution]
            runs = [(t.history[execution] if t.history else None, t.score, t.status) for t in known]
            judge.replay(runs, oracle.objective.name)
        return self._judges[execution]

    @staticmethod
    def _judged(tuner: Tuner, number: int) -> int:
        """How many runs of a trial were judged."""
        return int(tuner.records[tuner.oracle.start_order[number]].get("judged", 0))

    def tell_judges(self, number: int, score: float | None, status: str) -> None:
        """How the trial has ended whose runs were judged."""
        for judge in self._judges.values():
            if judge.is_judging(number):
                judge.end(number, score, status)

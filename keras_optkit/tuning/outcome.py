"""What a `Tuner` has at any time: the models that are kept, the trials, the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from keras_tuner.engine.trial import TrialStatus

from keras_optkit import arguments
from keras_optkit.tuning import books
from keras_optkit.tuning.again import Again
from keras_optkit.tuning.models import KeptModel
from keras_optkit.tuning.result import Result
from keras_optkit.tuning.training import Training, end_of
from keras_optkit.tuning.trials import Trial, ranked


class Outcome:
    """The part of `Tuner` that reads what its trials have left."""

    oracle: Any
    economy: Any
    shared: Any
    hypermodel: Any
    records: dict[str, dict[str, Any]]
    keep_models: int | None
    executions_per_trial: int
    first_error: Exception | None
    trained: Training | None
    whole: dict[str, Any]
    project_dir: Any
    get_trial_dir: Callable[[str], Any]

    @property
    def pauses(self) -> bool:
        """Whether trials may be continued, by a pruner or by another process."""
        return self.economy.rungs is not None or self.shared is not None

    def number(self, trial: Any) -> int:
        """The number of a trial: 0 for the first that was started."""
        return int(self.oracle.start_order.index(trial.trial_id))

    def kept_model(self, trial_id: str) -> KeptModel:
        """The model of a trial, as far as it is kept."""
        return KeptModel(Path(self.get_trial_dir(trial_id)))

    def model_path(self, trial_id: str) -> Path:
        """The file with the model of a trial, if it is kept."""
        return self.kept_model(trial_id).path

    def _forget_end(self, trial_id: str) -> None:
        for execution in range(self.executions_per_trial):
            end_of(Path(self.project_dir), trial_id, execution).remove()

    def _kept(self, order: list[Trial]) -> list[str]:
        """The trials whose models are kept; `order` has the best first."""
        return [self.oracle.start_order[found.number] for found in order[: self.keep_models]]

    def _is_paused(self, trial_id: str) -> bool:
        record = self.records.get(trial_id, {})
        return bool(record.get("paused")) and not record["running"]

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
        """The finished trials, and those that are paused, in the order in which they were started."""
        return self._trials()

    def _trials(self, *, history: bool = True) -> list[Trial]:
        paused = {trial_id for trial_id, record in self.records.items() if record.get("paused")}
        finished, order = paused.union(self.oracle.end_order), enumerate(self.oracle.start_order)
        return [self._trial(number, trial_id, history) for number, trial_id in order if trial_id in finished]

    def _trial(self, number: int, trial_id: str, history: bool) -> Trial:
        trial, record = self.oracle.trials[trial_id], self.records[trial_id]
        status = {TrialStatus.COMPLETED: "completed", TrialStatus.STOPPED: "pruned"}.get(trial.status, "failed")
        if record.get("paused") and trial_id not in self.oracle.end_order:
            status = "pruned"  # unless the search is continued
        score = {"completed": trial.score, "pruned": record.get("score")}.get(status)
        return Trial(
            number=number,
            values=self.hypermodel.point(trial.hyperparameters),
            score=None if score is None else float(score),
            metrics=record["metrics"] if status != "failed" else {},
            epochs=record["epochs"],
            best_epoch=record["best_epoch"] if status != "failed" else None,
            seconds=record.get("seconds", 0.0),
            status=status,
            message=record.get("message", ""),
            history=books.read_history(Path(self.get_trial_dir(trial_id))) if history else [],
            scores=record.get("scores", []) if status != "failed" else [],
            best_epochs=record.get("best_epochs", []) if status != "failed" else [],
        )

    def _again(self) -> Again | None:
        """What trains trials again; None where nothing was searched with this object."""
        if self.trained is None:
            return None
        points = {n: self.oracle.trials[trial_id].hyperparameters for n, trial_id in enumerate(self.oracle.start_order)}
        given = {name: self.trained.fit.get(name) for name in ("x", "y", "sample_weight")}
        whole = self.whole or {name: value for name, value in given.items() if value is not None}
        return Again(self.trained, points, whole)

    def result(self, *, temporary: bool = False) -> Result:
        """The result.

        Args:
            temporary: Whether the directory is deleted with the result.

        Raises:
            RuntimeError: If no trial has a score.
        """
        trials, objective = self.trials(), self.oracle.objective
        order = ranked(trials, objective.direction)
        if not order:
            first = f"; the first: {trials[0].reason}" if trials else ""
            what = (
                f"All {len(trials)} trials failed"
                if all(t.status == "failed" for t in trials)
                else "No trial has a score"
            )
            raise RuntimeError(f"{what}{first}") from self.first_error
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
            again=self._again(),
            temporary=temporary,
        )

"""Training again what a search has trained: a trial as it was, or the best point on all data."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np

from keras_optkit import arguments
from keras_optkit.tuning import books
from keras_optkit.tuning.callbacks import Factory
from keras_optkit.tuning.data import check_ends, is_dataset, pair
from keras_optkit.tuning.oracle import AGAIN, stream
from keras_optkit.tuning.training import PARENT, RUNG, Job, Line, Training, run_name
from keras_optkit.tuning.trials import Trial

_ENDED = "as before"


class _AsBefore(Line):
    """Ends each run after the epoch after which it was ended.

    Args:
        history: That of the trial.
        pauses: Whether trials are paused at rungs, so that the other runs follow.
    """

    def __init__(self, history: list[dict[str, Any]], pauses: bool) -> None:
        self._last = [run["epochs"][-1] if run["epochs"] else 0 for run in history]
        self._pauses = pauses

    def ask(self, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:  # noqa: ARG002
        if execution >= len(self._last) or epoch < self._last[execution]:
            return ""
        return RUNG if self._pauses and execution + 1 < len(self._last) else _ENDED


@dataclass
class Again:
    """What a result needs to train again.

    Attributes:
        training: That of the search.
        points: KerasTuner's form of the point of each trial, by its number.
        whole: Arguments of `fit` with all data of the search.
    """

    training: Training
    points: dict[int, keras_tuner.HyperParameters]
    whole: dict[str, Any]

    def rerun(self, trial: Trial) -> Trial:
        """Trains a trial as the search did; see `Result.rerun`."""
        hyperparameters, name = self.points[trial.number], str(trial.number)
        if PARENT in hyperparameters.values:
            raise ValueError(f"number must be that of a trial that continues no other, got {trial.number}.")
        if trial.status == "pruned" and not trial.history:
            raise ValueError(f"number must be that of a trial whose epochs are known, got {trial.number}, pruned.")
        with tempfile.TemporaryDirectory(prefix="keras_optkit_rerun_") as directory:
            Path(directory, f"trial_{name}").mkdir()
            training = replace(self.training, directory=Path(directory), log_dir=None, is_watched=True, asks=True)
            record: dict[str, Any] = {"epochs": 0, "best_epoch": None, "metrics": {}}
            if training.pauses:
                record |= {"rungs": [], "rung_epochs": [], "runs": [{} for _ in range(training.executions)]}
            line = Line() if trial.status == "failed" else _AsBefore(trial.history, training.pauses)
            ended = training.run(Job(name, trial.number, hyperparameters, record, others_have_it=True), line)
        if ended.error is not None:
            raise ended.error
        found = ended.record
        return Trial(
            number=trial.number,
            values=trial.values,
            score=found["score"],
            metrics=found["metrics"],
            epochs=found["epochs"],
            best_epoch=found["best_epoch"],
            seconds=0.0,
            status="completed" if trial.status == "failed" else trial.status,
            message=trial.message if trial.status == "pruned" else "",
            history=[books.curves(run) for run in ended.runs],
            scores=found["scores"],
            best_epochs=found["best_epochs"],
        )

    def retrain(
        self,
        trial: Trial,
        data: Any,
        *,
        validation: Any,
        epochs: int | None,
        callbacks: Any,
        seed: int | None,
        verbose: int,
    ) -> keras.Model:
        """Trains a new model at the point of a trial; see `Result.retrain_best`."""
        hypermodel, hp = self.training.hypermodel, self.points[trial.number]
        arguments.integer("epochs", epochs, 1, optional=True)
        arguments.integer("seed", seed, 0, optional=True)
        arguments.choice("verbose", verbose, (0, 1, 2))
        without = ("x", "y", "sample_weight", "validation_data")
        fit = {name: value for name, value in self.training.fit.items() if name not in without}
        given = dict(self.whole)
        if data is not None:
            given = {"x": data} if is_dataset(data) else dict(zip(("x", "y"), pair("data", data), strict=True))
            if is_dataset(data) and not isinstance(data, keras.utils.PyDataset):
                given["shuffle"] = False
        fit |= given
        if validation is None:
            fit = {name: value for name, value in fit.items() if not name.startswith("validation_")}
        else:
            fit["validation_data"] = (
                validation if is_dataset(validation) else pair("validation", validation, weighted=True)
            )
        best = trial.best_epochs or [trial.best_epoch or 1]
        fit["epochs"] = max(round(sum(best) / len(best)), 1) if epochs is None else epochs
        if isinstance(callbacks, list | tuple):
            fit["callbacks"] = list(callbacks)
        else:
            makers = self.training.callbacks if callbacks is None else [Factory(callbacks)]
            run = run_name(str(trial.number), 0, 1)
            fit["callbacks"] = [each for make in makers for each in make(trial.values, None, run)]
        state = np.random.SeedSequence(seed) if seed is not None else stream(self.training.seed, AGAIN, trial.number)
        keras.utils.set_random_seed(int(state.generate_state(1)[0]))
        point = copy.deepcopy(hp)
        if is_dataset(fit["x"]):  # which has a batch size of its own
            fit.pop("batch_size", None)
            point.values.pop("batch_size", None)
        check_ends(fit, {"x": "data", "validation_data": "validation"})
        model = hypermodel.build(hp)
        if "epochs" in point.values:
            point.values["epochs"] = fit["epochs"]
        history = hypermodel.fit(point, model, **{**fit, "verbose": verbose})
        losses = getattr(history, "history", {}).get("loss", [])
        if losses and not math.isfinite(losses[-1]):
            raise RuntimeError(f"The model cannot be used: its loss is {losses[-1]} after {len(losses)} epochs.")
        return model

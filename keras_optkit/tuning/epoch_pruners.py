"""Optuna's pruners, which look at each epoch of a trial and stop it for good."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from keras_optkit.tuning.export import needed
from keras_optkit.tuning.pruners import NAMES as OF_RUNGS
from keras_optkit.tuning.pruners import RungPruner
from keras_optkit.tuning.samplers import optuna_for, quiet

NAMES = ("median", "wilcoxon")

_REPLAYED = -1  # instead of a number


def pruner_of(pruner: Any) -> Any:
    """The argument `pruner`: a `RungPruner`, one of Optuna's, or None.

    Raises:
        TypeError: If it is neither a name nor a pruner.
        ValueError: If there is none of that name.
        ImportError: If it needs a package that is not there.
    """
    if pruner is None or isinstance(pruner, RungPruner):
        return pruner
    known = (*OF_RUNGS, *NAMES)
    if isinstance(pruner, str) and pruner not in known:
        raise ValueError(f"pruner must be one of {', '.join(map(repr, known))}, a pruner or None, got {pruner!r}.")
    if isinstance(pruner, str) and pruner in OF_RUNGS:
        return OF_RUNGS[pruner]()
    if not isinstance(pruner, str) and not type(pruner).__module__.startswith("optuna."):
        _refuse_unless_of_optuna(pruner)
    optuna = optuna_for(f"pruner={pruner!r}" if isinstance(pruner, str) else "pruner")
    if pruner == "wilcoxon":
        needed("scipy", 'pruner="wilcoxon"', '"keras-optkit[search]"')
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.pruners.WilcoxonPruner()
    if pruner == "median":
        return optuna.pruners.MedianPruner()
    _refuse_unless_of_optuna(pruner)
    return pruner


def _refuse_unless_of_optuna(pruner: Any) -> None:
    """A class of one's own may be below Optuna's."""
    if not any(kind.__module__.startswith("optuna.pruners") for kind in type(pruner).__mro__):
        hint = " Make one: call the class." if isinstance(pruner, type) else ""
        raise TypeError(f"pruner must be a name, a pruner of keras_optkit or of Optuna, or None, got {pruner!r}.{hint}")


@contextmanager
def _silent(optuna: Any) -> Iterator[None]:
    """Without Optuna's remarks, e.g. that the best trial has fewer epochs than this one."""
    with quiet(optuna), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"optuna\..*")
        yield


class Judge:
    """Says after each epoch of a trial whether to stop it: a study of Optuna that is told of all trials, in order.

    Args:
        pruner: Of Optuna.
        direction: `"max"` or `"min"`.
        seed: Of the search; a part of the study's name, by which Optuna's Hyperband deals out brackets.
    """

    def __init__(self, pruner: Any, direction: str, seed: int) -> None:
        self._optuna = optuna_for("pruner")
        with _silent(self._optuna):
            self._study = self._optuna.create_study(
                study_name=f"search of seed {seed}",
                sampler=self._optuna.samplers.RandomSampler(seed=0),  # which is asked for nothing
                pruner=pruner,
                direction=f"{direction}imize",
            )
        self._running: dict[int, Any] = {}  # Optuna's trials, by the numbers of ours

    def is_judging(self, number: int) -> bool:
        """Whether a trial has begun and not ended."""
        return number in self._running

    def begin(self, number: int) -> None:
        """A new trial, or one whose process was killed, which begins again."""
        if number in self._running:
            self.end(number, None, "failed")
        with _silent(self._optuna):
            self._running[number] = self._study.ask()

    def stops(self, number: int, epoch: int, value: float) -> bool:
        """Whether to stop the trial after this epoch, counted from 1."""
        with _silent(self._optuna):
            self._running[number].report(value, epoch - 1)  # as Optuna's own callback for Keras counts
            return bool(self._running[number].should_prune())

    def end(self, number: int, score: float | None, status: str) -> None:
        """How the trial has ended, with its score if it was completed."""
        states = self._optuna.trial.TrialState
        state = {"completed": states.COMPLETE, "pruned": states.PRUNED}.get(status, states.FAIL)
        with _silent(self._optuna):
            self._study.tell(self._running.pop(number), score if status == "completed" else None, state=state)

    def replay(self, trials: Iterable[tuple[Mapping[str, Any] | None, float | None, str]], objective: str) -> None:
        """Trials of an earlier process: the history of their run, their score and their status."""
        for run, score, status in trials:
            self.begin(_REPLAYED)
            values = [] if run is None else run["metrics"].get(objective, [])
            for epoch, value in zip([] if run is None else run["epochs"], values, strict=False):
                if value is not None and math.isfinite(value):  # a run ends where it is not
                    self.stops(_REPLAYED, epoch, value)
            self.end(_REPLAYED, score, status)

"""A run of a trial that is paused, and continued later as if it had not been: by `Resume`, from a bundle."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import keras

from keras_optkit.callbacks.resume import Resume
from keras_optkit.data import EpochDataset, Shuffled

_FINISHED = "finished.npz"
_SELDOM = timedelta(days=36_500)  # a bundle is written where the run is stopped, whatever `every` is


class Stopper(keras.callbacks.Callback):
    """Ends a run at the end of an epoch where one of some rules says so, after the epoch was looked at.

    Args:
        rules: Functions of the epoch, counted from 1, each of which returns a reason or "".
        tell: Called with each epoch before the rules are asked.

    Attributes:
        reason: Why the run was ended, or "" if it ended by itself.
    """

    stateless = True

    def __init__(self, rules: list[Callable[[int], str]], tell: Callable[[int], None] | None = None) -> None:
        super().__init__()
        self.rules = rules
        self.tell = tell
        self.reason = ""

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002
        """Asks the rules, unless something else has ended the run."""
        if self.tell is not None:
            self.tell(epoch + 1)
        if self.model.stop_training or epoch + 1 >= self.params["epochs"]:
            return
        self.reason = next((reason for rule in self.rules if (reason := rule(epoch + 1))), "")
        self.model.stop_training = bool(self.reason)


class Pausable:
    """The directory from which one run of a trial is continued.

    Args:
        directory: Of the run, below that of the trial.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def callback(
        self,
        bundle: str | None,
        fit: Mapping[str, Any],
        every: float | None = None,
        on_bundle: Callable[[str], None] | None = None,
    ) -> Resume:
        """What continues the run from a bundle; None: from the beginning.

        Later bundles are of an attempt that was interrupted, whose scores are not in the books.

        Args:
            bundle: Its name.
            fit: Arguments of `fit`.
            every: Seconds after which a bundle is written; None: only where the run is stopped.
            on_bundle: As of `Resume`.
        """
        for path in self._directory.glob("*.npz") if self._directory.exists() else ():
            if path.name != bundle:
                path.unlink()
        in_order = fit.get("shuffle", True) is False and not isinstance(fit.get("x"), EpochDataset)
        after = _SELDOM if every is None else timedelta(seconds=every)
        resume = Resume(self._directory, every="epoch" if in_order else after, keep=2)
        resume.on_bundle = on_bundle
        return resume

    def pause(self) -> str:
        """After a run that was stopped: the name of the bundle to continue it from.

        The bundle of the end of the run has what callbacks did then, which a run that is not paused would not have.
        """
        (self._directory / _FINISHED).unlink(missing_ok=True)
        return max(path.name for path in self._directory.glob("bundle-*.npz"))

    def forget(self) -> None:
        """Deletes it."""
        shutil.rmtree(self._directory, ignore_errors=True)


def _are_arrays(x: Any) -> bool:
    return all(hasattr(part, "__array__") for part in keras.tree.flatten(x))


def in_known_order(fit: Mapping[str, Any], batch_size: int | None, seed: int) -> dict[str, Any]:
    """Arguments of `fit` with data whose order is known in each epoch: arrays are shuffled by its number."""
    x = fit.get("x")
    if isinstance(x, EpochDataset):
        x.epoch = 0  # another trial has trained on it
    if not _are_arrays(x) or fit.get("steps_per_epoch") or fit.get("shuffle", True) is False:
        return dict(fit)
    data = Shuffled(x, fit.get("y"), fit.get("sample_weight"), batch_size=batch_size or 32, seed=seed)
    left = {name: value for name, value in fit.items() if name not in ("x", "y", "sample_weight")}
    return {**left, "x": data, "shuffle": False}


def can_be_continued(fit: Mapping[str, Any]) -> bool:
    """Whether the order of the data in a later epoch is that of a run without a pause."""
    x = fit.get("x")
    in_order = fit.get("shuffle", True) is False or not fit.get("steps_per_epoch")
    return isinstance(x, EpochDataset) or (_are_arrays(x) and in_order)


@contextlib.contextmanager
def quiet_about_order() -> Iterator[None]:
    """Without what `Resume` says in each trial about the order of the data; the search has said so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "x must be a keras_optkit.data.Shuffled")
        yield

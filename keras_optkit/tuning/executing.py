"""Trials in the processes of a `concurrent.futures.Executor`, which may be on other machines."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from keras_tuner.errors import FatalError

from keras_optkit.tuning import payload
from keras_optkit.tuning.payload import Payload
from keras_optkit.tuning.training import Ended, Job, Line
from keras_optkit.tuning.worker import outcome
from keras_optkit.tuning.workers import Event

_TICK = 0.5  # seconds

_BUSY = threading.Lock()  # seeds and settings are those of a process, so that threads train one after the other
_read = functools.lru_cache(maxsize=1)(payload.read)


class SearchEndedError(FatalError, RuntimeError):
    """The search that has sent this trial is no more."""


class _Alone(Line):
    """No line: what is left of the budgets was written into the job."""

    def __init__(self, job: Job, path: Path) -> None:
        self._job = job
        self._path = path
        runs = enumerate(job.record.get("runs", []))
        self._epochs = {each: len(run["watch"]["history"]) for each, run in runs if "watch" in run}

    def tell(self, execution: int, epochs: int, epoch: int, metrics: Mapping[str, float]) -> None:  # noqa: ARG002
        if not self._path.exists():
            raise SearchEndedError(f"The search has ended that trial {self._job.number} is of.")
        self._epochs[execution] = epochs

    def ask(self, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:  # noqa: ARG002
        if self._job.deadline is not None and time.time() >= self._job.deadline:
            return f"time_limit is used up after epoch {epoch}"
        if self._job.epochs_left is not None and sum(self._epochs.values()) >= self._job.epochs_left:
            return f"max_epochs is used up after epoch {epoch}"
        return ""


def train(given: Payload, search_path: Sequence[str], job: Job) -> tuple[str, Ended | Exception]:
    """Trains a trial in a process of an executor.

    Args:
        given: Where the rest is.
        search_path: `sys.path` of the search, for modules of its own.
        job: The trial.

    Raises:
        RuntimeError: If `directory` cannot be seen from here.
    """
    with _BUSY:
        sys.path.extend(each for each in search_path if each not in sys.path)
        return outcome(_read(given), job, _Alone(job, given.path))


class Executing:
    """Trains trials with an executor, which stays its owner's.

    Args:
        size: How many trials are sent at a time.
        given: What they are given.
        executor: Where they run.
    """

    def __init__(self, size: int, given: Payload, executor: futures.Executor) -> None:
        self.size = size
        self._given = given
        self._executor = executor
        self._futures: dict[futures.Future[Any], str] = {}

    def submit(self, job: Job, seconds: float) -> None:  # noqa: ARG002  (of workers, which have limits)
        """Trains a trial."""
        future = self._executor.submit(train, self._given, list(sys.path), job)
        self._futures[future] = job.trial_id

    def answer(self, trial_id: str, reason: str) -> None:
        """Nothing is asked."""
        raise NotImplementedError

    def stop(self, trial_id: str) -> None:
        """Nothing is stopped."""
        raise NotImplementedError

    def events(self) -> Iterator[Event]:
        """What has happened; waits for a moment if that is nothing.

        Raises:
            RuntimeError: If the executor does not run what it is given.
        """
        done, _ = futures.wait(self._futures, _TICK, futures.FIRST_COMPLETED)
        for future in sorted(done, key=lambda each: _error(each) is not None):  # what has ended well is not lost
            trial_id = self._futures.pop(future)
            error = _error(future)
            if error is None:
                kind, content = future.result()
                yield Event(trial_id, kind, (content,))
            elif type(error).__name__ == "KilledWorker":  # Dask's, after some attempts on different workers
                yield Event(trial_id, "died", (f"It has ended the processes of workers: {error}", None, True))
            else:
                raise RuntimeError(
                    f"The executor has not run trial {trial_id}: {type(error).__name__}: {error} Run the script again "
                    "to continue the search."
                ) from error

    def close(self, *, at_once: bool) -> None:  # noqa: ARG002  (of workers)
        """Cancels what has not begun; what runs ends with its epoch, since the payload is deleted."""
        for future in self._futures:
            future.cancel()
        self._futures = {}


def _error(future: futures.Future[Any]) -> BaseException | None:
    """Why a future that is done has no result."""
    return futures.CancelledError("it was cancelled") if future.cancelled() else future.exception()

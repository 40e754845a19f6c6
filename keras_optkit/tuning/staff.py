"""Who trains the trials of a search, if it is not the process of the search itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

from keras_optkit import arguments
from keras_optkit.tuning import payload
from keras_optkit.tuning.economy import Economy
from keras_optkit.tuning.training import Training
from keras_optkit.tuning.workers import Crew, Workers


class Staff:
    """The arguments of a search about processes.

    Args:
        workers: As in `search`.
        executor: As in `search`.
        trial_time_limit: As in `search`.
        trial_memory_limit: As in `search`.
        has_storage: Whether other machines train trials of the same search.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If an argument has a wrong value.
        ImportError: If cloudpickle is needed and not installed.
    """

    def __init__(
        self,
        workers: int,
        executor: Any,
        trial_time_limit: float | None,
        trial_memory_limit: int | None,
        has_storage: bool = False,
    ) -> None:
        self.workers = arguments.integer("workers", workers, 1)
        self.executor = executor
        self.time_limit = arguments.real("trial_time_limit", trial_time_limit, 0, closed="right", optional=True)
        self.memory_limit = arguments.integer("trial_memory_limit", trial_memory_limit, 1, optional=True)
        limits = {"trial_time_limit": self.time_limit, "trial_memory_limit": self.memory_limit}
        given = [f"{name}={value}" for name, value in limits.items() if value is not None]
        if self.memory_limit is not None and not Path("/proc/self/statm").exists():
            raise ValueError(
                f"trial_memory_limit must be None where the system does not show the memory of a process in /proc, got "
                f"{trial_memory_limit!r}."
            )
        if executor is not None:
            _check_executor(executor)
            if given:
                raise ValueError(
                    f"{given[0].partition('=')[0]} must be None where executor is given, whose processes are not the "
                    f"search's to end, got {given[0].partition('=')[2]}."
                )
        if executor is not None and has_storage:
            raise ValueError(f"executor must be None where storage is given, got {executor!r}.")
        self._has_storage = has_storage
        #: What has been asked for, for messages.
        self.asked = "executor" if executor is not None else f"workers={workers}" if workers > 1 else "".join(given[:1])
        # The process that renews leases must not be the one that a trial may crash or keep from it.
        self.asked = self.asked or "storage" * has_storage
        if self.is_active:
            payload.cloudpickle(self.asked)

    @property
    def is_active(self) -> bool:
        """Whether trials run in other processes."""
        return bool(self.asked)

    def check(self, economy: Economy) -> None:
        """Raises if the pruner has to be asked in the midst of a trial.

        An executor's processes cannot do that, and one of several machines does not know the epochs of the others.

        Raises:
            ValueError: If it is one of Optuna's.
        """
        given = "executor" if self.executor is not None else "storage" if self._has_storage else ""
        if given and economy.pruner is not None and economy.rungs is None:
            raise ValueError(
                f'pruner must be one that pauses trials, such as "asha", or None where {given} is given, got '
                f"{type(economy.pruner).__name__}, which looks at each epoch."
            )

    @contextlib.contextmanager
    def crew(self, directory: Path, training: Training) -> Iterator[Crew]:
        """What trains the trials in the block."""
        given = payload.write(directory, training, self.asked)
        try:
            crew: Crew
            if self.executor is None:
                crew = Workers(self.workers, given, self.time_limit, self.memory_limit)
            else:
                from keras_optkit.tuning.executing import Executing

                crew = Executing(self.workers, given, self.executor)
            try:
                yield crew
            except BaseException:
                crew.close(at_once=True)
                raise
            crew.close(at_once=False)
        finally:
            given.path.unlink(missing_ok=True)


def _check_executor(executor: Any) -> None:
    if isinstance(executor, futures.ThreadPoolExecutor):
        raise ValueError(
            "executor must train trials in processes, since a process has one seed and one state of Keras, got "
            f"{executor!r}."
        )
    if not isinstance(executor, futures.Executor):
        hint = " Give its get_executor()." if hasattr(executor, "get_executor") else ""
        raise TypeError(f"executor must be a concurrent.futures.Executor or None, got {executor!r}.{hint}")

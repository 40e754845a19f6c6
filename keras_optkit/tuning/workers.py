"""Processes that train trials, as the search sees them: it starts, watches, ends and replaces them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import keras

from keras_optkit.tuning.payload import Payload
from keras_optkit.tuning.training import Job

_TICK = 0.1  # seconds between two looks at the limits
_STARTS = 3  # attempts to start a worker

#: Signals that come from outside: the trial is not known to be their reason.
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# A module's `__main__` is not run again in a process that begins so: a script needs no `if __name__ == "__main__"`.
_CODE = """
import json, sys
sys.path[:] = json.loads(sys.argv[3])
from keras_optkit.tuning.worker import main
main(int(sys.argv[1]), int(sys.argv[2]))
"""


class Event(NamedTuple):
    """What has happened to a trial.

    `kind` is `"begin"`, `"tell"`, `"ask"`, `"kept"`, `"ended"` or `"fatal"`, with what the worker has sent; or
    `"died"`, with the reason, the seconds, and whether the trial is known to be what has ended its process.
    """

    trial_id: str
    kind: str
    content: tuple[Any, ...] = ()


class Crew(Protocol):
    """What trains trials."""

    size: int

    def submit(self, job: Job, seconds: float) -> None:
        """Trains a trial, which has taken so many seconds before."""

    def events(self) -> Iterator[Event]:
        """What has happened; waits for a moment if that is nothing."""

    def answer(self, trial_id: str, reason: str) -> None:
        """Answers what was asked."""

    def stop(self, trial_id: str) -> None:
        """Ends what trains a trial; nothing more is heard of it."""

    def close(self, *, at_once: bool) -> None:
        """Ends all that was started."""


class _Worker:
    """One process.

    Attributes:
        connection: To it.
        job: What it trains, or is to train once it is ready.
        is_ready: Whether it has read the payload.
        began: When it was sent the job.
        before: The seconds that the trial has taken before.
        trained: The number of trials that it has had.
    """

    def __init__(self, payload: Payload) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"KERAS_BACKEND": keras.config.backend()}
        # each would take all the memory of a GPU otherwise
        for name, value in (("TF_FORCE_GPU_ALLOW_GROWTH", "true"), ("XLA_PYTHON_CLIENT_PREALLOCATE", "false")):
            environment.setdefault(name, value)
        arguments = [str(theirs.fileno()), str(os.getpid()), json.dumps(sys.path)]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CODE, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the search's, and what a worker has started ends with it
                env=environment,
            )
        self.connection = Connection(ours.detach())
        self.job: Job | None = None
        self.is_ready = False
        self.began = 0.0
        self.before = 0.0
        self.trained = 0
        with contextlib.suppress(OSError):  # it has ended already
            self.connection.send(payload)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began if self.began else 0.0

    def send_job(self) -> None:
        self.began = time.monotonic()
        with contextlib.suppress(OSError):
            self.connection.send(self.job)

    def memory(self) -> int:
        """Bytes that are resident; 0 once it has ended."""
        with contextlib.suppress(OSError, IndexError):
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        return 0

    def kill(self) -> int:
        """Ends it, and what it has started; returns how it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.connection.close()
        return self.process.wait()


class Workers:
    """Worker processes on this machine.

    Each trains one trial after the other; one that has ended is replaced. A worker is replaced, too, before a trial if
    those before have left it with more than half of the memory that a trial may have.

    Args:
        size: How many trials run at a time.
        payload: What they are given.
        time_limit: As `trial_time_limit` of `search`.
        memory_limit: As `trial_memory_limit` of `search`.
    """

    def __init__(self, size: int, payload: Payload, time_limit: float | None, memory_limit: int | None) -> None:
        self.size = size
        self._payload = payload
        self._time_limit = time_limit
        self._memory_limit = memory_limit
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    def submit(self, job: Job, seconds: float) -> None:
        """Trains a trial, which has taken so many seconds before."""
        worker = next((each for each in self._workers if each.job is None), None)
        half = None if self._memory_limit is None else self._memory_limit / 2
        if worker is not None and half is not None and worker.trained and worker.memory() > half:
            self._remove(worker)
            worker = None
        if worker is None:
            worker = _Worker(self._payload)
            self._workers.append(worker)
        worker.job, worker.before, worker.began = job, seconds, 0.0
        if worker.is_ready:
            worker.send_job()

    def answer(self, trial_id: str, reason: str) -> None:
        """Answers what was asked."""
        for worker in self._workers:
            if worker.job is not None and worker.job.trial_id == trial_id:
                with contextlib.suppress(OSError):
                    worker.connection.send(reason)

    def stop(self, trial_id: str) -> None:
        """Ends the process that trains a trial."""
        for worker in list(self._workers):
            if worker.job is not None and worker.job.trial_id == trial_id:
                self._remove(worker)

    def events(self) -> Iterator[Event]:
        """What has happened; waits for a moment if that is nothing.

        Raises:
            RuntimeError: If no worker can be started.
        """
        ready = wait([worker.connection for worker in self._workers], _TICK)
        for worker in list(self._workers):
            yield from self._heard(worker) if worker.connection in ready else ()
            if worker in self._workers:
                yield from self._looked_at(worker)

    def _heard(self, worker: _Worker) -> Iterator[Event]:
        try:
            while worker.connection.poll():
                kind, *content = worker.connection.recv()
                if kind == "ready":
                    worker.is_ready, self._failed_starts = True, 0
                    if worker.job is not None:
                        worker.send_job()
                elif kind == "unusable":
                    raise RuntimeError(f"A worker cannot train what the search has sent it:\n{content[0]}")
                else:
                    assert worker.job is not None
                    trial_id = worker.job.trial_id
                    if kind in ("ended", "fatal"):
                        worker.job, worker.began, worker.trained = None, 0.0, worker.trained + 1
                    yield Event(trial_id, kind, tuple(content))
        except (EOFError, ConnectionError):
            yield from self._died(worker)

    def _looked_at(self, worker: _Worker) -> Iterator[Event]:
        """Ends a worker that is beyond a limit."""
        if worker.process.poll() is not None and not worker.connection.poll():
            yield from self._died(worker)
        elif worker.job is not None and worker.began:
            reason = ""
            if self._time_limit is not None and worker.before + worker.seconds > self._time_limit:
                reason = f"It took more than trial_time_limit={self._time_limit:g} seconds."
            elif self._memory_limit is not None and (used := worker.memory()) > self._memory_limit:
                reason = f"Its process had {used} bytes in memory, more than trial_memory_limit={self._memory_limit}."
            if reason:
                trial_id, seconds = worker.job.trial_id, worker.seconds
                self._remove(worker)
                yield Event(trial_id, "died", (reason, seconds, True))

    def _died(self, worker: _Worker) -> Iterator[Event]:
        """What has become of the trial of a worker that has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            worker.process.wait(5)  # it may have closed its connection a moment ago
        code, seconds = self._remove(worker), worker.seconds
        if worker.job is None:
            return
        if not worker.is_ready:
            self._failed_starts += 1
            if -code not in _FROM_OUTSIDE or self._failed_starts >= _STARTS:
                raise RuntimeError(f"A worker cannot be started: its process was ended {_how(code)}.")
            self.submit(worker.job, worker.before)
            return
        outside = -code in _FROM_OUTSIDE
        hint = ", e.g. by the system for lack of memory" if -code == signal.SIGKILL else ""
        yield Event(worker.job.trial_id, "died", (f"Its process was ended {_how(code)}{hint}.", seconds, not outside))

    def _remove(self, worker: _Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def close(self, *, at_once: bool) -> None:
        """Ends all workers.

        Args:
            at_once: Whether not to wait until they have ended by themselves.
        """
        for worker in self._workers:
            worker.connection.close()
        until = time.monotonic() + (0 if at_once else 5)
        for worker in self._workers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(until - time.monotonic(), 0))
            worker.kill()
        self._workers = []


def _how(code: int) -> str:
    """How a process has ended, in words."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        number = signal.Signals(-code)
        return f"by {number.name} ({signal.strsignal(number)})"
    return f"by signal {-code}"

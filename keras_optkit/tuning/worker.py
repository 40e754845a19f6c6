"""The process of a worker: it trains one trial after the other, and tells the search how they go."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection

from keras_optkit.tuning import books, payload
from keras_optkit.tuning.training import Ended, Job, Line, Training, trial_directory

_PATIENCE = 600.0  # seconds, for the process that trained the trial before


def main(number: int, parent: int) -> None:
    """Trains what it is sent, until the search hangs up.

    Args:
        number: The file descriptor of the connection.
        parent: The process of the search.
    """
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):  # the search has hung up
        _serve(Connection(number))


def _serve(connection: Connection) -> None:
    given = connection.recv()
    try:
        training = payload.read(given)
    except Exception:
        connection.send(("unusable", traceback.format_exc()))
        return
    connection.send(("ready",))
    while True:
        job = connection.recv()
        connection.send(outcome(training, job, _Connected(connection, training.asks)))


def _end_with(parent: int) -> None:
    """Ends this process, and those that it has started, once the search is no more."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)


class _Connected(Line):
    """The line of a training to the search."""

    def __init__(self, connection: Connection, asks: bool) -> None:
        self._connection = connection
        self._asks = asks

    def begin(self, execution: int) -> None:
        self._connection.send(("begin", execution))

    def tell(self, execution: int, epochs: int, epoch: int, metrics: Mapping[str, float]) -> None:
        self._connection.send(("tell", execution, epochs, epoch, dict(metrics)))

    def ask(self, execution: int, epoch: int, metrics: Mapping[str, float]) -> str:
        if not self._asks:
            return ""
        self._connection.send(("ask", execution, epoch, dict(metrics)))
        return str(self._connection.recv())

    def kept(self) -> None:
        self._connection.send(("kept",))
        self._connection.recv()


def outcome(training: Training, job: Job, line: Line) -> tuple[str, Ended | Exception]:
    """`("ended", Ended)`, or `("fatal", error)` where the search is to end; both can be pickled."""
    began = time.perf_counter()
    try:
        with books.alone(trial_directory(training.directory, job.trial_id), _PATIENCE):
            ended = training.run(job, line)
    except Exception as error:
        return "fatal", _portable(error)
    ended.seconds = time.perf_counter() - began
    ended.error = None if ended.error is None else _portable(ended.error)
    return "ended", ended


def _portable(error: Exception) -> Exception:
    """An error that can be pickled, with its traceback as a note."""
    told = "".join(traceback.format_exception(error)).rstrip()
    try:
        copied = pickle.loads(pickle.dumps(error))
    except Exception:  # a class of a script, or one whose arguments are not what it keeps
        copied = None
    if type(copied) is not type(error):
        copied = RuntimeError(f"{type(error).__name__}: {error}")
    copied.add_note(f"In a worker:\n{told}")
    return copied

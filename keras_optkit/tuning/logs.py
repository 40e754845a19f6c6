"""TensorBoard's HParams table: one run for each model trained, with its hyperparameters, its score and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVENTS = "events.out.tfevents.*"
LINES = "monitor.jsonl"  # of TrainingMonitor


def clear(directory: Path) -> None:
    """Deletes the logs of a directory and below, so that two runs never share a curve."""
    for file in (*directory.rglob(EVENTS), *directory.rglob(LINES)):
        file.unlink()


def claim(directory: Path, overwrite: bool) -> None:
    """Raises if a new search would write into the runs of an old one.

    Raises:
        ValueError: Unless they are to be deleted.
    """
    old = [path for path in directory.glob("trial_*") if any(path.rglob(EVENTS))]
    if old and not overwrite:
        raise ValueError(
            f"log_dir must hold no trials of another search, got {str(directory)!r} with {len(old)} of them. "
            "Choose another directory, or pass overwrite=True to delete their logs."
        )
    for path in old:
        clear(path)


class Session:
    """The HParams of one run.

    Attributes:
        is_open: Whether the run is paused, so that nothing is said about its end yet.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self.is_open = False

    def metric(self, tag: str, value: float, step: int) -> None:
        """Writes a metric of the table."""
        import tensorflow as tf

        with self._writer.as_default():
            tf.summary.scalar(tag, value, step=step)


@contextmanager
def hparams_session(
    directory: Path, group: str, values: Mapping[str, Any], *, continued: bool = False
) -> Iterator[Session]:
    """Writes `values` for the run in the block, and afterwards whether it succeeded.

    No experiment summary (`hparams_config`) is written: TensorBoard would take the first that it finds for all runs
    below its log directory, and would hide the hyperparameters that only another search has.

    Args:
        directory: Of the run.
        group: The name of the trial.
        values: Its hyperparameters.
        continued: Whether the run was begun before; its logs are kept then.

    Yields:
        What takes the metrics of the table.
    """
    import tensorflow as tf
    from tensorboard.plugins.hparams import api, api_pb2

    if not continued:
        clear(directory)
    writer = tf.summary.create_file_writer(str(directory))
    session, status = Session(writer), api_pb2.STATUS_FAILURE
    try:
        if not continued:
            with writer.as_default():
                api.hparams(dict(values), trial_id=group)
            writer.flush()
        yield session
        status = api_pb2.STATUS_SUCCESS
    finally:
        if not session.is_open or status == api_pb2.STATUS_FAILURE:
            _end(writer, status)
        writer.close()


@contextmanager
def ending(directory: Path) -> Iterator[Callable[[str, float, int], None]]:
    """Notes that a run that was paused has ended; yields a function for the metrics of its table."""
    import tensorflow as tf
    from tensorboard.plugins.hparams import api_pb2

    writer = tf.summary.create_file_writer(str(directory))
    yield Session(writer).metric
    _end(writer, api_pb2.STATUS_SUCCESS)
    writer.close()


def failed(directory: Path) -> None:
    """Notes that a run has failed whose process has ended without saying so."""
    import tensorflow as tf
    from tensorboard.plugins.hparams import api_pb2

    if any(directory.glob(EVENTS)):
        writer = tf.summary.create_file_writer(str(directory))
        _end(writer, api_pb2.STATUS_FAILURE)
        writer.close()


def _end(writer: Any, status: Any) -> None:
    import tensorflow as tf
    from tensorboard.plugins.hparams import summary

    with writer.as_default():
        tf.summary.experimental.write_raw_pb(summary.session_end_pb(status).SerializeToString(), step=0)

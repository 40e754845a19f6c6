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


@contextmanager
def hparams_session(
    directory: Path, group: str, values: Mapping[str, Any]
) -> Iterator[Callable[[str, float, int], None]]:
    """Writes `values` for the training that runs in the block, and afterwards whether it succeeded.

    No experiment summary (`hparams_config`) is written: TensorBoard would take the first that it finds for all runs
    below its log directory, and would hide the hyperparameters that only another search has.

    Yields:
        A function of tag, value and step for the metrics of the table.
    """
    import tensorflow as tf
    from tensorboard.plugins.hparams import api, api_pb2, summary

    clear(directory)
    writer = tf.summary.create_file_writer(str(directory))
    status = api_pb2.STATUS_FAILURE

    def metric(tag: str, value: float, step: int) -> None:
        with writer.as_default():
            tf.summary.scalar(tag, value, step=step)

    try:
        with writer.as_default():
            api.hparams(dict(values), trial_id=group)
        writer.flush()
        yield metric
        status = api_pb2.STATUS_SUCCESS
    finally:
        with writer.as_default():
            tf.summary.experimental.write_raw_pb(summary.session_end_pb(status).SerializeToString(), step=0)
        writer.close()

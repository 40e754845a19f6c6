"""Where `TrainingMonitor` writes to: TensorBoard's event files, and a line of JSON for each write."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Record = dict[str, Any]

LINES = "monitor.jsonl"

#: The groups of tags in the order of the charts: category, title of the chart, patterns of the tags in it.
CHARTS = (
    ("training", "loss", ("train/loss(/.*)?", "epoch/(val_)?loss")),
    ("training", "learning rate", ("train/learning_rate(/.*)?",)),
    ("training", "estimated learning rate", ("train/estimate(/.*)?", "train/effective_rate(/.*)?")),
    ("training", "norm of gradient and weights", ("train/gradient_norm", "train/weight_norm")),
    ("training", "update-to-weight ratio", ("train/update_ratio",)),
    ("training", "clip rate", ("train/clip_rate(/.*)?",)),
    ("training", "non-finite numbers and skipped updates", ("train/nonfinite", "train/skipped", "nonfinite/.*")),
    ("training", "loss scale", ("train/loss_scale(/.*)?",)),
    ("training", "gradient noise scale", ("train/noise_scale",)),
    ("layers", "update-to-weight ratio by layer", ("update_ratio/.*",)),
    ("layers", "norm of the gradient by layer", ("gradient_norm/.*",)),
    ("layers", "norm of the weights by layer", ("weight_norm/.*",)),
    ("activations", "mean", ("activation_mean/.*",)),
    ("activations", "standard deviation", ("activation_std/.*",)),
    ("activations", "share of zeros", ("activation_zeros/.*",)),
    ("activations", "share of dead units", ("activation_dead/.*",)),
    ("activations", "share of saturated outputs", ("activation_saturated/.*",)),
    ("resources", "examples a second", ("throughput/examples",)),
    ("resources", "updates a second", ("throughput/updates",)),
    ("resources", "memory, MiB", ("memory/.*",)),
)

#: The tags whose curves lie orders of magnitude apart, so that their logarithms are charted, in TensorBoard under tags
#: with this at the beginning.
LOGARITHMIC = ("update_ratio/", "gradient_norm/", "weight_norm/")
_LOG10 = "log10_"

_EPOCH = "epoch/"
_OURS = {pattern.split("/")[0] for *_, patterns in CHARTS for pattern in patterns} | {"hyperparameters", "epoch"}
_LAYOUT, _HPARAMS = "custom_scalars__config__", "_hparams_/session_start_info"


class EventFile:
    """TensorBoard's event files in a directory.

    Attributes:
        last: The last step of the values of updates, and of those of epochs, in the files; -1 if there are none.
    """

    def __init__(self, directory: str, known: Any = None):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.last: dict[bool, int]
        self.last, self._there = ({**known[1]}, {_LAYOUT, _HPARAMS}) if known else self._read(directory)
        self._writer = EventFileWriter(directory)

    @staticmethod
    def _read(directory: str) -> tuple[dict[bool, int], set[str]]:
        """The last steps, and which of layout and hyperparameters are there."""
        from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

        last: dict[bool, int] = {True: -1, False: -1}
        there: set[str] = set()
        # each for itself: together, TensorBoard reads the tenth of a process and second before the ninth
        for path in Path(directory).glob("*tfevents*"):
            events = EventAccumulator(str(path), size_guidance={TENSORS: 1})  # keeps the last value of each tag
            events.Reload()
            for tag in events.Tags()["tensors"]:
                if tag.split("/")[0] in _OURS:
                    of_epoch = tag.startswith(_EPOCH)
                    last[of_epoch] = max(last[of_epoch], events.Tensors(tag)[-1].step)
            there |= {tag for tag in (_LAYOUT, _HPARAMS) if tag in events.summary_metadata}
        return last, there

    def write(self, values: dict[str, float], step: int, *, of_epoch: bool) -> bool:
        """Writes scalars, unless there are some of this step or a later one already; returns whether it has."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        if step <= self.last[of_epoch]:
            return False
        self.last[of_epoch] = step
        self._add([scalar_pb(tag, value) for tag, value in (values | _logarithms(values)).items()], step)
        return True

    def write_histograms(self, values: Mapping[str, np.ndarray], step: int) -> None:
        """Writes how the elements of each array are distributed."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add([histogram_pb(tag, value) for tag, value in values.items()], step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add([text_pb(tag, text)], step)

    def write_layout(self, absent: tuple[str, ...] = ()) -> None:
        """Writes, once in a directory, which charts the custom-scalars dashboard is to show.

        Args:
            absent: How the tags begin that there will be no values of.
        """
        from tensorboard.plugins.custom_scalar import layout_pb2, summary

        if _LAYOUT in self._there:
            return
        categories: dict[str, list[Any]] = {}
        for category, title, all_patterns in CHARTS:
            if absent and all_patterns[0].startswith(absent):
                continue
            patterns: list[str] = list(all_patterns)
            if patterns[0].startswith(LOGARITHMIC):
                title, patterns = f"{title}, log10", [_LOG10 + pattern for pattern in patterns]
            tags = layout_pb2.MultilineChartContent(tag=[f"^{pattern}$" for pattern in patterns])
            categories.setdefault(category, []).append(layout_pb2.Chart(title=title, multiline=tags))
        layout = layout_pb2.Layout(
            category=[layout_pb2.Category(title=title, chart=charts) for title, charts in categories.items()]
        )
        self._add([summary.pb(layout)], 0)

    def write_hparams(self, hparams: Mapping[str, Any], run: str) -> None:
        """Writes the hyperparameters of a run, unless the directory has some.

        No experiment summary is written: TensorBoard would take the first that it finds for all runs.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        if _HPARAMS not in self._there:
            self._add([hparams_pb(hparams, trial_id=run)], 0)

    def _add(self, summaries: list[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step)
        for summary in summaries:
            event.summary.MergeFromString(summary.SerializeToString())
        self._writer.add_event(event)

    def flush(self) -> None:
        """Has what was written on disk, as far as another process is concerned."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the writing."""
        self._writer.close()


class LineFile:
    """A text file in which every line is a JSON object: step, epoch, time, and value by tag.

    What a killed process has left of its last line is cut off.

    Args:
        directory: The directory.
        known: What `close` has returned and the last steps of the event files, if somebody has written there before.

    Attributes:
        last: As in `EventFile`.
        known: Whether nobody else has written since.
    """

    def __init__(self, directory: str, known: Any = None):
        path = Path(directory) / LINES
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = known is not None and path.exists() and path.stat().st_size == known[0]["size"]
        self.last = {**known[0]["last"]} if self.known else {True: -1, False: -1}
        for record in () if self.known else records(path):
            self.last[is_of_epoch(record)] = max(self.last[is_of_epoch(record)], record["step"])
        self._file = path.open("ab")
        if not self.known:
            self._file.truncate(_whole(path))

    def write(self, values: Mapping[str, float], step: int, epoch: int, *, of_epoch: bool) -> bool:
        """Writes a line, unless there is one of this step or a later one already; returns whether it has."""
        if step <= self.last[of_epoch]:
            return False
        self.last[of_epoch] = step
        record: Record = {"step": step, "epoch": epoch, "time": time.time()}
        record |= {tag: value if math.isfinite(value) else str(float(value)) for tag, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return True

    def flush(self) -> None:
        """Has what was written on disk, whatever happens to the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> dict[str, Any]:
        """Ends the writing; returns what there is now."""
        size = self._file.tell()
        self._file.close()
        return {"size": size, "last": self.last}


def _logarithms(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are charted, by tag; 0 has none."""
    charted = {tag: value for tag, value in values.items() if tag.startswith(LOGARITHMIC) and value != 0}
    return {_LOG10 + tag: math.log10(value) for tag, value in charted.items()}


def _whole(path: Path) -> int:
    """How many bytes the complete lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1


def is_of_epoch(record: Record) -> bool:
    """Whether a line has the logs of an epoch."""
    return any(tag.startswith(_EPOCH) for tag in record)


def values_of(record: Record) -> dict[str, float]:
    """The values of a line, by tag."""
    return {tag: value for tag, value in record.items() if tag not in ("step", "epoch", "time")}


def records(path: Path) -> Iterator[Record]:
    """The lines of a file, as they were written; an incomplete last one is left out, and so is a file not there.

    Raises:
        ValueError: For a line that is none of ours.
    """
    if not path.exists():
        return
    lines = path.read_bytes()[: _whole(path)].splitlines()
    for place, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            values = {name: float(value) for name, value in record.items() if name not in ("step", "epoch", "time")}
            found = {**record, **values, "step": int(record["step"])}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}, line {place} is not a line of TrainingMonitor: {line[:80]!r}.") from error
        yield found

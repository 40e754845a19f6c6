"""TensorBoard's event files."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_optkit import arguments
from keras_optkit.callbacks.charts import CHARTS, EPOCH, LOGARITHMIC, PREFIXES
from keras_optkit.callbacks.sinks.sink import Opening, Sink

_LOG10 = "log10_"
_LAYOUT, _HPARAMS = "custom_scalars__config__", "_hparams_/session_start_info"


class TensorBoard(Sink):
    """Writes TensorBoard's event files: what `TrainingMonitor` does without `sinks`.

    Values are scalars, to which the logarithms `log10_update_ratio/<layer>`, ... of positive values are added; texts,
    histograms, figures and hyperparameters have the tabs *Text*, *Histograms*, *Images* and *HParams*. The first `fit`
    in a directory writes the layout of the tab *Custom scalars*. Steps that the files have are not written again.

    When not to use it: for the plots of Keras's own `TensorBoard` callback, such as the graph or a profile.

    Args:
        log_dir: The directory of the files, which is made when it does not exist; None: that of the monitor.

    Raises:
        TypeError: If `log_dir` is not a path.
        ValueError: If `log_dir` is empty.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    with tempfile.TemporaryDirectory() as logs:
        sinks = [ok.callbacks.sinks.TensorBoard(f"{logs}/events")]
        monitor = ok.callbacks.TrainingMonitor(f"{logs}/lines", every=2, sinks=sinks)
        model.fit(x, x[:, :1], batch_size=16, callbacks=[monitor], verbose=0)
    ```
    """

    def __init__(self, log_dir: Any = None):
        self.log_dir = None if log_dir is None else arguments.path("log_dir", log_dir)
        self._last: dict[bool, int] = {}
        self._there: set[str] = set()  # which of layout and hyperparameters are in the files
        self._directory = ""
        self._absent: tuple[str, ...] = ()
        self._writer: Any = None

    def place(self) -> Hashable:
        """Its directory, which cannot have two writers."""
        return type(self), self.log_dir

    def open(self, opening: Opening) -> None:
        """Finds out where the files have got to, unless that is known.

        Raises:
            ValueError: If there is no directory.
        """
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory = self.log_dir or opening.log_dir
        if directory is None:
            raise ValueError("log_dir of sinks.TensorBoard must be a path where no monitor has one, got None.")
        if not opening.unchanged or directory != self._directory:
            self._last, self._there = _read(directory)
        self._directory = directory
        self._writer = EventFileWriter(directory)
        self._absent = opening.absent

    def last_step(self, *, of_epoch: bool) -> int:
        """The last step of the values in the files."""
        return self._last[of_epoch]

    def write_values(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> None:
        """Writes scalars, and before the first the layout, unless the files have one."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        if _LAYOUT not in self._there:
            self._add([_layout(self._absent)], 0)
            self._there.add(_LAYOUT)
        self._last[of_epoch] = step
        self._add([scalar_pb(tag, value) for tag, value in {**values, **_logarithms(values)}.items()], step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Writes the hyperparameters, unless the files have some.

        No experiment summary is written: TensorBoard would take the first that it finds for all runs.
        """
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        if _HPARAMS not in self._there:
            self._add([hparams_pb(hparams, trial_id=self._directory)], 0)
            self._there.add(_HPARAMS)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._add([text_pb(tag, text)], step)

    def write_histograms(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Writes histograms."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self._add([histogram_pb(tag, array) for tag, array in arrays.items()], step)

    def write_figure(self, tag: str, png: bytes, step: int) -> None:
        """Writes an image."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.plugins.image.metadata import create_summary_metadata
        from tensorboard.util.tensor_util import make_tensor_proto

        size = [str(number).encode() for number in np.frombuffer(png[16:24], ">u4")]  # width and height of any PNG
        image = Summary()
        image.value.add(tag=tag, metadata=create_summary_metadata(None, ""), tensor=make_tensor_proto([*size, png]))
        self._add([image], step)

    def flush(self) -> None:
        """Has what was written on disk, as far as another process is concerned."""
        self._writer.flush()

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        """Ends the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, summaries: list[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step)
        for summary in summaries:
            event.summary.MergeFromString(summary.SerializeToString())
        self._writer.add_event(event)


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
            if tag.split("/")[0] in PREFIXES:
                of_epoch = tag.startswith(EPOCH)
                last[of_epoch] = max(last[of_epoch], events.Tensors(tag)[-1].step)
        there |= {tag for tag in (_LAYOUT, _HPARAMS) if tag in events.summary_metadata}
    return last, there


def _layout(absent: tuple[str, ...]) -> Any:
    """Which charts the custom-scalars dashboard is to show."""
    from tensorboard.plugins.custom_scalar import layout_pb2, summary

    categories: dict[str, list[Any]] = {}
    for category, title, all_patterns in CHARTS:
        if absent and all_patterns[0].startswith(absent):
            continue
        patterns: list[str] = list(all_patterns)
        if patterns[0].startswith(LOGARITHMIC):
            title, patterns = f"{title}, log10", [_LOG10 + pattern for pattern in patterns]
        tags = layout_pb2.MultilineChartContent(tag=[f"^{pattern}$" for pattern in patterns])
        categories.setdefault(category, []).append(layout_pb2.Chart(title=title, multiline=tags))
    return summary.pb(
        layout_pb2.Layout(category=[layout_pb2.Category(title=title, chart=each) for title, each in categories.items()])
    )


def _logarithms(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are charted, by tag; 0 has none."""
    charted = {tag: value for tag, value in values.items() if tag.startswith(LOGARITHMIC) and value != 0}
    return {_LOG10 + tag: math.log10(value) for tag, value in charted.items()}

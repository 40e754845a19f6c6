"""The figure of a report, and TensorBoard's files of it. The figure belongs to no window."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from keras_optkit import arguments

if TYPE_CHECKING:
    from keras_optkit.inspection.report import Report

#: Of more layers, only some have their names on the axis.
_LEGIBLE = 40
_TAG = "inspect"


def draw(report: Report) -> Any:
    """See `Report.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("report.plot needs matplotlib: pip install matplotlib") from error
    layers = report.model.layers
    figure = Figure(figsize=(11, max(3.0, 1.2 + 0.22 * min(len(layers), _LEGIBLE))), layout="constrained")
    axes = figure.subplots(1, 4, sharey=True)
    places = list(range(len(layers)))
    kernels = [layer.kernel for layer in layers]
    _points(axes[0], places, [None if k is None else k.std for k in kernels], "kernel std", "o")
    _points(axes[0], places, [None if k is None else k.asked for k in kernels], "asked", "|")
    _points(axes[1], places, [layer.std for layer in layers], "activation std", "o")
    for name, marker in (("dead", "x"), ("saturated", "+")):
        _points(axes[1], places, [getattr(layer, name) for layer in layers], name, marker)
    _points(axes[2], places, [layer.gradient_norm for layer in layers], "gradient norm", "o")
    _points(axes[3], places, [layer.update_ratio for layer in layers], "update-to-weight ratio", "o")
    warned = {each.where for each in report.warnings}
    for axis, title in zip(axes, ("kernels", "activations", "gradient norm", "update-to-weight ratio"), strict=True):
        axis.set_title(title, fontsize="small")
        axis.set_xscale("log")
        axis.tick_params(labelsize="x-small", which="both")
        axis.grid(axis="x", alpha=0.3)
        for place, layer in enumerate(layers):
            if layer.path in warned:
                axis.axhspan(place - 0.5, place + 0.5, color="tab:red", alpha=0.15)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    some = places[:: -(-len(layers) // _LEGIBLE) or 1]
    names = [_short(layers[place].path) for place in some]
    axes[0].set_yticks(some, names, fontsize="x-small")
    axes[0].set_ylim(len(layers) - 0.5, -0.5)
    return figure


def _points(axis: Any, places: list[int], values: list[float | None], label: str, marker: str) -> None:
    """The values that a logarithmic axis can show."""
    there = [(value, place) for value, place in zip(values, places, strict=True) if value is not None and value > 0]
    if there:
        axis.plot(*zip(*there, strict=True), marker, label=label, markersize=5)


def _short(path: str, length: int = 34) -> str:
    text = path if len(path) <= length else f"...{path[3 - length :]}"
    return text.replace("$", r"\$")


def write(report: Report, log_dir: Any, step: int) -> None:
    """See `Report.to_tensorboard`."""
    directory = arguments.path("log_dir", log_dir)
    arguments.integer("step", step, 0)
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.plugins.image.metadata import create_summary_metadata
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError as error:
        raise ImportError("report.to_tensorboard needs tensorboard: pip install tensorboard") from error
    figure, png = draw(report), io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    width, height = (str(round(100 * inches)).encode() for inches in figure.get_size_inches())
    image = summary_pb2.Summary()
    image.value.add(
        tag=f"{_TAG}/layers",
        metadata=create_summary_metadata(None, "Measurements by layer"),
        tensor=make_tensor_proto([width, height, png.getvalue()]),
    )
    text = "\n".join(f"    {line}" for line in str(report).splitlines())  # Markdown shows it as it is
    writer = EventFileWriter(directory)
    try:
        for summary in (text_pb(f"{_TAG}/report", text), image):
            event = event_pb2.Event(wall_time=time.time(), step=step)
            event.summary.MergeFromString(summary.SerializeToString())
            writer.add_event(event)
    finally:
        writer.close()

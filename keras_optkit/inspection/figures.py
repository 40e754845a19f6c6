"""The figure of a report, and how both are written to sinks. The figure belongs to no window."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from keras_optkit import arguments
from keras_optkit.callbacks.sinks import Opening, Sink

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


def write(report: Report, sink: Any, step: int) -> None:
    """See `Report.to_sink`."""
    if not isinstance(sink, Sink):
        raise TypeError(f"sink must be an ok.callbacks.sinks.Sink, got {sink!r} of type {type(sink).__name__}.")
    arguments.integer("step", step, 0)
    png = io.BytesIO()
    draw(report).savefig(png, format="png", dpi=100)
    text = "\n".join(f"    {line}" for line in str(report).splitlines())  # Markdown shows it as it is
    failed = True
    try:
        sink.open(Opening())
        sink.write_text(f"{_TAG}/report", text, step)
        sink.write_figure(f"{_TAG}/layers", png.getvalue(), step)
        failed = False
    finally:
        sink.close(failed=failed)

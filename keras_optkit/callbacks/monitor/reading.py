"""Reading and plotting what `TrainingMonitor` has written, without TensorBoard."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from keras_optkit.callbacks.charts import CHARTS, LOGARITHMIC
from keras_optkit.callbacks.monitor.files import LINES, records, values_of


class Curve(NamedTuple):
    """One tag of a `TrainingMonitor`.

    Attributes:
        steps: Number of updates at each value, rising.
        values: The values; NaN and infinities are themselves.
    """

    steps: np.ndarray
    values: np.ndarray


def read_monitor(log_dir: str | os.PathLike[str]) -> dict[str, Curve]:
    """Reads what `TrainingMonitor` has written to a directory, also while it is writing.

    It reads the lines of JSON in `monitor.jsonl`, and needs neither TensorBoard nor TensorFlow. A last line that is not
    complete is left out.

    Args:
        log_dir: The directory that the monitor was given.

    Returns:
        Tag to steps and values.

    Raises:
        FileNotFoundError: If no monitor has written there.
        ValueError: If the file has lines that are not a monitor's.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, name="out")])
    model.compile(optimizer="adam", loss="mse")
    with tempfile.TemporaryDirectory() as logs:
        model.fit(x, x[:, :1], batch_size=16, callbacks=[ok.callbacks.TrainingMonitor(logs, every=2)], verbose=0)
        curves = ok.callbacks.read_monitor(logs)
    print(curves["train/loss"].steps, curves["update_ratio/out"].values)
    ```
    """
    path = Path(os.fspath(log_dir)) / LINES
    if not path.exists():
        raise FileNotFoundError(f"log_dir must be the directory of a TrainingMonitor; there is no {path}.")
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records(path):
        for tag, value in values_of(record).items():
            found.setdefault(tag, []).append((record["step"], value))
    return {
        tag: Curve(np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]))
        for tag, pairs in found.items()
    }


def plot_monitor(log_dir: str | os.PathLike[str], columns: int = 3) -> Any:
    """Draws the charts that `TrainingMonitor` lays out for TensorBoard, those for which there are values.

    Args:
        log_dir: The directory that the monitor was given.
        columns: How many charts there are in a row.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        FileNotFoundError: If no monitor has written there.
        ImportError: Without matplotlib.

    Example:
    ```python
    import tempfile

    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer="adam", loss="mse")
    with tempfile.TemporaryDirectory() as logs:
        model.fit(x, x[:, :1], batch_size=4, callbacks=[ok.callbacks.TrainingMonitor(logs)], verbose=0)
        ok.callbacks.plot_monitor(logs).savefig("monitor.png")
    ```
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    curves = read_monitor(log_dir)
    charts = []
    for category, title, patterns in CHARTS:
        tags = [tag for tag in curves if any(re.fullmatch(pattern, tag) for pattern in patterns)]
        if tags:
            charts.append((f"{category}: {title}", tags))
    rows = -(-len(charts) // columns)
    figure = Figure(figsize=(5 * columns, 3 * max(rows, 1)), layout="constrained")
    for place, (title, tags) in enumerate(charts, 1):
        axes = figure.add_subplot(rows, columns, place, title=title, xlabel="updates")
        colors = colormaps["turbo"](np.linspace(0.05, 0.95, len(tags))) if len(tags) > 10 else [None] * len(tags)
        for tag, color in zip(tags, colors, strict=True):
            axes.plot(*curves[tag], marker=".", label=tag, color=color)
        if tags[0].startswith(LOGARITHMIC):
            axes.set_yscale("log", nonpositive="mask")
        # beside the chart, however many there are
        axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1), ncols=-(-len(tags) // 24))
    return figure


def charts_png(log_dir: str | None) -> bytes:
    """The charts of `plot_monitor` as the bytes of a PNG file; without a directory, nothing.

    Raises:
        ImportError: Without matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("figures=True needs matplotlib: pip install matplotlib") from error
    if log_dir is None:
        return b""
    file = io.BytesIO()
    plot_monitor(log_dir).savefig(file, format="png", dpi=80)
    return file.getvalue()

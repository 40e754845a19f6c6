"""Runs of Trackio."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_optkit.callbacks.sinks.sink import RunSink


class Trackio(RunSink):
    """Writes to a run of Trackio: `pip install keras-optkit[trackio]`.

    Each write is one `run.log` at the number of updates as the step. Texts are `trackio.Markdown`, histograms
    `trackio.Histogram`, figures `trackio.Image`. A run of Trackio has its config from `trackio.init(config=...)`;
    hyperparameters are not written.

    When not to use it: where hyperparameters are to be compared and `trackio.init` is not given them.

    Args:
        run: What `trackio.init` has returned, which you finish; or a function without arguments that returns
            `trackio.init(...)`, called when a `fit` begins. That run is finished when the `fit` ends.

    Raises:
        TypeError: If `run` is None, or a function that needs arguments.
        ImportError: When a `fit` begins, without trackio.

    Example:
    ```python
    import keras_optkit as ok


    def begin():
        import trackio

        return trackio.init("digits")


    monitor = ok.callbacks.TrainingMonitor("logs", sinks=[ok.callbacks.sinks.Trackio(begin)])
    ```
    """

    def __init__(self, run: Any):
        if run is None:
            raise TypeError("run must be a run of trackio.init or a function that returns one, got None.")
        super().__init__(run)

    def _active(self) -> Any:
        _package()

    def _finish(self, *, failed: bool) -> None:  # noqa: ARG002  (Trackio keeps no status)
        self._now.finish()

    def write_values(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> None:  # noqa: ARG002
        """Logs the values."""
        self._now.log({tag: float(value) for tag, value in values.items()}, step=step)

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Logs the text as Markdown."""
        self._now.log({tag: _package().Markdown(text)}, step=step)

    def write_histograms(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Logs histograms, of the elements that are finite."""
        kind = _package().Histogram
        self._now.log({tag: kind(np.asarray(array, "float64")) for tag, array in arrays.items()}, step=step)

    def write_figure(self, tag: str, png: bytes, step: int) -> None:
        """Logs an image."""
        from PIL import Image

        self._now.log({tag: _package().Image(Image.open(io.BytesIO(png)))}, step=step)


def _package() -> Any:
    try:
        import trackio
    except ImportError as error:
        raise ImportError("sinks.Trackio needs trackio: pip install 'keras-optkit[trackio]'.") from error
    return trackio

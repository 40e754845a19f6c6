"""Runs of Weights & Biases."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_optkit.callbacks.charts import PREFIXES
from keras_optkit.callbacks.sinks.sink import Opening, RunSink

#: The value that is the horizontal axis of all others.
STEP = "update"


class WandB(RunSink):
    """Writes to a run of Weights & Biases: `pip install keras-optkit[wandb]`.

    Each write is one `run.log`, with the number of updates as the value `update`, which is declared as the axis of all
    values of the monitor (`run.define_metric`). W&B's own step is left alone, so that you can log to the same run, at
    any step. Texts are `wandb.Html`, histograms `wandb.Histogram`, figures `wandb.Image`; hyperparameters are set in
    `run.config`, except those that it has.

    When not to use it: with `wandb.init(sync_tensorboard=True)`, which sends the same values from TensorBoard's files.

    Args:
        run: What `wandb.init` has returned, which you finish; None for `wandb.run`; or a function without arguments
            that returns `wandb.init(...)`, called when a `fit` begins. That run is finished when the `fit` ends.

    Raises:
        TypeError: If `run` is a function that needs arguments.
        ImportError: When a `fit` begins, without wandb.
        RuntimeError: When a `fit` begins without a run.

    Example:
    ```python
    import keras_optkit as ok


    def begin():
        import wandb

        return wandb.init(project="digits", mode="offline")


    monitor = ok.callbacks.TrainingMonitor("logs", sinks=[ok.callbacks.sinks.WandB(begin)])
    ```
    """

    def _active(self) -> Any:
        return _package().run

    def _finish(self, *, failed: bool) -> None:
        self._now.finish(exit_code=int(failed))

    def open(self, opening: Opening) -> None:
        """Looks the run up, or begins it, and declares the axis."""
        super().open(opening)
        self._now.define_metric(STEP, hidden=True)
        for prefix in sorted(PREFIXES):
            self._now.define_metric(f"{prefix}/*", step_metric=STEP)

    def write_values(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> None:  # noqa: ARG002
        """Logs the values."""
        self._now.log({**{tag: float(value) for tag, value in values.items()}, STEP: step})

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Sets what the config has not yet."""
        self._now.config.update({name: value for name, value in hparams.items() if name not in self._now.config})

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Logs the text as preformatted HTML."""
        page = _package().Html(f'<pre style="white-space: pre-wrap">{html.escape(text)}</pre>')
        self._now.log({tag: page, STEP: step})

    def write_histograms(self, arrays: Mapping[str, np.ndarray], step: int) -> None:
        """Logs histograms, of the elements that are finite."""
        kind = _package().Histogram
        found = {tag: np.asarray(array, "float64") for tag, array in arrays.items()}
        self._now.log({**{tag: kind(array[np.isfinite(array)]) for tag, array in found.items()}, STEP: step})

    def write_figure(self, tag: str, png: bytes, step: int) -> None:
        """Logs an image."""
        from PIL import Image

        self._now.log({tag: _package().Image(Image.open(io.BytesIO(png))), STEP: step})


def _package() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ImportError("sinks.WandB needs wandb: pip install 'keras-optkit[wandb]'.") from error
    return wandb

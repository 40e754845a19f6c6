"""Runs of MLflow."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_optkit.callbacks.sinks.sink import Opening, RunSink

#: So many metrics and parameters MLflow takes in one request.
_METRICS, _PARAMS = 1000, 100

_REFUSED = re.compile(r"[^\w.\- /]")  # in names, on every system


class MLflow(RunSink):
    """Writes to a run of MLflow, local or on a server: `pip install keras-optkit[mlflow]`.

    Values are metrics with the number of updates as the step, hyperparameters are parameters, except those that the run
    has. Texts and figures are artifacts, `<tag>/<step>.md` and `<tag>/<step>.png`. MLflow has no histograms. In names,
    a character that MLflow refuses, such as `>`, is written as its code point: `_x3e_`. What MLflow stores of infinite
    values depends on its store; SQL has the largest finite number.

    When not to use it: with `mlflow.keras.autolog()` or `mlflow.tensorflow.autolog()`, unless the values of epochs may
    be there twice.

    Args:
        run: What `mlflow.start_run` has returned, which you end; None for the active run; or a function without
            arguments that returns `mlflow.start_run(...)`, called when a `fit` begins. That run ends with the `fit`, as
            failed if an exception has ended it.

    Raises:
        TypeError: If `run` is a function that needs arguments.
        ImportError: When a `fit` begins, without mlflow.
        RuntimeError: When a `fit` begins without a run.

    Example:
    ```python
    import keras_optkit as ok


    def begin():
        import mlflow

        mlflow.set_tracking_uri("sqlite:///mlflow.db")
        return mlflow.start_run()


    monitor = ok.callbacks.TrainingMonitor("logs", sinks=[ok.callbacks.sinks.MLflow(begin)])
    ```
    """

    def _active(self) -> Any:
        return _package().active_run()

    def _finish(self, *, failed: bool) -> None:
        status = "FAILED" if failed else "FINISHED"
        active = self._active()
        if active is not None and active.info.run_id == self._id:
            _package().end_run(status)  # and it is no longer the active one
        else:
            self._client.set_terminated(self._id, status)

    def open(self, opening: Opening) -> None:
        """Looks the run up, or begins it."""
        super().open(opening)
        self._client = _package().MlflowClient()
        self._id = self._now.info.run_id

    def write_values(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> None:  # noqa: ARG002
        """Logs metrics."""
        metric, now = _package().entities.Metric, int(1000 * time.time())
        metrics = [metric(_name(tag), float(value), now, step) for tag, value in values.items()]
        for first in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _METRICS])

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Logs the parameters that the run has not yet."""
        kind, known = _package().entities.Param, self._client.get_run(self._id).data.params
        named = {_name(name): str(value) for name, value in hparams.items()}
        params = [kind(name, value) for name, value in named.items() if name not in known]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(self._id, params=params[first : first + _PARAMS])

    def write_text(self, tag: str, text: str, step: int) -> None:
        """Logs an artifact."""
        self._client.log_text(self._id, text, f"{_name(tag)}/{step}.md")

    def write_figure(self, tag: str, png: bytes, step: int) -> None:
        """Logs an artifact."""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / f"{step}.png"
            file.write_bytes(png)
            self._client.log_artifact(self._id, str(file), _name(tag))


def _name(tag: str) -> str:
    """A tag as a name that MLflow takes."""
    return _REFUSED.sub(lambda match: f"_x{ord(match[0]):x}_", tag)


def _package() -> Any:
    try:
        import mlflow
    except ImportError as error:
        raise ImportError("sinks.MLflow needs mlflow: pip install 'keras-optkit[mlflow]'.") from error
    return mlflow

"""The report of `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from keras_optkit import arguments
from keras_optkit.advice import Finding, LayerReport, ModelReport
from keras_optkit.callbacks.sinks import Sink, TensorBoard
from keras_optkit.files import finite
from keras_optkit.inspection import figures
from keras_optkit.tables import table


@dataclass(frozen=True)
class Report:
    """Measurements of a model on one batch, and what is found in them.

    Attributes:
        model: The measurements.
        warnings: What is likely to harm training, causes before their consequences.
        hints: What costs little: biases that a batch normalization removes, weight decay on biases and scales.
        unmeasured: What could not be measured, and why.
    """

    model: ModelReport
    warnings: Sequence[Finding] = ()
    hints: Sequence[Finding] = ()
    unmeasured: Sequence[str] = field(default_factory=tuple)

    def to_dict(self) -> dict[str, Any]:
        """Measurements, warnings and hints as JSON can hold them; numbers that are not finite are strings."""
        return finite(asdict(self))

    def table(self) -> str:
        """The measurements of the layers as text."""
        head = ["layer", "kind", "activation", "fans", "kernel std", "asked", "mean", "std", "saturated", "dead"]
        rows = [[*_cells(layer), _share(layer.saturated), _share(layer.dead)] for layer in self.model.layers]
        for row, layer in zip(rows, self.model.layers, strict=True):
            row += [_number(layer.gradient_norm), _number(layer.update_ratio)]
        return "\n".join(table([[*head, "gradient", "update"], *rows], left=(0, 1, 2), rule=True))

    def __str__(self) -> str:
        lines = [self.table(), ""]
        model = self.model
        if model.loss_value is not None:
            after = "" if model.update is None else f", {_number(model.update.loss_after)} after one update"
            lines.append(f"Loss {_number(model.loss_value)}{after} ({model.examples} examples).")
        lines.append(f"{len(self.warnings)} warning{'s' * (len(self.warnings) != 1)}.")
        lines += [f"{place}. {each}" for place, each in enumerate(self.warnings, 1)]
        lines += [f"Hint: {each}" for each in self.hints]
        lines += [f"Not measured: {each}" for each in self.unmeasured]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Report(layers={len(self.model.layers)}, warnings={[each.rule for each in self.warnings]})"

    def plot(self) -> Any:
        """Draws the measurements by layer: kernels, activations, gradients and updates.

        Returns:
            A `matplotlib.figure.Figure`; `savefig` writes it.

        Raises:
            ImportError: Without matplotlib.
        """
        return figures.draw(self)

    def to_tensorboard(self, log_dir: Any, step: int = 0) -> None:
        """Writes the report to TensorBoard's files: `to_sink` with `ok.callbacks.sinks.TensorBoard(log_dir)`.

        Args:
            log_dir: The directory of the run.
            step: The step at which TensorBoard shows it, >= 0.

        Raises:
            ImportError: Without tensorboard or matplotlib.
            TypeError: An argument is of the wrong type.
            ValueError: `log_dir` is empty, or `step` is negative.
        """
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError("report.to_tensorboard needs tensorboard: pip install tensorboard") from error
        self.to_sink(TensorBoard(arguments.path("log_dir", log_dir)), step)

    def to_sink(self, sink: Sink, step: int = 0) -> None:
        """Writes the report as the text "inspect/report", and the figure of `plot` as "inspect/layers".

        Args:
            sink: Where to, such as `ok.callbacks.sinks.WandB()`; it is opened and closed.
            step: The step that they belong to, >= 0.

        Raises:
            ImportError: Without matplotlib or the package of the sink.
            TypeError: An argument is of the wrong type.
            ValueError: `step` is negative, or the sink is a `TensorBoard` without a directory.
        """
        figures.write(self, sink, step)


def _cells(layer: LayerReport) -> list[str]:
    kernel = layer.kernel
    fans = "-" if kernel is None else f"{kernel.fan_in}, {kernel.fan_out}"
    std, asked = (None, None) if kernel is None else (kernel.std, kernel.asked)
    numbers = [_number(each) for each in (std, asked, layer.mean, layer.std)]
    frozen = "" if layer.trainable else " (frozen)"
    return [layer.path, f"{layer.kind}{frozen}", layer.activation or "-", fans, *numbers]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"

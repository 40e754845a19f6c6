"""What is measured of a model, and what is found in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from keras_optkit.tables import table


@dataclass(frozen=True)
class LayerReport:
    """What is measured of a layer that has weights or an activation of its own; None is what it does not have.

    `fan_in`, `fan_out`, `kernel_std` and `kernel_key` are of its first kernel, and equal keys mean equal values. `dead`
    is the share of units that are 0 on the whole batch, `saturated` the share of outputs where the activation is flat.
    `gradient_norm` is NaN if a weight that is trained has no gradient.
    """

    path: str
    kind: str
    activation: str | None = None
    trainable: bool = True
    is_output: bool = False
    feeds_batch_norm: bool = False
    has_bias: bool = False
    fan_in: int | None = None
    fan_out: int | None = None
    kernel_std: float | None = None
    kernel_key: str | None = None
    mean: float | None = None
    std: float | None = None
    dead: float | None = None
    saturated: float | None = None
    gradient_norm: float | None = None
    update_ratio: float | None = None


@dataclass(frozen=True)
class ModelReport:
    """What is measured of a model as a whole; `layers` are in the order of their calls."""

    layers: tuple[LayerReport, ...]
    input_scale: float | None = None
    loss: str | None = None
    from_logits: bool | None = None
    loss_value: float | None = None
    output_activation: str | None = None
    classes: int | None = None
    label_range: tuple[float, float] | None = None
    frequencies: tuple[float, ...] | None = None
    predicted: tuple[float, ...] | None = None
    optimizer: str | None = None
    has_l2: bool = False


@dataclass(frozen=True)
class Finding:
    """What a rule of advice found; the smaller `severity`, the nearer to a cause."""

    rule: str
    severity: int
    where: str
    reason: str
    fix: str


class Report:
    """Measurements of a model on one batch, and what is found in them, causes before their consequences."""

    def __init__(self, model: ModelReport, warnings: list[Finding]):
        self.model = model
        self.warnings = warnings

    def to_dict(self) -> dict[str, Any]:
        """Measurements and warnings as JSON can hold them."""
        return {"model": asdict(self.model), "warnings": [asdict(each) for each in self.warnings]}

    def __str__(self) -> str:
        numbers = ("kernel_std", "mean", "std", "dead", "saturated", "gradient_norm", "update_ratio")
        head = ["layer", "kind", *numbers]
        rows = [
            [each.path, each.kind, *(_number(getattr(each, name)) for name in numbers)] for each in self.model.layers
        ]
        lines = table([head, *rows], left=(0, 1), rule=True)
        if self.model.optimizer is None:
            lines.append("Without an optimizer and labels there are no update ratios.")
        lines += [f"{each.rule} ({each.where}): {each.reason} {each.fix}" for each in self.warnings]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"

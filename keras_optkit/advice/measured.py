"""What is measured of a model, and what is found in it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KernelReport:
    """A kernel.

    Attributes:
        name: The name of the variable.
        shape: Its shape.
        fan_in: Inputs of a unit.
        fan_out: Outputs of an input.
        std: The standard deviation of its elements.
        mean: Their mean.
        asked: gain / sqrt(fan_in), the standard deviation that the activation asks for; None for an activation without
            a known gain.
        low: The smallest standard deviation of usual initializers; None like `asked`.
        high: The largest one.
        key: Equal for kernels that are equal; None for one that was not drawn, such as an identity.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    fan_out: int
    std: float
    mean: float = 0.0
    asked: float | None = None
    low: float | None = None
    high: float | None = None
    key: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """A layer that has weights of its own or an activation; None is what it does not have or could not be read.

    Attributes:
        path: Its path in the model, which no other layer has.
        kind: The name of its class.
        activation: The name of its activation, or of that of an activation layer behind it.
        trainable: Whether some of its weights are trained, or it has none.
        is_output: Whether its output is an output of the model, or is so after an activation layer.
        was_called: Whether the model has called it.
        feeds_norm: Whether its output goes into a normalization that removes its scale.
        feeds_batch_norm: Whether that is a `BatchNormalization`.
        has_bias: Whether it has a bias.
        behind_trained: Of a frozen layer, whether its input depends on weights that are trained.
        sees_input: Whether it is the first layer with a kernel, or is given an input of the model itself.
        kernels: Its kernels.
        input_rms: The root mean square of its input, for layers with a kernel.
        input_mean: The mean of it.
        input_differs: Whether the examples of its input differ from each other.
        mean: The mean of its output.
        std: The standard deviation of its output.
        dead: The share of units that are 0 on the whole batch, of activations that can be.
        always_active: The share of units that are above 0 on the whole batch.
        saturated: The share of outputs where the activation is flat.
        gradient_norm: The norm of the gradient of its weights; 0 where there is none.
        has_gradient: Whether all of its trained weights have a gradient from more than a penalty on them.
        has_zero_gradient: Whether that gradient is 0 in all of them.
        update_ratio: The norm of the change of its kernels and tables in one update, over their norm.
    """

    path: str
    kind: str
    activation: str | None = None
    trainable: bool = True
    is_output: bool = False
    was_called: bool = True
    feeds_norm: bool = False
    feeds_batch_norm: bool = False
    has_bias: bool = False
    behind_trained: bool | None = None
    sees_input: bool = False
    kernels: tuple[KernelReport, ...] = ()
    input_rms: float | None = None
    input_mean: float | None = None
    input_differs: bool | None = None
    mean: float | None = None
    std: float | None = None
    dead: float | None = None
    always_active: float | None = None
    saturated: float | None = None
    gradient_norm: float | None = None
    has_gradient: bool | None = None
    has_zero_gradient: bool | None = None
    update_ratio: float | None = None

    @property
    def kernel(self) -> KernelReport | None:
        """Its first kernel."""
        return self.kernels[0] if self.kernels else None


@dataclass(frozen=True)
class OutputReport:
    """An output of the model, its loss and its labels.

    Attributes:
        name: The name of the output; "" of a single one.
        loss: The name of the function of the loss.
        from_logits: Whether the loss takes logits; None for one that has no such argument.
        activation: The activation that the output has been through; None where that is not known.
        units: The length of the last axis of the output.
        range: Its smallest and largest element.
        is_distribution: Whether its elements are at least 0 and add up to 1.
        label_range: The smallest and largest label.
        labels_are_whole: Whether all labels are whole numbers.
        labels_add_up: Whether the labels of each example add up to 1.
        frequencies: Of the classes in the labels, with one more count for each, so that few examples say little.
        predicted: The mean prediction for each class.
        by_bias: The prediction of the bias alone.
    """

    name: str = ""
    loss: str | None = None
    from_logits: bool | None = None
    activation: str | None = None
    units: int | None = None
    range: tuple[float, float] | None = None
    is_distribution: bool | None = None
    label_range: tuple[float, float] | None = None
    labels_are_whole: bool | None = None
    labels_add_up: bool | None = None
    frequencies: tuple[float, ...] | None = None
    predicted: tuple[float, ...] | None = None
    by_bias: tuple[float, ...] | None = None


@dataclass(frozen=True)
class UpdateReport:
    """One update by the optimizer that the model was compiled with, on a copy of it.

    Attributes:
        optimizer: The names of the classes of the optimizer, of those in it, and of their rules.
        rate: Its learning rate.
        rate_ahead: The highest rate that its schedule has in the next 100,000 updates, over `rate`.
        size: The root mean square of the change of a kernel or table, over the rate; the median of all. It is about 1
            in the first step of Adam.
        spread: The third quartile of it over the first.
        momentum: Its momentum, if the change of the first step grows by 1 / (1 - momentum).
        finds_rate: Whether it finds its learning rate by itself.
        loss_after: The loss after the update, on the same batch with the same random numbers.
        decayed_vectors: Biases and scales that weight decay applies to.
    """

    optimizer: tuple[str, ...]
    rate: float | None = None
    rate_ahead: float = 1.0
    size: float | None = None
    spread: float | None = None
    momentum: float = 0.0
    finds_rate: bool = False
    loss_after: float | None = None
    decayed_vectors: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelReport:
    """What is measured of a model.

    Attributes:
        layers: Its layers in the order of their calls.
        outputs: Its outputs that have a loss; without labels none.
        examples: The number of examples in the batch.
        input_rms: The largest root mean square of an input of numbers; of integers, too.
        loss_value: The loss, with penalties.
        problem: Why the loss could not be computed.
        update: One update of the weights.
        penalized: The paths of weights with an L2 penalty.
        zero_factors: The paths of kernels and scales that are all 0 and have a gradient.
    """

    layers: tuple[LayerReport, ...] = ()
    outputs: tuple[OutputReport, ...] = ()
    examples: int | None = None
    input_rms: float | None = None
    loss_value: float | None = None
    problem: str | None = None
    update: UpdateReport | None = None
    penalized: tuple[str, ...] = ()
    zero_factors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a rule has found.

    Attributes:
        rule: The name of the rule.
        severity: The smaller, the nearer to a cause.
        where: The path of a layer, or "loss", "y", "x", "optimizer".
        reason: What was measured, and what it should be.
        fix: What to do.
        is_hint: Whether the model trains well without it.
        step: Of a run, the update since which it has been seen.
    """

    rule: str
    severity: int
    where: str
    reason: str
    fix: str
    is_hint: bool = False
    step: int | None = None

    def __str__(self) -> str:
        since = "" if self.step is None else f", since update {self.step}"
        return f"{self.rule} ({self.where}{since}): {self.reason} {self.fix}"

"""Rules of advice: pure functions of what was measured of a model. The smaller a severity, the nearer to a cause."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median

from keras_optkit.inspection.report import Finding, LayerReport, ModelReport

#: Inputs are asked to have a root mean square of about 1 (LeCun et al. 1998, Efficient BackProp, 4.3); pixels up to 255
#: have more than 100, and a feature in one-hot form less than 1.
LARGEST_INPUT = 10.0
#: How often a kernel may be larger than He's, or smaller than Glorot's: the two themselves are up to 2 apart
#: (He et al. 2015, arXiv 1502.01852; Glorot and Bengio 2010).
KERNEL_FACTOR = 4.0
#: Shares of dead units and of saturated outputs; half are expected to be negative, but not on the whole batch.
DEAD, SATURATED = 0.5, 0.5
#: A training step usually changes weights by about 1e-3 of their norm.
LARGEST_UPDATE, SMALLEST_UPDATE = 0.1, 1e-6
#: How much more the outputs of one layer may vary than those of another before.
GROWTH = 1e3
#: Nats from the frequencies of the labels to the mean prediction.
DIVERGENCE = 0.5

_NORMALIZED = {
    "categorical_crossentropy": ("softmax",),
    "sparse_categorical_crossentropy": ("softmax",),
    "binary_crossentropy": ("sigmoid", "softmax"),
}
_GAIN = {"relu": math.sqrt(2), "leaky_relu": math.sqrt(2), "gelu": math.sqrt(2), "silu": math.sqrt(2), "tanh": 5 / 3}
_ADAPTIVE = ("adam", "nadam", "adamax", "rmsprop", "adagrad", "adadelta", "lion")


def output_and_loss(model: ModelReport) -> Iterator[Finding]:
    """Whether the loss expects probabilities or logits, and the output is that."""
    normalized = _NORMALIZED.get(model.loss or "")
    if not normalized or model.from_logits is None or model.output_activation is None:
        return
    is_normalized = model.output_activation in normalized
    if is_normalized and model.from_logits:
        yield Finding(
            "output_and_loss",
            10,
            "loss",
            f"{model.loss} has from_logits=True, but the output has been through {model.output_activation}.",
            "Set from_logits=False, or remove the activation.",
        )
    if model.output_activation == "linear" and not model.from_logits:
        yield Finding(
            "output_and_loss",
            10,
            "loss",
            f"{model.loss} has from_logits=False, but the output is linear.",
            f"Set from_logits=True, or end with {normalized[0]}.",
        )


def labels(model: ModelReport) -> Iterator[Finding]:
    """Whether labels are in the range that a cross-entropy is defined for."""
    if model.label_range is None or model.loss not in _NORMALIZED:
        return
    low, high = model.label_range
    allowed = (model.classes or 1) - 1 if model.loss == "sparse_categorical_crossentropy" else 1
    if low < 0 or high > allowed:
        reason = f"{model.loss} needs labels from 0 to {allowed}, these are from {low:g} to {high:g}."
        yield Finding("labels", 11, "y", reason, "Map the labels, or choose the loss for them.")


def unscaled_inputs(model: ModelReport) -> Iterator[Finding]:
    """Whether inputs are far larger than 1."""
    if model.input_scale is not None and not model.input_scale <= LARGEST_INPUT:
        reason = f"The root mean square of the inputs is {model.input_scale:.3g}."
        yield Finding("unscaled_inputs", 20, "x", reason, "Scale them to a mean of 0 and a variance of 1.")


def identical_layers(model: ModelReport) -> Iterator[Finding]:
    """Whether several layers begin with the same kernel."""
    found = defaultdict(list)
    for layer in model.layers:
        if layer.kernel_key and layer.kernel_std:
            found[layer.kernel_key].append(layer.path)
    for paths in found.values():
        if len(paths) > 1:
            reason = f"The kernels of {len(paths)} layers are equal: {', '.join(paths)}."
            yield Finding("identical_layers", 30, paths[0], reason, "Give each layer an initializer with its own seed.")


def frozen(model: ModelReport) -> Iterator[Finding]:
    """Whether a layer is frozen behind one that is trained."""
    trained_before = False
    for layer in model.layers:
        if layer.kernel_std is None:
            continue
        if not layer.trainable and trained_before:
            reason = "Its kernel is frozen, but a layer before it is trained."
            yield Finding(
                "frozen", 31, layer.path, reason, "Set trainable=True and compile again, if it is by mistake."
            )
        trained_before |= layer.trainable


def kernel_scale(model: ModelReport) -> Iterator[Finding]:
    """Whether kernels have the size that their fans and activation ask for."""
    for layer in model.layers:
        if layer.kernel_std is None or not layer.fan_in or not layer.fan_out:
            continue
        low, high = kernel_limits(layer)
        if layer.kernel_std < low or layer.kernel_std > high:
            reason = (
                f"The standard deviation of the kernel is {layer.kernel_std:.3g}; with fans of {layer.fan_in} and "
                f"{layer.fan_out} it should be from {low:.3g} to {high:.3g}."
            )
            yield Finding("kernel_scale", 40, layer.path, reason, "Use HeNormal for ReLU, else GlorotUniform.")


def kernel_limits(layer: LayerReport) -> tuple[float, float]:
    """The smallest and largest standard deviation of a kernel that is not reported."""
    fan_in, fan_out = layer.fan_in or 1, layer.fan_out or 1
    he = _GAIN.get(layer.activation or "linear", 1.0) / math.sqrt(fan_in)
    glorot = math.sqrt(2 / (fan_in + fan_out))
    return min(he, glorot) / KERNEL_FACTOR, max(he, glorot) * KERNEL_FACTOR


def update_size(model: ModelReport) -> Iterator[Finding]:
    """Whether an update changes the weights by a usual share."""
    ratios = [layer.update_ratio for layer in model.layers if layer.update_ratio]
    if ratios and not SMALLEST_UPDATE <= (middle := median(ratios)) <= LARGEST_UPDATE:
        reason = f"An update changes the weights by {middle:.3g} of their norm (median of layers)."
        fix = f"{'Lower' if middle > LARGEST_UPDATE else 'Raise'} the learning rate; see find_learning_rate."
        yield Finding("update_size", 45, "optimizer", reason, fix)


def dead_units(model: ModelReport) -> Iterator[Finding]:
    """Whether many units are 0 on the whole batch."""
    for layer in model.layers:
        if layer.dead is not None and layer.dead >= DEAD:
            reason = f"{layer.dead:.0%} of its units are 0 on the whole batch."
            yield Finding("dead_units", 50, layer.path, reason, "Check its bias and kernel, or use a leaky ReLU.")


def saturation(model: ModelReport) -> Iterator[Finding]:
    """Whether many outputs inside the model are where the activation is flat."""
    for layer in model.layers:
        if layer.saturated is not None and layer.saturated >= SATURATED and not layer.is_output:
            reason = f"{layer.saturated:.0%} of its outputs are where {layer.activation} is flat."
            yield Finding("saturation", 51, layer.path, reason, "Use smaller weights, or normalize before it.")


def growth(model: ModelReport) -> Iterator[Finding]:
    """Whether outputs get much larger from layer to layer."""
    smallest = math.inf
    for layer in model.layers:
        if layer.std is None:
            continue
        if layer.std > GROWTH * smallest or not math.isfinite(layer.std):
            reason = f"Its outputs have a standard deviation of {layer.std:.3g}, a layer before it {smallest:.3g}."
            yield Finding("growth", 55, layer.path, reason, "Use smaller kernels, or normalize between layers.")
            return
        smallest = min(smallest, layer.std or math.inf)


def missing_gradient(model: ModelReport) -> Iterator[Finding]:
    """Whether weights that are trained have no gradient, or one of 0."""
    for layer in model.layers:
        if layer.gradient_norm is not None and (layer.gradient_norm == 0 or math.isnan(layer.gradient_norm)):
            reason = "A weight has no gradient, or a gradient of 0 or NaN."
            fix = "Check that the loss depends on the layer, by functions with a derivative."
            yield Finding("missing_gradient", 60, layer.path, reason, fix)


def output_bias(model: ModelReport) -> Iterator[Finding]:
    """Whether predictions begin near the frequencies of the classes."""
    if not model.frequencies or not model.predicted or len(model.frequencies) != len(model.predicted):
        return
    pairs = zip(model.frequencies, model.predicted, strict=True)
    divergence = sum(f * math.log(f / max(p, 1e-12)) for f, p in pairs if f > 0)
    if divergence > DIVERGENCE:
        reason = f"The mean prediction is {divergence:.2f} nats from the frequencies of the labels."
        yield Finding("output_bias", 70, "output", reason, "Start the output bias at the log of the frequencies.")


def l2_and_adaptive(model: ModelReport) -> Iterator[Finding]:
    """Whether an L2 penalty goes through an optimizer that divides it away (Loshchilov and Hutter 2019)."""
    if model.has_l2 and (model.optimizer or "").lower().startswith(_ADAPTIVE):
        reason = f"{model.optimizer} divides the gradient of the L2 penalty by that of the loss."
        yield Finding("l2_and_adaptive", 80, "optimizer", reason, "Use AdamW's weight_decay instead.")


def bias_before_batch_norm(model: ModelReport) -> Iterator[Finding]:
    """Whether a bias is added that the batch normalization behind it removes."""
    for layer in model.layers:
        if layer.feeds_batch_norm and layer.has_bias and layer.activation in (None, "linear"):
            reason = "Its bias is removed by the batch normalization behind it."
            yield Finding("bias_before_batch_norm", 90, layer.path, reason, "Set use_bias=False.")


RULES: tuple[Callable[[ModelReport], Iterator[Finding]], ...] = (
    output_and_loss,
    labels,
    unscaled_inputs,
    identical_layers,
    frozen,
    kernel_scale,
    update_size,
    dead_units,
    saturation,
    growth,
    missing_gradient,
    output_bias,
    l2_and_adaptive,
    bias_before_batch_norm,
)


def findings(model: ModelReport) -> list[Finding]:
    """What all rules find, causes first; of one severity, in the order of the layers."""
    return sorted((found for rule in RULES for found in rule(model)), key=lambda found: found.severity)

"""Rules about inputs, outputs, labels and the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator

from keras_optkit.advice.measured import Finding, ModelReport, OutputReport

#: Losses that are cross-entropies, by name.
CATEGORICAL = ("categorical_crossentropy", "categorical_focal_crossentropy")
SPARSE = ("sparse_categorical_crossentropy",)
BINARY = ("binary_crossentropy", "binary_focal_crossentropy")
#: have 100 or more, up to 16 about 8; standardized features have 1, in one-hot form less.
LARGEST_INPUT, SMALLEST_INPUT = 5.0, 1e-3
#: Nats from the frequencies of the labels to a prediction.
DIVERGENCE = 0.5


def output_and_loss(model: ModelReport) -> Iterator[Finding]:
    """Whether a cross-entropy expects probabilities or logits, and the output is that."""
    for output in model.outputs:
        crossentropy = output.loss in (*CATEGORICAL, *SPARSE, *BINARY)
        if crossentropy and output.from_logits is not None and output.range is not None:
            found = _of_output(output)
            if found:
                yield Finding("output_and_loss", 10, _loss_of(output), *found)


def _of_output(output: OutputReport) -> tuple[str, str] | None:
    """What is wrong, and what to do."""
    binary = output.loss in BINARY
    wanted = "sigmoid" if binary else "softmax"
    assert output.range is not None
    low, high = output.range
    # behind an operation that is no layer, only the numbers tell
    inside = binary and output.activation is None and low > 0 and high < 1
    turned = output.activation in ("sigmoid", "softmax") or (not binary and output.is_distribution) or inside
    if output.from_logits and turned:
        by = output.activation if output.activation in ("sigmoid", "softmax") else wanted
        return (
            f"{output.loss} has from_logits=True, but the output has been through {by}.",
            f"Set from_logits=False, or remove the {by}.",
        )
    if output.from_logits and output.activation in ("relu", "tanh"):
        return (
            f"{output.loss} has from_logits=True, but the output has been through {output.activation}, which limits "
            "the logits.",
            "End with a linear layer.",
        )
    if not output.from_logits and (low < 0 or high > 1 or output.activation == "linear"):
        return (
            f"{output.loss} has from_logits=False, but the output is no probability: it is from {low:.3g} to "
            f"{high:.3g}.",
            f"Set from_logits=True, or end with {wanted}.",
        )
    if output.units == 1 and output.activation == "softmax":
        return "A softmax over one unit is always 1.", "Use sigmoid for one unit."
    if output.units == 1 and not binary:
        return (
            f"{output.loss} is over classes, but the output has one unit.",
            "Use binary_crossentropy, or a unit each.",
        )
    if not binary and not output.from_logits and output.is_distribution is False:
        return (
            f"{output.loss} is over classes, but the outputs of an example do not add up to 1.",
            "End with softmax, or use binary_crossentropy for labels that do not exclude each other.",
        )
    return None


def labels(model: ModelReport) -> Iterator[Finding]:
    """Whether labels are what the loss, or the activation of the output, is defined for."""
    said = False
    for output in model.outputs:
        found = _of_labels(output)
        if found:
            said = True
            yield Finding("labels", 11, "y", *found)
    if model.problem is not None and not said:
        yield Finding("labels", 11, "y", f"The loss cannot be computed: {model.problem}.", "Match labels and loss.")


def _of_labels(output: OutputReport) -> tuple[str, str] | None:
    if output.label_range is None:
        return None
    low, high = output.label_range
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"Labels are from {low:g} to {high:g}, which is not finite.", "Remove or replace these examples."
    if output.loss in SPARSE:
        last = (output.units or 1) - 1
        if low < 0 or high > last or not output.labels_are_whole:
            return (
                f"{output.loss} needs whole labels from 0 to {last} for {last + 1} units, these are from {low:g} to "
                f"{high:g}.",
                "Map the labels to 0, 1, 2 and so on, or set the number of units.",
            )
    elif output.loss in CATEGORICAL:
        if low < 0 or high > 1 or output.labels_add_up is False:
            return (
                f"{output.loss} needs labels that add up to 1 for each example, these are from {low:g} to {high:g}.",
                "Use keras.utils.to_categorical, or a sparse loss for numbers of classes.",
            )
    elif output.loss in BINARY:
        if low < 0 or high > 1:
            return (
                f"{output.loss} needs labels from 0 to 1, these are from {low:g} to {high:g}.",
                "Map the labels, or choose another loss.",
            )
    elif output.activation in ("sigmoid", "softmax", "tanh", "relu") and "error" in (output.loss or ""):
        least, most = {"tanh": (-1, 1), "relu": (0, math.inf)}.get(output.activation, (0, 1))
        if low < least or high > most:
            return (
                f"The output has been through {output.activation}, which is from {least} to {most}, but labels are "
                f"from {low:g} to {high:g}.",
                "End with a linear layer, or scale the labels.",
            )
    return None


def _loss_of(output: OutputReport) -> str:
    return f"loss of {output.name}" if output.name else "loss"


def unscaled_inputs(model: ModelReport) -> Iterator[Finding]:
    """Whether layers are given inputs far from 1 in size."""
    fix = "Scale them to a mean of 0 and a variance of 1, for example with keras.layers.Normalization or Rescaling."
    for layer in model.layers:
        rms, mean = layer.input_rms, layer.input_mean or 0.0
        if not layer.sees_input or rms is None:
            continue
        # what is centred may be large where a normalization follows at once
        removed = layer.feeds_norm and abs(mean) < rms / 2
        if not math.isfinite(rms):
            yield Finding("unscaled_inputs", 20, "x", "Some inputs are NaN or infinite.", "Remove or replace them.")
            return
        if (rms > LARGEST_INPUT and not removed) or rms < SMALLEST_INPUT:
            reason = f"The root mean square of the inputs of {layer.path} is {rms:.3g}, it should be about 1."
            yield Finding("unscaled_inputs", 20, "x", reason, fix)
            return


def loss_value(model: ModelReport) -> Iterator[Finding]:
    """Whether the loss is a number."""
    if model.loss_value is not None and not math.isfinite(model.loss_value):
        fix = "Look for a log, root or division of 0 in it, and for outputs that are too large."
        yield Finding("loss_value", 59, "loss", f"The loss of the batch is {model.loss_value}.", fix)


def output_bias(model: ModelReport) -> Iterator[Finding]:
    """Whether predictions begin near the frequencies of the classes."""
    for output in model.outputs:
        if not (output.frequencies and output.predicted and output.by_bias):
            continue
        binary = output.loss in BINARY
        by_bias = _divergence(output.frequencies, output.by_bias, binary=binary)
        # weights may make up for the bias, in a trained model
        found = min(by_bias, _divergence(output.frequencies, output.predicted, binary=binary))
        if found > DIVERGENCE:
            of = f" of {output.name}" if output.name else ""
            reason = f"The predictions begin {found:.2f} nats from the frequencies of the labels{of}, by its bias."
            start = "log(p / (1 - p)) of their frequency p" if binary else "the logarithms of the frequencies"
            fix = f"Start the output bias at {start}, or at 0 if they are about equal."
            yield Finding("output_bias", 58, "output", reason, fix)


def _divergence(frequencies: tuple[float, ...], predicted: tuple[float, ...], *, binary: bool) -> float:
    """The Kullback-Leibler divergence; for binary labels the mean over the units."""

    def term(f: float, p: float) -> float:
        return f * math.log(f / min(max(p, 1e-12), 1.0)) if f > 0 else 0.0

    pairs = list(zip(frequencies, predicted, strict=True))
    if binary:
        return sum(term(f, p) + term(1 - f, 1 - p) for f, p in pairs) / len(pairs)
    return sum(term(f, p) for f, p in pairs)

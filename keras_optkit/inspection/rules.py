"""Rules of advice: pure functions of what was measured of a model. The smaller a severity, the nearer to a cause."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from statistics import median

from keras_optkit.inspection.outputs import BINARY, CATEGORICAL, SPARSE
from keras_optkit.inspection.report import Finding, KernelReport, LayerReport, ModelReport, OutputReport

#: Inputs are asked to have a root mean square of about 1 (LeCun et al. 1998, Efficient BackProp, 4.3). Pixels up to 255
#: have 100 or more, up to 16 about 8; standardized features have 1, in one-hot form less.
LARGEST_INPUT, SMALLEST_INPUT = 5.0, 1e-3
#: How many times a kernel may be larger than the usual initializers make it, and smaller.
LARGE_KERNEL, SMALL_KERNEL = 2.5, 16.0
#: The same for a kernel unlike the others: initializers that depend on depth make a third of them smaller.
UNLIKE_OTHERS, FEW = 6.0, 0.25
#: Kernels whose scale a normalization removes may be still smaller.
SMALL_NORMALIZED = 64.0
#: Of fewer elements the deviation says nothing.
FEWEST_ELEMENTS = 8
#: Shares of dead units, and of saturated outputs.
DEAD, SATURATED = 0.5, 0.5
#: A training step usually changes weights by about 1e-3 of their norm. The first two are for steps whose size does not
#: depend on the gradient's, as Adam's; the others for steps in proportion to it, which may be large where
#: normalizations remove the scale of the weights.
LARGEST_UPDATE, SMALLEST_UPDATE = 0.1, 2e-4
LARGEST_PROPORTIONAL, SMALLEST_PROPORTIONAL = 3.0, 5e-5
#: Steps in proportion to the gradient that are small do if the loss falls by this share of itself.
FALL = 1e-3
#: Of the sign of a mean, which does not become smaller when gradients change their signs.
LARGEST_SIGN, _SIGN = 0.02, ("lion", "signum")
#: The loss rises by so much in an update that is too large, if that is not usual for weights to change by.
RISE, LARGE_IF_IT_RISES = 3.0, 0.02
#: Sizes of a step over the rate that do not depend on that of the gradient, which are about the same in all layers.
NORMALIZED_STEP, NORMALIZED_SPREAD = (0.05, 20.0), 2.0
#: How many times the outputs of a layer may be larger than the input and the first layer's.
GROWTH = 100.0
#: How many times those of a layer with a kernel may be smaller than the first layer's.
SHRINKING = 1e4
#: How many times the gradient of the first layer may be smaller than that of another.
LOST = 1e5
#: Nats from the frequencies of the labels to a prediction.
DIVERGENCE = 0.5

_ADAPTIVE = (
    *("adam", "nadam", "rmsprop", "adagrad", "adadelta", "lion", "adan", "yogi", "adabelief", "laprop", "adopt"),
    *("radam", "adafactor", "came", "sm3", "novograd", "lamb", "sophia", "adahessian", "prodigy", "soap", "shampoo"),
    *("adema", "mars", "stableadam", "signum", "rprop", "apollo", "klsoap", "ademamix", "schedulefreeadam"),
)


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


def identical_layers(model: ModelReport) -> Iterator[Finding]:
    """Whether several layers begin with the same kernel."""
    found = defaultdict(list)
    for layer in model.layers:
        for kernel in layer.kernels if layer.trainable else ():
            if kernel.key and kernel.std and math.prod(kernel.shape) >= FEWEST_ELEMENTS:
                found[kernel.key].append(layer.path)
    for paths in found.values():
        if len(paths) > 1:
            reason = f"The kernels of {len(paths)} layers are equal: {', '.join(paths)}."
            fix = "Give each layer an initializer of its own, with another seed or none."
            yield Finding("identical_layers", 30, paths[0], reason, fix)


def frozen(model: ModelReport) -> Iterator[Finding]:
    """Whether a layer is frozen between layers that are trained, or the last one behind them.

    A frozen beginning is usual, and so is a frozen model behind a trained one.
    """
    known = [layer for layer in model.layers if layer.kernels and layer.was_called]
    if known and not any(layer.trainable for layer in model.layers if layer.kernels):
        yield Finding("frozen", 31, known[0].path, "No kernel of the model is trained.", "Set trainable=True.")
        return
    for place, layer in enumerate(known):
        if layer.trainable or not layer.behind_trained:
            continue
        is_last = place == len(known) - 1 and known[place - 1].trainable
        if is_last or any(later.trainable for later in known[place + 1 :]):
            reason = "It is frozen, but layers before it are trained."
            fix = "If that is a mistake, set trainable=True and compile again."
            yield Finding("frozen", 31, layer.path, reason, fix)


def kernel_scale(model: ModelReport) -> Iterator[Finding]:
    """Whether kernels have about the size that their fans and activations ask for."""
    judged = [(layer, kernel) for layer in model.layers for kernel in layer.kernels if _is_judged(kernel)]
    sizes = [math.log(kernel.std / kernel.low) for _, kernel in judged if kernel.std > 0 and kernel.low]
    middle = math.exp(median(sizes)) if sizes else 1.0
    # of an initializer that depends on depth, many
    low = [kernel for _, kernel in judged if kernel.low and _is_unlike(kernel, middle)]
    few = len(low) <= max(1, FEW * len(judged))
    dead_behind = [place for place, layer in enumerate(model.layers) if layer.input_differs is False]
    for layer, kernel in judged:
        place = model.layers.index(layer)
        assert kernel.low is not None
        assert kernel.high is not None
        if kernel.std == 0 and kernel.mean != 0 and layer.trainable and kernel.fan_out > 1:
            wrong = "All of its elements are equal, so that all of its units stay alike"
        elif kernel.std == 0:
            if layer.is_output or not any(later > place for later in dead_behind):
                continue  # such as the end of a residual branch, which begins as zero on purpose
            wrong = "All of its elements are 0, and behind it all examples are alike"
        elif kernel.std > LARGE_KERNEL * kernel.high:
            wrong = f"It is {kernel.std / kernel.high:.3g} times as large as the largest usual one"
        elif not layer.is_output and _is_too_small(layer, kernel, unlike=few and _is_unlike(kernel, middle)):
            wrong = f"It is {kernel.low / kernel.std:.3g} times smaller than the smallest usual one"
        else:
            continue
        follows = ""
        if layer.saturated is not None and layer.saturated >= SATURATED:
            follows = f" {layer.saturated:.0%} of the outputs of the layer are where {layer.activation} is flat."
        reason = (
            f"The standard deviation of {kernel.name} is {kernel.std:.3g}; with fans of {kernel.fan_in} and "
            f"{kernel.fan_out}, {layer.activation or 'linear'} asks for {kernel.asked:.3g}. {wrong}.{follows}"
        )
        fix = "Use HeNormal for ReLU and its relatives, GlorotUniform for others."
        yield Finding("kernel_scale", 40, layer.path, reason, fix)


def _is_judged(kernel: KernelReport) -> bool:
    return kernel.low is not None and math.prod(kernel.shape) >= FEWEST_ELEMENTS


def _is_unlike(kernel: KernelReport, middle: float) -> bool:
    """Whether a kernel is much smaller than usual, and than the others of the model."""
    return 0 < kernel.std * UNLIKE_OTHERS < (kernel.low or 0.0) * min(middle, 1.0)


def _is_too_small(layer: LayerReport, kernel: KernelReport, *, unlike: bool) -> bool:
    assert kernel.low is not None
    if layer.feeds_norm:
        return kernel.std * SMALL_NORMALIZED < kernel.low
    return unlike or kernel.std * SMALL_KERNEL < kernel.low


def update_size(model: ModelReport) -> Iterator[Finding]:
    """Whether an update changes the weights by a usual share."""
    update = model.update
    known = [layer for layer in model.layers if layer.update_ratio is not None]
    ratios = [layer.update_ratio for layer in known if layer.update_ratio]
    if update is not None and not ratios and any(layer.gradient_norm for layer in known):
        fix = "Raise the learning rate; look at clipping, too."
        yield Finding("update_size", 61, "optimizer", "An update leaves all kernels as they are.", fix)
    if update is None or not ratios:
        return
    middle = median(ratios)
    # a schedule that begins low, and momentum, make later updates larger; RMSprop's first is larger than those later
    later = middle * max(update.rate_ahead, 1.0) / (1 - min(update.momentum, 0.999))
    normalized = update.size is not None and NORMALIZED_STEP[0] <= update.size <= NORMALIZED_STEP[1]
    normalized = normalized and (update.spread or 1.0) <= NORMALIZED_SPREAD
    later /= max(update.size or 1.0, 1.0) if normalized else 1.0
    least, most = (SMALLEST_UPDATE, LARGEST_UPDATE) if normalized else (SMALLEST_PROPORTIONAL, LARGEST_PROPORTIONAL)
    if normalized and any(name.lower().startswith(_SIGN) for name in update.optimizer):
        most = LARGEST_SIGN
    rises = update.loss_after is not None and model.loss_value is not None
    rises = rises and not update.loss_after <= RISE * max(model.loss_value or 0.0, 1e-3)  # type: ignore[operator]
    rate = "" if update.rate is None else f" at a learning rate of {update.rate:.3g}"
    if middle > most or (rises and middle > LARGE_IF_IT_RISES):
        after = ""
        if update.loss_after is not None and model.loss_value is not None:
            after = f", and the loss goes from {model.loss_value:.3g} to {update.loss_after:.3g}"
        reason = f"An update changes the weights by {middle:.2g} of their norm{rate} (median of the layers){after}."
        fix = "Lower the learning rate; find_learning_rate suggests one."
        yield Finding("update_size", 45, "optimizer", reason, fix)
    elif later < least and not update.finds_rate and (normalized or not _falls(model, later / middle)):
        reason = f"An update changes the weights by {middle:.2g} of their norm{rate} (median of the layers)."
        fix = "Raise the learning rate; find_learning_rate suggests one."
        yield Finding("update_size", 45, "optimizer", reason, fix)


def _falls(model: ModelReport, factor: float) -> bool:
    """Whether the loss falls clearly in an update, or in one so many times as large."""
    if model.loss_value is None or model.update is None or model.update.loss_after is None:
        return False
    return (model.loss_value - model.update.loss_after) * factor > FALL * abs(model.loss_value)


def dead_units(model: ModelReport) -> Iterator[Finding]:
    """Whether many units are 0 on the whole batch.

    In a deep network all examples become alike, and half of the units are 0 for all; the others are then above 0.
    """
    for layer in model.layers:
        if layer.dead is not None and layer.dead >= DEAD and layer.dead > (layer.always_active or 0.0) + 0.25:
            reason = f"{layer.dead:.0%} of its units are 0 on the whole batch."
            fix = "Check its bias and the kernel before it, or use leaky_relu."
            yield Finding("dead_units", 50, layer.path, reason, fix)


def saturation(model: ModelReport) -> Iterator[Finding]:
    """Whether many outputs inside the model are where the activation is flat."""
    for layer in model.layers:
        if layer.saturated is not None and layer.saturated >= SATURATED and not layer.is_output:
            reason = f"{layer.saturated:.0%} of its outputs are where {layer.activation} is flat."
            fix = "Use smaller weights and biases before it, or normalize its input."
            yield Finding("saturation", 51, layer.path, reason, fix)


def growth(model: ModelReport) -> Iterator[Finding]:
    """Whether outputs get much larger from layer to layer."""
    known = [layer for layer in model.layers if layer.std is not None]
    if not known:
        return
    inputs = [layer.input_rms for layer in known if layer.sees_input and layer.input_rms is not None]
    start = max(known[0].std or 0.0, 1.0, *inputs)  # what grows to a usual size does no harm
    large = sum(
        kernel.std > LARGE_KERNEL * kernel.high
        for layer in model.layers
        for kernel in layer.kernels
        if _is_judged(kernel) and kernel.high
    )
    for layer in known:
        assert layer.std is not None
        if not layer.std <= GROWTH * start:
            reason = f"Its outputs have a standard deviation of {layer.std:.3g}, those of the beginning {start:.3g}."
            if large:
                reason += f" {large} kernels are larger than usual."
            fix = "Use smaller kernels, normalize between layers, or begin residual branches as zero."
            # the cause, unless one or two kernels are
            yield Finding("growth", 55 if 0 < large < 3 else 39, layer.path, reason, fix)
            return


def vanishing(model: ModelReport) -> Iterator[Finding]:
    """Whether outputs get much smaller from layer to layer, though they are not 0."""
    known = [(layer, _size(layer)) for layer in model.layers if layer.std is not None]
    for layer, size in known:
        if (layer.dead or 0.0) >= DEAD:  # which what follows is a consequence of
            return
        # of a layer without kernels, such as a scale that begins small, it is meant
        if layer.kernels and not layer.is_output and 0 < size * SHRINKING < known[0][1]:
            reason = f"The size of its outputs is {size:.3g}, that of the first layer's {known[0][1]:.3g}."
            fix = "Use HeNormal for ReLU and its relatives, GlorotUniform for others, or normalize between layers."
            yield Finding("vanishing", 42, layer.path, reason, fix)
            return


def vanishing_gradient(model: ModelReport) -> Iterator[Finding]:
    """Whether the gradient of the first layer that is trained is lost on the way to it."""
    known = [(layer.gradient_norm, layer.path) for layer in model.layers if layer.kernels and layer.gradient_norm]
    if known and 0 < known[0][0] * LOST < max(known)[0] < math.inf:
        reason = f"The gradient of its weights is {known[0][0]:.2g}, that of {max(known)[1]} {max(known)[0]:.2g}."
        fix = "Use activations that are not flat, such as ReLU with HeNormal, normalizations or skip connections."
        yield Finding("vanishing_gradient", 57, known[0][1], reason, fix)


def loss_value(model: ModelReport) -> Iterator[Finding]:
    """Whether the loss is a number."""
    if model.loss_value is not None and not math.isfinite(model.loss_value):
        fix = "Look for a log, root or division of 0 in it, and for outputs that are too large."
        yield Finding("loss_value", 59, "loss", f"The loss of the batch is {model.loss_value}.", fix)


def _size(layer: LayerReport) -> float:
    """The root mean square of a layer's outputs."""
    return math.hypot(layer.mean or 0.0, layer.std or 0.0)


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


def missing_gradient(model: ModelReport) -> Iterator[Finding]:
    """Whether weights that are trained have no gradient, or one of 0 that no zero behind them explains.

    The finding names the last of the layers, behind which the gradient ends.
    """
    depends = "Check that the loss depends on them, by functions with a derivative."
    found = defaultdict(list)
    for layer in model.layers:
        if layer.has_gradient is None:
            continue
        if not layer.was_called:
            found["The model does not call {}.", "Call it, or set trainable=False."].append(layer.path)
        elif not layer.has_gradient:
            found["Weights that are trained have no gradient, in {}.", depends].append(layer.path)
        elif layer.gradient_norm is not None and not math.isfinite(layer.gradient_norm):
            fix = "Look for a log, root or division of 0 behind it."
            found["The gradient is NaN or infinite, in {}.", fix].append(layer.path)
        elif layer.has_zero_gradient and not model.zero_factors:
            found["The gradient of all weights is 0, in {}.", depends].append(layer.path)
    for (reason, fix), paths in found.items():
        yield Finding("missing_gradient", 60, paths[-1], reason.format(_some(paths)), fix)


def _some(paths: list[str], most: int = 4) -> str:
    """Paths as text, the last ones of many."""
    others = f"{len(paths) - most} layers before and " if len(paths) > most else ""
    return others + ", ".join(paths[-most:])


def l2_and_adaptive(model: ModelReport) -> Iterator[Finding]:
    """Whether an L2 penalty goes through an optimizer that divides it away (Loshchilov and Hutter 2019, 1711.05101)."""
    names = () if model.update is None else model.update.optimizer
    adaptive = [name for name in names if name.lower().removesuffix("rule").startswith(_ADAPTIVE)]
    if model.penalized and adaptive:
        reason = (
            f"{len(model.penalized)} weights have an L2 penalty ({model.penalized[0]}), whose gradient {adaptive[0]} "
            "rescales with that of the loss, so that it is no weight decay."
        )
        fix = "Use the optimizer's weight_decay, as of AdamW, instead of the regularizers."
        yield Finding("l2_and_adaptive", 80, "optimizer", reason, fix)


def decay_on_vectors(model: ModelReport) -> Iterator[Finding]:
    """Whether weight decay applies to biases and scales."""
    vectors = () if model.update is None else model.update.decayed_vectors
    if vectors:
        reason = f"Weight decay applies to {len(vectors)} biases and scales ({vectors[0]})."
        fix = "Spare them: decay_mask='auto' here, exclude_from_weight_decay of Keras's optimizers."
        yield Finding("decay_on_vectors", 85, "optimizer", reason, fix, is_hint=True)


def bias_before_batch_norm(model: ModelReport) -> Iterator[Finding]:
    """Whether biases are added that the batch normalization behind them removes."""
    found = [each.path for each in model.layers if each.feeds_batch_norm and each.has_bias and each.kernels]
    if found:
        reason = f"The biases of {len(found)} layers are removed by a BatchNormalization: {', '.join(found[:3])}."
        yield Finding("bias_before_batch_norm", 90, found[0], reason, "Set use_bias=False.", is_hint=True)


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
    vanishing,
    vanishing_gradient,
    output_bias,
    loss_value,
    missing_gradient,
    l2_and_adaptive,
    decay_on_vectors,
    bias_before_batch_norm,
)


def findings(model: ModelReport) -> list[Finding]:
    """What all rules find, causes first; of one severity, in the order of the layers."""
    return sorted((found for rule in RULES for found in rule(model)), key=lambda found: found.severity)

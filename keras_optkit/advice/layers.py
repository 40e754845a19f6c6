"""Rules about kernels and the outputs of layers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from statistics import median

from keras_optkit.advice.measured import Finding, KernelReport, LayerReport, ModelReport

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
#: How many times the outputs of a layer may be larger than the input and the first layer's.
GROWTH = 100.0
#: How many times those of a layer with a kernel may be smaller than the first layer's.
SHRINKING = 1e4

KERNEL_FIX = "Use HeNormal for ReLU and its relatives, GlorotUniform for others."


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
        yield Finding("kernel_scale", 40, layer.path, reason, KERNEL_FIX)


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


def _size(layer: LayerReport) -> float:
    """The root mean square of a layer's outputs."""
    return math.hypot(layer.mean or 0.0, layer.std or 0.0)


def bias_before_batch_norm(model: ModelReport) -> Iterator[Finding]:
    """Whether biases are added that the batch normalization behind them removes."""
    found = [each.path for each in model.layers if each.feeds_batch_norm and each.has_bias and each.kernels]
    if found:
        reason = f"The biases of {len(found)} layers are removed by a BatchNormalization: {', '.join(found[:3])}."
        yield Finding("bias_before_batch_norm", 90, found[0], reason, "Set use_bias=False.", is_hint=True)

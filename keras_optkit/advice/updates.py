"""Rules about gradients, updates and the optimizer."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import median

from keras_optkit.advice.measured import Finding, ModelReport
from keras_optkit.advice.ranges import named, runs

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
#: How many times the gradient of the first layer may be smaller than that of another.
LOST = 1e5

LOWER_RATE = "Lower the learning rate; find_learning_rate suggests one."

_ADAPTIVE = (
    *("adam", "nadam", "rmsprop", "adagrad", "adadelta", "lion", "adan", "yogi", "adabelief", "laprop", "adopt"),
    *("radam", "adafactor", "came", "sm3", "novograd", "lamb", "sophia", "adahessian", "prodigy", "soap", "shampoo"),
    *("adema", "mars", "stableadam", "signum", "rprop", "apollo", "klsoap", "ademamix", "schedulefreeadam"),
)


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
    if normalized and is_sign(update.optimizer):
        most = LARGEST_SIGN
    rises = update.loss_after is not None and model.loss_value is not None
    rises = rises and not update.loss_after <= RISE * max(model.loss_value or 0.0, 1e-3)  # type: ignore[operator]
    if middle > most or (rises and middle > LARGE_IF_IT_RISES):
        after = ""
        if update.loss_after is not None and model.loss_value is not None:
            after = f", and the loss goes from {model.loss_value:.3g} to {update.loss_after:.3g}"
        yield too_large(middle, update.rate, after)
    elif later < least and not update.finds_rate and (normalized or not _falls(model, later / middle)):
        yield too_small(middle, update.rate)


def too_large(ratio: float, rate: float | None, after: str = "") -> Finding:
    """The finding that updates change the weights by so much of their norm."""
    return Finding("update_size", 45, "optimizer", f"{_size(ratio, rate)}{after}.", LOWER_RATE)


def too_small(ratio: float, rate: float | None) -> Finding:
    """The finding that updates change the weights by so little of their norm."""
    fix = "Raise the learning rate; find_learning_rate suggests one."
    return Finding("update_size", 45, "optimizer", f"{_size(ratio, rate)}.", fix)


def _size(ratio: float, rate: float | None) -> str:
    at = "" if rate is None else f" at a learning rate of {rate:.3g}"
    return f"An update changes the weights by {ratio:.2g} of their norm{at} (median of the layers)"


def is_sign(names: Sequence[str]) -> bool:
    """Whether an optimizer with these names steps by the sign of a mean."""
    return any(name.lower().startswith(_SIGN) for name in names)


def is_adaptive(names: Sequence[str]) -> bool:
    """Whether the size of an optimizer's steps does not depend on that of the gradient."""
    return bool(_adaptive(names))


def _adaptive(names: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().removesuffix("rule").startswith(_ADAPTIVE)]


def _falls(model: ModelReport, factor: float) -> bool:
    """Whether the loss falls clearly in an update, or in one so many times as large."""
    if model.loss_value is None or model.update is None or model.update.loss_after is None:
        return False
    return (model.loss_value - model.update.loss_after) * factor > FALL * abs(model.loss_value)


def vanishing_gradient(model: ModelReport) -> Iterator[Finding]:
    """Whether the gradient of the first layer that is trained is lost on the way to it."""
    known = [(layer.gradient_norm, layer.path) for layer in model.layers if layer.kernels and layer.gradient_norm]
    if known and 0 < known[0][0] * LOST < max(known)[0] < math.inf:
        reason = f"The gradient of its weights is {known[0][0]:.2g}, that of {max(known)[1]} {max(known)[0]:.2g}."
        fix = "Use activations that are not flat, such as ReLU with HeNormal, normalizations or skip connections."
        yield Finding("vanishing_gradient", 57, known[0][1], reason, fix)


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
    order = [layer.path for layer in model.layers if layer.has_gradient is not None]
    for (reason, fix), paths in found.items():
        yield Finding("missing_gradient", 60, paths[-1], reason.format(_some(paths, order)), fix)


def _some(paths: list[str], order: list[str], most: int = 4) -> str:
    """Paths as text, adjacent ones as a range; the last ones of many."""
    parts = [named(each) for each in runs(paths, order)]
    others = f"{len(parts) - most} others before and " if len(parts) > most else ""
    return others + ", ".join(parts[-most:])


def l2_and_adaptive(model: ModelReport) -> Iterator[Finding]:
    """Whether an L2 penalty goes through an optimizer that divides it away (Loshchilov and Hutter 2019, 1711.05101)."""
    names = () if model.update is None else model.update.optimizer
    adaptive = _adaptive(names)
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

"""What `TrainingMonitor` computes on request. It has to reach inside the gradient, where nothing leaves JAX's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from keras_optkit import backend

Tensor = Any


class Call(NamedTuple):
    """A call of a layer: its first output, and what it was given, tensors and others."""

    output: Tensor
    given: Sequence[Any]


def moments(calls: Sequence[Call], weights: Sequence[Any], unit_axis: int, flat: tuple[float, float] | None) -> Tensor:
    """Mean, standard deviation, and shares of zeros, dead units and saturation of a layer's outputs, in all replicas.

    A unit is dead if it is 0 in the whole batch. All are NaN where the layer was given NaN or infinity, or has such
    weights: a ReLU makes 0 of NaN. Saturation is the share below and above the two numbers of `flat`; -1 without them.
    """
    by_unit = [_by_unit(ops.cast(ops.stop_gradient(call.output), "float32"), unit_axis) for call in calls]
    values = ops.concatenate(by_unit, 0)  # (anything, units)
    active = ops.sum(ops.cast(ops.not_equal(values, 0), "float32"), 0)
    sources = [*weights, *(part for call in calls for part in call.given)]
    bad = sum((_nonfinite(part) for part in sources), ops.zeros((), "float32"))
    low, high = flat or (0.0, 0.0)
    flatly = ops.sum(ops.cast(ops.logical_or(values < low, values > high), "float32"))
    local = [ops.cast(ops.size(values), "float32"), ops.sum(values), active, bad, flatly]
    size, total, active, bad, flatly = backend.sum_over_replicas(local)
    mean = total / size
    (deviations,) = backend.sum_over_replicas([ops.sum(ops.square(values - mean))])
    dead = ops.mean(ops.cast(ops.equal(active, 0), "float32"))
    saturated = flatly / size if flat else ops.full((), -1.0)
    found = ops.stack([mean, ops.sqrt(deviations / size), 1 - ops.sum(active) / size, dead, saturated])
    return ops.where(bad > 0, float("nan"), found)


def _nonfinite(part: Any) -> Tensor:
    """1 if a tensor holds elements that are not finite."""
    if not hasattr(part, "dtype") or "float" not in keras.backend.standardize_dtype(part.dtype):
        return ops.zeros((), "float32")
    return ops.cast(ops.logical_not(ops.all(ops.isfinite(ops.convert_to_tensor(part)))), "float32")


def _by_unit(output: Tensor, unit_axis: int) -> Tensor:
    return ops.reshape(ops.moveaxis(output, unit_axis, -1), (-1, output.shape[unit_axis]))


def half_gradient(model: Any, scaled: Callable[[Tensor], Tensor], data: Any) -> tuple[list[Any], Tensor]:
    """The gradient of the first half of the batch, with the loss scaled, and how many examples that is.

    What the model counts and draws on the way, such as moving statistics and random seeds, is restored.
    """
    import tensorflow as tf

    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    size = tf.shape(tree.flatten(x)[0])[0] // 2

    def half(tensors: Any) -> Any:
        return tree.map_structure(lambda t: None if t is None else t[:size], tensors)

    held = [*model.non_trainable_variables, *model.metrics_variables]
    before = [ops.copy(v) for v in held]
    with tf.GradientTape() as tape:
        prediction = model(half(x), training=True)
        loss = model.compute_loss(
            x=half(x), y=half(y), y_pred=prediction, sample_weight=half(sample_weight), training=True
        )
        loss = scaled(loss)
    grads = tape.gradient(loss, model.trainable_variables)
    for variable, value in zip(held, before, strict=True):
        variable.assign(value)
    return grads, size

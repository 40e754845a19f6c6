"""Norms and counts that `TrainingMonitor` computes of gradients and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers import Optimizer
from keras_optkit.precision import at_least_float32

Tensor = Any

#: The sum of the gradients of the micro-batches before this one for each variable, by its key, and how many those are.
Sums = tuple[Mapping[int, Tensor], Tensor]


def by_layer(
    values: Sequence[Tensor], variables: Sequence[Any], names: Mapping[int, str], layers: Mapping[str, Any]
) -> list[Tensor]:
    """The sums over the variables of each layer, by their names in `names`, in the order of `layers`."""
    sums = dict.fromkeys(layers, ops.zeros((), "float32"))
    for value, variable in zip(values, variables, strict=True):
        if (weight := backend.key(variable)) in names:
            sums[names[weight]] = sums[names[weight]] + value
    return list(sums.values())


def dense(grads: Sequence[Any], variables: Sequence[Any]) -> list[Tensor | None]:
    """The gradients, with all rows."""
    return [None if g is None else backend.dense(g, v.shape) for g, v in zip(grads, variables, strict=True)]


def to_clip(
    inner: Any, grads: Sequence[Tensor | None], variables: Sequence[Any], scale: Tensor, sums: Sums | None
) -> list[Tensor | None]:
    """What an optimizer clips: the gradients without the scale of the loss, or with those before, their means."""
    unscaled_grads = [None if g is None else wide(g) / ops.cast(scale, wide(g).dtype) for g in grads]
    if sums is None:
        return unscaled_grads
    of_variable, micro = sums
    # Keras's divide by this, also in an update of fewer
    count = micro + 1 if isinstance(inner, Optimizer) else inner.gradient_accumulation_steps
    found: list[Tensor | None] = []
    for g, variable in zip(unscaled_grads, variables, strict=True):
        before = of_variable.get(backend.key(variable))
        total = g if before is None else before if g is None else before + ops.cast(g, before.dtype)
        found.append(None if total is None else total / ops.cast(count, total.dtype))
    return found


def wide(tensor: Any) -> Tensor:
    """A tensor in the dtype to compute in."""
    return ops.cast(tensor, at_least_float32(tensor.dtype))


def squares(tensor: Tensor | None) -> Tensor:
    """The sum of the squares, as float32; 0 for no tensor."""
    return ops.zeros((), "float32") if tensor is None else ops.cast(ops.sum(ops.square(wide(tensor))), "float32")


def nonfinite(tensor: Tensor | None) -> Tensor:
    """How many of the elements are not finite."""
    if tensor is None:
        return ops.zeros((), "float32")
    return ops.sum(ops.cast(ops.logical_not(ops.isfinite(tensor)), "float32"))


def regularizer_of(variable: Any) -> Any:
    """The regularizer of a weight, or None."""
    return getattr(variable, "regularizer", None)


def penalty(variables: Sequence[Any], values: Sequence[Tensor]) -> Tensor:
    """What the regularizers of weights add to the loss if the weights have these values."""
    pairs = [(regularizer_of(variable), value) for variable, value in zip(variables, values, strict=True)]
    return sum(ops.cast(regularizer(value), "float32") for regularizer, value in pairs if regularizer is not None)

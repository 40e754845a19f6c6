"""Which layer is the first whose values are not finite, by going through the model once more."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
from keras import ops, tree

from keras_optkit.fit.hooks import around
from keras_optkit.private import sublayers

Tensor = Any


class Found(NamedTuple):
    """What was bad first, as in `Failure`."""

    where: str
    layer: str | None = None
    in_data: bool = False
    failed: bool = False  # whether the search has


def look_at(model: Any, batch: Any) -> Found | None:
    """The first part that is not finite when the model runs on this batch; None if all is finite."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    for name, part in (("inputs", x), ("targets", y), ("sample weights", sample_weight)):
        if not is_finite(part):
            return Found(f"the {name} of the batch are not finite", in_data=True)
    layers: list[str] = []
    try:
        loss = _watched_loss(model, layers, x, y, sample_weight)
    except Exception as error:  # this is a second run, of what went through; the failure is what has to be told
        return Found(f"the search of the layer failed with {error!r}", failed=True)
    if layers:
        return Found(f"the output of layer {layers[0]!r} is the first that is not finite", layers[0])
    return None if is_finite(loss) else Found("all layers are finite, but not the loss function of what they give")


def _watched_loss(model: Any, layers: list[str], x: Any, y: Any, sample_weight: Any) -> Tensor:
    """The loss of a batch; the first layer that gives something that is not finite is added to `layers`."""
    with contextlib.ExitStack() as stack:
        for layer in sublayers(model):
            stack.callback(around(layer, "call", _watch(layer, layers)))
        takes_training = "training" in inspect.signature(model.call).parameters
        outputs = model(x, training=True) if takes_training else model(x)
    return model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight)


def _watch(layer: Any, found: list[str]) -> Callable[..., contextlib.AbstractContextManager[Any]]:
    """Adds the layer to `found` when it returns something that is not finite; inner layers return first."""

    def see(outputs: Any) -> None:
        if not found and not is_finite(outputs):
            found.append(layer.path)

    @contextlib.contextmanager
    def hook(*_: Any, **__: Any) -> Iterator[Callable[[Any], None]]:
        yield see

    return hook


def owner(model: Any, variable: Any) -> str | None:
    """Path of the innermost layer that a variable belongs to."""
    owners = [layer for layer in sublayers(model) if any(v is variable for v in layer.variables)]
    return min(owners, key=lambda layer: len(layer.variables)).path if owners else None


def refuse_what_is_not_finite(weights: Sequence[Any]) -> None:
    """Raises if a weight is not finite."""
    for weight in weights:
        if not is_finite(weight):
            raise ValueError(
                f"The model must have finite weights when training begins; {weight.path!r} has others, so that there "
                "is no good state to go back to."
            )


def is_finite(structure: Any) -> bool:
    """Whether all floating-point elements in a nest of tensors are finite."""
    for tensor in tree.flatten(structure):
        dtype = getattr(tensor, "dtype", None)
        if dtype is None or "float" not in keras.backend.standardize_dtype(dtype):
            continue
        if not bool(ops.convert_to_numpy(ops.all(ops.isfinite(ops.convert_to_tensor(tensor))))):
            return False
    return True

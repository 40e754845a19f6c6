"""Looking into the calls of layers: for a while, a layer's `call` or its activation is another function."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
from keras import ops

_ABSENT = object()


@contextlib.contextmanager
def replaced(layers: Iterable[Any], name: str, wrap: Callable[[Any, Any], Any]) -> Iterator[None]:
    """Has an attribute of layers replaced inside the block, such as "call" or "activation".

    Args:
        layers: The layers; one that is given twice is replaced once.
        name: The name of the attribute.
        wrap: Is given a layer and the attribute as it is, and returns what it is in the block.
    """
    different = list({id(layer): layer for layer in layers}.values())
    before = [(layer, vars(layer).get(name, _ABSENT)) for layer in different]
    try:
        for layer in different:
            setattr(layer, name, wrap(layer, getattr(layer, name)))
        yield
    finally:
        for layer, value in before:
            if value is _ABSENT:  # it is a method of the class
                vars(layer).pop(name, None)
            else:
                setattr(layer, name, value)


@contextlib.contextmanager
def folded_steps(layers: Iterable[Any]) -> Iterator[None]:
    """Has each `TimeDistributed` among the layers call its layer once for all steps, outside of any loop."""

    def folded(wrapper: Any, _: Any) -> Callable[..., Any]:
        has_training = "training" in inspect.signature(wrapper.layer.call).parameters

        def call(inputs: Any, training: Any = None, mask: Any = None) -> Any:  # noqa: ARG001  (as Keras calls it)
            batch, steps, *rest = ops.shape(inputs)
            given = {"training": training} if has_training else {}
            outputs = wrapper.layer(ops.reshape(inputs, (batch * steps, *rest)), **given)
            return ops.reshape(outputs, (batch, steps, *ops.shape(outputs)[1:]))

        return call

    wrappers = [layer for layer in layers if type(layer) is keras.layers.TimeDistributed]
    with replaced(wrappers, "call", folded):
        yield

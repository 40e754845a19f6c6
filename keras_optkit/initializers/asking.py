"""Which layer asks an initializer for values, of which Keras tells it only the shape."""

from __future__ import annotations

import functools
import weakref

import keras

from keras_optkit.private import current_layer, in_stateless_scope, sublayers, variable_to_initialize

#: Layers by the ids of their variables that have no values yet.
_WAITING: dict[int, weakref.ref[keras.layers.Layer]] = {}


def asking_layer() -> keras.layers.Layer | None:
    """The layer whose variable is given its first value, or None.

    A subclassed model calls its layers for the shapes of their outputs first, which takes placeholders for the values
    of their variables. These are given values afterwards, when no layer is at work: then it is the one that has the
    variable.
    """
    layer = current_layer()
    layer = layer if isinstance(layer, keras.layers.Layer) else None
    if in_stateless_scope():
        if layer is not None:
            _remember(layer)
        return layer
    variable = variable_to_initialize()
    if variable is None or (layer is not None and not sublayers(layer)):
        return layer
    known = _WAITING.get(id(variable))
    owner = None if known is None else known()
    return owner if owner is not None and any(each is variable for each in owner.weights) else None


def _remember(layer: keras.layers.Layer) -> None:
    """Notes which variables are the layer's own."""
    others = {id(each) for below in sublayers(layer, direct=True) for each in below.weights}
    for variable in layer.weights:
        key = id(variable)
        if key not in others:
            _WAITING[key] = weakref.ref(layer, functools.partial(_forget, key))


def _forget(key: int, reference: weakref.ref[keras.layers.Layer]) -> None:
    """Called when a layer is gone; another variable may have the id by now."""
    if _WAITING.get(key) is reference:
        del _WAITING[key]

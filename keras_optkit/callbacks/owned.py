"""Which variables a model holds besides its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_optkit.private import sublayers


def own_variables(model: Any) -> list[Any]:
    """Those of the model, or of a layer, besides its metrics', and those in attributes that Keras does not list.

    Among the latter are `tf.Variable`s, as in the queue of a contrastive loss, also in lists and dicts.
    """
    metrics = {id(v) for v in getattr(model, "metrics_variables", ())}
    found = {id(v): v for v in model.variables if id(v) not in metrics}
    for part in [model, *sublayers(model)]:
        if not keeps_assets_only(part):
            for name, value in vars(part).items():
                if not name.startswith("_self_"):  # TensorFlow's notes
                    found |= {id(v): v for v in _held(value) if id(v) not in metrics}
    return list(found.values())


def _held(value: Any) -> Iterator[Any]:
    """The variables in an attribute, which are not those of another layer or of an optimizer."""
    if isinstance(value, keras.layers.Layer | keras.optimizers.Optimizer):
        return
    if hasattr(value, "assign") and hasattr(value, "dtype") and hasattr(value, "shape"):
        yield value
    elif isinstance(value, Mapping):
        yield from _held(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _held(part)
    elif any(base.__module__.split(".")[0] in ("keras", "tensorflow") for base in type(value).__mro__):
        for name in ("state", "variables"):  # a random generator's; a metric's or a module's
            yield from _held(getattr(value, name, None))


def keeps_assets_only(layer: Any) -> bool:
    """Whether what a layer holds besides its files is made when it is adapted, as in lookups of words."""
    return hasattr(layer, "save_assets") and not layer.variables

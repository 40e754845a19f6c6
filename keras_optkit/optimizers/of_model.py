"""Which optimizers a model has: the one it was compiled with, others that it holds, and those inside of them.

A GAN or an actor-critic holds several, as attributes or in lists and dicts; Keras wraps others for loss scaling and for
parts of a model (`keras.optimizers.MultiOptimizer`). Whatever acts on "the optimizer" of a model asks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_optkit.private import sublayers

if TYPE_CHECKING:
    from keras_optkit.optimizers.optimizer import Optimizer


def optimizers_of(model: Any) -> list[Any]:
    """Every optimizer that a model or a layer in it holds, each once, the one it was compiled with first.

    They are found in attributes, also in lists, tuples, sets and dicts there. Those that are inside of another one are
    not listed; see `innermost`.
    """
    compiled = getattr(model, "optimizer", None)
    held = [compiled, *(found for part in [model, *sublayers(model)] for found in _in(list(vars(part).values())))]
    found = list({id(optimizer): optimizer for optimizer in held if optimizer is not None}.values())
    wrapped = {id(inner) for outer in found for inner in _wrapped(outer)}
    return [optimizer for optimizer in found if id(optimizer) not in wrapped]


def innermost(optimizer: Any) -> list[Any]:
    """The optimizers that update weights: `optimizer` itself, or those inside of it."""
    inside = directly_inside(optimizer)
    return [found for inner in inside for found in innermost(inner)] if inside else [optimizer]


def directly_inside(optimizer: Any) -> list[Any]:
    """The optimizers that one of Keras's hands the gradients on to, for loss scaling or for parts of the variables."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return [optimizer.inner_optimizer]
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        return list(optimizer.optimizers)
    return []


def innermost_of(model: Any) -> list[Any]:
    """All optimizers that update weights of a model."""
    return [inner for optimizer in optimizers_of(model) for inner in innermost(optimizer)]


def ours(optimizer: Any) -> list[Optimizer]:
    """Those of this package among the innermost ones."""
    return [inner for inner in innermost(optimizer) if hasattr(inner, "begin_training")]


def ours_of(model: Any) -> list[Optimizer]:
    """All optimizers of this package that update weights of a model."""
    return [inner for inner in innermost_of(model) if hasattr(inner, "begin_training")]


def update_counter(model: Any) -> Any:
    """The variable that counts a model's updates; None where it holds no optimizer.

    It is that of the optimizer that the model was compiled with, unless this one has never been used while another
    one has: `compile()` without an argument makes one, also for a model that trains with others.
    """
    compiled = getattr(model, "optimizer", None)
    if compiled is not None and _count(compiled):  # without looking through all layers, which callbacks would do often
        return compiled.iterations
    found = optimizers_of(model)
    return max(found, key=_count).iterations if found else None


def _count(optimizer: Any) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def _wrapped(optimizer: Any) -> Iterator[Any]:
    for inner in directly_inside(optimizer):
        yield inner
        yield from _wrapped(inner)


def _in(value: Any) -> Iterator[Any]:
    if isinstance(value, keras.optimizers.Optimizer):
        yield value
    elif isinstance(value, Mapping):
        yield from _in(list(value.values()))
    elif isinstance(value, list | tuple | set | frozenset):
        parts: Iterable[Any] = value
        for part in parts:
            yield from _in(part)

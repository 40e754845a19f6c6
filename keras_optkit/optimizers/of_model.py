"""Which optimizers a model has: the one it was compiled with, others that it holds, and those inside them.

A GAN or an actor-critic holds several, as attributes or in lists and dicts; Keras wraps others for loss scaling and for
parts of a model (`keras.optimizers.MultiOptimizer`). Whatever acts on "the optimizer" of a model asks here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_optkit.private import known_variables, sublayers

if TYPE_CHECKING:
    from keras_optkit.optimizers.optimizer import Optimizer


def optimizers_of(model: Any) -> list[Any]:
    """Every optimizer that a model or a layer in it holds, each once, the one it was compiled with first.

    They are found in attributes, also in lists, tuples, sets and dicts there. Those that are inside another one are not
    listed; see `innermost`.
    """
    return list(named_optimizers_of(model).values())


def named_optimizers_of(model: Any) -> dict[str, Any]:
    """The same by name, which is that of the attribute: "optimizer", "d_optimizer", "optimizers/0", "critic/optimizer".

    Keras's own names of optimizers are numbered through in a process.
    """
    compiled = getattr(model, "optimizer", None)
    held = [] if compiled is None else [("optimizer", compiled)]
    for part in [model, *sublayers(model)]:
        own = {name: value for name, value in vars(part).items() if not name.startswith("_self_")}  # TensorFlow's notes
        held += _in(own, "" if part is model else f"{part.name}/")
    wrapped = {id(inner) for _, outer in held for inner in _wrapped(outer)}
    names: dict[int, str] = {}
    found: dict[str, Any] = {}
    for name, optimizer in held:
        if id(optimizer) not in names and id(optimizer) not in wrapped:
            names[id(optimizer)] = unique = next(n for n in _numbered(name) if n not in found)
            found[unique] = optimizer
    return found


def used_optimizers_of(model: Any) -> dict[str, Any]:
    """The same without the one that `compile` has made, if only others make updates.

    An optimizer that an inner model was compiled with is left out while all that it trains is frozen, as in a teacher.
    """
    compiled = getattr(model, "optimizer", None)
    found = _training(model)
    if len(found) > 1 and compiled is not None and not _count(compiled):
        found = {name: optimizer for name, optimizer in found.items() if optimizer is not compiled}
    return found


def paths_of(optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """Those that update weights, by what tells each from the others, "" if there is one.

    That is the name of the outer one, of several, and the place in it, of several: "d_optimizer", "1", "d_optimizer/1".
    """
    found = {}
    for outer, optimizer in optimizers.items():
        inside = innermost(optimizer)
        for place, inner in enumerate(inside):
            found["/".join([outer] * (len(optimizers) > 1) + [str(place)] * (len(inside) > 1))] = inner
    return found


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in itertools.count(1):
        yield f"{name}_{number}"


def innermost(optimizer: Any) -> list[Any]:
    """The optimizers that update weights: `optimizer` itself, or those inside it."""
    inside = directly_inside(optimizer)
    return [found for inner in inside for found in innermost(inner)] if inside else [optimizer]


def unscaled(optimizer: Any) -> Any:
    """The optimizer inside loss scaling, if there is any."""
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    return unscaled(optimizer.inner_optimizer) if scales else optimizer


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
    found = _training(model).values()
    return max(found, key=_count).iterations if found else None


def _training(model: Any) -> dict[str, Any]:
    """By name, the optimizer that a model was compiled with, and all others that update weights of it."""
    compiled = getattr(model, "optimizer", None)
    found = named_optimizers_of(model).items()
    return {name: optimizer for name, optimizer in found if optimizer is compiled or _trains(model, optimizer)}


def _trains(model: Any, optimizer: Any) -> bool:
    """Whether an optimizer updates weights of a model that are trained now, as far as it is known.

    It is not before both are built.
    """
    trained = {id(v) for v in model.trainable_variables}
    if not trained:
        return True
    known = [known_variables(inner) for inner in innermost(optimizer)]
    return any(not variables or any(id(v) in trained for v in variables) for variables in known)


def _count(optimizer: Any) -> int:
    return int(keras.ops.convert_to_numpy(optimizer.iterations))


def _wrapped(optimizer: Any) -> Iterator[Any]:
    for inner in directly_inside(optimizer):
        yield inner
        yield from _wrapped(inner)


def _in(values: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, keras.optimizers.Optimizer):
            yield f"{path}{name}", value
        elif isinstance(value, Mapping):
            yield from _in(dict(value), f"{path}{name}/")
        elif isinstance(value, list | tuple | set | frozenset):
            yield from _in(dict(enumerate(value)), f"{path}{name}/")

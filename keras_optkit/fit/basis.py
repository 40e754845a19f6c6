"""What a traced training step depends on, besides the model's own code."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit.fit.instrument import Instrument
from keras_optkit.optimizers.of_model import directly_inside, optimizers_of


def basis(model: Any, instruments: Iterable[Instrument]) -> Any:
    """What is compiled into a step besides the model's own code: the trained weights, and hyperparameters."""
    driven: dict[int, set[str]] = {}
    for instrument in instruments:
        for optimizer, names in instrument.driven().items():
            driven.setdefault(id(optimizer), set()).update(names)
    found, seen = optimizers_of(model), []
    while found:
        optimizer = found.pop(0)
        seen.append((_Same(optimizer), _attributes(optimizer, driven.get(id(optimizer), set()))))
        found = [*directly_inside(optimizer), *found]
    return [_Same(v) for v in model.trainable_variables], seen


class _Same:
    """Compares by identity. It holds the object, so that no other one can get its id."""

    def __init__(self, held: Any):
        self._held = held

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)


def _attributes(owner: Any, without: Iterable[str] = ()) -> tuple[Any, ...]:
    return tuple(
        (name, frozen(value, without))
        for name, value in sorted(vars(owner).items())
        if name not in set(without) and not hasattr(value, "hooks")  # such as one of another replica
    )


def frozen(value: Any, without: Iterable[str] = ()) -> Hashable:
    """A key that is equal as long as `value` means the same to a trace.

    Numbers and strings are compared by value, also inside containers, dataclasses (such as the rule of an optimizer)
    and schedules; everything else by identity.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, Mapping):
        return dict, tuple((frozen(k), frozen(v, without)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(frozen(v, without) for v in value)
    if isinstance(value, set | frozenset):
        return frozenset, frozenset(frozen(v) for v in value)
    if isinstance(value, LearningRateSchedule) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return type(value), _attributes(value, without)
    return _Same(value)

"""State in fewer bits than it is computed in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops, tree

from keras_optkit.optimizers.groups import Places
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import rule_for, slots_of
from keras_optkit.optimizers.slots import Fill, FromWeights
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import made
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import numbers
from keras_optkit.testing.twins import codecs

#: Two that may be stacked, whose size is no multiple of a block; one that is a multiple; one that is not quantised.
_SHAPES = ((70, 60), (5,), (64, 80), (70, 60))

Known = list[Mapping[str, Fill | FromWeights]]


def _slots(optimizer: Optimizer, values: list[np.ndarray]) -> Known:
    told = Places(problems.variables(values, "float32"), None).weights(problems.variables(values, "float32"))
    return [slots_of(rule_for(optimizer.rule, w), w) for w in told]


def _stored(dtype: str, slot: Fill | FromWeights, x: np.ndarray) -> np.ndarray:
    """A slot as it is after it was stored."""
    if isinstance(slot, FromWeights) or slot.shape is not None:
        return x
    if dtype != "int8":
        return {"bfloat16": codecs.bfloat16, "bfloat16+8": codecs.corrected}[dtype](x)
    return codecs.quantised(x, signed=slot.signed) if slot.is_moment and x.size >= 4096 else x


@check("optimizer", engine=True)
def check_slot_dtype(card: Card) -> None:
    """State in fewer bits equals float32 state that is rounded by the twin after every step; or int8 is refused.

    It takes the bytes that `explain` says, and what was saved begins again as it was, packed or not.
    """
    values, grads = problems.start(_SHAPES), problems.gradients(3, _SHAPES)
    plain_slots = _slots(made(card), values)
    # where figures meet, the last bit of a moment decides about its code
    for dtype, share in (("bfloat16", 1e-4), ("bfloat16+8", 1e-5), ("int8", 1e-3)):
        optimizer, weights = made(card, slot_dtype=dtype), problems.variables(values, "float32")
        held = [slot for slots in plain_slots for slot in slots.values()]
        if dtype == "int8" and held and not any(isinstance(s, Fill) and s.is_moment for s in held):
            _refuses(optimizer, weights)
            continue
        optimizer.build(weights)
        _has_the_bytes_it_says(optimizer, weights)
        plain, others = made(card), problems.variables(values, "float32")
        for arrays in grads:
            for each, variables in ((optimizer, weights), (plain, others)):
                each.apply([ops.convert_to_tensor(g, dtype="float32") for g in arrays], variables)
            state = problems.state_of(plain)
            for i, slots in enumerate(plain_slots):
                for name, slot in slots.items():
                    state[f"slot.{name}.{i}"] = _stored(dtype, slot, state[f"slot.{name}.{i}"])
            plain.load_own_variables(state)
        for got, expected, start in zip(weights, others, values, strict=True):
            off, moved = np.abs(numbers(got) - numbers(expected)), np.abs(numbers(expected) - start)
            assert off.mean() <= share * moved.mean() + 3e-7, f"{dtype}: off by {off.mean()} of {moved.mean()}"
        _begins_again(card, dtype, optimizer, weights)


def _refuses(optimizer: Optimizer, weights: list[Any]) -> None:
    try:
        optimizer.build(weights)
    except ValueError as error:
        assert "slot_dtype" in str(error), f"the message does not name slot_dtype: {error}"
    else:
        raise AssertionError("slot_dtype='int8' was accepted, and none of the state is a moment")


def _has_the_bytes_it_says(optimizer: Optimizer, weights: list[Any]) -> None:
    state = optimizer._held.state
    found = sum(math.prod(v.shape) * _BYTES[v.dtype] for v in tree.flatten([state.slots, state.updates]))
    said = sum(row.state_bytes for row in optimizer.explain(weights).rows)
    assert found == said, f"the state takes {found} bytes, and explain says {said}"


_BYTES = {"float32": 4, "int32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


def _begins_again(card: Card, dtype: str, optimizer: Optimizer, weights: list[Any]) -> None:
    state = problems.state_of(optimizer)
    other = made(card, slot_dtype=dtype)
    other.pack_below = 0
    other.build(problems.variables([numbers(w) for w in weights], "float32"))
    other.load_own_variables(state)
    again = problems.state_of(other)
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=f"{dtype} {name}, after loading")


@check("optimizer")
def check_signs(card: Card) -> None:
    """A slot that is declared as never negative never is, whatever the gradients are."""
    values, grads = problems.start(), problems.gradients(3)
    optimizer = made(card, card.cases[-1])
    problems.train(optimizer, grads, values=values, dtype="float32")
    state = problems.state_of(optimizer)
    for i, slots in enumerate(_slots(optimizer, values)):
        for name, slot in slots.items():
            if isinstance(slot, Fill) and not slot.signed:
                value = state[f"slot.{name}.{i}"]
                assert np.all(value >= 0), f"{name} is declared as signed=False, and is {value.min(initial=0)}"

"""What optimizers store: `python -m keras_optkit.testing.memory [NAME...]` prints it in bytes per parameter.

Counted are the bytes of `optimizer.variables` on a model with dense, convolution, attention and embedding weights, but
for the learning rate and the update count, with default arguments, for each `slot_dtype`. Wrappers are around the
optimizer in the first arguments of their cards.
"""

from __future__ import annotations

import argparse
import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import keras

from keras_optkit.registry import cards
from keras_optkit.saving import constructor_parameters

#: The columns of the table.
DTYPES = (None, "bfloat16", "bfloat16+8", "int8")

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1}


def network() -> keras.Model:
    """A model with an embedding, attention, a convolution and dense layers, and 124,000 elements."""
    words = keras.Input((16,), dtype="int32")
    x = keras.layers.Embedding(512, 64)(words)
    x = keras.layers.LayerNormalization()(x + keras.layers.MultiHeadAttention(4, 16)(x, x))
    x = keras.layers.Conv1D(128, 3)(x)
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.Dense(256, "relu")(x))
    return keras.Model(words, keras.layers.Dense(64)(x))


def bytes_of(variables: Iterable[Any]) -> int:
    """The bytes of variables."""
    return sum(math.prod(v.shape) * _BYTES[keras.backend.standardize_dtype(v.dtype)] for v in variables)


def bytes_per_parameter(optimizer: Any, model: Any) -> float:
    """The bytes of an optimizer's variables, once it is built, but for rate and count, per element of the weights."""
    optimizer.build(model)
    once = {id(optimizer.iterations), id(optimizer._multiplier)}
    held = [v for v in optimizer.variables if id(v) not in once]
    size = sum(math.prod(v.shape) for v in model.trainable_variables)
    return bytes_of(held) / size


def measured(names: Sequence[str] = ()) -> list[list[str]]:
    """The rows of the table, by name: a cell for each of `DTYPES`, "-" where the optimizer refuses it."""
    rows = []
    for card in cards("optimizer"):
        if names and card.name not in names:
            continue
        row, parameters = [card.name], constructor_parameters(card.make)  # type: ignore[arg-type]
        needed = {k: v for k, v in card.cases[0].items() if parameters[k].default is inspect.Parameter.empty}
        for dtype in DTYPES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    optimizer = card.make(**needed, slot_dtype=dtype)
                    row.append(f"{bytes_per_parameter(optimizer, network()):.2f}")
                except ValueError as error:
                    if "slot_dtype" not in str(error):
                        raise
                    row.append("-")
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m keras_optkit.testing.memory", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of optimizers; all when left out")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.names) - {card.name for card in cards("optimizer")}
    if unknown:
        parser.error(f"unknown names {sorted(unknown)}")
    head = ["bytes per parameter", *(f"`{dtype}`" if dtype else "float32" for dtype in DTYPES)]
    for row in [head, ["---"] * len(head), *measured(chosen.names)]:
        print(f"| {' | '.join(row)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

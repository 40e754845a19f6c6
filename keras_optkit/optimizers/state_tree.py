"""The state of optimizers in `model.get_state_tree()`, where Keras tells variables by their paths.

Those of packed state are numbered, and another number of them, or other weights, may have joined the optimizer of the
model that the tree is set in. So a tree holds a description for each optimizer of ours, beside its variables. Keras's
`OrbaxCheckpoint` calls the same two methods.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_optkit.optimizers.engine.files import entry_of, unpacked
from keras_optkit.optimizers.of_model import ours

#: The name of the description, beside the variables of an optimizer.
_NAME = "packed"


def describing_optimizers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`get_state_tree` of `keras.Model`, which adds how the state of optimizers of ours is packed."""

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        tree = function(self, *args, **kwargs)
        for optimizer in ours(self.optimizer):
            description = np.frombuffer(json.dumps(optimizer.packed()).encode(), np.uint8)
            _set(tree["optimizer_variables"], f"{_prefix(optimizer)}/{_NAME}", description)
        return tree

    return wrapped


def restoring_optimizers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`set_state_tree` of `keras.Model`, which hands each weight its state, however it is packed, or raises."""

    @functools.wraps(function)
    def wrapped(self: Any, state_tree: Any) -> Any:
        found = ours(getattr(self, "optimizer", None)) if "optimizer_variables" in state_tree else []
        if not found:
            return function(self, state_tree)
        values = _flat(state_tree["optimizer_variables"])
        given = {path: values.pop(path) for path in list(values) if path.split("/")[-1] == _NAME}
        for optimizer in found:
            path = f"{_prefix(optimizer)}/{_NAME}"
            if path not in given and len(given) == len(found) == 1:  # Keras numbers names through in a process
                path = next(iter(given))
            if path not in given:
                _warn_if_missing(optimizer, values)
                continue
            packed = json.loads(_on_host(given[path]).tobytes())
            if packed != optimizer.packed():
                paths = [path for entry in packed["entries"].values() for path in entry_of(entry)[0]]
                paths += [path for path, _ in packed["given"]]
                optimizer.load_own_variables(unpacked(packed, {path: _on_host(values.pop(path)) for path in paths}))
        return function(self, {**state_tree, "optimizer_variables": values})

    return wrapped


def _prefix(optimizer: Any) -> str:
    return str(optimizer.iterations.path.rpartition("/")[0])


def _warn_if_missing(optimizer: Any, values: dict[str, Any]) -> None:
    """Of a tree without a description, from a version before it had one, Keras takes what fits."""
    missing = [variable.path for variable in optimizer.variables if variable.path not in values]
    if missing:
        warnings.warn(
            f"state_tree holds no value for {len(missing)} variables of {optimizer.name}, which keep theirs: "
            f"{', '.join(missing[:10])}.",
            stacklevel=3,
        )


def _on_host(value: Any) -> np.ndarray:
    value = np.asarray(keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value)
    return value.astype("float32") if value.dtype.name == "bfloat16" else value


def _set(tree: dict[str, Any], path: str, value: Any) -> None:
    *outer, name = path.split("/")
    for part in outer:
        tree = tree.setdefault(part, {})
    tree[name] = value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat

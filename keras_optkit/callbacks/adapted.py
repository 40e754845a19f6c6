"""What layers have learned from data without a gradient, such as the mean and variance of `Normalization`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_optkit.backend import on_host
from keras_optkit.callbacks.owned import keeps_assets_only, own_variables
from keras_optkit.private import forget_trace, sublayers


def adapted(model: Any) -> dict[str, dict[str, Any]]:
    """The assets and adapted attributes of layers that have some, by the places of the layers."""
    found = {place: _adapted_in(layer) for place, layer in adapting(model)}
    return {place: state for place, state in found.items() if state}


def adapting(model: Any) -> list[tuple[str, Any]]:
    """The layers that adapt something besides variables, counted among themselves: others are listed once built."""
    layers = {
        id(layer): layer
        for layer in sublayers(model)
        if isinstance(layer, keras.layers.Discretization) or hasattr(layer, "save_assets")
    }
    return [(str(i), layer) for i, layer in enumerate(layers.values())]


def _adapted_in(layer: Any) -> dict[str, Any]:
    state: dict[str, Any] = {}
    if isinstance(layer, keras.layers.Discretization) and layer.num_bins is not None:
        state["attributes"] = {
            "bin_boundaries": layer.bin_boundaries and list(layer.bin_boundaries),
            "summary": np.array(layer.summary),
        }
    if keeps_assets_only(layer):
        state["stored"] = {}
        with contextlib.suppress(AttributeError):  # so Keras for one that has not been adapted
            layer.save_own_variables(state["stored"])
    if hasattr(layer, "save_assets"):
        with tempfile.TemporaryDirectory() as directory:
            layer.save_assets(directory)
            files = sorted(path for path in Path(directory).rglob("*") if path.is_file())
            state["assets"] = {
                path.relative_to(directory).as_posix(): np.frombuffer(path.read_bytes(), "uint8") for path in files
            }
    return {name: part for name, part in state.items() if part}


def set_adapted(layer: Any, state: Mapping[str, Any]) -> bool:
    """Sets what a layer has adapted; False if it was so before."""
    if _same(_adapted_in(layer), state):
        return False
    if "stored" in state:
        layer.load_own_variables(state["stored"])
    for name, value in state.get("attributes", {}).items():
        setattr(layer, name, value)
    if "assets" in state:
        with tempfile.TemporaryDirectory() as directory:
            for name, content in state["assets"].items():
                path = Path(directory, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.tobytes())
            layer.load_assets(directory)
    return True


@contextlib.contextmanager
def derived(model: Any, adapted: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """While variables are being set: layers renew afterwards what they had computed from them, where it is to change.

    `Normalization`, for example, computes with tensors that it made of its variables when it was adapted. A compiled
    step holds such tensors as constants, and is made again.
    """
    deriving = [layer for layer in sublayers(model) if _derives_values(layer)]
    before = [[on_host(v).tobytes() for v in own_variables(layer)] for layer in deriving]
    yield
    changed = False
    for layer, values in zip(deriving, before, strict=True):
        if [on_host(v).tobytes() for v in own_variables(layer)] != values:
            _renew(layer)
            changed = True
    for place, layer in adapting(model):
        if place in adapted and set_adapted(layer, adapted[place]):
            changed = True
    if changed:
        forget_compiled(model)


def _derives_values(layer: Any) -> bool:
    loads = type(layer).load_own_variables
    own = loads is not keras.layers.Layer.load_own_variables and not loads.__module__.startswith("keras.")
    return own or hasattr(layer, "finalize_state")


def _renew(layer: Any) -> None:
    if hasattr(layer, "finalize_state"):
        layer.finalize_state()
    else:
        store: dict[str, Any] = {}
        layer.save_own_variables(store)
        layer.load_own_variables({name: np.array(keras.ops.convert_to_numpy(v)) for name, v in store.items()})


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) and isinstance(b, np.ndarray) else a == b


def forget_compiled(model: Any) -> None:
    """Has the compiled functions of a model made again."""
    if keras.config.backend() == "jax":
        forget_trace(model.train_step)
    model.test_function = model.predict_function = None
    if model.train_function is not None:
        model.make_train_function(force=True)

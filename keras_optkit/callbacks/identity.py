"""What a run is made of, as JSON: a state must only be resumed in the run that it comes from."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import json
import os
import platform
import re
import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_optkit.callbacks.state import generators_now, set_generators
from keras_optkit.callbacks.stock import has_state
from keras_optkit.data import EpochDataset
from keras_optkit.meaning import COUNTER, checksum, is_known_code, meaning, without_made_up
from keras_optkit.optimizers.of_model import optimizers_of
from keras_optkit.private import CALLBACK_STATE, compile_arguments, sublayers

#: What is compared, by names that a user can accept a change with.
SECTIONS = ("model", "optimizer", "compile", "data", "validation", "fit", "callbacks", "backend")

#: Libraries whose releases may compute other bits.
_LIBRARIES = ("keras", "tensorflow", "jax", "numpy", "keras_optkit")

#: Arguments of `fit` that decide what is trained on, besides the data themselves.
_ARGUMENTS = ("batch_size", "class_weight", "shuffle", "steps_per_epoch", "validation_freq", "validation_split")
_OF_VALIDATION = ("validation_steps", "validation_batch_size")

#: Settings of callbacks that say where something is written, or how much.
_WHERE = ("directory", "log_dir", "filepath", "filename", "path", "verbose", "model", "sinks")

#: What `compile` and `fit` set on a model.
_SET_BY_KERAS = {
    "build", "built", "compiled", "history", "input_names", "jit_compile", "loss", "name", "optimizer", "output_names",
    "predict_function", "quantize", "run_eagerly", "steps_per_execution", "stop_training", "test_function",
    "train_function",
}  # fmt: skip


def identity(model: Any, arguments: Mapping[str, Any], callbacks: Sequence[Any]) -> dict[str, Any]:
    """Describes a compiled model, the arguments of `fit` and the callbacks, as far as training depends on them.

    Looking at the data draws no random numbers from the generators that training draws from.
    """
    generators = generators_now()
    try:
        data = {name: arguments[name] for name in ("x", "y", "sample_weight") if arguments.get(name) is not None}
        described = {
            "model": {"config": _config(model), "code": _code(model), "attributes": _attributes(model)},
            "optimizer": [_config(optimizer) for optimizer in optimizers_of(model)],
            "compile": _compiled(model),
            "data": {name: _data(part) for name, part in data.items()},
            "validation": _validation(arguments),
            "fit": {name: meaning(arguments[name]) for name in _ARGUMENTS if name in arguments},
            "callbacks": _with_places(_callbacks(callbacks), model),
            "backend": {
                "name": keras.config.backend(),
                "replicas": getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1),
            },
        }
    finally:
        set_generators(generators)
    return json.loads(json.dumps(described))


def variables(model: Any) -> list[Any]:
    """The kinds, types and shapes of a model's weights."""
    metrics = {id(v) for v in model.metrics_variables}
    return [
        [COUNTER.sub("", v.name.split("/")[-1]), str(v.dtype), list(v.shape)]
        for v in model.variables
        if id(v) not in metrics
    ]


@functools.cache
def versions() -> dict[str, str]:
    """The releases of Python and of the libraries that compute."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def differences(saved: Any, here: Any, place: str = "") -> list[str]:
    """Lines that say where two descriptions differ."""
    if isinstance(saved, dict) and isinstance(here, dict):
        keys = [*saved, *(key for key in here if key not in saved)]
        return [line for k in keys for line in differences(saved.get(k), here.get(k), f"{place}.{k}".lstrip("."))]
    if isinstance(saved, list) and isinstance(here, list) and len(saved) == len(here):
        return [
            line
            for i, (a, b) in enumerate(zip(saved, here, strict=True))
            for line in differences(a, b, f"{place}[{i}]")
        ]
    return [] if saved == here else [f"{place}: {_short(saved)} in the bundle, {_short(here)} here"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


# -- model and optimizer ----------------------------------------------------------------------------------------------


def _config(thing: Any) -> Any:
    """The config of a model or an optimizer without made-up names; None where there is none, as in many own models."""
    try:
        config = json.loads(json.dumps(keras.saving.serialize_keras_object(thing)))
    except Exception:  # whatever the config of a user's class raises
        return type(thing).__qualname__
    return without_made_up(_without_code(config))


def _without_code(config: Any) -> Any:
    """Keras puts the compiled code of a Lambda layer, with the lines where it stands, into its config; see `_code`.

    What a layer has adapted is state, and a script need not adapt it again.
    """
    if isinstance(config, dict):
        if config.get("class_name") == "__lambda__":
            return "function"
        if "class_name" in config:  # the module may have been moved, and how it is compiled is described apart
            config = {key: part for key, part in config.items() if key not in ("module", "compile_config")}
        if config.get("class_name") == "Discretization" and config["config"].get("num_bins") is not None:
            config = config | {"config": config["config"] | {"bin_boundaries": None}}
        return {key: _without_code(part) for key, part in config.items()}
    return [_without_code(part) for part in config] if isinstance(config, list) else config


def _code(model: Any) -> dict[str, Any]:
    """What those classes of the model do that do not come from Keras."""
    described = {type(part).__qualname__: meaning(type(part)) for part in [model, *sublayers(model)]}
    return {name: each for name, each in sorted(described.items()) if " " in each}  # a name and a digest


def _attributes(model: Any) -> dict[str, Any]:
    """Settings of a user's layers and models, which often have no config: numbers, strings, functions, losses.

    Of Keras's layers they are functions and objects of the user, of which a config has no more than the name.
    """
    found = {}
    for i, part in enumerate([model, *sublayers(model)]):
        held = {name: value for name, value in vars(part).items() if name not in _names_of_keras()}
        if is_known_code(type(part).__module__):
            held = {name: value for name, value in held.items() if _has_own_code(value)}
        else:
            arguments = {f"_{name}" for method in ("__init__", "compile") for name in _parameters(part, method)}
            held = {name: value for name, value in held.items() if name in arguments or name[0] != "_"}
            for name in [name for name, value in held.items() if isinstance(value, np.ndarray)]:
                if not {name, f"_{name}"} & arguments:  # it may have been computed from a variable
                    del held[name]
        given = {name: without_made_up(meaning(value)) for name, value in held.items() if _is_setting(value)}
        if given:
            found[f"{i} {type(part).__qualname__}"] = given
    return found


def _has_own_code(value: Any) -> bool:
    return not is_known_code(value.__module__ if isinstance(value, types.FunctionType) else type(value).__module__)


def _parameters(thing: Any, method: str) -> list[str]:
    function = getattr(type(thing), method, None)
    return [] if function is None else list(inspect.signature(function).parameters)


@functools.cache
def _names_of_keras() -> frozenset[str]:
    """Attributes that Keras gives every layer and model."""
    made = [keras.Model(name="model"), keras.layers.Layer(name="layer")]
    return frozenset(_SET_BY_KERAS.union(*map(vars, made)))


def _is_setting(value: Any) -> bool:
    if isinstance(value, str):
        return os.sep not in value  # or it says where something is
    if isinstance(value, list | tuple):
        return all(_is_setting(part) for part in value)
    if isinstance(value, Mapping):
        return all(_is_setting(part) for part in value.values())
    functions = (types.FunctionType, types.MethodType, functools.partial)
    of_keras = (keras.losses.Loss, keras.regularizers.Regularizer, keras.initializers.Initializer)
    kinds = (bool, int, float, np.ndarray, *functions, *of_keras, keras.constraints.Constraint)
    return value is None or isinstance(value, kinds)


def _compiled(model: Any) -> Any:
    return meaning(
        {name: value for name, value in compile_arguments(model).items() if name != "optimizer" and value is not None}
    )


# -- data -------------------------------------------------------------------------------------------------------------


def _data(data: Any) -> Any:
    """Describes data: arrays by all rows, others by the kind and, if it is always the same, by the first batch."""
    if isinstance(data, EpochDataset):
        return data.fingerprint()
    parts = keras.tree.flatten(data)
    if all(hasattr(part, "__array__") or isinstance(part, bool | int | float | str) for part in parts):
        return [checksum(np.asarray(part)) for part in parts]
    described: dict[str, Any] = {"kind": meaning(type(data))}
    if hasattr(data, "element_spec"):
        described |= {"data": meaning(data), "first batch": _first(lambda: next(iter(data)))}
    elif isinstance(data, keras.utils.PyDataset):
        described |= {"batches": data.num_batches, "first batch": _first(lambda: data[0])}
    return described


def _first(take: Callable[[], Any]) -> Any:
    """The first batch, if it is the same twice; data that are shuffled cannot be told by it."""
    one, other = ([checksum(np.asarray(part)) for part in _arrays_of(take())] for _ in range(2))
    return one if one == other else None


def _arrays_of(batch: Any) -> list[Any]:
    return [part for part in keras.tree.flatten(batch) if hasattr(part, "__array__")]


def _validation(arguments: Mapping[str, Any]) -> dict[str, Any]:
    data = arguments.get("validation_data")
    described = {name: meaning(arguments[name]) for name in _OF_VALIDATION if arguments.get(name) is not None}
    if data is not None:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        given = {"x": x, "y": y, "sample_weight": sample_weight}
        described |= {name: _data(part) for name, part in given.items() if part is not None}
    return described


# -- callbacks --------------------------------------------------------------------------------------------------------


def _callbacks(callbacks: Sequence[Any]) -> dict[str, Any]:
    """The settings of those that have state, or that set the learning rate, by class and number."""
    found: dict[str, Any] = {}
    seen: Counter[str] = Counter()
    for callback in callbacks:
        if has_state(callback) or isinstance(callback, keras.callbacks.LearningRateScheduler):
            name = type(callback).__name__
            found[f"{name}.{seen[name]}"] = {"class": meaning(type(callback))} | _settings(callback)
            seen[name] += 1
    return found


def _settings(callback: Any) -> dict[str, Any]:
    """The arguments that a callback was made with, as far as it keeps them under their names."""
    names = _parameters(callback, "__init__")
    state = next((CALLBACK_STATE[cls] for cls in type(callback).__mro__ if cls in CALLBACK_STATE), ())
    return {
        name: meaning(vars(callback)[name])
        for name in names
        if name in vars(callback) and name not in (*_WHERE, *state) and not _is_path(vars(callback)[name])
    }


def _with_places(settings: Any, model: Any) -> Any:
    """Settings with the places of layers for their names, in which Keras counts what has been made before."""
    if isinstance(settings, dict):
        return {name: _with_places(part, model) for name, part in settings.items()}
    if isinstance(settings, list):
        return [_with_places(part, model) for part in settings]
    if isinstance(settings, str):
        for i, layer in enumerate(sublayers(model)):
            settings = re.sub(rf"\b{re.escape(layer.name)}\b", f"<layer {i}>", settings)
    return settings


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or (isinstance(value, str) and os.sep in value)

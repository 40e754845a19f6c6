"""What a training is made of, as JSON: a state must only go on in the training that it comes from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_optkit.data import EpochDataset
from keras_optkit.private import sublayers

#: Libraries whose releases may compute other bits.
_LIBRARIES = ("keras", "tensorflow", "jax", "numpy", "keras_optkit")

#: Names that Keras makes up, with a number that depends on what was built before.
_COUNTER = re.compile(r"_\d+$")


#: Arguments of `fit` that decide what is trained on, besides the data themselves.
_ARGUMENTS = ("batch_size", "class_weight", "shuffle", "steps_per_epoch", "validation_freq", "validation_split")


def identity(model: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describes, as JSON, a built and compiled model and the arguments of `fit`, as far as training depends on them."""
    data = arguments.get("x")
    described = {
        "model": _config(model),
        "variables": [[_kind(v), str(v.dtype), list(v.shape)] for v in model.variables],
        "code": dict(sorted(_code(model))),
        "optimizer": _config(model.optimizer),
        "compile": _compiled(model),
        "replicas": getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1),
        "data": data.fingerprint() if isinstance(data, EpochDataset) else None,
        "fit": {name: repr(arguments[name]) for name in _ARGUMENTS if name in arguments},
        "backend": keras.config.backend(),
    }
    return json.loads(json.dumps(described))


def versions() -> dict[str, str]:
    """The releases of the libraries that compute."""
    found = {}
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


def _config(thing: Any) -> Any:
    """The config of a model or an optimizer without made-up names; None where there is none, as in many own models."""
    try:
        config = keras.saving.serialize_keras_object(thing)
        return _plain(json.loads(json.dumps(config)))
    except (NotImplementedError, TypeError, ValueError):
        return type(thing).__qualname__


def _plain(config: Any) -> Any:
    """Without what differs between two builds of the same: counters in names, ids, and shapes to build for."""
    if isinstance(config, dict):
        return {key: _plain(part) for key, part in config.items() if key not in ("build_config", "shared_object_id")}
    if isinstance(config, list):
        return [_plain(part) for part in config]
    return _COUNTER.sub("", config) if isinstance(config, str) else config


def _compiled(model: Any) -> Any:
    config = model.get_compile_config() or {}
    config = {name: value for name, value in config.items() if name != "optimizer"}
    return _plain(json.loads(json.dumps(config, default=lambda value: type(value).__qualname__)))


def _kind(variable: Any) -> str:
    return _COUNTER.sub("", variable.name.split("/")[-1])


def _code(model: Any) -> Iterator[tuple[str, str]]:
    """Checksums of the source of those classes of the model that come from neither Keras nor this package."""
    for part in [model, *sublayers(model)]:
        for cls in type(part).__mro__:
            if cls.__module__.split(".")[0] in ("builtins", "abc", "keras", "keras_optkit", "tensorflow"):
                continue
            try:
                source = inspect.getsource(cls)
            except (OSError, TypeError):  # typed into an interpreter
                continue
            yield cls.__qualname__, hashlib.sha256(source.encode()).hexdigest()[:16]

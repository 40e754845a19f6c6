"""What other processes are given to train the trials of a search: a file that each of them reads once.

It holds functions and data as `cloudpickle` writes them. The buffers of arrays are in the file as they are, and are
mapped into memory, so that workers on one machine share what they do not change. It is no state: the search deletes
it when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import mmap
import pickle
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import keras

from keras_optkit.files import atomic_write
from keras_optkit.tuning.books import PAYLOADS, writing
from keras_optkit.tuning.training import Training

_ALIGNED = 64


def cloudpickle(argument: str) -> Any:
    """The package that pickles functions of a script.

    Args:
        argument: Of `search`, for the message.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        return importlib.import_module("cloudpickle")
    except ImportError as error:
        raise ImportError(
            f'{argument} needs cloudpickle, which is not installed: pip install "keras-optkit[workers]".'
        ) from error


@dataclass(frozen=True)
class Payload:
    """Where it is.

    Attributes:
        path: The file.
        digest: Of everything in it but the buffers. What is unpickled can run any code, so that only a file with this
            digest is.
    """

    path: Path
    digest: str


def write(directory: Path, training: Training, argument: str) -> Payload:
    """Writes a payload, and deletes those of a search that was killed.

    Args:
        directory: Of the search.
        training: What all trials have in common.
        argument: Of `search`, for messages.

    Raises:
        ImportError: If cloudpickle is not installed.
        TypeError: If something cannot be pickled, with its name.
        OSError: If the disk does not take it.
    """
    for old in directory.glob(PAYLOADS):
        old.unlink()
    pickler, content = cloudpickle(argument), BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    try:
        pickler.Pickler(content, protocol=5, buffer_callback=buffers.append).dump((_settings(pickler), training))
    except Exception as error:
        raise _refused(training, argument, error) from error
    pickled = content.getvalue()
    views = [buffer.raw() for buffer in buffers]
    header = json.dumps({"pickled": len(pickled), "buffers": [view.nbytes for view in views]}).encode()
    path = directory / f"payload-{secrets.token_hex(4)}.pickle"
    with writing(path), atomic_write(path) as file:
        file.write(header + b"\n" + pickled)
        for view in views:
            file.write(bytes(-file.tell() % _ALIGNED))
            file.write(view)
    return Payload(path, hashlib.sha256(header + pickled).hexdigest())


def _refused(training: Training, argument: str, error: Exception) -> Exception:
    """Names the argument that cannot be pickled."""
    names = {"x": "data", "y": "data", "validation_data": "validation"}
    parts = {"build": training.hypermodel, "callbacks": training.callbacks}
    parts |= {names.get(name, f"fit_arguments[{name!r}]"): value for name, value in training.fit.items()}
    for name, value in parts.items():
        try:
            cloudpickle(argument).dumps(value)
        except Exception as found:
            hint = " Give arrays, or a keras.utils.PyDataset." if hasattr(value, "element_spec") else ""
            shown = training.hypermodel.builder if name == "build" else type(value).__name__
            return TypeError(
                f"{name} must be something that cloudpickle can send to another process where {argument} is given, "
                f"got {shown}: {type(found).__name__}: {found}.{hint}"
            )
    return error


def read(payload: Payload) -> Training:
    """Reads a payload, and makes this process like the one that has written it.

    Raises:
        RuntimeError: If the file is not there, or is another one.
    """
    try:
        with payload.path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise RuntimeError(
            f"{str(payload.path)!r} is not there: directory must be on a disk that all workers see, or the search has "
            "ended."
        ) from error
    end = mapped.find(b"\n")
    header = mapped[:end]
    sizes = json.loads(header)
    place = end + 1 + sizes["pickled"]
    pickled = mapped[end + 1 : place]
    if hashlib.sha256(header + pickled).hexdigest() != payload.digest:
        raise RuntimeError(f"{str(payload.path)!r} was changed after it had been written.")
    whole, views = memoryview(mapped), []
    for size in sizes["buffers"]:
        place += -place % _ALIGNED
        views.append(whole[place : place + size])
        place += size
    settings, training = pickle.loads(pickled, buffers=views)
    _set(settings)
    return training


# What is set for a whole process


def _settings(pickler: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "image_data_format": keras.config.image_data_format(),
        "dtype_policy": keras.dtype_policies.serialize(keras.config.dtype_policy()),
        "registered": _registered(pickler),
    }
    if keras.config.backend() == "jax":
        import jax

        settings["x64"] = jax.config.jax_enable_x64
    return settings


def _registered(pickler: Any) -> list[tuple[str, bytes]]:
    """What the search has registered with Keras, and importing the package does not.

    What cannot be pickled is left out: if the build function needs it, that cannot be pickled either.
    """
    found = []
    for name, value in keras.saving.get_custom_objects().items():
        if not str(getattr(value, "__module__", "")).startswith("keras_optkit."):
            with contextlib.suppress(Exception):
                found.append((name, pickler.dumps(value)))
    return found


def _set(settings: Mapping[str, Any]) -> None:
    keras.config.set_floatx(settings["floatx"])
    keras.config.set_epsilon(settings["epsilon"])
    keras.config.set_image_data_format(settings["image_data_format"])
    keras.config.set_dtype_policy(keras.dtype_policies.deserialize(settings["dtype_policy"]))
    if "x64" in settings:
        import jax

        jax.config.update("jax_enable_x64", settings["x64"])
    known = keras.saving.get_custom_objects()
    for name, pickled in settings["registered"]:
        value = pickle.loads(pickled)  # a class is the one that the build function uses
        package, _, short = name.rpartition(">")
        if known.get(name) is value:
            continue
        if package:
            keras.saving.register_keras_serializable(package, short)(value)
        else:
            known[name] = value

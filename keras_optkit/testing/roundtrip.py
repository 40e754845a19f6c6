"""Writing things and reading them again, for checks of every kind."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras


def written(instance: Any) -> str:
    """The instance as JSON text."""
    return json.dumps(keras.saving.serialize_keras_object(instance), sort_keys=True)


def through_json(instance: Any, case: Mapping[str, Any]) -> Any:
    """What is built from the instance's JSON text.

    Asserts that the config holds the arguments in `case`, and that class and config are the same afterwards.
    """
    text = written(instance)
    config = json.loads(text)["config"]
    for name, value in case.items():
        assert name in config, f"the config has lost {name!r}"
        assert config[name] == json.loads(written(value)), f"{name}: given {value!r}, the config has {config[name]!r}"
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert_same(instance, again)
    return again


def through_file(model: Any) -> Any:
    """The model saved to a `.keras` file and loaded, without `custom_objects`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.keras"
        model.save(path)
        return keras.saving.load_model(path)


def assert_same(one: Any, other: Any) -> None:
    """Asserts that two objects have the same class and config."""
    assert type(one) is type(other), f"{type(one)} became {type(other)}"
    assert written(one) == written(other)

"""Configs read off the constructor's own signature, so that no class writes (or forgets) its `get_config`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import keras

from keras_optkit.private import sublayers

_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

#: The key of the one entry that a time is in a config.
_TIME = "timedelta"


def constructor_parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    """The named parameters of `cls(...)` that classes of this package declare.

    A constructor that passes `**kwargs` on accepts what the next one in the MRO accepts, so the walk continues from
    there, as far as the classes built on `FromSignature` reach; Keras's own base classes have configs of their own. The
    nearest class wins where a name appears twice.
    """
    return _parameters(cls)


@functools.lru_cache(maxsize=1024)  # each optimizer that is made asks for those of all others
def _parameters(cls: type) -> Mapping[str, inspect.Parameter]:
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        init = base.__dict__.get("__init__")
        if init is None or not issubclass(base, FromSignature):
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in _NAMED and not parameter.name.startswith("_"):
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return MappingProxyType(found)


class FromSignature:
    """Mixin: every constructor parameter is an attribute of the same name, and `get_config` collects them.

    The contract is scikit-learn's: `__init__` stores each of its parameters under the parameter's own name. The config
    then holds the present values, so `opt.learning_rate = 0.1` survives a save. Nested Keras objects (schedules, inner
    optimizers) are serialised and deserialised with Keras's own functions. Where the base class has a config of its own
    (layers), it is the starting point.
    """

    def get_config(self) -> dict[str, Any]:
        """The constructor arguments that would build this object again, as JSON-ready values."""
        config = self._inherited_config()
        for name in constructor_parameters(type(self)):
            if name in config:  # the base class knows how to write its own, e.g. a layer's dtype policy
                continue
            if not hasattr(self, name):
                raise AttributeError(
                    f"{type(self).__name__} does not store its argument {name!r} under that name, so its config would "
                    f"lose it. Set self.{name} in __init__."
                )
            config[name] = keras.saving.serialize_keras_object(self._config_value(name))
        return config

    def _inherited_config(self) -> dict[str, Any]:
        """The config of the Keras base class, e.g. a layer's dtype policy."""
        try:
            return dict(super().get_config())  # type: ignore[misc]
        except (AttributeError, NotImplementedError):  # Keras declares get_config on some bases without one
            return {}

    def _config_value(self, name: str) -> Any:
        """The value to save for one constructor parameter; a time is a dict with its seconds, a variable a number."""
        value = getattr(self, name)
        if isinstance(value, keras.Variable):
            return as_written(value)
        return {_TIME: value.total_seconds()} if isinstance(value, timedelta) else value

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Builds the object that `get_config` described."""

        def read(value: Any) -> Any:
            if isinstance(value, dict) and set(value) == {_TIME}:
                return timedelta(seconds=value[_TIME])
            if isinstance(value, dict | list | tuple):
                return keras.saving.deserialize_keras_object(value, custom_objects=custom_objects)
            return value

        return cls(**{name: read(value) for name, value in config.items()})


def as_written(variable: keras.Variable) -> Any:
    """The value of a scalar variable as one would write it: 0.1 where a float32 holds 0.100000001490116."""
    value = keras.ops.convert_to_numpy(variable)
    return float(str(value)) if value.dtype == "float32" else value.item()


def mark_as_built(model: Any) -> None:
    """Marks a model as built if all layers in it are.

    Keras does so when a model is called. One that is trained by a `train_step` of its own may never be, such as a GAN,
    and Keras would not save it.
    """
    inside = sublayers(model)
    if not model.built and inside and all(layer.built for layer in inside):
        model.built = True

"""The state of Keras's own callbacks, which have no methods for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit.private import CALLBACK_STATE

#: Those that keep nothing from one epoch to the next, or nothing that training depends on.
_STATELESS = {
    keras.callbacks.LearningRateScheduler,
    keras.callbacks.ProgbarLogger,
    keras.callbacks.RemoteMonitor,
    keras.callbacks.TerminateOnNaN,
}


def has_state_methods(callback: Any) -> bool:
    """Whether a callback takes part by itself, as ours do."""
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


def is_known(callback: Any) -> bool:
    """Whether all state of a callback is known: it has the methods, or it is one of Keras's own and no subclass."""
    stateless = type(callback) in _STATELESS or getattr(callback, "stateless", False)
    return has_state_methods(callback) or stateless or type(callback) in CALLBACK_STATE


def has_state(callback: Any) -> bool:
    """Whether there is state of it that can be saved."""
    return has_state_methods(callback) or bool(_attributes(callback))


def state_of(callback: Any) -> dict[str, Any]:
    """A copy of the state of a callback; of one that is not known, that of the class of Keras that it comes from."""
    if has_state_methods(callback):
        return _copied(callback.state_dict())
    state = {name: _copied(getattr(callback, name)) for name in _attributes(callback) if hasattr(callback, name)}
    if isinstance(callback, keras.callbacks.CSVLogger):
        state["text"] = _text(callback)
    return state


def set_state_of(callback: Any, state: Mapping[str, Any]) -> None:
    """Sets what `state_of` returned, after `on_train_begin`."""
    if has_state_methods(callback):
        callback.load_state_dict(state)
        return
    for name in _attributes(callback):
        if name in state:
            setattr(callback, name, _copied(state[name]))
    if isinstance(callback, keras.callbacks.CSVLogger):
        _set_text(callback, state["text"])


def _attributes(callback: Any) -> tuple[str, ...]:
    return next((CALLBACK_STATE[cls] for cls in type(callback).__mro__ if cls in CALLBACK_STATE), ())


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_copied(part) for part in value]
    if isinstance(value, np.ndarray) or keras.ops.is_tensor(value):
        return np.array(keras.ops.convert_to_numpy(value))
    return value


def _text(logger: Any) -> str:
    """What the log holds, which is flushed at every epoch; a resumed log continues from here, whatever came after."""
    with open(logger.filename, newline="") as file:  # noqa: PTH123  (a name as Keras takes them)
        return file.read()


def _set_text(logger: Any, text: str) -> None:
    """Makes the log, which `on_train_begin` has opened, hold this text, to be written on from its end."""
    with open(logger.filename, "w", newline="") as file:  # noqa: PTH123
        file.write(text)
    logger.csv_file.seek(0, 2)
    logger.append_header = not text

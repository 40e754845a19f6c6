"""Training optimisation for Keras 3: optimizers, schedules, initializers, regularizers, layers, callbacks, tuning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keras_optkit import callbacks, data, finding, initializers, inspection, layers, optimizers, regularizers, schedules
from keras_optkit.averaging import recalibrate_batch_norm
from keras_optkit.finding import find_batch_size, find_learning_rate
from keras_optkit.fit.wrapping import wrap_keras
from keras_optkit.inspection import diagnose, inspect
from keras_optkit.optimizers import Group
from keras_optkit.optimizers.mup import mup
from keras_optkit.registry import Card, cards, register

if TYPE_CHECKING:
    from keras_optkit import testing, tuning

__version__ = "0.1.0"

__all__ = [
    "Card",
    "Group",
    "__version__",
    "callbacks",
    "cards",
    "data",
    "diagnose",
    "find_batch_size",
    "find_learning_rate",
    "finding",
    "initializers",
    "inspect",
    "inspection",
    "layers",
    "mup",
    "optimizers",
    "recalibrate_batch_norm",
    "register",
    "regularizers",
    "schedules",
    "testing",
    "tuning",
]

wrap_keras()

_LAZY = ("testing", "tuning")  # they import KerasTuner, or serve tests only


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

"""Hyperparameter search on KerasTuner: a space is data, a search is one call, the result is a table and a model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from keras_optkit.space import Bool, Choice, Float, Int, Space, Values

if TYPE_CHECKING:
    from keras_optkit.tuning import pruners, spaces
    from keras_optkit.tuning.hypermodel import HyperModel
    from keras_optkit.tuning.optuna_oracle import OptunaOracle
    from keras_optkit.tuning.result import Result
    from keras_optkit.tuning.searching import search
    from keras_optkit.tuning.trials import Trial
    from keras_optkit.tuning.tuner import Tuner

__all__ = [
    "Bool",
    "Choice",
    "Float",
    "HyperModel",
    "Int",
    "OptunaOracle",
    "Result",
    "Space",
    "Trial",
    "Tuner",
    "Values",
    "pruners",
    "search",
    "spaces",
]

# The cards carry spaces, so that `import keras_optkit` comes here; KerasTuner is imported when it is used.
_LAZY = {
    "HyperModel": "hypermodel",
    "OptunaOracle": "optuna_oracle",
    "Result": "result",
    "Trial": "trials",
    "Tuner": "tuner",
    "search": "searching",
}


def __getattr__(name: str) -> Any:
    if name in ("pruners", "spaces"):
        return importlib.import_module(f"{__name__}.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

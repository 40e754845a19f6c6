"""Guarding a run against values that are not finite."""

from keras_optkit.callbacks.guard.callback import NonFiniteGuard
from keras_optkit.callbacks.guard.failure import Failure, TrainingDivergedError

__all__ = ["Failure", "NonFiniteGuard", "TrainingDivergedError"]

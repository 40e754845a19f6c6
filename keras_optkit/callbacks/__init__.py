"""Callbacks for `model.fit`: stopping early, driving hyperparameters, monitoring, averaged weights, going back."""

from keras_optkit.callbacks.averaging import AveragedWeights
from keras_optkit.callbacks.guard import Failure, NonFiniteGuard, TrainingDivergedError
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.monitor import TrainingMonitor
from keras_optkit.callbacks.stopping import EarlyStopping

__all__ = [
    "AveragedWeights",
    "EarlyStopping",
    "Failure",
    "NonFiniteGuard",
    "ScheduleHyperparameters",
    "TrainingDivergedError",
    "TrainingMonitor",
]

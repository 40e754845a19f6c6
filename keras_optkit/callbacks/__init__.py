"""Callbacks for `model.fit`: stopping, checkpoints, hyperparameters, monitoring, averages, recovery, resuming."""

from keras_optkit.callbacks import sinks
from keras_optkit.callbacks.averaging import AveragedWeights
from keras_optkit.callbacks.budget import TimeBudget
from keras_optkit.callbacks.checkpoint import Checkpoint
from keras_optkit.callbacks.guard import Failure, NonFiniteGuard, TrainingDivergedError
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.monitor import Curve, TrainingMonitor, plot_monitor, read_monitor
from keras_optkit.callbacks.plateau import ReduceLROnPlateau
from keras_optkit.callbacks.resume import Resume
from keras_optkit.callbacks.stopping import EarlyStopping
from keras_optkit.callbacks.unfreeze import Unfreeze
from keras_optkit.callbacks.validating import ValidateEvery

__all__ = [
    "AveragedWeights",
    "Checkpoint",
    "Curve",
    "EarlyStopping",
    "Failure",
    "NonFiniteGuard",
    "ReduceLROnPlateau",
    "Resume",
    "ScheduleHyperparameters",
    "TimeBudget",
    "TrainingDivergedError",
    "TrainingMonitor",
    "Unfreeze",
    "ValidateEvery",
    "plot_monitor",
    "read_monitor",
    "sinks",
]

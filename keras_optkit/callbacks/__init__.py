"""Callbacks for `model.fit`: stopping early, driving hyperparameters by schedules, monitoring, averaged weights."""

from keras_optkit.callbacks.averaging import AveragedWeights
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.monitor import Curve, TrainingMonitor, plot_monitor, read_monitor
from keras_optkit.callbacks.stopping import EarlyStopping

__all__ = [
    "AveragedWeights",
    "Curve",
    "EarlyStopping",
    "ScheduleHyperparameters",
    "TrainingMonitor",
    "plot_monitor",
    "read_monitor",
]

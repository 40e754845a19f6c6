"""Callbacks for `model.fit`: stopping early, driving hyperparameters by schedules, and monitoring."""

from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.monitor import TrainingMonitor
from keras_optkit.callbacks.stopping import EarlyStopping

__all__ = ["EarlyStopping", "ScheduleHyperparameters", "TrainingMonitor"]

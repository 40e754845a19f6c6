"""Callbacks for `model.fit`: stopping early, driving hyperparameters by schedules, monitoring, averaged weights."""

from keras_optkit.callbacks.averaging import AveragedWeights
from keras_optkit.callbacks.hyperparameters import ScheduleHyperparameters
from keras_optkit.callbacks.monitor import TrainingMonitor
from keras_optkit.callbacks.resume import Resume
from keras_optkit.callbacks.stopping import EarlyStopping

__all__ = ["AveragedWeights", "EarlyStopping", "Resume", "ScheduleHyperparameters", "TrainingMonitor"]

"""Watching training: what is computed inside the step, when it is read, and the files that it goes to."""

from keras_optkit.callbacks.monitor.callback import TrainingMonitor
from keras_optkit.callbacks.monitor.reading import Curve, plot_monitor, read_monitor

__all__ = ["Curve", "TrainingMonitor", "plot_monitor", "read_monitor"]

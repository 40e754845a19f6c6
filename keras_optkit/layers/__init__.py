"""Layers that regularise."""

from keras_optkit.layers.noise import ScheduledDropout
from keras_optkit.layers.normalization import GhostBatchNormalization

__all__ = ["GhostBatchNormalization", "ScheduledDropout"]

"""Layers that regularise or normalise."""

from keras_optkit.layers.drop import DropBlock, DropPath, stochastic_depth_rates
from keras_optkit.layers.noise import ScheduledDropout
from keras_optkit.layers.normalization import GhostBatchNormalization
from keras_optkit.layers.response import FilterResponseNormalization, GlobalResponseNormalization, LayerScale

__all__ = [
    "DropBlock",
    "DropPath",
    "FilterResponseNormalization",
    "GhostBatchNormalization",
    "GlobalResponseNormalization",
    "LayerScale",
    "ScheduledDropout",
    "stochastic_depth_rates",
]

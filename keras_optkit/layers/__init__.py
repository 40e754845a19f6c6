"""Layers that regularise or normalise, and wrappers that train kernels in another form."""

from keras_optkit.layers.drop import DropBlock, DropPath, stochastic_depth_rates
from keras_optkit.layers.evonorm import EvoNormB0, EvoNormS0
from keras_optkit.layers.noise import ScheduledDropout
from keras_optkit.layers.normalization import GhostBatchNormalization
from keras_optkit.layers.perturbing import DropConnect, ShakeDrop
from keras_optkit.layers.reparametrization import SpectralNormalization, WeightNormalization, WeightStandardization
from keras_optkit.layers.response import FilterResponseNormalization, GlobalResponseNormalization, LayerScale

__all__ = [
    "DropBlock",
    "DropConnect",
    "DropPath",
    "EvoNormB0",
    "EvoNormS0",
    "FilterResponseNormalization",
    "GhostBatchNormalization",
    "GlobalResponseNormalization",
    "LayerScale",
    "ScheduledDropout",
    "ShakeDrop",
    "SpectralNormalization",
    "WeightNormalization",
    "WeightStandardization",
    "stochastic_depth_rates",
]

"""Transforms of gradients and of steps, passed to any optimizer as `transforms=[...]`."""

from keras_optkit.optimizers.transforms.cautious import CautiousDecay, CautiousUpdate
from keras_optkit.optimizers.transforms.centralize import Centralize
from keras_optkit.optimizers.transforms.clipping import AdaptiveClip, ClipByGlobalNorm, ClipByNorm, ClipByValue
from keras_optkit.optimizers.transforms.decay import CorrectedDecay
from keras_optkit.optimizers.transforms.hyperball import Hyperball
from keras_optkit.optimizers.transforms.noise import GradientNoise
from keras_optkit.optimizers.transforms.transform import Transform, unit_axes

__all__ = [
    "AdaptiveClip",
    "CautiousDecay",
    "CautiousUpdate",
    "Centralize",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "CorrectedDecay",
    "GradientNoise",
    "Hyperball",
    "Transform",
    "unit_axes",
]

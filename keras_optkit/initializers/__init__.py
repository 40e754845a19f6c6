"""Initializers with exact claims: the stated standard deviation is the one that is drawn, for every kernel."""

from keras_optkit.initializers.biases import BiasPrior, BiasUniform, torch_biases
from keras_optkit.initializers.depth import DepthScaled, deepnorm, fixup_gain, t_fixup_gain
from keras_optkit.initializers.distributions import RandomNormal, RandomTruncatedNormal, RandomUniform
from keras_optkit.initializers.exact import Dirac, ZerO
from keras_optkit.initializers.gains import calculate_gain
from keras_optkit.initializers.orthogonal import DeltaOrthogonal, Orthogonal
from keras_optkit.initializers.residual import zero_residual
from keras_optkit.initializers.siren import SIREN
from keras_optkit.initializers.sparse import Sparse
from keras_optkit.initializers.unit_variance import lsuv
from keras_optkit.initializers.variance import (
    HeNormal,
    HeUniform,
    LeCunNormal,
    LeCunUniform,
    XavierNormal,
    XavierUniform,
)

__all__ = [
    "SIREN",
    "BiasPrior",
    "BiasUniform",
    "DeltaOrthogonal",
    "DepthScaled",
    "Dirac",
    "HeNormal",
    "HeUniform",
    "LeCunNormal",
    "LeCunUniform",
    "Orthogonal",
    "RandomNormal",
    "RandomTruncatedNormal",
    "RandomUniform",
    "Sparse",
    "XavierNormal",
    "XavierUniform",
    "ZerO",
    "calculate_gain",
    "deepnorm",
    "fixup_gain",
    "lsuv",
    "t_fixup_gain",
    "torch_biases",
    "zero_residual",
]

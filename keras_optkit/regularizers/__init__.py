"""Penalties on weights and activations, exact in every precision."""

from keras_optkit.regularizers.activations import ConfidencePenalty, KLSparsity
from keras_optkit.regularizers.elementwise import L1, L1L2, L2, L2SP
from keras_optkit.regularizers.matrices import GroupLasso, NuclearNorm, Orthogonality, SpectralNorm

__all__ = [
    "L1",
    "L1L2",
    "L2",
    "L2SP",
    "ConfidencePenalty",
    "GroupLasso",
    "KLSparsity",
    "NuclearNorm",
    "Orthogonality",
    "SpectralNorm",
]

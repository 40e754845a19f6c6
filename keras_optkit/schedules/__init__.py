"""Schedules: how a learning rate, or any other hyperparameter, changes with the number of optimizer updates."""

from keras_optkit.schedules.composed import Scale, Sequence, Warmup, WarmupStableDecay
from keras_optkit.schedules.cycles import CosineRestarts, Cyclic, OneCycle
from keras_optkit.schedules.decays import (
    REX,
    Cosine,
    Exponential,
    InverseSquareRoot,
    Linear,
    Piecewise,
    Polynomial,
    Step,
)
from keras_optkit.schedules.schedule import Schedule

__all__ = [
    "REX",
    "Cosine",
    "CosineRestarts",
    "Cyclic",
    "Exponential",
    "InverseSquareRoot",
    "Linear",
    "OneCycle",
    "Piecewise",
    "Polynomial",
    "Scale",
    "Schedule",
    "Sequence",
    "Step",
    "Warmup",
    "WarmupStableDecay",
]

"""Advice: what is measured of a model or a run, and rules of advice as pure functions of it.

`inspect` measures a model before training, and `TrainingMonitor` during it; what is wrong is said here for both.
"""

from keras_optkit.advice.measured import Finding, KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport
from keras_optkit.advice.rules import findings

__all__ = [
    "Finding",
    "KernelReport",
    "LayerReport",
    "ModelReport",
    "OutputReport",
    "UpdateReport",
    "findings",
]

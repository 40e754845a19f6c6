"""A look at a model on one batch: what is measured, and rules of advice as pure functions of it."""

from keras_optkit.inspection.looking import inspect
from keras_optkit.inspection.report import (
    Finding,
    KernelReport,
    LayerReport,
    ModelReport,
    OutputReport,
    Report,
    UpdateReport,
)

__all__ = [
    "Finding",
    "KernelReport",
    "LayerReport",
    "ModelReport",
    "OutputReport",
    "Report",
    "UpdateReport",
    "inspect",
]

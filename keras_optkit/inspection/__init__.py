"""A look at a model on one batch; the advice is in `keras_optkit.advice`."""

from keras_optkit.advice import Finding, KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport
from keras_optkit.inspection.looking import inspect
from keras_optkit.inspection.report import Report

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

"""A look at a model before it trains, and at the log of a run afterwards; the advice is in `keras_optkit.advice`."""

from keras_optkit.advice import Finding, KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport
from keras_optkit.inspection.diagnosing import Diagnosis, RunDiagnosis, diagnose
from keras_optkit.inspection.looking import inspect
from keras_optkit.inspection.report import Report

__all__ = [
    "Diagnosis",
    "Finding",
    "KernelReport",
    "LayerReport",
    "ModelReport",
    "OutputReport",
    "Report",
    "RunDiagnosis",
    "UpdateReport",
    "diagnose",
    "inspect",
]

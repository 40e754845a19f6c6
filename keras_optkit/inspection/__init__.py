"""Looking at a model on one batch before it is trained. Work in progress: not public yet."""

from keras_optkit.inspection.looking import inspect
from keras_optkit.inspection.report import Finding, LayerReport, ModelReport, Report

__all__ = ["Finding", "LayerReport", "ModelReport", "Report", "inspect"]

"""Training goes on from the weights of training, also where the model holds those to evaluate at.

`fit` leaves a model with the weights to evaluate at. The next update takes the others back, but by then the first
gradient has been computed, at the wrong weights; and Keras asks an optimizer nothing before the model is called. So the
methods of `keras.Model` that train are wrapped, once, when the first optimizer that averages is made. Outside of
TensorFlow they are with the first optimizer of any kind: state for more variables has to be made before a step there.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import keras


def guard_training() -> None:
    """Wraps `fit` and `train_on_batch` of `keras.Model`, unless they are wrapped."""
    for method in ("fit", "train_on_batch"):
        function = getattr(keras.Model, method)
        if not getattr(function, "takes_training_weights", False):
            setattr(keras.Model, method, _guarded(function))


def _guarded(function: Any) -> Any:
    @functools.wraps(function)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer: Any = getattr(self, "optimizer", None)
        inside = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if inside:
            optimizer = optimizer.inner_optimizer
        begin = getattr(optimizer, "begin_training", None)
        if begin is not None:
            if self.built:
                build_optimizer(self)  # there may be loaded state that says which weights the model holds
            begin(self.trainable_variables, inside=inside)
        return function(self, *args, **kwargs)

    guarded.takes_training_weights = True  # type: ignore[attr-defined]
    return guarded


def build_optimizer(model: Any) -> None:
    """Builds the optimizer of a built model as `fit` would."""
    if not model.optimizer.built:
        strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
        with strategy.scope() if strategy else contextlib.nullcontext():
            model.optimizer.build(model.trainable_variables)

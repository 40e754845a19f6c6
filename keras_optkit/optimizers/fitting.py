"""What `fit` does for optimizers at moments at which Keras asks them nothing.

`fit` leaves a model with the weights to evaluate at. The next update takes the others back, but by then the first
gradient has been computed, at the wrong weights. And the last micro-batches of an epoch may be fewer than make an
update. Outside of TensorFlow, too, state for more variables has to be made before a step. So the methods of
`keras.Model` that train are wrapped; see `keras_optkit.wrapping`. With other optimizers they do what they did.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import keras


def telling_optimizers(function: Callable[..., Any]) -> Callable[..., Any]:
    """`fit` or `train_on_batch` of `keras.Model`, which tells an optimizer of ours that training begins."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = _ours(getattr(self, "optimizer", None))
        if optimizer is None:
            return function(self, *args, **kwargs)
        if self.built:
            build_optimizer(self)  # there may be loaded state that says which weights the model holds
        optimizer.begin_training(self.trainable_variables, inside=optimizer is not self.optimizer)
        if function.__name__ == "fit" and optimizer.gradient_accumulation_steps:
            try:
                given = signature.bind(self, *args, **kwargs)
            except TypeError:  # Keras says it better
                return function(self, *args, **kwargs)
            given.arguments["callbacks"] = _with_flush(given.arguments.get("callbacks"), self)
            args, kwargs = given.args[1:], given.kwargs
        return function(self, *args, **kwargs)

    return wrapped


def _ours(optimizer: Any) -> Any:
    """The optimizer of this package, also inside of Keras's for loss scaling; None for others."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return _ours(optimizer.inner_optimizer)
    return optimizer if hasattr(optimizer, "begin_training") else None


def _with_flush(callbacks: Any, model: Any) -> Any:
    if not isinstance(callbacks, keras.callbacks.CallbackList):
        return [Flush(), *keras.tree.flatten(callbacks or [])]
    if not any(isinstance(callback, Flush) for callback in callbacks.callbacks):
        flush = Flush()  # what the list has told the others already
        flush.set_model(model)
        flush.set_params(callbacks.params)
        callbacks.callbacks.insert(0, flush)
    return callbacks


class Flush(keras.callbacks.Callback):
    """Ends every epoch with an update if micro-batches are left; before all other callbacks see its end.

    With data of unknown length that is after the validation of the first epoch.
    """

    stateless = True
    sees_training_weights = True  # AveragedWeights leaves them in the model for it

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """After the last batch, if Keras knows how many there are."""
        steps = (self.params or {}).get("steps")
        if steps is not None and batch + 1 >= steps:
            self._flush()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """If the length was not known."""
        self._flush()

    def _flush(self) -> None:
        _ours(self.model.optimizer).flush()


def build_optimizer(model: Any) -> None:
    """Builds the optimizer of a built model as `fit` would."""
    if model.optimizer is not None and not model.optimizer.built:
        strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
        with strategy.scope() if strategy else contextlib.nullcontext():
            model.optimizer.build(model.trainable_variables)

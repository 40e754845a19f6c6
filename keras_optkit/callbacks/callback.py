"""The base of our callbacks: a callback that is also told when training fails, and has state.

Keras calls `on_train_end` only when `fit` comes to its end; callbacks are not told of an exception, Ctrl-C included.
`keras_optkit.fit.run` tells ours before it lets the exception pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import keras
from keras import ops

from keras_optkit.fit.run import Run, innermost_run
from keras_optkit.optimizers.of_model import update_counter
from keras_optkit.saving import FromSignature


def number(scalar: Any) -> Any:
    """A scalar variable or tensor as a Python number."""
    return (scalar.numpy() if isinstance(scalar, keras.Variable) else ops.convert_to_numpy(scalar)).item()


class Callback(FromSignature, keras.callbacks.Callback):
    """A Keras callback with more hooks, `on_train_failure` and the like, and with state.

    All hooks besides Keras's are declared here. A callback that is not a subclass may have some of them: `Resume` looks
    for `stateless`, `state_dict` and `load_state_dict`, `AveragedWeights` for `sees_training_weights`.

    Attributes:
        stateless: Whether it keeps nothing that training depends on from one epoch to the next, so that `Resume` has
            nothing to save. Callbacks with `state_dict` need not set it.
        sees_training_weights: Whether `AveragedWeights` leaves the training weights in the model for it.
        validates: Whether it adds values of a validation to the logs.
    """

    stateless: ClassVar[bool] = False
    sees_training_weights: ClassVar[bool] = False
    validates: ClassVar[bool] = False

    @property
    def inside(self) -> Sequence[Any]:
        """The callbacks that it calls, and `fit` does not."""
        return ()

    def prepare_fit(self, run: Run) -> None:
        """Called before `fit` itself, with its arguments, which may be changed.

        Args:
            run: The `fit`: its model and `arguments`, by name.
        """

    def set_model(self, model: Any) -> None:
        """Called by Keras when `fit`, `evaluate` or `predict` begins."""
        super().set_model(model)
        run = innermost_run(model)
        if run is not None and self not in run.callbacks:
            run.callbacks.append(self)

    def _updates(self) -> int:
        """The number of updates that the model's optimizer has made; 0 where it has none. See `update_counter`.

        Inside an epoch Keras's variables are empty on JAX; asking for `self.model` has Keras fill them.
        """
        try:
            counter = update_counter(self.model)
            return 0 if counter is None else number(counter)
        except TypeError as error:  # so Keras on JAX answers once the first step of a `fit` has failed
            raise RuntimeError("Keras has lost the optimizer's variables in a step that failed.") from error

    def on_train_failure(self, error: BaseException) -> None:
        """Called when an exception, Ctrl-C included, leaves `fit`; it is raised again afterwards.

        It may come at any moment, also before `on_train_begin` or after `on_train_end`.

        Args:
            error: The exception.
        """

    def on_test_failure(self, error: BaseException) -> None:
        """Called when an exception leaves an `evaluate` that this callback was passed to.

        Args:
            error: The exception.
        """

    def on_predict_failure(self, error: BaseException) -> None:
        """Called when an exception leaves a `predict` that this callback was passed to.

        Args:
            error: The exception.
        """

    def state_dict(self) -> dict[str, Any]:
        """The state needed to continue in another process: numbers, strings and arrays, in lists and dicts."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Sets what `state_dict` returned.

        Called after `on_train_begin`, inside an epoch after `on_epoch_begin`, of all callbacks, and before the
        variables of the model and the optimizer are set.

        Args:
            state: What `state_dict` returned.
        """

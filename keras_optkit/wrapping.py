"""What is put around methods of `keras.Model`, once and for all."""

from __future__ import annotations

import keras

from keras_optkit.callbacks.callback import ON_FAILURE, telling_callbacks
from keras_optkit.optimizers.fitting import (
    refusing_stock_averages,
    showing_model,
    telling_of_files,
    telling_optimizers,
)
from keras_optkit.optimizers.state_tree import describing_optimizers, restoring_optimizers


def wrap_keras() -> None:
    """Has `keras.Model` tell our optimizers and callbacks what Keras does not; unless it does.

    When the package is imported, and not when the first callback is made: `model.fit(..., callbacks=[Resume(...)])`
    looks `fit` up before that.
    """
    if hasattr(keras.Model, "_keras_optkit"):
        return
    # on the class that has it: Keras does not compile a loaded model whose class has another `compile`
    owner = next(base for base in keras.Model.__mro__ if "compile" in vars(base))
    owner.compile = showing_model(owner.compile)
    for method in ("fit", "train_on_batch"):
        setattr(keras.Model, method, showing_model(telling_optimizers(getattr(keras.Model, method))))
    for method in ("fit", "evaluate", "predict"):
        setattr(keras.Model, method, refusing_stock_averages(getattr(keras.Model, method)))
    keras.Model.compile_from_config = telling_of_files(keras.Model.compile_from_config)
    keras.Model.get_state_tree = describing_optimizers(keras.Model.get_state_tree)
    keras.Model.set_state_tree = restoring_optimizers(keras.Model.set_state_tree)
    for method in ON_FAILURE:  # around the others, so that optimizers see what `prepare_fit` has made of the model
        setattr(keras.Model, method, telling_callbacks(getattr(keras.Model, method)))
    keras.Model._keras_optkit = True

"""Trials that fail, each in its own way: they have a reason, and the search continues."""

import math
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_optkit as ok
from keras_optkit.tuning import Choice, Space

ONES, ZEROS = np.ones((4, 1), "float32"), np.zeros((4, 1), "float32")

REASONS = {
    "raises": ("ValueError: no such layer", 0),
    "memory": ("MemoryError: 3 GiB", 0),
    "device": ("ResourceExhaustedError: OOM when allocating", 0),
    "nan": ("loss is nan in epoch 1.", 1),
    "inf": ("loss is inf in epoch 1.", 1),
    "large": ("The model has 20 elements, more than max_model_size=10.", 0),
    "large when built": ("The model has 20 elements, more than max_model_size=10.", 1),
    "fine": ("", 2),
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    models = {}

    def build(hp):
        units = 10 if "large" in hp.x else 1
        kernel = keras.initializers.Constant({"nan": math.nan, "inf": math.inf}.get(hp.x, 1.0))
        inputs = [] if hp.x == "large when built" else [keras.Input((1,))]
        model = keras.Sequential([*inputs, keras.layers.Dense(units, kernel_initializer=kernel)])
        model.compile("sgd", "mae", run_eagerly=True)
        models[hp.x] = weakref.ref(model)
        errors = {
            "raises": ValueError("no such layer"),
            "memory": MemoryError("3 GiB"),
            "device": tf.errors.ResourceExhaustedError(None, None, "OOM when allocating"),
        }
        if hp.x in errors:
            raise errors[hp.x]
        return model

    result = ok.tuning.search(
        build,
        Space(x=Choice(list(REASONS))),
        (ONES, ZEROS, ONES, ZEROS),
        strategy="grid",
        objective="val_loss",
        epochs=2,
        max_model_size=10,
        seed=0,
        verbose=0,
        directory=tmp_path_factory.mktemp("failures"),
    )
    return result, models


def test_every_failure_has_a_reason_that_names_its_hyperparameters(searched):
    result, _ = searched
    for trial in result.trials:
        message, epochs = REASONS[trial.values.x]
        assert trial.status == ("failed" if message else "completed")
        assert (trial.score is None) == bool(message)
        assert trial.message.startswith(message)
        assert trial.reason == (f"{trial.message} (x={trial.values.x})" if message else "")
        assert trial.epochs == epochs
    assert result.best == {"x": "fine"}
    assert [trial.number for trial in result.pareto] == [7]


def test_a_failure_does_not_keep_its_model(searched):
    _, models = searched
    alive = [name for name in REASONS if name in models and models[name]() is not None]
    assert set(alive) <= {"fine"}

"""Models with wrapped kernels and penalties, saved here and loaded in a fresh process, which is on JAX."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import keras_optkit as ok
from keras_optkit.testing.tools import numbers

ROOT = Path(__file__).parent.parent
POLICIES = {"float32": 1e-4, "mixed_float16": 2e-2}

LOAD = """
import json, sys
import keras, numpy as np
import keras_optkit as ok

x, found = np.load(sys.argv[1]), {}
for path in sys.argv[2:]:
    model = keras.saving.load_model(path, compile=False)
    model.compile(ok.optimizers.SGD(0.1), "mse")
    y = model.predict(x, verbose=0)
    losses = [model.evaluate(x, np.zeros(y.shape), verbose=0), float(model.train_on_batch(x, np.zeros(y.shape)))]
    moved = bool(np.abs(model.predict(x, verbose=0).astype("float32") - y).max() > 0)
    found[path] = {"y": y.astype("float64").tolist(), "losses": losses, "moved": moved}
print(json.dumps(found))
"""


def model_of(policy):
    """Wrappers, other layers and regularizers."""
    keras.config.set_dtype_policy(policy)
    r, w = ok.regularizers, ok.layers
    inputs = keras.Input((6, 4))
    x = w.SpectralNormalization(layers.Conv1D(6, 3, kernel_regularizer=r.GroupLasso(by="input")), seed=1)(inputs)
    x = w.WeightStandardization(layers.SeparableConv1D(6, 2, pointwise_regularizer=r.Orthogonality(mode="srip")))(x)
    x = w.EvoNormS0(3)(w.ShakeDrop(0.2, seed=1)(x))
    x = w.DropConnect(layers.Dense(5, kernel_regularizer=r.SpectralNorm()), 0.2, seed=1)(layers.Flatten()(x))
    x = layers.Dense(5, kernel_regularizer=r.NuclearNorm())(w.EvoNormB0()(x))
    x = layers.Dense(4, "sigmoid", kernel_regularizer=r.L2SP(0.25), activity_regularizer=r.KLSparsity())(x)
    last = layers.Dense(
        3, kernel_regularizer=r.Orthogonality(), activity_regularizer=r.ConfidencePenalty(from_logits=True)
    )
    model = keras.Model(inputs, w.WeightNormalization(last)(x))
    model.compile(ok.optimizers.SGD(0.1), "mse", jit_compile=policy != "float32")
    return model


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("policies", [["float32"], ["mixed_float16"]], ids=str)
def test_models_are_loaded_in_a_fresh_process_and_train_there(policies, tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 6, 4)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    expected = {}
    for policy in policies:
        model, path = model_of(policy), str(tmp_path / f"{policy}.keras")
        assert np.isfinite(model.train_on_batch(x, np.zeros((5, 3))))
        model.save(path)
        loss = model.evaluate(x, np.zeros((5, 3)), verbose=0)
        expected[path] = (numbers(keras.ops.convert_to_tensor(model.predict(x, verbose=0))), loss, POLICIES[policy])
    environment = os.environ | {"KERAS_BACKEND": "jax", "PYTHONWARNINGS": "error::UserWarning"}
    command = [sys.executable, "-c", LOAD, str(tmp_path / "x.npy"), *expected]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for path, (y, loss, tolerance) in expected.items():
        np.testing.assert_allclose(found[path]["y"], y, tolerance, tolerance)
        np.testing.assert_allclose(found[path]["losses"][0], loss, tolerance, tolerance)
        assert np.isfinite(found[path]["losses"][1])
        assert found[path]["moved"]

"""Shared set-up: the environment must be set before TensorFlow is imported."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("MPLBACKEND", "Agg")

import keras
import pytest

import keras_optkit as ok

ok.testing.prepare()


@pytest.fixture(autouse=True)
def clean_keras():
    """Every test starts with float32 and a fixed seed."""
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")

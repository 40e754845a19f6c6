"""Canaries: each private name that `keras_optkit.private` uses still exists and still does what it is used for."""

import tensorflow as tf
from tensorflow.python.framework import config

from keras_optkit.private import op_determinism


def test_determinism_is_on_inside_only():
    assert not config.is_op_determinism_enabled()
    with op_determinism():
        assert config.is_op_determinism_enabled()
        assert tf.config.experimental.enable_op_determinism() is None
    assert not config.is_op_determinism_enabled()

"""Canaries: each private name that `keras_optkit.private` uses still exists and still does what it is used for."""

import keras
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import config

from keras_optkit.private import current_layer, op_determinism


def test_determinism_is_on_inside_only():
    assert not config.is_op_determinism_enabled()
    with op_determinism():
        assert config.is_op_determinism_enabled()
        assert tf.config.experimental.enable_op_determinism() is None
    assert not config.is_op_determinism_enabled()


def test_the_layer_at_work_is_known():
    seen = []

    class Spy(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            seen.append(current_layer())
            return keras.ops.zeros(shape, dtype)

    layer = layers.Dense(2, kernel_initializer=Spy())
    layer.build((None, 3))
    assert seen == [layer]
    assert current_layer() is None

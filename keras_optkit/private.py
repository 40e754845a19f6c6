"""The only file that touches private names of Keras or TensorFlow, each with its public fall-back.

`tests/test_private.py` holds a canary for every name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras


@contextlib.contextmanager
def op_determinism() -> Iterator[None]:
    """TensorFlow's op determinism, inside the block only.

    The public API can switch it on but not off, and Keras refuses XLA while it is on; without the private switch it
    stays on. Does nothing on other backends.
    """
    if keras.config.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf
    from tensorflow.python.framework import config

    was_on = config.is_op_determinism_enabled()
    tf.config.experimental.enable_op_determinism()
    try:
        yield
    finally:
        switch_off = getattr(config, "disable_op_determinism", None)
        if switch_off is not None and not was_on:
            switch_off()


def current_layer() -> Any:
    """The layer (or other object) that is making or using a variable at this moment, or None.

    Keras hands an initializer nothing but a shape, and by its shape a depthwise kernel looks like any other. The layer
    is on Keras's stack of name scopes. Fall-back: None, and every kernel is read as (*window, in, out).
    """
    try:
        from keras.src.backend.common import global_state
    except ImportError:
        return None
    scopes = global_state.get_global_attribute("name_scope_stack")
    return scopes[-1].caller if scopes else None

"""Runs of references that are Keras's or TensorFlow's own, in this process."""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

import keras

from keras_optkit.testing import problems

Arrays = list[Any]


def of_keras(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], None]:
    """The weights after each step of one of Keras's optimizers."""
    usual = keras.config.floatx()
    keras.config.set_floatx(dtype)  # or Keras rounds some numbers to float32
    try:
        optimizer = resolve_name(implementation)(**arguments)
        return problems.train(optimizer, grads, values=start, dtype=dtype, mode="graph"), None
    finally:
        keras.config.set_floatx(usual)


def proximal_adagrad(
    implementation: str, arguments: dict[str, Any], start: Arrays, grads: list[Arrays], dtype: str, *_: Any
) -> tuple[list[Arrays], None]:
    """The weights after each step of TensorFlow's operation, which has no decay: it is subtracted before."""
    import tensorflow as tf

    rate, decay, initial = (arguments.pop(name) for name in ("lr", "weight_decay", "initial_accumulator_value"))
    numbers = {name: tf.constant(value, dtype) for name, value in (arguments | {"lr": rate}).items()}
    variables = [tf.Variable(p, dtype=dtype) for p in start]
    totals = [tf.Variable(tf.fill(v.shape, tf.constant(initial, dtype))) for v in variables]
    weights = []
    for arrays in grads:
        for v, total, g in zip(variables, totals, arrays, strict=True):
            v.assign(v * (1 - rate * decay))
            resolve_name(implementation)(var=v.handle, accum=total.handle, grad=tf.constant(g, dtype), **numbers)
        weights.append([v.numpy() for v in variables])
    return weights, None

"""Functions that `keras.ops` lacks, or has only in a slow form, for both backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.backend.which import TENSORFLOW

if TENSORFLOW:
    import tensorflow as tf

Tensor = Any


def concatenate(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors end to end, without the work of `keras.ops` for each of a thousand."""
    if len(vectors) == 1:
        return vectors[0]
    return tf.concat(vectors, 0) if TENSORFLOW else ops.concatenate(vectors)


def split(vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `concatenate`. (`ops.split` loses the static sizes on TensorFlow.)"""
    if len(sizes) == 1:
        return [vector]
    return tf.split(vector, sizes) if TENSORFLOW else ops.split(vector, np.cumsum(sizes)[:-1].tolist())


def random_bits(shape: Sequence[int], seed: tuple[Any, Any]) -> Tensor:
    """Random int32 numbers, all bits of them, as a function of the seed alone, a pair of integers from 0 to 2^31."""
    if TENSORFLOW:
        # tf.random.stateless_uniform makes the key from a seed with a hundred operations
        high, low = (tf.cast(part, "uint64") for part in seed)
        key, counter = tf.reshape(high * 2**32 + low, (1,)), tf.zeros((2,), "uint64")
        return tf.raw_ops.StatelessRandomUniformFullIntV2(shape=shape, key=key, counter=counter, alg=1, dtype="int32")
    if keras.config.backend() == "jax":
        import jax

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed[0]), seed[1])
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, "uint32"), "int32")
    raise ValueError(f"random bits are for the backends tensorflow and jax, not {keras.config.backend()}.")

"""Which dtype to compute in: half precision is for storing, and scalars of a whole step are as exact as they can be."""

from __future__ import annotations

import math
from typing import Any

import keras

HALF = ("float16", "bfloat16")


def at_least_float32(dtype: Any) -> str:
    """The dtype to compute in. (`keras.backend.result_type` makes float32 of float64 on some backends.)"""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in HALF else dtype


def mean(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    """`keras.ops.mean` in the dtype of `x`, float32 or float64. (Keras's is in float32 on JAX, also of float64.)"""
    axes = range(len(x.shape)) if axis is None else [axis] if isinstance(axis, int) else axis
    shape = keras.ops.shape(x)
    count = math.prod(shape[each] for each in axes)  # ints, but for sizes that are not known in a graph
    return keras.ops.sum(x, axis, keepdims=keepdims) / keras.ops.cast(count, x.dtype)


def scalar_dtype() -> str:
    """The dtype for step counts, rates and schedules: float64, or on JAX without `jax_enable_x64`, float32.

    In float32 steps beyond 2^24 are no longer told apart, and a rate of 0.1 is off by 1e-8 for float64 weights.
    """
    if keras.config.backend() != "jax":
        return "float64"
    import jax

    return "float64" if jax.config.jax_enable_x64 else "float32"

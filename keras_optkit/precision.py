"""Half precision is for storing: sums, statistics and random numbers are computed in float32."""

from __future__ import annotations

from typing import Any

import keras

HALF = ("float16", "bfloat16")


def at_least_float32(dtype: Any) -> str:
    """The dtype to compute in. (`keras.backend.result_type` makes float32 of float64 on some backends.)"""
    dtype = keras.backend.standardize_dtype(dtype)
    return "float32" if dtype in HALF else dtype

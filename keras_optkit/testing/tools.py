"""Assertions that the checks share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.precision import at_least_float32


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """Lets what is inside, a block or a decorated check, compute in float64, which JAX has only when it is asked.

    On other backends float64 is always there, and this does nothing.
    """
    if keras.config.backend() != "jax":
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield


def numbers(x: Any) -> np.ndarray:
    """The elements of a tensor or variable of any float dtype, in float64. (NumPy takes no bfloat16 of TensorFlow.)"""
    return np.asarray(ops.convert_to_numpy(ops.cast(x, at_least_float32(x.dtype))), "float64")


def refuses(make: Callable[..., Any], name: str, value: Any, allowed: str, **others: Any) -> None:
    """Asserts that `make(name=value)` raises ValueError or TypeError naming the argument, the value and `allowed`."""
    try:
        make(**{**others, name: value})
    except (TypeError, ValueError) as error:
        message = str(error)
        assert name in message, f"the message does not name the argument {name!r}: {message}"
        assert repr(value) in message or str(value) in message, f"the message does not show {value!r}: {message}"
        assert allowed in message, f"the message does not say what is allowed ({allowed}): {message}"
    else:
        raise AssertionError(f"{name}={value!r} was accepted")

"""Products of the Hessian of a loss with a vector."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras_optkit.backend.sparse import dense
from keras_optkit.backend.variables import handle
from keras_optkit.backend.which import TENSORFLOW

if TENSORFLOW:
    import tensorflow as tf

Tensor = Any


class Recording:
    """What is computed while TensorFlow records it, gradients included, so that these can be differentiated."""

    def __init__(self, stop: Callable[[], None], tape: Any):
        self._stop, self._tape = stop, tape

    def products(
        self, grads: Sequence[Any], variables: Sequence[Any], vectors: Sequence[Tensor], due: bool | Tensor
    ) -> list[Tensor]:
        """`Σ ∂(g·v)/∂θ` for each variable, and zeros if they are not due; ends the recording.

        Raises:
            RuntimeError: If there is an operation without a second derivative.
        """
        pairs = [
            (dense(g, tuple(variable.shape)), v)
            for g, variable, v in zip(grads, variables, vectors, strict=True)
            if g is not None
        ]
        self._stop()
        zeros = [tf.zeros_like(v) for v in vectors]
        if not pairs:
            return zeros
        targets, weights = ([pair[n] for pair in pairs] for n in (0, 1))

        def compute() -> list[Tensor]:
            try:
                found = self._tape.gradient(targets, [handle(v) for v in variables], output_gradients=weights)
            except (LookupError, NotImplementedError) as error:
                raise RuntimeError(
                    "The Hessian is needed, but TensorFlow cannot differentiate the gradient of an operation of the "
                    f"model: {error} Fused layers, such as LSTM and GRU on GPUs, have use_cudnn=False."
                ) from error
            return [
                zero if part is None else dense(part, tuple(zero.shape))
                for part, zero in zip(found, zeros, strict=True)
            ]

        if due is True:
            return compute()
        return tf.cond(due, compute, lambda: zeros)


@contextlib.contextmanager
def recorded() -> Iterator[Recording]:
    """Records what TensorFlow computes inside. On JAX, gradients are functions, and `hessian_products` is enough."""
    if not TENSORFLOW:
        raise RuntimeError("Only TensorFlow records what it computes; on JAX, use jax.jvp of the gradient.")
    with _twice_differentiable_moments(), contextlib.ExitStack() as stack:
        tape = stack.enter_context(tf.GradientTape())
        yield Recording(stack.close, tape)


#: How many recordings there are at present: replicas are traced in turns.
_recordings = 0


@contextlib.contextmanager
def _twice_differentiable_moments() -> Iterator[None]:
    """Has `tf.nn.moments`, which normalizations call, take the variance around a mean that is not held constant.

    TensorFlow's own stops the gradient of that mean. It is 0, but its derivative is not.
    """
    global _recordings
    if not _recordings:
        tf.nn.moments = _moments
    _recordings += 1
    try:
        yield
    except BaseException:
        _recordings = 1  # the other replicas do not finish
        raise
    finally:
        _recordings -= 1
        if not _recordings:
            tf.nn.moments = _moments_of_tensorflow


_moments_of_tensorflow: Any = tf.nn.moments if TENSORFLOW else None


def _moments(x: Any, axes: Any, shift: Any = None, keepdims: bool = False, name: Any = None) -> tuple[Tensor, Tensor]:
    if shift is not None:
        return _moments_of_tensorflow(x, axes, shift, keepdims, name)
    x = tf.convert_to_tensor(x)
    wide = tf.cast(x, tf.float32) if x.dtype == tf.float16 else x
    mean = tf.reduce_mean(wide, axes, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(wide, mean), axes, keepdims=keepdims)
    mean = mean if keepdims else tf.squeeze(mean, axes)
    return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)


def hessian_products(
    gradient: Callable[[list[Tensor]], list[Tensor]],
    weights: Sequence[Tensor],
    vectors: Sequence[Tensor],
    due: bool | Tensor,
) -> list[Tensor]:
    """On JAX, the derivative of a gradient in the direction of a vector; zeros if it is not due."""
    import jax

    def compute() -> list[Tensor]:
        return list(jax.jvp(gradient, (list(weights),), (list(vectors),))[1])

    if due is True:
        return compute()
    return list(jax.lax.cond(due, compute, lambda: [jax.numpy.zeros_like(v) for v in vectors]))

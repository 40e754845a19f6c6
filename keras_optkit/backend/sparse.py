"""Sparse gradients, which hold only some rows of an embedding. TensorFlow only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_optkit.backend.which import TENSORFLOW

if TENSORFLOW:
    import tensorflow as tf

Tensor = Any


class Rows(NamedTuple):
    """Some rows of a tensor, or the values to write into them.

    Attributes:
        indices: `(n,)`; a row may occur several times, with the same values each time.
        values: `(n, *row)`.
        first: `(n, 1, ...)`, True at the first occurrence of a row.
    """

    indices: Tensor
    values: Tensor
    first: Tensor


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient is sparse."""
    return TENSORFLOW and isinstance(gradient, tf.IndexedSlices)


def as_gradient(gradient: Any) -> Any:
    """A gradient as a tensor; a sparse one is returned as it is."""
    if is_sparse(gradient):
        return gradient
    return tf.convert_to_tensor(gradient) if TENSORFLOW else ops.convert_to_tensor(gradient)


def may_have_shape(gradient: Any, shape: Sequence[int]) -> bool:
    """Whether a gradient may have a shape; in a graph, the shape may be known only when the step runs."""
    if not TENSORFLOW:
        return tuple(gradient.shape) == tuple(shape)
    if not is_sparse(gradient):
        return gradient.shape.is_compatible_with(shape)
    rows = gradient.values.shape[:1]
    return (
        _shape_of_rows(gradient).is_compatible_with(shape)
        and gradient.indices.shape.is_compatible_with(rows)
        and gradient.values.shape.is_compatible_with(rows.concatenate(shape[1:]))
    )


def _shape_of_rows(gradient: Any) -> Any:
    """The declared dense shape of a sparse gradient."""
    return gradient.shape if tf.is_tensor(gradient.dense_shape) else tf.TensorShape(gradient.dense_shape)


def described_shape(gradient: Any) -> str:
    """The shape of a gradient, for messages."""
    if is_sparse(gradient):
        return f"{_shape_of_rows(gradient)} with rows {gradient.values.shape} at indices {gradient.indices.shape}"
    return str(tuple(gradient.shape))


def add(a: Any, b: Any, shape: Sequence[int]) -> Any:
    """The sum of two gradients of one variable, either of which may be None."""
    if a is None or b is None:
        return a if b is None else b
    if is_sparse(a) and is_sparse(b):
        values, indices = (
            tf.concat([a.values, b.values], 0),
            tf.concat([a.indices, tf.cast(b.indices, a.indices.dtype)], 0),
        )
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return dense(a, shape) + dense(b, shape)


def dense(gradient: Any, shape: Sequence[int]) -> Tensor:
    """A gradient as a dense tensor. Rows that occur several times are summed, unlike in Keras's conversion."""
    if is_sparse(gradient):  # the conversion does not know the shape where `dense_shape` is computed in the graph
        return tf.ensure_shape(tf.math.unsorted_segment_sum(gradient.values, gradient.indices, shape[0]), shape)
    return tf.ensure_shape(gradient, shape) if TENSORFLOW else ops.convert_to_tensor(gradient)


def cast(gradient: Any, dtype: str) -> Any:
    """A gradient, sparse or not, in another dtype."""
    if is_sparse(gradient):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return gradient if keras.backend.standardize_dtype(gradient.dtype) == dtype else ops.cast(gradient, dtype)


def touched(gradient: Any, shape: Sequence[int]) -> Tensor:
    """A mask in the shape of the parameter: True for the rows that a sparse gradient holds."""
    hits = tf.math.unsorted_segment_sum(tf.ones_like(gradient.indices), gradient.indices, shape[0])
    return tf.broadcast_to(tf.reshape(hits > 0, (-1, *[1] * (len(shape) - 1))), shape)


def nonzero_rows(tensor: Tensor) -> Tensor:
    """A mask in the shape of the tensor: True for the rows, along the first axis, that are not all zeros."""
    nonzero = ops.not_equal(tensor, 0)
    other_axes = list(range(1, len(tensor.shape)))
    return ops.broadcast_to(ops.any(nonzero, axis=other_axes, keepdims=True), tensor.shape) if other_axes else nonzero


def rows(gradient: Any, row: Sequence[int]) -> Rows:
    """The rows of a sparse gradient; each occurrence of a row has the sum of all its occurrences.

    No shape depends on the number of distinct rows, so this can be compiled.
    """
    order = tf.argsort(gradient.indices, stable=True)
    indices = tf.gather(gradient.indices, order)
    first = tf.concat([tf.ones_like(indices[:1], "bool"), indices[1:] != indices[:-1]], 0)
    segments = tf.cumsum(tf.cast(first, "int32")) - 1
    values = tf.gather(tf.ensure_shape(gradient.values, (None, *row)), order)
    sums = tf.math.unsorted_segment_sum(values, segments, tf.size(segments))
    return Rows(indices, tf.gather(sums, segments), tf.reshape(first, (-1, *[1] * (len(values.shape) - 1))))

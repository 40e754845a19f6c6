"""Checks for regularizers.

A card of kind "regularizer" builds a `keras.regularizers.Regularizer`. Its tags are its claims: "nonnegative" and
"zero_at_zero" (no penalty on weights that are all zero). "activity" says that it is an `activity_regularizer`, whose
value Keras divides by the size of the batch, "anchored" that it needs a point to start from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_optkit.registry import Card
from keras_optkit.testing import roundtrip
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import float64, numbers

_WEIGHTS = np.random.default_rng(0).normal(size=(6, 5))


def _built(card: Card) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return ((case, card.make(**case)) for case in card.cases)


def _penalty(regularizer: Any, weights: np.ndarray, dtype: str) -> float:
    return float(numbers(regularizer(ops.cast(weights, dtype))))


@check("regularizer")
@float64()
def check_scalar(card: Card) -> None:
    """It is one finite number, for float32 and float64 weights of their dtype."""
    for case, regularizer in _built(card):
        for dtype in ("float64", "float32", "bfloat16", "float16"):
            weights = ops.cast(_WEIGHTS, dtype)
            value = regularizer(weights)
            assert tuple(value.shape) == (), f"{case}: shape {value.shape} instead of a scalar"
            assert np.isfinite(_penalty(regularizer, _WEIGHTS, dtype))
            if dtype in ("float32", "float64"):
                assert value.dtype == weights.dtype, f"{case}: {value.dtype} for weights of {weights.dtype}"


@check("regularizer")
def check_half_precision(card: Card) -> None:
    """On many half-precision weights it is what float32 makes of the same weights: no overflow and no lost terms."""
    for case, regularizer in _built(card):
        for dtype in ("bfloat16", "float16"):
            weights = np.asarray(
                ops.convert_to_numpy(ops.cast(ops.cast(np.tile(30 * _WEIGHTS, (100, 1)), dtype), "float32"))
            )
            expected = _penalty(regularizer, weights, "float32")
            np.testing.assert_allclose(_penalty(regularizer, weights, dtype), expected, rtol=1e-5, err_msg=str(case))


@check("regularizer")
def check_gradient(card: Card) -> None:
    """Through the train step of a real layer its gradient is finite and not zero."""
    for case, regularizer in _built(card):
        layer = layers.Dense(5, use_bias=False, kernel_regularizer=regularizer)
        model = keras.Sequential([keras.Input((6,)), layer])
        model.compile(keras.optimizers.SGD(1.0), loss=lambda _, y: 0.0 * y)
        layer.kernel.assign(_WEIGHTS.astype("float32"))
        before = ops.convert_to_numpy(layer.kernel).copy()
        loss = model.train_on_batch(np.ones((2, 6)), np.ones((2, 5)))
        np.testing.assert_allclose(loss, _penalty(regularizer, before, "float32"), rtol=1e-5, err_msg=str(case))
        gradient = before - ops.convert_to_numpy(layer.kernel)
        assert np.isfinite(gradient).all(), f"{case}: {gradient}"
        assert np.any(gradient), f"{case}: the gradient is zero"


def _value_and_gradient(regularizer: Any, weights: np.ndarray, *, compiled: bool = False) -> tuple[Any, Any]:
    weights = ops.convert_to_tensor(weights)
    if keras.config.backend() == "jax":
        import jax

        both = jax.value_and_grad(regularizer)
        value, gradient = (jax.jit(both) if compiled else both)(weights)
        return numbers(value), numbers(gradient)
    import tensorflow as tf

    def traced(w: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(w)
            penalty = regularizer(w)
        return penalty, tape.gradient(penalty, w)

    run = tf.function(traced, jit_compile=True, autograph=False) if compiled else traced
    value, gradient = run(weights)
    return numbers(value), numbers(gradient)


@check("regularizer", only_on=("tensorflow", "jax"), because="gradients are taken with what TensorFlow and JAX have")
def check_gradient_at_zero(card: Card) -> None:
    """On weights that are all zero, as at the start of many a layer, value and gradient are finite."""
    for case, regularizer in _built(card):
        for weights in (np.zeros((6, 5), "float32"), np.concatenate([np.zeros((6, 4)), _WEIGHTS[:, :1]], 1)):
            value, gradient = _value_and_gradient(regularizer, weights.astype("float32"))
            assert np.isfinite(value), f"{case}: the penalty is {value}"
            assert np.isfinite(gradient).all(), f"{case}: the gradient is {gradient}"


@check("regularizer", only_on=("tensorflow", "jax"), because="the other backends of Keras do not compile with XLA")
def check_compiled_is_eager(card: Card) -> None:
    """With XLA, value and gradient are those of the eager call."""
    for case, regularizer in _built(card):
        weights = _WEIGHTS.astype("float32")
        expected = _value_and_gradient(regularizer, weights)
        actual = _value_and_gradient(regularizer, weights, compiled=True)
        for name, one, other in zip(("value", "gradient"), actual, expected, strict=True):
            np.testing.assert_allclose(one, other, 1e-4, 1e-5, err_msg=f"{case}, {name}")


@check("regularizer", requires=["activity"])
def check_batch_size(card: Card) -> None:
    """As an `activity_regularizer` it does not depend on how many examples there are: each twice is the same."""
    for case, regularizer in _built(card):
        layer = layers.Activation("sigmoid", activity_regularizer=regularizer)
        losses = []
        for outputs in (_WEIGHTS, np.concatenate([_WEIGHTS, _WEIGHTS])):
            layer(outputs.astype("float32"))
            losses.append(float(numbers(layer.losses[0])))
        np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5, err_msg=f"{case}")


@check("regularizer", requires=["nonnegative"])
@float64()
def check_nonnegative(card: Card) -> None:
    """It is a penalty, never a reward."""
    for _, regularizer in _built(card):
        assert min(_penalty(regularizer, sign * _WEIGHTS, "float64") for sign in (1, -1)) >= 0


@check("regularizer", requires=["zero_at_zero"])
@float64()
def check_zero_at_zero(card: Card) -> None:
    """Weights that are all zero cost nothing."""
    for _, regularizer in _built(card):
        assert _penalty(regularizer, np.zeros((6, 5)), "float64") == 0.0


@check("regularizer")
@float64()
def check_config_round_trip(card: Card) -> None:
    """Its config is JSON and rebuilds it. (By name alone Keras finds its own regularizers only.)"""
    for case, regularizer in _built(card):
        again = roundtrip.through_json(regularizer, case)
        assert _penalty(again, _WEIGHTS, "float64") == _penalty(regularizer, _WEIGHTS, "float64")


@check("regularizer")
def check_saving(card: Card) -> None:
    """A model that uses it is saved and loaded with it, and has the same penalty."""
    for _, regularizer in _built(card):
        model = keras.Sequential([keras.Input((6,)), layers.Dense(5, kernel_regularizer=regularizer)])
        again = roundtrip.through_file(model)
        roundtrip.assert_same(again.layers[0].kernel_regularizer, regularizer)
        assert len(model.losses) == 1
        np.testing.assert_array_equal(*(ops.convert_to_numpy(m.losses[0]) for m in (again, model)))

"""Checks for layers.

A card of kind "layer" builds a `keras.Layer` that takes one floating-point input of rank 3, here of shape (8, 6, 4).
The tag "random" says that it draws random numbers in training, which XLA draws differently from the same seed.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from keras_optkit.registry import Card
from keras_optkit.testing import roundtrip
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import float64, numbers

SHAPE = (8, 6, 4)
_INPUTS = np.random.default_rng(0).normal(1.0, 2.0, SHAPE).astype("float32")


def _built(card: Card, **more: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    for case in card.cases:
        layer = card.make(**{**case, **more})
        layer.build((None, *SHAPE[1:]))
        yield case, layer


def _array(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(x))


def _state(layer: Any) -> list[np.ndarray]:
    return [_array(v).copy() for v in layer.variables]


def _restore(layer: Any, state: list[np.ndarray]) -> None:
    for variable, value in zip(layer.variables, state, strict=True):
        variable.assign(value)


def _assert_state(layer: Any, state: list[np.ndarray], what: str, rtol: float = 0.0) -> None:
    for variable, value in zip(layer.variables, state, strict=True):
        np.testing.assert_allclose(_array(variable), value, rtol=rtol, atol=rtol, err_msg=f"{what}: {variable.path}")


@check("layer")
def check_config_round_trip(card: Card) -> None:
    """Its config is JSON and rebuilds it."""
    for case, layer in _built(card):
        roundtrip.through_json(layer, case)


@check("layer")
def check_saving(card: Card) -> None:
    """A model saved in the middle of its training and loaded predicts the same, and trains on the same, bit for bit."""
    for case in card.cases:
        model = keras.Sequential([keras.Input(SHAPE[1:]), card.make(**case)])
        for _ in range(2):
            model(_INPUTS, training=True)
        again = roundtrip.through_file(model)
        roundtrip.assert_same(again.layers[0], model.layers[0])
        for training in (False, True, True):
            expected = _array(model(_INPUTS, training=training))
            np.testing.assert_array_equal(_array(again(_INPUTS, training=training)), expected, err_msg=f"{case}")
        _assert_state(again, _state(model), f"{case}, after loading and training on")


@check("layer")
def check_inference(card: Card) -> None:
    """Inference repeats itself and changes no state; it is what a call does that says nothing of training."""
    for case, layer in _built(card):
        layer(_INPUTS, training=True)
        before = _state(layer)
        first = _array(layer(_INPUTS, training=False))
        np.testing.assert_array_equal(_array(layer(_INPUTS)), first, err_msg=f"{case}")
        np.testing.assert_array_equal(_array(layer(_INPUTS[:3])), first[:3], err_msg=f"{case}: depends on the batch")
        _assert_state(layer, before, f"{case}: inference changed the state")


@check("layer")
def check_trains(card: Card) -> None:
    """A model with the layer trains by `fit`, last batch smaller: weights before it move and stay finite."""
    for case in card.cases:
        dense = layers.Dense(SHAPE[-1])
        model = keras.Sequential([keras.Input(SHAPE[1:]), dense, card.make(**case), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.02), "mse")
        before = _array(dense.kernel).copy()
        model.fit(_INPUTS, _INPUTS[..., :1], batch_size=5, epochs=2, verbose=0)
        assert all(np.isfinite(value).all() for value in _state(model)), f"{case}: not finite"
        assert (_array(dense.kernel) != before).any(), f"{case}: no gradient arrives before the layer"


@check("layer")
def check_precision(card: Card) -> None:
    """Mixed precision: float32 variables, half-precision outputs close to float32's; a float64 layer is all float64."""
    for policy, dtype, tolerance in (
        ("mixed_float16", "float16", 5e-3),
        ("mixed_bfloat16", "bfloat16", 4e-2),
        ("float64", "float64", 1e-5),
    ):
        with float64() if policy == "float64" else contextlib.nullcontext():
            _check_policy(card, policy, dtype, tolerance)


def _check_policy(card: Card, policy: str, dtype: str, tolerance: float) -> None:
    for (case, layer), (_, full) in zip(_built(card, dtype=policy), _built(card), strict=True):
        for training in (True, False):
            outputs = layer(_INPUTS, training=training)
            assert keras.backend.standardize_dtype(outputs.dtype) == dtype, f"{case}: {outputs.dtype}"
            values, expected = numbers(outputs), _array(full(_INPUTS, training=training))
            assert np.isfinite(values).all(), f"{case} in {policy} is not finite"
            if not (training and "random" in card.tags):
                np.testing.assert_allclose(values, expected, tolerance, tolerance, err_msg=f"{case} in {policy}")
        for variable in layer.weights:
            if "float" in variable.dtype:
                assert variable.dtype == ("float64" if policy == "float64" else "float32"), variable.path


@check("layer")
def check_mask(card: Card) -> None:
    """A mask is passed on, and what it hides has no influence on the rest, in training and in inference."""
    mask = np.random.default_rng(1).uniform(size=SHAPE[:2]) < 0.6
    hidden = np.where(mask[..., None], _INPUTS, 1e3).astype("float32")
    for case, layer in _built(card):
        assert layer.supports_masking, f"{card.name}({case}) does not support masks"
        assert layer.compute_mask(_INPUTS, mask) is mask, f"{case}: the mask is not passed on"
        takes = {"mask": mask} if "mask" in inspect.signature(layer.call).parameters else {}
        for training in (True, False):
            before = _state(layer)
            seen = _array(layer(_INPUTS, training=training, **takes))
            after = _state(layer)
            _restore(layer, before)
            blind = _array(layer(hidden, training=training, **takes))
            np.testing.assert_allclose(blind[mask], seen[mask], 1e-5, 1e-5, err_msg=f"{case}, training={training}")
            _assert_state(layer, after, f"{case}: hidden values reach the state", 1e-5)


@check("layer")
def check_symbolic_shape(card: Card) -> None:
    """Shapes are known before any data: with an unknown batch, by `compute_output_shape` and in a functional model."""
    for case, layer in _built(card):
        inputs = keras.Input(SHAPE[1:])
        outputs = layer(inputs)
        assert tuple(outputs.shape) == tuple(layer.compute_output_shape((None, *SHAPE[1:]))), f"{case}"
        model = keras.Model(inputs, outputs)
        for size in (8, 5, 1):
            expected = tuple(layer.compute_output_shape((size, *SHAPE[1:])))
            for training in (False, True):
                assert tuple(model(_INPUTS[:size], training=training).shape) == expected, f"{case}, batch of {size}"


@check("layer", only_on=("tensorflow", "jax"), because="the other backends of Keras do not compile with XLA")
def check_compiled_is_eager(card: Card) -> None:
    """In a graph with an unknown batch size, and with XLA, outputs and state are those of the eager call."""
    for case, layer in _built(card):
        start = _state(layer)
        for training in (True, False):
            _restore(layer, start)
            expected = _array(layer(_INPUTS[:7], training=training))
            after = _state(layer)
            for name, call in _compiled(layer, training).items():
                what = f"{case}, {name}, training={training}"
                _restore(layer, start)
                actual = _array(call(ops.convert_to_tensor(_INPUTS[:7])))
                _assert_state(layer, after, what, 1e-6)
                assert np.isfinite(actual).all(), what
                if not (training and "random" in card.tags and name != "graph"):
                    np.testing.assert_allclose(actual, expected, 1e-5, 1e-5, err_msg=what)


def _compiled(layer: Any, training: bool) -> dict[str, Callable[[Any], Any]]:
    if keras.config.backend() == "jax":
        import jax

        takes = "training" in inspect.signature(layer.call).parameters  # which `stateless_call` does not look at

        def pure(variables: Any, x: Any) -> Any:
            trainable, rest = variables
            return layer.stateless_call(trainable, rest, x, **({"training": training} if takes else {}))

        compiled = jax.jit(pure)

        def call(x: Any) -> Any:
            variables = [
                [v.value for v in group] for group in (layer.trainable_variables, layer.non_trainable_variables)
            ]
            outputs, rest = compiled(variables, x)
            for variable, value in zip(layer.non_trainable_variables, rest, strict=True):
                variable.assign(value)
            return outputs

        return {"jax.jit": call}
    import tensorflow as tf

    def traced(x: Any) -> Any:
        return layer(x, training=training)

    signature = [tf.TensorSpec((None, *SHAPE[1:]), "float32")]
    return {
        "graph": tf.function(traced, input_signature=signature, autograph=False),
        "XLA": tf.function(traced, jit_compile=True, autograph=False),
    }

"""Layers against their formulas in NumPy. The conformance suite has what all of them promise."""

import keras
import numpy as np
import pytest
from keras.optimizers.schedules import PolynomialDecay

from keras_optkit.layers import (
    DropBlock,
    DropPath,
    FilterResponseNormalization,
    GlobalResponseNormalization,
    LayerScale,
    stochastic_depth_rates,
)
from keras_optkit.testing.tools import float64


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float64")))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.5, 2.0, size=shape)


# -- DropPath, DropBlock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
def test_drop_path_drops_examples_as_drawn(dtype):
    with float64():
        x = normal(400, 2, 3)
        layer, generator = DropPath(0.3, seed=5, dtype=dtype), keras.random.SeedGenerator(5)
        drawn = "float64" if dtype == "float64" else "float32"
        for _ in range(2):
            kept = array(keras.random.uniform((400, 1, 1), dtype=drawn, seed=generator)) >= 0.3
            y = array(layer(x, training=True))
            tolerance = {"float32": 1e-6, "float64": 1e-12, "mixed_bfloat16": 2e-2}[dtype]
            np.testing.assert_allclose(y, np.where(kept, x / 0.7, 0.0), tolerance, tolerance)
            assert 0.6 < kept.mean() < 0.8
        np.testing.assert_array_equal(array(layer(x)), array(keras.ops.cast(x, layer.compute_dtype)))


@pytest.mark.parametrize(("rate", "factor"), [(0, 1.0), (1, 0.0), (1.0, 0.0)])
def test_drop_path_at_the_ends(rate, factor):
    x = normal(5, 4)
    np.testing.assert_array_equal(array(DropPath(rate)(x, training=True)), factor * np.float32(x))


def test_drop_path_follows_a_schedule():
    layer = DropPath(PolynomialDecay(0.0, 2, end_learning_rate=0.5), seed=1)
    seen = [array(layer(np.ones((2000, 1)), training=True)) for _ in range(3)]
    np.testing.assert_allclose([np.mean(y == 0) for y in seen], [0.0, 0.25, 0.5], atol=0.05)
    np.testing.assert_allclose([y.max() for y in seen], [1, 1 / 0.75, 2], rtol=1e-6)
    assert int(layer.step) == 3


def test_stochastic_depth_rates():
    np.testing.assert_allclose(stochastic_depth_rates(0.3, 3), [0.1, 0.2, 0.3])
    assert stochastic_depth_rates(0, 2) == [0, 0]
    with pytest.raises(ValueError, match=r"depth must be an integer at least 1, got 0"):
        stochastic_depth_rates(0.1, 0)
    with pytest.raises(ValueError, match=r"rate must be .*, got 1\.5"):
        stochastic_depth_rates(1.5, 3)


def numpy_drop_block(x, corners, blocks):
    """Algorithm 1 for channels last, with the corners of the blocks given."""
    keep = np.ones(x.shape)
    for example, *corner, channel in zip(*np.nonzero(corners), strict=True):
        keep[(example, *(slice(c, c + b) for c, b in zip(corner, blocks, strict=True)), channel)] = 0
    return x * keep * keep.size / keep.sum()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("sizes", "blocks"), [((9,), (3,)), ((7, 2), (3, 2)), ((5, 4, 6), (3, 3, 3))])
@float64()
def test_drop_block_is_the_formula(sizes, blocks, first):
    x = normal(4, *sizes, 3)
    layout = "channels_first" if first else "channels_last"
    layer = DropBlock(0.3, block_size=3, data_format=layout, seed=2, dtype="float64")
    places = [s - b + 1 for s, b in zip(sizes, blocks, strict=True)]
    gamma = 0.3 * np.prod(sizes) / np.prod(blocks) / np.prod(places)
    corners = array(keras.random.uniform((4, *places, 3), dtype="float64", seed=keras.random.SeedGenerator(2))) < gamma
    assert corners.any()
    y = array(layer(np.moveaxis(x, -1, 1) if first else x, training=True))
    expected = numpy_drop_block(x, corners, blocks)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1) if first else y, expected, rtol=1e-12)


def test_drop_block_drops_about_the_rate():
    y = array(DropBlock(0.1, block_size=5, seed=1)(np.ones((8, 40, 40, 16)), training=True))
    assert 0.09 < np.mean(y == 0) < 0.11
    assert y.mean() == pytest.approx(1.0, abs=1e-5)


def test_drop_block_at_rate_one_is_finite():
    y = array(DropBlock(1.0, block_size=1)(np.ones((2, 4, 3)), training=True))
    np.testing.assert_array_equal(y, 0.0)


# -- Scales and norms of one example -----------------------------------------------------------------------------------


def set_weights(layer, seed=3):
    for variable in layer.weights:
        variable.assign(np.random.default_rng(seed).normal(0.5, 1.0, variable.shape))
        seed += 1
    return [array(v) for v in layer.weights]


@pytest.mark.parametrize("axis", [-1, 1])
@float64()
def test_layer_scale_is_the_formula(axis):
    x, layer = normal(3, 4, 5), LayerScale(0.25, axis=axis, dtype="float64")
    np.testing.assert_allclose(array(layer(x)), 0.25 * x, rtol=1e-12)
    (scale,) = set_weights(layer)
    np.testing.assert_allclose(array(layer(x)), x * (scale if axis == -1 else scale[:, None]), rtol=1e-12)


def numpy_squares(x, mask):
    """For channels last: the sum of squares and the number of positions, of each channel of each example."""
    positions = tuple(range(1, x.ndim - 1))
    kept = np.ones(x.shape[:-1], bool) if mask is None else mask.reshape(mask.shape + (1,) * (x.ndim - 1 - mask.ndim))
    kept = np.broadcast_to(kept[..., None], x.shape)
    return np.where(kept, x**2, 0).sum(positions, keepdims=True), kept.sum(positions, keepdims=True)


def numpy_grn(x, gamma, beta, mask=None):
    norm = np.sqrt(numpy_squares(x, mask)[0])
    return x + gamma * x * norm / (norm.mean(-1, keepdims=True) + 1e-6) + beta


def numpy_frn(x, gamma, beta, tau, mask=None, epsilon=1e-6):
    total, count = numpy_squares(x, mask)
    return np.maximum(gamma * x / np.sqrt(total / np.maximum(count, 1) + np.abs(epsilon)) + beta, tau)


def test_a_scale_that_float16_cannot_hold_acts():
    layer = LayerScale(1.7e-6, dtype="mixed_float16")  # where the next numbers are 1.67e-6 and 1.73e-6
    np.testing.assert_allclose(np.asarray(layer(np.full((1, 2), 1000.0, "float16")), "f4"), 1.7e-3, rtol=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (2, 4, 3, 5), (2, 2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("make", "twin"), [(GlobalResponseNormalization, numpy_grn), (FilterResponseNormalization, numpy_frn)]
)
@float64()
def test_norms_are_the_formula(make, twin, shape, first, masked):
    if masked and (first or len(shape) < 3):
        return  # a mask is over what follows the batch, which are not the channels
    x = normal(*shape)
    mask = np.random.default_rng(1).uniform(size=shape[:2]) < 0.6 if masked else None
    layer = make(axis=1 if first else -1, dtype="float64")
    inputs = np.moveaxis(x, -1, 1) if first else x
    layer.build(inputs.shape)
    weights = set_weights(layer)
    y = array(layer(inputs, mask=mask))
    np.testing.assert_allclose(np.moveaxis(y, 1, -1) if first else y, twin(x, *weights, mask=mask), rtol=1e-10)


@float64()
def test_frn_options():
    x = normal(3, 4, 5)
    layer = FilterResponseNormalization(threshold=False, learn_epsilon=True, epsilon=1e-4, dtype="float64")
    layer.build(x.shape)
    np.testing.assert_allclose(array(layer.gamma_epsilon), 1e-4)
    gamma, beta, epsilon = set_weights(layer)
    np.testing.assert_allclose(array(layer(x)), numpy_frn(x, gamma, beta, -np.inf, epsilon=epsilon), rtol=1e-10)


@pytest.mark.only_on("tensorflow", because="the gradient is taken with a tape")
@pytest.mark.parametrize("make", [GlobalResponseNormalization, FilterResponseNormalization])
def test_gradient_of_zeros_is_finite(make):
    import tensorflow as tf

    layer, x = make(), tf.zeros((2, 4, 3))
    layer.build(x.shape)
    set_weights(layer)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    assert np.isfinite(tape.gradient(y, x)).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DropPath(1.5), ["rate", "1.5", "[0, 1]"]),
        (lambda: DropPath("0.5"), ["rate", "'0.5'", "[0, 1]"]),
        (lambda: DropPath(0.5, seed=1.5), ["seed", "1.5", "integer"]),
        (lambda: DropBlock(0.1, block_size=0), ["block_size", "0", "at least 1"]),
        (lambda: DropBlock(0.1, data_format="last"), ["data_format", "'last'", "channels_last"]),
        (lambda: DropBlock(0.1)(np.ones((2, 3))), ["one to three sizes", "(2, 3)"]),
        (lambda: LayerScale("1"), ["initial_value", "'1'", "number"]),
        (lambda: LayerScale(axis=0), ["axis", "batch"]),
        (lambda: LayerScale(axis=2)(np.ones((2, 3))), ["axis", "2"]),
        (lambda: GlobalResponseNormalization(epsilon=0), ["epsilon", "0", "(0"]),
        (lambda: FilterResponseNormalization(threshold=1), ["threshold", "1", "True or False"]),
        (lambda: FilterResponseNormalization(learn_epsilon=None), ["learn_epsilon", "None", "True or False"]),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)

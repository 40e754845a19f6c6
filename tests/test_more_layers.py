"""DropConnect, ShakeDrop and EvoNorm against NumPy. The conformance suite has what all layers promise."""

import keras
import numpy as np
import pytest
from keras import layers
from keras.optimizers.schedules import PolynomialDecay

from keras_optkit.layers import DropConnect, EvoNormB0, EvoNormS0, ShakeDrop
from keras_optkit.testing import roundtrip
from keras_optkit.testing.tools import float64, numbers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.5, 2.0, size=shape)


def array(x):
    return numbers(x.value if isinstance(x, keras.Variable) else x)


# -- DropConnect ------------------------------------------------------------------------------------------------------


@float64()
def test_drop_connect_drops_weights_as_drawn():
    inner = layers.Dense(30, dtype="float64")
    layer, generator, x = DropConnect(inner, 0.3, seed=5), keras.random.SeedGenerator(5), normal(2, 20)
    layer.build(x.shape)
    v = array(inner.kernel)
    for _ in range(2):
        kept = array(keras.random.uniform((20, 30), dtype="float64", seed=generator)) >= 0.3
        np.testing.assert_allclose(array(layer(x, training=True)), x @ np.where(kept, v / 0.7, 0), 1e-10, 1e-12)
        assert 0.6 < kept.mean() < 0.8
    np.testing.assert_allclose(array(layer(x)), x @ v, rtol=1e-12)
    np.testing.assert_array_equal(array(layer.fold()(x)), array(layer(x)))


def test_drop_connect_at_the_ends():
    for rate, expected in ((0, 4.0), (1, 0.0)):
        layer = DropConnect(layers.Dense(2, kernel_initializer="ones"), rate)
        np.testing.assert_array_equal(array(layer(np.ones((1, 4)), training=True)), expected)


def test_drop_connect_trains_what_is_kept():
    layer = DropConnect(layers.Dense(20, use_bias=False), 0.5, seed=1)
    model = keras.Sequential([keras.Input((10,)), layer])
    model.compile(keras.optimizers.SGD(1.0), lambda _, y: keras.ops.sum(y, -1))
    before = array(layer.layer.kernel)
    model.train_on_batch(np.ones((1, 10)), np.ones((1, 20)))
    moved = before - array(layer.layer.kernel)
    assert 0.3 < (moved == 0).mean() < 0.7
    np.testing.assert_allclose(moved[moved != 0], 2.0, rtol=1e-5)
    model = keras.Sequential([keras.Input((10,)), layer])
    again = roundtrip.through_file(model)
    x = normal(3, 10).astype("float32")
    np.testing.assert_array_equal(array(again(x, training=True)), array(model(x, training=True)))


# -- ShakeDrop --------------------------------------------------------------------------------------------------------


def factors(generator, shape, rate, alpha, beta):
    draw = {"dtype": "float64", "seed": generator}
    kept = float(keras.random.uniform((), **draw)) >= rate
    a, c = (
        array(keras.random.uniform(shape, -alpha, alpha, **draw)),
        array(keras.random.uniform(shape, 0, beta, **draw)),
    )
    return kept, *((np.ones(shape), np.ones(shape)) if kept else (a, c))


def gradient(layer, x):
    """Of the sum of the outputs in training."""
    if keras.config.backend() == "jax":
        import jax

        return array(jax.grad(lambda x: keras.ops.sum(layer(x, training=True)))(keras.ops.convert_to_tensor(x)))
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    return tape.gradient(y, x).numpy()


@pytest.mark.parametrize("per", ["example", "element"])
@float64()
def test_shake_drop_is_the_formula(per):
    x = normal(4, 3, 2)
    arguments, seen = {"rate": 0.6, "alpha": 0.8, "beta": 0.5, "per": per, "seed": 3, "dtype": "float64"}, set()
    for run, result in (
        ("forward", lambda layer: layer(x, training=True)),
        ("backward", lambda layer: gradient(layer, x)),
    ):
        if run == "backward" and keras.config.backend() == "jax":
            continue  # whose generator a traced function must not move
        layer, generator = ShakeDrop(**arguments), keras.random.SeedGenerator(3)
        for _ in range(6):
            kept, a, c = factors(generator, x.shape if per == "element" else (4, 1, 1), 0.6, 0.8, 0.5)
            seen.add(kept)
            expected = x * a if run == "forward" else np.broadcast_to(c, x.shape)
            np.testing.assert_allclose(
                array(result(layer)) if run == "forward" else result(layer), expected, 1e-10, 1e-12
            )
    assert seen == {True, False}
    np.testing.assert_allclose(array(ShakeDrop(**arguments)(x)), 0.4 * x, rtol=1e-12)


def test_shake_drop_follows_a_schedule():
    layer = ShakeDrop(PolynomialDecay(0.0, 2, end_learning_rate=1.0), seed=1)
    x = np.ones((3, 2), "float32")
    np.testing.assert_array_equal(array(layer(x, training=True)), 1.0)
    layer(x, training=True)
    assert (array(layer(x, training=True)) != 1).all()
    assert int(layer.step) == 3
    np.testing.assert_array_equal(array(layer(x)), 0.0)  # at rate 1 only noise is left, whose mean is 0


# -- EvoNorm ----------------------------------------------------------------------------------------------------------


def set_weights(layer):
    for seed, variable in enumerate(layer.weights):
        variable.assign(np.random.default_rng(seed).uniform(0.5, 1.5, variable.shape))
    return [array(v) for v in layer.weights]


def variance(x, seen, axes):
    """Of what is seen, over axes."""
    count = np.maximum(seen.sum(axes, keepdims=True), 1)
    mean = (x * seen).sum(axes, keepdims=True) / count
    return ((x - mean) ** 2 * seen).sum(axes, keepdims=True) / count


def inputs_of(shape, first, masked):
    x = normal(*shape)
    mask = np.random.default_rng(1).uniform(size=shape[:2]) < 0.6 if masked else None
    seen = np.ones(shape) if mask is None else np.broadcast_to(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), shape)
    return x, (np.moveaxis(x, -1, 1) if first else x), mask, seen


@pytest.mark.parametrize(
    ("shape", "first", "masked"),
    [((3, 6), False, False), ((3, 4, 6), False, True), ((3, 4, 6), True, False), ((2, 4, 3, 6), False, True)],
)
@float64()
def test_evonorm_is_the_formula(shape, first, masked):
    x, inputs, mask, seen = inputs_of(shape, first, masked)

    def result(layer, **more):
        return np.moveaxis(array(layer(inputs, mask=mask, **more)), 1 if first else -1, -1)

    layer = EvoNormS0(2, axis=1 if first else -1, dtype="float64")
    layer.build(inputs.shape)
    gamma, beta, v = set_weights(layer)
    parts = [part.reshape(*shape[:-1], 2, 3) for part in (x, seen)]
    axes = (*range(1, len(shape) - 1), len(shape))
    normed = (parts[0] / np.sqrt(variance(*parts, axes) + 1e-5)).reshape(shape)
    np.testing.assert_allclose(result(layer), gamma * normed / (1 + np.exp(-v * x)) + beta, rtol=1e-10)

    layer = EvoNormB0(axis=1 if first else -1, momentum=0.75, dtype="float64")
    layer.build(inputs.shape)
    gamma, beta, v, moving = set_weights(layer)
    positions = tuple(range(1, len(shape) - 1))
    of_batch = variance(x, seen, (0, *positions))
    of_example = variance(x, seen, positions) if positions else np.zeros(shape)
    for training in (True, False):
        of_all = of_batch if training else 0.75 * moving + 0.25 * of_batch.reshape(-1)
        divisor = np.maximum(np.sqrt(of_all + 1e-5), v * x + np.sqrt(of_example + 1e-5))
        np.testing.assert_allclose(result(layer, training=training), gamma * x / divisor + beta, rtol=1e-10)
    np.testing.assert_allclose(array(layer.moving_variance), 0.75 * moving + 0.25 * of_batch.reshape(-1), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DropConnect(layers.Dense(2), 1.5), ["rate", "1.5", "[0, 1]"]),
        (lambda: DropConnect("a", 0.5), ["layer", "'a'", "keras.Layer"]),
        (lambda: ShakeDrop(-0.1), ["rate", "-0.1", "[0, 1]"]),
        (lambda: ShakeDrop(0.1, alpha=-1), ["alpha", "-1", "[0"]),
        (lambda: ShakeDrop(0.1, per="pixel"), ["per", "'pixel'", "'element'"]),
        (lambda: EvoNormS0(0), ["groups", "0", "at least 1"]),
        (lambda: EvoNormS0(4)(np.ones((2, 6))), ["groups", "4", "6 channels"]),
        (lambda: EvoNormS0(2, axis=0), ["axis", "batch"]),
        (lambda: EvoNormB0(momentum=1.5), ["momentum", "1.5", "[0, 1]"]),
        (lambda: EvoNormB0(epsilon=0), ["epsilon", "0", "(0"]),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)

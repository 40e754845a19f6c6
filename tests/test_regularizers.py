"""Regularizers: exact values and gradients. The conformance suite has what all of them promise."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_optkit as ok
from keras_optkit.registry import Card
from keras_optkit.regularizers import L1, L1L2, L2
from keras_optkit.testing import roundtrip

# Instance, and SEED.md's formula: value and gradient.
FORMULAS = {
    "L1": (L1(0.3), lambda w: 0.3 * np.abs(w).sum(), lambda w: 0.3 * np.sign(w)),
    "L2": (L2(0.3), lambda w: 0.3 * (w**2).sum(), lambda w: 0.6 * w),
    "L1L2": (
        L1L2(0.3, 0.2),
        lambda w: 0.3 * np.abs(w).sum() + 0.2 * (w**2).sum(),
        lambda w: 0.3 * np.sign(w) + 0.4 * w,
    ),
}


def number(x):
    return float(keras.ops.convert_to_numpy(keras.ops.cast(x, "float64")))


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (40, 30), (3, 3, 8, 16), (0, 4)])
def test_value_is_exact_in_float64(name, shape):
    regularizer, value, _ = FORMULAS[name]
    w = np.random.default_rng(0).normal(size=shape) * 10
    expected = pytest.approx(float(value(w)), rel=1e-13, abs=0)
    assert number(regularizer(w)) == expected
    assert number(regularizer(keras.ops.convert_to_tensor(w))) == expected
    assert number(regularizer(keras.Variable(w, dtype="float64"))) == expected


@pytest.mark.parametrize("name", FORMULAS)
def test_value_and_gradient_are_exact_through_a_train_step(name):
    regularizer, value, gradient = FORMULAS[name]
    keras.config.set_floatx("float64")
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(4, 3)), rng.normal(size=(8, 4)), rng.normal(size=(8, 3))
    w[0, 0] = 0.0  # |w| has the gradient 0 there
    layer = layers.Dense(3, use_bias=False, kernel_regularizer=regularizer, dtype="float64")
    model = keras.Sequential([keras.Input((4,)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    layer.kernel.assign(w)
    assert [number(loss) for loss in model.losses] == [pytest.approx(value(w), rel=1e-13)]
    error = x @ w - y
    assert model.evaluate(x, y, verbose=0) == pytest.approx(np.mean(error**2) + value(w), rel=1e-12)
    model.train_on_batch(x, y)
    step = x.T @ (2 * error / error.size) + gradient(w)
    # Keras's optimizer keeps its learning rate, exactly 0.5 here, in float32.
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer.kernel), w - 0.5 * step, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_is_exact_in_float64(name):
    import tensorflow as tf

    regularizer, _, gradient = FORMULAS[name]
    w = np.random.default_rng(0).normal(size=(5, 4))
    w[0, 0] = 0.0
    variable = tf.Variable(w)
    with tf.GradientTape() as tape:
        loss = regularizer(variable)
    np.testing.assert_allclose(tape.gradient(loss, variable).numpy(), gradient(w), rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("ours", "keras_own"),
    [
        (L1(), keras.regularizers.L1()),
        (L2(), keras.regularizers.L2()),
        (L1(0.2), keras.regularizers.L1(0.2)),
        (L1L2(l2=0.1), keras.regularizers.L1L2(l2=0.1)),
        (L1L2(l1=0.1), keras.regularizers.L1L2(l1=0.1)),
        (L1L2(0.1, 0.2), keras.regularizers.L1L2(0.1, 0.2)),
    ],
)
def test_equals_keras_in_float32(ours, keras_own):
    w = keras.ops.convert_to_tensor(np.random.default_rng(0).normal(size=(30, 20)).astype("float32"))
    assert number(ours(w)) == pytest.approx(number(keras_own(w)), rel=1e-6)
    assert ours(w).dtype == w.dtype


def test_elastic_net_defaults():
    assert (L1L2().l1, L1L2().l2) == (0.01, 0.01)
    assert (L1L2(l1=0.5).l1, L1L2(l1=0.5).l2) == (0.5, 0.0)
    assert (L1L2(l2=0.5).l1, L1L2(l2=0.5).l2) == (0.0, 0.5)
    again = roundtrip.through_json(L1L2(l2=0.5), {"l2": 0.5})
    assert (again.l1, again.l2) == (0.0, 0.5)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 300.0), ("bfloat16", 1.0)])
def test_half_precision_sums_in_float32(dtype, size):
    w = keras.ops.full((1000,), size, dtype=dtype)
    for regularizer, exact in ((L1(1.0), 1000 * size), (L2(1.0), 1000 * size**2)):
        value = regularizer(w)
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        assert number(value) == exact
    assert number(keras.regularizers.L2(1.0)(keras.ops.full((1000,), 300.0, dtype="float16"))) == np.inf  # the reason


@pytest.mark.parametrize(
    ("policy", "floatx"), [("mixed_float16", "float32"), ("bfloat16", "float32"), ("float16", "float16")]
)
def test_half_precision_models_train(policy, floatx):
    keras.config.set_floatx(floatx)
    keras.config.set_dtype_policy(policy)
    layer = layers.Dense(4, kernel_regularizer=L2(0.1), activity_regularizer=L1(0.1))
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(0.01), "mse")
    losses = model.fit(np.ones((16, 3)), np.ones((16, 4)), epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_drops_into_a_compiled_model_and_makes_sparse_weights():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 10))
    y = x[:, :1] * 3.0  # only the first input matters
    model = keras.Sequential([keras.Input((10,)), layers.Dense(1, kernel_regularizer=L1(0.5), bias_regularizer=L2())])
    model.compile(keras.optimizers.SGD(0.02), "mse")
    model.fit(x, y, epochs=30, batch_size=64, verbose=0)
    kernel = np.abs(keras.ops.convert_to_numpy(model.layers[0].kernel))[:, 0]
    # The lasso's optimum: the weight shrinks by l1 / (2 E[x²]), the others are zero up to one step of SGD.
    assert kernel[0] == pytest.approx(3.0 - 0.25 / np.mean(x[:, 0] ** 2), abs=0.1)
    assert kernel[1:].max() < 0.05
    assert roundtrip.through_file(model).evaluate(x, y, verbose=0) == pytest.approx(model.evaluate(x, y, verbose=0))


@pytest.mark.parametrize("make", [lambda value: L1(value), lambda value: L2(value), lambda value: L1L2(value, 0.1)])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.1", [0.1]])
def test_bad_factor_is_refused(make, value):
    with pytest.raises((TypeError, ValueError)) as error:
        make(value)
    assert all(word in str(error.value) for word in ("l", repr(value), "[0"))


@pytest.mark.parametrize("cls", [L1, L2])
def test_missing_factor_is_refused(cls):
    with pytest.raises(TypeError, match="None"):
        cls(None)


@keras.saving.register_keras_serializable("tests")
class Narrow(L2):
    """Sums in the weights' own precision, and rewards where it should punish."""

    def __call__(self, x):
        return -self.l2 * keras.ops.sum(keras.ops.square(x))


def test_the_suite_finds_planted_bugs():
    card = Card(name="Narrow", kind="regularizer", make=Narrow, tags=frozenset({"nonnegative", "zero_at_zero"}))
    assert {"half_precision", "nonnegative"} <= set(ok.testing.failures(card))

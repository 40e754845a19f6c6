"""Layers: formulas against NumPy, identities with Keras's. The conformance suite has what all of them promise."""

import math
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from keras.optimizers.schedules import LearningRateSchedule, PiecewiseConstantDecay, PolynomialDecay

import keras_optkit as ok
from keras_optkit.layers import GhostBatchNormalization, ScheduledDropout
from keras_optkit.registry import Card
from keras_optkit.testing import roundtrip


def array(x):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(x, "float64")))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(2.0, 3.0, size=shape)


def constant(rate):
    return PolynomialDecay(rate, 10, end_learning_rate=rate)


# -- ScheduledDropout -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise_shape", [None, (None, 1, 5)])
@pytest.mark.parametrize("rate", [0, 0.0, 0.3, 0.5, 1])
def test_number_is_keras_dropout(rate, noise_shape):
    x = normal(6, 4, 5).astype("float32")
    ours, keras_own = (cls(rate, noise_shape=noise_shape, seed=3) for cls in (ScheduledDropout, layers.Dropout))
    for training in (True, False, True):
        np.testing.assert_array_equal(array(ours(x, training=training)), array(keras_own(x, training=training)))
    assert ours.weights == []


@pytest.mark.parametrize("noise_shape", [None, (None, 1, 5), (6, 4, 1)])
def test_constant_schedule_is_keras_dropout(noise_shape):
    x = normal(6, 4, 5).astype("float32")
    ours = ScheduledDropout(constant(0.3), noise_shape=noise_shape, seed=3)
    keras_own = layers.Dropout(0.3, noise_shape=noise_shape, seed=3)
    for _ in range(3):
        np.testing.assert_allclose(array(ours(x, training=True)), array(keras_own(x, training=True)), rtol=1e-6)


def test_schedule_is_the_formula_in_float64():
    schedule = PolynomialDecay(0.0, 4, end_learning_rate=0.8)
    layer = ScheduledDropout(schedule, seed=5, dtype="float64")
    generator = keras.random.SeedGenerator(5)
    x = normal(40, 30)
    for step in range(6):
        assert int(layer.step) == step if step else layer.step is None
        y = array(layer(x, training=True))
        p = float(np.float32(0.2) * min(step, 4))
        kept = array(keras.random.uniform(x.shape, dtype="float64", seed=generator)) >= p
        assert float(layer.current_rate) == pytest.approx(0.2 * min(step + 1, 4), rel=1e-6)
        np.testing.assert_allclose(y, np.where(kept, x / (1 - p), 0.0), rtol=1e-6)
        ratio = (y / x)[kept]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-12)
        np.testing.assert_array_equal(array(layer(x, training=False)), x)
    assert int(layer.step) == 6


def test_fraction_follows_the_schedule():
    layer = ScheduledDropout(PiecewiseConstantDecay([0, 1], [0.1, 0.5, 0.9]), seed=1)
    x = np.ones((400, 500), "float32")
    for p in (0.1, 0.5, 0.9):
        y = array(layer(x, training=True))
        assert abs(np.mean(y == 0) - p) < 5 * math.sqrt(p * (1 - p) / x.size)
        np.testing.assert_allclose(y[y > 0], 1 / (1 - p), rtol=1e-6)


def test_bfloat16_meets_any_rate():
    x = np.ones((1000, 1000), "float32")
    y = array(ScheduledDropout(constant(0.3), seed=1, dtype="mixed_bfloat16")(x, training=True))
    assert abs(np.mean(y == 0) - 0.3) < 5 * math.sqrt(0.21 / x.size)


@pytest.mark.parametrize(("rate", "factor"), [(1.0, 0.0), (2.0, 0.0), (0.0, 1.0), (-0.5, 1.0)])
def test_schedule_at_and_beyond_the_ends(rate, factor):
    import tensorflow as tf

    layer, x = ScheduledDropout(constant(rate)), tf.constant(normal(5, 4), "float32")
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=True)
    np.testing.assert_array_equal(array(y), factor * array(x))
    np.testing.assert_array_equal(array(tape.gradient(y, x)), np.full((5, 4), factor))


def test_noise_is_shared_along_ones():
    layer = ScheduledDropout(constant(0.5), noise_shape=(None, 1, 5), seed=1)
    y = array(layer(np.ones((50, 4, 5), "float32"), training=True))
    np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1], y.shape))
    assert len(np.unique(y[:, 0], axis=0)) > 10


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_fit_advances_the_step_once_per_batch(jit_compile):
    layer = ScheduledDropout(PolynomialDecay(0.0, 10, end_learning_rate=0.5))
    model = keras.Sequential([keras.Input((4,)), GhostBatchNormalization(3), layer, layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=jit_compile)
    x = normal(20, 4).astype("float32")
    model.fit(x, x[:, :1], batch_size=8, epochs=2, verbose=0)  # batches of 8, 8 and 4
    assert int(layer.step) == int(model.optimizer.iterations) == 6
    model.predict(x, verbose=0)
    assert int(layer.step) == 6


def test_replicas_count_one_step():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = ScheduledDropout(constant(0.5))
        model = keras.Sequential([keras.Input((4,)), layers.Dense(2), layer, GhostBatchNormalization(2)])
        model.compile("sgd", "mse")
    x = normal(16, 4).astype("float32")
    model.fit(x, x[:, :2], batch_size=8, verbose=0)
    assert [int(step) for step in strategy.experimental_local_results(layer.step.value)] == [2, 2]


def test_weights_file_holds_step_and_seed(tmp_path):
    def model():
        return keras.Sequential([keras.Input((30,)), ScheduledDropout(PolynomialDecay(0.1, 5, 0.5))])

    x = np.ones((4, 30), "float32")
    one, two = model(), model()
    for _ in range(3):
        one(x, training=True)
    one.save_weights(tmp_path / "a.weights.h5")
    two.load_weights(tmp_path / "a.weights.h5")
    assert int(two.layers[0].step) == 3
    np.testing.assert_array_equal(array(two(x, training=True)), array(one(x, training=True)))


def test_loads_the_weights_of_a_model_with_keras_dropout(tmp_path):
    stock = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dropout(0.5)])
    ours = keras.Sequential([keras.Input((3,)), layers.Dense(4), ScheduledDropout(0.5)])
    stock.save_weights(tmp_path / "a.weights.h5")
    ours.load_weights(tmp_path / "a.weights.h5")
    np.testing.assert_array_equal(ours.get_weights()[0], stock.get_weights()[0])


class Odd(LearningRateSchedule):
    def __call__(self, step):
        return keras.ops.cast(step % 2, "float32")


def test_schedules_of_any_make_drive_it():
    layer, x = ScheduledDropout(Odd()), np.ones((2, 3), "float32")
    np.testing.assert_array_equal([array(layer(x, training=True)).max() for _ in range(4)], [1, 0, 1, 0])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rate": 1.5}, ["rate", "1.5", "[0, 1]"]),
        ({"rate": -0.1}, ["rate", "-0.1", "[0, 1]"]),
        ({"rate": float("nan")}, ["rate", "nan", "[0, 1]"]),
        ({"rate": "0.5"}, ["rate", "'0.5'", "[0, 1]"]),
        ({"rate": True}, ["rate", "True", "[0, 1]"]),
        ({"rate": None}, ["rate", "None", "[0, 1]"]),
        ({"rate": 0.5, "seed": 1.5}, ["seed", "1.5", "integer"]),
        ({"rate": 0.5, "noise_shape": (None, 0)}, ["noise_shape", "0", "positive"]),
    ],
)
def test_bad_dropout_is_refused(arguments, words):
    with pytest.raises((TypeError, ValueError)) as error:
        ScheduledDropout(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


# -- GhostBatchNormalization ------------------------------------------------------------------------------------------


def ghosts(n, size):
    """The rule: consecutive ghost batches of `size`, the rest with the last."""
    count = max(n // size, 1)
    return [slice(i * size, (i + 1) * size if i < count - 1 else n) for i in range(count)]


def numpy_train(x, size, axis, epsilon, gamma, beta, mask=None):
    """Outputs of a training call and the statistics that the moving ones go towards."""
    axes = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    shape = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    kept = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask[..., None], x.shape)
    y, means, variances, counts = np.empty_like(x), [], [], []
    for part in ghosts(len(x), size):
        values = np.ma.masked_array(x[part], ~kept[part])
        mean, variance = (np.ma.filled(f(values, axis=axes), 0.0) for f in (np.ma.mean, np.ma.var))
        y[part] = (x[part] - mean.reshape(shape)) / np.sqrt(variance.reshape(shape) + epsilon)
        y[part] = y[part] * gamma.reshape(shape) + beta.reshape(shape)
        means, variances, counts = [*means, mean], [*variances, variance], [*counts, kept[part].sum(axis=axes)]
    return y, np.average(means, axis=0, weights=counts), np.average(variances, axis=0, weights=counts)


@pytest.mark.each_once
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((5,), -1), ((4, 5), -1), ((5, 4), 1), ((3, 4, 5), 3), ((5, 3, 4), 1)])
@pytest.mark.parametrize(("n", "size"), [(8, 4), (8, 2), (11, 4), (7, 2), (3, 4)])
def test_ghost_is_the_formula_in_float64(n, size, shape, axis, masked):
    layer = GhostBatchNormalization(size, axis=axis, momentum=0.7, epsilon=1e-3, dtype="float64")
    layer.build((None, *shape))
    gamma, beta = normal(5, seed=1), normal(5, seed=2)
    layer.gamma.assign(gamma)
    layer.beta.assign(beta)
    moving_mean, moving_variance = np.zeros(5), np.ones(5)
    mask = np.random.default_rng(3).uniform(size=(n, *shape[:-1])) < 0.7 if masked else None
    for step in range(3):
        x = normal(n, *shape, seed=step)
        y, mean, variance = numpy_train(x, size, axis, 1e-3, gamma, beta, mask)
        np.testing.assert_allclose(array(layer(x, training=True, mask=mask)), y, rtol=1e-10, atol=1e-10)
        moving_mean, moving_variance = 0.7 * moving_mean + 0.3 * mean, 0.7 * moving_variance + 0.3 * variance
        np.testing.assert_allclose(array(layer.moving_mean), moving_mean, rtol=1e-12)
        np.testing.assert_allclose(array(layer.moving_variance), moving_variance, rtol=1e-12)
    broadcast = [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    mean, variance, gamma, beta = (v.reshape(broadcast) for v in (moving_mean, moving_variance, gamma, beta))
    expected = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(array(layer(x, training=False)), expected, rtol=1e-10, atol=1e-10)


def test_keras_batch_normalization_is_the_formula_too():
    """With the ghosts off the layer is Keras's, which SEED.md's formula must hold for as well."""
    layer = GhostBatchNormalization(momentum=0.7, epsilon=1e-3, dtype="float64")
    x = normal(9, 5)
    y, mean, variance = numpy_train(x, 9, -1, 1e-3, np.ones(5), np.zeros(5))
    np.testing.assert_allclose(array(layer(x, training=True)), y, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(array(layer.moving_mean), 0.3 * mean, rtol=1e-12)
    np.testing.assert_allclose(array(layer.moving_variance), 0.7 + 0.3 * variance, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"axis": 1, "scale": False}, {"renorm": True}, {"trainable": False}])
@pytest.mark.parametrize("masked", [False, True])
def test_without_ghosts_it_is_keras_batch_normalization(options, masked):
    ours, keras_own = (cls(momentum=0.8, **options) for cls in (GhostBatchNormalization, layers.BatchNormalization))
    mask = np.arange(24).reshape(6, 4) % 3 > 0 if masked else None
    for step, training in enumerate((True, True, False, None)):
        x = normal(6, 4, 5, seed=step).astype("float32")
        y = array(keras_own(x, training=training, mask=mask))
        np.testing.assert_array_equal(array(ours(x, training=training, mask=mask)), y)
    for one, two in zip(ours.weights, keras_own.weights, strict=True):
        np.testing.assert_array_equal(array(one), array(two))


def test_one_ghost_is_keras_batch_normalization():
    ours, keras_own = (
        cls(dtype="float64") for cls in (lambda **k: GhostBatchNormalization(6, **k), layers.BatchNormalization)
    )
    for step in range(3):
        x = normal(6, 4, 5, seed=step)
        np.testing.assert_allclose(
            array(ours(x, training=True)), array(keras_own(x, training=True)), rtol=1e-12, atol=1e-12
        )
    for one, two in zip(ours.weights, keras_own.weights, strict=True):
        np.testing.assert_allclose(array(one), array(two), rtol=1e-12)


def test_gradient_is_that_of_separate_batch_normalizations():
    import tensorflow as tf

    x, weights = tf.constant(normal(11, 4, 5)), tf.constant(normal(11, 4, 5, seed=1))
    ghost, whole = GhostBatchNormalization(4, dtype="float64"), layers.BatchNormalization(dtype="float64")
    parts = ghosts(11, 4)

    def gradients(outputs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(tf.sin(outputs(x)) * weights)
        return tape.gradient(loss, x)

    expected = gradients(lambda x: tf.concat([whole(x[part], training=True) for part in parts], 0))
    np.testing.assert_allclose(
        array(gradients(lambda x: ghost(x, training=True))), array(expected), rtol=1e-9, atol=1e-12
    )


def test_hidden_values_do_not_count_even_if_not_finite():
    layer = GhostBatchNormalization(2, dtype="float64")
    x, mask = normal(4, 3, 5), np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]], bool)
    x[~mask] = np.nan
    y = array(layer(x, training=True, mask=mask))
    assert np.isfinite(y[mask]).all()
    np.testing.assert_allclose(array(layer.moving_mean), 0.01 * x[mask].mean(axis=0), rtol=1e-12)


def test_mask_of_wrong_rank_is_refused():
    with pytest.raises(ValueError, match="mask"):
        GhostBatchNormalization(2)(normal(4, 3, 5), training=True, mask=np.ones((4,), bool))


@pytest.mark.parametrize("policy", ["mixed_float16", "float16", "mixed_bfloat16"])
def test_half_precision_does_not_overflow(policy):
    layer = GhostBatchNormalization(4, dtype=policy, epsilon=1e-3)
    x = 1000 * normal(8, 300).astype("float32")  # squares overflow float16
    y = array(layer(x, training=True))
    for part in ghosts(8, 4):
        np.testing.assert_allclose(y[part].mean(axis=0), 0, atol=2e-2)
        np.testing.assert_allclose(y[part].std(axis=0), 1, atol=2e-2)


def test_not_trainable_is_inference():
    layer = GhostBatchNormalization(2, trainable=False)
    x = normal(4, 5).astype("float32")
    np.testing.assert_array_equal(array(layer(x, training=True)), array(layer(x, training=False)))
    np.testing.assert_array_equal(array(layer.moving_mean), np.zeros(5))


def test_layers_drop_into_a_compiled_model():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, size=(37, 6, 4)).astype("float32")  # the last batch has 5 examples
    y = (x[..., :1] > 3).astype("float32")
    model = keras.Sequential(
        [
            keras.Input((6, 4)),
            layers.Masking(0.0),
            GhostBatchNormalization(4, momentum=0.8),
            layers.Dense(8, activation="relu"),
            GhostBatchNormalization(4, momentum=0.8),
            ScheduledDropout(PolynomialDecay(0.0, 20, end_learning_rate=0.2)),
            layers.Dense(1),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    losses = model.fit(x, y, batch_size=16, epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.7 * losses[0]
    again = roundtrip.through_file(model)
    np.testing.assert_array_equal(again.predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GhostBatchNormalization(1), ["ghost_batch_size", "1", "at least 2"]),
        (lambda: GhostBatchNormalization(2.0), ["ghost_batch_size", "2.0", "integer"]),
        (lambda: GhostBatchNormalization(True), ["ghost_batch_size", "True", "integer"]),
        (lambda: GhostBatchNormalization("4"), ["ghost_batch_size", "'4'", "integer"]),
        (lambda: GhostBatchNormalization(4, renorm=True), ["renorm", "True", "ghost_batch_size=4"]),
        (lambda: GhostBatchNormalization(4, synchronized=True), ["synchronized", "True", "ghost_batch_size=4"]),
        (lambda: GhostBatchNormalization(4, momentum=1.5), ["momentum", "1.5", "[0, 1]"]),
        (lambda: GhostBatchNormalization(4, epsilon=0.0), ["epsilon", "0.0", "(0"]),
        (lambda: GhostBatchNormalization(4, axis=0).build((8, 5)), ["axis", "0", "batch"]),
        (lambda: GhostBatchNormalization(4, axis=-2).build((8, 5)), ["axis", "-2", "batch"]),
        (lambda: GhostBatchNormalization(4, ghosts=2), ["ghosts"]),
    ],
)
def test_bad_normalization_is_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


# -- the suite --------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable("tests")
class Forgetful(layers.Dropout):
    """Loses its rate and its seed in the config, and drops at inference."""

    def call(self, inputs, training=False):
        return super().call(inputs, training=True)

    def get_config(self):
        return {**super().get_config(), "rate": 0.1}


def test_the_suite_finds_planted_bugs():
    card = Card(name="Forgetful", kind="layer", make=Forgetful, cases=({"rate": 0.5},), tags=frozenset({"random"}))
    checks = {check.name: check for check in ok.testing.checks_for(card)}
    for name in ("config_round_trip", "saving", "inference"):
        with pytest.raises(AssertionError):
            checks[name](card)


@pytest.mark.only_on("tensorflow", because="its graph runs a step in part when data end")
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_data_of_unknown_length_add_no_step(dtype):
    """Where they end, TensorFlow runs what does not need the batch that is missing."""
    import tensorflow as tf

    x = np.ones((6, 3), "float32")
    data = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(2).filter(lambda *_: True)
    rate = PolynomialDecay(0.0, 6, end_learning_rate=0.6)
    layers = [ok.layers.ScheduledDropout(rate, noise_shape=noise, seed=1, dtype=dtype) for noise in (None, (None, 1))]
    model = keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])
    model.compile("sgd", loss="mse", jit_compile=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Your input ran out of data")
        model.fit(data, epochs=3, shuffle=False, verbose=0)
    assert [int(layer.step) for layer in layers] == [9, 9]
    assert [int(layer.seed_generator.state[1]) for layer in layers] == [9, 9]

"""Loss scaling within limits."""

import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_optkit as ok
from keras_optkit.testing import problems

STOCK = keras.optimizers


def make(inner=None, **how):
    return ok.optimizers.LossScale(ok.optimizers.SGD(0.5, momentum=0.9) if inner is None else inner, **how)


def steps(optimizer, gradients, mode="graph", start=1.0):
    """Applies one gradient after the other, each already scaled; returns weights and scales after each."""
    weight = keras.Variable(np.full(3, start), dtype="float32")
    optimizer.build([weight])

    def call(g):
        optimizer.apply([g], [weight])

    if mode != "eager":
        call = tf.function(call, jit_compile=mode == "xla")
    seen = []
    for g in gradients:
        call(tf.constant(np.full(3, g), "float32"))
        seen.append((float(weight.numpy()[0]), optimizer.loss_scale))
    return seen


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("inner", [lambda: None, lambda: STOCK.SGD(0.5, momentum=0.9)], ids=["ours", "keras"])
def test_within_the_limits_it_is_keras(mode, inner):
    gradients = [4.0, np.inf, 3.0, np.nan, 1.0, 2.0, 1.0, 2.0]
    common = {"initial_scale": 8.0, "dynamic_growth_steps": 2}
    stock = StockScale(inner() or ok.optimizers.SGD(0.5, momentum=0.9), **common)
    expected = steps(stock, gradients, mode)
    got = steps(make(inner(), **common), gradients, mode)
    assert got == expected
    assert [scale for _, scale in got] == [8.0, 4.0, 4.0, 2.0, 2.0, 4.0, 4.0, 8.0]


class StockScale(STOCK.LossScaleOptimizer):
    @property
    def loss_scale(self):
        return float(self.dynamic_scale.numpy())


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_floor_ceiling_and_counts(mode):
    optimizer = make(initial_scale=2.0, minimum_scale=1.0, maximum_scale=4.0, dynamic_growth_steps=1)
    seen = steps(optimizer, [np.inf, np.nan, -np.inf], mode)
    assert seen == [(1.0, 1.0)] * 3
    assert (optimizer.skipped, optimizer.skipped_in_a_row) == (3, 3)
    assert int(optimizer.iterations) == 0
    optimizer = make(initial_scale=2.0, minimum_scale=1.0, maximum_scale=4.0, dynamic_growth_steps=1)
    seen = steps(optimizer, [np.inf, 1.0, 1.0, 1.0, 1.0], mode)
    assert [scale for _, scale in seen] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert (optimizer.skipped, optimizer.skipped_in_a_row) == (1, 0)
    assert int(optimizer.iterations) == 4


def test_a_model_that_always_overflows_does_not_take_the_scale_to_zero():
    """Keras's halves it until 0, from where on no gradient is finite."""
    stock, ours = StockScale(ok.optimizers.SGD(0.1), initial_scale=1.0), make(initial_scale=1.0)
    for optimizer in (stock, ours):
        steps(optimizer, [np.inf] * 160)
    assert stock.loss_scale == 0.0
    assert ours.loss_scale == 1.0


def test_one_bad_replica_is_enough():
    """Keras asks the first replica only, and takes the infinity of the second one into the weights."""
    strategy = problems.two_replicas()
    with strategy.scope():
        optimizer = make(initial_scale=8.0)
        weight = keras.Variable(np.ones(3), dtype="float32")
        optimizer.build([weight])

    @tf.function
    def step(gradients):
        def replica():
            mine = tf.gather(gradients, tf.distribute.get_replica_context().replica_id_in_sync_group)
            optimizer.apply([mine], [weight])

        strategy.run(replica)

    for bad in ([[1.0] * 3, [np.inf] * 3], [[np.nan] * 3, [1.0] * 3]):
        step(tf.constant(bad))
        np.testing.assert_array_equal(ops.convert_to_numpy(weight), 1.0)
    assert (optimizer.loss_scale, optimizer.skipped) == (2.0, 2)
    step(tf.constant([[1.0] * 3, [3.0] * 3]))
    np.testing.assert_allclose(ops.convert_to_numpy(weight), 1.0 - 0.5 * 4.0 / 2.0)
    for copy in weight.value.values:
        np.testing.assert_array_equal(copy.numpy(), weight.value.values[0].numpy())


def network():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])


def test_fit_in_mixed_float16_saved_and_continued(tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = problems.regression()

    def fit(model):
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        return [ops.convert_to_numpy(w) for w in model.weights]

    def compiled(**how):
        model = network()
        inner = ok.optimizers.AdamW(0.01, gradient_accumulation_steps=3)
        model.compile(make(inner, initial_scale=2.0**17, dynamic_growth_steps=3, **how), loss="mse")
        return model

    model = compiled()
    fit(model)
    assert model.optimizer.skipped > 0  # 2^17 is beyond float16
    assert isinstance(model.optimizer, ok.optimizers.LossScale)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    expected = fit(model)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    assert loaded.optimizer.inner_optimizer.gradient_accumulation_steps == 3
    other = compiled()
    other.load_weights(tmp_path / "model.weights.h5")  # before it is built
    for again in (loaded, other):
        for a, b in zip(fit(again), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
        assert again.optimizer.skipped == model.optimizer.skipped
        assert again.optimizer.loss_scale == model.optimizer.loss_scale


def test_config_and_name():
    optimizer = make(initial_scale=4.0, minimum_scale=2.0, maximum_scale=16.0, dynamic_growth_steps=7, name="scaled")
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
    assert type(again) is ok.optimizers.LossScale
    assert again.get_config() == optimizer.get_config()
    assert (again.minimum_scale, again.maximum_scale, again.name) == (2.0, 16.0, "scaled")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"initial_scale": 0.5}, ValueError, r"initial_scale must be a finite number in \[1.0, 16777216.0\], got 0.5"),
        ({"minimum_scale": 0.0}, ValueError, "minimum_scale must be .* got 0.0"),
        ({"maximum_scale": 0.5}, ValueError, r"maximum_scale must be a finite number in \[1.0, inf\), got 0.5"),
        ({"dynamic_growth_steps": 0}, ValueError, "dynamic_growth_steps must be .* at least 1, got 0"),
        ({"inner": "adam"}, TypeError, "inner_optimizer must be a keras.optimizers.Optimizer, got 'adam'"),
        ({"inner": STOCK.LossScaleOptimizer(STOCK.SGD())}, ValueError, "inner_optimizer must not scale the loss"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_state_of_others_is_refused():
    optimizer = make()
    optimizer.build(problems.variables([np.zeros(2)]))
    with pytest.raises(ValueError, match=r"does not belong to LossScale: it has \['0'\]"):
        optimizer.load_own_variables({"0": np.zeros(2)})

"""Weights of half precision: what rounding loses, and the two ways to keep it."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.testing import problems


def trained(make, dtype, steps=1500):
    """Weights of a linear regression from 2 towards about 3, by steps that are below the resolution of bfloat16."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 20))
    y = x @ rng.uniform(2.6, 3.4, 20) + rng.normal(scale=2.0, size=256)
    weight = keras.Variable(np.full(20, 2.0), dtype=dtype, name="weight")
    optimizer = make()
    step = problems.stepper(optimizer, [weight], "graph")
    for _ in range(steps):
        w = np.asarray(ops.convert_to_numpy(ops.cast(weight, "float64")))
        step([ops.convert_to_tensor(x.T @ (x @ w - y) / 256, dtype=dtype)])
    w = np.asarray(ops.convert_to_numpy(ops.cast(weight, "float64")))
    return float(np.mean((x @ w - y) ** 2))


@pytest.mark.parametrize("keep", ["stochastic_rounding", "master_weights"])
def test_bfloat16_ends_where_float32_does(keep):
    reference = trained(lambda: ok.optimizers.SGD(3e-3), "float32")
    stalled = trained(lambda: ok.optimizers.SGD(3e-3), "bfloat16")
    assert stalled > 3 * reference
    assert trained(lambda: ok.optimizers.SGD(3e-3, **{keep: True}), "bfloat16") < 1.01 * reference


@pytest.mark.parametrize("keep", ["stochastic_rounding", "master_weights"])
def test_small_decay_moves_bfloat16_weights(keep):
    plain, kept = (
        problems.train(
            ok.optimizers.AdamW(1e-3, weight_decay=0.1, **arguments),
            [[np.zeros((50, 50))]] * 200,
            values=[np.ones((50, 50))],
            dtype="bfloat16",
            mode="graph",
        )[-1][0]
        for arguments in ({}, {keep: True})
    )
    np.testing.assert_array_equal(plain, 1.0)
    assert kept.mean() == pytest.approx(0.9999**200, abs=2e-3)


def test_stochastic_rounding_is_right_on_average_and_the_same_in_every_mode():
    grads, values = [[np.full((200, 200), -1.0), np.full(100, 3.0)]], [np.ones((200, 200)), -np.ones(100)]
    runs = [
        problems.train(
            ok.optimizers.SGD(0.001, stochastic_rounding=True), grads, values=values, dtype="bfloat16", mode=mode
        )[0]
        for mode in ("eager", "graph", "xla")
    ]
    for got, expected in zip(runs[1] + runs[2], runs[0] + runs[0], strict=True):
        np.testing.assert_array_equal(got, expected)
    large = runs[0][0]
    assert set(np.unique(large)) == {1.0, 1.0078125}
    # 0.001 of a step of 0.0078125: the share of those that went up has a standard deviation of 0.0017
    assert np.mean(large > 1) == pytest.approx(0.128, abs=0.009)


def test_infinite_weights_stay_infinite_under_stochastic_rounding():
    got = problems.train(
        ok.optimizers.SGD(1.0, stochastic_rounding=True),
        [[np.array([np.inf, np.nan, 1.0])]],
        values=[np.ones(3)],
        dtype="bfloat16",
    )[0][0]
    assert got[0] == -np.inf
    assert np.isnan(got[1])
    assert got[2] == 0.0


def test_weights_set_from_outside_win_over_their_masters():
    optimizer = ok.optimizers.SGD(1e-3, master_weights=True)
    weights = problems.variables([np.ones(3)], "bfloat16")
    one = ops.ones(3, "bfloat16")
    optimizer.apply([one], weights)
    weights[0].assign([1.0, 5.0, 1.0])
    for _ in range(3):
        optimizer.apply([one], weights)
    master = problems.state_of(optimizer)["master.0"]
    np.testing.assert_allclose(master, [0.996, 4.997, 0.996], rtol=1e-6)


def test_explain_counts_the_masters():
    weights = problems.variables([np.ones(3)], "bfloat16")
    assert ok.optimizers.SGD(master_weights=True).explain(weights).rows[0].state_bytes == 12
    assert ok.optimizers.SGD(master_weights=True).explain(problems.variables([np.ones(3)])).rows[0].state_bytes == 0


def test_what_is_refused():
    with pytest.raises(ValueError, match="At most one of master_weights, stochastic_rounding"):
        ok.optimizers.SGD(master_weights=True, stochastic_rounding=True)
    with pytest.raises(ValueError, match=r"float16 ones\. Use master_weights"):
        ok.optimizers.SGD(stochastic_rounding=True).build(problems.variables([np.ones(3)], "float16"))


def test_fit_in_pure_bfloat16():
    keras.config.set_dtype_policy("bfloat16")
    x, y = problems.regression()
    losses = {}
    for keep in ("stochastic_rounding", "master_weights"):
        model = problems.network()
        model.compile(ok.optimizers.AdamW(0.01, **{keep: True}), loss="mse")
        losses[keep] = model.fit(x, y, epochs=10, verbose=0).history["loss"]
        assert losses[keep][-1] < 0.9 * losses[keep][0]

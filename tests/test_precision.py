"""Weights of half precision: what rounding loses, and the two ways to keep it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
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


@pytest.mark.long
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


def bfloat16(x):
    return np.asarray(ops.convert_to_numpy(ops.cast(ops.cast(x, "bfloat16"), "float64")))


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_slots_in_bfloat16_are_rounded_after_a_float32_update(mode):
    grads = problems.gradients(5, [(3, 4), (5,)])
    got = problems.train(
        ok.optimizers.SGD(0.1, momentum=0.9, slot_dtype="bfloat16"),
        grads,
        values=problems.start([(3, 4), (5,)]),
        dtype="float32",
        mode=mode,
    )[-1]
    for i, p in enumerate(problems.start([(3, 4), (5,)])):
        v = np.zeros_like(p)
        for step in grads:
            exact = 0.9 * v + 0.1 * step[i]
            v, p = bfloat16(exact), p - exact
        np.testing.assert_allclose(got[i], p, rtol=1e-2, atol=1e-3)
        assert np.abs(got[i] - p).max() < 2e-5


def test_slots_in_bfloat16_take_half_and_can_be_saved():
    weights = problems.variables(problems.start([(300, 300), (4,)]), "float32")
    optimizer = ok.optimizers.AdamW(slot_dtype="bfloat16", stochastic_rounding=True)
    grads = [ops.convert_to_tensor(g, dtype="float32") for g in problems.gradients(1, [(300, 300), (4,)])[0]]
    for _ in range(3):
        optimizer.apply(grads, weights)
    assert [row.state_bytes for row in optimizer.explain(weights).rows] == [2 * 2 * 90000, 2 * 2 * 4]
    assert {v.dtype for slots in optimizer._held.state.slots for v in slots.values()} == {"bfloat16"}
    state = problems.state_of(optimizer)
    again = ok.optimizers.AdamW(slot_dtype="bfloat16", stochastic_rounding=True)
    copies = problems.variables([ops.convert_to_numpy(w) for w in weights], "float32")
    again.build(copies)
    again.load_own_variables(state)
    for each, held in ((optimizer, weights), (again, copies)):
        each.apply(grads, held)
    for a, b in zip(weights, copies, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), ops.convert_to_numpy(b))


def test_a_running_mean_in_bfloat16_needs_stochastic_rounding():
    """With β₂ = 0.999 the mean of 1 moves by 0.001, below half of bfloat16's last bit from 0.25 on."""
    means = {}
    for rounding in (False, True):
        optimizer = ok.optimizers.Adam(1e-4, slot_dtype="bfloat16", stochastic_rounding=rounding)
        problems.train(optimizer, [[np.ones(2000)]] * 700, values=[np.zeros(2000)], dtype="float32", mode="graph")
        means[rounding] = problems.state_of(optimizer)["slot.v.0"].mean()
    assert means[False] < 0.26
    assert means[True] == pytest.approx(1 - 0.999**700, abs=0.01)


def test_copies_of_the_weights_are_no_slots_to_round():
    optimizer = ok.optimizers.Lookahead(ok.optimizers.SGD(0.1, momentum=0.9), slot_dtype="bfloat16")
    optimizer.build(problems.variables([np.ones(3)], "float32"))
    assert {name: v.dtype for name, v in optimizer._held.state.slots[0].items()} == {
        "v": "bfloat16",
        "slow": "float32",
    }


def test_rows_of_a_table_are_rounded_at_random_too():
    rows = tf.IndexedSlices(tf.ones((3, 50), "bfloat16"), tf.constant([1, 3, 1]), tf.constant([1400, 50]))
    weight = keras.Variable(np.ones((1400, 50)), dtype="bfloat16")  # large enough to be updated by rows
    optimizer = ok.optimizers.SGD(2.0**-10, stochastic_rounding=True)
    for _ in range(64):
        optimizer.apply([rows], [weight])
    got = np.asarray(ops.convert_to_numpy(ops.cast(weight, "float64")))
    assert got[3].mean() == pytest.approx(1 - 64 / 1024, abs=0.01)
    assert got[1].mean() == pytest.approx(1 - 128 / 1024, abs=0.01)
    np.testing.assert_array_equal(got[[0, 2, 4]], 1.0)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"slot_dtype must be one of None, .*'int8', got 'float16'"):
        ok.optimizers.SGD(slot_dtype="float16")
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

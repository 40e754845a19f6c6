"""Optimizers beyond the conformance suite: the asked-for formulas, torch, Keras, engine details, third parties."""

import json
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_optkit as ok
from keras_optkit.optimizers.engine.packing import pack
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.rule import Weight, slots_of
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import made

SHAPES = [(3, 4), (5,), (), (2, 3, 2, 4)]
START = problems.start(SHAPES)
GRADS = problems.gradients(100, SHAPES)


def run(optimizer, dtype="float64", grads=GRADS):
    return problems.train(optimizer, grads, values=START, dtype=dtype)


# -- the formulas of the guide the package was asked to implement, written out once more ------------------------------


def formula(name, theta, g, t, s):
    """One step: eta = 0.1; `s` is the state, a dict of arrays that starts empty."""
    eta, eps = 0.1, 1e-8
    zero = np.zeros_like(theta)
    if name == "sgd":
        return theta - eta * g
    if name == "momentum":
        s["v"] = 0.9 * s.get("v", zero) + eta * g
        return theta - s["v"]
    if name == "adagrad":
        s["G"] = s.get("G", zero) + g * g
        return theta - eta * g / np.sqrt(s["G"] + eps)
    if name == "rmsprop":
        s["E"] = 0.9 * s.get("E", zero) + 0.1 * g * g
        return theta - eta * g / np.sqrt(s["E"] + eps)
    b1, b2 = 0.9, 0.999
    s["m"] = b1 * s.get("m", zero) + (1 - b1) * g
    s["v"] = b2 * s.get("v", zero) + (1 - b2) * g * g
    m_hat, v_hat = s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)
    return theta - eta * m_hat / (np.sqrt(v_hat) + eps)


FORMULAS = {
    "sgd": lambda: ok.optimizers.SGD(0.1),
    "momentum": lambda: ok.optimizers.SGD(0.1, momentum=0.9),
    "adagrad": lambda: ok.optimizers.Adagrad(0.1),
    "rmsprop": lambda: ok.optimizers.RMSprop(0.1),
    "adam": lambda: ok.optimizers.Adam(0.1),
}


@pytest.mark.each_once
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula_by_default_arguments(name, mode):
    trajectory = problems.train(FORMULAS[name](), GRADS[:30], values=START, mode=mode)
    for i, theta in enumerate(START):
        state: dict = {}
        for t, (arrays, weights) in enumerate(zip(GRADS[:30], trajectory, strict=True), 1):
            theta = formula(name, theta, arrays[i], t, state)
            np.testing.assert_allclose(weights[i], theta, rtol=1e-12, atol=1e-12, err_msg=f"step {t}")


def test_momentum_rate_acts_on_new_gradients_only():
    """With the rate inside the velocity, a rate of zero lets the velocity run on; outside, it stops at once."""
    for inside in (True, False):
        optimizer = ok.optimizers.SGD(0.1, momentum=0.5, rate_in_velocity=inside)
        w = [keras.Variable(np.array(1.0), dtype="float64")]
        optimizer.apply([tf.constant(1.0, "float64")], w)
        optimizer.learning_rate = 0.0
        optimizer.apply([tf.constant(1.0, "float64")], w)
        assert float(w[0]) == pytest.approx(0.9 - (0.05 if inside else 0.0), abs=1e-15)


# -- Keras --------------------------------------------------------------------------------------------------------

RATE = 2.0**-6
KERAS = {
    "SGD": (
        lambda: ok.optimizers.SGD(RATE, 0.9, nesterov=True),
        lambda: keras.optimizers.SGD(RATE, 0.9, nesterov=True),
    ),
    "Adagrad": (lambda: ok.optimizers.Adagrad(RATE, 0.1, 1e-7), lambda: keras.optimizers.Adagrad(RATE)),
    "RMSprop": (
        lambda: ok.optimizers.RMSprop(RATE, momentum=0.9, epsilon=1e-7, centered=True),
        lambda: keras.optimizers.RMSprop(RATE, momentum=0.9, centered=True),
    ),
    "Adam": (
        lambda: ok.optimizers.Adam(RATE, epsilon=1e-3, epsilon_hat=True),
        lambda: keras.optimizers.Adam(RATE, epsilon=1e-3),
    ),
    "AdamW": (
        lambda: ok.optimizers.AdamW(RATE, epsilon=1e-3, epsilon_hat=True, weight_decay=0.1, decay_mask="all"),
        lambda: keras.optimizers.AdamW(RATE, epsilon=1e-3, weight_decay=0.1),
    ),
    "AdamW as Keras has it": (
        lambda: ok.optimizers.AdamW(RATE, epsilon=1e-7, epsilon_hat=True, weight_decay=0.004, decay_mask="all"),
        lambda: keras.optimizers.AdamW(RATE),
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", KERAS)
def test_equals_keras_with_its_conventions(name):
    """In float64; the rate is one that float32 holds exactly, since Keras rounds some scalars through float32."""
    keras.config.set_floatx("float64")
    ours, theirs = KERAS[name]
    for got, expected in zip(run(ours())[::10], run(theirs())[::10], strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


# -- hyperparameters --------------------------------------------------------------------------------------------------


def test_config_follows_assignments():
    optimizer = ok.optimizers.AdamW(0.1)
    optimizer.beta_1 = 0.5
    optimizer.learning_rate = 0.25
    optimizer.weight_decay = None
    config = json.loads(json.dumps(optimizer.get_config()))
    assert (config["beta_1"], config["learning_rate"], config["weight_decay"]) == (0.5, 0.25, None)
    with pytest.raises(ValueError, match=r"beta_1 must be .*\[0, 1\), got 1.5"):
        optimizer.beta_1 = 1.5
    with pytest.raises(ValueError, match=r"learning_rate must be .*\[0, inf\), got -1"):
        optimizer.learning_rate = -1
    assert optimizer.beta_1 == 0.5
    with pytest.raises(AttributeError, match="gamma"):
        optimizer.gamma  # noqa: B018


def test_schedule_in_config_and_in_other_hyperparameters():
    cosine = keras.optimizers.schedules.CosineDecay(0.1, 10)
    falling = keras.optimizers.schedules.PolynomialDecay(0.9, 4, 0.5)
    optimizer = ok.optimizers.SGD(cosine, momentum=falling)
    again = keras.optimizers.deserialize(json.loads(json.dumps(keras.optimizers.serialize(optimizer))))
    assert again.get_config() == optimizer.get_config()
    velocity, theta = 0.0, 1.0
    w = [keras.Variable(1.0, dtype="float64")]
    step = tf.function(lambda g: again.apply([g], w))
    for t in range(6):
        step(tf.constant(1.0, "float64"))
        velocity = float(falling(t)) * velocity + float(cosine(t))
        theta -= velocity
        assert float(w[0]) == pytest.approx(theta, rel=1e-6)


def test_stock_callbacks_drive_a_scheduled_rate():
    """Keras's own optimizers raise TypeError here, epochs into the run."""
    x, y = problems.regression()
    model = problems.network()
    schedule = keras.optimizers.schedules.CosineDecay(0.05, 1000)
    model.compile(ok.optimizers.AdamW(schedule), loss="mse")
    plateau = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1, min_delta=10.0)
    model.fit(x, y, batch_size=32, epochs=4, verbose=0, callbacks=[plateau])
    assert float(model.optimizer.learning_rate) == pytest.approx(float(schedule(8)) / 8, rel=1e-3)


def warm_up(step):
    """0, 0.1, 0.2, ..."""
    return 0.1 * keras.ops.cast(step, "float32")


class WarmUp(keras.optimizers.schedules.LearningRateSchedule):
    def __call__(self, step):
        return warm_up(step)


def test_a_rate_assigned_while_the_schedule_is_zero_replaces_it_and_one_assigned_later_scales_it():
    weights, steps = [keras.Variable([0.0, 0.0])], []
    optimizer = ok.optimizers.SGD(WarmUp())
    optimizer.build(weights)
    step = tf.function(lambda: optimizer.apply([tf.ones(2)], weights))

    def moved():
        before = float(weights[0][0])
        step()
        steps.append(round(before - float(weights[0][0]), 6))

    optimizer.learning_rate = 0.0  # as a callback does that reads the rate and assigns it
    moved()
    moved()
    optimizer.learning_rate = 0.4  # twice the schedule
    moved()
    moved()
    assert steps == [0.0, 0.1, 0.4, 0.6]

    optimizer.iterations.assign(0)
    steps.clear()
    for rate in (0.3, 0.05, 0.0, 0.2):
        optimizer.learning_rate = rate
        assert float(optimizer.learning_rate) == pytest.approx(rate)
        moved()
        moved()
    assert steps == [0.3, 0.3, 0.05, 0.05, 0.0, 0.0, 0.2, 0.2]
    again = ok.optimizers.SGD(WarmUp())
    again.build(weights)
    again.load_own_variables(problems.state_of(optimizer))
    assert float(again.learning_rate) == pytest.approx(0.2)
    again.learning_rate = WarmUp()
    assert float(again.learning_rate) == pytest.approx(0.8)


def test_keras_scheduler_callback_over_a_warm_up_from_zero():
    x, y = problems.regression()
    model = problems.network()
    model.compile(ok.optimizers.SGD(WarmUp()), loss="mse")
    rates = []
    note = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda *_: rates.append(round(float(model.optimizer.learning_rate), 6))
    )
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 0.02 / (1 + epoch))
    model.fit(x, y, batch_size=32, epochs=2, verbose=0, callbacks=[scheduler, note])
    assert rates == [0.02, 0.01]


@keras.saving.register_keras_serializable(package="tests")
def half():
    return 0.5


def test_a_function_is_a_rate_as_in_keras():
    given = keras.Variable(0.25)
    for function, rate in ((half, 0.5), (lambda: given, 0.25)):
        ours, stock = ([keras.Variable([1.0, 2.0])] for _ in range(2))
        for kind, weights in ((ok.optimizers, ours), (keras.optimizers, stock)):
            optimizer = kind.SGD(function)
            optimizer.apply([tf.ones(2)], weights)
            assert float(optimizer.learning_rate) == rate
        np.testing.assert_array_equal(ours[0], stock[0])
    optimizer = ok.optimizers.SGD(half)
    again = ok.optimizers.SGD.from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()
    assert float(again.learning_rate) == 0.5
    assert ok.optimizers.Lookahead(optimizer).get_config()["learning_rate"] == optimizer.get_config()["learning_rate"]
    optimizer.learning_rate = 0.1  # as with a schedule
    optimizer.learning_rate = lambda: 0.75
    assert float(optimizer.learning_rate) == 0.75
    given.assign(0.125)
    assert float(ok.optimizers.SGD(lambda: given).learning_rate) == 0.125
    with pytest.raises(TypeError, match="learning_rate must be a function without arguments"):
        ok.optimizers.SGD(lambda step: 0.1 / step)


def test_assigning_a_schedule_replaces_the_rate():
    optimizer = ok.optimizers.SGD(0.1)
    optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    assert float(optimizer.learning_rate) == 0.5
    assert isinstance(optimizer.get_config()["learning_rate"], dict)


@pytest.mark.parametrize("wrong", ["keras_optkit>Adamm", "no optimizer", 3])
def test_a_string_that_is_no_optimizer(wrong):
    model = problems.network()
    with pytest.raises((ValueError, TypeError), match=str(wrong)):
        model.compile(optimizer=wrong, loss="mse")


def test_rule_that_is_no_rule():
    with pytest.raises(TypeError, match=r"rule must be a .*Rule, got 'adam'"):
        ok.optimizers.Optimizer(0.1, "adam")


def test_signature_lists_the_common_keywords():
    import inspect

    shown = inspect.signature(ok.optimizers.AdamW).parameters
    assert list(shown)[:2] == ["learning_rate", "beta_1"]
    assert {"clipnorm", "use_ema", "decay_mask", "name"} <= set(shown)
    assert "rule" not in shown


# -- the engine -------------------------------------------------------------------------------------------------------


def packed(shapes, treatments, layout="elementwise", dtypes=None, **more):
    weights = [Weight(shape, dtype) for shape, dtype in zip(shapes, dtypes or ["float32"] * len(shapes), strict=True)]
    return pack(weights, treatments, layout=lambda _: layout, **more)


def test_pack_sorts_by_dtype_decay_and_size():
    shapes = [(2, 3), (4,), (300, 300), (2, 3), ()]
    decayed, spared = Treatment(), Treatment(decayed=False)
    treatments = [decayed, spared, decayed, decayed, spared]
    dtypes = ["float32"] * 3 + ["float16", "float32"]
    buckets = packed(shapes, treatments, dtypes=dtypes)
    assert [b.indices for b in buckets] == [(0,), (1, 4), (2,), (3,)]
    assert [b.form for b in buckets] == ["flat", "flat", "bare", "flat"]
    assert [b.alone for b in buckets] == [False, False, True, False]
    some = packed(shapes, [None, *treatments[1:]], dtypes=dtypes, alone=lambda i: i == 4)
    assert [b.indices for b in some] == [(1,), (2,), (3,), (4,)]
    stacked = packed([(2, 3), (4,), (2, 3)], [decayed] * 3, "whole")
    assert [(b.indices, b.form) for b in stacked] == [((0, 2), "stacked"), ((1,), "stacked")]


def test_pack_makes_equal_buckets_of_one_shape():
    shapes = [(2,), (3, 3), (2,), (2,), (3, 3), (2,), (2,), (4,)]
    buckets = packed(shapes, [Treatment()] * 8, repeated=2)
    assert [b.indices for b in buckets] == [(0, 2), (1, 4), (3, 5), (6, 7)]
    assert {b.form for b in buckets} == {"flat"}


@pytest.mark.parametrize(
    ("how", "compiled"),
    [
        ({}, True),  # two loops, over 2**16 elements
        ({"momentum": 0.9, "use_ema": True}, False),  # three
        ({"momentum": 0.9, "use_ema": True, "fuse": True}, True),
        ({"fuse": False}, False),
    ],
)
def test_the_update_is_compiled_where_that_pays(how, compiled):
    optimizer, weights = ok.optimizers.SGD(0.1, clipnorm=1.0, **how), [keras.Variable(np.zeros((256, 256), "float32"))]
    optimizer.build(weights)
    step = tf.function(lambda g: optimizer.apply([g], weights), autograph=False)
    graph = step.get_concrete_function(tf.TensorSpec((256, 256))).graph.as_graph_def()
    assert any("_XlaMustCompile" in function.attr for function in graph.library.function) == compiled


@pytest.mark.parametrize("flat", [True, False])
def test_join_and_split_are_inverse(flat):
    shapes = [(2, 3), (4,), (), (0, 5)] if flat else [(2, 3), (2, 3)]
    (bucket,) = packed(shapes, [Treatment()] * len(shapes), "elementwise" if flat else "whole")
    parts = [np.random.default_rng(i).normal(size=s).astype("float32") for i, s in enumerate(shapes)]
    joined = bucket.join(parts)
    assert joined.shape[0] == (1 if flat else 2)
    for got, expected in zip(bucket.split(joined), parts, strict=True):
        np.testing.assert_array_equal(got, expected)
    mask = np.broadcast_to(bucket.mask([1], {}), joined.shape)
    for place, part in enumerate(bucket.split(mask)):
        np.testing.assert_array_equal(part, np.full(shapes[place], place == 1))
    ends = np.cumsum([part.size for part in parts])
    assert [bucket.member(int(end) - 1) for end, part in zip(ends, parts, strict=True) if part.size] == [
        i for i, part in enumerate(parts) if part.size
    ]


def test_built_inside_a_tf_function_on_plain_variables():
    w = tf.Variable([1.0, 2.0])
    optimizer = ok.optimizers.Adam(0.1)

    @tf.function
    def step():
        optimizer.apply_gradients([(2.0 * w, w)])

    step()
    step()
    expected = problems.train(ok.optimizers.Adam(0.1), [[np.array([2.0, 4.0])]], values=[np.array([1.0, 2.0])])[0][0]
    assert int(optimizer.iterations) == 2
    np.testing.assert_allclose(expected, [0.9, 1.9], rtol=1e-6)
    assert w.numpy()[0] < 0.9


def test_wrong_gradients_are_refused():
    w = problems.variables(problems.start())
    optimizer = ok.optimizers.SGD(0.1)
    with pytest.raises(ValueError, match="not built"):
        optimizer.apply([tf.ones(3)])
    with pytest.raises(ValueError, match="one to one, got 1 for 2"):
        optimizer.apply([tf.ones((3, 4))], w[:2])
    with pytest.raises(ValueError, match="No gradients"):
        optimizer.apply([None, None], w[:2])
    with pytest.raises(ValueError, match=r"Unknown variables weight_4: .* only 0 of them"):
        optimizer.apply([tf.ones((0, 3))], w[4:5])
    with pytest.warns(UserWarning, match=r"Gradients do not exist for variables \['weight_1'\]"):
        optimizer.apply([tf.ones((3, 4), "float64"), None], w[:2])


@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_a_bad_gradient_is_found_beside_an_empty_one(mode):
    """Each in a bucket of its own, and the empty one first."""
    optimizer, weights = ok.optimizers.SGD(0.1, skip_nonfinite=2), problems.variables([np.ones((0, 2)), np.ones(3)])
    optimizer.pack_below = 0
    step = problems.stepper(optimizer, weights, mode)
    step([ops.ones((0, 2), "float64"), ops.convert_to_tensor([1.0, 2.0, np.nan], "float64")])
    assert optimizer.nonfinite == (1, 1, "weight_1")


def test_some_of_the_variables_only():
    """Alternating updates of two parts of a model with one optimizer, as for a GAN."""
    start, grads = problems.start([(2, 2), (3,)]), problems.gradients(2, [(2, 2), (3,)])
    w = problems.variables(start)
    optimizer = ok.optimizers.SGD(0.1)
    optimizer.build(w)
    optimizer.apply([ops.convert_to_tensor(grads[0][1])], w[1:])
    np.testing.assert_array_equal(ops.convert_to_numpy(w[0]), start[0])
    np.testing.assert_allclose(ops.convert_to_numpy(w[1]), start[1] - 0.1 * grads[0][1], rtol=1e-14)


def test_constraints_hold_after_every_update():
    w = keras.Variable(np.full((4,), 3.0, "float32"))
    w.constraint = keras.constraints.MaxNorm(1.0)
    ok.optimizers.SGD(0.1).apply([tf.zeros(4)], [w])
    assert np.linalg.norm(w.numpy()) == pytest.approx(1.0, rel=1e-5)


def test_embedding_gradients_are_summed_over_repeated_rows():
    table = tf.Variable(tf.zeros((5, 2)))
    slices = tf.IndexedSlices(tf.ones((3, 2)), tf.constant([1, 1, 4]), dense_shape=(5, 2))
    ok.optimizers.SGD(1.0).apply([slices], [table])
    np.testing.assert_array_equal(table.numpy()[:, 0], [0, -2, 0, 0, -1])


def test_clipping_sees_repeated_rows_of_a_sparse_gradient_summed():
    table = tf.Variable(tf.zeros((5, 2)))
    slices = tf.IndexedSlices(tf.ones((3, 2)), tf.constant([1, 1, 4]), dense_shape=(5, 2))
    ok.optimizers.SGD(1.0, global_clipnorm=1.0).apply([slices], [table])
    assert np.linalg.norm(table.numpy()) == pytest.approx(1.0, rel=1e-6)
    assert table.numpy()[1, 0] == pytest.approx(-2 / np.sqrt(10), rel=1e-6)


@pytest.mark.parametrize("make", [ok.optimizers.SGD, ok.optimizers.RMSprop])
def test_momentum_can_be_switched_off_but_not_on_after_build(make):
    one = tf.constant(1.0, "float64")
    w = [keras.Variable(1.0, dtype="float64")]
    off, plain = make(0.1, momentum=0.9), make(0.1)
    off.build(w)
    off.momentum = 0.0
    off.apply([one], w)
    expected = [keras.Variable(1.0, dtype="float64")]
    plain.apply([one], expected)
    assert float(w[0]) == float(expected[0])
    plain.momentum = 0.9
    with pytest.raises(ValueError, match=r"built without the state \['v'\]"):
        plain.apply([one], expected)


def test_half_precision_weights_are_updated_through_float32():
    w = keras.Variable(np.ones((2, 2)), dtype="bfloat16")
    optimizer = ok.optimizers.Adam(0.25)
    optimizer.apply([ops.ones((2, 2), "bfloat16")], [w])
    assert ops.convert_to_numpy(ops.cast(w, "float32"))[0, 0] == 0.75
    assert problems.state_of(optimizer)["slot.m.0"].dtype == "float32"


@pytest.mark.few(1)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_fit_in_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    x, y = problems.regression()
    model = problems.network()
    model.compile(ok.optimizers.AdamW(0.05, global_clipnorm=1.0, gradient_accumulation_steps=2), loss="mse")
    losses = model.fit(x, y, batch_size=16, epochs=8, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    assert model.trainable_variables[0].dtype == "float32"


@pytest.mark.long
def test_two_replicas_in_fit():
    x, y = problems.regression()
    weights = []
    for strategy in (tf.distribute.get_strategy(), problems.two_replicas()):
        with strategy.scope():
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, "tanh"), keras.layers.Dense(1)])
            model.compile(ok.optimizers.AdamW(0.05, global_clipnorm=0.1, gradient_accumulation_steps=2), loss="mse")
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        weights.append(np.concatenate([w.ravel() for w in model.get_weights()]))
    np.testing.assert_allclose(*weights, rtol=1e-4, atol=1e-6)


# -- state ------------------------------------------------------------------------------------------------------------


def test_keras_adds_no_average_and_no_accumulators_of_its_own():
    optimizer = ok.optimizers.SGD(0.1, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(problems.variables(problems.start(), "float32"))
    numbers = sum(np.prod(shape, dtype=int) for shape in problems.SHAPES)
    scalars = 4  # iteration, rate, micro-batches, which weights
    given = len(problems.SHAPES)  # whether each parameter had a gradient in a micro-batch
    assert sum(np.prod(v.shape, dtype=int) for v in optimizer.variables) == 2 * numbers + scalars + given
    assert (optimizer.use_ema, optimizer.gradient_accumulation_steps) == (True, 2)


def test_the_average_of_a_variable_that_joins_later_is_set_by_its_first_update():
    weights = problems.variables([np.full(2, 5.0), np.full(2, 7.0)])
    optimizer = ok.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.9)
    one = ops.ones(2, "float64")
    for _ in range(3):
        optimizer.apply([one], weights[:1])
    optimizer.build(weights)
    for _ in range(2):
        optimizer.apply([one, one], weights)
    optimizer.swap_weights(evaluating=True)
    np.testing.assert_allclose(ops.convert_to_numpy(weights[1]), 0.9 * 6.0 + 0.1 * 5.0)


def test_the_age_of_a_variable_is_in_the_file_however_it_is_packed():
    grads, values = problems.gradients(4, [(3, 4), (5,), (2,)]), problems.start([(3, 4), (5,), (2,)])
    weights = problems.variables(values)
    optimizer = ok.optimizers.Adam(0.1)
    for step in range(2):
        optimizer.apply([ops.convert_to_tensor(g) for g in grads[step][1:]], weights[1:])
    optimizer.build(weights)
    optimizer.apply([ops.convert_to_tensor(g) for g in grads[2]], weights)
    state, kept = problems.state_of(optimizer), [ops.convert_to_numpy(w) for w in weights]
    optimizer.apply([ops.convert_to_tensor(g) for g in grads[3]], weights)
    for built in (True, False):
        again, copies = ok.optimizers.Adam(0.1), problems.variables(kept)
        if built:
            again.build(copies)
        again.load_own_variables(state)
        again.build(copies)
        before = len(again.variables)
        again.apply([ops.convert_to_tensor(g) for g in grads[3]], copies)
        assert len(again.variables) == before == len(optimizer.variables)
        for a, b in zip(copies, weights, strict=True):
            np.testing.assert_allclose(ops.convert_to_numpy(a), ops.convert_to_numpy(b), rtol=1e-13)
    used, others = ok.optimizers.Adam(0.1), problems.variables(values)
    used.apply([ops.convert_to_tensor(g) for g in grads[0]], others)
    with pytest.raises(
        ValueError, match=r"joined at the updates \[0, 2\]; those of adam.* joined at \[0\]\. Load it before"
    ):
        used.load_own_variables(state)


def test_a_layer_that_is_thawed_joins_in_the_first_step_that_trains_it():
    x, y = problems.regression()
    model = problems.network()
    model.layers[0].trainable = False
    model.compile(ok.optimizers.Adam(0.01, use_ema=True), loss="mse")
    model.fit(x, y, epochs=2, verbose=0)
    frozen, head = model.layers[0].get_weights()[0], problems.state_of(model.optimizer)["slot.m.3"]
    assert head.shape == (1,)
    model.layers[0].trainable = True
    model.make_train_function(force=True)
    model.fit(x, y, verbose=0)
    assert np.abs(model.layers[0].get_weights()[0] - frozen).max() > 0
    state = problems.state_of(model.optimizer)
    assert state["slot.m.0"].shape == (4, 8)  # in the order of the model
    assert int(model.optimizer.iterations) == 6
    fresh = problems.network()
    fresh.compile(ok.optimizers.Adam(0.01, use_ema=True), loss="mse")
    fresh.optimizer.build(fresh.trainable_variables)
    fresh.optimizer.load_own_variables(state)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["mirrored", "one device"])
def test_a_strategy_with_one_replica(strategy):
    strategy = (
        tf.distribute.MirroredStrategy(["CPU:0"])
        if strategy == "mirrored"
        else tf.distribute.OneDeviceStrategy("CPU:0")
    )
    x, y = problems.regression()

    def fitted():
        model = problems.network()
        model.compile(ok.optimizers.AdamW(0.01, global_clipnorm=1.0, gradient_accumulation_steps=2), loss="mse")
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        return np.concatenate([w.ravel() for w in model.get_weights()])

    expected = fitted()
    with strategy.scope():
        np.testing.assert_allclose(fitted(), expected, rtol=1e-5, atol=1e-6)
        weights = problems.variables([np.ones(3)])
        optimizer = ok.optimizers.SGD(0.5)
        optimizer.apply([tf.ones(3, tf.float64)], weights)  # in the cross-replica context
        np.testing.assert_array_equal(ops.convert_to_numpy(weights[0]), 0.5)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "how", [{"run_eagerly": True}, {"jit_compile": False}, {"jit_compile": True}], ids=["eager", "graph", "xla"]
)
def test_state_that_was_read_stays_as_it_was(how):
    """It is the memory of tensors, and updates write elsewhere as long as somebody holds it."""
    x = np.random.default_rng(0).normal(size=(8, 300)).astype("float32")
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(300), keras.layers.Dense(1)])
    model.compile(ok.optimizers.Adam(0.01), loss="mse", **how)
    model.fit(x, x[:, :1], epochs=2, verbose=0)
    state = problems.state_of(model.optimizer)
    before = {name: np.copy(value) for name, value in state.items()}
    model.fit(x, x[:, :1], epochs=2, verbose=0)
    for name, value in state.items():
        np.testing.assert_array_equal(value, before[name])
    assert not np.array_equal(problems.state_of(model.optimizer)["slot.m.0"], before["slot.m.0"])


def test_state_loaded_before_build_is_not_lost():
    weights = problems.variables(problems.start())
    optimizer = ok.optimizers.Adam(0.1)
    optimizer.apply([ops.convert_to_tensor(g) for g in problems.gradients(1)[0]], weights)
    state = problems.state_of(optimizer)
    waiting = ok.optimizers.Adam(0.3)
    waiting.load_own_variables(state)
    assert int(waiting.iterations) == 1
    assert float(waiting.learning_rate) == 0.1
    np.testing.assert_array_equal(problems.state_of(waiting)["slot.m.0"], state["slot.m.0"])
    waiting.build(weights)
    np.testing.assert_array_equal(problems.state_of(waiting)["slot.m.0"], state["slot.m.0"])
    other = ok.optimizers.Adam(0.3)
    other.load_own_variables(state)
    with pytest.raises(ValueError, match=r"number of variables: 8 != 1"):
        other.build(weights[:1])


def test_a_model_saved_before_training_loads(tmp_path):
    model = problems.network()
    model.compile(ok.optimizers.Adam(0.1), loss="mse")
    model.save(tmp_path / "fresh.keras")
    loaded = keras.models.load_model(tmp_path / "fresh.keras")
    assert int(loaded.optimizer.iterations) == 0
    assert float(loaded.optimizer.learning_rate) == 0.1


def test_the_error_of_a_wrong_file_reaches_the_user(tmp_path):
    x, y = problems.regression()
    model = problems.network()
    model.compile(ok.optimizers.RMSprop(0.01), loss="mse")
    model.fit(x, y, verbose=0)
    model.save_weights(tmp_path / "m.weights.h5")
    model.compile(ok.optimizers.Adam(0.01), loss="mse")
    with pytest.raises(ValueError, match="keras_optkit>RMSprop != keras_optkit>Adam"):
        model.load_weights(tmp_path / "m.weights.h5")


# -- third parties ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SignRule(ok.optimizers.Rule):
    """θ ← θ - η sign(β m + (1 - β) g), the heart of Signum."""

    elementwise = True
    beta: float = ok.optimizers.number(0.9, 0, 1, closed="left")

    def slots(self):
        return {"m": 0.0}

    def update(self, u, slots, p, h):
        beta = h(self.beta)
        m = beta * slots["m"] + (1 - beta) * u
        return h.learning_rate * ops.sign(m), {"m": m}


def sign_twin(p, grads, learning_rate=0.01, beta=0.9, weight_decay=0.0):
    m = np.zeros_like(p)
    for g in grads:
        m = beta * m + (1 - beta) * g
        p = p - learning_rate * (np.sign(m) + weight_decay * p)
        yield p


@keras.saving.register_keras_serializable("third_party")
class Signum(ok.optimizers.Optimizer):
    """A third party's optimizer."""

    def __init__(self, learning_rate=0.01, beta=0.9, **common):
        super().__init__(learning_rate, SignRule(beta), **common)


def card(make, twin=sign_twin, cases=({}, {"learning_rate": 0.1, "beta": 0.5})):
    return ok.Card(name=make.__name__, kind="optimizer", make=make, twin=twin, cases=cases)


# those of the engine have passed for others like it; the page on rules runs all checks
OF_THE_RULE = [check for check in ok.testing.checks_for(card(Signum)) if not check.engine]


@pytest.mark.parametrize("check", OF_THE_RULE, ids=lambda check: check.name)
def test_third_party_optimizer_passes(check):
    check(card(Signum))


@dataclass(frozen=True)
class WrongCorrectionRule(ok.optimizers.Rule):
    """Adam's first moment, corrected with t - 1 instead of t."""

    elementwise = True
    beta: float = 0.9

    def slots(self):
        return {"m": 0.0}

    def update(self, u, slots, p, h):
        beta = h(self.beta)
        m = beta * slots["m"] + (1 - beta) * u
        correction = 1 - self.beta ** ops.cast(h.step - 1 + 1e-3, u.dtype)
        return h.learning_rate * m / correction, {"m": m}


def corrected_twin(p, grads, learning_rate=0.01, beta=0.9, weight_decay=0.0):
    m = np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta * m + (1 - beta) * g
        p = p - learning_rate * (m / (1 - beta**t) + weight_decay * p)
        yield p


@keras.saving.register_keras_serializable("third_party")
class WrongCorrection(ok.optimizers.Optimizer):
    def __init__(self, learning_rate=0.01, beta=0.9, **common):
        super().__init__(learning_rate, WrongCorrectionRule(beta), **common)


@keras.saving.register_keras_serializable("third_party")
class LostConfig(ok.optimizers.Optimizer):
    def __init__(self, learning_rate=0.01, beta=0.9, **common):
        super().__init__(learning_rate, SignRule(beta), **common)

    def get_config(self):
        config = super().get_config()
        del config["beta"]
        return config


@keras.saving.register_keras_serializable("third_party")
class NotStored(ok.optimizers.Optimizer):
    def __init__(self, learning_rate=0.01, smoothing=0.9, **common):
        super().__init__(learning_rate, SignRule(smoothing), **common)


@dataclass(frozen=True)
class DriftingRule(SignRule):
    def update(self, u, slots, p, h):
        step, new = super().update(u, slots, p, h)
        return step, {"m": ops.cast(new["m"], "float64" if u.dtype == "float32" else "float32")}


@keras.saving.register_keras_serializable("third_party")
class Drifting(ok.optimizers.Optimizer):
    def __init__(self, learning_rate=0.01, beta=0.9, **common):
        super().__init__(learning_rate, DriftingRule(beta), **common)


@dataclass(frozen=True)
class ForgetfulRule(SignRule):
    """Keeps a step count on the Python side, where no file and no graph sees it."""

    calls = [0]  # noqa: RUF012

    def update(self, u, slots, p, h):
        self.calls[0] += 1
        step, new = super().update(u, slots, p, h)
        return step / self.calls[0], new


@keras.saving.register_keras_serializable("third_party")
class Forgetful(ok.optimizers.Optimizer):
    def __init__(self, learning_rate=0.01, beta=0.9, **common):
        super().__init__(learning_rate, ForgetfulRule(beta), **common)


@pytest.mark.parametrize(
    ("broken", "twin", "cases", "caught_by"),
    [
        (WrongCorrection, corrected_twin, ({},), "twin"),
        (LostConfig, sign_twin, ({"beta": 0.5},), "config_round_trip"),
        (NotStored, sign_twin, ({},), "config_round_trip"),
        (Drifting, sign_twin, ({},), "dtypes"),
        (Forgetful, sign_twin, ({},), "modes_agree"),
    ],
)
def test_broken_third_party_optimizer_fails(broken, twin, cases, caught_by):
    c = card(broken, twin, cases)
    (found,) = [check for check in ok.testing.checks_for(c) if check.name == caught_by]
    with pytest.raises((AssertionError, AttributeError)):
        found(c)


@pytest.mark.parametrize("wrapper", [ok.optimizers.Lookahead, ok.optimizers.ScheduleFree])
def test_slots_of_a_wrapper_and_of_the_rule_inside_are_apart(wrapper):
    inner = ok.optimizers.AdEMAMix(0.01)
    rule = wrapper(inner).rule
    weight = Weight(shape=(3, 4), dtype="float32", paths=("w",), role="kernel")
    assert len(rule.slots(weight)) == len(inner.rule.slots(weight)) + 1
    taken = type(inner.rule).slots
    (own,) = set(rule.slots(weight)) - set(inner.rule.slots(weight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner.rule), "slots", lambda self, w=None: taken(self, w) | {own: 0.0})
        with pytest.raises(ValueError, match=f"the inner rule has a slot '{own}'"):
            rule.slots(weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ok.optimizers.ConditionalGradient(1.5), r"learning_rate must be a number in \[0, 1\].*1.5"),
        (lambda: ok.optimizers.Rprop(min_factor=2.0, max_factor=1.0), "min_factor must not be above max_factor.*2.0"),
        (lambda: ok.optimizers.KLSOAP(epsilon=0.0), "epsilon must be .*0.0"),
    ],
)
def test_values_that_would_diverge_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_what_rules_reuse_is_their_state():
    for card in ok.cards("optimizer"):
        rules = [made(card, case).rule for case in card.cases]
        slots = {name for rule in rules for name in slots_of(rule, Weight((2, 3), role="kernel"))}
        assert rules[0].reuses <= slots | {"weights"}, card.name


@pytest.mark.parametrize("name", ["Lion", "ScheduleFreeAdamW", "Prodigy", "Adan"])
def test_what_is_handed_over_to_the_compiled_update_comes_back(name):
    """With one weight that is alone and two that are joined, in a state of blocks of integers where it can be."""
    rng = np.random.default_rng(0)
    given = [[rng.normal(size=shape).astype("float32") for shape in [(300, 300), (3,), (2, 2)]] for _ in range(4)]

    def trained(fuse):
        weights = [keras.Variable(value) for value in given[0]]
        how = {"slot_dtype": "int8"} if name == "Lion" else {}
        optimizer = getattr(ok.optimizers, name)(0.01, weight_decay=0.1, fuse=fuse, **how)
        assert optimizer.rule.reuses
        optimizer.build(weights)
        step = tf.function(lambda *grads: optimizer.apply(list(grads), weights), autograph=False)
        for grads in given[1:]:
            step(*map(tf.constant, grads))
        return [np.array(v) for v in [*weights, *optimizer.variables]]

    results = trained(fuse=True)
    assert not np.array_equal(results[0], given[0][0])
    for fused, plain in zip(results, trained(fuse=False), strict=True):
        np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1 if fused.dtype == "int8" else 1e-6)

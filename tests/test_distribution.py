"""Replicas: any number of them train like one device on the same global batch, and their states are the same files."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_optkit as ok
from keras_optkit.testing import problems

BATCH, BATCHES = 8, 5

GROUPS = [ok.Group("table", lr_scale=0.5, weight_decay=0.0), ok.Group("out/bias", trainable=False)]


def adamw(**common):
    return ok.optimizers.AdamW(0.05, weight_decay=0.1, **common)


def by_rows(**common):
    optimizer = adamw(**common)
    optimizer.pack_below = 16  # the table is then alone, and updated by rows
    return optimizer


CASES = {
    "clipvalue, average": lambda: adamw(clipvalue=0.02, use_ema=True, ema_momentum=0.6),
    "clipnorm, groups": lambda: adamw(clipnorm=0.05, groups=GROUPS),
    "global_clipnorm, accumulation": lambda: adamw(global_clipnorm=0.1, gradient_accumulation_steps=2),
    "all at once": lambda: adamw(
        global_clipnorm=0.1, gradient_accumulation_steps=2, use_ema=True, skip_nonfinite=2, groups=GROUPS
    ),
    "rows, skip_nonfinite": lambda: by_rows(global_clipnorm=0.1, skip_nonfinite=2),
    "rows taken as dense": lambda: adamw(clipnorm=0.05, sparse="dense"),
    "schedule-free": lambda: ok.optimizers.ScheduleFreeAdamW(
        0.05, global_clipnorm=0.1, gradient_accumulation_steps=2, warmup_steps=2
    ),
}


@pytest.fixture(autouse=True)
def double():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


def network():
    keras.utils.set_random_seed(0)
    ids, x = keras.Input((3,), dtype="int32"), keras.Input((4,))
    rows = keras.layers.Flatten()(keras.layers.Embedding(11, 4, name="table")(ids))
    hidden = keras.layers.Dense(3, "tanh", name="hidden")(keras.layers.Concatenate()([rows, x]))
    return keras.Model([ids, x], keras.layers.Dense(1, name="out")(hidden))


def data(nan=False):
    """BATCHES global batches; some rows of the table are in both halves of a batch, some in one, some in none.

    With `nan`, the second half of the third batch has a NaN, which is on the second of two replicas.
    """
    rng = np.random.default_rng(0)
    ids, x = rng.integers(0, 9, (BATCHES * BATCH, 3), "int32"), rng.normal(size=(BATCHES * BATCH, 4))
    y = 3 * np.sin(x.sum(axis=1, keepdims=True)) + ids[:, :1]
    if nan:
        x[2 * BATCH + 5, 0] = np.nan
    return ids, x, y


def dataset(nan=False):
    return tf.data.Dataset.from_tensor_slices(data(nan)).batch(BATCH)


def stepper(strategy, model, optimizer):
    """A step of a loop of one's own: eager on one device, else a `tf.function` of a distributed batch."""

    def on_replica(ids, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(model([ids, x]) - y)) / BATCH
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    if strategy is None:
        return lambda batch: on_replica(*batch)
    return tf.function(lambda batch: strategy.run(on_replica, args=batch))


def looped(strategy, make, batches):
    """Model, optimizer and step after a loop over all batches."""
    with (strategy or tf.distribute.get_strategy()).scope():
        model, optimizer = network(), make()
        optimizer.build(model.trainable_variables)
    step = stepper(strategy, model, optimizer)
    for batch in strategy.experimental_distribute_dataset(batches) if strategy else batches:
        step(batch)
    return model, optimizer, step


def copies(variable):
    """The values of a variable on all devices."""
    values = tf.distribute.get_strategy().experimental_local_results(variable.value)
    return [copy.numpy() for part in values for copy in getattr(part, "values", [part])]


def assert_equal(model, other, optimizer, other_optimizer, **tolerance):
    """Weights and saved state are equal, and all copies of a variable are bitwise so."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-12}
    for variable in [*model.variables, *optimizer.variables]:
        first, *rest = copies(variable)
        for copy in rest:
            np.testing.assert_array_equal(copy, first, err_msg=variable.path)
    for got, expected in zip(model.variables, other.variables, strict=True):
        np.testing.assert_allclose(got.numpy(), expected.numpy(), err_msg=got.path, **tolerance)
    state, expected = problems.state_of(optimizer), problems.state_of(other_optimizer)
    assert list(state) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(state[name], value, err_msg=name, **tolerance)


# -- two replicas in one process --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_loop_on_two_replicas_equals_one_device(case):
    make, nan = CASES[case], CASES[case]().skip_nonfinite is not None
    one, optimizer, _ = looped(None, make, dataset(nan))
    model, two, step = looped(problems.two_replicas(), make, dataset(nan))
    assert len(copies(model.variables[0])) == 2
    assert_equal(model, one, two, optimizer)
    for o in (two, optimizer):
        o.swap_weights(evaluating=True)
    assert_equal(model, one, two, optimizer)
    if nan:
        assert two.nonfinite.skipped == 1
        assert two.nonfinite == optimizer.nonfinite


@pytest.mark.parametrize("case", CASES)
def test_fit_on_two_replicas_equals_one_device(case):
    make, trained = CASES[case], []
    ids, x, y = data(CASES[case]().skip_nonfinite is not None)
    for strategy in (tf.distribute.get_strategy(), problems.two_replicas()):
        with strategy.scope():
            model = network()
            model.compile(make(), loss="mse", run_eagerly=strategy.num_replicas_in_sync == 1)
        model.fit([ids, x], y, batch_size=BATCH, shuffle=False, verbose=0)
        trained.append(model)
    one, two = trained
    assert_equal(two, one, two.optimizer, one.optimizer)

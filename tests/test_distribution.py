"""Replicas: any number of them train like one device on the same global batch, and their states are the same files."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

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


#: The thresholds lie between the norms of the batches, so that some are clipped and some are not.
CASES = {
    "clipvalue, average": lambda: adamw(clipvalue=0.8, use_ema=True, ema_momentum=0.6),
    "clipnorm, groups, dense": lambda: adamw(clipnorm=4.0, groups=GROUPS, sparse="dense"),
    "all at once": lambda: adamw(
        global_clipnorm=9.0, gradient_accumulation_steps=2, use_ema=True, skip_nonfinite=2, groups=GROUPS
    ),
    "rows, skip_nonfinite": lambda: by_rows(global_clipnorm=11.0, skip_nonfinite=2),
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


@pytest.mark.few(1)
@pytest.mark.parametrize("case", CASES)
def test_a_loop_on_two_replicas_equals_one_device(case):
    make, nan = CASES[case], CASES[case]().skip_nonfinite is not None
    one, optimizer, _ = looped(None, make, dataset(nan))
    strategy = problems.two_replicas()
    model, two, step = looped(strategy, make, dataset(nan))
    assert len(copies(model.variables[0])) == 2
    assert_equal(model, one, two, optimizer)
    for o in (two, optimizer):
        o.swap_weights(evaluating=True)
    assert_equal(model, one, two, optimizer)
    if nan:
        assert two.nonfinite.skipped == 1
        assert two.nonfinite == optimizer.nonfinite
        bad = strategy.experimental_distribute_dataset(dataset(nan).skip(2).take(1).repeat(2))
        with pytest.raises(tf.errors.InvalidArgumentError, match="2 non-finite gradients in a row"):
            [step(batch) for batch in bad]


@pytest.mark.few(1)
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


@pytest.mark.long
def test_one_device_strategy_equals_no_strategy():
    make = CASES["all at once"]
    one, optimizer, _ = looped(None, make, dataset())
    model, other, _ = looped(tf.distribute.OneDeviceStrategy("CPU:1"), make, dataset())
    assert "CPU:1" in model.variables[0].value.device
    assert_equal(model, one, other, optimizer)


class LossScale(keras.optimizers.LossScaleOptimizer):
    """Keras's looks at the gradients of the first replica only."""

    def check_finite(self, grads):
        bad = tf.cast(tf.logical_not(super().check_finite(grads)), "int32")
        return tf.equal(tf.distribute.get_replica_context().all_reduce("SUM", bad), 0)


@pytest.mark.few(1)
@pytest.mark.parametrize("bad", [0, 1])
def test_loss_scaling_leaves_out_an_update_that_is_infinite_on_one_replica(bad):
    results = []
    for strategy in (tf.distribute.get_strategy(), problems.two_replicas()):
        with strategy.scope():
            weights = problems.variables(problems.start())
            optimizer = LossScale(adamw(clipnorm=1.0, gradient_accumulation_steps=2), initial_scale=4.0)
            optimizer.build(weights)

        def on_replica(grads, infinite, two=strategy.num_replicas_in_sync == 2, o=optimizer, w=weights):
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            infinite = tf.logical_and(infinite, tf.equal(here, bad) if two else True)
            if two:  # the sum over the replicas is what one device gets
                grads = [tf.where(tf.equal(here, 0), tf.cos(g), g - tf.cos(g)) for g in grads]
            grads = [o.scale_loss(g) for g in grads]
            o.apply([tf.where(infinite, tf.cast(np.inf, g.dtype), g) for g in grads], w)

        step = tf.function(lambda *args, run=strategy.run, f=on_replica: run(f, args=args))
        for i, grads in enumerate(problems.gradients(5)):
            step([tf.constant(g) for g in grads], tf.constant(i == 2))
        results.append([copies(v) for v in [*weights, *optimizer.variables]])
    for one, two in zip(*results, strict=True):
        assert len(two) == 2
        for copy in two:
            np.testing.assert_allclose(copy, one[0], rtol=1e-9, atol=1e-12)


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("case", "order"),
    [("all at once", "two, then one"), ("all at once", "one, then two"), ("schedule-free", "two, then one")],
)
def test_a_file_does_not_depend_on_the_number_of_replicas(case, order, tmp_path):
    *inputs, y = data()
    strategies = {"one": tf.distribute.get_strategy(), "two": problems.two_replicas()}
    first, second = (strategies[name] for name in order.split(", then "))

    def fit(model):
        model.fit(inputs, y, batch_size=BATCH, shuffle=False, verbose=0)

    with first.scope():
        model = network()
        model.compile(CASES[case](), loss="mse", run_eagerly=first is strategies["one"])
    fit(model)  # of 5 micro-batches, so that one is waiting in the accumulators
    model.save(tmp_path / "model.keras")
    with second.scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
        loaded.run_eagerly = second is strategies["one"]
    assert len(copies(loaded.variables[0])) == second.num_replicas_in_sync
    assert_equal(loaded, model, loaded.optimizer, model.optimizer, rtol=0, atol=0)
    fit(model)
    fit(loaded)
    assert_equal(loaded, model, loaded.optimizer, model.optimizer)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_apply_outside_of_a_replica_is_refused():
    with problems.two_replicas().scope():
        weights = problems.variables([np.ones(3)])
        optimizer = adamw()
        with pytest.raises(RuntimeError, match=r"cross-replica context of a strategy with 2 replicas; .*strategy\.run"):
            optimizer.apply([tf.ones(3, "float64")], weights)


@pytest.mark.parametrize("outside", ["the optimizer", "its state", "the weights"])
def test_variables_made_outside_of_the_scope_are_refused(outside):
    strategy = problems.two_replicas()
    optimizer, weights = adamw(), problems.variables([np.ones(3)])
    with strategy.scope():
        if outside != "the optimizer":
            optimizer = adamw()
        if outside != "the weights":
            weights = problems.variables([np.ones(3)])
        if outside != "its state":
            optimizer.build(weights)
    if outside == "its state":
        optimizer.build(weights)
    name = {"the optimizer": "iteration", "its state": "m", "the weights": "weight_0"}[outside]
    with pytest.raises(ValueError, match=rf"such as \S*{name}, were not made under the MirroredStrategy"):
        strategy.run(lambda: optimizer.apply([tf.ones(3, "float64")], weights))


def test_a_strategy_that_is_not_supported_is_refused():
    with tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"], "CPU:0").scope():
        optimizer = adamw()
        with pytest.raises(
            ValueError, match=r"^CentralStorageStrategy is not supported: .*under MirroredStrategy, Mul"
        ):
            optimizer.build(problems.variables([np.ones(3)]))
        assert not optimizer.built


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch, request):
    """examples/two_processes.py, which workers find, too."""
    folder = request.config.rootpath / "examples"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return importlib.import_module("two_processes")


WORKER = [sys.executable, str(Path(__file__).parent / "worker.py")]


@pytest.mark.long
def test_a_loop_in_two_processes_equals_one(example, tmp_path):
    cases = ["all at once", "rows, skip_nonfinite"]
    example.run_workers([*WORKER, str(tmp_path), *cases])
    for case in cases:
        model, optimizer, _ = looped(None, CASES[case], dataset(nan=CASES[case]().skip_nonfinite is not None))
        expected = {f"weight {i}": value for i, value in enumerate(model.get_weights())} | problems.state_of(optimizer)
        first, second = (dict(np.load(tmp_path / f"{case}-{worker}.npz")) for worker in (0, 1))
        assert list(first) == list(second) == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(first[name], second[name], err_msg=f"{case}: {name}")
            np.testing.assert_allclose(first[name], value, rtol=1e-9, atol=1e-12, err_msg=f"{case}: {name}")


@pytest.mark.long
@pytest.mark.usefixtures("example")
def test_parameter_servers_are_refused():
    done = subprocess.run([*WORKER, "parameter-server"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ParameterServerStrategyV2 is not supported: ")


@pytest.mark.long
def test_the_example_in_two_processes(example, capsys):
    example.main([])
    printed = capsys.readouterr().out
    for way in ("loop", "fit"):
        between, from_one = re.search(
            rf"^{way} .*workers (\S+), from one process (\S+)$", printed, re.MULTILINE
        ).groups()
        assert float(between) == 0
        assert float(from_one) < 1e-12


def test_a_worker_that_fails_takes_the_others_with_it(example):
    script = "import json, os, sys, threading; w = json.loads(os.environ['TF_CONFIG'])['task']['index']; "
    failing = script + "print('worker', w); sys.exit('broken') if w else threading.Event().wait()"
    with pytest.raises(RuntimeError, match=r"ended with 1:\n(worker 1\nbroken|broken\nworker 1)\n$"):
        example.run_workers([sys.executable, "-c", failing])
    hanging = script + "None if w else threading.Event().wait()"
    with pytest.raises(RuntimeError, match=r"ended with -9:\n\nkilled after 1 s"):
        example.run_workers([sys.executable, "-c", hanging], timeout=1)
    assert example.run_workers([sys.executable, "-c", script + "print(w)"]) == ["0\n", "1\n"]


@pytest.mark.parametrize("inner", [ok.optimizers.SGD, keras.optimizers.SGD], ids=["ours", "Keras's"])
def test_loss_scaling_that_is_built_by_the_first_step_of_a_strategy(inner):
    strategy = problems.two_replicas()
    with strategy.scope():
        weights = [keras.Variable([1.0, 1.0])]
        optimizer = ok.optimizers.LossScale(inner(0.1), initial_scale=8.0)

    @tf.function
    def step():
        strategy.run(lambda: optimizer.apply([tf.constant([8.0, 16.0], "float64")], weights))

    step()
    step()
    np.testing.assert_allclose(weights[0], [0.6, 0.2])
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 2

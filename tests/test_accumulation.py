"""Accumulated micro-batches equal large batches, the last and smaller one of an epoch included."""

import functools
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_optkit as ok
from keras_optkit.testing import problems

SCHEDULE = keras.optimizers.schedules.PiecewiseConstantDecay([2, 4], [0.05, 0.02, 0.01])


@pytest.fixture
def float64():
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")


def compiled(optimizer, **how):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    hidden = layers.Dense(8, activation="tanh", kernel_constraint=keras.constraints.MaxNorm(0.9))
    model = keras.Sequential([keras.Input((4,)), hidden, layers.Dense(1)])
    model.compile(optimizer, loss="mse", **how)
    return model


def adamw(k, **more):
    common = {"weight_decay": 0.1, "global_clipnorm": 0.5, "use_ema": True, "ema_momentum": 0.5}
    return ok.optimizers.AdamW(SCHEDULE, **common, gradient_accumulation_steps=k, **more)


def data(rows=64):
    x, y = problems.regression()
    return x[:rows], y[:rows]


def fit(model, x, y, batch_size, epochs=2, **more):
    history = model.fit(x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, **more)
    return [ops.convert_to_numpy(w) for w in model.weights], history.history


def assert_close(got, expected, rtol=1e-9):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


@pytest.mark.few(1)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("how", [{}, {"steps_per_execution": 3}, {"run_eagerly": True}, {"jit_compile": True}])
def test_fit_equals_large_batches(how):
    x, y = data()
    large, small = compiled(adamw(None), **how), compiled(adamw(3), **how)
    expected, logs = fit(large, x, y, 24, validation_data=(x, y))  # 24, 24 and 16 rows
    got, micro_logs = fit(small, x, y, 8, validation_data=(x, y))
    assert int(small.optimizer.iterations) == int(large.optimizer.iterations) == 6
    assert_close(got, expected)
    np.testing.assert_allclose(micro_logs["val_loss"], logs["val_loss"], rtol=1e-9)


@pytest.mark.few(1)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("k", "more"), [(3, {}), (3, {"fuse": True}), (None, {}), (None, {"fuse": True})])
def test_data_whose_length_nobody_knows(k, more):
    """TensorFlow begins a step for which there is no batch, and that must not count."""
    x, y = data()

    def batches():
        yield from ((x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8))

    spec = (tf.TensorSpec((8, 4), tf.float32), tf.TensorSpec((8, 1), tf.float32))
    dataset = tf.data.Dataset.from_generator(batches, output_signature=spec)
    expected, _ = fit(compiled(adamw(None)), x, y, 24 if k else 8, epochs=1)
    model = compiled(adamw(k, **more))
    with pytest.warns(UserWarning, match="ran out of data"):  # what Keras says of any data of unknown length
        model.fit(dataset, epochs=1, verbose=0, shuffle=False)
    assert int(model.optimizer.iterations) == (3 if k else 8)
    assert_close([ops.convert_to_numpy(w) for w in model.weights], expected)


@pytest.mark.usefixtures("float64")
def test_callbacks_see_the_end_of_an_epoch_with_its_last_update():
    x, y = data()
    model = compiled(adamw(3))
    ends, updates = [], []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            updates.append(int(model.optimizer.iterations))

        def on_epoch_end(self, epoch, logs=None):
            ends.append(int(model.optimizer.iterations))

    for callbacks in (Look(), [Look()]):
        fit(model, x, y, 8, callbacks=callbacks)
    assert updates[:8] == [0, 0, 1, 1, 1, 2, 2, 3]
    assert ends == [3, 6, 9, 12]
    made = keras.callbacks.CallbackList([Look()], add_history=True, model=model)
    for _ in range(2):  # Keras counts on in it, and so do we
        fit(model, x, y, 8, epochs=1, callbacks=made)
    assert ends[4:] == [15, 18]


@pytest.mark.long
@pytest.mark.usefixtures("float64")
def test_averaged_weights_are_shown_after_the_last_update():
    x, y = data()
    runs = []
    for k, batch_size in ((None, 24), (3, 8)):
        model = compiled(adamw(k))
        runs.append(fit(model, x, y, batch_size, validation_data=(x, y), callbacks=[ok.callbacks.AveragedWeights()]))
    assert_close(runs[1][0], runs[0][0])
    np.testing.assert_allclose(runs[1][1]["val_loss"], runs[0][1]["val_loss"], rtol=1e-9)


@pytest.mark.long
@pytest.mark.usefixtures("float64")
def test_two_replicas_end_an_epoch_with_the_last_update():
    x, y = data()
    expected, _ = fit(compiled(adamw(None)), x, y, 24)
    with problems.two_replicas().scope():
        model = compiled(adamw(3))
    got, _ = fit(model, x, y, 8)
    assert model.optimizer.iterations.numpy() == 6
    assert_close(got, expected)
    for weight in model.trainable_weights:
        one, two = weight.value.values
        np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_run_that_is_stopped_in_an_epoch_is_flushed():
    x, y = data()

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 4

    model = compiled(adamw(3))
    fit(model, x, y, 8, callbacks=[Stop()])
    assert int(model.optimizer.iterations) == 2


def test_float16_gradients_are_added_in_float32():
    """1,000 gradients of 1e-4 after one of 1: in float16 their sum would stay 1."""
    micro = [[np.ones(3)], *[[np.full(3, 1e-4)]] * 999]
    optimizer = ok.optimizers.SGD(1.0, gradient_accumulation_steps=1000)
    weights = problems.train(optimizer, micro, values=[np.zeros(3)], dtype="float16", mode="graph")[-1]
    np.testing.assert_allclose(weights[0], -(1 + 999e-4) / 1000, rtol=1e-3)
    assert weights[0].min() < -1.05e-3


@pytest.mark.long
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_equals_large_batches(policy):
    keras.config.set_dtype_policy(policy)
    x, y = data()
    runs = []
    for k, batch_size in ((None, 24), (3, 8)):
        model = compiled(adamw(k))
        weights, _ = fit(model, x, y, batch_size)
        scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scaled == (policy == "mixed_float16")
        inner = model.optimizer.inner_optimizer if scaled else model.optimizer
        assert int(inner.iterations) == 6
        runs.append(weights)
    assert_close(runs[1], runs[0], rtol=2e-2)
    start = [ops.convert_to_numpy(w) for w in compiled("sgd").weights]
    assert all(np.abs(a - b).max() > 0.02 for a, b in zip(runs[0], start, strict=True))


def test_without_a_gradient_in_the_last_micro_batches_a_parameter_stays():
    optimizer = ok.optimizers.SGD(1.0, momentum=0.9, gradient_accumulation_steps=4)
    weights = problems.variables([np.zeros(2), np.zeros(2)])
    with pytest.warns(UserWarning, match="weight_1"):
        optimizer.apply([ops.ones(2, "float64"), None], weights)
    optimizer.flush()
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[0]), -1.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), 0.0)
    assert int(optimizer.iterations) == 1


@pytest.mark.parametrize("k", [2, 3])
def test_a_gradient_in_any_of_the_micro_batches_counts(k):
    one = ops.ones(2, "float64")
    for place in range(k):
        optimizer = ok.optimizers.SGD(1.0, momentum=0.5, gradient_accumulation_steps=k)
        weights = problems.variables([np.zeros(2), np.zeros(2)])
        for _ in range(2):  # what was seen before an update does not count after it
            for step in range(k):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)
                    optimizer.apply([one, one if step == place else None], weights)
        np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), -2.5)
        np.testing.assert_allclose(ops.convert_to_numpy(weights[1]), -2.5 / k)
        before = ops.convert_to_numpy(weights[1]).copy()
        for _ in range(k):
            with pytest.warns(UserWarning, match="weight_1"):
                optimizer.apply([one, None], weights)
        np.testing.assert_array_equal(ops.convert_to_numpy(weights[1]), before)


def test_variables_may_join_between_micro_batches():
    one = ops.ones(2, "float64")
    for flush in (False, True):
        optimizer = ok.optimizers.SGD(1.0, gradient_accumulation_steps=2)
        weights = problems.variables([np.zeros(2), np.zeros(2)])
        optimizer.apply([one], weights[:1])
        optimizer.build(weights)
        if flush:
            optimizer.flush()
        else:
            optimizer.apply([one, one], weights)
        np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), -1.0)
        np.testing.assert_allclose(ops.convert_to_numpy(weights[1]), 0.0 if flush else -0.5)


def test_micro_batches_with_different_masks_count_alike_as_the_guide_says():
    """Mean gradients 2 over 4 positions and 4 over 1: accumulated 3, in one batch 2.4; summed losses agree."""
    x, y = np.full((2, 4, 1), 1.0, "float32"), np.array([[[0.0]] * 4, [[-1.0]] * 4], "float32")
    x[1, 1:] = -1.0  # masked

    def trained(rate, k, reduction):
        model = keras.Sequential(
            [keras.Input((4, 1)), keras.layers.Masking(-1.0), keras.layers.Dense(1, "linear", False, "ones")]
        )
        optimizer = ok.optimizers.SGD(rate, gradient_accumulation_steps=k)
        model.compile(optimizer, keras.losses.MeanSquaredError(reduction=reduction), run_eagerly=True)
        model.fit(x, y, batch_size=1 if k else 2, shuffle=False, verbose=0)
        return 1.0 - model.get_weights()[0].item()

    assert trained(1.0, 2, "sum_over_batch_size") == pytest.approx(3.0)
    assert trained(1.0, None, "sum_over_batch_size") == pytest.approx(2.4)
    assert trained(0.1, 2, "sum") == pytest.approx(trained(0.05, None, "sum"))


# -- micro-batches with different gradients ---------------------------------------------------------------------------


def apply_without_warnings(optimizer, grads, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
        optimizer.apply(grads, weights)


def traced(function, **how):
    return tf.function(lambda: function(), autograph=False, **how)


def three_parts(k=2, **more):
    """A momentum optimizer, to see which parameters are updated at all, and its weights."""
    optimizer = ok.optimizers.SGD(1.0, momentum=0.5, gradient_accumulation_steps=k, **more)
    weights = problems.variables([np.ones(2), np.ones(2), np.ones((2, 2))])
    optimizer.build(weights)
    return optimizer, weights


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["eager", "graph", "xla"])
@pytest.mark.parametrize("below", [0, 2**16])
def test_each_micro_batch_may_have_other_gradients(kind, below):
    optimizer = ok.optimizers.SGD(1.0, momentum=0.5, gradient_accumulation_steps=2)
    optimizer.pack_below = below
    weights = problems.variables([np.ones(2), np.ones(2), np.ones(2)])
    optimizer.build(weights)
    one = tf.ones(2, "float64")

    def step(*which):
        call = lambda: apply_without_warnings(optimizer, [2 * one if i in which else None for i in range(3)], weights)  # noqa: E731
        return call if kind == "eager" else traced(call, jit_compile=kind == "xla")

    first, second, both = step(0), step(1), step(0, 1)
    first(), second()
    assert [w.numpy()[0] for w in weights] == [0.0, 0.0, 1.0]
    both(), first()  # the velocity of the second parameter counts, with half of a gradient
    assert [w.numpy()[0] for w in weights] == [-2.5, -1.5, 1.0]
    first(), first()  # and is not touched here
    second(), second()
    assert [w.numpy()[0] for w in weights] == [-5.75, -4.25, 1.0]
    second()
    optimizer.flush()
    assert [w.numpy()[0] for w in weights] == [-5.75, -7.625, 1.0]


@pytest.mark.long
@pytest.mark.parametrize("below", [0, 2**16])
def test_rows_and_whole_gradients_of_one_table(below):
    table, others = np.ones((4, 2)), np.ones(2)

    def rows(*indices):
        return tf.IndexedSlices(tf.ones((len(indices), 2), "float64"), tf.constant(indices), (4, 2))

    def after(*micro_batches, graph):
        optimizer = ok.optimizers.SGD(1.0, weight_decay=0.5, gradient_accumulation_steps=2)
        optimizer.pack_below = below
        weights = problems.variables([table, others])
        optimizer.build(weights)
        for grads in micro_batches:
            call = functools.partial(apply_without_warnings, optimizer, list(grads), weights)
            traced(call)() if graph else call()
        return [w.numpy() for w in weights]

    zeros, one = tf.zeros((4, 2), "float64"), tf.ones(2, "float64")
    for graph in (False, True):
        got, _ = after((rows(0), one), (None, one), graph=graph)
        np.testing.assert_array_equal(got[:, 0], [0.0, 1.0, 1.0, 1.0])  # decay too is of this row alone
        got, _ = after((rows(0), one), (rows(2, 0), None), graph=graph)
        np.testing.assert_array_equal(got[:, 0], [-0.5, 1.0, 0.0, 1.0])
        for whole_first in (True, False):  # a whole gradient decays all rows, whatever the other was
            pair = [(zeros, None), (rows(0), one)]
            got, vector = after(*(pair if whole_first else pair[::-1]), graph=graph)
            np.testing.assert_array_equal(got[:, 0], [0.0, 0.5, 0.5, 0.5])
            np.testing.assert_array_equal(vector, 0.5)


def test_a_constraint_leaves_a_parameter_without_gradients_alone():
    def after(*which):
        optimizer = ok.optimizers.SGD(1.0, gradient_accumulation_steps=2)
        weights = problems.variables([np.ones(2), np.ones(2)])
        weights[1].constraint = keras.constraints.UnitNorm(axis=0)
        for w in which:
            grads = [tf.zeros(2, "float64"), tf.zeros(2, "float64") if w else None]
            apply_without_warnings(optimizer, grads, weights)
        return float(np.linalg.norm(weights[1].numpy()))

    assert after(0, 0) == pytest.approx(np.sqrt(2))
    assert after(1, 0) == after(0, 1) == pytest.approx(1)


def saved(optimizer):
    store = {}
    optimizer.save_own_variables(store)
    return {name: np.array(value) for name, value in store.items()}


def test_the_middle_of_a_cycle_is_saved_with_its_missing_gradients():
    one = np.ones(2)
    ends = []
    for reload, below in ((False, 2**16), (True, 2**16), (True, 0)):
        optimizer, weights = three_parts(k=3)
        apply_without_warnings(optimizer, [one, None, None], weights)
        if reload:
            store = saved(optimizer)
            optimizer, weights = ok.optimizers.SGD(1.0, momentum=0.5, gradient_accumulation_steps=3), weights
            optimizer.pack_below = below
            optimizer.build(weights)
            optimizer.load_own_variables(store)
        apply_without_warnings(optimizer, [None, one, None], weights)
        optimizer.flush()
        for _ in range(3):
            apply_without_warnings(optimizer, [one, one, None], weights)
        ends.append([w.numpy() for w in weights])
    assert ends[0][2].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert_close(ends[1], ends[0], rtol=0)
    assert_close(ends[2], ends[0], rtol=0)


@pytest.mark.parametrize("micro", [0, 1])
def test_files_from_before_missing_gradients_were_saved(micro):
    optimizer, weights = three_parts()
    for _ in range(2 - micro):
        apply_without_warnings(optimizer, [np.ones(2), None, None], weights)
    store = {name: value for name, value in saved(optimizer).items() if not name.startswith("given")}
    assert store["micro"] == micro
    optimizer, weights = three_parts()
    optimizer.load_own_variables(store)
    apply_without_warnings(optimizer, [np.ones(2), None, None], weights)
    optimizer.flush()
    given = [bool(v) for v in np.concatenate([np.asarray(g) for g in optimizer._held.state.given])]
    assert not any(given)
    assert [float(w.numpy().flat[0]) for w in weights[1:]] == [1.0, 1.0]  # their mean gradient is 0

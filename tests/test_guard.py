"""NonFiniteGuard in real training, against trainings on the data without what it passes over."""

import gc
import itertools
import json
import random

import keras
import numpy as np
import pytest
from keras import ops
from scipy import stats

import keras_optkit as ok
from keras_optkit.callbacks import NonFiniteGuard, ScheduleHyperparameters, TrainingDivergedError
from keras_optkit.callbacks.guard.callback import limit_of
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.testing.problems import two_replicas

ON_TENSORFLOW = "elsewhere the steps of one execution do not share scalars, and there is no tf.distribute"


def data(batches=16, size=8, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batches * size, 4)).astype("float32")
    noise = 0.3 * rng.normal(size=(len(x), 1))
    return x, (x @ np.array([[1.0], [-2.0], [0.5], [0.0]]) + noise).astype("float32")


def network(optimizer, **arguments):
    """With moving statistics and a seed, which have to come back, too."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(5, "tanh"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dropout(0.2, seed=3),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer, loss="mse", metrics=["mae"], **arguments)
    return model


def linear(optimizer, use_bias=True, **arguments):
    dense = keras.layers.Dense(1, use_bias=use_bias, kernel_initializer="ones", name="dense")
    model = keras.Sequential([keras.Input((4,)), dense])
    model.compile(optimizer, **({"loss": "mse"} | arguments))
    return model


def fit(model, x, y, *callbacks, size=8, **arguments):
    return model.fit(x, y, batch_size=size, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments).history


def quiet(**arguments):
    return NonFiniteGuard(**({"verbose": 0} | arguments))


def bad_targets(y, *batches, size=8, value=np.nan):
    y = y.copy()
    for batch in batches:
        y[batch * size + 1] = value
    return y


def without(array, batches, size=8):
    return np.delete(array.reshape(-1, size, array.shape[-1]), batches, axis=0).reshape(-1, array.shape[-1])


def everything(model):
    state = TrainingState.of(model)
    return [*itertools.chain(*state.variables), *(ops.convert_to_numpy(v) for v in model.optimizer.variables)]


def same(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{i}")


class At(keras.callbacks.Callback):
    """Calls a function of the model before one batch of one epoch."""

    def __init__(self, function, batch, epoch=0):
        super().__init__()
        self.function, self.when, self.epoch = function, (epoch, batch), 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_begin(self, batch, logs=None):
        if (self.epoch, batch) == self.when:
            self.function(self.model)


def poison(model):
    kernel = model.layers[0].kernel
    kernel.assign(np.full(kernel.shape, np.nan))


class Rates(keras.callbacks.Callback):
    """The learning rate after every batch."""

    def on_train_begin(self, logs=None):
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(rate_of(self.model))


def rate_of(model):
    return float(ops.convert_to_numpy(model.optimizer.learning_rate))


# -- what it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("injected", ["data", "weight"])
def test_a_guarded_training_ends_like_the_clean_one_and_an_unguarded_one_is_ruined(injected):
    x, y = data(batches=40)
    poisoned = bad_targets(y, 25) if injected == "data" else y  # in every epoch

    extra = [At(poison, 25)] if injected == "weight" else []

    def final_loss(y_seen, *callbacks):
        model = linear(keras.optimizers.SGD(0.02))
        fit(model, x, y_seen, *callbacks, epochs=6)
        return model.evaluate(x, y, verbose=0)

    clean = final_loss(y)
    guarded = final_loss(poisoned, *extra, quiet(every=10))
    assert clean < 0.1  # the noise has a variance of 0.09
    assert guarded == pytest.approx(clean, rel=0.01)
    assert np.isnan(final_loss(poisoned, *extra))


OPTIMIZERS = {
    "keras": lambda: keras.optimizers.Adam(0.01),
    "ours": lambda: ok.optimizers.AdamW(ok.schedules.Cosine(0.01, steps=40), use_ema=True),
    "accumulating": lambda: ok.optimizers.SGD(0.01, momentum=0.9, gradient_accumulation_steps=4),
}


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("optimizer", "bad", "value", "passed_over"),
    [
        ("keras", 10, 1e30, [9, 10]),  # for the sake of which the model is run once more
        ("ours", 9, np.nan, [5, 6, 7, 8, 9]),  # no batch has confirmed the copy that was made after batch 8
        ("accumulating", 10, np.nan, [9, 10]),
        ("keras", 1, np.nan, [0, 1]),  # not even the first copy
        ("keras", 15, np.nan, [13, 14, 15]),  # the last batch of the epoch
    ],
)
def test_it_goes_back_bitwise_and_passes_over_the_window(optimizer, bad, value, passed_over):
    x, y = data()
    model, plain = network(OPTIMIZERS[optimizer]()), network(OPTIMIZERS[optimizer]())
    guard = quiet(every=4, rate_factor=1.0)
    history = fit(model, x, bad_targets(y, bad, value=value), guard)
    expected = fit(plain, without(x, passed_over), without(y, passed_over))
    assert [(f.epoch, f.batch, f.kind) for f in guard.failures] == [(0, bad, "loss")]
    same(everything(model), everything(plain))
    for name, values in expected.items():  # the metrics, too
        assert history[name] == pytest.approx(values, rel=1e-6)


def test_the_metrics_of_an_epoch_begin_anew_if_the_good_state_is_from_before():
    x, y = data(batches=4)
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(float(ops.convert_to_numpy(self.model.metrics[0].result())))

    guard = quiet()
    history = fit(linear(keras.optimizers.SGD(0.0)), x, y, At(poison, 0, epoch=1), guard, Look(), epochs=2)
    losses = [float(np.mean((x[i : i + 8].sum(1, keepdims=True) - y[i : i + 8]) ** 2)) for i in range(0, 32, 8)]
    assert [(f.epoch, f.batch) for f in guard.failures] == [(1, 0)]
    assert history["loss"] == pytest.approx([np.mean(losses), np.mean(losses[1:])], rel=1e-5)
    assert seen[5:] == pytest.approx([losses[1], np.mean(losses[1:3]), np.mean(losses[1:])], rel=1e-5)


def test_an_epoch_without_any_good_batch_does_not_look_good():
    x, y = data(batches=1)
    history = fit(linear("sgd"), x, bad_targets(y, 0), quiet(max_in_a_row=2))
    assert np.isnan(history["loss"][0])


def test_random_numbers_of_the_data_go_on():
    """Data that are drawn while training goes on would otherwise be the bad ones again and again."""
    x, y = data()

    def batches():
        while True:
            i = np.random.randint(16)
            drawn.append(i)
            yield x[8 * i : 8 * i + 8], bad_targets(y, 3)[8 * i : 8 * i + 8]

    drawn = []
    gc.collect()  # data of an interrupted fit of another test may still draw in their thread
    np.random.seed(0)
    expected = [np.random.randint(16) for _ in range(60)]
    guard = quiet(max_in_a_row=6)
    np.random.seed(0)
    linear("sgd").fit(batches(), steps_per_epoch=20, epochs=2, shuffle=False, verbose=0, callbacks=[guard])
    assert guard.failures
    assert drawn == expected[: len(drawn)]


def test_what_is_drawn_while_the_guard_looks_for_the_cause_is_not_drawn_again():
    """As the thread that makes the batches does."""
    x, y = data()
    drawn = []

    class Draws(NonFiniteGuard):
        def _failure(self, batch):
            drawn.append((np.random.randint(1000), random.randrange(1000)))
            return super()._failure(batch)

    def each(*_, **__):
        drawn.append((np.random.randint(1000), random.randrange(1000)))

    guard = Draws(verbose=0)
    np.random.seed(0)
    random.seed(0)
    fit(linear("sgd"), x, bad_targets(y, 3), guard, keras.callbacks.LambdaCallback(on_train_batch_end=each))
    assert guard.failures
    np.random.seed(0)
    random.seed(0)
    assert drawn == [(np.random.randint(1000), random.randrange(1000)) for _ in drawn]


# -- what counts ------------------------------------------------------------------------------------------------------


def test_the_limit_is_the_robust_z_score():
    losses = np.random.default_rng(0).normal(3.0, 0.4, 51)
    sigma = stats.median_abs_deviation(losses, scale="normal")
    assert limit_of(list(losses), 5.0, 1.0) == pytest.approx(np.median(losses) + 5 * sigma, rel=1e-4)
    assert limit_of([2.0] * 9, 5.0, 1.0) == pytest.approx(2.0 + 5 * 0.02)  # no deviation: a share of the median
    assert limit_of([2.0] * 9, 5.0, 9.0) == pytest.approx(2.0 + 5 * 0.09)  # or of what it was
    assert limit_of([0.0] * 9, 5.0, 0.0) == np.inf


@pytest.mark.parametrize("spike", [20.0, None])
def test_a_spike_is_a_failure_if_it_is_to_be_one(spike):
    x, y = data()
    far = bad_targets(bad_targets(y, 3, value=1e3), 12, value=1e3)  # the first comes before there is a window
    far[64:72] = x[64:72].sum(1, keepdims=True)  # a loss of 0, far below
    guard = quiet(window=5, spike=spike)
    fit(linear(keras.optimizers.SGD(0.0)), x, far, guard)
    assert [(f.batch, f.kind, f.layer) for f in guard.failures] == ([(12, "spike", None)] if spike else [])
    if spike:
        assert guard.failures[0].limit < guard.failures[0].loss < np.inf


def test_the_noise_of_losses_that_have_become_small_is_no_spike():
    x, y = data()
    y = x.sum(1, keepdims=True)
    y[:40] += 1.0  # five batches with a loss of 1, then losses of 0, and then one that is small and one that is not
    y[80:88] += 0.3
    y[112:120] += 0.9
    guard = quiet(window=5)
    fit(linear(keras.optimizers.SGD(0.0)), x, y, guard)
    assert [(f.batch, f.kind) for f in guard.failures] == [(14, "spike")]
    assert guard.failures[0].limit == pytest.approx(0.2, abs=1e-6)


def infinite_gradient(optimizer):
    """A loss that is 0 where its gradient is infinite or NaN, in batches whose inputs are 0."""
    return linear(optimizer, use_bias=False, loss=lambda _, p: ops.mean(ops.sqrt(ops.square(p))))


@pytest.mark.parametrize(
    ("make", "failures"),
    [
        (lambda: keras.optimizers.SGD(0.01), [(2, "gradient", "dense")]),
        (lambda: ok.optimizers.SGD(0.01, skip_nonfinite=3), []),
        (lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.01)), []),
        (lambda: ok.optimizers.LossScale(ok.optimizers.SGD(0.01)), []),
    ],
    ids=["plain", "skip_nonfinite", "LossScaleOptimizer", "LossScale"],
)
def test_gradients_count_unless_their_updates_are_left_out_anyway(make, failures):
    x, y = data(batches=4)
    x[16:24] = 0
    model = infinite_gradient(make())
    guard = quiet()
    assert np.isfinite(fit(model, x, y, guard)["loss"][0])
    assert [(f.batch, f.kind, f.layer.split("/")[-1]) for f in guard.failures] == failures
    assert np.all(np.isfinite(model.get_weights()[0]))


def test_gradients_of_rows_count():
    model = keras.Sequential([keras.Input((1,), dtype="int32"), keras.layers.Embedding(5, 3), keras.layers.Flatten()])
    model.compile(ok.optimizers.SGD(0.1), loss=lambda _, p: ops.mean(ops.sqrt(ops.square(p))))
    table = np.ones((5, 3))
    table[2] = 0
    model.set_weights([table])
    rows = np.array([[0], [1], [2], [3]])
    guard = quiet()
    fit(model, rows, rows, guard, size=1)
    assert [(f.batch, f.kind) for f in guard.failures] == [(2, "gradient")]


def test_weights_count_before_they_are_validated():
    x, y = data(batches=3)
    y[16:] = 1e10
    model = linear(keras.optimizers.SGD(1e32))
    model.layers[0].bias.assign([0.5])
    before = model.get_weights()

    x[:16], y[:16] = 0, 0.5  # no gradient until the last batch
    guard = quiet(find_layer=False)
    history = fit(model, x, y, guard, validation_data=(x[:8], y[:8]))
    assert [(f.batch, f.kind) for f in guard.failures] == [(2, "weight")]
    assert "'dense" in guard.failures[0].where or "/dense" in guard.failures[0].where
    same(model.get_weights(), before)
    assert history["val_loss"] == [0.0]


def test_weights_that_are_not_finite_to_begin_with_are_refused():
    model = linear("sgd")
    model.layers[0].bias.assign([np.inf])
    with pytest.raises(ValueError, match=r"finite weights when training begins; '.*bias' has others"):
        fit(model, *data(), NonFiniteGuard())


# -- the learning rate ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [keras.optimizers.SGD, ok.optimizers.SGD], ids=["keras", "ours"])
def test_the_rate_is_lowered_and_comes_back(make):
    x, y = data()
    rates = Rates()
    guard = quiet(every=2, rate_factor=0.25, recover_after=3)
    fit(linear(make(0.5**4)), x, bad_targets(y, 4, 6, value=1e30), guard, rates)
    assert guard.failures[0].where == "all layers are finite, but not the loss function of what they give"
    share = [1] * 4 + [0.25] * 2 + [0.25**2] * 3 + [0.25] * 3 + [1] * 4
    assert rates.seen == pytest.approx([0.5**4 * s for s in share])


def test_a_schedule_of_ours_goes_on_below():
    x, y = data()
    schedule = ok.schedules.Linear(0.1, steps=20)
    rates = Rates()
    fit(linear(ok.optimizers.SGD(schedule)), x, bad_targets(y, 4, value=1e30), quiet(recover_after=None), rates)
    updates = [*range(1, 5), *range(1, 13)]  # back to the state after the first update
    expected = [float(schedule(u)) * (1 if i < 4 else 0.5) for i, u in enumerate(updates)]
    assert rates.seen == pytest.approx(expected, rel=1e-5)


def set_rate(value):
    def function(model):
        model.optimizer.learning_rate = value

    return function


@pytest.mark.parametrize(("bad", "after"), [(1e30, [5e-4] * 5 + [1e-3] * 7), (np.nan, [1e-3] * 12)])
def test_a_rate_that_was_set_since_the_copy_is_kept(bad, after):
    x, y = data()
    rates = Rates()
    guard = quiet(recover_after=5)
    fit(linear(keras.optimizers.SGD(1e-2)), x, bad_targets(y, 4, value=bad), guard, At(set_rate(1e-3), 3), rates)
    assert rates.seen == pytest.approx([1e-2] * 3 + [1e-3] + after)


def test_a_rate_that_was_set_anew_is_not_raised_above_the_former_one():
    x, y = data()
    rates = Rates()
    far, guard = bad_targets(y, 4, value=1e30), quiet(recover_after=5)
    fit(linear(keras.optimizers.SGD(1e-2)), x, far, guard, At(set_rate(8e-3), 6), rates)
    assert rates.seen == pytest.approx([1e-2] * 4 + [5e-3] * 2 + [8e-3] * 3 + [1e-2] * 7)


@pytest.mark.parametrize("find_layer", [True, False])
def test_data_are_not_the_fault_of_the_rate_if_they_are_looked_at(find_layer):
    x, y = data(batches=4)
    model = linear(keras.optimizers.SGD(0.5))
    guard = quiet(find_layer=find_layer)
    fit(model, x, bad_targets(y, 2), guard)
    assert guard.failures[0].in_data is find_layer
    assert rate_of(model) == (0.5 if find_layer else 0.25)


def test_rates_that_cannot_be_lowered_are_refused():
    x, y = data()
    scheduled = keras.optimizers.schedules.CosineDecay(0.01, 40)
    with pytest.raises(ValueError, match=r"rate_factor must be 1 for <.*SGD.*got 0\.5"):
        fit(linear(keras.optimizers.SGD(scheduled)), x, y, NonFiniteGuard())
    fit(linear(keras.optimizers.SGD(scheduled)), x, bad_targets(y, 1), quiet(rate_factor=1))
    driven = ScheduleHyperparameters({"learning_rate": scheduled})
    with pytest.raises(ValueError, match="rate_factor must be 1 if ScheduleHyperparameters drives"):
        fit(linear(keras.optimizers.SGD(0.01)), x, y, driven, NonFiniteGuard())


# -- giving up --------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="tests")
class Log(keras.layers.Layer):
    """NaN below 0."""

    def call(self, x):
        return ops.log(x)


def test_it_gives_up_with_the_first_bad_layer_and_batch():
    x = np.ones((64, 4), "float32")
    x[24:] = -1
    block = keras.Sequential([Log(name="log"), keras.layers.Dense(3)], name="block")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, kernel_initializer="identity"), block])
    model.compile("sgd", loss="mse")
    guard = quiet(every=2)
    with pytest.raises(TrainingDivergedError, match="after 3 failures in a row") as raised:
        fit(model, x, x[:, :3], guard)
    error = raised.value
    assert [(f.batch, f.kind) for f in error.failures] == [(3, "loss"), (4, "loss"), (5, "loss")]
    assert error.failure.layer.split("/")[-2:] == ["block", "log"]
    assert "in batch 6 of epoch 1" in str(error)
    assert "block/log' is the first that is not finite" in str(error)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 1  # the copies: after batch 0, and 2, unconfirmed
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert "train_step" not in vars(model)
    fit(model, x[:24], x[:24, :3], guard)  # and it all goes on
    assert guard.failures == []


def test_failures_far_apart_are_not_in_a_row_but_count_in_all():
    x, y = data()
    bad = bad_targets(y, 2, 7, 12)
    guard = quiet(every=3, max_in_a_row=2)
    fit(linear("sgd"), x, bad, guard)
    assert [f.batch for f in guard.failures] == [2, 7, 12]
    with pytest.raises(TrainingDivergedError, match=r"after 3 failures \(max_total=3\).*batch 13 of epoch 1"):
        fit(linear("sgd"), x, bad, quiet(every=3, max_in_a_row=2, max_total=3))


def test_what_is_printed(capsys):
    x, y = data()
    x[30, 2] = np.inf
    fit(linear("sgd"), x, bad_targets(y, 7, value=1e30), NonFiniteGuard())
    lines = capsys.readouterr().out.split("\n")
    assert lines[1::2] == [
        "NonFiniteGuard: the loss is inf, in batch 4 of epoch 1; the inputs of the batch are not finite. "
        "Training continues from update 1.",
        "NonFiniteGuard: the loss is inf, in batch 8 of epoch 1; all layers are finite, but not the loss function of "
        "what they give. Training continues from update 1, with 0.5 of the learning rate.",
    ]


def test_a_step_that_cannot_be_seen_into_is_refused():
    class Own(keras.Model):
        def train_step(self, *given):
            if keras.config.backend() == "jax":
                return {"loss": ops.zeros(())}, given[0]
            return {"loss": ops.zeros(())}

    inputs = keras.Input((4,))
    model = Own(inputs, keras.layers.Dense(1)(inputs))
    model.compile("sgd", loss="mse")
    with pytest.raises(RuntimeError, match="sees neither loss nor gradients of a train_step"):
        fit(model, *data(), NonFiniteGuard())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"every": 0}, ValueError),
        ({"every": 1.5}, TypeError),
        ({"spike": 0.0}, ValueError),
        ({"window": 2}, ValueError),
        ({"rate_factor": 0.0}, ValueError),
        ({"rate_factor": 1.1}, ValueError),
        ({"recover_after": 0}, ValueError),
        ({"max_in_a_row": 0}, ValueError),
        ({"max_total": 0}, ValueError),
        ({"find_layer": 1}, TypeError),
        ({"verbose": 2}, ValueError),
    ],
)
def test_arguments_are_checked(arguments, error):
    (name,) = arguments
    with pytest.raises(error, match=f"{name} must be"):
        NonFiniteGuard(**arguments)


# -- models that the first step builds, and several optimizers --------------------------------------------------------

ON_TAPES = "the training steps here use tapes of TensorFlow"


def unbuilt():
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.layers.Dense(4, "tanh"), keras.layers.BatchNormalization(), keras.layers.Dense(1)])


@pytest.mark.long
@pytest.mark.parametrize("make", [keras.optimizers.Adam, ok.optimizers.Adam], ids=["keras", "ours"])
def test_a_model_that_the_first_step_builds_goes_back_to_its_first_state(make):
    x, y = data(batches=4)
    weights = {}
    for name, given in {"guarded": (x, bad_targets(y, 0)), "clean": (without(x, [0]), without(y, [0]))}.items():
        model, guard = unbuilt(), quiet(every=2, rate_factor=1.0)
        model.compile(make(0.01), loss="mse")
        fit(model, *given, guard)
        assert [f.batch for f in guard.failures] == ([0] if name == "guarded" else [])
        weights[name] = everything(model)
    same(weights["guarded"], weights["clean"])


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="fit builds models before, on JAX")
@pytest.mark.parametrize("can_be_traced", [True, False])
def test_eager_steps_that_build_the_model(can_be_traced):
    class Looks(keras.Sequential):
        def train_step(self, batch):
            if not can_be_traced:
                batch[0].numpy()
            return super().train_step(batch)

    x, y = data(batches=4)
    for bad in (0, 2):
        model, guard = Looks(unbuilt().layers), quiet()
        model.compile("sgd", loss="mse", run_eagerly=True)
        if bad == 0 and not can_be_traced:
            with pytest.raises(RuntimeError, match=r"no good state to go back to: model .* was built by batch 1"):
                fit(model, x, bad_targets(y, bad), guard)
        else:
            fit(model, x, bad_targets(y, bad), guard)
            assert [f.batch for f in guard.failures] == [bad]
            assert all(np.all(np.isfinite(w)) for w in model.get_weights())


class Reconstructs(keras.Model):
    """Without `call`, and in two parts that an optimizer each trains, if there are two."""

    def __init__(self, optimizers=()):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(2, name="encoder"), keras.layers.Dense(4, name="decoder")
        self.parts = list(optimizers)

    def train_step(self, batch):
        import tensorflow as tf

        x = batch[0] if isinstance(batch, tuple) else batch
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.decoder(self.encoder(x)) - x))
        of_layers = [self.encoder.trainable_variables, self.decoder.trainable_variables]
        grads = tape.gradient(loss, of_layers)
        if self.parts:
            for optimizer, g, v in zip(self.parts, grads, of_layers, strict=True):
                optimizer.apply(g, v)
        else:
            self.optimizer.apply(grads[0] + grads[1], of_layers[0] + of_layers[1])
        return {"distance": loss}


@pytest.mark.only_on("tensorflow", because=ON_TAPES)
def test_a_model_without_call_is_guarded_by_its_gradients():
    x, _ = data(batches=6)
    x[8] = np.nan
    model, guard = Reconstructs(), quiet(every=2)
    model.compile(ok.optimizers.SGD(0.01))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"does not see the loss.*optimizer\.scale_loss.*spike=None"):
            fit(model, x, None, guard)
    failure = guard.failures[0]
    assert [(f.batch, f.kind) for f in guard.failures] == [(1, "gradient")]
    assert np.isnan(failure.loss)
    assert "inputs of the batch" in str(failure)
    assert "loss" not in str(failure)
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.only_on("tensorflow", because=ON_TAPES)
@pytest.mark.parametrize(
    ("compiled", "momentum"), [({}, 0.0), ({"optimizer": None}, 0.5)], ids=["unused default", "none, with momentum"]
)
def test_gradients_of_every_optimizer_count_and_every_rate_is_lowered(compiled, momentum):
    x, _ = data(batches=6)
    x[16:24] *= 1e30
    parts = [keras.optimizers.SGD(0.5**5), ok.optimizers.SGD(0.5**6, momentum=momentum)]
    model, guard = Reconstructs(parts), quiet(every=2, recover_after=None, spike=None)
    model.encoder.build((None, 4))
    model.decoder.build((None, 2))
    model.compile(**compiled)
    fit(model, x, None, guard)
    assert [(f.batch, f.kind) for f in guard.failures] == [(2, "gradient")]
    assert [float(part.learning_rate.numpy()) for part in parts] == [0.5**6, 0.5**7]
    variables = [*model.variables, *(v for part in parts for v in part.variables)]
    assert all(np.all(np.isfinite(v.numpy())) for v in variables)


# -- ways to train ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"jit_compile": True}, {"run_eagerly": True}], ids=["XLA", "eager"])
def test_compiled_and_eager_steps(how):
    x, y = data()
    guard = quiet(every=4)
    model = linear("adam", **how)
    fit(model, x, bad_targets(y, 6), guard)
    assert [(f.batch, f.where) for f in guard.failures] == [(6, "the targets of the batch are not finite")]
    assert np.all(np.isfinite(model.get_weights()[0]))


@pytest.mark.long
def test_several_steps_per_execution():
    """On JAX only the last step of each is looked at, whose loss is NaN since the weights are."""
    x, y = data()
    tensorflow = keras.config.backend() == "tensorflow"
    model = network("adam", steps_per_execution=4)
    guard = quiet(every=4, rate_factor=1.0)
    fit(model, x, bad_targets(y, 9), guard)
    assert [(f.batch, f.kind) for f in guard.failures] == [(9 if tensorflow else 11, "loss")]
    plain = network("adam", steps_per_execution=4)
    fit(plain, without(x, range(4, 12)), without(y, range(4, 12)))
    same(everything(model), everything(plain))


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because=ON_TENSORFLOW)
@pytest.mark.parametrize("make", [lambda: keras.optimizers.SGD(0.01), lambda: ok.optimizers.AdamW(0.01)])
def test_two_replicas(make):
    x, y = data()
    x[8 * 9 + 6] = 0  # on the second replica: the gradient of the root there is NaN, and the loss is not
    with two_replicas().scope():
        model = network(make())
        rooted = infinite_gradient(make())
    guard = quiet(every=4)
    fit(model, x, bad_targets(y, 6), guard)
    assert [(f.batch, f.kind) for f in guard.failures] == [(6, "loss")]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    fit(rooted, x, y, guard)
    assert [(f.batch, f.kind) for f in guard.failures] == [(9, "gradient")]
    assert all(np.all(np.isfinite(w)) for w in rooted.get_weights())


def test_float16_overflow_is_left_to_loss_scaling():
    x, y = data()
    keras.config.set_dtype_policy("mixed_float16")
    model = linear(keras.optimizers.SGD(0.01))
    guard = quiet()
    fit(model, x, 100 * y, guard)  # gradients times 2^15 are infinite
    assert guard.failures == []
    assert float(ops.convert_to_numpy(model.optimizer.dynamic_scale)) < 2**15


@pytest.mark.long
@pytest.mark.parametrize("last", [False, True])
def test_it_works_beside_the_others_wherever_it_stands(last, tmp_path):
    """All that reach into the step, and all that look at an epoch's end."""
    x, y = data()
    guard = quiet(every=4)
    others = [
        ok.callbacks.TrainingMonitor(tmp_path, every=1),
        ok.callbacks.AveragedWeights(start=1),
        ok.callbacks.EarlyStopping("val_loss", patience=9, restore_best_weights=True),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1, min_delta=9.0),
    ]
    model = network("adam")
    callbacks = [*others, guard] if last else [guard, *others]
    history = fit(model, x, bad_targets(y, 6, 15), *callbacks, epochs=3, validation_data=(x, y))
    assert [(f.epoch, f.batch) for f in guard.failures] == [(e, b) for e in range(3) for b in (6, 15)]
    assert all(np.all(np.isfinite(values)) for values in history.values())
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())
    assert rate_of(model) == pytest.approx(1e-5)  # the plateau's alone, twice
    assert not {"train_step", "make_train_function"} & set(vars(model))


@pytest.mark.long
@pytest.mark.parametrize("find_layer", [True, False])
def test_layers_that_are_thawed_begin_with_a_new_copy(find_layer):
    x, y = data(batches=4)
    model = network(ok.optimizers.Adam(0.01))
    thaw = ok.callbacks.Unfreeze({0: f"{model.layers[-1].name}$", 1: ".*"})
    guard = quiet(find_layer=find_layer)
    fit(model, x, y, thaw, guard, At(poison, 0, epoch=1), epochs=2)
    assert [(f.epoch, f.batch) for f in guard.failures] == [(1, 0)]
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


# -- going on in another process --------------------------------------------------------------------------------------


class Keep(keras.callbacks.Callback):
    """After one epoch takes what a file would hold."""

    def __init__(self, guard, epoch):
        super().__init__()
        self.guard, self.epoch = guard, epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.kept = self.guard.state_dict(), TrainingState.of(self.model)


class Load(keras.callbacks.Callback):
    def __init__(self, guard, kept):
        super().__init__()
        self.guard, self.kept = guard, kept

    def on_train_begin(self, logs=None):
        self.guard.load_state_dict(self.kept[0])
        self.kept[1].into(self.model)


def plain(value):
    """As JSON with arrays as their numbers, which fails for anything that may not be in a state."""
    return json.dumps(value, default=lambda array: array.tolist() if isinstance(array, np.ndarray) else array)


def test_it_goes_on_where_it_was():
    x, y = data()
    bad = bad_targets(bad_targets(y, 0), 5, 12, value=1e30)

    def guarded():
        return quiet(every=4, window=10, recover_after=5, max_in_a_row=5)

    whole, first, second = guarded(), guarded(), guarded()
    model = network("adam")
    keep = Keep(first, 0)
    rates, others = Rates(), Rates()
    fit(network("adam"), x, bad, first, keep, epochs=1)
    fit(model, x, bad, whole, rates, epochs=2)
    resumed = network("adam")
    resumed.fit(x[:8], y[:8], verbose=0)  # so that all is built, in another state
    fit(resumed, x, bad, second, Load(second, keep.kept), others, initial_epoch=1, epochs=2)
    assert len(whole.failures) == 6
    assert str(whole.failures[:3]) == str(first.failures)  # NaN is not NaN
    assert str(second.failures) == str(whole.failures)
    assert others.seen == rates.seen[16:]
    same(everything(resumed), everything(model))
    state = first.state_dict()
    assert plain(state) == plain(keep.kept[0]) or state["good"] is None


@pytest.mark.long
def test_it_goes_on_after_a_crash_where_layers_were_thawed(tmp_path):
    """The copy is the one from before the crash, and not one of the moment at which it goes on."""
    x, y = data(batches=6)
    bad = bad_targets(y, 4)

    class Crash(keras.callbacks.Callback):
        stateless = True

        def on_train_batch_end(self, batch, logs=None):
            if batch == 2 and self.model.layers[0].trainable:
                raise RuntimeError("crash")

    def fitted(directory, *callbacks):
        model = network(ok.optimizers.Adam(0.01))
        thaw = ok.callbacks.Unfreeze({0: f"{model.layers[-1].name}$", 1: ".*"})
        guard, resume = quiet(), ok.callbacks.Resume(tmp_path / directory, every=1)
        shuffled = ok.data.Shuffled(x, bad, batch_size=8, shuffle=False)
        model.fit(shuffled, epochs=2, verbose=0, callbacks=[guard, thaw, resume, *callbacks])
        return [(f.epoch, f.batch) for f in guard.failures], model.get_weights()

    whole = fitted("whole")
    with pytest.raises(RuntimeError, match="crash"):
        fitted("cut", Crash())
    again = fitted("cut")
    assert again[0] == whole[0] == [(0, 4), (1, 4)]
    same(again[1], whole[1])

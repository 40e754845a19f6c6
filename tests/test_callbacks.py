"""Callbacks in real training, against hand-written loops in NumPy."""

import contextlib
import inspect
import json
import math
import signal

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.callbacks import EarlyStopping, ScheduleHyperparameters
from keras_optkit.schedules import Cosine, Linear, OneCycle, Warmup
from keras_optkit.testing import tools

STOCK = keras.optimizers


def regression(n=24, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype(dtype)
    return x, (x @ np.array([[1.0], [-2.0], [0.5]]) + 0.1 * rng.normal(size=(n, 1))).astype(dtype)


def linear_model(optimizer, dtype="float64", **arguments):
    """y = x w with mean squared error; its gradient is 2/n xᵀ(x w - y)."""
    start = keras.initializers.Constant(0.5)
    model = keras.Sequential(
        [keras.Input((3,), dtype=dtype), keras.layers.Dense(1, use_bias=False, kernel_initializer=start, dtype=dtype)]
    )
    model.compile(optimizer=optimizer, loss="mse", **arguments)
    return model


def gradients(x, y, w, batch):
    """The gradient of one batch after the other; `w` is read anew each time."""
    while True:
        for i in range(0, len(x), batch):
            a, b = x[i : i + batch], y[i : i + batch]
            yield 2 * a.T @ (a @ w[-1] - b) / len(a)


def counting_model(optimizer, **arguments):
    """One weight whose gradient is the mean of its inputs, so that a test can choose every gradient."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer=optimizer, loss=lambda _, p: ops.mean(p), **arguments)
    return model


def fit(model, x, y, *callbacks, batch_size=4, epochs=2, **arguments):
    return model.fit(
        x, y, batch_size=batch_size, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments
    )


class At(keras.callbacks.Callback):
    """Calls a function at the end of one batch (of one epoch) or of one epoch."""

    def __init__(self, function, *, batch=None, epoch=None):
        super().__init__()
        self.function, self.batch, self.epoch, self.now = function, batch, epoch, None

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.batch and self.epoch in (None, self.now):
            self.function(self.model)

    def on_epoch_end(self, epoch, logs=None):
        if self.batch is None and self.epoch in (None, epoch):
            self.function(self.model)


def boom(_):
    raise RuntimeError("boom")


JAX = keras.config.backend() == "jax"

#: Relative. Keras computes cosines, and so the schedules below, in float32 on JAX, whatever the dtype.
DIGITS = 1e-6 if JAX else 1e-12


@pytest.fixture
def x64():
    """JAX has to be asked for float64."""
    with tools.float64():
        yield


@pytest.fixture
def float64():
    with tools.float64():
        keras.config.set_floatx("float64")  # Keras's learning rate variable has this dtype
        yield


# -- ScheduleHyperparameters ------------------------------------------------------------------------------------------

RATE = Warmup(Cosine(0.2, 9, final=0.02), steps=3, start=0.01)
MOMENTUM = OneCycle(0.2, 12).momentum(0.3, 0.9)
DECAY = Linear(0.3, 12, final=0.0)
SGD_SCHEDULES = {"learning_rate": RATE, "momentum": MOMENTUM, "weight_decay": DECAY}

EXECUTION = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "five_steps_at_once": {"jit_compile": False, "steps_per_execution": 5},
}


def numpy_sgd(x, y, steps, rate, momentum, decay, nesterov=False, batch=4):
    w, v = [np.full((3, 1), 0.5)], 0.0
    for t, g in zip(range(steps), gradients(x, y, w, batch), strict=False):
        eta, gamma = rate(t), momentum(t)
        v = gamma * v + eta * g
        step = gamma * v + eta * g if nesterov else v
        w.append(w[-1] - step - eta * decay(t) * w[-1])
    return w


def twin_of(schedule):
    return lambda t: float(ops.convert_to_numpy(schedule(t)))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("room", "execution"),
    [(room, how) for room in (STOCK, ok.optimizers) for how in EXECUTION if room is STOCK or how != "eager"],
)
def test_sgd_is_driven_as_in_a_numpy_loop(room, execution):
    x, y = regression()
    model = linear_model(room.SGD(0.7, momentum=0.1), **EXECUTION[execution])
    fit(model, x, y, ScheduleHyperparameters(SGD_SCHEDULES))
    expected = numpy_sgd(x, y, 12, twin_of(RATE), twin_of(MOMENTUM), twin_of(DECAY))
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=100 * DIGITS)


@pytest.mark.usefixtures("float64")
def test_nesterov_and_decay_that_was_none_are_driven():
    x, y = regression()
    model = linear_model(STOCK.SGD(0.7, momentum=0.1, nesterov=True, weight_decay=None))
    fit(model, x, y, ScheduleHyperparameters(SGD_SCHEDULES))
    expected = numpy_sgd(x, y, 12, twin_of(RATE), twin_of(MOMENTUM), twin_of(DECAY), nesterov=True)
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=100 * DIGITS)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_adam_betas_are_driven_as_in_a_numpy_loop(room):
    x, y = regression()
    beta_1, beta_2 = Linear(0.5, 12, final=0.95), Linear(0.9, 6, final=0.99)
    ours = room is ok.optimizers
    model = linear_model(room.Adam(0.05, epsilon=1e-3))
    fit(model, x, y, ScheduleHyperparameters({"beta_1": beta_1, "beta_2": beta_2}))
    w, m, v = [np.full((3, 1), 0.5)], 0.0, 0.0
    for t, g in zip(range(12), gradients(x, y, w, 4), strict=False):
        b1, b2 = twin_of(beta_1)(t), twin_of(beta_2)(t)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        c1, c2 = 1 - b1 ** (t + 1), 1 - b2 ** (t + 1)
        if ours:
            w.append(w[-1] - 0.05 * (m / c1) / (np.sqrt(v / c2) + 1e-3))
        else:
            w.append(w[-1] - 0.05 * np.sqrt(c2) / c1 * m / (np.sqrt(v) + 1e-3))
    np.testing.assert_allclose(model.get_weights()[0], w[-1], rtol=1e-10)


@pytest.mark.usefixtures("float64")
def test_rmsprop_rho_and_momentum_are_driven_as_in_a_numpy_loop():
    x, y = regression()
    rho, momentum = Linear(0.5, 12, final=0.99), Linear(0.9, 6, final=0.0)
    model = linear_model(STOCK.RMSprop(0.02, momentum=0.5, epsilon=1e-3))
    fit(model, x, y, ScheduleHyperparameters({"rho": rho, "momentum": momentum}))
    w, e, b = [np.full((3, 1), 0.5)], 0.0, 0.0
    for t, g in zip(range(12), gradients(x, y, w, 4), strict=False):
        e = twin_of(rho)(t) * e + (1 - twin_of(rho)(t)) * g * g
        b = twin_of(momentum)(t) * b + 0.02 * g / np.sqrt(e + 1e-3)
        w.append(w[-1] - b)
    np.testing.assert_allclose(model.get_weights()[0], w[-1], rtol=1e-10)


class Constant(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, value):
        self.held = value

    def __call__(self, step):
        return ops.convert_to_tensor(self.held, dtype="float64")


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: STOCK.AdamW(global_clipnorm=0.5), "learning_rate weight_decay beta_1 beta_2 epsilon global_clipnorm"),
        (
            lambda: STOCK.RMSprop(momentum=0.5, centered=True, clipvalue=0.1),
            "rho momentum epsilon" + " clipvalue" * (not JAX),
        ),
        (
            lambda: STOCK.Nadam(clipnorm=0.5, use_ema=True, ema_overwrite_frequency=3),
            "beta_1 beta_2 epsilon clipnorm ema_momentum",
        ),
        (lambda: STOCK.Adafactor(), "beta_2_decay epsilon_1 epsilon_2 clip_threshold"),
        (lambda: STOCK.Muon(), "learning_rate momentum muon_a weight_decay rms_rate"),
    ],
    ids=["AdamW", "RMSprop", "Nadam", "Adafactor", "Muon"],
)
def test_a_constant_schedule_is_the_number_bitwise(make, names):
    """So nothing of the update is lost or rounded when a number is replaced by a tensor."""
    x, y = regression(dtype="float32")
    weights = []
    for driven in (False, True):
        optimizer = make()
        config = optimizer.get_config()
        model = linear_model(optimizer, dtype="float32", jit_compile=False)
        schedules = {name: Constant(float(config[name])) for name in names.split()}
        fit(model, x, y, *([ScheduleHyperparameters(schedules)] if driven else []))
        weights.append(model.get_weights()[0])
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_under_loss_scaling_a_skipped_update_does_not_count(room):
    keras.config.set_dtype_policy("mixed_float16")
    rate, momentum = Linear(0.5, 4, final=0.125), Linear(0.5, 4, final=0.75)
    model = counting_model(room.SGD(1.0, momentum=0.9))
    assert isinstance(model.optimizer, STOCK.LossScaleOptimizer)
    x = np.array([1, 1.5, np.inf, 0.5, 1], "float32")[:, None]  # times the loss scale 2^15 within float16, but for inf
    fit(model, x, x, ScheduleHyperparameters({"learning_rate": rate, "momentum": momentum}), batch_size=1, epochs=1)
    w, v = 1.0, 0.0
    for t, g in enumerate([1, 1.5, 0.5, 1]):
        v = twin_of(momentum)(t) * v + twin_of(rate)(t) * g
        w -= v
    assert model.get_weights()[0].item() == pytest.approx(w, rel=1e-6)
    assert model.optimizer.inner_optimizer.momentum == pytest.approx(twin_of(momentum)(3), rel=1e-12)


@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_under_accumulation_updates_count_not_batches(room):
    rate, momentum = Linear(0.5, 4, final=0.125), Linear(0.5, 4, final=0.75)
    model = counting_model(room.SGD(1.0, momentum=0.9, gradient_accumulation_steps=3))
    x = np.array([1, 2, 3, 0, 0, 3, 2, 4, 6], "float32")[:, None]
    fit(model, x, x, ScheduleHyperparameters({"learning_rate": rate, "momentum": momentum}), batch_size=1, epochs=1)
    w, v = 1.0, 0.0
    for t, g in enumerate([2, 1, 4]):
        v = twin_of(momentum)(t) * v + twin_of(rate)(t) * g
        w -= v
    assert model.get_weights()[0].item() == pytest.approx(w, rel=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_a_second_fit_goes_on_and_numbers_are_left(room):
    x, y = regression()
    model = linear_model(room.SGD(0.7, momentum=0.1))
    driven = ScheduleHyperparameters(SGD_SCHEDULES)
    for steps_done in (6, 12):
        fit(model, x, y, driven, epochs=1)
        left = json.loads(json.dumps(model.optimizer.get_config()))
        for name, schedule in SGD_SCHEDULES.items():
            assert left[name] == pytest.approx(twin_of(schedule)(steps_done - 1), rel=DIGITS), name
        assert type(model.optimizer.momentum) is float
    expected = numpy_sgd(x, y, 12, twin_of(RATE), twin_of(MOMENTUM), twin_of(DECAY))
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=100 * DIGITS)


@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_a_momentum_that_has_come_down_to_0_can_go_on(room):
    model = counting_model(room.SGD(1.0, momentum=0.5))
    momentum = Linear(0.5, 1, final=0.0)
    for _ in range(2):
        fit(
            model,
            np.ones((2, 1)),
            np.ones((2, 1)),
            ScheduleHyperparameters({"momentum": momentum}),
            batch_size=1,
            epochs=1,
        )
        assert model.optimizer.momentum == 0.0
    assert model.get_weights()[0].item() == 1.0 - 1.0 - 1.0 - 1.0 - 1.0


@pytest.mark.usefixtures("float64")
def test_it_drives_a_model_that_has_been_trained_before():
    x, y = regression()
    model = linear_model(STOCK.SGD(0.125, momentum=0.25))
    fit(model, x, y, epochs=1)
    fit(model, x, y, ScheduleHyperparameters(SGD_SCHEDULES), epochs=1)

    def from_6(schedule, before):
        return lambda t: before if t < 6 else twin_of(schedule)(t)

    expected = numpy_sgd(x, y, 12, from_6(RATE, 0.125), from_6(MOMENTUM, 0.25), from_6(DECAY, 0.0))
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=100 * DIGITS)


@pytest.mark.usefixtures("float64")
def test_a_step_that_somebody_still_holds_does_not_come_back():
    """jax.jit would go on with the trace of the same method, and so without the schedules or, later, with them."""
    x, y = regression()
    model = linear_model(STOCK.SGD(0.125, momentum=0.25))
    held = []
    for callbacks in ([], [ScheduleHyperparameters(SGD_SCHEDULES)], []):
        fit(model, x, y, At(lambda m: held.append(m.train_function), batch=0), *callbacks, epochs=1)

    def then_held(schedule, before):
        return lambda t: before if t < 6 else twin_of(schedule)(min(t, 11))

    expected = numpy_sgd(x, y, 18, then_held(RATE, 0.125), then_held(MOMENTUM, 0.25), then_held(DECAY, 0.0))
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=max(1e-7, DIGITS))  # numbers go by float32


@pytest.mark.usefixtures("float64")
def test_without_the_callback_training_goes_on_with_the_numbers_that_were_left():
    x, y = regression()
    model = linear_model(STOCK.SGD(0.7, momentum=0.1))
    fit(model, x, y, ScheduleHyperparameters(SGD_SCHEDULES), epochs=1)
    fit(model, x, y, epochs=1)

    def held(schedule):
        return lambda t: twin_of(schedule)(min(t, 5))

    expected = numpy_sgd(x, y, 12, held(RATE), held(MOMENTUM), held(DECAY))
    # Keras takes plain numbers through float32, also for float64 weights
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-7)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("steps_per_execution", "held_for"), [(1, 1), (3, 3)])
def test_functions_are_called_before_every_execution(steps_per_execution, held_for):
    x, y = regression()
    functions = {
        "learning_rate": lambda step: 0.1 if step < 4 else 0.02,
        "momentum": lambda step: [0.5, 0.9][step % 2],
        "weight_decay": lambda step: np.float32(step / 16),
    }
    model = linear_model(STOCK.SGD(0.7, momentum=0.1), steps_per_execution=steps_per_execution)
    fit(model, x, y, ScheduleHyperparameters(functions))

    def seen(name):
        return lambda t: float(functions[name](t - t % held_for))

    expected = numpy_sgd(x, y, 12, *map(seen, functions))
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_optimizer_can_be_saved_in_the_middle():
    x, y = regression()
    model = linear_model(STOCK.SGD(0.7, momentum=0.1))
    seen = []
    driven = ScheduleHyperparameters(SGD_SCHEDULES)
    look = At(lambda m: seen.append(json.loads(json.dumps(m.optimizer.get_config()))["momentum"]), batch=0)
    fit(model, x, y, driven, look, epochs=3)
    assert seen == pytest.approx([0.1, twin_of(MOMENTUM)(5), twin_of(MOMENTUM)(11)], rel=DIGITS)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "optimizer", [lambda: STOCK.SGD(0.1, momentum=0.5), lambda: ok.optimizers.SGD(0.1, momentum=0.5)]
)
def test_failure_leaves_a_usable_optimizer(optimizer):
    x, y = regression()
    model = linear_model(optimizer())
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, x, y, ScheduleHyperparameters(SGD_SCHEDULES), At(boom, batch=2))
    assert model.optimizer.momentum == pytest.approx(twin_of(MOMENTUM)(2), rel=DIGITS)
    assert "apply" not in vars(model.optimizer)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("optimizer", "schedules", "error", "message"),
    [
        (lambda: STOCK.SGD(momentum=0.5), {"momentun": RATE}, ValueError, "'momentun'.*mean 'momentum'"),
        (lambda: ok.optimizers.Adam(), {"momentum": RATE}, ValueError, ": learning_rate, weight_decay, beta_1"),
        (lambda: STOCK.SGD(momentum=0.5), {"nesterov": RATE}, ValueError, "'nesterov' that can be driven"),
        (lambda: STOCK.SGD(momentum=0.0), {"momentum": RATE}, ValueError, "built with momentum=0"),
        (lambda: ok.optimizers.SGD(momentum=0.0), {"momentum": RATE}, ValueError, "built with momentum=0"),
        (lambda: STOCK.SGD(RATE), {"learning_rate": RATE}, ValueError, "was made with a schedule"),
        (lambda: ok.optimizers.SGD(RATE), {"learning_rate": RATE}, ValueError, "was made with a schedule"),
        (lambda: STOCK.Adam(), {"ema_momentum": RATE}, ValueError, "ema_momentum cannot be driven: Adam, as it is"),
        (lambda: STOCK.Muon(), {"ns_steps": RATE}, TypeError, "ns_steps cannot.* has to be a Python number"),
        (lambda: STOCK.Adam(), {"beta_1": lambda _: ops.ones(2)}, TypeError, "beta_1 at update 0"),
        (lambda: STOCK.Adam(), {"beta_1": lambda _: math.nan}, ValueError, "beta_1 at update 0.*nan"),
        (lambda: STOCK.Adam(), {"beta_1": Constant([0.5, 0.5])}, ValueError, r"'beta_1'.*scalar.*\(2,\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_driven_raises_before_any_update(optimizer, schedules, error, message):
    x, y = regression(dtype="float32")
    model = linear_model(optimizer(), dtype="float32")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(error, match=message):
        fit(model, x, y, ScheduleHyperparameters(schedules))
    np.testing.assert_array_equal(model.get_weights()[0], 0.5)
    assert "apply" not in vars(model.optimizer)


@pytest.mark.only_on("jax", because="elsewhere they can be driven")
@pytest.mark.parametrize(
    ("optimizer", "name"),
    [(lambda: STOCK.SGD(clipvalue=0.5), "clipvalue"), (lambda: STOCK.Ftrl(), "l1_regularization_strength")],
)
def test_what_keras_clips_by_cannot_be_driven_on_jax(optimizer, name):
    model = linear_model(optimizer(), dtype="float32")
    with pytest.raises(ValueError, match=f"{name} cannot be driven on the JAX backend, where (SGD|Ftrl)"):
        fit(model, *regression(dtype="float32"), ScheduleHyperparameters({name: RATE}))


@pytest.mark.parametrize(
    ("schedules", "error", "message"),
    [
        ({}, ValueError, "at least one"),
        ([RATE], TypeError, "dict of hyperparameter to schedule"),
        ({"momentum": 0.9}, TypeError, r"'momentum'.*0\.9"),
    ],
)
def test_bad_schedules_raise_in_the_constructor(schedules, error, message):
    with pytest.raises(error, match=message):
        ScheduleHyperparameters(schedules)


# -- EarlyStopping ----------------------------------------------------------------------------------------------------


def walk(callback, curve, name="val_loss"):
    """Shows the callback a curve, epoch by epoch, until it stops; returns the number of epochs."""
    model = linear_model("sgd")
    callback.set_model(model)
    callback.on_train_begin()
    model.stop_training = False
    for epoch, value in enumerate(curve):
        callback.on_epoch_end(epoch, {"loss": 1.0, name: value})
        if model.stop_training:
            break
    callback.on_train_end()
    return epoch + 1


@pytest.mark.usefixtures("x64")
def test_finite_curves_stop_where_keras_stops():
    rng = np.random.default_rng(0)
    for _ in range(40):
        arguments = {
            "monitor": "val_loss",
            "patience": int(rng.integers(0, 4)),
            "min_delta": float(rng.choice([0.0, 0.125])),
            "mode": str(rng.choice(["auto", "min", "max"])),
            "baseline": [None, 0.5][rng.integers(2)],
            "start_from_epoch": int(rng.integers(0, 3)),
        }
        curve = rng.integers(0, 9, size=12) / 8
        ours, theirs = EarlyStopping(**arguments), keras.callbacks.EarlyStopping(**arguments)
        assert walk(ours, curve) == walk(theirs, curve), (arguments, curve)
        assert (ours.best, ours.best_epoch, ours.stopped_epoch) == (
            theirs.best,
            theirs.best_epoch,
            theirs.stopped_epoch,
        )


NAN, INF = math.nan, math.inf


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mode", "curve", "patience", "epochs", "best", "best_epoch"),
    [
        ("min", [NAN, 0.9, 0.8, 0.7, 0.6], 2, 5, 0.6, 4),  # Keras stops after 3 epochs here, with best = nan
        ("min", [0.9, NAN, NAN, 0.1], 2, 3, 0.9, 0),
        ("min", [0.9, NAN, 0.8, NAN, 0.7], 2, 5, 0.7, 4),
        ("min", [NAN, NAN, NAN, NAN], 3, 3, None, None),
        ("min", [INF, INF, 0.5, 0.4], 4, 4, 0.4, 3),
        ("min", [INF, INF, INF], 2, 2, None, None),
        ("max", [-INF, 0.1, NAN, 0.2], 2, 4, 0.2, 3),
        ("max", [-INF, -INF, 0.1], 2, 2, None, None),
        ("min", [0.5, -INF, NAN, NAN], 2, 4, -INF, 1),
        ("min", [NAN, NAN], 0, 2, None, None),
    ],
)
def test_nan_is_never_best_and_never_resets_the_wait(mode, curve, patience, epochs, best, best_epoch):
    callback = EarlyStopping("val_loss", patience=patience, mode=mode)
    assert walk(callback, curve) == epochs
    assert (callback.best, callback.best_epoch) == (best, best_epoch)


class Poison(keras.callbacks.Callback):
    """Makes the model's outputs NaN for the validation of some epochs."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs, self.epoch = epochs, 0

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_test_begin(self, logs=None):
        self.kept = [np.array(w) for w in self.model.get_weights()]
        if self.epoch in self.epochs:
            self.model.set_weights([w * np.nan for w in self.kept])

    def on_test_end(self, logs=None):
        self.model.set_weights(self.kept)


def noisy_model(optimizer="sgd", **arguments):
    """A model with moving statistics, so that a snapshot has to hold more than what is trained."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(momentum=0.5), keras.layers.Dense(1)])
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"], **arguments)
    return model


class Snapshots(keras.callbacks.Callback):
    """The weights after each epoch, and the logs."""

    def __init__(self):
        super().__init__()
        self.weights, self.logs = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append([np.array(w) for w in self.model.get_weights()])
        self.logs.append(dict(logs))


def assert_weights(model, expected):
    for mine, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(mine, other)


def test_nan_in_the_first_validation_of_a_real_fit():
    x, y = regression(dtype="float32")
    model, seen = noisy_model(STOCK.SGD(0.01)), Snapshots()
    stopping = EarlyStopping(patience=2, restore_best_weights=True)
    fit(model, x, y, Poison({0, 2}), stopping, seen, epochs=5, validation_data=(x, y))
    found = [logs["val_loss"] for logs in seen.logs]
    assert [math.isnan(v) for v in found] == [True, False, True, False, False]
    assert stopping.best_epoch == int(np.nanargmin(found))
    assert stopping.best == np.nanmin(found)
    assert_weights(model, seen.weights[stopping.best_epoch])


def rising():
    """A learning rate at which the loss first falls and then explodes."""
    return STOCK.SGD(0.05, momentum=0.0), {"learning_rate": lambda step: 0.05 if step < 12 else 1.9}


def test_best_weights_are_restored_when_the_epochs_are_over():
    x, y = regression(dtype="float32")
    optimizer, schedules = rising()
    model, seen = noisy_model(optimizer), Snapshots()
    stopping = EarlyStopping("val_loss", patience=50, restore_best_weights=True)
    fit(model, x, y, ScheduleHyperparameters(schedules), stopping, seen, epochs=4, validation_data=(x, y))
    found = [logs["val_loss"] for logs in seen.logs]
    assert np.nanargmin(found) < 3, found
    assert stopping.best_epoch == np.nanargmin(found)
    assert_weights(model, seen.weights[stopping.best_epoch])
    assert stopping.stopped_epoch == 0
    assert stopping.stop_reason == "The last epoch is over."


def interrupt(_):
    signal.raise_signal(signal.SIGINT)


class Failing(keras.utils.PyDataset):
    """Data that raise in the middle once they are told to."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y, self.fails = x, y, False

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.fails and index == 3:
            raise OSError("disk")
        return self.x[4 * index : 4 * index + 4], self.y[4 * index : 4 * index + 4]

    def fail(self, _):
        self.fails = True


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("later callback", RuntimeError),
        ("earlier callback", RuntimeError),
        ("epoch end of a later callback", RuntimeError),
        ("ctrl-c", KeyboardInterrupt),
        ("data", Exception),
        ("validation", Exception),
    ],
)
def test_best_weights_are_restored_when_fit_is_left(how, error):
    x, y = regression(dtype="float32")
    model, seen = noisy_model(STOCK.SGD(0.01)), Snapshots()
    stopping = EarlyStopping("loss", patience=50, restore_best_weights=True)
    callbacks, data = [seen, stopping], Failing(x, y)
    callbacks = {
        "later callback": [*callbacks, At(boom, batch=3, epoch=2)],
        "earlier callback": [At(boom, batch=3, epoch=2), *callbacks],
        "epoch end of a later callback": [*callbacks, At(boom, epoch=2)],
        "ctrl-c": [At(interrupt, batch=3, epoch=2), *callbacks],
        "data": [*callbacks, At(data.fail, epoch=1)],
        "validation": [*callbacks, At(data.fail, epoch=1)],
    }[how]
    arguments = {"x": data} if how == "data" else {"x": x, "y": y, "batch_size": 4}
    arguments |= {"validation_data": data} if how == "validation" else {}
    with pytest.raises(error, match={"ctrl-c": None, "data": "disk", "validation": "disk"}.get(how, "boom")):
        model.fit(**arguments, epochs=5, shuffle=False, verbose=0, callbacks=callbacks)
    assert len(seen.logs) in (2, 3)
    best = int(np.argmin([logs["loss"] for logs in seen.logs]))
    assert stopping.best_epoch == best
    assert_weights(model, seen.weights[best])
    assert (
        "disk" in stopping.stop_reason or "boom" in stopping.stop_reason or "KeyboardInterrupt" in stopping.stop_reason
    )
    assert model.evaluate(x, y, verbose=0)[0] > 0


def test_failure_in_the_first_epoch_restores_nothing():
    x, y = regression(dtype="float32")
    model = noisy_model()
    stopping = EarlyStopping("loss", restore_best_weights=True)
    seen = []
    at = At(lambda m: (seen.extend(np.array(w) for w in m.get_weights()), boom(m)), batch=3)
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, x, y, stopping, at)
    assert_weights(model, seen)
    assert (stopping.best, stopping.best_epoch) == (None, None)


def test_an_averaging_optimizer_ends_at_the_weights_that_were_measured():
    x, y = regression(dtype="float32")
    model, seen = noisy_model(STOCK.SGD(0.01, use_ema=True, ema_momentum=0.9)), Snapshots()
    fit(model, x, y, seen, EarlyStopping("loss", patience=9, restore_best_weights=True), epochs=3)
    assert_weights(model, seen.weights[-1])
    fit(model, x, y, seen, EarlyStopping("loss", patience=9), epochs=1)
    assert np.any(model.get_weights()[4] != seen.weights[-1][4])  # without restoring: the average


@pytest.mark.parametrize(
    ("monitor", "arguments", "epochs", "message"),
    [
        (
            "val_los",
            {"validation_split": 0.25},
            1,
            r"'loss', 'mae', 'val_loss', 'val_mae', got 'val_los'.*mean 'val_loss'",
        ),
        ("accuracy", {"validation_split": 0.25}, 1, "got 'accuracy'"),
        ("val_loss", {}, 1, "'loss', 'mae', got 'val_loss'. fit was given no validation data"),
        ("val_acc", {"validation_split": 0.25, "validation_freq": 2}, 2, "'val_loss', 'val_mae', got 'val_acc'"),
        ("acc", {"validation_split": 0.25, "validation_freq": 2}, 1, "'loss', 'mae', got 'acc'"),
    ],
)
def test_an_unknown_monitor_raises_at_the_first_epoch_that_shows_it(monitor, arguments, epochs, message):
    x, y = regression(dtype="float32")
    model, seen = noisy_model(), Snapshots()
    with pytest.raises(ValueError, match=message):
        fit(model, x, y, seen, EarlyStopping(monitor, mode="min"), epochs=4, **arguments)
    assert len(seen.logs) == epochs


def test_epochs_without_validation_are_passed_over():
    x, y = regression(dtype="float32")
    model, seen = linear_model(STOCK.SGD(1e-12), dtype="float32"), Snapshots()  # too small a step to change float32
    stopping = EarlyStopping("val_loss", patience=2)
    fit(model, x, y, seen, stopping, epochs=20, validation_data=(x, y), validation_freq=3)
    assert [i for i, logs in enumerate(seen.logs) if "val_loss" in logs] == [2, 5, 8]
    assert (stopping.best_epoch, stopping.stopped_epoch, len(seen.logs)) == (2, 8, 9)


def test_it_stops_a_real_fit_says_why_and_starts_afresh(capsys):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(1e-12), dtype="float32")  # float32 weights do not move: no epoch improves
    stopping = EarlyStopping("loss", patience=3, verbose=1, restore_best_weights=True)
    for _ in range(2):
        history = fit(model, x, y, stopping, epochs=10)
        assert len(history.history["loss"]) == 4
        assert (stopping.stopped_epoch, stopping.best_epoch, stopping.wait) == (3, 0, 3)
        assert stopping.best == history.history["loss"][0]
        best = f"{stopping.best:g}"
        assert stopping.stop_reason == f"loss was {best} in epoch 1 and has not improved for 3 epochs."
        assert capsys.readouterr().out == (
            f"EarlyStopping: {stopping.stop_reason} The weights of epoch 1 are restored.\n"
        )


def test_auto_mode_asks_keras_and_then_the_name():
    def gap(y, p):
        return ops.mean(y - p)

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, "sigmoid")])
    metrics = ["accuracy", keras.metrics.AUC(name="auc"), "mean_absolute_error", gap]
    model.compile(loss="binary_crossentropy", metrics=metrics)
    model.evaluate(np.ones((4, 3)), np.ones((4, 1)), verbose=0)
    down, up = ["val_loss", "mean_absolute_error", "val_head_loss"], ["accuracy", "val_auc", "pixel_acc"]
    for monitor in [*down, *up, "gap", "accuracy_loss"]:
        callback = EarlyStopping(monitor, patience=1)
        callback.set_model(model)
        callback.on_train_begin()
        if monitor in (*down, *up):
            callback.on_epoch_end(0, {monitor: 1.0})
            callback.on_epoch_end(1, {monitor: 2.0})
            assert callback.best == (1.0 if monitor in down else 2.0), monitor
        else:
            with pytest.raises(ValueError, match=f"mode='auto' cannot tell.*'{monitor}'.*mode='min' or 'max'"):
                callback.on_epoch_end(0, {monitor: 1.0})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": 3}, TypeError, "monitor.*3"),
        ({"patience": -1}, ValueError, "patience.*at least 0.*-1"),
        ({"patience": 1.5}, TypeError, r"patience.*1\.5"),
        ({"min_delta": -0.1}, ValueError, r"min_delta.*-0\.1"),
        ({"mode": "minimum"}, ValueError, "mode.*'auto', 'min', 'max'.*'minimum'"),
        ({"baseline": math.nan}, ValueError, "baseline.*nan"),
        ({"restore_best_weights": "yes"}, TypeError, "restore_best_weights.*'yes'"),
        ({"start_from_epoch": -2}, ValueError, "start_from_epoch.*-2"),
        ({"verbose": 2}, ValueError, "verbose.*2"),
    ],
)
def test_early_stopping_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**arguments)


@pytest.mark.usefixtures("x64")
def test_a_monitor_that_is_no_number_raises():
    with pytest.raises(ValueError, match=r"'val_f1' must be one number, got one of shape \(2,\)"):
        walk(EarlyStopping("val_f1"), [np.zeros(2)], name="val_f1")


# -- being told of failure --------------------------------------------------------------------------------------------


def test_fit_keeps_its_signature_and_is_wrapped_once():
    EarlyStopping()
    wrapped = keras.Model.fit
    EarlyStopping()
    assert keras.Model.fit is wrapped
    assert list(inspect.signature(keras.Model.fit).parameters)[:5] == ["self", "x", "y", "batch_size", "epochs"]
    assert keras.Model.fit.__doc__ == wrapped.__wrapped__.__doc__


def test_a_failing_callback_does_not_hide_the_first_error_from_others():
    class Clumsy(EarlyStopping):
        def on_train_failure(self, error):
            raise OSError("no space left")

    x, y = regression(dtype="float32")
    model, seen = noisy_model(STOCK.SGD(0.01)), Snapshots()
    stopping = EarlyStopping("loss", patience=9, restore_best_weights=True)
    with pytest.raises(RuntimeError, match="boom") as caught:
        fit(model, x, y, stopping, Clumsy("loss"), seen, At(boom, batch=3, epoch=2), epochs=4)
    assert "OSError('no space left')" in caught.value.__notes__[0]
    assert_weights(model, seen.weights[int(np.argmin([logs["loss"] for logs in seen.logs]))])


def test_only_the_fit_that_failed_is_told():
    """A model trained by a callback of another one's fit may fail without ending that."""
    x, y = regression(dtype="float32")
    outer, inner = noisy_model(), noisy_model()
    stopping, within = EarlyStopping("loss", patience=9), EarlyStopping("loss", patience=9)

    def train_inner(_):
        with contextlib.suppress(RuntimeError):
            fit(inner, x, y, within, At(boom, batch=1))

    fit(outer, x, y, stopping, At(train_inner, epoch=0))
    assert within.stop_reason == "RuntimeError: boom"
    assert stopping.stop_reason == "The last epoch is over."


def test_bad_arguments_of_fit_are_still_for_keras_to_refuse():
    with pytest.raises(TypeError, match="no_such_argument"):
        noisy_model().fit(*regression(), no_such_argument=1, callbacks=[EarlyStopping("loss")])


# -- the suite finds what is wrong ------------------------------------------------------------------------------------


class Meddles(ok.callbacks.EarlyStopping):
    """Claims to be passive and is not."""

    def on_train_batch_begin(self, batch, logs=None):
        self.model.optimizer.learning_rate = 0.01 if batch else 0.1


class LosesItsConfig(ok.callbacks.EarlyStopping):
    def get_config(self):
        return super().get_config() | {"patience": 7}


@pytest.mark.parametrize(("wrong", "failing"), [(Meddles, "is_passive"), (LosesItsConfig, "config_round_trip")])
def test_suite_fails_a_wrong_callback(wrong, failing):
    keras.saving.register_keras_serializable("test_callbacks")(wrong)
    case = {"monitor": "loss", "patience": 3}
    card = ok.Card(name=wrong.__name__, kind="callback", make=wrong, tags={"passive"}, cases=(case,))
    (check,) = (c for c in ok.testing.checks_for(card) if c.name == failing)
    with pytest.raises(AssertionError):
        check(card)

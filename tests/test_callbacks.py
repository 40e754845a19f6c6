"""Callbacks in real training, against hand-written loops in NumPy."""

import contextlib
import importlib
import inspect
import json
import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from small import At, Snapshots, assert_weights, boom, counting_model, fit, linear_model, noisy_model, regression

import keras_optkit as ok
from keras_optkit.callbacks import EarlyStopping, ScheduleHyperparameters
from keras_optkit.callbacks.callback import Callback
from keras_optkit.fit.run import ON_FAILURE
from keras_optkit.schedules import Cosine, Linear, OneCycle, Warmup

STOCK = keras.optimizers


def gradients(x, y, w, batch):
    """The gradient of one batch after the other; `w` is read anew each time."""
    while True:
        for i in range(0, len(x), batch):
            a, b = x[i : i + batch], y[i : i + batch]
            yield 2 * a.T @ (a @ w[-1] - b) / len(a)


JAX = keras.config.backend() == "jax"

#: Relative. Keras computes cosines, and so the schedules below, in float32 on JAX, whatever the dtype.
DIGITS = 1e-6 if JAX else 1e-12


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


@pytest.mark.once
@pytest.mark.few(1)
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


@pytest.mark.once
@pytest.mark.few(2)
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


@pytest.mark.only_on("tensorflow", because="on JAX, Keras builds optimizers before the first step")
@pytest.mark.parametrize("make", [STOCK.SGD, STOCK.RMSprop])
def test_keras_s_optimizers_that_the_first_step_builds_have_the_momentum_that_is_driven(make):
    x, y = regression(dtype="float32")
    trained = []
    for momentum in (0.0, 0.5):
        model = linear_model(make(0.02, momentum=momentum), dtype="float32")
        fit(model, x, y, ScheduleHyperparameters({"momentum": MOMENTUM}), epochs=1)
        trained.append(model.get_weights()[0])
    np.testing.assert_array_equal(*trained)


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


# -- being told of failure --------------------------------------------------------------------------------------------


def test_fit_keeps_its_signature_and_is_wrapped_once():
    wrapped = keras.Model.fit
    importlib.reload(ok)
    assert keras.Model.fit is wrapped
    assert list(inspect.signature(keras.Model.fit).parameters)[:5] == ["self", "x", "y", "batch_size", "epochs"]
    assert keras.Model.fit.__doc__ == inspect.unwrap(keras.Model.fit).__doc__


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


def test_all_hooks_are_declared_in_the_base_class():
    """What is asked of callbacks by name, anywhere in the package, is an attribute of the base, with a description."""
    package = Path(ok.__file__).parent
    asked = set(ON_FAILURE.values())
    for name in ("callbacks/averaging.py", "callbacks/stock.py", "fit/run.py"):
        source = (package / name).read_text()
        asked |= set(re.findall(r"(?:has|get)attr\((?:callback|c|part), \"(\w+)\"", source))
    assert {"prepare_fit", "state_dict", "load_state_dict", "stateless", "sees_training_weights"} < asked
    assert [name for name in sorted(asked) if not hasattr(Callback, name)] == []

"""Compiled training steps with instruments: kept from `fit` to `fit`, and never a stale one."""

import copy
import gc
import pickle
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from test_callbacks import STOCK, fit, linear_model, numpy_sgd, regression
from test_monitor import events

import keras_optkit as ok
from keras_optkit.callbacks import NonFiniteGuard, ScheduleHyperparameters, TrainingMonitor
from keras_optkit.fit.steps import KEPT
from keras_optkit.schedules import Linear
from keras_optkit.testing import problems

MOMENTUM = Linear(0.5, 100, final=0.9)


class Traced:
    """A loss that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, y, prediction):
        self.count += 1
        return ops.mean(ops.square(prediction - y))


def model_with(optimizer, **arguments):
    loss = Traced()
    start = keras.initializers.Constant(0.5)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=start)])
    model.compile(optimizer, loss=loss, **arguments)
    return model, loss


def callbacks_of(directory):
    return [
        TrainingMonitor(directory, every=3),
        NonFiniteGuard(verbose=0),
        ScheduleHyperparameters({"momentum": MOMENTUM, "weight_decay": lambda step: 0.001 * step}),
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_a_step_is_traced_once_for_all_fits(room, tmp_path):
    """Also with new callbacks, and it does what it did at first."""
    x, y = regression(dtype="float32")
    model, loss = model_with(room.SGD(0.05, momentum=0.1))
    counts = []
    callbacks = callbacks_of(tmp_path)
    for _ in range(3):
        fit(model, x, y, *callbacks, epochs=1)
        counts.append(loss.count)
        callbacks = callbacks_of(tmp_path)
    assert counts[1:] == [counts[0]] * 2
    rates = lambda t: 0.05  # noqa: E731, ARG005
    expected = numpy_sgd(x, y, 18, rates, lambda t: 0.5 + 0.004 * t, lambda t: 0.001 * t)
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-4)
    assert [step for step, _ in events(tmp_path)["train/loss"]] == [1, 2, 3, 6, 9, 12, 15, 18]


def set_momentum(model):
    model.optimizer.momentum = 0.7


def compile_again(model):
    model.compile(model.optimizer, loss=model.loss)


def other_schedule(_):
    return ScheduleHyperparameters({"weight_decay": Linear(0.2, 100)})


def run_eagerly(model):
    model.run_eagerly = True


def several_steps(model):
    model.steps_per_execution = 2


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("change", "room"),
    [
        (set_momentum, STOCK),
        (set_momentum, ok.optimizers),
        (compile_again, STOCK),
        (other_schedule, ok.optimizers),
        (run_eagerly, STOCK),
        (several_steps, STOCK),
    ],
)
def test_a_step_is_traced_again_when_what_it_depends_on_has_changed(change, room, tmp_path):
    x, y = regression(dtype="float32")
    model, loss = model_with(room.SGD(0.05, momentum=0.1))
    monitor, schedule = TrainingMonitor(tmp_path, every=2), ScheduleHyperparameters({"weight_decay": Linear(0.1, 100)})
    fit(model, x, y, monitor, schedule, epochs=1)
    before = loss.count
    schedule = change(model) or schedule
    fit(model, x, y, monitor, schedule, epochs=1)
    assert loss.count > before

    def momentum(t):
        return 0.7 if change is set_momentum and t >= 6 else 0.1

    def decay(t):
        return (0.2 if change is other_schedule and t >= 6 else 0.1) * (1 - t / 100)

    expected = numpy_sgd(x, y, 12, lambda _: 0.05, momentum, decay)
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-4)


@pytest.mark.once
def test_steps_that_nobody_looks_at_are_not_stale_either(tmp_path):
    """With a monitor some steps compute for it and others do not, and a hyperparameter is for all of them."""
    x, y = regression(dtype="float32")
    model, _ = model_with(STOCK.SGD(0.05, momentum=0.1))
    for momentum in (0.1, 0.7, 0.3):
        model.optimizer.momentum = momentum
        fit(model, x, y, TrainingMonitor(tmp_path, every=4), epochs=1)
    expected = numpy_sgd(x, y, 18, lambda _: 0.05, lambda t: (0.1, 0.7, 0.3)[t // 6], lambda _: 0.0)
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-4)


def test_a_callback_that_is_not_used_again_does_nothing_and_is_not_held(tmp_path):
    x, y = regression(dtype="float32")
    model, loss = model_with(STOCK.SGD(0.05, momentum=0.1))
    fit(model, x, y, epochs=1)
    step, found = model.train_function, set(vars(model))
    callbacks = [TrainingMonitor(tmp_path, every=1), NonFiniteGuard()]
    held = [weakref.ref(callback) for callback in callbacks]
    fit(model, x, y, *callbacks, epochs=1)
    assert model.train_function is step
    assert {name for name in set(vars(model)) - found if not name.startswith("_keras_optkit")} == set()
    traced = loss.count
    fit(model, x, y, epochs=1)
    assert loss.count == traced
    assert len(events(tmp_path)["train/loss"]) == 6
    del callbacks
    model.history = None
    gc.collect()
    assert [callback() for callback in held] == [None, None]


def test_a_model_is_not_held_by_its_steps_nor_by_callbacks(tmp_path):
    x, y = regression(4, dtype="float32")
    guard = NonFiniteGuard()
    model, _ = model_with("sgd")
    fit(model, x, y, TrainingMonitor(tmp_path), guard, epochs=1)
    guard.set_model(None)  # by which Keras's own attribute lets go
    held = weakref.ref(model)
    del model
    keras.utils.clear_session(free_memory=True)
    gc.collect()
    assert held() is None


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda callback: pickle.loads(pickle.dumps(callback))])
def test_callbacks_can_be_copied_after_fit_as_before(copied, tmp_path):
    x, y = regression(8, dtype="float32")
    y[1] = np.nan
    model = linear_model(STOCK.SGD(0.05, momentum=0.1), dtype="float32")
    monitor, guard = TrainingMonitor(tmp_path, every=1), NonFiniteGuard(verbose=0)
    schedule = ScheduleHyperparameters({"momentum": MOMENTUM})
    fit(model, x, y, monitor, guard, schedule)
    assert str(copied(guard).failures) == str(guard.failures)
    assert copied(schedule).schedules["momentum"].get_config() == MOMENTUM.get_config()
    fit(model, x, y, copied(monitor), epochs=1)
    steps = [step for step, _ in events(tmp_path)["train/loss"]]
    assert steps == sorted(set(steps))


def test_what_is_kept_is_limited():
    x, y = regression(4, dtype="float32")
    model, _ = model_with(STOCK.SGD(0.05, momentum=0.1), run_eagerly=True)
    for n in range(2 * KEPT):
        fit(model, x, y, ScheduleHyperparameters({"momentum": Linear(0.5, 100 + n)}), epochs=1)
    steps = vars(model)["_keras_optkit_steps"]
    assert len(steps._kept) == len(steps._idle) == len(steps._keys) == KEPT


def test_two_of_a_kind_in_one_fit_are_two(tmp_path):
    x, y = regression(dtype="float32")
    model, loss = model_with("sgd")
    traced = []
    for _ in range(2):
        fit(model, x, y, TrainingMonitor(tmp_path / "a", every=1), TrainingMonitor(tmp_path / "b", every=1), epochs=1)
        traced.append(loss.count)
    assert events(tmp_path / "a")["train/gradient_norm"] == events(tmp_path / "b")["train/gradient_norm"]
    assert len(events(tmp_path / "b")["train/loss"]) == 12
    assert traced[0] == traced[1]


@pytest.mark.few(3)
@pytest.mark.parametrize("when", ["between", "inside"])
@pytest.mark.parametrize(
    "make",
    [
        lambda limit: ok.optimizers.SGD(0.1, transforms=[ok.optimizers.transforms.ClipByValue(limit)]),
        lambda beta: ok.optimizers.SGD(0.1, groups=[ok.Group("kernel", rule=ok.optimizers.SGD(momentum=beta))]),
        lambda beta: ok.optimizers.SGD(0.1, momentum=beta),
    ],
    ids=["transform", "group", "rule"],
)
def test_a_variable_that_is_assigned_acts_in_compiled_steps(make, when):
    """On JAX, too, where a compiled step has every variable in it as a constant that is not part of the state."""
    x, y = problems.regression()

    def end(value):
        keras.utils.set_random_seed(0)
        variable = keras.Variable(0.9)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
        model.compile(make(variable), "mse")
        model.fit(x, y, batch_size=16, epochs=1, shuffle=False, verbose=0)
        assign = keras.callbacks.LambdaCallback(on_epoch_begin=lambda *_: variable.assign(value))
        if when == "between":
            variable.assign(value)
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0, callbacks=[assign] if when == "inside" else [])
        assert float(variable) == pytest.approx(value)
        return model.get_weights()[0]

    assert np.max(np.abs(end(0.1) - end(0.9))) > 1e-3

"""What is particular about training on JAX, where a step is a pure function that is told of state and gives it back."""

import warnings
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.rules.sgd import SGDRule
from keras_optkit.testing import problems

pytestmark = pytest.mark.only_on("jax", because="these are JAX's ways")


def fit(model, **how):
    x, y = problems.regression()
    return model.fit(x, y, batch_size=16, shuffle=False, verbose=0, **how)


def half_frozen(optimizer):
    model = problems.network()
    model.layers[0].trainable = False
    model.compile(optimizer, loss="mse")
    fit(model)
    model.layers[0].trainable = True
    model.make_train_function(force=True)
    return model


def test_a_layer_that_is_thawed_joins_when_fit_begins():
    model = half_frozen(ok.optimizers.SGD(0.05))
    fresh = problems.network()
    fresh.compile(ok.optimizers.SGD(0.05), loss="mse")
    fresh.set_weights(model.get_weights())
    for each in (model, fresh):
        fit(each)
    for got, expected in zip(model.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert int(model.optimizer.iterations) == 8


def test_state_of_a_layer_that_is_thawed_is_its_own():
    model = half_frozen(ok.optimizers.SGD(0.05, momentum=0.9))
    fit(model)
    state = problems.state_of(model.optimizer)
    shapes = [tuple(v.shape) for v in model.trainable_variables]
    assert [state[f"slot.v.{i}"].shape for i in range(len(shapes))] == shapes
    assert all(np.any(state[f"slot.v.{i}"]) for i in range(len(shapes)))


def test_a_layer_that_is_frozen_is_refused_before_anything_is_lost():
    model = problems.network()
    model.compile(ok.optimizers.SGD(0.05), loss="mse")
    fit(model)
    before = model.get_weights()
    model.layers[0].trainable = False
    for train in (fit, lambda m: m.train_on_batch(*problems.regression())):
        with pytest.raises(ValueError, match="built for 6 variables and cannot continue with 4 on the jax backend"):
            train(model)
    model.layers[0].trainable = True  # this decides about the order of the weights
    for got, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_loss_scaling_has_no_room_for_more_variables():
    model = half_frozen(keras.optimizers.LossScaleOptimizer(ok.optimizers.SGD(0.05)))
    with pytest.raises(ValueError, match="built for 4 variables and cannot continue with 6"):
        fit(model)


class BrokenRule(SGDRule):
    def update(self, u, slots, p, h):
        raise RuntimeError("boom")


@pytest.mark.parametrize("common", [{"use_ema": True}, {"skip_nonfinite": 2}])
def test_what_the_first_step_raises_comes_out_of_fit_alone(common):
    model = problems.network()
    model.compile(Optimizer(0.05, BrokenRule(), **common), loss="mse")
    with pytest.raises(RuntimeError, match="boom") as raised:
        fit(model)
    assert raised.value.__context__ is None


@dataclass(frozen=True)
class RememberingRule(SGDRule):
    """Keeps where it started, in a slot whose initial value is the parameter itself."""

    def slots(self):
        return {"origin": lambda p: p}

    def update(self, u, slots, p, h):
        return h.learning_rate * u, slots


def test_a_slot_that_begins_at_the_parameter_does_not_share_its_memory():
    model = problems.network()
    optimizer = Optimizer(0.05, RememberingRule())
    optimizer.pack_below = 0
    model.compile(optimizer, loss="mse")
    origin = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    fit(model)  # JAX refuses to give away one buffer twice
    state = problems.state_of(optimizer)
    for i, value in enumerate(origin):
        np.testing.assert_array_equal(state[f"slot.origin.{i}"], value)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.999, 0.999999])
def test_bias_correction_has_all_digits_of_float32(beta):
    assert ok.precision.scalar_dtype() == "float32"
    for step in (1, 2, 10, 1000):
        h = ok.optimizers.rule.Hyper(ops.convert_to_tensor(step - 1), ops.convert_to_tensor(0.1), "float32")
        exact = -np.expm1(step * np.log1p(beta - 1)) if beta else 1.0
        np.testing.assert_allclose(ops.convert_to_numpy(h.bias_correction(beta)), exact, rtol=3e-7)


def test_a_rate_is_written_as_it_was_given():
    config = ok.optimizers.SGD(0.1).get_config()
    assert config["learning_rate"] == 0.1
    assert np.float32(config["learning_rate"]) == ops.convert_to_numpy(ok.optimizers.SGD(0.1).learning_rate)


AVERAGING = {
    "ema": lambda: ok.optimizers.Adam(0.02, use_ema=True, ema_momentum=0.8),
    "schedule-free": lambda: ok.optimizers.ScheduleFreeSGD(0.2),
    "keras": lambda: keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.8),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(ok.optimizers.Lookahead("SGD", 3, learning_rate=0.05)),
}


def compiled(name):
    model = problems.network()
    model.compile(AVERAGING[name](), loss="mse")
    return model


def weights(model):
    return [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


class Probe(keras.callbacks.Callback):
    """Notes the weights after each batch and each epoch."""

    def on_train_begin(self, logs=None):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.batches.append(weights(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(weights(self.model))


class Fails(keras.callbacks.Callback):
    """Raises in the second epoch."""

    def __init__(self, moment):
        super().__init__()
        self.epoch = 0
        setattr(self, moment, self.fail)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def fail(self, *_, **__):
        if self.epoch == 1:
            raise RuntimeError("boom")


@pytest.mark.parametrize("name", AVERAGING)
def test_epochs_end_with_averaged_weights_and_batches_with_those_of_training(name):
    plain, hidden, shown = compiled(name), Probe(), Probe()
    fit(plain, epochs=2, callbacks=[hidden])
    once, model = compiled(name), compiled(name)
    fit(once)
    data = problems.regression()
    fit(model, epochs=2, validation_data=data, callbacks=[shown, ok.callbacks.AveragedWeights()])
    for got, expected in zip(shown.epochs, map(weights, (once, plain)), strict=True):
        same(got, expected)
    for got, expected in zip(shown.batches, hidden.batches, strict=True):
        same(got, expected)
    assert any(np.any(a != b) for a, b in zip(shown.epochs[-1], shown.batches[-1], strict=True))


@pytest.mark.each_once
@pytest.mark.parametrize("moment", ["on_train_batch_end", "on_test_batch_end", "on_epoch_end"])
@pytest.mark.parametrize("name", ["ema", "schedule-free"])
def test_after_an_exception_the_model_is_as_without_the_callback(name, moment):
    models = []
    for callbacks in ([], [ok.callbacks.AveragedWeights()]):
        models.append(compiled(name))
        with pytest.raises(RuntimeError, match="boom") as raised:
            fit(models[-1], epochs=3, validation_data=problems.regression(), callbacks=[Fails(moment), *callbacks])
        assert not hasattr(raised.value, "__notes__")
    same(*map(weights, models))
    for model in models:
        fit(model)
    same(*map(weights, models))


def test_training_with_averages_of_keras_can_go_on_after_an_exception():
    """Without the callback it cannot: Keras leaves weights and averages in the same memory."""
    model = compiled("keras")
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, epochs=3, callbacks=[Fails("on_train_batch_end"), ok.callbacks.AveragedWeights()])
    before = weights(model)
    fit(model)
    assert all(np.isfinite(w).all() for w in weights(model))
    assert any(np.any(a != b) for a, b in zip(weights(model), before, strict=True))


def test_averaged_weights_cover_up_no_error_of_the_first_step():
    model = problems.network()
    model.compile(Optimizer(0.05, BrokenRule(), use_ema=True), loss="mse")
    with pytest.raises(RuntimeError, match="boom") as raised:
        fit(model, callbacks=[ok.callbacks.AveragedWeights()])
    assert not any("AveragedWeights" in note for note in getattr(raised.value, "__notes__", ()))


def test_too_many_gradients_that_are_not_finite_raise_at_the_end_of_fit():
    x, y = problems.regression()
    x[:32] = np.nan
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(ok.optimizers.SGD(0.05, skip_nonfinite=3), loss="mse")
    model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
    assert model.optimizer.nonfinite[:2] == (2, 0)
    with pytest.raises(FloatingPointError, match="3 non-finite gradients in a row"):
        model.fit(np.full_like(x[:48], np.nan), y[:48], batch_size=16, verbose=0)
    assert np.isfinite(model.get_weights()[0]).all()


def test_each_micro_batch_may_have_other_gradients():
    import jax

    optimizer = ok.optimizers.SGD(1.0, momentum=0.5, gradient_accumulation_steps=2)
    variables = [keras.Variable(np.ones(2, "float32")) for _ in range(3)]
    optimizer.build(variables)
    one = np.full(2, 2.0, "float32")

    def step(*which):
        grads = [one if i in which else None for i in range(3)]
        return jax.jit(lambda weights, state: optimizer.stateless_apply(state, grads, weights))

    first, second = step(0), step(1)
    weights, state = [v.value for v in variables], [v.value for v in optimizer.variables]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
        for call in (first, second, second, first, first, first):
            weights, state = call(weights, state)
    assert [float(w[0]) for w in weights] == [-4.25, -1.5, 1.0]


def test_parameters_of_one_shape_are_packed_in_equal_buckets():
    variables = [keras.Variable(np.ones(shape, "float32")) for shape in [(3,), *[(2, 2)] * 20, (3,)]]
    optimizer = ok.optimizers.Adam(0.1, decay_mask="all")
    optimizer.build(variables)
    assert [b.indices for b in optimizer._held.buckets] == [
        (0, 17, 18, 19, 20, 21),
        tuple(range(1, 9)),
        tuple(range(9, 17)),
    ]

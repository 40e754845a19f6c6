"""ReduceLROnPlateau against Keras's and torch's, and on the losses of single batches against loops in NumPy."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from small import Alternating, At, counting_model, fit, interrupted, linear_model, regression
from torch_references import in_torch, plateau_run

import keras_optkit as ok
from keras_optkit.callbacks import ReduceLROnPlateau
from keras_optkit.schedules import Linear
from keras_optkit.testing.problems import two_replicas

STOCK = keras.optimizers
NAN, INF = math.nan, math.inf


def rate(model):
    return float(ops.convert_to_numpy(model.optimizer.learning_rate))


def walk(callback, curve, optimizer=None):
    """The learning rate after each epoch of a curve of validation losses."""
    model = linear_model(STOCK.SGD(1.0) if optimizer is None else optimizer, dtype="float32")
    callback.set_model(model)
    callback.on_train_begin()
    rates = []
    for epoch, value in enumerate(curve):
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"loss": 1.0, "val_loss": value})
        rates.append(rate(model))
    return rates


def curves(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng, rng.integers(0, 9, size=24) / 8


@pytest.mark.few(1)
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_finite_curves_give_the_rates_of_keras(room):
    for rng, curve in curves(30):
        arguments = {
            "factor": float(rng.choice([0.1, 0.5])),
            "patience": int(rng.integers(0, 4)),
            "min_delta": float(rng.choice([0.0, 0.125])),
            "mode": str(rng.choice(["auto", "min", "max"])),
            "cooldown": int(rng.integers(0, 4)),
            "min_lr": float(rng.choice([0.0, 0.2])),
        }
        found = walk(ReduceLROnPlateau(**arguments), curve, room.SGD(1.0))
        expected = walk(keras.callbacks.ReduceLROnPlateau(**arguments), curve)
        assert min(expected) < 1
        assert found == pytest.approx(expected, rel=1e-6), (arguments, curve)


def test_finite_curves_give_the_rates_of_torch():
    """torch waits one epoch longer than its patience, and its cooldown, if there is one, lasts one epoch longer."""
    for rng, curve in curves(30):
        patience, cooldown = int(rng.integers(0, 4)), int(rng.integers(0, 4))
        mode, delta = str(rng.choice(["min", "max"])), float(rng.choice([0.0, 0.125]))
        arguments = (mode, 0.5, patience, delta, "abs", cooldown)
        expected = in_torch(plateau_run, curve, arguments, min_lr=0.0625, eps=0)
        ours = ReduceLROnPlateau(
            factor=0.5,
            patience=patience + 1,
            mode=mode,
            min_delta=delta,
            cooldown=cooldown + 1 if cooldown else 0,
            min_lr=0.0625,
        )
        assert walk(ours, curve) == expected, (patience, cooldown, mode, delta, curve)


@pytest.mark.parametrize(
    ("mode", "curve", "rates"),
    [
        ("min", [NAN, 1.0, 0.5, 0.25, 0.125], [1, 1, 1, 1, 1]),  # with Keras's, NaN stays the best
        ("min", [1.0, NAN, INF, NAN, 0.5], [1, 1, 0.5, 0.5, 0.5]),
        ("min", [NAN, NAN, NAN, NAN], [1, 0.5, 0.5, 0.25]),
        ("max", [-INF, 0.5, NAN, -INF], [1, 1, 1, 0.5]),
        ("min", [1.0, -INF, NAN, 1.0], [1, 1, 1, 0.5]),
    ],
)
def test_nan_is_never_best_and_never_resets_the_wait(mode, curve, rates):
    assert walk(ReduceLROnPlateau(factor=0.5, patience=2, mode=mode), curve) == rates


def test_over_a_schedule_it_is_the_multiplier_that_is_lowered():
    x, y = regression(dtype="float32")
    schedule = Linear(0.5, 24, final=0.125)
    model = linear_model(ok.optimizers.SGD(schedule), dtype="float32")
    seen = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda *_, **__: seen.append(rate(model)))
    plateau = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9)
    history = fit(model, x, y, plateau, look, epochs=4).history
    scheduled = np.array([0.5 - 0.375 * t / 24 for t in (6, 12, 18, 24)])
    np.testing.assert_allclose(seen, scheduled * [1, 0.5, 0.25, 0.125], rtol=1e-6)
    np.testing.assert_allclose(history["learning_rate"], scheduled * [1, 1, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda o: o, STOCK.LossScaleOptimizer], ids=["plain", "loss scaling"])
def test_a_schedule_in_an_optimizer_of_keras_is_refused_before_training(wrap):
    model = linear_model(wrap(STOCK.SGD(STOCK.schedules.CosineDecay(0.1, 10))), dtype="float32")
    with pytest.raises(TypeError, match=r"cannot lower the learning rate of this SGD, which is a schedule.*or take"):
        fit(model, *regression(dtype="float32"), ReduceLROnPlateau("loss"))
    np.testing.assert_array_equal(model.get_weights()[0], 0.5)


def test_under_loss_scaling_the_rate_inside_is_lowered():
    model = linear_model(STOCK.LossScaleOptimizer(STOCK.SGD(0.5)), dtype="float32")
    fit(model, *regression(dtype="float32"), ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9))
    assert rate(model) == 0.25


def test_an_unknown_monitor_raises_with_the_names_that_there_are():
    model = linear_model("sgd", dtype="float32")
    with pytest.raises(ValueError, match=r"'learning_rate', 'loss', got 'los'.*mean 'loss'"):
        fit(model, *regression(dtype="float32"), ReduceLROnPlateau("los", mode="min"))


def test_it_says_what_it_does(capsys):
    walk(ReduceLROnPlateau(factor=0.5, patience=1, verbose=1), [1.0, 1.0])
    assert capsys.readouterr().out == "ReduceLROnPlateau: epoch 2, learning rate 1 -> 0.5\n"


# -- several optimizers -----------------------------------------------------------------------------------------------

LOWERING = {"factor": 0.5, "patience": 1, "min_delta": 1e9}


def rates(*optimizers):
    return [float(ops.convert_to_numpy(optimizer.learning_rate)) for optimizer in optimizers]


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
@pytest.mark.parametrize("compiled", [{}, {"optimizer": None}], ids=["unused default", "none"])
def test_the_rates_of_all_optimizers_that_the_model_holds_are_lowered(compiled, capsys):
    first, second = ok.optimizers.SGD(Linear(0.5, 48, final=0.5), name="same"), STOCK.SGD(0.25, name="same")
    model = Alternating(first, second)
    model.compile(**compiled)
    plateau = ReduceLROnPlateau("loss", verbose=1, **LOWERING)
    history = fit(model, *regression(dtype="float32"), plateau, epochs=3).history
    assert rates(first, second) == [0.125, 0.0625]
    rates_in_logs = {name: values for name, values in history.items() if name.startswith("learning_rate")}
    assert rates_in_logs == {
        "learning_rate_first": [0.5, 0.5, 0.25],
        "learning_rate_others/second/0": [0.25, 0.25, 0.125],
    }
    said = "ReduceLROnPlateau: epoch 2, learning rate of "
    assert f"{said}first 0.5 -> 0.25\n{said}others/second/0 0.25 -> 0.125\n" in capsys.readouterr().out


def test_the_rates_inside_a_multi_optimizer_are_lowered():
    """Which one of Keras's learns of, where it is given a function, once the model is built."""
    first, second = ok.optimizers.SGD(0.5), STOCK.SGD(0.25)
    multi = STOCK.MultiOptimizer(lambda variable: first if "kernel" in variable.path else second)
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(multi, loss="mse")
    history = fit(model, *regression(dtype="float32"), ReduceLROnPlateau("loss", **LOWERING), epochs=3).history
    assert rates(first, second) == [0.125, 0.0625]
    assert [history["learning_rate_0"][-1], history["learning_rate_1"][-1]] == [0.25, 0.125]


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
def test_a_model_without_optimizers_is_refused():
    model = Alternating(None, None, updates=(0, 0))
    model.compile(optimizer=None)
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau lowers the learning rates .* 'alternating.*' has none"):
        fit(model, *regression(dtype="float32"), ReduceLROnPlateau("loss"))


# -- by updates -------------------------------------------------------------------------------------------------------


def numpy_plateau(losses, counts, *, factor, patience, cooldown, smoothing, min_delta, start=1.0):
    """The rate after each look, and the best value; losses[i] is the mean over counts[i] updates."""
    rates, now, best, wait, left = [], start, math.inf, 0, 0
    total, weight = 0.0, 0.0
    for loss, n in zip(losses, counts, strict=True):
        kept = smoothing**n
        total, weight = kept * total + (1 - kept) * loss, kept * weight + 1 - kept
        if left:
            left = max(left - n, 0)
        if total / weight + min_delta < best:
            best, wait = total / weight, 0
        elif not left:
            wait += n
            if wait >= patience:
                now, left, wait = now * factor, cooldown, 0
        rates.append(now)
    return rates, best


class Rates(keras.callbacks.Callback):
    stateless = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(rate(self.model))


SETTINGS = {"factor": 0.5, "patience": 2, "cooldown": 2, "smoothing": 0.5, "min_delta": 0.0}


def losses(n=24, seed=3):
    return (np.random.default_rng(seed).integers(8, 64, size=n) / 8).astype("float32")


X24 = losses()


@pytest.mark.parametrize(("steps_per_execution", "accumulate"), [(1, None), (3, None), (1, 2)])
def test_by_updates_it_goes_by_the_smoothed_loss_of_the_batches(steps_per_execution, accumulate):
    """Of a model whose loss is its input: over two epochs with a validation in between."""
    x = losses() + np.linspace(8, 0, 24, dtype="float32")  # so that the best value is not the first
    optimizer = ok.optimizers.SGD(1e-12, gradient_accumulation_steps=accumulate)
    model = counting_model(optimizer, steps_per_execution=steps_per_execution)
    seen = Rates()
    plateau = ReduceLROnPlateau("loss", unit="update", **SETTINGS)
    fit(model, x[:, None], x, plateau, seen, batch_size=2, validation_data=(x[:3, None], x[:3]))
    per = steps_per_execution * (accumulate or 1)
    means = np.tile(x.reshape(-1, 2 * per).mean(axis=1), 2)
    expected, best = numpy_plateau(means, [steps_per_execution] * len(means), start=1e-12, **SETTINGS)
    found = seen.seen[(accumulate or 1) - 1 :: accumulate or 1]
    assert min(expected) < 1e-12
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert plateau.best == pytest.approx(best, rel=1e-6)


def test_an_update_that_loss_scaling_skips_is_not_counted():
    x = np.array([4, 3, INF, 3, 3, 3], "float32")
    model = counting_model(STOCK.LossScaleOptimizer(STOCK.SGD(1e-12), initial_scale=2.0))
    seen = Rates()
    plateau = ReduceLROnPlateau("loss", unit="update", factor=0.5, patience=2, smoothing=0.0)
    fit(model, x[:, None], x, plateau, seen, batch_size=1, epochs=1)
    assert min(seen.seen) == pytest.approx(1e-12)  # from the infinite loss on, the epoch is skipped
    fit(model, np.full((4, 1), 3, "float32"), x[:4], plateau, seen, batch_size=1, epochs=1)
    np.testing.assert_allclose(seen.seen[-4:], np.array([1, 1, 0.5, 0.5]) * 1e-12, rtol=1e-6)


@pytest.mark.each_once
@pytest.mark.parametrize(
    "disturb",
    [
        lambda model: model.evaluate(100 + X24[:, None], X24, batch_size=5, verbose=0),
        lambda model: model.test_on_batch(100 + X24[:, None], X24),
        lambda model: model.reset_metrics(),
        lambda model: (model.reset_metrics(), model.evaluate(X24[:, None], X24, verbose=0), model.reset_metrics()),
    ],
    ids=["evaluate", "test_on_batch", "reset_metrics", "several"],
)
@pytest.mark.parametrize("before", [True, False])
def test_what_callbacks_evaluate_in_between_is_left_out(before, disturb):
    model = counting_model(STOCK.SGD(1e-12))
    seen, plateau = Rates(), ReduceLROnPlateau("loss", unit="update", **SETTINGS)
    disturbing = [At(disturb, batch=b) for b in (2, 3, 7)]
    callbacks = [*disturbing, plateau, seen] if before else [plateau, seen, *disturbing]
    fit(model, X24[:, None], X24, *callbacks, batch_size=2)
    means = np.tile(X24.reshape(-1, 2).mean(axis=1), 2)
    expected, best = numpy_plateau(means, [1] * 24, start=1e-12, **SETTINGS)
    np.testing.assert_allclose(seen.seen, expected, rtol=1e-6)
    assert plateau.best == pytest.approx(best, rel=1e-5)


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
def test_several_updates_in_a_step_are_all_counted():
    model = Alternating(STOCK.SGD(0.0), STOCK.SGD(0.0), updates=(1, 3))
    model.compile()
    plateau = ReduceLROnPlateau("loss", unit="update", patience=10**6)
    fit(model, *regression(dtype="float32"), plateau)
    assert plateau.wait == 3 * 11  # the first of the 12 losses is the best; rates of 0 change nothing


@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
def test_with_two_replicas_it_is_the_loss_of_the_global_batch():
    x = losses()
    with two_replicas().scope():
        model = counting_model(STOCK.SGD(1e-12))
    seen = Rates()
    fit(model, x[:, None], x, ReduceLROnPlateau("loss", unit="update", **SETTINGS), seen, batch_size=4, epochs=1)
    means = x.reshape(-1, 4).mean(axis=1)
    np.testing.assert_allclose(seen.seen, numpy_plateau(means, [1] * 6, start=1e-12, **SETTINGS)[0], rtol=1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("unit", "batch", "every"), [("epoch", None, "epoch"), ("update", None, "epoch"), ("update", 4, 3)]
)
def test_it_goes_on_after_an_interruption(unit, batch, every, tmp_path):
    """Where an epoch ends, and inside of one, where the sums of the losses go on as well."""
    x = losses(12)

    def run(*others):
        keras.utils.set_random_seed(0)
        model = counting_model(ok.optimizers.SGD(Linear(1e-3, 40)))
        seen = Rates()
        patience = {"epoch": 2, "update": 5}[unit]
        plateau = ReduceLROnPlateau(
            "loss", unit=unit, factor=0.5, patience=patience, cooldown=2, smoothing=0.9, min_delta=0.5
        )
        data = ok.data.Shuffled(x[:, None], x, batch_size=2, seed=1)
        model.fit(data, epochs=8, verbose=0, callbacks=[plateau, seen, *others])
        return seen.seen, plateau.state_dict(), model.get_weights()

    expected, found = run(), interrupted(run, tmp_path, after=3, batch=batch, every=every)
    assert len(set(expected[0])) > 8 * 6 / 2
    assert found[0] == expected[0][-len(found[0]) :]
    assert len(found[0]) == 5 * 6 - (3 if batch else 0)
    assert found[1] == expected[1]
    np.testing.assert_array_equal(found[2][0], expected[2][0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"monitor": 3}, TypeError, "monitor.*3"),
        ({"factor": 1.0}, ValueError, r"factor.*\(0, 1\).*1\.0"),
        ({"patience": -1}, ValueError, "patience.*at least 0.*-1"),
        ({"mode": "up"}, ValueError, "mode.*'auto', 'min', 'max'.*'up'"),
        ({"min_delta": -1.0}, ValueError, r"min_delta.*-1\.0"),
        ({"cooldown": 0.5}, TypeError, r"cooldown.*0\.5"),
        ({"min_lr": -1e-3}, ValueError, r"min_lr.*-0\.001"),
        ({"unit": "batch"}, ValueError, "unit.*'epoch', 'update'.*'batch'"),
        ({"unit": "update"}, ValueError, "monitor must be 'loss' with unit='update', got 'val_loss'"),
        ({"smoothing": 1.0}, ValueError, r"smoothing.*\[0, 1\).*1\.0"),
    ],
)
def test_it_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ReduceLROnPlateau(**arguments)

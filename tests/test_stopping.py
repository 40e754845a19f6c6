"""EarlyStopping against curves that are written down, and in real training."""

import math

import keras
import numpy as np
import pytest
from keras import ops
from small import (
    At,
    Failing,
    Snapshots,
    assert_weights,
    boom,
    fit,
    interrupt,
    interrupted,
    linear_model,
    noisy_model,
    regression,
)

from keras_optkit.callbacks import EarlyStopping, ScheduleHyperparameters

STOCK = keras.optimizers


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


@pytest.mark.few(3)
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
        ("val_loss", {}, 0, "got 'val_loss'. fit was given no validation data"),
        ("val_acc", {"validation_split": 0.25, "validation_freq": 2}, 2, "'val_loss', 'val_mae', got 'val_acc'"),
        ("acc", {"validation_split": 0.25, "validation_freq": 2}, 1, "'loss', 'mae', got 'acc'"),
    ],
)
def test_an_unknown_monitor_raises_at_the_first_epoch_that_shows_it(monitor, arguments, epochs, message):
    """Unless a callback might add it; see test_watching.py."""
    x, y = regression(dtype="float32")
    model = noisy_model()
    with pytest.raises(ValueError, match=message):
        fit(model, x, y, EarlyStopping(monitor, mode="min"), epochs=4, batch_size=6, **arguments)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == epochs * (3 if arguments else 4)


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
        ({"restore_best_weights": 1}, TypeError, "restore_best_weights.*True, False or the path of a file, got 1"),
        ({"restore_best_weights": ""}, ValueError, "restore_best_weights must be a path, which is not empty.*got ''"),
        ({"restore_best_weights": "a\0b"}, ValueError, "restore_best_weights.*null"),
        ({"target": math.inf}, ValueError, "target.*inf"),
        ({"divergence": 0.0}, ValueError, r"divergence.*\(0, inf\).*0\.0"),
        ({"divergence_patience": 0}, ValueError, "divergence_patience.*at least 1.*0"),
        ({"start_from_epoch": -2}, ValueError, "start_from_epoch.*-2"),
        ({"verbose": 2}, ValueError, "verbose.*2"),
    ],
)
def test_early_stopping_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        EarlyStopping(**arguments)


# -- good enough, and gone astray -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mode", "curve", "epochs", "reason"),
    [
        ("min", [0.5, 0.25, 0.125], 2, "val_loss was 0.25 in epoch 2 and has reached the target 0.25."),
        ("min", [0.125, 0.5], 1, "val_loss was 0.125 in epoch 1 and has reached the target 0.25."),
        ("min", [0.5, NAN, -INF], 3, "val_loss was -inf in epoch 3 and has reached the target 0.25."),
        ("max", [0.125, INF], 2, "val_loss was inf in epoch 2 and has reached the target 0.25."),
        ("max", [-INF, NAN, 0.125, 0.1875], 4, "The last epoch is over."),
    ],
)
def test_it_stops_where_the_target_is_reached(mode, curve, epochs, reason):
    callback = EarlyStopping("val_loss", patience=9, mode=mode, target=0.25)
    assert walk(callback, curve) == epochs
    assert callback.stop_reason == reason


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("mode", "curve", "patience", "epochs", "seen"),
    [
        ("min", [1.0, 0.5, 1.0, 1.125, 0.5], 1, 4, "1.125 in epoch 4, and was 0.5 in epoch 2"),
        ("min", [1.0, 0.5, 1.0, 1.0, 1.0], 1, 5, None),  # no worse than by 0.5
        ("min", [1.0, 2.0, 1.0, 2.0, 3.0], 2, 5, "3 in epoch 5, and was 1 in epoch 1"),
        ("min", [1.0, 2.0, 0.5, NAN, 2.0], 2, 5, "2 in epoch 5, and was 0.5 in epoch 3"),
        ("min", [NAN, INF, 1.0, NAN, NAN, NAN], 3, 6, "nan in epoch 6, and was 1 in epoch 3"),
        ("min", [NAN, INF, NAN], 2, 2, "inf in epoch 2, and was never finite"),
        ("max", [0.5, 0.75, 0.125, 0.25], 1, 3, "0.125 in epoch 3, and was 0.75 in epoch 2"),
        ("max", [0.5, 0.75, 0.25, -INF], 1, 4, "-inf in epoch 4, and was 0.75 in epoch 2"),
    ],
)
def test_it_stops_where_training_has_diverged(mode, curve, patience, epochs, seen):
    callback = EarlyStopping("val_loss", patience=9, mode=mode, divergence=0.5, divergence_patience=patience)
    assert walk(callback, curve) == epochs
    expected = f"val_loss has diverged: it was {seen}." if seen else "The last epoch is over."
    assert callback.stop_reason == expected


# -- best weights on disk, and going on after an interruption ---------------------------------------------------------


def test_best_weights_on_disk_are_restored_and_stay_there(tmp_path):
    x, y = regression(dtype="float32")
    optimizer, schedules = rising()
    model, seen, path = noisy_model(optimizer), Snapshots(), tmp_path / "new" / "best.npz"
    stopping = EarlyStopping("val_loss", patience=50, restore_best_weights=path)
    assert stopping.get_config()["restore_best_weights"] == str(path)
    fit(model, x, y, ScheduleHyperparameters(schedules), stopping, seen, epochs=4, validation_data=(x, y))
    assert stopping.best_epoch == np.nanargmin([logs["val_loss"] for logs in seen.logs]) < 3
    assert_weights(model, seen.weights[stopping.best_epoch])
    with np.load(path) as held:
        arrays = [held[name] for name in held.files if name != "state.json"]
    for mine, other in zip(arrays, seen.weights[stopping.best_epoch], strict=True):
        np.testing.assert_array_equal(mine, other)
    assert [entry.name for entry in path.parent.iterdir()] == ["best.npz"]
    fit(model, x, y, EarlyStopping("val_los", mode="min", restore_best_weights=path), epochs=0, validation_data=(x, y))
    assert_weights(model, seen.weights[stopping.best_epoch])  # nothing of the file: it is another fit


@pytest.mark.few(1)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_it_goes_on_after_an_interruption(where, tmp_path):
    """The best epoch comes before the crash, and the waiting goes over it."""
    x, y = regression(dtype="float32")

    def run(*others):
        keras.utils.set_random_seed(0)
        optimizer, schedules = rising()
        model = noisy_model(optimizer)
        best = True if where == "memory" else tmp_path / f"{len(others)}.npz"
        stopping = EarlyStopping(
            "val_loss", patience=4, restore_best_weights=best, divergence=1e-3, divergence_patience=3
        )
        driven = ScheduleHyperparameters(schedules)
        history = fit(model, x, y, driven, stopping, *others, epochs=12, validation_data=(x, y)).history
        state = {name: value for name, value in vars(stopping).items() if name in (*PUBLIC, "_diverged_for")}
        return state, history["val_loss"], model.get_weights()

    expected, found = run(), interrupted(run, tmp_path / "resume", after=3)
    assert expected[0]["best_epoch"] < 2
    assert expected[0]["stop_reason"].startswith("val_loss has diverged")
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    for mine, other in zip(found[2], expected[2], strict=True):
        np.testing.assert_array_equal(mine, other)


PUBLIC = ("best", "best_epoch", "stopped_epoch", "stop_reason", "wait")


@pytest.mark.usefixtures("x64")
def test_it_goes_by_an_average():
    """s ← β s + (1 - β) v over the finite values, without the bias of its start, as a loop computes it."""
    curve = [1.0, 0.2, 0.9, NAN, 0.8, 0.7, 0.9, 1.2]
    weights = 0.75 ** np.arange(7, -1, -1)
    finite = np.isfinite(curve)
    means = [
        np.average(np.array(curve)[:n][finite[:n]], weights=weights[-int(finite[:n].sum()) :]) for n in range(1, 9)
    ]
    stopping = EarlyStopping("val_loss", patience=3, smoothing=0.75)
    assert walk(stopping, [*curve[:4], INF, *curve[4:]]) == 5  # after 0.2 nothing is better, on average
    assert stopping.best == pytest.approx(means[1], rel=1e-12)
    assert stopping.stop_reason.startswith("The average of val_loss was 0.54")
    target = EarlyStopping("val_loss", patience=9, smoothing=0.75, target=0.71)
    assert walk(target, curve) == 1 + int(np.argmax(np.array(means) <= 0.71))

"""Values that are monitored: in the logs of every epoch or of some, never there, and not numbers."""

import copy
import json
import pickle
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from small import linear_model, regression

import keras_optkit as ok
from keras_optkit.callbacks import Checkpoint, EarlyStopping, ReduceLROnPlateau, TimeBudget

X, Y = regression(8, dtype="float32")
RATE = 2.0**-6


def run(*callbacks, epochs=4, model=None, **arguments):
    model = linear_model(keras.optimizers.SGD(RATE), "float32", run_eagerly=True) if model is None else model
    model.fit(X, 0 * Y, batch_size=8, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments)
    return model


class Score(keras.callbacks.Callback):
    """Adds a score of its own in some epochs."""

    def __init__(self, scores, name="score"):
        super().__init__()
        self.scores, self.name = scores, name

    def on_epoch_end(self, epoch, logs=None):
        if epoch in self.scores:
            logs[self.name] = self.scores[epoch]


def each(directory, monitor, mode="auto"):
    """The callbacks that monitor."""
    return [
        EarlyStopping(monitor, mode=mode, patience=9),
        ReduceLROnPlateau(monitor, mode=mode, patience=9),
        Checkpoint(directory, monitor, mode, save="weights"),
    ]


every = pytest.mark.parametrize("which", [0, 1, 2], ids=["stopping", "plateau", "checkpoint"])
NOT_YET = r"'loss', got 'score'.* Epochs are skipped until a callback adds it"


def test_patience_counts_the_epochs_with_a_score_that_a_callback_adds(tmp_path):
    scores = {1: 0.5, 3: 0.75, 5: 0.25, 7: 0.5, 9: 1.0}
    stopping = EarlyStopping("score", mode="max", patience=2)
    plateau = ReduceLROnPlateau("score", mode="max", patience=1, factor=0.5)
    checkpoint = Checkpoint(tmp_path, "score", "max", last_n=0, save="weights")
    with pytest.warns(UserWarning, match=NOT_YET):
        model = run(Score(scores), stopping, plateau, checkpoint, epochs=12)
    assert (stopping.best_epoch, stopping.best, stopping.stopped_epoch) == (3, 0.75, 7)
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == RATE / 4
    assert checkpoint.best.name.startswith("epoch=0004-update=000004-score=0.75")


def test_a_first_value_that_is_not_usable_does_not_stop():
    stopping = EarlyStopping("score", mode="max", patience=1)
    run(Score({0: None, 2: np.nan, 3: 0.5}), stopping, epochs=4)
    assert (stopping.best_epoch, stopping.stopped_epoch) == (3, 0)


def test_a_score_that_comes_with_the_first_epoch_is_not_warned_of(tmp_path):
    for callback in each(tmp_path, "score", "min"):
        run(Score({0: 0.5, 2: None}), callback, epochs=3)


@pytest.mark.parametrize("freq", [2, [2, 4]])
def test_epochs_without_validation_are_passed_over_by_all(freq, tmp_path):
    stopping, plateau, checkpoint = each(tmp_path, "val_loss")
    run(stopping, plateau, checkpoint, validation_data=(X, Y), validation_freq=freq)
    assert [entry["value"] is None for entry in listed(tmp_path)] == [False]
    assert stopping.best_epoch == 3
    assert plateau.best == stopping.best


def listed(directory):
    return json.loads((Path(directory) / "checkpoints.json").read_text())["checkpoints"]


def test_a_score_of_the_models_own_evaluate():
    class Own(keras.Sequential):
        def evaluate(self, *args, **kwargs):
            found = super().evaluate(*args, **kwargs)
            return found | {"map": 0.5} if self.optimizer.iterations == 2 else found

    model = Own([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    stopping = EarlyStopping("val_map", mode="max", patience=5)
    with pytest.warns(UserWarning, match="got 'val_map'"):
        run(stopping, model=model, epochs=3, validation_data=(X, Y))
    assert stopping.best_epoch == 1


# -- names that are never there ---------------------------------------------------------------------------------------


@every
def test_a_misspelt_name_raises_when_training_ends_where_a_callback_might_have_added_it(which, tmp_path):
    callback = each(tmp_path, "los", "min")[which]
    message = r"monitor must be one of the names in the logs, .*'loss', 'other', got 'los'\. Did you mean 'loss'"
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match=message):
        run(Score({0: 1.0}, "other"), callback, epochs=2)


@every
def test_a_validation_that_there_will_not_be_raises_before_training(which, tmp_path):
    model = linear_model("sgd", "float32", run_eagerly=True)
    message = r"monitor must be .*, got 'val_loss'\. fit was given no validation data"
    with pytest.raises(ValueError, match=message):
        run(each(tmp_path, "val_loss")[which], model=model)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 0


def test_a_validation_that_did_not_take_place_is_told():
    with pytest.warns(UserWarning, match="no value of monitor='val_loss', since no epoch had a validation"):
        run(EarlyStopping(patience=1), epochs=2, validation_data=(X, Y), validation_freq=3)


def test_training_that_something_else_has_stopped_is_no_reason_to_raise():
    run(EarlyStopping(patience=1), TimeBudget(0), epochs=2, validation_data=(X, Y), validation_freq=2)


@every
def test_a_callback_that_adds_the_value_too_late_is_told(which, tmp_path):
    callback = each(tmp_path, "score", "max")[which]
    with (
        pytest.warns(UserWarning, match=NOT_YET.replace("'loss'", ".*'loss'")),
        pytest.raises(ValueError, match="monitor='score' is added to the logs by a callback that comes later"),
    ):
        run(callback, Score({1: 0.5}), epochs=4)


# -- values that are not numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.ones(3), "warm-up", [1, 2], {}, object()], ids=lambda v: type(v).__name__)
def test_what_else_is_in_the_logs_does_not_matter(value, tmp_path):
    stopping = EarlyStopping("loss", patience=9)
    run(Score(dict.fromkeys(range(2), value), "other"), stopping, *each(tmp_path, "loss")[1:], epochs=2)
    assert stopping.best is not None


@pytest.mark.parametrize(
    ("value", "what"), [(np.ones(2), r"of shape \(2,\)"), ("warm-up", "'warm-up'"), ({}, "{}")], ids=str
)
@every
def test_a_monitored_value_that_is_no_number_raises(which, value, what, tmp_path):
    with pytest.raises(ValueError, match=f"monitor='score' must be one number, got one {what}"):
        run(Score({0: value}), each(tmp_path, "score", "max")[which])


# -- one callback for several fits, and copies ------------------------------------------------------------------------


def callbacks(directory):
    return [
        *each(directory / "a", "loss"),
        ReduceLROnPlateau("loss", unit="update", patience=9),
        EarlyStopping("loss", patience=9, restore_best_weights=str(directory / "best.npz")),
        Checkpoint(directory / "b", top_k=0, every=1, save="weights"),
        TimeBudget(3600),
        ok.callbacks.AveragedWeights(start=0, batch_norm_data=None),
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "pickle"])
def test_copies_work_before_a_fit_and_after_it(copied, tmp_path):
    given = callbacks(tmp_path)
    model = run(*copied(given), epochs=1)
    run(*given, epochs=2, model=model)
    for callback in given:
        again = copied(callback)
        assert type(again) is type(callback)
        assert again.get_config() == callback.get_config()
        run(again, epochs=1)
    assert given[0].best_epoch == 1


def test_one_callback_serves_several_fits_of_several_models(tmp_path):
    given = callbacks(tmp_path)
    for _ in range(3):
        model = run(*given, epochs=1)
        run(*given, epochs=1, model=model)
    stopping, plateau, checkpoint = given[:3]
    assert (stopping.best_epoch, stopping.wait, plateau.wait) == (0, 0, 0)
    assert len(listed(checkpoint.directory)) in (1, 2)
    assert not {"evaluate", "test_on_batch", "reset_metrics"} & set(vars(model))  # what was put around them is gone

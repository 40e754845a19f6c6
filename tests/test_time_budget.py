"""TimeBudget with budgets that are used up at once, or never: no test waits for a clock."""

import math
import re
from datetime import timedelta

import keras
import numpy as np
import pytest
from small import At, boom, fit, linear_model, regression

from keras_optkit.callbacks import TimeBudget


def trained(*callbacks, **arguments):
    """How many batches and epochs were trained."""
    x, y = regression(dtype="float32")
    model, batches = linear_model(keras.optimizers.SGD(0.01), dtype="float32"), []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: batches.append(1))
    history = fit(model, x, y, *callbacks, count, epochs=3, validation_data=(x, y), **arguments)
    return len(batches), len(history.epoch)


@pytest.mark.parametrize(
    ("budget", "stop_after", "expected"),
    [
        (0, "batch", (1, 1)),
        (0.0, "epoch", (6, 1)),
        (timedelta(0), "batch", (1, 1)),
        (timedelta(days=1), "batch", (18, 3)),
        (86400, "epoch", (18, 3)),
    ],
)
def test_it_stops_after_the_batch_or_the_epoch(budget, stop_after, expected, capsys):
    callback = TimeBudget(budget, stop_after=stop_after, verbose=1)
    for _ in range(2):  # each fit has the whole budget
        assert trained(callback) == expected
        stopped = expected != (18, 3)
        assert (callback.stop_reason is not None) == stopped
        assert capsys.readouterr().out == (f"TimeBudget: {callback.stop_reason}\n" if stopped else "")


def test_it_says_why():
    callback = TimeBudget(0)
    trained(callback)
    assert callback.stop_reason == "The 0 s of the time budget are used up."
    callback = TimeBudget(timedelta(hours=30), stop_after="epoch")
    state = callback.state_dict() | {"used": 107000.0, "longest_epoch": 1800.0}
    assert trained(callback, Load(callback, state)) == (6, 1)
    assert re.fullmatch(
        r"1 day, 5:4\d:\d\d of the time budget of 1 day, 6:00:00 are used, and the longest epoch took 0:30:00\.",
        callback.stop_reason,
    )


class Load(keras.callbacks.Callback):
    """Gives a callback its state as it is done after an interruption."""

    def __init__(self, callback, state):
        super().__init__()
        self.callback, self.state = callback, state

    def on_train_begin(self, logs=None):
        self.callback.load_state_dict(self.state)


@pytest.mark.parametrize(("left", "batches"), [(-1.0, 1), (3600.0, 18)])
def test_time_before_an_interruption_counts(left, batches):
    first = TimeBudget(7200)
    trained(first)
    state = first.state_dict()
    assert 0 < state["used"] < 3600
    second = TimeBudget(7200)
    assert trained(second, Load(second, state | {"used": 7200 - left}))[0] == batches
    assert second.used > 7200 - left


def test_an_epoch_that_would_not_fit_is_not_begun():
    """The longest one counts, also if it was not the last."""
    for longest, epochs in ((3601.0, 1), (1800.0, 3)):
        callback = TimeBudget(3600, stop_after="epoch")
        state = callback.state_dict() | {"longest_epoch": longest}
        assert trained(callback, Load(callback, state))[1] == epochs


def test_the_length_of_an_epoch_that_was_interrupted_is_that_of_both_parts():
    callback = TimeBudget(7200, stop_after="epoch")
    callback.set_model(linear_model("sgd", dtype="float32"))
    callback.on_train_begin()
    callback.on_epoch_begin(0)
    callback.load_state_dict(callback.state_dict() | {"used": 3000.0, "epoch_began": 1000.0})
    callback.on_epoch_end(0)
    assert callback.state_dict()["longest_epoch"] == pytest.approx(2000.0, abs=60.0)


def test_the_clock_stands_still_after_fit():
    callback = TimeBudget(3600)
    x, y = regression(dtype="float32")
    model = linear_model(keras.optimizers.SGD(0.01), dtype="float32")
    for others in ([], [At(boom, batch=2)]):
        if others:
            with pytest.raises(RuntimeError, match="boom"):
                fit(model, x, y, callback, *others)
        else:
            fit(model, x, y, callback)
        assert callback.used == callback.used > 0


def test_a_batch_is_an_execution_of_several_steps():
    assert trained(TimeBudget(0), steps_per_epoch=6) == (1, 1)
    x, y = regression(dtype="float32")
    model = linear_model(keras.optimizers.SGD(0.01), dtype="float32", steps_per_execution=3)
    fit(model, x, y, TimeBudget(0))
    assert int(model.optimizer.iterations) == 3
    assert np.all(np.isfinite(model.get_weights()[0]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": -1}, ValueError, r"budget.*\[0.*-1"),
        ({"budget": math.nan}, ValueError, "budget.*nan"),
        ({"budget": timedelta(seconds=-1)}, ValueError, "budget.*-1"),
        ({"budget": "1h"}, TypeError, "budget.*'1h'"),
        ({"budget": 1, "stop_after": "step"}, ValueError, "stop_after.*'batch', 'epoch'.*'step'"),
        ({"budget": 1, "verbose": 2}, ValueError, "verbose.*2"),
    ],
)
def test_it_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TimeBudget(**arguments)

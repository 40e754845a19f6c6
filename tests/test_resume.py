"""Trainings that end in the middle and go on: bitwise as if they had not ended."""

import contextlib
import datetime
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import filelock
import keras
import numpy as np
import pytest
from small import At, interrupt

import keras_optkit as ok
from keras_optkit.callbacks import bundle
from keras_optkit.callbacks.identity import versions
from keras_optkit.callbacks.resume import Resume
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.private import op_determinism
from keras_optkit.testing.problems import begun

ROWS, BATCH = 40, 4
X = np.random.default_rng(0).normal(size=(ROWS, 3)).astype("float32")
Y = (X @ np.array([[1.0], [-2.0], [0.5]]) + 0.3).astype("float32")


@pytest.fixture(autouse=True)
def _deterministic():
    with op_determinism():
        yield


class Crash(Exception):
    pass


class CrashAt(keras.callbacks.Callback):
    """Raises after so many batches."""

    stateless = True

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if self.left == 0:
            raise Crash


class Batches(keras.callbacks.Callback):
    """The places of the batches that were trained on."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append((self.epoch, batch))


def compiled(optimizer=None, units=5, **arguments):
    keras.utils.set_random_seed(1)
    layers = [  # with names, as in a process of its own, since the state holds them
        keras.layers.Dense(units, "tanh", name="hidden"),
        keras.layers.BatchNormalization(name="normal"),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(1, name="output"),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer=optimizer or ok.optimizers.AdamW(1e-2), loss="mse", metrics=["mae"], **arguments)
    return begun(model)


def shuffled(**arguments):
    return ok.data.Shuffled(X, Y, **({"batch_size": BATCH, "seed": 3} | arguments))


def train(directory, *, crash=None, every=3, model=None, data=None, callbacks=(), keep=2, strict=True, **arguments):
    """One run of a script; None if it crashed, after so many batches."""
    model = compiled() if model is None else model
    resume = directory if isinstance(directory, Resume) else Resume(directory, every=every, keep=keep, strict=strict)
    seen = Batches()
    callbacks = [*callbacks, resume, seen, *([CrashAt(crash)] if crash else [])]
    arguments = {"epochs": 3, "validation_data": (X, Y), "verbose": 0} | arguments
    try:
        model.fit(shuffled() if data is None else data, callbacks=callbacks, **arguments)
    except Crash:
        return None
    model.resume, model.seen = resume, seen.seen
    return model


def everything(model):
    return {"state": vars(TrainingState.of(model)), "history": model.history.history, "epochs": model.history.epoch}


def assert_same(model, expected):
    mine, theirs = (bundle.pack(everything(m)) for m in (model, expected))
    assert mine.text == theirs.text
    different = [name for name, a in mine.arrays.items() if a.tobytes() != theirs.arrays[name].tobytes()]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    with op_determinism():
        return train(tmp_path_factory.mktemp("whole"))


# -- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("every", [3, "epoch", datetime.timedelta(microseconds=1), 1, 10, 100, datetime.timedelta(1)])
def test_goes_on_wherever_it_was_left(tmp_path, uninterrupted, every):
    for crash in (4, 1, 13):
        assert train(tmp_path, every=every, crash=crash) is None
    model = train(tmp_path, every=every)
    assert_same(model, uninterrupted)
    begun = model.resume.resumed_from or (0, 0)
    assert model.seen == uninterrupted.seen[begun[0] * 10 + begun[1] :]


@pytest.mark.once
def test_each_bundle_is_told_once_it_is_written_but_for_that_of_the_end(tmp_path):
    resume, told = Resume(tmp_path, every=7, keep=9), []
    resume.on_bundle = lambda name: told.append((name, (tmp_path / name).exists()))
    train(resume)
    assert told == [(f"bundle-0000000{number}.npz", True) for number in (1, 2, 3, 4)]
    assert len(list(tmp_path.glob("bundle-*.npz"))) == 5


@pytest.mark.long
def test_goes_on_at_the_batch_after_the_last_bundle(tmp_path):
    assert train(tmp_path, every=3, crash=17) is None
    model = train(tmp_path, every=3)
    assert model.resume.resumed_from == (1, 5)  # 15 batches
    assert model.seen[0] == (1, 5)
    assert len(model.seen) == 15


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: ok.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.9), id="average"),
        pytest.param(lambda: ok.optimizers.SGD(ok.schedules.Cosine(0.1, 30), momentum=0.9), id="schedule"),
        pytest.param(lambda: ok.optimizers.ScheduleFreeAdamW(1e-2, gradient_accumulation_steps=4), id="accumulation"),
        pytest.param(lambda: ok.optimizers.Lookahead(ok.optimizers.AdamW(1e-2), sync_period=4), id="lookahead"),
        pytest.param(lambda: ok.optimizers.LossScale(ok.optimizers.AdamW(1e-2)), id="loss scale"),
        pytest.param(lambda: keras.optimizers.Adam(1e-2, use_ema=True), id="keras"),
        pytest.param(lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(1e-2)), id="keras scaled"),
    ],
)
def test_with_other_optimizers(tmp_path, make):
    expected = train(tmp_path / "whole", model=compiled(make()))
    assert train(tmp_path / "cut", model=compiled(make()), crash=17) is None
    assert_same(train(tmp_path / "cut", model=compiled(make())), expected)


@pytest.mark.long
def test_with_averaged_weights_shown(tmp_path):
    def fit(name, **arguments):
        model = compiled(ok.optimizers.AdamW(1e-2, use_ema=True, ema_momentum=0.9))
        return train(tmp_path / name, model=model, callbacks=[ok.callbacks.AveragedWeights()], **arguments)

    expected = fit("whole")
    assert fit("cut", crash=12) is None
    assert_same(fit("cut"), expected)


def stock_callbacks(directory):
    directory.mkdir(exist_ok=True)
    return [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=0, min_delta=0.6),
        keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.3, restore_best_weights=True),
        keras.callbacks.ModelCheckpoint(directory / "best.weights.h5", save_best_only=True, save_weights_only=True),
        keras.callbacks.ModelCheckpoint(directory / "last.weights.h5", save_freq=7, save_weights_only=True),
        keras.callbacks.CSVLogger(directory / "log.csv"),
        keras.callbacks.TerminateOnNaN(),
    ]


@pytest.mark.once
def test_keras_s_callbacks_go_on_from_their_state(tmp_path):
    def fit(name, **arguments):
        callbacks = stock_callbacks(tmp_path / name)
        model = train(tmp_path / name / "resume", callbacks=callbacks, epochs=12, **arguments)
        if model is None:
            (log,) = (c for c in callbacks if isinstance(c, keras.callbacks.CSVLogger))
            log.csv_file.close()  # the end of a process would; Keras does so only where training ends well
        return model, callbacks

    expected, theirs = fit("whole")
    assert 2 < theirs[1].stopped_epoch < 11, "the test is about a training that stops early"
    assert len(set(expected.history.history["learning_rate"])) > 1, "and whose learning rate is reduced"
    for crash in (21, 17):
        assert fit("cut", crash=crash)[0] is None
    model, mine = fit("cut")
    assert_same(model, expected)
    for a, b in zip(mine, theirs, strict=True):
        for name in (
            "wait",
            "best",
            "best_epoch",
            "stopped_epoch",
            "cooldown_counter",
            "_batches_seen_since_last_saving",
        ):
            assert getattr(a, name, None) == getattr(b, name, None), (a, name)
    for name in ("log.csv",):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for name in ("best.weights.h5", "last.weights.h5"):
        weights = []
        for run in ("cut", "whole"):
            model = compiled()
            model.load_weights(tmp_path / run / name)
            weights.append(model.get_weights())
        for a, b in zip(*weights, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.long
@pytest.mark.once
def test_a_schedule_by_epochs_is_not_applied_twice(tmp_path):
    def fit(name, **arguments):
        halve = keras.callbacks.LearningRateScheduler(lambda _, rate: rate * 0.5)
        return train(tmp_path / name, callbacks=[halve], **arguments)

    expected = fit("whole")
    for crash in (5, 5):
        assert fit("cut", crash=crash) is None
    model = fit("cut")
    assert_same(model, expected)
    assert model.history.history["learning_rate"] == expected.history.history["learning_rate"]


@pytest.mark.only_on("tensorflow", because="TensorBoard's summaries of batches are TensorFlow's")
def test_the_steps_of_tensorboard_go_on(tmp_path):
    def fit(**arguments):
        board = keras.callbacks.TensorBoard(tmp_path / "board", update_freq=1, write_graph=False)
        return train(tmp_path / "resume", callbacks=[board], **arguments), board

    assert fit(crash=14)[0] is None
    _, board = fit()
    assert board._global_train_batch == 30


class Counting(keras.callbacks.Callback):
    """One's own, with the two methods."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])

    def state_dict(self):
        return {"losses": self.losses, "nothing": None, "array": np.array([1, 2], "int8"), "nan": float("nan")}

    def load_state_dict(self, state):
        assert state["nothing"] is None
        assert state["array"].dtype == np.int8
        assert np.isnan(state["nan"])
        self.losses = list(state["losses"])


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("place", [0, 1])
def test_one_s_own_callback_goes_on_from_its_state_wherever_it_stands(tmp_path, place):
    def fit(name, **arguments):
        counting, resume = Counting(), Resume(tmp_path / name, every=3, strict=True)
        callbacks = [counting, resume] if place else [resume, counting]
        crash = [CrashAt(arguments.pop("crash"))] if "crash" in arguments else []
        model = compiled()
        try:
            model.fit(shuffled(), epochs=2, callbacks=[*crash, *callbacks], verbose=0)
        except Crash:
            return None
        return counting.losses

    expected = fit("whole")
    assert len(expected) == 20
    for crash in (5, 8):
        assert fit("cut", crash=crash) is None
    assert fit("cut") == expected


@pytest.mark.once
def test_with_several_batches_in_one_call(tmp_path):
    expected = train(tmp_path / "whole", model=compiled(steps_per_execution=3))
    assert train(tmp_path / "cut", model=compiled(steps_per_execution=3), crash=6, every=2) is None
    model = train(tmp_path / "cut", model=compiled(steps_per_execution=3), every=2)
    assert model.resume.resumed_from == (1, 3)
    assert_same(model, expected)


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="tf.data")
def test_with_a_tf_dataset_per_epoch(tmp_path):
    import tensorflow as tf

    def data():
        def made(epoch):
            return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(ROWS, seed=epoch).batch(BATCH).prefetch(2)

        return ok.data.PerEpoch(made)

    expected = train(tmp_path / "whole", data=data())
    assert train(tmp_path / "cut", data=data(), crash=16) is None
    assert_same(train(tmp_path / "cut", data=data()), expected)


@pytest.mark.long
def test_with_arrays_in_order_at_the_end_of_epochs(tmp_path):
    def fit(name, crash=None):
        model, seen = compiled(), Batches()
        callbacks = [Resume(tmp_path / name, strict=True), seen, *([CrashAt(crash)] if crash else [])]
        try:
            model.fit(X, Y, batch_size=BATCH, epochs=3, shuffle=False, callbacks=callbacks, verbose=0)
        except Crash:
            return None
        model.seen = seen.seen
        return model

    expected = fit("whole")
    assert fit("cut", crash=14) is None
    model = fit("cut")
    assert model.seen[0] == (1, 0)
    assert_same(model, expected)


@pytest.mark.long
def test_a_model_that_is_not_built_goes_on(tmp_path):
    def model():
        keras.utils.set_random_seed(1)
        made = keras.Sequential([keras.layers.Dense(4), keras.layers.Dropout(0.2), keras.layers.Dense(1)])
        made.compile(optimizer="adam", loss="mse", metrics=["mae"])
        return made

    expected = train(tmp_path / "whole", model=model())
    assert train(tmp_path / "cut", model=model(), crash=14) is None
    assert_same(train(tmp_path / "cut", model=model()), expected)
    assert_same(train(tmp_path / "cut", model=model()), expected)  # a finished one


@pytest.mark.once
def test_random_numbers_of_python_numpy_and_keras_go_on(tmp_path):
    import random

    class Draw(keras.callbacks.Callback):
        stateless = True

        def __init__(self):
            super().__init__()
            self.drawn = []

        def on_train_batch_end(self, batch, logs=None):
            self.drawn.append((random.random(), np.random.normal(), float(keras.random.uniform(()))))

    whole, cut = Draw(), Draw()
    train(tmp_path / "whole", callbacks=[whole])
    assert train(tmp_path / "cut", callbacks=[Draw()], crash=14) is None
    train(tmp_path / "cut", callbacks=[cut])
    assert cut.drawn == whole.drawn[12:]


@pytest.mark.long
def test_the_progress_bar_begins_at_the_batch(tmp_path, capsys):
    assert train(tmp_path, crash=17) is None
    train(tmp_path, verbose=2)
    output = capsys.readouterr().out
    assert "resumes after 5 batches of epoch 2." in output
    assert "Epoch 1/3" not in output
    assert "Epoch 2/3" in output
    assert "10/10" in output


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_finished_training_is_not_done_again(tmp_path, uninterrupted):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    model = train(tmp_path)
    assert model.seen == []
    assert_same(model, uninterrupted)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("average", [False, True])
def test_more_epochs_go_on_from_the_end(tmp_path, average):
    def model():
        return compiled(ok.optimizers.AdamW(1e-2, use_ema=average, ema_momentum=0.9))

    expected = train(tmp_path / "whole", model=model(), epochs=5)
    train(tmp_path / "cut", model=model(), epochs=3)
    longer = train(tmp_path / "cut", model=model(), epochs=5)
    assert longer.seen[0] == (3, 0)
    assert_same(longer, expected)


@pytest.mark.once
def test_one_that_was_stopped_is_finished_whatever_the_epochs(tmp_path):
    def fit(epochs):
        stopping = keras.callbacks.EarlyStopping("loss", patience=0, min_delta=10.0)
        return train(tmp_path, callbacks=[stopping], epochs=epochs)

    assert len(fit(5).history.epoch) == 2
    again = fit(9)
    assert again.seen == []
    assert again.history.epoch == [0, 1]
    with pytest.raises(ValueError, match=r"epochs=1, but .*finished.npz comes from epoch 2 of a run"):
        fit(1)


@pytest.mark.long
def test_fewer_epochs_than_it_has_are_refused(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"epochs=2, but .*finished.npz comes from epoch 3 of a run"):
        train(tmp_path, epochs=2)


def test_the_same_callback_cannot_begin_another_training(tmp_path):
    resume = Resume(tmp_path, strict=True)
    train(resume)
    with pytest.raises(ValueError, match="holds the run that this Resume has finished"):
        train(resume)


@pytest.mark.long
def test_the_same_callback_can_go_on_after_a_failure(tmp_path, uninterrupted):
    resume = Resume(tmp_path, every=3, strict=True)
    assert train(resume, crash=11) is None
    assert_same(train(resume), uninterrupted)


# -- what is refused --------------------------------------------------------------------------------------------------


class Subclassed(keras.Model):
    """Without a config, as most models of one's own."""

    def __init__(self, units, activation):
        super().__init__()
        self.dense, self.activation = keras.layers.Dense(units), activation

    def call(self, x):
        return keras.ops.sum(self.activation(self.dense(x)), -1, keepdims=True)


@pytest.mark.long
def test_a_model_without_a_config_is_told_by_its_weights_and_its_source(tmp_path):
    def model(units):
        keras.utils.set_random_seed(1)
        made = Subclassed(units, keras.ops.tanh)
        made.compile(optimizer="adam", loss="mse")
        return made

    expected = train(tmp_path / "whole", model=model(4))
    assert train(tmp_path / "cut", model=model(4), crash=8) is None
    with pytest.raises(ValueError, match=r"variables\[0\]\[2\]\[1\]: 4 in the bundle, 5 here"):
        train(tmp_path / "cut", model=model(5))
    assert_same(train(tmp_path / "cut", model=model(4)), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["arrays", "dataset"])
@pytest.mark.only_on("tensorflow", because="elsewhere Keras builds models before `fit` begins")
def test_a_model_that_only_a_batch_can_build_is_shown_one(tmp_path, kind):
    import tensorflow as tf

    def fit(name, crash=None):
        keras.utils.set_random_seed(1)
        model = Subclassed(4, keras.ops.tanh)
        model.compile(optimizer="adam", loss="mse")
        x = (X, Y) if kind == "arrays" else (tf.data.Dataset.from_tensor_slices((X, Y)).batch(BATCH),)
        callbacks = [Resume(tmp_path / name), *([CrashAt(crash)] if crash else [])]
        with pytest.warns(UserWarning, match="x must be") if kind == "dataset" else contextlib.nullcontext():
            try:
                model.fit(*x, batch_size=BATCH if len(x) > 1 else None, epochs=3, shuffle=False, callbacks=callbacks)
            except Crash:
                return None
        return model

    expected = fit("whole")
    assert fit("cut", crash=14) is None
    assert_same(fit("cut"), expected)


@pytest.mark.long
def test_a_list_of_callbacks_made_by_the_user_is_gone_on_with(tmp_path, uninterrupted):
    def fit(crash=None):
        model, seen = compiled(), Batches()
        callbacks = [Resume(tmp_path, every=3, strict=True), seen, *([CrashAt(crash)] if crash else [])]
        made = keras.callbacks.CallbackList(callbacks, add_history=True, model=model, epochs=3, steps=10, verbose=0)
        try:
            model.fit(shuffled(), epochs=3, validation_data=(X, Y), callbacks=made)
        except Crash:
            return None
        model.seen = seen.seen
        return model

    assert fit(crash=17) is None
    model = fit()
    assert model.seen[0] == (1, 5)
    assert_same(model, uninterrupted)


class Doubled(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": lambda: compiled(units=6)},
            r"model\.config\..*units: 5 in the bundle, 6 here",
        ),
        (
            {"model": lambda: compiled(ok.optimizers.AdamW(0.02))},
            r"optimizer\[0\]\.config\.learning_rate: 0\.01 .* 0\.02 here",
        ),
        (
            {"model": lambda: compiled(ok.optimizers.SGD(0.01))},
            r"optimizer\[0\]\.class_name: \"AdamW\" .* \"SGD\" here",
        ),
        ({"model": lambda: compiled(weighted_metrics=["mse"])}, r"compile\.weighted_metrics"),
        ({"data": lambda: shuffled(seed=4)}, r"data\.x\.seed: 3 in the bundle, 4 here"),
        ({"data": lambda: ok.data.Shuffled(X + 1, Y, batch_size=BATCH, seed=3)}, r"data\.x\.arrays\[0\]"),
        (
            {"callbacks": lambda: [keras.callbacks.EarlyStopping("loss", patience=9)]},
            r"callbacks\.EarlyStopping\.0: null",
        ),
    ],
)
def test_another_training_is_refused_with_the_differences(tmp_path, change, message):
    assert train(tmp_path, crash=5) is None
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    with pytest.raises(ValueError, match=f"The bundle comes from another run:(.|\n)*{message}"):
        train(tmp_path, **{name: make() for name, make in change.items()})
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before


def made_of(text):
    """What is called `made` in a script of this text."""
    names = {"keras": keras, "np": np, "__name__": "__main__"}
    exec(text, names)
    return names["made"]


LAYER = """
class made(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""
LOSS = "made = lambda y, p: np.float32(2) * keras.ops.mean((y - p) ** 2)"
RATE = "made = lambda epoch, rate: rate * 0.5"


def simple(layer=None, loss="mse", **arguments):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((3,)), layer or keras.layers.Lambda(lambda x: x), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.compile(optimizer="sgd", loss=loss, run_eagerly=True, **arguments)
    return model


CHANGES = {
    "layer": ("model", lambda text: {"model": simple(made_of(text)())}, LAYER, "2 * x", "3 * x"),
    "lambda layer": (
        "model",
        lambda text: {"model": simple(keras.layers.Lambda(made_of(text)))},
        "made = lambda x: 2 * x",
        "2 *",
        "3 *",
    ),
    "activation": (
        "model",
        lambda text: {"model": simple(keras.layers.Dense(3, activation=made_of(text)))},
        "made = lambda x: 2 * x",
        "2 *",
        "3 *",
    ),
    "regularizer": (
        "model",
        lambda text: {"model": simple(keras.layers.Dense(3, kernel_regularizer=made_of(text)()))},
        "class made(keras.regularizers.Regularizer):\n    def __call__(self, x):\n        return keras.ops.sum(x)",
        "sum",
        "mean",
    ),
    "loss": ("compile", lambda text: {"model": simple(loss=made_of(text))}, LOSS, "float32(2)", "float32(3)"),
    "metric": ("compile", lambda text: {"model": simple(metrics=[made_of(text)])}, LOSS, "** 2", "** 4"),
    "schedule of epochs": (
        "callbacks",
        lambda text: {"model": simple(), "callbacks": [keras.callbacks.LearningRateScheduler(made_of(text))]},
        RATE,
        "0.5",
        "0.6",
    ),
    "plateau": (
        "callbacks",
        lambda text: {"model": simple(), "callbacks": [keras.callbacks.ReduceLROnPlateau("loss", patience=int(text))]},
        "5",
        "5",
        "6",
    ),
    "early stopping": (
        "callbacks",
        lambda text: {"model": simple(), "callbacks": [ok.callbacks.EarlyStopping("loss", patience=int(text))]},
        "5",
        "5",
        "6",
    ),
    "rows": (
        "data",
        lambda text: {"model": simple(), "data": ok.data.Shuffled(X + RARE * int(text), Y, batch_size=BATCH)},
        "0",
        "0",
        "1",
    ),
    "validation": (
        "validation",
        lambda text: {"model": simple(), "validation_data": (X + RARE * int(text), Y)},
        "0",
        "0",
        "1",
    ),
    "class weights": ("fit", lambda text: {"model": simple(), "class_weight": {0: float(text)}}, "1", "1", "2"),
}
RARE = np.zeros_like(X)
RARE[11, 1] = 1.0


@pytest.mark.once
@pytest.mark.few(6)
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_and_can_be_accepted(tmp_path, what):
    section, make, text, before, after = CHANGES[what]
    assert before in text
    assert train(tmp_path, crash=5, **make(text)) is None
    moved = "\n\n# moved, with a comment\n" + text if "made" in text else text
    assert train(tmp_path, crash=5, **make(moved)) is None, "no change"
    with pytest.raises(ValueError, match=rf"{section}\.(.|\n)*resume with Resume\(\.\.\., accept=\['{section}'\]\)"):
        train(tmp_path, **make(text.replace(before, after)))
    resume = Resume(tmp_path, every=3, accept=section)
    assert train(resume, crash=1, **make(text.replace(before, after))) is None
    assert resume.resumed_from == (0, 6)


@pytest.mark.only_on("tensorflow", because="tf.data")
def test_other_data_of_tensorflow_are_refused(tmp_path):
    import tensorflow as tf

    def data(x, epochs):
        made = tf.data.Dataset.from_tensor_slices((x, Y)).batch(BATCH)
        if epochs:
            return ok.data.PerEpoch(lambda _: made.map(lambda x, y: (x, y)))
        return made

    for name, epochs in (("plain", False), ("epochs", True)):
        with contextlib.nullcontext() if epochs else pytest.warns(UserWarning, match="x must be"):
            assert (
                train(tmp_path / name, model=simple(), data=data(X, epochs), crash=14, strict=False, shuffle=False)
                is None
            )
        with (
            contextlib.nullcontext() if epochs else pytest.warns(UserWarning, match="x must be"),
            pytest.raises(ValueError, match=r"data\.x\.first batch"),
        ):
            train(tmp_path / name, model=simple(), data=data(X + 1, epochs), strict=False, shuffle=False)


def test_looking_at_the_data_draws_no_random_numbers(tmp_path):
    class Drawing(ok.data.EpochDataset):
        def __len__(self):
            return 4

        def batch(self, index):
            np.random.uniform()  # as code does that is not told to use a generator of its own
            return X[:BATCH], Y[:BATCH]

    def drawn(*callbacks):
        model = simple()
        model.fit(Drawing(), callbacks=list(callbacks), verbose=0)
        return np.random.uniform()

    assert drawn(Resume(tmp_path)) == drawn()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: X, "from the middle of an epoch, where ndarray cannot be continued"),
        (lambda: shuffled(batch_size=20), "from batch 3 of an epoch, and x has 2 batches now"),
    ],
)
def test_accepted_data_must_have_the_place(tmp_path, change, message):
    assert train(tmp_path, model=simple(), crash=5) is None
    data = change()
    more = {"y": Y} if isinstance(data, np.ndarray) else {}
    with (
        pytest.warns(UserWarning, match="x must be") if more else contextlib.nullcontext(),
        pytest.raises(ValueError, match=message),
    ):
        train(Resume(tmp_path, accept=("data", "validation", "fit")), model=simple(), data=data, **more)


@pytest.mark.once
def test_other_releases_are_told(tmp_path, monkeypatch):
    assert train(tmp_path, crash=5) is None
    monkeypatch.setattr("keras_optkit.callbacks.session.versions", lambda: versions() | {"keras": "99"})
    with pytest.warns(UserWarning, match='Other releases may compute other bits: keras: .* in the bundle, "99" here'):
        train(tmp_path)


class Own(keras.callbacks.Callback):
    pass


class Special(keras.callbacks.EarlyStopping):
    pass


@pytest.mark.parametrize("callback", [Own(), Special("loss", patience=9)])
def test_callbacks_whose_state_is_not_known_are_named(tmp_path, callback):
    name = type(callback).__name__
    with pytest.warns(UserWarning, match=f"callbacks must have state_dict and load_state_dict .* {name} has not"):
        train(tmp_path / "a", callbacks=[callback], strict=False, epochs=1)
    with pytest.raises(ValueError, match=f"{name} has not"):
        train(tmp_path / "b", callbacks=[callback])


@pytest.mark.parametrize(("x", "every"), [(X, 3), (X, "epoch")])
def test_data_that_cannot_be_continued_are_told(tmp_path, x, every):
    def fit(strict):
        resume = Resume(tmp_path, every=every, strict=strict)
        compiled().fit(x, Y, batch_size=BATCH, epochs=1, callbacks=[resume], verbose=0)

    with pytest.warns(
        UserWarning, match="x must be a keras_optkit.data.Shuffled, .* got ndarray.* where an epoch ended"
    ):
        fit(strict=False)
    with pytest.raises(ValueError, match=r"x must be a keras_optkit\.data\.Shuffled"):
        fit(strict=True)


@pytest.mark.parametrize("other", ["backup", "resume"])
def test_another_one_that_restores_is_refused(tmp_path, other):
    callback = keras.callbacks.BackupAndRestore(tmp_path / "b") if other == "backup" else Resume(tmp_path / "b")
    with pytest.raises(ValueError, match=r"callbacks must not have a (BackupAndRestore|Resume) beside Resume"):
        train(tmp_path / "a", callbacks=[callback])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": "batch"}, ValueError, "every must be one of 'epoch', got 'batch'"),
        ({"every": 0}, ValueError, "every must be an integer at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every must be an integer"),
        ({"every": datetime.timedelta(0)}, ValueError, "every must be a positive timedelta"),
        ({"keep": 0}, ValueError, "keep must be an integer at least 1, got 0"),
        ({"strict": 1}, TypeError, "strict must be True or False"),
        ({"directory": ""}, ValueError, "directory must be a path, which is not empty"),
        ({"directory": "a\0b"}, ValueError, "directory must be a path"),
        ({"directory": b"x"}, TypeError, "directory must be a path"),
        ({"accept": ["dat"]}, ValueError, "accept must be one of 'model', .* got 'dat'. Did you mean 'data'"),
        ({"accept": [1]}, TypeError, "accept must be one or several of model, "),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Resume(**{"directory": "directory"} | arguments)


def test_a_state_that_cannot_be_written_is_an_error_with_its_place(tmp_path):
    class Bad(Counting):
        def state_dict(self):
            return {"things": [1, object()]}

    with pytest.raises(TypeError, match=r"\['callbacks'\]\['Bad\.0'\]\['things'\]\[1\] must be None, a number"):
        train(tmp_path, callbacks=[Bad()])


# -- files ------------------------------------------------------------------------------------------------------------


def bundles(directory):
    return sorted(directory.glob("bundle-*.npz"))


@pytest.mark.once
@pytest.mark.parametrize("keep", [1, 3])
def test_so_many_bundles_are_kept(tmp_path, keep):
    assert train(tmp_path, crash=20, every=2, keep=keep) is None
    assert [path.name for path in bundles(tmp_path)] == [f"bundle-{n:08d}.npz" for n in range(10 - keep, 10)]


def test_numpy_can_read_a_bundle(tmp_path):
    assert train(tmp_path, crash=5) is None
    with np.load(bundles(tmp_path)[-1]) as archive:
        tree = json.loads(archive["state.json"])["tree"]
        assert tree["position"] == {"epoch": 0, "batch": 3}
        kernel = archive[tree["state"]["variables"][0][0]["__array__"]]
    assert kernel.shape == (3, 5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "int8", "bool", "uint32", "float8_e4m3fn"])
def test_arrays_of_every_type_are_read_as_they_were_written(tmp_path, dtype):
    array = np.asarray(keras.ops.convert_to_numpy(keras.ops.ones((2, 3), "float32"))).astype(_numpy_type(dtype))
    tree = {"a": [array, array[:0], array[0, 0], {"b": array.T}], "n": [None, True, 3, 0.1, float("inf"), "text"]}
    bundle.write(tmp_path / "x", bundle.pack(tree))
    found = bundle.read(tmp_path / "x")
    for mine, expected in zip([*found["a"][:2], found["a"][3]["b"]], [array, array[:0], array.T], strict=True):
        assert mine.dtype == array.dtype
        assert mine.shape == expected.shape
        assert mine.tobytes() == np.ascontiguousarray(expected).tobytes()
    assert found["a"][2] == array[0, 0]
    assert found["n"] == tree["n"]


def _numpy_type(name):
    import ml_dtypes

    return getattr(ml_dtypes, name, name)


def test_a_bundle_that_was_changed_anywhere_is_refused(tmp_path):
    assert train(tmp_path, crash=5) is None
    path = bundles(tmp_path)[-1]
    content = path.read_bytes()
    places = sorted(
        {*range(0, len(content), max(1, len(content) // 300)), *range(64), *range(len(content) - 64, len(content))}
    )
    for place in places:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(bundle.DamagedError, match="is torn or was changed"):
            bundle.read(path)
        path.write_bytes(content[:place])
        with pytest.raises(bundle.DamagedError, match="is torn or was changed"):
            bundle.read(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(bundle.DamagedError):
        bundle.read(path)
    path.write_bytes(content)
    assert bundle.read(path)["position"] == {"epoch": 0, "batch": 3}


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] if how == "torn" else content[:middle] + b"\xff\x00" + content[middle + 2 :])


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["torn", "changed"])
def test_a_damaged_bundle_has_the_one_before_used(tmp_path, uninterrupted, how):
    assert train(tmp_path, crash=17) is None
    damage(bundles(tmp_path)[-1], how)
    with pytest.warns(
        UserWarning, match=r"bundle-00000005.npz.* is torn or was changed.* resumes from bundle-00000004.npz"
    ):
        model = train(tmp_path)
    assert model.resume.resumed_from == (1, 2)
    assert_same(model, uninterrupted)


def test_with_damaged_bundles_only_nothing_begins(tmp_path):
    assert train(tmp_path, crash=17) is None
    for path in bundles(tmp_path):
        damage(path, "torn")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")}
    with pytest.raises(RuntimeError, match="No bundle is left to resume from"):
        train(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.npz")} == before


@pytest.mark.once
def test_a_damaged_end_is_reached_again(tmp_path, uninterrupted):
    train(tmp_path)
    damage(tmp_path / "finished.npz", "torn")
    with pytest.warns(UserWarning, match=r"finished.npz.* resumes from bundle-00000010.npz"):
        assert_same(train(tmp_path), uninterrupted)


@pytest.mark.once
def test_what_a_killed_process_left_is_removed(tmp_path):
    assert train(tmp_path, crash=5) is None
    torn = tmp_path / ".bundle-00000002.npz.1234abcd.tmp"
    torn.write_bytes(b"torn")
    train(tmp_path)
    assert not torn.exists()


def run_in(directory, epochs=3, **arguments):
    """A short run."""
    return train(directory, model=simple(), epochs=epochs, **arguments)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "here"
    with op_determinism():
        run_in(directory)
    return directory


def as_directory(path):
    (path / "finished.npz").unlink()
    (path / "finished.npz").mkdir()


def as_pipe(path):
    bundles(path)[-1].unlink()
    os.mkfifo(path / "bundle-00000010.npz")


def locked_by_link(path):
    (path / "victim").write_text("precious")
    (path / "lock").unlink()
    (path / "lock").symlink_to(path / "victim")


def with_other_names(path):
    for each in path.glob("*.npz"):
        each.rename(f"{each}.part")


def of_the_format(number):
    def write(path):
        with np.load(path / "finished.npz") as archive:
            arrays = {name: archive[name] for name in archive.files if name != "state.json"}
            tree = json.loads(archive["state.json"])["tree"]
        bundle.write(path / "finished.npz", bundle.Packed(json.dumps({"format": number, "tree": tree}), arrays))

    return write


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (as_directory, RuntimeError, r"finished.npz must be a file, and is something else. Remove it"),
        (as_pipe, RuntimeError, r"bundle-00000010.npz must be a file, and is something else"),
        (locked_by_link, RuntimeError, r"lock must be a file, and is a link"),
        (with_other_names, RuntimeError, r"No bundle is left to resume from:(.|\n)*.part looks like a bundle"),
        (of_the_format(1), ValueError, r"has format 1, of another version of keras_optkit; this one reads 2"),
    ],
)
def test_odd_files_are_refused(tmp_path, finished, change, error, message):
    shutil.copytree(finished, tmp_path / "here")
    change(tmp_path / "here")
    with pytest.raises(error, match=message):
        run_in(tmp_path / "here")
    if change is locked_by_link:
        assert (tmp_path / "here" / "victim").read_text() == "precious"
    else:
        filelock.FileLock(tmp_path / "here" / "lock").acquire(timeout=0)  # it is free again


@pytest.mark.once
def test_a_bundle_under_another_name_is_not_taken_for_it(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "here")
    shutil.copy(bundles(tmp_path / "here")[0], tmp_path / "here" / "finished.npz")
    with pytest.warns(UserWarning, match=r"finished.npz was written as bundle-00000009.npz.* resumes from .*10.npz"):
        assert run_in(tmp_path / "here").resume.resumed_from == (3, 0)


def test_files_of_others_stay(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "here")
    (tmp_path / "here" / ".x.tmp").mkdir()
    (tmp_path / "here" / ".notes.txt.1234abcd.tmp").write_text("mine")
    assert run_in(tmp_path / "here", epochs=4).resume.resumed_from == (3, 0)
    assert (tmp_path / "here" / ".x.tmp").is_dir()
    assert (tmp_path / "here" / ".notes.txt.1234abcd.tmp").read_text() == "mine"


@pytest.mark.long
@pytest.mark.once
def test_the_end_alone_is_enough_for_more_epochs(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "here")
    for path in bundles(tmp_path / "here"):
        path.unlink()
    longer = run_in(tmp_path / "here", epochs=4)
    assert longer.resume.resumed_from == (3, 0)
    assert_same(longer, run_in(tmp_path / "whole", epochs=4))
    assert [path.name for path in bundles(tmp_path / "here")] == [f"bundle-000000{n}.npz" for n in (13, 14)]


def test_the_end_is_not_enough_where_it_is_an_average(tmp_path):
    def fit(epochs):
        model = simple()
        model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse", run_eagerly=True)
        return train(tmp_path, model=model, epochs=epochs)

    fit(2)
    for path in bundles(tmp_path):
        path.unlink()
    with pytest.raises(
        RuntimeError, match=r"finished.npz holds what the run was left with, and not what it trained on"
    ):
        fit(3)


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Python's handler, which a process in the background does not have."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_writes_a_bundle_after_the_batch(tmp_path, capsys):
    expected = run_in(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path / "cut", every=100, callbacks=[At(interrupt, batch=3, epoch=1)])
    assert "SIGINT; the run in" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    model = run_in(tmp_path / "cut", every=100)
    assert model.resume.resumed_from == (1, 4)
    assert_same(model, expected)


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def twice(model):
        interrupt(model)
        interrupt(model)
        raise AssertionError("it has not ended")

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, every=100, callbacks=[At(twice, batch=3, epoch=0)])
    assert not bundles(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.once
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_the_very_end_is_not_lost(tmp_path):
    class AtEnd(keras.callbacks.Callback):
        stateless = True

        def on_train_end(self, logs=None):
            interrupt(None)

    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, callbacks=[AtEnd()])
    assert run_in(tmp_path).seen == []  # it had been finished


@pytest.mark.once
def test_a_handler_of_somebody_else_for_ctrl_c_stays(tmp_path):
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(1))
    try:
        assert run_in(tmp_path, callbacks=[At(interrupt, batch=3, epoch=1)]) is not None
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [1]


# -- the disk, locks, threads -----------------------------------------------------------------------------------------


@pytest.fixture
def small_files():
    """Lets this process write files of so many bytes at most, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.once
def test_a_full_disk_is_an_error_and_leaves_the_last_bundle(tmp_path, uninterrupted, small_files):
    class Fill(keras.callbacks.Callback):
        stateless = True

        def on_train_batch_end(self, batch, logs=None):
            if batch == 7:
                small_files(3000)

    with pytest.raises(OSError, match="File too large"):
        train(tmp_path, callbacks=[Fill()])
    small_files(resource.RLIM_INFINITY)
    kept = [path.name for path in bundles(tmp_path)]  # the second one may have been in the middle of being written
    assert kept in (["bundle-00000001.npz"], ["bundle-00000001.npz", "bundle-00000002.npz"])
    assert not list(tmp_path.glob(".*"))
    model = train(tmp_path)
    assert model.resume.resumed_from == (0, 3 * len(kept))
    assert_same(model, uninterrupted)


@pytest.mark.parametrize("directory", ["/proc/resume", "/sys/resume"])
def test_a_directory_that_cannot_be_written_to_is_an_error_at_once(directory):
    model = compiled()
    before = model.get_weights()
    with pytest.raises(OSError, match=directory):
        train(Path(directory), model=model)
    for a, b in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.once
def test_a_second_process_in_the_directory_is_refused(tmp_path):
    hold = "import filelock, sys; lock = filelock.FileLock(sys.argv[1]).acquire(); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="is in use by another process"):
            train(tmp_path)
        other.stdin.close()
        other.wait()
    assert train(tmp_path) is not None
    filelock.FileLock(tmp_path / "lock").acquire(timeout=0)  # and it is free afterwards


def test_the_lock_is_free_after_a_failure(tmp_path):
    assert train(tmp_path, crash=5) is None
    with filelock.FileLock(tmp_path / "lock").acquire(timeout=0):
        pass
    with pytest.raises(ValueError, match="steps_per_epoch"):  # by the data, before there are callbacks
        train(tmp_path, steps_per_epoch=2)
    with pytest.raises(ValueError, match="another run"):
        train(tmp_path, data=shuffled(seed=9))
    with filelock.FileLock(tmp_path / "lock").acquire(timeout=0):
        pass


def test_it_can_train_in_another_thread(tmp_path, uninterrupted):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(tmp_path)))
    thread.start()
    thread.join()
    assert_same(found[0], uninterrupted)


def test_outside_of_fit_it_raises(tmp_path):
    callbacks = keras.callbacks.CallbackList([Resume(tmp_path)], model=compiled())
    with pytest.raises(RuntimeError, match=r"works in keras.Model.fit only"):
        callbacks.on_train_begin()


# -- processes --------------------------------------------------------------------------------------------------------


@pytest.mark.only_on("tensorflow", because="a command about TensorFlow, which runs once")
@pytest.mark.long  # tests/test_examples.py kills a training and continues it
@pytest.mark.parametrize("scenario", ["cnn", "transformer", "replicas"])
def test_killed_trainings_end_as_if_left_alone(scenario):
    """A share of what `python tests/kill.py` does, in processes of its own."""
    command = [sys.executable, Path(__file__).with_name("kill.py"), "--runs", "1", "--kills", "3"]
    done = subprocess.run(
        [*command, "--scenarios", scenario], capture_output=True, text=True, env=os.environ, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("all equal") == 1
    assert done.stdout.count("SIG") == 3

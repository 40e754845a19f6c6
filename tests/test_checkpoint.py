"""The callback Checkpoint: which files there are after which values, and after what has gone wrong."""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import keras
import numpy as np
import pytest
from small import (
    Alternating,
    At,
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

import keras_optkit as ok
from keras_optkit.callbacks import AveragedWeights, Checkpoint
from keras_optkit.callbacks.listing import List
from keras_optkit.testing.problems import two_replicas

STOCK = keras.optimizers
NAN, INF = math.nan, math.inf


def walk(callback, curve, initial_epoch=0):
    """Shows the callback a curve, epoch by epoch; yields after each."""
    model = linear_model("sgd", dtype="float32")
    callback.set_model(model)
    callback.on_train_begin()
    for epoch, value in enumerate(curve, initial_epoch):
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, {"loss": 1.0, "val_loss": value})
        yield epoch + 1
    callback.on_train_end()


def walked(callback, curve, initial_epoch=0):
    assert list(walk(callback, curve, initial_epoch))


def files(directory):
    return sorted(path.name for path in Path(directory).iterdir() if path.name != "checkpoints.json")


def epochs(directory):
    return sorted({int(name[len("epoch=") :][:4]) for name in files(directory)})


def updates(directory):
    return sorted(int(name.split("update=")[1][:6]) for name in files(directory))


def listed(directory):
    return json.loads((Path(directory) / "checkpoints.json").read_text())["checkpoints"]


# -- which files are kept ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "last_n"), [(1, 1), (2, 3), (3, 0), (0, 2)])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_k_and_the_last_n_are_kept_at_any_time(mode, top_k, last_n, tmp_path):
    curve = [0.5, NAN, 0.25, 0.5, INF, 0.125, 0.75, -INF, 0.125, 0.5, 0.875, NAN]
    sign = 1 if mode == "min" else -1
    callback = Checkpoint(tmp_path, "val_loss", mode, top_k, last_n, save="weights")
    for now in walk(callback, curve):
        usable = [(sign * v, e) for e, v in enumerate(curve[:now], 1) if not math.isnan(v) and v != sign * INF]
        best = [epoch for _, epoch in sorted(usable)]
        assert epochs(tmp_path) == sorted({*best[:top_k], *range(max(1, now - last_n + 1), now + 1)})
        assert [entry["file"] for entry in listed(tmp_path)] == files(tmp_path)
        if top_k and best:
            assert callback.best.name.startswith(f"epoch={best[0]:04d}")
        if last_n:
            assert callback.latest.name.startswith(f"epoch={now:04d}")


def test_the_best_survives_a_restart(tmp_path):
    """Where a fresh ModelCheckpoint would overwrite it by the first epoch."""
    walked(Checkpoint(tmp_path, save="weights"), [0.5, 0.25, 0.5])
    assert epochs(tmp_path) == [2, 3]
    again = Checkpoint(tmp_path, save="weights")
    walked(again, [0.75, 0.5, 0.375])  # a fresh training, from epoch 1
    assert files(tmp_path) == [
        "epoch=0002-update=000000-val_loss=0.25.weights.h5",
        "epoch=0003-update=000000-val_loss=0.375.weights.h5",
    ]
    walked(again, [0.125])
    assert files(tmp_path) == ["epoch=0001-update=000000-val_loss=0.125.weights.h5"]


def test_names_that_would_be_the_same_get_a_number(tmp_path):
    values = [0.1 + 1e-9, 0.1 + 2e-9, 0.1 + 1e-9]
    for value in values:
        walked(Checkpoint(tmp_path, top_k=3, last_n=2, save="weights"), [value])
    name = "epoch=0001-update=000000-val_loss=0.1"
    assert files(tmp_path) == [f"{name}-2.weights.h5", f"{name}.weights.h5"]
    assert [entry["value"] for entry in listed(tmp_path)] == [repr(values[1]), repr(values[2])]


def test_a_name_in_the_logs_becomes_one_of_a_file(tmp_path):
    model = noisy_model()
    model.compile("sgd", "mse", metrics=[keras.metrics.MeanAbsoluteError(name="a/b c")])
    fit(model, *regression(dtype="float32"), Checkpoint(tmp_path, "a/b c", save="weights"), epochs=1)
    assert files(tmp_path)[0].startswith("epoch=0001-update=000006-a_b_c=")


def test_epochs_without_validation_are_written_without_a_value(tmp_path):
    x, y = regression(dtype="float32")
    checkpoint = Checkpoint(tmp_path, last_n=3, save="weights")
    fit(linear_model("sgd", dtype="float32"), x, y, checkpoint, epochs=3, validation_data=(x, y), validation_freq=2)
    assert [entry["value"] is None for entry in listed(tmp_path)] == [True, False, True]
    assert checkpoint.best.name.startswith("epoch=0002")


# -- what is in them --------------------------------------------------------------------------------------------------


def test_models_load_without_custom_objects_and_train_on(tmp_path):
    x, y = regression(dtype="float32")
    model, seen = noisy_model(ok.optimizers.AdamW(ok.schedules.Linear(0.1, 40))), Snapshots()
    checkpoint = Checkpoint(tmp_path, "val_loss", verbose=0)
    assert (checkpoint.best, checkpoint.latest) == (None, None)
    fit(model, x, y, checkpoint, seen, epochs=4, validation_data=(x, y))
    best = int(np.argmin([logs["val_loss"] for logs in seen.logs]))
    for loaded, epoch in ((Checkpoint(tmp_path).load_best(), best), (Checkpoint(tmp_path).load_latest(), 3)):
        assert_weights(loaded, seen.weights[epoch])
        assert isinstance(loaded.optimizer, ok.optimizers.AdamW)
        assert int(loaded.optimizer.iterations) == 6 * (epoch + 1)
    for each in (model, loaded):
        fit(each, x, y, epochs=1)
    assert_weights(loaded, model.get_weights())


def test_weights_are_loaded_into_a_model(tmp_path):
    x, y = regression(dtype="float32")
    seen = Snapshots()
    checkpoint = Checkpoint(tmp_path, "loss", "max", save="weights")
    fit(noisy_model(STOCK.SGD(0.01)), x, y, checkpoint, seen, epochs=3)
    best = int(np.argmax([logs["loss"] for logs in seen.logs]))
    other = noisy_model()
    assert checkpoint.load_best(other) is other
    assert_weights(other, seen.weights[best])
    with pytest.raises(ValueError, match=r"model must be given for .*\.weights\.h5, which holds weights alone"):
        checkpoint.load_best()


def test_there_is_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint with a value"):
        Checkpoint(tmp_path).load_best()
    with pytest.raises(ValueError, match="holds no checkpoint at all"):
        Checkpoint(tmp_path / "nowhere").load_latest()


@pytest.mark.few(1)
@pytest.mark.parametrize("averaged_first", [False, True])
def test_with_averaged_weights_they_are_what_is_written(averaged_first, tmp_path):
    x, y = regression(dtype="float32")
    model, seen = noisy_model(ok.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5)), Snapshots()
    callbacks = [Checkpoint(tmp_path / "epochs", "loss"), Checkpoint(tmp_path / "steps", top_k=0, every=4, last_n=2)]
    callbacks.insert(0 if averaged_first else 2, AveragedWeights())
    fit(model, x, y, *callbacks, seen, epochs=2)
    for directory in ("epochs", "steps"):
        loaded = Checkpoint(tmp_path / directory).load_latest()
        assert_weights(loaded, seen.weights[-1])
    assert updates(tmp_path / "steps") == [8, 12]
    assert_weights(model, seen.weights[-1])


@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
def test_two_replicas_write_one_file(tmp_path):
    x, y = regression(dtype="float32")
    with two_replicas().scope():
        model = noisy_model(ok.optimizers.Adam(0.1))
    fit(model, x, y, Checkpoint(tmp_path, "loss", every=5, last_n=1), epochs=1)
    assert updates(tmp_path) == [5, 6]
    assert_weights(Checkpoint(tmp_path).load_best(), model.get_weights())


# -- when they are written --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "arguments", "expected"),
    [
        (1, {}, range(1, 13)),
        (4, {}, [4, 8, 12]),
        (5, {}, [5, 10]),
        (4, {"steps_per_execution": 3}, [6, 9, 12]),
        (100, {}, []),
        (timedelta(days=1), {}, []),
        (timedelta(microseconds=1), {}, range(1, 13)),
        ("epoch", {"steps_per_execution": 4}, [6, 12]),
    ],
)
def test_the_last_are_written_by_updates_or_time(every, arguments, expected, tmp_path):
    model = linear_model(STOCK.SGD(0.01), dtype="float32", **arguments)
    callback = Checkpoint(tmp_path, top_k=0, last_n=99, every=every, save="weights")
    fit(model, *regression(dtype="float32"), callback)
    assert updates(tmp_path) == list(expected)


def test_by_updates_micro_batches_do_not_count(tmp_path):
    model = linear_model(ok.optimizers.SGD(0.01, gradient_accumulation_steps=4), dtype="float32")
    fit(model, *regression(dtype="float32"), Checkpoint(tmp_path, top_k=0, last_n=9, every=1, save="weights"), epochs=3)
    assert updates(tmp_path) == [1, 2, 3, 4, 5, 6]  # of 4 and 2 micro-batches


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
@pytest.mark.parametrize(
    ("counts", "every", "arguments", "expected"),
    [
        ((1, 3), 5, {}, [6, 12, 15, 21, 27, 30, 36]),  # of the one that makes most
        ((2, 0), 4, {"optimizer": None}, [4, 8, 12, 16, 20, 24]),
        ((1, 2), 5, {"steps_per_execution": 2}, [8, 12, 16, 20]),
        ((0, 0), 1, {"optimizer": None}, []),
    ],
)
def test_where_a_step_makes_several_updates_none_is_missed(counts, every, arguments, expected, tmp_path):
    model = Alternating(ok.optimizers.SGD(0.01), STOCK.SGD(0.01), counts)
    model.compile(**arguments)
    fit(model, *regression(dtype="float32"), Checkpoint(tmp_path, top_k=0, last_n=99, every=every, save="weights"))
    assert updates(tmp_path) == expected


def test_updates_that_a_callback_makes_are_counted(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    more = At(lambda m: [m.train_on_batch(x, y) for _ in range(5)], batch=1)
    fit(model, x, y, more, Checkpoint(tmp_path, top_k=0, last_n=99, every=4, save="weights"), epochs=1)
    assert updates(tmp_path) == [7, 8]


def test_files_by_updates_and_best_ones_do_not_push_each_other_out(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    fit(model, x, y, Checkpoint(tmp_path, "loss", top_k=1, last_n=2, every=4, save="weights"), epochs=3)
    assert updates(tmp_path) == [12, 16, 18]
    assert [entry["value"] is None for entry in listed(tmp_path)] == [False, True, False]


def test_what_was_trained_inside_of_an_epoch_is_what_is_written(tmp_path):
    x, y = regression(dtype="float32")
    model, held = noisy_model(STOCK.SGD(0.01)), []
    keep = At(lambda m: held.extend(np.array(w) for w in m.get_weights()), batch=3)
    fit(model, x, y, keep, Checkpoint(tmp_path, top_k=0, last_n=1, every=4), epochs=1)
    assert updates(tmp_path) == [4]
    assert_weights(Checkpoint(tmp_path).load_latest(), held)


# -- exceptions and interruptions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cause", "name"), [(boom, "RuntimeError"), (interrupt, "KeyboardInterrupt")])
def test_an_exception_has_the_model_written(cause, name, tmp_path):
    x, y = regression(dtype="float32")
    model, held = noisy_model(STOCK.SGD(0.01)), []
    keep = At(lambda m: held.extend(np.array(w) for w in m.get_weights()), batch=2, epoch=1)
    checkpoint = Checkpoint(tmp_path, "loss", last_n=0, on_exception=True)
    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        fit(model, x, y, checkpoint, keep, At(cause, batch=2, epoch=1), epochs=3)
    assert [entry["error"] for entry in listed(tmp_path)] == [None, name]
    assert checkpoint.latest.name == f"epoch=0002-update=000009-on={name}.keras"
    assert checkpoint.best.name.startswith("epoch=0001-update=000006-loss=")
    assert_weights(checkpoint.load_latest(), held)


def test_only_the_newest_exception_is_kept_and_only_if_asked_for(tmp_path):
    x, y = regression(dtype="float32")
    for wanted, batch in ((True, 1), (True, 3), (False, 4)):
        checkpoint = Checkpoint(tmp_path, top_k=0, last_n=0 if wanted else 1, on_exception=wanted, save="weights")
        with pytest.raises(RuntimeError, match="boom"):
            fit(linear_model("sgd", dtype="float32"), x, y, checkpoint, At(boom, batch=batch))
    assert files(tmp_path) == ["epoch=0001-update=000004-on=RuntimeError.weights.h5"]


def test_an_interruption_makes_no_difference(tmp_path):
    """Also not where the files of before the crash are ahead of what the training goes on from."""
    x, y = regression(dtype="float32")

    def run(*others):
        keras.utils.set_random_seed(0)
        directory = tmp_path / ("again" if others else "once")
        model = noisy_model(STOCK.SGD(0.02))
        checkpoint = Checkpoint(directory, "val_loss", top_k=2, last_n=2, every=7)
        fit(model, x, y, checkpoint, *others, epochs=5, validation_data=(x, y))
        return directory

    expected, found = run(), interrupted(run, tmp_path / "resume", after=4)
    assert files(found) == files(expected)
    assert len(files(found)) == 4
    for name in files(found):
        mine, other = (keras.saving.load_model(directory / name) for directory in (found, expected))
        assert_weights(mine, other.get_weights())


# -- what may go wrong ------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
import keras, numpy as np, keras_optkit as ok

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

full = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: limit(100000) if epoch == 1 else None)
for kept in (
    ok.callbacks.Checkpoint(sys.argv[1] + "/model", "loss"),
    ok.callbacks.Checkpoint(sys.argv[1] + "/weights", "loss", save="weights"),
    ok.callbacks.EarlyStopping("loss", patience=9, restore_best_weights=sys.argv[1] + "/stopping/best.npz"),
):
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(300), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(1e-4), "mse")
    x = np.ones((8, 100))
    try:
        model.fit(x, x[:, :1], epochs=3, verbose=0, callbacks=[kept, full])
    except OSError as error:
        print(error.errno, getattr(error, "__notes__", []))
    limit(resource.RLIM_INFINITY)
"""


@pytest.mark.long
def test_a_full_disk_is_an_error_and_leaves_what_is_there(tmp_path):
    """The process may write no more than 100 kB to a file, from the second epoch on."""
    environment = os.environ | {"PYTHONPATH": str(Path(ok.__file__).parents[1])}
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == 3 * "27 []\n", done.stderr
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(300), keras.layers.Dense(1)])
    for save in ("model", "weights"):
        (name,) = files(tmp_path / save)
        assert name.startswith("epoch=0001")
        Checkpoint(tmp_path / save).load_best(model)
    assert files(tmp_path / "stopping") == ["best.npz"]
    assert len(np.load(tmp_path / "stopping" / "best.npz").files) == 5


def test_a_list_that_cannot_be_written_takes_no_file_away(tmp_path):
    callback = Checkpoint(tmp_path, save="weights")
    steps = walk(callback, [0.5, 0.25, 0.125])
    next(steps)
    before = files(tmp_path)
    (tmp_path / "checkpoints.json").rename(tmp_path / "kept")
    (tmp_path / "checkpoints.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        next(steps)
    assert files(tmp_path) == [*before, "kept"]


def test_what_a_killed_process_has_left_is_taken_away_and_nothing_else(tmp_path):
    walked(Checkpoint(tmp_path, save="weights"), [0.5])
    left = [".1234abcd.tmp.epoch=0002-update=000000-val_loss=0.5.weights.h5", ".checkpoints.json.1234abcd.tmp"]
    others = [".draft.tmp.md", ".1234abcd.tmp.best.keras", ".notes.1234abcd.tmp", "notes.tmp", "last.keras"]
    for name in [*left, *others]:
        (tmp_path / name).touch()
    walked(Checkpoint(tmp_path, save="weights"), [0.75])
    assert epochs_of(set(files(tmp_path)) - set(others)) == [1, 1]
    assert set(others) < set(files(tmp_path))


def epochs_of(names):
    return sorted(int(name[len("epoch=") :][:4]) for name in names)


def entry_of(directory, **changed):
    listed = List.read(directory)
    return listed, dataclasses.replace(listed.entries[-1], **changed)


@pytest.mark.parametrize("content", ["announced", "before", "another"])
def test_a_process_may_end_when_a_file_has_its_name_and_the_list_does_not_say_so(content, tmp_path):
    walked(Checkpoint(tmp_path, last_n=2, save="weights"), [0.5, 0.25])
    name = "epoch=0003-update=000000-val_loss=0.125.weights.h5"
    new = b"new"
    listed, entry = entry_of(tmp_path, file=name, value=0.125, epoch=3, sha256=hashlib.sha256(new).hexdigest())
    listed.announce(entry)
    if content == "announced":
        (tmp_path / name).write_bytes(new)
        assert Checkpoint(tmp_path).best.name == name
        assert Checkpoint(tmp_path).latest.name == name
    elif content == "before":
        assert Checkpoint(tmp_path).latest.name.startswith("epoch=0002")
    else:
        (tmp_path / name).write_bytes(b"torn")
        with pytest.warns(UserWarning, match=f"has {name}, not listed in checkpoints.json: left alone"):
            assert Checkpoint(tmp_path).latest.name.startswith("epoch=0002")


def test_one_that_is_written_once_more_is_never_taken_for_damaged(tmp_path):
    """As after a crash, from which training resumes at an earlier state; the process may end at any moment."""
    walked(Checkpoint(tmp_path, save="weights"), [0.5])
    listed, entry = entry_of(tmp_path, sha256=hashlib.sha256(b"again").hexdigest())
    before = Checkpoint(tmp_path).best.read_bytes()
    listed.announce(entry)
    assert Checkpoint(tmp_path).best.read_bytes() == before
    Checkpoint(tmp_path).best.write_bytes(b"again")
    assert Checkpoint(tmp_path).best.read_bytes() == b"again"


def test_files_that_are_gone_are_forgotten_with_a_warning(tmp_path):
    walked(Checkpoint(tmp_path, last_n=0, top_k=2, save="weights"), [0.5, 0.25, 0.125])
    callback = Checkpoint(tmp_path, last_n=0, top_k=2, save="weights")
    callback.best.unlink()
    with pytest.warns(UserWarning, match="epoch=0003.* is no longer there. It is left out of checkpoints.json"):
        assert callback.best.name.startswith("epoch=0002")
    with pytest.warns(UserWarning, match="no longer there"):
        walked(callback, [0.75, 0.5], initial_epoch=3)
    assert epochs(tmp_path) == [2, 5]


def test_files_that_go_while_it_trains_are_forgotten_too(tmp_path):
    callback = Checkpoint(tmp_path, last_n=0, top_k=3, save="weights")
    steps = walk(callback, [0.5, 0.25, 0.125])
    next(steps)
    next(steps)
    callback.best.unlink()
    with pytest.warns(UserWarning, match="epoch=0002.* is no longer there"):
        next(steps)
    assert [entry["file"] for entry in listed(tmp_path)] == files(tmp_path)
    assert epochs(tmp_path) == [1, 3]


def test_a_damaged_file_is_an_error_where_it_is_wanted_and_left_out_by_the_next_fit(tmp_path):
    walked(Checkpoint(tmp_path, top_k=2, last_n=0, save="weights"), [0.5, 0.25])
    path = Checkpoint(tmp_path).best
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    model = linear_model("sgd", dtype="float32")
    for use in (lambda c: c.best, lambda c: c.latest, lambda c: c.load_best(model), lambda c: c.load_latest(model)):
        with pytest.raises(ValueError, match=r"epoch=0002.* is not what was written: its digest is wrong. Remove it"):
            use(Checkpoint(tmp_path))
    with pytest.warns(UserWarning, match=r"epoch=0002.* is not what was written: .* It is left out"):
        walked(Checkpoint(tmp_path, top_k=2, last_n=0, save="weights"), [0.375, 0.25])
    assert path.read_bytes() == content  # not overwritten by the one that would have its name
    with pytest.warns(UserWarning, match=f"{path.name}, not listed"):
        assert Checkpoint(tmp_path).best.name == path.name.replace(".weights", "-2.weights")


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "max"},
        {"superseded": ["../notes.keras", "notes.txt"]},
        {"checkpoints": [{"file": True}]},
        {"more": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_the_list_shows_to_people_is_not_believed(change, tmp_path):
    walked(Checkpoint(tmp_path, top_k=2, save="weights"), [0.5, 0.25, 0.375])
    best, path = Checkpoint(tmp_path).best, tmp_path / "checkpoints.json"
    notes = [tmp_path.parent / "notes.keras", tmp_path / "notes.txt"]
    for note in notes:
        note.touch()
    path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=1))
    changed = pytest.warns(UserWarning, match=r"checkpoints\.json was changed. It is read as it was written")
    with changed:
        assert Checkpoint(tmp_path).best == best
    with changed:
        walked(Checkpoint(tmp_path, top_k=2, save="weights"), [0.4375])
    assert Checkpoint(tmp_path).best == best
    assert all(note.exists() for note in notes)


def test_names_that_lead_elsewhere_are_refused_whatever_the_digest_says(tmp_path):
    walked(Checkpoint(tmp_path, save="weights"), [0.5])
    for name in ("../epoch=0001-update=000001.keras", "notes.txt", "epoch=0001-update=000001-loss=a/../b.keras"):
        listed, entry = entry_of(tmp_path, file=name)
        listed.announce(entry)
        with pytest.raises(ValueError, match="is not the name of a checkpoint"):
            _ = Checkpoint(tmp_path).best
        listed.announce(listed.entries[-1])


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
def test_a_model_that_files_cannot_hold_is_refused_before_training(tmp_path):
    optimizers = ok.optimizers.Adam(0.01), STOCK.Adam(0.01)
    model = Alternating(*optimizers)
    model.compile()
    with pytest.raises(ValueError, match=r"save must be 'weights' for model 'alternating.*', got 'model'"):
        fit(model, *regression(dtype="float32"), Checkpoint(tmp_path, "loss"))
    assert int(optimizers[0].iterations) == 0


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
def test_files_hold_the_state_of_all_optimizers(tmp_path):
    x, y = regression(dtype="float32")
    model, other = (Alternating(ok.optimizers.Adam(0.01), STOCK.Adam(0.01)) for _ in range(2))
    for each, epochs in ((model, 2), (other, 1)):
        each.compile()
        callback = Checkpoint(tmp_path / str(epochs), "loss", save="weights")
        fit(each, x, y, callback, epochs=epochs)
    Checkpoint(tmp_path / "2").load_latest(other)
    for each in (model, other):
        fit(each, x, y, epochs=1)
    assert_weights(other, model.get_weights())


def test_a_directory_is_for_one_of_them(tmp_path):
    one, other = Checkpoint(tmp_path, "loss"), Checkpoint(tmp_path / ".." / tmp_path.name, "loss")
    with pytest.raises(ValueError, match=r"directory=.* is that of another Checkpoint of this fit, too"):
        fit(noisy_model(), *regression(dtype="float32"), one, other)


@pytest.mark.parametrize(
    "text", ["", '{"format": 2, "monit', "[]", '{"format": 1}', '{"sealed": "{}", "sha256": ""}', "\0", 999 * "["]
)
def test_a_damaged_list_is_an_error(text, tmp_path):
    (tmp_path / "checkpoints.json").write_text(text)
    callback = Checkpoint(tmp_path)
    for use in (lambda: walked(callback, [0.5]), lambda: callback.best):
        with pytest.raises(ValueError, match=r"checkpoints\.json is not a list of checkpoints.*Move it away"):
            use()
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": "loss"}, "monitor='val_loss' and mode='min', got 'loss' and 'auto'"),
        ({"mode": "max"}, "monitor='val_loss' and mode='min', got 'val_loss' and 'max'"),
    ],
)
def test_values_of_another_kind_are_not_mixed(arguments, message, tmp_path):
    walked(Checkpoint(tmp_path, save="weights"), [0.5])
    with pytest.raises(ValueError, match=message):
        walked(Checkpoint(tmp_path, save="weights", **arguments), [0.5])
    assert len(files(tmp_path)) == 1


def test_an_unknown_monitor_raises_with_the_names_that_there_are(tmp_path):
    x, y = regression(dtype="float32")
    with pytest.raises(ValueError, match=r"got 'val_loss'\. fit was given no validation data"):
        fit(noisy_model(), x, y, Checkpoint(tmp_path))
    assert files(tmp_path) == []


@pytest.mark.parametrize("made", [Checkpoint, ok.callbacks.Resume])
def test_a_time_in_the_config_is_a_number_of_seconds(made):
    config = json.loads(json.dumps(made("here", every=timedelta(minutes=2)).get_config()))
    assert config["every"] == {"timedelta": 120.0}
    assert made.from_config(config).every == timedelta(minutes=2)


def test_it_says_what_it_writes(tmp_path, capsys):
    walked(Checkpoint(tmp_path, save="weights", verbose=1), [0.5])
    name = "epoch=0001-update=000000-val_loss=0.5.weights.h5"
    assert capsys.readouterr().out == f"Checkpoint: {tmp_path / name}\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"directory": 3}, TypeError, "directory must be a path.*3"),
        ({"directory": b"here"}, TypeError, "directory must be a path.*b'here'"),
        ({"directory": ""}, ValueError, "directory must be a path, which is not empty.*''"),
        ({"directory": "a\0b"}, ValueError, "directory must be a path.*null"),
        ({"monitor": None}, TypeError, "monitor must be the name.*None"),
        ({"mode": "up"}, ValueError, "mode.*'auto', 'min', 'max'.*'up'"),
        ({"top_k": -1}, ValueError, "top_k.*at least 0.*-1"),
        ({"last_n": 1.5}, TypeError, r"last_n.*1\.5"),
        ({"every": 0}, ValueError, "every.*at least 1.*0"),
        ({"every": "step"}, ValueError, "every.*'epoch'.*'step'"),
        ({"every": timedelta(0)}, ValueError, "every must be a positive timedelta"),
        ({"save": "keras"}, ValueError, "save.*'model', 'weights'.*'keras'"),
        ({"on_exception": 1}, TypeError, "on_exception.*1"),
        ({"top_k": 0, "last_n": 0}, ValueError, "top_k, last_n or on_exception must ask for files"),
        ({"verbose": 2}, ValueError, "verbose.*2"),
    ],
)
def test_it_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Checkpoint(**{"directory": "here"} | arguments)


@keras.saving.register_keras_serializable("tests")
class Unbuilt(keras.Model):
    """Counts as built before its layers are."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.body, self.unused = keras.layers.Dense(1), keras.layers.Dense(1)
        self.built = True

    def call(self, x):
        return self.body(x)


@pytest.mark.parametrize("save", ["weights", "model"])
def test_weights_of_layers_that_are_not_built_are_refused_and_not_passed_over(save, tmp_path):
    x, y = regression(dtype="float32")
    model, fresh = Unbuilt(), Unbuilt()
    for each in (model, fresh):
        each.compile(ok.optimizers.Adam(0.01), "mse")
    checkpoint = Checkpoint(tmp_path, monitor=None, top_k=0, save=save)
    fit(model, x, y, checkpoint, epochs=1)
    message = r"1 layers of 'unbuilt.*' that .* has weights for are not: dense.*call it"
    with pytest.raises(ValueError, match=message):
        checkpoint.load_latest(fresh)
    if save == "model":
        with pytest.warns(UserWarning, match="its saved state .* is kept"), pytest.raises(ValueError, match=message):
            checkpoint.load_latest()
    fresh(x)
    checkpoint.load_latest(fresh)
    assert_weights(fresh, model.get_weights())
    assert int(fresh.optimizer.iterations) == int(model.optimizer.iterations) > 0


class WithoutCall(keras.Model):
    """Trains what is inside of it; Keras never marks it as built."""

    def __init__(self):
        super().__init__()
        self.inside = linear_model("sgd", dtype="float32")

    def train_step(self, data):
        return self.inside.train_step(data)


@pytest.mark.only_on("tensorflow", because="a model without call cannot be trained on JAX")
@pytest.mark.parametrize("save", ["weights", "model"])
def test_a_model_without_call_is_saved(save, tmp_path):
    x, y = regression(dtype="float32")
    model = WithoutCall()
    model.compile("sgd")
    fit(model, x, y, Checkpoint(tmp_path, monitor=None, top_k=0, save=save), epochs=1)
    assert not np.allclose(model.inside.get_weights()[0], 0.5)
    fresh = WithoutCall()
    Checkpoint(tmp_path).load_latest(fresh)
    assert_weights(fresh, model.get_weights())

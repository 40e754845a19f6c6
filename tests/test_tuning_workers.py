"""Searches whose trials run in worker processes."""

import dataclasses
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time

import keras
import kill_search
import numpy as np
import pytest
import tensorflow as tf

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, payload, pruners
from keras_optkit.tuning.pruners import Standing

RNG = np.random.default_rng(0)
X = RNG.normal(size=(48, 2)).astype("float32")
DATA = X, (X[:, 0] > X[:, 1]).astype("float32")


class UnpicklableError(ValueError):
    def __init__(self, message, number):
        super().__init__(f"{message} {number}")


def fails(kind, here):
    """What a trial does that does not train; `here` is the process of the search."""
    if kind == "raises":
        raise UnpicklableError("no such layer", 3)
    if kind == "crashes":
        if os.getpid() != here:
            os.abort()
        raise ValueError("would crash")
    if kind == "is killed" and os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs":
        time.sleep(1000)
    kept = []
    while kind == "allocates":
        kept.append(np.ones(2**24, "uint8"))


def line(hp, here):
    fails(hp.get("kind"), here)
    start = keras.initializers.Constant(math.nan if hp.get("kind") == "nan" else 0.5)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, "sigmoid", kernel_initializer=start)])
    model.compile(keras.optimizers.SGD(hp.get("rate", 0.1)), "binary_crossentropy", run_eagerly=True)
    return model


def search(space, **arguments):
    arguments = {"objective": "val_loss", "epochs": 2, "seed": 0, "verbose": 0} | arguments
    here = os.getpid()
    return ok.tuning.search(lambda hp: line(hp, here), space, DATA, **arguments)


def test_two_workers_run_the_trials_of_one(tmp_path, capfd):
    """Points, scores, curves and model are the same; failures have their reasons, and a crash ends no more than one."""
    space = {"rate": Float(1e-2, 1.0, log=True), "kind": Choice(["fine", "raises", "nan", "crashes"])}
    arguments = {"max_trials": 4, "seed": 35, "verbose": 1}
    logs = tmp_path / "logs"
    several = search(space, workers=2, log_dir=logs, **arguments)
    said = capfd.readouterr().out
    alone = search(space, **arguments | {"verbose": 0})
    kinds = [trial.values.kind for trial in alone.trials]
    assert kinds == ["fine", "crashes", "nan", "raises"]
    for one, other in zip(alone.trials, several.trials, strict=True):
        assert one.values == other.values
        if one.values.kind == "crashes":
            assert other.status == "failed"
            assert other.reason.startswith("Its process was ended by SIGABRT (Aborted). (rate=")
            continue
        assert (one.status, one.message, one.epochs, one.best_epoch) == (
            other.status, other.message, other.epochs, other.best_epoch,
        )  # fmt: skip
        if one.score is not None:
            assert one.score == pytest.approx(other.score, rel=1e-5)
            assert one.history[0]["metrics"]["loss"] == pytest.approx(other.history[0]["metrics"]["loss"], rel=1e-5)
    np.testing.assert_allclose(several.best_model.get_weights()[0], alone.best_model.get_weights()[0], rtol=1e-5)
    assert f"    trial {kinds.index('nan')}: val_loss failed: loss is nan in epoch 1." in said
    assert {path.name for path in logs.iterdir()} == {f"trial_{i}" for i in range(4)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be an integer at least 1, got 0."),
        ({"workers": 2.0}, TypeError, "workers must be an integer"),
        ({"executor": "dask"}, TypeError, "executor must be a concurrent.futures.Executor or None, got 'dask'."),
        ({"trial_time_limit": 0}, ValueError, "trial_time_limit must be a finite number"),
        ({"trial_memory_limit": 0.5}, TypeError, "trial_memory_limit must be an integer"),
    ],
)
def test_bad_arguments(changed, error, message):
    with pytest.raises(error, match=message):
        search({"rate": Choice([0.1])}, **changed)


LOCK = threading.Lock()
SENT = "must be something that cloudpickle can send to another process where workers=2 is given, got"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"callbacks": lambda lock=LOCK: [lock]}, f"callbacks {SENT} list: TypeError: cannot pickle"),
        ({"build": lambda hp, lock=LOCK: line(hp, lock)}, f"build {SENT} <function "),
        ({"data": tf.data.Dataset.from_tensor_slices(DATA).batch(8)}, f"data {SENT} .*Give arrays, or a keras.utils"),
    ],
    ids=["callbacks", "build", "data"],
)
def test_what_cannot_be_sent_is_named(tmp_path, changed, message):
    given = {"build": lambda hp: line(hp, 0), "space": {"rate": Choice([0.1])}, "data": DATA} | changed
    validation = DATA if "data" in changed else None
    with pytest.raises(TypeError, match=message):
        ok.tuning.search(**given, validation=validation, objective="val_loss", directory=tmp_path, workers=2, verbose=0)
    assert not list(tmp_path.glob(payload.PAYLOADS))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ImportError, match=r'workers=2 needs cloudpickle.*"keras-optkit\[workers\]"'):
        search({"rate": Choice([0.1])}, workers=2)


class OfAnother(ok.tuning.Tuner):
    def run_trial(self, trial, *args, **kwargs):
        return super().run_trial(trial, *args, **kwargs)


def test_a_tuner_that_runs_its_trials_itself_has_no_workers(tmp_path):
    hypermodel = ok.tuning.HyperModel(lambda hp: line(hp, 0), {"rate": Choice([0.1])})
    oracle = ok.tuning.OptunaOracle("val_loss")
    with pytest.raises(ValueError, match="workers=2 must be left out where run_trial is another one"):
        OfAnother(oracle, hypermodel, directory=tmp_path, workers=2)


# What workers are given


def training(tmp_path, **fit):
    hypermodel = ok.tuning.HyperModel(lambda hp: line(hp, 0), {"rate": Choice([0.1])})
    tuner = ok.tuning.Tuner(ok.tuning.OptunaOracle("val_loss"), hypermodel, directory=tmp_path, verbose=0)
    return tuner.training((), fit)


def test_arrays_are_mapped_and_not_shared_when_they_are_changed(tmp_path):
    arrays = np.arange(1000.0), np.arange(7, dtype="int8"), np.ones((3, 5), "float32")
    given = payload.write(tmp_path, training(tmp_path / "search", x=arrays[0], y=arrays[1:]), "workers=2")
    first, second = payload.read(given), payload.read(given)
    first.fit["x"][0] = -1.0
    for each, expected in zip((second.fit["x"], *second.fit["y"]), arrays, strict=True):
        np.testing.assert_array_equal(each, expected)
        assert each.dtype == expected.dtype
    assert arrays[0][0] == 0.0
    (path,) = tmp_path.glob(payload.PAYLOADS)
    content = path.read_bytes()
    assert content.count(arrays[0].tobytes()) == 1
    assert content.index(arrays[0].tobytes()) % 64 == 0


def test_another_file_is_not_opened(tmp_path):
    given = payload.write(tmp_path, training(tmp_path / "search"), "workers=2")
    other = dataclasses.replace(given, digest="0" * 64)
    with pytest.raises(RuntimeError, match="was changed after it had been written"):
        payload.read(other)
    given.path.unlink()
    with pytest.raises(RuntimeError, match="is not there: directory must be on a disk that all workers see"):
        payload.read(given)


def test_the_settings_of_the_process_are_those_of_the_search(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.set_floatx("float16")
    given = payload.write(tmp_path, training(tmp_path / "search"), "workers=2")
    keras.config.set_dtype_policy("float32")
    keras.config.set_floatx("float32")
    payload.read(given)
    assert keras.config.floatx() == "float16"
    assert keras.config.dtype_policy().name == "mixed_bfloat16"


def test_what_is_registered_is_so_in_a_worker(tmp_path):
    @keras.saving.register_keras_serializable("workers")
    class Registered(keras.layers.Layer):
        pass

    keras.saving.get_custom_objects()["workers plain"] = Registered
    try:
        given = payload.write(tmp_path, training(tmp_path / "search"), "workers=2")
        for name in ("workers>Registered", "workers plain"):
            del keras.saving.get_custom_objects()[name]
        payload.read(given)
        assert keras.saving.get_registered_object("workers>Registered") is Registered
        assert keras.saving.get_custom_objects()["workers plain"] is Registered
    finally:
        for name in ("workers>Registered", "workers plain"):
            keras.saving.get_custom_objects().pop(name, None)


# Decisions while other trials run


def running(*costs):
    return Standing(costs, False, running=True)


def test_hyperband_waits_for_the_trials_of_a_rung():
    """A bracket of nine, of which three are promoted: not before all nine have a score, but the next one may begin."""
    pruner, paused = pruners.Hyperband(), [Standing((float(i),), True) for i in range(9)]
    assert pruner.promoted(paused, 9, 2, left=5) == 0
    for late in range(9):
        trials = [*paused[:late], running(), *paused[late + 1 :]]
        assert pruner.promoted(trials, 9, 2, left=5) is None
        assert pruner.promoted(trials, 9, 2, left=0) is None
    promoted = [running(0.0), *paused[1:]]  # on its way to the second rung
    assert pruner.promoted(promoted, 9, 2, left=5) == 1
    arrived = [Standing((0.0, 0.0), True), running(1.0), running(2.0), *paused[3:]]
    assert pruner.promoted(arrived, 9, 2, left=5) is None


def test_asha_promotes_its_last_trial_only_when_nothing_runs():
    trials = [Standing((1.0,), True), running()]
    assert pruners.ASHA().promoted(trials, 9, 2, left=0) is None
    trials[1] = Standing((2.0,), True)
    assert pruners.ASHA().promoted(trials, 9, 2, left=0) == 0


# At length


@pytest.mark.long
def test_limits_and_signals():
    kinds = ["allocates", "hangs", "is killed", "fine"]
    result = search(
        {"kind": Choice(kinds)}, strategy="grid", workers=2, trial_time_limit=15, trial_memory_limit=3 * 2**30
    )
    reasons = [
        r"Its process had \d+ bytes in memory, more than trial_memory_limit=3221225472\. \(kind=allocates\)",
        r"It took more than trial_time_limit=15 seconds\. \(kind=hangs\)",
        r"Its process was ended by SIGKILL \(Killed\), e\.g\. by the system for lack of memory\. "
        r"This has happened 2 times\. \(kind=is killed\)",
        r"",
    ]
    for trial, reason in zip(result.trials, reasons, strict=True):
        assert re.fullmatch(reason, trial.reason), trial.reason
    assert result.best == {"kind": "fine"}


@pytest.mark.long
@pytest.mark.parametrize("pruner", [None, "hyperband"])
def test_a_search_is_killed_and_continued(tmp_path, pruner):
    rng = random.Random(0)
    whole = kill_search.killed(tmp_path / "whole", pruner, [], rng)
    assert len(json.loads(whole[0].removeprefix("result "))) == kill_search.TRIALS
    assert kill_search.killed(tmp_path / "parts", pruner, ["worker", "search", "Ctrl-C"], rng) == whole

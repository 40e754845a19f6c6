"""Searches with folds and several seeds: their scores, interruptions, and trials that are trained again."""

import dataclasses
import random
import statistics

import keras
import keras_tuner
import numpy as np
import pandas as pd
import pytest
from sklearn.model_selection import GroupKFold, KFold, ShuffleSplit, StratifiedKFold, TimeSeriesSplit

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, Result, Space, Trial, Values
from keras_optkit.tuning.folds import Folds, random_folds
from keras_optkit.tuning.pruners import ASHA

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 1)).astype("float32")
Y = RNG.normal(size=(12, 1)).astype("float32")
GROUPS = np.array([0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3])


def line(slope, rate=0.0):
    """y = slope x, eagerly, since what is not traced costs less here."""
    kernel = keras.initializers.Constant(slope)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(rate), "mse", run_eagerly=True)
    return model


def noisy(hp):
    """A model whose score depends on its initial weights, on dropout and on the order of the data."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.rate), "mse", run_eagerly=True)
    return model


def search(build=lambda hp: line(hp.slope), space=None, data=(X, Y), **arguments):
    defaults = {"objective": "val_loss", "epochs": 1, "seed": 0, "verbose": 0, "strategy": "grid"}
    return ok.tuning.search(build, space or Space(slope=Choice([0.5])), data, **{**defaults, **arguments})


def by_hand(pairs, slope=0.5):
    """The loss of validation of each fold."""
    return [float(np.mean((slope * X[unseen] - Y[unseen]) ** 2)) for _, unseen in pairs]


@pytest.mark.parametrize(
    ("cv", "groups"),
    [(GroupKFold(3), GROUPS), (TimeSeriesSplit(3), None), ([([0, 1], [2, 3, 4]), ([5], [6])], None)],
    ids=["groups", "time series", "list"],
)
def test_scores_are_those_of_the_folds(cv, groups):
    result = search(cv=cv, groups=groups)
    scores = by_hand(cv if isinstance(cv, list) else cv.split(X, Y, groups))
    (trial,) = result.trials
    np.testing.assert_allclose(trial.scores, scores, rtol=1e-6)
    assert trial.score == pytest.approx(statistics.fmean(scores))
    assert trial.spread == pytest.approx(np.std(scores, ddof=1))
    assert trial.epochs == len(scores)
    head, _, row = result.table().splitlines()
    assert head.split()[:3] == ["trial", "val_loss", "spread"]
    assert row.split()[1:3] == [f"{trial.score:.4g}", f"{trial.spread:.4g}"]


def test_random_folds():
    folds = random_folds(5, 12, seed=3)
    assert sorted(len(unseen) for _, unseen in folds.pairs) == [2, 2, 2, 3, 3]
    assert sorted(np.concatenate([unseen for _, unseen in folds.pairs])) == list(range(12))
    for seen, unseen in folds.pairs:
        assert sorted([*seen, *unseen]) == list(range(12))
    assert np.array_equal(random_folds(5, 12, 3).pairs[0][1], folds.pairs[0][1])
    assert not np.array_equal(random_folds(5, 12, 4).pairs[0][1], folds.pairs[0][1])
    result = search(cv=3, seed=7)
    np.testing.assert_allclose(result.best_trial.scores, by_hand(random_folds(3, 12, 7).pairs), rtol=1e-6)


def test_weights_and_nested_data_are_split_alike():
    weights = np.arange(4.0)
    fit = Folds([(np.array([3, 0]), np.array([1, 2]))]).of(5, {"x": {"a": X[:4]}, "y": Y[:4], "sample_weight": weights})
    np.testing.assert_array_equal(fit["x"]["a"], X[[3, 0]])
    np.testing.assert_array_equal(fit["sample_weight"], [3.0, 0.0])
    x_val, y_val, of_validation = fit["validation_data"]
    np.testing.assert_array_equal(x_val["a"], X[1:3])
    np.testing.assert_array_equal(y_val, Y[1:3])
    np.testing.assert_array_equal(of_validation, [1.0, 2.0])


@pytest.mark.parametrize("data", [(pd.DataFrame(X), pd.DataFrame(Y)), ({"x": X}, Y)], ids=["DataFrame", "dict"])
def test_other_data_than_arrays(data):
    def build(hp):
        if not isinstance(data[0], dict):
            return line(hp.slope)
        inputs = keras.Input((1,), name="x")
        kernel = keras.initializers.Constant(hp.slope)
        outputs = keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)(inputs)
        model = keras.Model({"x": inputs}, outputs)
        model.compile("sgd", "mse", run_eagerly=True)
        model.optimizer.learning_rate = 0.0
        return model

    result = search(build, data=data, cv=KFold(2))
    np.testing.assert_allclose(result.best_trial.scores, by_hand(KFold(2).split(X)), rtol=1e-6)


def test_all_folds_with_one_seed_come_first():
    seeds = []

    def build(hp):
        seeds.append(int(keras.random.randint((), 0, 2**31 - 1)))
        return line(hp.slope)

    result = search(build, cv=KFold(2), executions_per_trial=2)
    (trial,) = result.trials
    assert trial.scores == [*trial.scores[:2], *trial.scores[:2]]
    assert trial.scores[0] != trial.scores[1]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cv": 1}, ValueError, "cv must be an integer at least 2 and at most 12, got 1"),
        ({"cv": 13}, ValueError, "cv must be an integer at least 2 and at most 12, got 13"),
        ({"cv": "kfold"}, TypeError, "cv must be a number of folds, a splitter .* got 'kfold'"),
        ({"cv": KFold}, TypeError, "cv must be a number of folds, a splitter"),
        ({"cv": True}, TypeError, "cv must be a number of folds, a splitter .* got True"),
        ({"cv": 2, "validation": 0.5}, ValueError, "validation must be None where cv is given, got float"),
        ({"cv": 2, "data": (X, Y, X, Y)}, ValueError, "data must have no validation part of its own where cv is given"),
        ({"cv": 2, "groups": GROUPS}, ValueError, "groups must be None where cv is a number, got ndarray"),
        ({"groups": GROUPS}, ValueError, "groups must be None where cv is None, got ndarray"),
        ({"cv": [([0], [1])] * 2, "groups": GROUPS}, ValueError, "groups must be None where cv is a list"),
        (
            {"cv": GroupKFold(2), "groups": [1]},
            ValueError,
            "groups must have one entry for each of the 12 .* got the shape",
        ),
        (
            {"cv": GroupKFold(2), "groups": 5},
            ValueError,
            "groups must have one entry for each of the 12 samples, got 5",
        ),
        (
            {"cv": GroupKFold(2)},
            ValueError,
            r"cv must be able to split data and groups, got GroupKFold\(.* says: .*groups",
        ),
        ({"cv": ShuffleSplit(2)}, ValueError, "cv must give the same folds each time, got ShuffleSplit.* random_state"),
        ({"cv": [([0], [1])]}, ValueError, "cv must make at least 2 folds, got 1"),
        ({"cv": [([0, 1], [1])] * 2}, ValueError, "cv must validate with rows that are not trained with, got 1 .* 0"),
        ({"cv": [([0], [12])] * 2}, ValueError, "cv must be indices from 0 to 11, got 12 to 12 in fold 0"),
        ({"cv": [([0], [])] * 2}, ValueError, r"cv must be pairs of indices, .* got one of the shape \(0,\)"),
        ({"cv": [[0, 1, 2]] * 2}, TypeError, r"cv must be pairs of indices to train .* got \[0, 1, 2\] as fold 0"),
        ({"cv": StratifiedKFold(2), "data": (X, Y)}, ValueError, "Supported target types"),  # scikit-learn's own
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        search(**arguments)


def test_datasets_are_refused():
    import tensorflow as tf

    with pytest.raises(TypeError, match=r"data must be arrays \(x, y\) where cv is given, got _BatchDataset"):
        search(data=tf.data.Dataset.from_tensor_slices((X, Y)).batch(4), cv=2)


def same(first, second):
    return [dataclasses.replace(t, seconds=0.0) for t in first] == [dataclasses.replace(t, seconds=0.0) for t in second]


@pytest.mark.parametrize(
    ("pruner", "stop_at"),
    [(None, 3), (ASHA(1, 2), 8), pytest.param("median", 6, marks=pytest.mark.long)],
    ids=str,
)
def test_folds_that_were_finished_are_kept(pruner, stop_at, tmp_path):
    """A search that is killed in a later one of three folds trains only the rest; with ASHA, after a promotion."""

    def run(directory, stop_at=None):
        builds = []

        def build(hp):
            builds.append(hp)
            if len(builds) == stop_at:
                raise keras_tuner.errors.FatalRuntimeError
            return noisy(hp)

        space = Space(rate=Choice([0.1, 0.01]))
        return search(build, space, cv=KFold(3), epochs=2, pruner=pruner, directory=directory), len(builds)

    whole, count = run(tmp_path / "whole")
    assert count == (9 if isinstance(pruner, ASHA) else 6)
    with pytest.raises(RuntimeError):
        run(tmp_path / "parts", stop_at)
    found, left = run(tmp_path / "parts")
    assert same(found.trials, whole.trials)
    assert left == count + 1 - stop_at
    weights = zip(found.best_model.get_weights(), whole.best_model.get_weights(), strict=True)
    assert all(np.array_equal(*pair) for pair in weights)
    assert not list(tmp_path.rglob("done_*"))


@pytest.mark.once
def test_a_bad_trial_is_stopped_in_its_first_fold():
    import optuna

    pruner = optuna.pruners.MedianPruner(n_startup_trials=1)
    result = search(space=Space(slope=Choice([0.5, 9.0])), cv=2, epochs=2, pruner=pruner)
    bad = result.trials[1]
    assert (bad.status, bad.epochs, len(bad.scores), bad.spread) == ("pruned", 1, 1, None)


def test_other_folds_are_another_search(tmp_path):
    search(cv=KFold(2), directory=tmp_path)
    for cv in (KFold(3), None):
        with pytest.raises(ValueError, match=r"directory must be new or hold the same search, .* cv was '2 folds, "):
            search(cv=cv, directory=tmp_path)


def build_some(hp):
    if hp.rate > 10:
        raise ValueError("too fast")
    return noisy(hp)


def test_a_trial_is_trained_again_to_the_same_score():
    space = Space(rate=Choice([0.1, 0.01, 99.0]))
    result = search(build_some, space, cv=KFold(2), epochs=2, pruner=ASHA(1, 2))
    assert {trial.status for trial in result.trials} == {"completed", "pruned", "failed"}
    for trial in result.trials[:2]:
        assert same([result.rerun(trial.number)], [trial])
    with pytest.raises(ValueError, match="too fast"):
        result.rerun(2)
    for number, error, message in (
        (3, ValueError, "number must be that of a trial, 0 to 2, got 3"),
        (1.0, TypeError, "number must be an integer, got 1.0"),
    ):
        with pytest.raises(error, match=message):
            result.rerun(number)


def test_a_trial_that_a_budget_has_stopped_is_trained_again():
    result = search(noisy, Space(rate=Choice([0.1, 0.01])), cv=2, epochs=2, max_epochs=7)
    assert [trial.epochs for trial in result.trials] == [4, 3]
    for trial in result.trials:
        assert same([result.rerun(trial.number)], [trial])


class Counted(keras.callbacks.Callback):
    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(epoch)


class Whole(keras.utils.PyDataset):
    """One batch."""

    def __init__(self, *batch):
        super().__init__()
        self.batch = batch

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.batch


@pytest.mark.parametrize("arguments", [{"cv": 3}, {"validation": 0.5}, {"validation": (X, Y)}], ids=str)
def test_the_best_is_trained_on_all_data(arguments):
    """One step of gradient descent with all rows, by hand."""
    result = search(lambda hp: line(hp.slope, 0.1), batch_size=len(X), **arguments)
    model = result.retrain_best(epochs=1)
    expected = 0.5 - 0.1 * 2 * np.mean(X * (0.5 * X - Y))
    assert model.get_weights()[0].item() == pytest.approx(expected, rel=1e-5)
    expected = 0.5 - 0.1 * 2 * np.mean(X[:6] * (0.5 * X[:6] - Y[:6]))
    half = X[:6], Y[:6]
    for data in (half, Whole(*half)):
        model = result.retrain_best(data, epochs=1, seed=5)
        assert model.get_weights()[0].item() == pytest.approx(expected, rel=1e-5)


def test_how_long_the_best_is_trained(monkeypatch):
    epochs = []
    space = Space(slope=Choice([0.5]), epochs=Choice([3]))
    result = search(space=space, epochs=None, cv=2, callbacks=lambda: [Counted(epochs)])
    assert len(epochs) == 6
    monkeypatch.setattr(result, "trials", [dataclasses.replace(result.trials[0], best_epochs=[1, 2, 3, 3])])
    result.retrain_best()
    assert epochs[6:] == [0, 1]
    others = []
    result.retrain_best(epochs=4, callbacks=[Counted(others)], validation=(X, Y))
    assert len(epochs) == 8
    assert others == [0, 1, 2, 3]


def test_what_cannot_be_trained_again(tmp_path):
    trial = Trial(0, Values(slope=0.5), score=1.0)
    alone = Result([trial], Space(slope=Float(0.0, 1.0)), "val_loss", "min", 0, tmp_path, tmp_path / "model.keras")
    for again in (lambda: alone.rerun(0), alone.retrain_best):
        with pytest.raises(RuntimeError, match="this result was not returned by a search"):
            again()
    wild = search(lambda hp: line(hp.slope, 1e12), batch_size=len(X), validation=(X, Y))
    with pytest.raises(RuntimeError, match=r"its loss is (nan|inf) after 3 epochs"):
        wild.retrain_best(epochs=3)
    for arguments, error in (({"epochs": 0}, ValueError), ({"seed": -1}, ValueError), ({"data": X}, TypeError)):
        with pytest.raises(error, match=f"{next(iter(arguments))} must be"):
            wild.retrain_best(**arguments)


def test_the_spread_is_exported():
    result = search(cv=2)
    assert result.to_pandas()["spread"][0] == result.trials[0].spread
    assert "spread" not in search(validation=0.5).to_pandas()


@pytest.mark.long
def test_folds_in_workers(tmp_path):
    """With two workers, and the search killed in between, as in one process."""
    import kill_search

    rng = random.Random(1)
    whole = kill_search.killed(tmp_path / "whole", None, [], rng, cv=3)
    assert kill_search.killed(tmp_path / "parts", None, ["search", "worker"], rng, cv=3) == whole

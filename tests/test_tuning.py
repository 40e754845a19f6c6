"""Search spaces, the search, and what it leaves behind."""

import gc
import inspect
import io
import itertools
import json
import math
import re
import shutil
import threading
import weakref
from typing import ClassVar

import keras
import keras_tuner
import numpy as np
import pytest
import rich.console
import tensorflow as tf
from scipy import stats
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

import keras_optkit as ok
from keras_optkit.tuning import Choice, Float, Int, Space
from keras_optkit.tuning.books import check_books
from keras_optkit.tuning.models import KeptModel
from keras_optkit.tuning.oracle import RandomOracle
from keras_optkit.tuning.searching import checked_data, fit_data, infer_direction

# Spaces

NESTED = Space(
    momentum=Choice([0.0, 0.9], when={"optimizer": "SGD"}),  # declared before what it depends on
    optimizer=Choice(["SGD", "Adam"]),
    layers=Int(1, 3),
    width=Int(8, 32, log=True, step=2, when={"layers": [2, 3]}),
    nesterov=Choice([True, False], when={"momentum": 0.9, "layers": 2}),
)


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        (Float(0.0, 1.0, step=0.25), (0.0, 0.25, 0.5, 0.75, 1.0)),
        (Float(0.1, 0.5, step=0.1), (0.1, 0.2, 0.3, 0.4, 0.5)),  # 0.1 + 2 * 0.1 is 0.30000000000000004
        (Float(0, 1, step=0.4), (0.0, 0.4, 0.8)),
        (Float(1e-4, 1e-1, log=True, step=10), (1e-4, 1e-3, 1e-2, 1e-1)),
        (Float(0.3, 0.3), (0.3,)),
        (Int(2, 9, step=3), (2, 5, 8)),
        (Int(1, 3), (1, 2, 3)),
        (Int(16, 128, log=True, step=2), (16, 32, 64, 128)),
        (Int(16, 127, log=True, step=2), (16, 32, 64)),
        (Int(3, 5, log=True), (3, 4, 5)),
        (Choice(["a", "b"]), ("a", "b")),
        (Choice([1, 0.5]), (1.0, 0.5)),
    ],
)
def test_values_of_a_parameter(parameter, values):
    assert tuple(parameter.grid()) == values
    assert [type(value) for value in parameter.grid()] == [type(value) for value in values]
    assert parameter.size == len(values)
    rng = np.random.default_rng(0)
    drawn = [parameter.sample(rng) for _ in range(60 * len(values))]
    assert set(drawn) == set(values)
    assert {type(value) for value in drawn} == {type(value) for value in values}


def test_points_of_a_continuous_range():
    assert Float(0.0, 1.0).grid(3) == (0.0, 0.5, 1.0)
    assert Float(1e-4, 1e-1, log=True).grid(4) == (1e-4, 1e-3, 1e-2, 1e-1)
    assert Float(1e-4, 1e-1, log=True).size == math.inf
    np.testing.assert_allclose(Float(0.1, 0.7, log=True).grid(7), np.geomspace(0.1, 0.7, 7), rtol=1e-11)


def test_distribution_of_a_continuous_range():
    rng = np.random.default_rng(0)
    linear = [Float(-1.0, 3.0).sample(rng) for _ in range(5000)]
    assert stats.kstest(linear, stats.uniform(-1, 4).cdf).pvalue > 0.01
    log = [Float(1e-4, 1e-1, log=True).sample(rng) for _ in range(5000)]
    assert stats.kstest(log, stats.loguniform(1e-4, 1e-1).cdf).pvalue > 0.01


def test_distribution_of_a_logarithmic_int():
    rng = np.random.default_rng(0)
    drawn = [Int(1, 7, log=True).sample(rng) for _ in range(8000)]
    expected = np.diff(np.log(np.arange(1, 9))) / np.log(8)
    assert stats.chisquare(np.bincount(drawn, minlength=8)[1:], 8000 * expected).pvalue > 0.01


def brute_force():
    """The points of NESTED, by definition: all combinations with the inactive values struck out, each once."""
    points = []
    for optimizer, layers, momentum, width, nesterov in itertools.product(
        ["SGD", "Adam"], [1, 2, 3], [0.0, 0.9], [8, 16, 32], [True, False]
    ):
        point = {"optimizer": optimizer, "layers": layers}
        if optimizer == "SGD":
            point["momentum"] = momentum
        if layers > 1:
            point["width"] = width
        if optimizer == "SGD" and momentum == 0.9 and layers == 2:
            point["nesterov"] = nesterov
        if point not in points:
            points.append(point)
    return points


def test_inactive_parameters_are_not_in_the_grid():
    grid = list(NESTED.grid())
    assert len(grid) == NESTED.size == len(brute_force())
    assert all(point in grid for point in brute_force())
    assert grid[0] == {"momentum": 0.0, "optimizer": "SGD", "layers": 1}


def test_inactive_parameters_are_not_sampled():
    points = brute_force()
    rng = np.random.default_rng(0)
    drawn = [NESTED.sample(rng) for _ in range(1500)]
    assert all(point in points for point in drawn)
    assert all(point in drawn for point in points)
    assert next(list(point) for point in drawn if len(point) == 5) == list(NESTED)  # in the order of the space
    assert NESTED.sample(3) == NESTED.sample(3) == NESTED.sample(np.random.default_rng(3))


def test_size_counts_only_what_is_active():
    assert Space(a=Choice(["x", "y"]), b=Float(0, 1, when={"a": "x"})).size == math.inf
    assert Space(a=Choice(["x", "y"]), b=Int(1, 10**6, when={"a": "x"}), c=Int(1, 10**6)).size == (10**6 + 1) * 10**6


def test_defaults():
    space = Space(
        {
            "kind": Choice(["a", "b"], default="b"),
            "rate": Float(0.1, 1.0),
            "n": Int(1, 9, default=4, when={"kind": "b"}),
        }
    )
    assert space.defaults() == {"kind": "b", "rate": 0.1, "n": 4}


def test_space_is_data():
    space = Space({**NESTED, "rate": Float(1e-3, 1, log=True, default=0.01), "a/b": Choice([1, 2], default=2)})
    assert Space.from_config(json.loads(json.dumps(space.get_config()))) == space
    for printed in (space, NESTED):
        assert eval(repr(printed)) == printed
    assert Space({**space, "rate": Float(1e-3, 1, log=True)}) != space
    assert Space({**space, "rate": Float(1e-3, 1, default=0.01)}) != space
    assert Space({name: space[name] for name in space if name != "rate"}) != space
    assert Choice([1, 2]) == Choice((1, 2))


def test_values_are_read_as_items_and_attributes():
    hp = ok.tuning.Values(optimizer="Adam", learning_rate=0.1)
    assert hp.learning_rate == hp["learning_rate"] == 0.1
    assert hp.get("momentum", 0.5) == 0.5
    with pytest.raises(
        AttributeError, match=r"'momentum' is active in this trial; active: 'optimizer', 'learning_rate'"
    ):
        _ = hp.momentum


CHOICE = Choice(["x", "y"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Float(1.0, 0.5), ValueError, r"high must be at least low=1.0, got 0.5"),
        (lambda: Float(0, 1, log=True), ValueError, r"low must be greater than 0 where log=True, got 0.0"),
        (lambda: Float(0, 1, step=0), ValueError, r"step must be greater than 0, or None, got 0.0"),
        (lambda: Float(0, 1, step=-0.1), ValueError, r"step must be greater than 0, or None, got -0.1"),
        (lambda: Float(1, 8, log=True, step=1), ValueError, r"step must be a factor greater than 1 .* got 1.0"),
        (lambda: Float(0, 1, step=2), ValueError, r"step must be at most high - low = 1, or None, got 2.0"),
        (lambda: Float(0, math.inf), ValueError, r"high must be a finite number .* got inf"),
        (lambda: Float("0", 1), TypeError, r"low must be a finite number .* got '0' of type str"),
        (lambda: Float(0, 1, log=1), TypeError, r"log must be True, False or \"reverse\", got 1"),
        (lambda: Float(0, 1, default=2), ValueError, r"default must be a number in \[0.0, 1.0\] or None, got 2.0"),
        (lambda: Float(0, 1, step=0.5, default=0.3), ValueError, r"default must be one of the values .* got 0.3"),
        (lambda: Float(0, 1).grid(), ValueError, r"no finite grid: give it a step"),
        (lambda: Float(0, 1).grid(1), ValueError, r"points must be an integer at least 2, got 1"),
        (lambda: Int(3, 1), ValueError, r"high must be at least low=3, got 1"),
        (lambda: Int(0.5, 1), TypeError, r"low must be an integer, got 0.5"),
        (lambda: Int(1, 9, step=0.5), TypeError, r"step must be an integer or None, got 0.5"),
        (lambda: Int(0, 9, log=True), ValueError, r"low must be greater than 0"),
        (lambda: Choice([]), ValueError, r"values must have at least one entry, got \[\]"),
        (lambda: Choice("ab"), TypeError, r"values must be a list or tuple, got 'ab'"),
        (lambda: Choice([1, "a"]), TypeError, r"values must all be bools, all numbers or all strings.*\(int, str\)"),
        (lambda: Choice([None, "a"]), TypeError, r"values\[0\] must be a bool, int, float or str, got None"),
        (lambda: Choice([1, 1]), ValueError, r"values must all differ, got \[1, 1\]"),
        (lambda: Choice([math.nan]), ValueError, r"values\[0\] must be a finite number .* got nan"),
        (lambda: Choice(["a"], default="b"), ValueError, r"default must be one of 'a', got 'b'"),
        (lambda: Choice(["a"], when="b"), TypeError, r"when must be a mapping .* got 'b'"),
        (lambda: Choice(["a"], when={}), ValueError, r"when must be a mapping .* got an empty mapping"),
        (lambda: Choice(["a"], when={"b": []}), ValueError, r"when\['b'\] must name at least one value, got \[\]"),
        (lambda: Space(), ValueError, r"Space must have at least one parameter, got none"),
        (lambda: Space({}), ValueError, r"at least one parameter"),
        (lambda: Space([CHOICE]), TypeError, r"Space takes a mapping"),
        (lambda: Space(a=0.1), TypeError, r"a must be a Float, Int, Bool or Choice, got 0.1 of type float"),
        (lambda: Space({"a": CHOICE}, a=CHOICE), ValueError, r"given once, got 'a' twice"),
        (lambda: Space({1: CHOICE}), TypeError, r"name of a parameter must be a string, got 1"),
        (lambda: Space(items=CHOICE), ValueError, r"the name of a dict method, got 'items'"),
        (
            lambda: Space(optimizer=CHOICE, b=Int(1, 2, when={"optimiser": "x"})),
            ValueError,
            r"b's when= must be one of 'optimizer', 'b', got 'optimiser'. Did you mean 'optimizer'",
        ),
        (lambda: Space(a=CHOICE, b=Int(1, 2, when={"a": "z"})), ValueError, r"b's when\['a'\] must be one of 'x', 'y'"),
        (
            lambda: Space(a=Float(0, 1), b=Int(1, 2, when={"a": 0.5})),
            ValueError,
            r"b's when= must depend on parameters with a finite number of values, got 'a'",
        ),
        (
            lambda: Space(a=Int(1, 2, when={"b": 1}), b=Int(1, 2, when={"a": 1}), c=CHOICE),
            ValueError,
            r"must not form a cycle, got one among a, b",
        ),
        (lambda: Space(a=Int(1, 2, when={"a": 1})), ValueError, r"cycle, got one among a"),
        (lambda: Space(a=Float(0, 1)).grid(), ValueError, r"got the continuous a=Float\(low=0.0, high=1.0\)"),
        (lambda: Space(a=Float(0, 1)).grid({"b": 3}), ValueError, r"key of points must be one of 'a', got 'b'"),
        (lambda: Space(a=Float(0, 1)).grid(1), ValueError, r"points must be an integer at least 2 or None, got 1"),
        (lambda: Space.from_config({"a": {"type": "Text"}}), ValueError, r"a's type must be one of 'Float', 'Int'"),
    ],
)
def test_bad_space(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("card", [pytest.param(card, id=card.name) for card in ok.cards() if card.space])
def test_space_of_a_card_makes_the_algorithm(card):
    space = Space(card.space)
    needed = [p.name for p in inspect.signature(card.make).parameters.values() if p.default is p.empty]
    given = {name: card.cases[0][name] for name in needed if name in card.cases[0]}  # the length of a schedule
    for seed in range(5):
        assert card.make(**given | space.sample(seed)) is not None


def test_keras_tuner_sees_the_same_space():
    hp = ok.tuning.HyperModel(lambda hp: None, NESTED).hyperparameters()  # noqa: ARG005
    assert hp.values == NESTED.defaults()
    for seed in range(100):
        point = NESTED.sample(seed)
        copy = hp.copy()
        copy.values = {"optimizer": point.optimizer, "layers": point.layers, "nesterov": False, **point}
        copy.ensure_active_values()  # KerasTuner strikes out what it holds for inactive, and adds what is missing
        assert copy.values == point


# Models whose scores are known


ONES, ZEROS = np.ones((4, 1), "float32"), np.zeros((4, 1), "float32")
DATA = (ONES, ZEROS, ONES, ZEROS)


def line(start, step=0.0):
    """A model whose val_loss after n epochs of one batch is |start - n step|."""
    kernel = keras.initializers.Constant(start)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(step), "mae", metrics=["accuracy"], run_eagerly=True)
    return model


def search(build, space, **arguments):
    defaults = {"objective": "val_loss", "epochs": 1, "seed": 0, "verbose": 0}
    return ok.tuning.search(build, space, DATA, **{**defaults, **arguments})


FIT = {"x": ONES, "y": ZEROS, "validation_data": DATA[2:]}


def tuner(directory, build=lambda hp: line(hp.x), oracle=RandomOracle, space=None, max_trials=None, **arguments):
    """A tuner of a small space."""
    hypermodel = ok.tuning.HyperModel(build, space or Space(x=Int(1, 1)))
    goal = keras_tuner.Objective("val_loss", "min")
    return ok.tuning.Tuner(
        oracle(hypermodel.space, goal, max_trials, 0), hypermodel, **{"directory": directory, "verbose": 0, **arguments}
    )


def noisy(hp):
    """A model whose score depends on its random initial weights, its dropout and the order of the data."""
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(hp.learning_rate), "mse")
    return model


def scores(result):
    return [(trial.values, trial.score) for trial in result.trials]


def test_grid_search_visits_every_point_once_and_finds_the_best():
    space = Space(kind=Choice(["a", "b"]), x=Choice([3.0, 1.0]), shift=Choice([0.5, 8.0], when={"kind": "b"}))
    result = search(lambda hp: line(hp.x - hp.get("shift", 0.0)), space, strategy="grid")
    assert [trial.values for trial in result.trials] == list(space.grid())
    assert [trial.score for trial in result.trials] == [abs(hp.x - hp.get("shift", 0.0)) for hp in space.grid()]
    assert [trial.number for trial in result.trials] == list(range(6))
    assert result.best == {"kind": "b", "x": 1.0, "shift": 0.5}
    assert result.best_score == 0.5
    assert result.best_trial.metrics["val_loss"] == 0.5
    np.testing.assert_array_equal(result.best_model.get_weights()[0], [[0.5]])
    assert [path.parent.name for path in result.directory.rglob("*.keras")] == [result.model_path.parent.name]


def test_best_is_the_greatest_where_the_objective_is_maximised():
    result = search(lambda hp: line(hp.x), Space(x=Choice([1.0, 3.0, 2.0])), strategy="grid", direction="max")
    assert (result.best.x, result.best_score) == (3.0, 3.0)


def test_grid_of_a_continuous_range_needs_points(tmp_path):
    space = Space(x=Float(1.0, 4.0))
    with pytest.raises(ValueError, match=r"continuous x=Float.*Give it a step, or say how many values"):
        search(lambda hp: line(hp.x), space, strategy="grid", directory=tmp_path)
    assert not any(tmp_path.iterdir())
    result = search(lambda hp: line(hp.x), space, strategy="grid", points=2)
    assert [trial.values.x for trial in result.trials] == [1.0, 4.0]


def test_random_search_exhausts_a_small_space_exactly_once():
    space = Space(x=Choice([1.0, 2.0]), y=Choice([3.0, 4.0]))
    result = search(lambda hp: line(hp.x * hp.y), space, max_trials=10)
    assert len(result.trials) == 4
    assert all(point in [trial.values for trial in result.trials] for point in space.grid())


class Formula(keras_tuner.Tuner):
    """KerasTuner's own tuner, scoring points without a model."""

    def run_trial(self, trial):
        return float(trial.hyperparameters.values.get("rare", 0))


def propose(tmp_path, space, seed, max_trials):
    oracle = RandomOracle(space, keras_tuner.Objective("score", "min"), max_trials, seed)
    Formula(oracle, directory=str(tmp_path), project_name=str(seed), overwrite=True).search(verbose=0)
    return [oracle.trials[trial_id].hyperparameters.values for trial_id in oracle.start_order]


def test_random_search_finds_the_rare_points_of_a_lopsided_space(tmp_path):
    space = Space(kind=Choice(["one", "many"]), rare=Int(1, 40, when={"kind": "many"}))
    points = propose(tmp_path, space, 0, 1000)
    assert len(points) == space.size == 41
    assert all(point in points for point in space.grid())


def test_zero_is_a_seed(tmp_path):
    space = Space(x=Float(0.0, 1.0), y=Float(0.0, 1.0))
    assert propose(tmp_path, space, 0, 5) == propose(tmp_path, space, 0, 5)
    # KerasTuner's own oracle would draw the second value with seed 0 and the first with seed 1 from one stream.
    zero, one = ({value for point in propose(tmp_path, space, seed, 5) for value in point.values()} for seed in (0, 1))
    assert len(zero | one) == 20


def test_same_seed_gives_the_same_trials_and_scores():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(24, 3)), rng.normal(size=(24, 1))

    starts = []

    def build(hp):
        model = noisy(hp)
        starts.append(float(model.get_weights()[0][0, 0]))
        return model

    def run(seed, max_trials=1):
        space = Space(learning_rate=Float(1e-3, 1e-1, log=True), batch_size=Choice([8, 12]))
        return ok.tuning.search(
            build, space, data, objective="val_loss", max_trials=max_trials, epochs=2, seed=seed, verbose=0
        )

    first = run(0, max_trials=2)
    assert len(set(starts)) == 2  # each trial has random numbers of its own
    assert scores(run(0, max_trials=2)) == scores(first)
    assert scores(run(1)) != scores(first)[:1]
    drawn = run(None)
    assert scores(run(drawn.seed)) == scores(drawn)


# Failures


def test_a_diverging_trial_has_failed_and_is_never_best():
    def build(hp):
        model = line({"fine": 2.0, "nan": math.nan, "inf": math.inf}.get(hp.x, 1.0))
        if hp.x == "late":  # epoch 1 is the best of all, in epoch 2 the loss becomes infinite
            model.optimizer.learning_rate = 1e38
        return model

    space = Space(x=Choice(["nan", "inf", "late", "fine"]))
    result = search(build, space, strategy="grid", epochs=5)
    assert [trial.status for trial in result.trials] == ["failed", "failed", "failed", "completed"]
    assert [trial.score for trial in result.trials[:3]] == [None] * 3
    assert [trial.message for trial in result.trials[:2]] == ["loss is nan in epoch 1.", "loss is inf in epoch 1."]
    assert "loss is inf in epoch" in result.trials[2].message
    assert [trial.epochs for trial in result.trials[:2]] == [1, 1]  # not trained to the end
    assert result.best.x == "fine"
    assert len(list(result.directory.rglob("*.keras"))) == 1
    # With the accuracy as objective every score is finite; what failed is still the loss.
    result = search(build, Space(x=Choice(["nan", "fine"])), strategy="grid", objective="val_accuracy")
    assert [trial.status for trial in result.trials] == ["failed", "completed"]


def test_a_trial_that_raises_does_not_end_the_search(tmp_path, capsys):
    def build(hp):
        if hp.x < 5:
            raise ValueError(f"{hp.x} is too small")
        return line(hp.x)

    result = search(build, Space(x=Int(1, 5)), strategy="grid", directory=tmp_path, verbose=1)
    assert [trial.status for trial in result.trials] == ["failed"] * 4 + ["completed"]
    assert result.trials[0].message == "ValueError: 1 is too small"
    assert result.best == {"x": 5}
    table = result.table()
    assert "Trial 0 failed: ValueError: 1 is too small" in table
    printed = capsys.readouterr()
    assert "[1/5] trial 0: x=1\n    val_loss failed: ValueError: 1 is too small" in printed.out
    assert "val_loss 5 in epoch 1" in printed.out
    assert "Traceback" not in printed.out + printed.err
    state = json.loads((tmp_path / "trial_0" / "trial.json").read_text())
    assert "Traceback" in state["message"]
    assert "Infinity" not in json.dumps(state)


def test_a_search_in_which_all_fail_raises_the_first_error():
    def build(hp):
        raise KeyError(f"lost {hp.x}")

    with pytest.raises(RuntimeError, match=r"All 2 trials failed; the first: KeyError: 'lost 1'") as caught:
        search(build, Space(x=Int(1, 2)), strategy="grid")
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_objective_that_is_no_metric_ends_the_search_with_the_known_names():
    with pytest.raises(ValueError, match=r"objective .*'accuracy', 'loss', 'val_accuracy', 'val_loss'.*'val_los'") as e:
        search(lambda hp: line(hp.x), Space(x=Int(1, 2)), objective="val_los", direction="min")
    assert "Did you mean 'val_loss'?" in str(e.value)


@pytest.mark.parametrize(
    ("made", "message"), [(None, "got None"), (keras.Sequential(), "got a model that is not compiled")]
)
def test_a_build_function_that_returns_no_compiled_model_ends_the_search(made, message):
    with pytest.raises(TypeError, match=f"build must return a compiled keras.Model, {message}"):
        search(lambda hp: made, Space(x=Int(1, 2)))  # noqa: ARG005


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"build": 3}, TypeError, r"build must be a function .* got 3"),
        ({"build": lambda: None}, TypeError, r"build must be a function of one argument, .* got <lambda>\(\)"),
        ({"build": lambda hp, width: None}, TypeError, r"one argument, .* got <lambda>\(hp, width\)"),  # noqa: ARG005
        ({"build": keras.Sequential()}, TypeError, r"build must be a function .* got <Sequential"),
        ({"space": [1]}, TypeError, r"Space takes a mapping"),
        ({"space": {}}, ValueError, r"at least one parameter"),
        ({"strategy": "bayes"}, ValueError, r"strategy must be one of 'random', 'grid', 'qmc', .* got 'bayes'"),
        ({"max_trials": 0}, ValueError, r"max_trials must be an integer at least 1 or None, got 0"),
        ({"points": 3}, ValueError, r"points must be None where strategy is not \"grid\", got 3"),
        ({"objective": 3}, TypeError, r"objective must be the name of a metric, got 3"),
        ({"objective": "val_score"}, ValueError, r"direction must be \"min\" or \"max\" for the objective 'val_score'"),
        ({"direction": "up"}, ValueError, r"direction must be one of 'max', 'min', got 'up'"),
        ({"epochs": 0}, ValueError, r"epochs must be an integer at least 1 or None, got 0"),
        ({"batch_size": 1.5}, TypeError, r"batch_size must be an integer at least 1 or None, got 1.5"),
        ({"space": {"epochs": Int(1, 2)}}, ValueError, r"epochs must be None where it is a parameter .* got 1"),
        ({"space": {"batch_size": Float(1, 2)}}, TypeError, r"batch_size must be an Int or a Choice of integers"),
        ({"space": {"batch_size": Int(0, 2)}}, ValueError, r"batch_size in the space must be an integer at least 1"),
        ({"executions_per_trial": 0}, ValueError, r"executions_per_trial must be an integer at least 1, got 0"),
        ({"seed": -1}, ValueError, r"seed must be an integer at least 0 or None, got -1"),
        ({"verbose": 3}, ValueError, r"verbose must be one of 0, 1, 2, got 3"),
        ({"overwrite": 1}, TypeError, r"overwrite must be True or False, got 1"),
        ({"callbacks": []}, TypeError, r"callbacks must be a function .* each trial needs its own, .* got \[\]"),
        ({"callbacks": lambda a, b, c: []}, TypeError, r"with 3 arguments"),  # noqa: ARG005
        ({"callbacks": lambda: [3]}, TypeError, r"must return a list of keras.callbacks.Callback, got \[3\]"),
        ({"validation": DATA[:2]}, ValueError, r"validation must be None where data has a validation part"),
    ],
)
def test_bad_arguments(changed, error, message):
    given = {"build": lambda hp: line(hp.x), "space": Space(x=Int(1, 2)), **changed}
    with pytest.raises(error, match=message):
        search(given.pop("build"), given.pop("space"), **given)


@pytest.mark.parametrize(
    ("data", "validation", "error", "message"),
    [
        (ONES, None, TypeError, r"data must be a pair of arrays"),
        ((ONES, ZEROS[:3]), None, ValueError, r"data must have as many x as y, and at least one, got 4 and 3"),
        (([1, 2], ZEROS), None, ValueError, r"The x of data must be arrays"),
        ((ONES, ZEROS), 1.0, ValueError, r"validation must be a finite number in \(0, 1\), got 1.0"),
        ((ONES, ZEROS), ONES, TypeError, r"validation must be a pair of arrays"),
        ((ONES[:1], ZEROS[:1]), 0.5, ValueError, r"data must have at least 2 samples to be split, got 1"),
        (tf.data.Dataset.from_tensors(DATA[:2]), None, ValueError, r"validation must be given for .* 'val_loss'"),
        (tf.data.Dataset.from_tensors(DATA[:2]), 0.5, TypeError, r"validation must be a pair of arrays"),
    ],
)
def test_bad_data(data, validation, error, message):
    with pytest.raises(error, match=message):
        checked_data(data, validation, "val_loss")


def test_batch_size_of_a_dataset_is_its_own():
    dataset = tf.data.Dataset.from_tensors(DATA[:2])
    for given in ({"batch_size": 2}, {"space": {"batch_size": Int(1, 2)}}):
        given = {"space": {"x": Int(1, 2)}, **given}
        with pytest.raises(
            ValueError, match=r"batch_size must be left out, also of the space, where data is a dataset"
        ):
            ok.tuning.search(line, given.pop("space"), (dataset, dataset), **given)


# Data, callbacks, epochs


def test_forms_of_data_are_equivalent():
    dataset = tf.data.Dataset.from_tensors((ONES, ZEROS))
    for data, validation in (
        (DATA, None),
        ((DATA[:2], DATA[2:]), None),
        (DATA[:2], DATA[2:]),
        ([ONES, ZEROS], (ONES, ZEROS)),
        ((dataset, dataset), None),
        (dataset, DATA[2:]),
    ):
        result = ok.tuning.search(
            lambda hp: line(hp.x), {"x": Choice([3.0])}, data, validation=validation,
            objective="val_loss", epochs=1, verbose=0,
        )  # fmt: skip
        assert result.best_score == 3.0


def test_fraction_is_split_off_at_random():
    x = {"a": np.arange(50), "b": np.arange(50) * 2}
    fit = fit_data(*checked_data((x, np.arange(50) * 3), 0.3, "val_loss"), seed=0)
    held_out, labels = fit["validation_data"]
    assert len(labels) == 15
    assert sorted([*fit["x"]["a"], *held_out["a"]]) == list(range(50))
    assert list(held_out["a"]) != list(range(35, 50))
    for part, y in ((fit["x"], fit["y"]), (held_out, labels)):
        np.testing.assert_array_equal(part["b"], part["a"] * 2)
        np.testing.assert_array_equal(y, part["a"] * 3)
    again = fit_data(*checked_data((x, np.arange(50) * 3), 0.3, "val_loss"), seed=0)
    other = fit_data(*checked_data((x, np.arange(50) * 3), 0.3, "val_loss"), seed=1)
    np.testing.assert_array_equal(again["y"], fit["y"])
    assert list(other["y"]) != list(fit["y"])
    default = fit_data(*checked_data((x, np.arange(50)), None, "val_loss"), seed=0)
    assert len(default["y"]) == 40


def test_the_best_epoch_is_scored_and_kept():
    # val_loss 0.625, 0.125, 0.375, 0.125, 0.375: of the two best epochs the first
    result = search(lambda hp: line(hp.x, 0.5), Space(x=Choice([1.125])), epochs=5)
    (trial,) = result.trials
    assert (trial.score, trial.best_epoch, trial.epochs, trial.metrics["loss"]) == (0.125, 2, 5, 0.625)
    np.testing.assert_array_equal(result.best_model.get_weights()[0], [[0.125]])
    assert int(result.best_model.optimizer.iterations) == 2
    assert result.best_model.evaluate(ONES, ZEROS, verbose=0)[0] == 0.125


def test_batch_size_and_epochs_of_the_space_reach_fit():
    made = []

    def callbacks(hp):
        made.append((hp, keras.callbacks.Callback()))
        return [made[-1][1]]

    space = Space(batch_size=Choice([1, 2]), epochs=Choice([3]))
    result = search(lambda hp: line(hp.batch_size), space, strategy="grid", epochs=None, callbacks=callbacks)
    assert [(callback.params["epochs"], callback.params["steps"]) for _, callback in made] == [(3, 4), (3, 2)]
    assert [hp for hp, _ in made] == [trial.values for trial in result.trials]
    assert [trial.epochs for trial in result.trials] == [3, 3]
    made.clear()
    search(lambda hp: line(hp.x), Space(x=Int(1, 1)), batch_size=4, epochs=2, callbacks=callbacks)
    assert [(callback.params["epochs"], callback.params["steps"]) for _, callback in made] == [(2, 1)]


def test_each_trial_has_callbacks_of_its_own():
    def stopping(patience=1):  # an argument with a default is the function's own
        return [keras.callbacks.EarlyStopping("val_loss", patience=patience)]

    space = Space(x=Choice([0.0, 10.0]))  # the loss stays at 0 in the first trial, and falls in the second
    result = search(lambda hp: line(hp.x, 1.0), space, strategy="grid", epochs=4, callbacks=stopping)
    assert [trial.epochs for trial in result.trials] == [2, 4]
    shared = keras.callbacks.EarlyStopping("val_loss")
    with pytest.raises(ValueError, match=r"callbacks must return new callbacks for every trial, got .*EarlyStopping"):
        search(lambda hp: line(hp.x), space, callbacks=lambda: [shared])


def test_the_dtype_policy_holds_in_every_trial():
    seen = []

    def build(hp):
        seen.append(keras.config.dtype_policy().name)
        return line(hp.x)

    keras.config.set_dtype_policy("mixed_bfloat16")
    search(build, Space(x=Int(1, 2)))
    assert [*seen, keras.config.dtype_policy().name] == ["mixed_bfloat16"] * 3


def test_executions_are_averaged(tmp_path):
    starts = iter([4.0, 1.0, 2.0, 2.0])
    result = search(
        lambda hp: line(next(starts)),  # noqa: ARG005
        Space(x=Int(1, 2)),
        strategy="grid",
        executions_per_trial=2,
        log_dir=tmp_path,
    )
    assert [trial.score for trial in result.trials] == [2.5, 2.0]
    assert [trial.epochs for trial in result.trials] == [2, 2]
    assert result.best == {"x": 2}
    assert {path.name for path in (tmp_path / "trial_0").iterdir()} == {"execution_0", "execution_1"}
    groups = {session(tmp_path / "trial_0" / f"execution_{i}")[0].group_name for i in range(2)}
    assert groups == {f"trial_0 ({tmp_path.name} in {tmp_path.parent})"}
    starts = iter([1.0, 4.0])
    result = search(lambda hp: line(next(starts)), Space(x=Int(1, 1)), executions_per_trial=2)  # noqa: ARG005
    np.testing.assert_array_equal(result.best_model.get_weights()[0], [[1.0]])  # of the better execution


def test_direction_follows_from_the_name():
    for name in ("loss", "val_loss", "val_head_loss", "val_mean_squared_error", "val_mae", "kl_divergence"):
        assert infer_direction(name) == "min"
    for name in (
        "val_accuracy",
        "acc",
        "val_sparse_categorical_accuracy",
        "val_f1_score",
        "val_recall",
        "val_mean_io_u",
        "val_auc_1",
    ):
        assert infer_direction(name) == "max"
    for name in ("val_cosine_similarity", "val_brier_score", "accuracy_loss", "valloss"):
        with pytest.raises(ValueError, match=f"direction must be .* '{name}'"):
            infer_direction(name)


# The directory


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(tmp_path):
    rng = np.random.default_rng(0)
    data = rng.normal(size=(12, 3)), rng.normal(size=(12, 1))
    built = []

    def run(directory, stop_at=None):
        def build(hp):
            if len(built) == stop_at:
                raise KeyboardInterrupt
            built.append(hp)
            return noisy(hp)

        return ok.tuning.search(
            build, Space(learning_rate=Float(1e-3, 1e-1, log=True)), data, objective="val_loss", max_trials=3,
            epochs=1, seed=0, directory=directory, log_dir=directory / "logs", verbose=0,
        )  # fmt: skip

    whole = run(tmp_path / "whole")
    built.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=1)
    parts = run(tmp_path / "parts")
    assert len(built) == 3  # the finished trial was not run again
    assert scores(parts) == scores(whole)
    assert parts.trials[0].epochs == 1
    for number in range(3):
        assert session(tmp_path / "parts" / "logs" / f"trial_{number}")[1].status == api_pb2.STATUS_SUCCESS
    np.testing.assert_array_equal(parts.best_model.get_weights()[0], whole.best_model.get_weights()[0])


class Dying(RandomOracle):
    """Is killed when it has just saved that a trial has ended."""

    def save(self):
        super().save()
        if self.end_order and not self.ongoing_trials:
            raise KeyboardInterrupt


def test_a_trial_that_the_oracle_knows_has_its_record(tmp_path):
    hypermodel = ok.tuning.HyperModel(lambda hp: line(hp.x), Space(x=Int(1, 2)))

    def tuner(oracle):
        goal = keras_tuner.Objective("val_loss", "min")
        return ok.tuning.Tuner(oracle(hypermodel.space, goal, None, 0), hypermodel, directory=tmp_path, verbose=0)

    fit = {"x": ONES, "y": ZEROS, "validation_data": DATA[2:], "epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        tuner(Dying).search(**fit)
    again = tuner(RandomOracle)
    again.search(**fit)
    assert [trial.epochs for trial in again.result().trials] == [2, 2]


def test_a_directory_with_another_search_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")

    def run(space, **arguments):
        return search(lambda hp: line(hp.x), space, directory=tmp_path, log_dir=tmp_path / "logs", **arguments)

    run(Space(x=Int(1, 2)))
    with pytest.raises(
        ValueError, match=rf"got {re.escape(repr(str(tmp_path)))}, where space\['x'\] was Int.* and is Int"
    ):
        run(Space(x=Int(1, 3)))
    with pytest.raises(ValueError, match=r"epochs was 1 and is 2; seed was 0 and is 1\. Choose another directory"):
        run(Space(x=Int(1, 2)), epochs=2, seed=1)
    result = run(Space(x=Int(3, 3)), overwrite=True)
    assert [trial.values for trial in result.trials] == [{"x": 3}]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [path.parent.name for path in (tmp_path / "logs").glob("*/events*")] == ["trial_0"]


def test_a_temporary_directory_lives_as_long_as_the_result():
    result = search(lambda hp: line(hp.x), Space(x=Int(2, 2)))
    directory = result.directory
    assert result.model_path.exists()
    del result
    gc.collect()
    assert not directory.exists()


def test_models_of_earlier_trials_are_freed():
    models = []

    def build(hp):
        assert sum(model() is not None for model in models) <= 1  # at most the last one is still there
        model = line(hp.x)
        models.append(weakref.ref(model))
        return model

    search(build, Space(x=Int(1, 4)), strategy="grid")
    assert len(models) == 4


# The result


def test_table_rows_and_plot():
    def build(hp):
        if hp.x == 2.0:
            raise ValueError("no")
        return line(hp.x)

    space = Space(x=Choice([3.0, 2.0, 1.5]), name=Choice(["b"], when={"x": 3.0}))
    result = search(build, space, strategy="grid")
    head, rule, *lines = result.table().splitlines()
    assert head.split() == ["trial", "val_loss", "x", "name", "best", "epoch", "epochs", "trained", "seconds"]
    assert set(rule) == {"-"}
    assert [row.split()[:3] for row in lines] == [
        ["2", "1.5", "1.5"],
        ["0", "3", "3"],
        ["1", "failed", "2"],
        ["Trial", "1", "failed:"],
    ]
    assert str(result) == result.table()
    assert "best val_loss=1.5 with {'x': 1.5}" in repr(result)
    assert [row["values"] for row in result.rows()] == [{"x": 3.0, "name": "b"}, {"x": 2.0}, {"x": 1.5}]
    assert result.rows()[1]["message"] == "ValueError: no"
    json.dumps(result.rows())

    figure = result.plot()
    by_trial, by_x, by_name = figure.axes
    points = {tuple(map(tuple, line.get_xydata())) for line in by_trial.lines}
    assert ((0.0, 3.0), (2.0, 1.5)) in points  # the scores; the best so far is the same line here
    assert by_trial.get_ylabel() == "val_loss"
    np.testing.assert_array_equal(by_x.lines[0].get_xydata(), [[3.0, 3.0], [1.5, 1.5]])
    assert len(by_name.lines[0].get_xydata()) == 1
    import matplotlib.pyplot as plt

    plt.close(figure)


# TensorBoard


def session(directory):
    """The start and end of the HParams session in a directory, as TensorBoard reads them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    return (
        metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]),
        metadata.parse_session_end_info_plugin_data(content[metadata.SESSION_END_INFO_TAG]),
    )


def scalars(directory):
    """Every scalar in a directory: tag to (step, value)."""
    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        tag: [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
        if events.SummaryMetadata(tag).plugin_data.plugin_name == "scalars"
    }


def test_hparams_are_complete_and_right_for_every_trial(tmp_path):
    space = Space(
        kind=Choice(["a", "b"]),
        x=Choice([1.125]),
        n=Int(4, 4),
        flag=Choice([True], when={"kind": "b"}),
        bad=Choice([False, True], when={"kind": "b"}),
    )

    def build(hp):
        if hp.get("bad"):
            raise ValueError("no")
        return line(hp.x, 0.5)

    result = search(build, space, strategy="grid", epochs=3, log_dir=tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["trial_0", "trial_1", "trial_2"]
    for trial in result.trials:
        directory = tmp_path / f"trial_{trial.number}"
        start, end = session(directory)
        kinds = {bool: "bool_value", str: "string_value", float: "number_value", int: "number_value"}
        assert {name: value.WhichOneof("kind") for name, value in start.hparams.items()} == {
            name: kinds[type(value)] for name, value in trial.values.items()
        }
        found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
        assert found == trial.values
        assert start.group_name == f"trial_{trial.number} ({tmp_path.name} in {tmp_path.parent})"
        if trial.status == "failed":
            assert end.status == api_pb2.STATUS_FAILURE
            assert scalars(directory) == {}
        else:
            assert end.status == api_pb2.STATUS_SUCCESS
            assert scalars(directory) == {"best_val_loss": [(1, 0.125)]}
            assert scalars(directory / "train")["epoch_loss"] == [(0, 1.125), (1, 0.625), (2, 0.125)]
            assert scalars(directory / "validation")["epoch_loss"] == [(0, 0.625), (1, 0.125), (2, 0.375)]
    assert [trial.status for trial in result.trials] == ["completed", "completed", "failed"]


def test_two_searches_do_not_share_runs(tmp_path):
    def run(**arguments):
        return search(lambda hp: line(hp.x), Space(x=Int(1, 1)), log_dir=tmp_path, **arguments)

    run()
    with pytest.raises(ValueError, match=r"log_dir must hold no trials of another search, got .* with 1 of them"):
        run()
    run(overwrite=True)
    assert len(list((tmp_path / "trial_0").glob("events*"))) == 1


# Arguments of fit, and what is in the logs


class Endless(keras.utils.PyDataset):
    """Batches without an end."""

    num_batches = None

    def __getitem__(self, index):
        return DATA[:2]


BATCHES = tf.data.Dataset.from_tensors(DATA[:2])


@pytest.mark.parametrize(
    ("data", "validation", "message"),
    [
        (BATCHES.repeat(), DATA[2:], r"steps_per_epoch must be given where data is a dataset without an end"),
        (Endless(), DATA[2:], r"steps_per_epoch must be given where data is a PyDataset without an end"),
        (DATA[:2], BATCHES.repeat(), r"validation_steps must be given where validation is a dataset without an end"),
        (BATCHES, Endless(), r"validation_steps must be given where validation is a PyDataset without an end"),
    ],
)
def test_data_without_an_end_need_a_number_of_steps(data, validation, message):
    with pytest.raises(ValueError, match=message):
        ok.tuning.search(line, {"x": Int(1, 2)}, data, validation=validation, objective="val_loss")


def test_an_iterator_is_no_data_for_several_trials(tmp_path):
    with pytest.raises(TypeError, match=r"data must be a pair .*got generator\. An iterator can be read only once"):
        ok.tuning.search(line, {"x": Int(1, 2)}, (batch for batch in [DATA[:2]]), objective="loss")
    with pytest.raises(ValueError, match=r"steps_per_epoch must be given where x is an iterator, .* got None"):
        tuner(tmp_path).search(batch for batch in [DATA[:2]])


def test_arguments_of_fit_reach_it():
    seen = []

    class Params(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append((epoch, self.params["steps"], "val_loss" in logs))

    result = ok.tuning.search(
        lambda hp: line(hp.x), Space(x=Int(3, 3)), BATCHES.repeat(), validation=BATCHES.repeat(),
        objective="val_loss", epochs=4, verbose=0, seed=0, callbacks=lambda: [Params()],
        fit_arguments={
            "steps_per_epoch": 2, "validation_steps": 1, "initial_epoch": 1, "validation_freq": 2,
            "class_weight": {0: 2.0},
        },
    )  # fmt: skip
    assert seen == [(1, 2, True), (2, 2, False), (3, 2, True)]
    (trial,) = result.trials
    assert (trial.epochs, trial.best_epoch, trial.metrics["val_loss"], trial.metrics["loss"]) == (3, 2, 3.0, 6.0)


def test_sample_weights_are_split_with_the_data():
    x = np.arange(10.0)
    fit = fit_data(*checked_data((x, x * 2), 0.3, "val_loss"), seed=0, sample_weight=x * 3)
    held_out, labels, weights = fit["validation_data"]
    assert len(weights) == 3
    np.testing.assert_array_equal(weights, held_out * 3)
    np.testing.assert_array_equal(fit["sample_weight"], fit["x"] * 3)
    np.testing.assert_array_equal(labels, held_out * 2)
    explicit = fit_data(*checked_data((x, x), (x, x, x), "val_loss"), seed=0, sample_weight=x)
    assert len(explicit["validation_data"]) == 3
    result = ok.tuning.search(
        lambda hp: line(hp.x), Space(x=Int(3, 3)), DATA[:2], validation=0.25, objective="val_loss", epochs=1, verbose=0,
        fit_arguments={"sample_weight": np.full(4, 0.5)},
    )  # fmt: skip
    assert (result.best_score, result.best_trial.metrics["loss"]) == (1.5, 1.5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([1], TypeError, r"fit_arguments must be a mapping"),
        ({"sampel_weight": 1}, TypeError, r"fit has no argument 'sampel_weight'; .* Did you mean 'sample_weight'"),
        ({"validation_split": 0.2}, ValueError, r"must not have 'validation_split', which search takes as validation="),
        ({"callbacks": []}, ValueError, r"must not have 'callbacks', which search takes as callbacks="),
        (
            {"steps_per_epoch": 0},
            ValueError,
            r"fit_arguments\['steps_per_epoch'\] must be an integer at least 1 or None",
        ),
        ({"initial_epoch": 1}, ValueError, r"fit_arguments\['initial_epoch'\] must be less than epochs=1, got 1"),
        ({"shuffle": 1}, TypeError, r"fit_arguments\['shuffle'\] must be True or False, got 1"),
        ({"validation_freq": [0]}, ValueError, r"fit_arguments\['validation_freq'\] must be an integer at least 1"),
        ({"class_weight": 2}, TypeError, r"fit_arguments\['class_weight'\] must be a mapping from classes"),
        ({"sample_weight": ONES, "class_weight": {0: 1}}, ValueError, r"class_weight or sample_weight, got both"),
        ({"sample_weight": ONES[:3]}, ValueError, r"must have one weight for each of the 4 samples, got 3"),
    ],
)
def test_bad_arguments_of_fit(given, error, message):
    with pytest.raises(error, match=message):
        search(line, Space(x=Int(1, 2)), fit_arguments=given)


def test_sample_weights_of_a_dataset_are_in_its_batches():
    with pytest.raises(ValueError, match=r"\['sample_weight'\] must be left out where data is a dataset"):
        ok.tuning.search(line, {"x": Int(1, 2)}, (BATCHES, BATCHES), fit_arguments={"sample_weight": ONES})


def test_other_arguments_of_fit_are_another_search(tmp_path):
    def run(**arguments):
        return search(lambda hp: line(hp.x), Space(x=Int(1, 1)), directory=tmp_path, fit_arguments=arguments)

    run(class_weight={0: np.float32(2)})
    assert run(class_weight={0: 2.0}).best_score == 1.0
    with pytest.raises(ValueError, match=r"fit_arguments\['class_weight'\] was \{'0': 2.0\} and is \{'0': 3.0\}"):
        run(class_weight={0: 3.0})


class Logging(keras.callbacks.Callback):
    """Puts into the logs what is no number, and in every second epoch a score."""

    def on_epoch_end(self, epoch, logs=None):
        logs |= {"array": np.ones(3), "text": "warm-up", "none": None, "list": [1, 2], "one": np.float32([[7]])}
        if epoch % 2:
            logs["score"] = np.float32(epoch)


def test_logs_may_hold_anything_and_lack_the_objective_in_some_epochs():
    result = search(
        lambda hp: line(hp.x), Space(x=Int(1, 1)), epochs=5, objective=keras_tuner.Objective("score", "max"),
        callbacks=lambda: [Logging()],
    )  # fmt: skip
    (trial,) = result.trials
    assert (trial.score, trial.best_epoch, trial.epochs, trial.metrics["one"]) == (3.0, 4, 5, 7.0)
    assert trial.metrics.keys().isdisjoint({"array", "text", "none", "list"})
    json.dumps(result.rows())


@pytest.mark.parametrize(
    ("objective", "error", "message"),
    [
        ("scroe", ValueError, r"objective must be a metric .*'one', 'score'\), got 'scroe'\. Did you mean 'score'"),
        ("array", TypeError, r"objective 'array' must be one number, got array\("),
    ],
)
def test_an_objective_that_no_callback_logs_ends_the_search_after_one_trial(objective, error, message):
    built = []
    with pytest.raises(error, match=message):
        search(
            lambda hp: built.append(hp) or line(hp.x), Space(x=Int(1, 3)), epochs=2, objective=objective,
            direction="min", callbacks=lambda: [Logging()],
        )  # fmt: skip
    assert len(built) == 1


def test_a_trial_that_is_stopped_before_its_first_score_has_failed():
    result = search(
        lambda hp: line(hp.x), Space(x=Choice([0.0, 3.0])), strategy="grid", epochs=2, objective="score",
        direction="min", callbacks=lambda: [Logging(), ok.callbacks.EarlyStopping("val_loss", mode="min", target=1.0)],
    )  # fmt: skip
    assert [trial.score for trial in result.trials] == [None, 1.0]
    assert result.trials[0].message.startswith("No epoch had the objective: objective must be a metric of the training")


# Models that a .keras file cannot hold


class Twice(keras.Model):
    """Not registered, with a function among its arguments."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.dense = keras.layers.Dense(1)

    def call(self, x):
        return self.dense(self.function(x["in"] if isinstance(x, dict) else x))


class Compiled(keras.Model):
    """With a compile method of its own."""

    def compile(self, rate):
        super().compile(ok.optimizers.Adam(rate), "mse", run_eagerly=True)


keras.saving.register_keras_serializable("test_tuning")(Compiled)


def half(k):
    def loss(y, prediction):
        return k * keras.ops.mean((y - prediction) ** 2)

    return loss


def subclass(hp):
    model = Twice(lambda x: 2 * x)
    model.compile(ok.optimizers.Adam(hp.rate), "mse", run_eagerly=True)
    return model


def closure(hp):
    model = keras.Sequential([keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(hp.rate), half(0.5), run_eagerly=True)
    return model


def own_compile(hp):
    inputs = keras.Input((2,))
    model = Compiled(inputs, keras.layers.Dense(1)(inputs))
    model.compile(hp.rate)
    return model


def lambda_layer(hp):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: 3 * x), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(hp.rate, momentum=0.9), "mse", run_eagerly=True)
    return model


class Adversaries(keras.Model):
    """Two models, two optimizers, no `call`."""

    def __init__(self, first, second):
        super().__init__()
        self.models = [first, second]

    def compile(self, optimizers):
        super().compile(run_eagerly=True)
        self.optimizers = optimizers

    def train_step(self, x):
        losses = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            with tf.GradientTape() as tape:
                losses.append(tf.reduce_mean((model(x) - 1) ** 2))
            gradients = tape.gradient(losses[-1], model.trainable_variables)
            optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return {"sum": sum(losses)}


@pytest.mark.only_on("tensorflow", because="its train_step records gradients with a tape")
def test_a_model_of_two_models_with_optimizers_of_their_own_is_kept():
    data = tf.data.Dataset.from_tensors(np.float32([[1, 2], [3, 5]]))
    trained = []

    def build(hp):
        models = [keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]) for _ in range(2)]
        model = Adversaries(*models)
        model.compile([keras.optimizers.Adam(hp.rate), ok.optimizers.Adam(hp.rate)])
        trained.append(model)
        return model

    result = ok.tuning.search(
        build, Space(rate=Choice([0.01])), data, objective="sum", direction="min", epochs=3, seed=0, verbose=0
    )
    assert result.best_trial.best_epoch == 3  # the last, so that the trained model itself is the one to compare with
    for a, b in zip(trained[0].models, result.best_model.models, strict=True):
        np.testing.assert_array_equal(a.get_weights()[0], b.get_weights()[0])
    for a, b in zip(trained[0].optimizers, result.best_model.optimizers, strict=True):
        assert int(b.iterations) == 3
        assert all(np.array_equal(x, y) for x, y in zip(a.variables, b.variables, strict=True))


@pytest.mark.parametrize(
    ("build", "suffix"),
    [(subclass, ".h5"), (closure, ".keras"), (own_compile, ".keras"), (lambda_layer, ".keras")],
)
def test_a_model_that_keras_cannot_open_is_built_and_given_its_weights(tmp_path, build, suffix):
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    data = ({"in": x} if build is subclass else x, x[:, :1], {"in": x} if build is subclass else x, x[:, :1])

    def run():
        return ok.tuning.search(
            build,
            Space(rate=Choice([0.1])),
            data,
            objective="val_loss",
            epochs=2,
            seed=0,
            verbose=0,
            directory=tmp_path,
        )

    result = run()
    assert [trial.status for trial in result.trials] == ["completed"]
    assert result.model_path.suffix == suffix
    later = run()  # as from another process: nothing is trained
    for model in (result.best_model, later.best_model):
        assert model.evaluate(data[2], data[3], verbose=0, return_dict=True)["loss"] == pytest.approx(
            result.best_score, rel=1e-6
        )
        assert int(model.optimizer.iterations) == result.best_trial.best_epoch
        assert sum(np.abs(variable).sum() > 0 for variable in model.optimizer.variables) > 2  # and not started over


def test_a_model_that_cannot_be_loaded_says_how_to(tmp_path):
    result = search(lambda hp: line(hp.x), Space(x=Int(1, 1)), directory=tmp_path)
    result.model_path.write_bytes(b"broken")
    with pytest.raises(RuntimeError, match=r"cannot be loaded from '.*model.keras', which .* use its load_weights"):
        _ = result.best_model
    result.model_path.unlink()
    with pytest.raises(FileNotFoundError, match=r"No model is kept of trial 0; keep_models=1"):
        _ = result.best_model


# The books


def test_a_disk_that_takes_no_more_ends_the_search_which_can_be_continued(tmp_path):
    def run():
        return search(lambda hp: line(hp.x), Space(x=Int(1, 2)), strategy="grid", directory=tmp_path)

    taken = tmp_path / "trial_1" / "model.keras" / "in the way"
    taken.mkdir(parents=True)
    with pytest.raises(OSError, match=r"trial_1/model.keras' cannot be written, and the search ends: "):
        run()
    taken.rmdir()
    taken.parent.rmdir()
    assert [trial.score for trial in run().trials] == [1.0, 2.0]
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished search of one trial."""
    path = tmp_path_factory.mktemp("finished") / "search"
    tuner(path).search(**FIT)
    return path


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("oracle.json", b'{"ongoing_tri', "Unterminated string"),
        ("oracle.json", None, "it is missing"),
        ("oracle.json", b"{}", "it has no 'start_order'"),
        ("trial_0/trial.json", b"", "Expecting value"),
        ("trial_0/trial.json", None, "it is missing"),
        ("tuner0.json", b"[]", "it holds list instead of a mapping"),
        ("tuner0.json", b"\xff", "can't decode"),
    ],
)
def test_a_damaged_book_is_named(tmp_path, finished, name, content, reason):
    shutil.copytree(finished, tmp_path / "copy")
    if content is None:
        (tmp_path / "copy" / name).unlink()
    else:
        (tmp_path / "copy" / name).write_bytes(content)
    named = re.escape(str(tmp_path / "copy" / name))
    with pytest.raises(RuntimeError, match=rf"cannot be continued, since '{named}' is damaged: .*{reason}.*overwrite"):
        tuner(tmp_path / "copy")
    mine = tmp_path / "copy" / "trial_notes"
    mine.mkdir()
    tuner(tmp_path / "copy", overwrite=True)
    assert not list((tmp_path / "copy").rglob("*.json"))
    assert mine.exists()


@pytest.mark.parametrize("name", ["oracle.json", "trial_0/trial.json", "tuner0.json"])
def test_a_byte_that_was_changed_in_a_book_is_found(tmp_path, finished, name):
    shutil.copytree(finished, tmp_path / "copy")
    book = tmp_path / "copy" / name
    content = book.read_bytes()
    named = re.escape(str(book))
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        book.write_bytes(changed)
        with pytest.raises(RuntimeError, match=rf"'{named}' is damaged"):
            check_books(tmp_path / "copy")
    book.write_bytes(content)
    check_books(tmp_path / "copy")


def test_what_was_changed_in_the_model_s_book_is_not_built_from(tmp_path, finished):
    shutil.copytree(finished, tmp_path / "copy")
    book = tmp_path / "copy" / "trial_0" / "model.built.json"
    book.write_text(book.read_text().replace('"optimizers": [', '"optimizers": [ ', 1))
    kept = KeptModel(tmp_path / "copy" / "trial_0")
    with pytest.raises(RuntimeError, match="it was changed after it had been written"):
        kept.load_into(line(1))


def test_books_without_digests_are_continued(tmp_path, finished):
    """Those of a version before."""
    shutil.copytree(finished, tmp_path / "copy")
    for book in (tmp_path / "copy").rglob("*.json"):
        whole = json.loads(book.read_text())
        book.write_text(whole["sealed"])
    found = tuner(tmp_path / "copy")
    found.search(**FIT)
    assert found.trials() == tuner(finished).trials()
    assert "sealed" in json.loads((tmp_path / "copy" / "tuner0.json").read_text())


def test_a_search_of_keras_tuner_is_not_taken_for_ours(tmp_path):
    Formula(
        RandomOracle(Space(x=Int(1, 1)), keras_tuner.Objective("score", "min"), 1, 0), directory=str(tmp_path)
    ).search(verbose=0)
    with pytest.raises(ValueError, match=r"directory must be new or hold the same search, got .*KerasTuner's own\."):
        tuner(tmp_path / "untitled_project")


def test_one_search_at_a_time_in_a_directory(tmp_path):
    refused = []

    def second():
        try:
            tuner(tmp_path).search(**FIT)
        except RuntimeError as error:
            refused.append(str(error))

    def build(hp):
        second()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        return line(hp.x)

    tuner(tmp_path, build=build).search(**FIT)
    assert len(refused) == 2
    assert refused[0] == refused[1]
    assert f"directory='{tmp_path}' is in use by another process, or by another search of this one" in refused[0]
    second()  # not any longer
    assert len(refused) == 2


class DyingEarly(RandomOracle):
    """Is killed when the second trial is in its file, but not yet in that of the oracle."""

    def save(self):
        if len(self.start_order) == 2:
            raise KeyboardInterrupt
        super().save()


def test_a_trial_that_the_oracle_had_not_noted_is_proposed_again(tmp_path):
    def run(oracle, path):
        found = tuner(path, oracle=oracle, space=Space(x=Float(1.0, 2.0)), max_trials=2)
        found.search(**FIT)
        return found.trials()

    whole = run(RandomOracle, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(DyingEarly, tmp_path / "parts")
    left = [".oracle.json.0123abcd.tmp", "trial_0/.0123abcd.tmp.model.keras"]
    for name in (*left, ".mine.tmp", "trial_notes"):
        (tmp_path / "parts" / name).write_text("half of it")
    parts = run(RandomOracle, tmp_path / "parts")
    assert [(trial.values, trial.score) for trial in parts] == [(trial.values, trial.score) for trial in whole]
    assert {path.name for path in tmp_path.rglob("*") if "tmp" in path.name} == {".mine.tmp"}


# Failures, to read


def test_a_failure_names_its_hyperparameters(tmp_path):
    def build(hp):
        if hp.units == 2:
            raise ValueError("no [/data] for [dense]")
        return line(1.0)

    space = Space({"units": Int(1, 2), "[b]": Choice(["[/x]"])})
    result = search(build, space, strategy="grid", directory=tmp_path)
    reason = "Trial 1 failed: ValueError: no [/data] for [dense] (units=2, [b]=[/x])"
    assert result.table().splitlines()[-1] == reason
    message = json.loads((tmp_path / "trial_1" / "trial.json").read_text())["message"]
    assert message.startswith("Failed with {'units': 2, '[b]': '[/x]'}.\nTraceback")
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(result)
    printed = console.file.getvalue()
    assert reason in printed
    assert "[b]" in printed.splitlines()[1]
    assert "[/x]" in printed.splitlines()[3]
    with pytest.raises(RuntimeError, match=r"All 1 trials failed; the first: ValueError: no .* \(units=2, \[b\]=.*\)"):
        search(build, {**space, "units": Int(2, 2)})


# The tuner


class Counting(keras.callbacks.Callback):
    """Counts the epochs that one copy sees."""

    counts: ClassVar = []

    def __init__(self):
        super().__init__()
        self.epochs = 0

    def on_epoch_end(self, epoch, logs=None):
        self.epochs += 1
        self.counts.append(self.epochs)


def test_callbacks_given_to_the_tuner_are_copied_for_each_run(tmp_path):
    Counting.counts.clear()
    given = [Counting(), keras.callbacks.TensorBoard(tmp_path / "logs", write_graph=False)]
    two = tuner(tmp_path / "two", executions_per_trial=2, callbacks=lambda: [Counting()])
    two.search(ONES, ZEROS, validation_data=DATA[2:], callbacks=given, epochs=2)
    assert sorted(Counting.counts) == [1] * 4 + [2] * 4  # two callbacks in two runs
    assert given[0].epochs == 0
    written = {str(path.parent.relative_to(tmp_path / "logs")) for path in (tmp_path / "logs").glob("*/*/train")}
    assert written == {"trial_0/execution_0", "trial_0/execution_1"}
    Counting.counts.clear()
    tuner(tmp_path / "made").search(**FIT, callbacks=lambda hp: [Counting() for _ in range(hp.x)])
    assert Counting.counts == [1]


class Locked(keras.callbacks.Callback):
    """Cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"callbacks": [3]}, TypeError, r"callbacks must be keras.callbacks.Callback, got 3"),
        ({"callbacks": 3}, TypeError, r"callbacks must be a function"),
        (
            {"callbacks": [Locked()]},
            TypeError,
            r"copy.deepcopy can copy .*Locked.* pass a function that returns new ones",
        ),
        (
            {"x": BATCHES.repeat(), "y": None},
            ValueError,
            r"steps_per_epoch must be given where x is a dataset without an",
        ),
        ({"epohcs": 3}, TypeError, r"fit has no argument 'epohcs'; it has x, y, .* Did you mean 'epochs'"),
    ],
)
def test_bad_arguments_of_the_tuners_search(tmp_path, arguments, error, message):
    with pytest.raises(error, match=message):
        tuner(tmp_path).search(**{**FIT, **arguments})


def test_what_the_space_sets_is_not_an_argument(tmp_path):
    with pytest.raises(ValueError, match=r"epochs must be None where it is a parameter of the space, got 3"):
        tuner(tmp_path, space=Space(epochs=Int(1, 2))).search(**FIT, epochs=3)


def test_the_methods_of_keras_tuner(tmp_path, capsys):
    three = tuner(tmp_path, space=Space(x=Choice([3.0, 1.0, 2.0, 9.0])), max_trials=None, keep_models=2)

    three.hypermodel.builder = lambda hp: line(math.nan if hp.x == 9 else hp.x)
    three.search(**FIT)
    best = [float(model.get_weights()[0][0, 0]) for model in three.get_best_models(2)]
    assert best == [1.0, 2.0]
    assert [hp.get("x") for hp in three.get_best_hyperparameters(3)] == [1.0, 2.0, 3.0]
    number = next(trial.number for trial in three.trials() if trial.values.x == 3)
    with pytest.raises(FileNotFoundError, match=rf"No model is kept of trial {number}; keep_models=2"):
        three.get_best_models(3)
    three.results_summary()
    printed = capsys.readouterr().out
    assert "Score: 1.0" in printed
    assert "loss is nan in epoch 1." in printed
    before = three.trials()
    three.reload()
    assert three.trials() == before
    three.search(**FIT)  # finished: nothing happens
    assert three.trials() == before
    every = tuner(tmp_path / "every", space=Space(x=Choice([3.0, 1.0])))
    every.search(**FIT)
    assert [float(model.get_weights()[0][0, 0]) for model in every.get_best_models(5)] == [1.0, 3.0]


def test_promoted_trials_continue_their_run(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 3)).astype("float32")

    def build(hp):
        keras.utils.set_random_seed(hp.start)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.compile(ok.optimizers.Adam(ok.schedules.Cosine(0.1, 8)), "mse", run_eagerly=True)
        return model

    hypermodel = ok.tuning.HyperModel(build, Space(start=Int(1, 30)))
    oracle = keras_tuner.oracles.HyperbandOracle(
        keras_tuner.Objective("val_loss", "min"),
        max_epochs=2,
        factor=2,
        seed=1,
        hyperparameters=hypermodel.hyperparameters(),
    )
    found = ok.tuning.Tuner(oracle, hypermodel, directory=tmp_path, verbose=0)
    found.search(x, x[:, :1], validation_data=(x, x[:, :1]), batch_size=16, shuffle=False)
    trials = {trial_id: oracle.trials[trial_id].hyperparameters.values for trial_id in oracle.start_order}
    (child,) = (values for values in trials.values() if "tuner/trial_id" in values)
    assert [trial.epochs for trial in found.trials()] == [
        values["tuner/epochs"] - values["tuner/initial_epoch"] for values in trials.values()
    ]
    whole = build(ok.tuning.Values(start=child["start"]))
    history = whole.fit(x, x[:, :1], validation_data=(x, x[:, :1]), epochs=2, batch_size=16, shuffle=False, verbose=0)
    (score,) = (t.score for t, v in zip(found.trials(), trials.values(), strict=True) if "tuner/trial_id" in v)
    assert score == pytest.approx(history.history["val_loss"][1], rel=1e-6)
    assert not list(tmp_path.rglob("end_*"))


def test_an_oracle_of_several_objectives(tmp_path):
    hypermodel = ok.tuning.HyperModel(lambda hp: line(math.inf if hp.x == 1 else hp.x), Space(x=Int(1, 2)))

    def of(metric, path):
        oracle = keras_tuner.oracles.GridSearchOracle(
            objective=[keras_tuner.Objective("val_loss", "min"), keras_tuner.Objective(metric, "max")],
            hyperparameters=hypermodel.hyperparameters(),
        )
        return ok.tuning.Tuner(oracle, hypermodel, directory=path, verbose=0)

    found = of("val_accuracy", tmp_path / "known")
    found.search(**FIT)
    result = found.result()
    assert [trial.score for trial in result.trials] == [None, 2.0]  # val_loss - val_accuracy, which is 0
    assert result.best_trial.metrics["val_loss"] == 2.0
    hypermodel.builder = lambda hp: line(hp.x)
    with pytest.raises(ValueError, match=r"objective must be a metric of the training .*, got 'val_auc'"):
        of("val_auc", tmp_path / "unknown").search(**FIT)


class Formulaic(ok.tuning.HyperModel):
    """Trains in a way of its own, without callbacks."""

    def fit(self, hp, model, x, factor=1, **kwargs):
        return factor * hp.get("x") if self.name == "number" else {"val_loss": factor * hp.get("x"), "other": 5}


@pytest.mark.parametrize("name", ["number", "metrics"])
def test_a_fit_of_the_hypermodels_own(tmp_path, name):
    hypermodel = Formulaic(lambda hp: line(hp.x), Space(x=Int(1, 1)), name=name)
    oracle = RandomOracle(hypermodel.space, keras_tuner.Objective("val_loss", "min"), None, 0)
    found = ok.tuning.Tuner(oracle, hypermodel, directory=tmp_path, verbose=0)
    found.search(ONES, factor=2)
    assert found.result().best_score == 2.0
    assert len(found.get_best_models()) == 1


# With KerasTuner's own parts


def test_the_hypermodel_works_with_a_tuner_of_keras_tuner(tmp_path):
    seen = []

    def build(hp):
        seen.append(hp)
        return line(hp.x)

    space = Space(x=Choice([2.0, 1.0]), flag=Choice([True, False], when={"x": 1.0}), batch_size=Choice([2]))
    tuner = keras_tuner.GridSearch(
        ok.tuning.HyperModel(build, space),
        objective=keras_tuner.Objective("val_loss", "min"),
        directory=str(tmp_path),
    )
    tuner.search(*DATA[:2], validation_data=DATA[2:], verbose=0)
    assert all(point in seen for point in space.grid())
    assert {type(hp.flag) for hp in seen if "flag" in hp} == {bool}
    assert tuner.get_best_hyperparameters()[0].values["x"] == 1.0


def test_an_oracle_of_keras_tuner_works_with_the_tuner(tmp_path):
    hypermodel = ok.tuning.HyperModel(lambda hp: line(math.inf if hp.x < 0.5 else hp.x), Space(x=Float(0.0, 1.0)))
    oracle = keras_tuner.oracles.BayesianOptimizationOracle(
        objective=keras_tuner.Objective("val_loss", "min"),
        max_trials=6,
        num_initial_points=3,
        seed=3,
        hyperparameters=hypermodel.hyperparameters(),
        max_consecutive_failed_trials=6,
    )
    tuner = ok.tuning.Tuner(oracle, hypermodel, directory=tmp_path / "search", verbose=0)
    tuner.search(*DATA[:2], validation_data=DATA[2:], epochs=1)
    result = tuner.result()
    assert len(result.trials) == 6
    assert {"completed", "failed"} == {trial.status for trial in result.trials}
    assert all((trial.values.x < 0.5) == (trial.status == "failed") for trial in result.trials)
    assert result.best_score == min(trial.score for trial in result.trials if trial.score is not None) >= 0.5
    (model,) = tuner.get_best_models()
    np.testing.assert_allclose(model.get_weights()[0], [[result.best.x]], rtol=1e-6)


def test_default_spaces_contain_the_defaults_of_their_classes():
    """But for what is off by default, 0 or None, which no logarithmic range holds. A decay is searched if it is on."""
    for card in ok.cards("optimizer"):
        parameters = inspect.signature(card.make).parameters
        assert set(card.space) <= set(parameters), card
        for name, values in card.space.items():
            default = parameters[name].default
            if isinstance(values, Choice):
                assert default in values.values, (card, name)
            elif default:
                assert values.low <= default <= values.high, (card, name)
        assert not parameters["weight_decay"].default or "weight_decay" in card.space, card

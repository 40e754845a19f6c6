"""Optuna's samplers behind KerasTuner's oracle: what they propose, are told, and propose after an interruption."""

import contextlib
import importlib.util
import json
import math
import shutil
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import optuna
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Bool, Choice, Float, Int, OptunaOracle, Space, samplers

MIXED = Space(
    kind=Choice(["a", "b", "bad"]),
    rate=Float(1e-4, 1.0, log=True),
    beta=Float(0.1, 0.9, log="reverse"),
    units=Int(8, 64),
    slope=Float(0.0, 1.0, when={"kind": "b"}),
    bias=Bool(when={"slope2": 0.5}),
    slope2=Choice([0.1, 0.5], when={"kind": ["a", "b"]}),
    size=Choice([8, 16, 32]),
    only=Choice(["x"]),
    constraints=["units + size < 80"],
)


def cost(values):
    if values.get("kind") == "bad":
        return None
    near = (math.log10(values["rate"]) + 2) ** 2 + (values["units"] - 20) ** 2 / 100
    return near + (values.get("slope", 0.5) - 0.5) ** 2 + values["beta"]


def drive(oracle, directory, count=10**6, score=cost):
    """Runs trials of an oracle without a model; returns the points of all trials."""
    oracle._set_project_dir(str(directory), "search")
    oracle.verbose = 0
    for _ in range(count):
        trial = oracle.create_trial("one")
        if trial.status == "STOPPED":
            break
        found = score(trial.hyperparameters.values)
        trial.status = "FAILED" if found is None else "COMPLETED"
        if found is not None:
            oracle.update_trial(trial.trial_id, {"default_objective": found} if isinstance(found, float) else found)
        oracle.end_trial(trial)
    return [oracle.trials[trial_id].hyperparameters.values for trial_id in oracle.start_order]


@pytest.mark.parametrize(
    "parameter",
    [
        Float(0.1, 0.5), Float(0.1, 0.5, log=True), Float(0.1, 0.5, log="reverse"), Float(0.1, 0.5, step=0.1),
        Float(1e-4, 1.0, log=True, step=10), Int(1, 5), Int(1, 5, log=True), Int(1, 5, log="reverse"),
        Int(1, 9, step=3), Int(2, 16, log=True, step=2), Bool(), Choice(["a", "b"]), Choice([16, 32, 64]),
        Choice([0.5, 0.1]), Choice([3, 1, 2]), Choice([True, False]),
    ],
)  # fmt: skip
def test_parameters_as_optuna_has_them(parameter):
    distribution = samplers.distribution(parameter)
    rng = np.random.default_rng(0)
    for _ in range(20):
        value = parameter.sample(rng)
        param = samplers.encoded(parameter, value)
        assert distribution._contains(distribution.to_internal_repr(param))
        back = samplers.decoded(parameter, param)
        assert back == pytest.approx(value) if isinstance(parameter, Float) else back == value
        assert type(back) is type(value)
    ordered = isinstance(distribution, optuna.distributions.CategoricalDistribution)
    assert ordered == (isinstance(parameter, Bool | Choice) and parameter.grid() not in ((16, 32, 64), (0.5, 0.1)))


@pytest.mark.parametrize(
    ("strategy", "count", "cut"),
    [
        ("tpe", 16, 13),
        ("qmc", 9, 5),
        ("cma", 30, 22),
        ("nsga2", 46, 40),
        ("random object", 6, 3),
        ("cma object", 30, 25),
    ],
)
def test_a_search_that_is_continued_proposes_the_same(strategy, count, cut, tmp_path):
    def oracle():
        objects = {"random object": optuna.samplers.RandomSampler, "cma object": optuna.samplers.CmaEsSampler}
        given = objects[strategy]() if strategy in objects else strategy  # objects have no seed of their own
        return OptunaOracle(None, count, given, space=MIXED, seed=0)

    whole = drive(oracle(), tmp_path / "whole")
    assert len(whole) == count
    assert all(MIXED.allows(point) for point in whole)
    drive(oracle(), tmp_path / "parts", cut)
    again = oracle()
    again._set_project_dir(str(tmp_path / "parts"), "search")
    again.reload()
    assert drive(again, tmp_path / "parts") == whole
    other = OptunaOracle(None, 3, oracle().strategy, space=MIXED, seed=1)
    assert drive(other, tmp_path / "other") != whole[:3]


@pytest.mark.parametrize(("strategy", "count"), [("tpe", 14), ("cma", 16), ("nsga2", 26)])
def test_samplers_learn_from_what_they_are_told(strategy, count, tmp_path):
    """The first points do not depend on the scores, the last do; what fails is not a score."""
    space = Space(x=Float(0.0, 1.0), y=Float(0.0, 1.0))

    def run(name, score):
        oracle = OptunaOracle(None, count, strategy, space=space, seed=0)
        return drive(oracle, tmp_path / name, score=score), oracle

    low, _ = run("low", lambda hp: hp["x"] + hp["y"])
    high, _ = run("high", lambda hp: -hp["x"] - hp["y"])
    assert low[0] == high[0]
    assert low[-1] != high[-1]
    failed, oracle = run("failed", lambda hp: {0: None, 1: math.nan, 2: math.inf}.get(int(hp["x"] * 4), hp["y"]))
    expected = ["FAIL" if point["x"] < 0.75 else "COMPLETE" for point in failed]
    oracle._caught_up(space)
    states = [trial.state.name for trial in oracle._study._study.get_trials()]
    assert states == expected
    assert [trial.status for trial in oracle.trials.values()].count("FAILED") == states.count("FAIL") > 3
    reasons = [trial.message for trial in oracle.trials.values() if trial.message]
    assert all("Failed with {'x': 0." in reason and "default_objective is" in reason for reason in reasons)


def test_tpe_finds_more_than_random_points(tmp_path):
    best = {}
    for strategy in ("tpe", optuna.samplers.RandomSampler()):
        space = Space(x=Float(0.0, 1.0), y=Float(0.0, 1.0), z=Choice(["a", "b", "c"]))
        scores = [
            min((hp["x"] - 0.3) ** 2 + (hp["y"] - 0.8) ** 2 + (hp["z"] != "b") for hp in drive(
                OptunaOracle(None, 30, strategy, space=space, seed=seed), tmp_path / f"{strategy}{seed}",
                score=lambda hp: (hp["x"] - 0.3) ** 2 + (hp["y"] - 0.8) ** 2 + (hp["z"] != "b"),
            ))
            for seed in range(2)
        ]  # fmt: skip
        best[str(strategy)] = float(np.median(scores))
    assert best["tpe"] < best["RandomSampler"] / 3


@pytest.mark.parametrize("strategy", samplers.NAMES)
def test_small_spaces_are_exhausted_exactly_once(strategy, tmp_path):
    space = Space(
        kind=Choice(["a", "b"]),
        rate=Choice([0.1, 0.2], when={"kind": "b"}),
        units=Int(1, 3),
        constraints=["rate < 0.2 or units < 3"],
    )
    points = drive(OptunaOracle(None, None, strategy, space=space, seed=0), tmp_path, score=lambda hp: None)  # noqa: ARG005
    assert len(points) == space.size == 8
    assert all(point in points for point in space.grid())


def test_what_is_likely_comes_first(tmp_path):
    space = Space(kind=Choice(["a", "b"], weights=[1, 99]), x=Float(0.0, 1.0, normal=(0.5, 0.01)))
    points = drive(OptunaOracle(None, 10, "tpe", space=space, seed=0), tmp_path, score=lambda hp: hp["x"])
    assert [point["kind"] for point in points].count("b") >= 9
    assert all(abs(point["x"] - 0.5) < 0.05 for point in points)
    with pytest.raises(ValueError, match=r"strategy must not be 'qmc', which covers ranges evenly, .* as 'kind' has"):
        OptunaOracle(None, 10, "qmc", space=space)


# Stock tuners of KerasTuner


ONES, ZEROS = np.ones((4, 1), "float32"), np.zeros((4, 1), "float32")
DATA = (ONES, ZEROS, ONES, ZEROS)


def line(start, **arguments):
    """A model whose val_loss is |start|."""
    kernel = keras.initializers.Constant(start)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(0.0), "mae", run_eagerly=True, **arguments)
    return model


def test_in_a_stock_tuner(tmp_path):
    def build(hp):
        if hp.Choice("kind", ["line", "nan"]) == "nan":
            return line(math.nan)
        return line(hp.Float("x", 1.0, 3.0) + hp.Int("n", 0, 2, parent_name="kind", parent_values=["line"]))

    def run(max_trials, strategy="tpe"):
        oracle = OptunaOracle(keras_tuner.Objective("val_loss", "min"), max_trials, strategy, seed=0)
        tuner = keras_tuner.Tuner(oracle=oracle, hypermodel=build, directory=tmp_path, project_name="stock")
        tuner.search(ONES, ZEROS, validation_data=(ONES, ZEROS), epochs=1, verbose=0)
        return tuner

    tuner = run(5)
    trials = list(tuner.oracle.trials.values())
    assert len(trials) == 5
    for trial in trials:
        values = trial.hyperparameters.values
        assert ("n" in values) == (values["kind"] == "line")
        assert trial.status == {"line": "COMPLETED", "nan": "FAILED"}[values["kind"]]
    assert {trial.status for trial in trials} == {"COMPLETED", "FAILED"}
    oracle = run(7).oracle
    more = [oracle.trials[trial_id].hyperparameters.values for trial_id in oracle.start_order]
    assert more[:5] == [trial.hyperparameters.values for trial in trials]
    assert len(more) == 7
    with pytest.raises(ValueError, match=r"got .*stock', where strategy was 'tpe' and is 'cma'"):
        run(7, "cma")


def test_a_stock_tuner_that_searches_nothing(tmp_path):
    oracle = OptunaOracle(keras_tuner.Objective("val_loss", "min"), 5, seed=0)
    points = drive(oracle, tmp_path, score=lambda hp: {"val_loss": 1.0})  # noqa: ARG005
    assert points == [{}]


# Searches


def search(build, space, **arguments):
    return ok.tuning.search(
        build, space, DATA, **{"objective": "val_loss", "epochs": 1, "seed": 0, "verbose": 0, **arguments}
    )


def test_an_interrupted_search_is_continued(tmp_path):
    built = []

    def run(directory, stop_at=None):
        def build(hp):
            if len(built) == stop_at:
                raise KeyboardInterrupt
            built.append(hp)
            return line(hp.x)

        sampler = optuna.samplers.TPESampler(n_startup_trials=2)
        return search(build, Space(x=Float(1.0, 3.0)), strategy=sampler, max_trials=4, directory=directory)

    whole = run(tmp_path / "whole")
    built.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", stop_at=3)
    parts = run(tmp_path / "parts")
    assert len(built) == 4
    assert [(trial.values, trial.score) for trial in parts.trials] == [(t.values, t.score) for t in whole.trials]
    with pytest.raises(
        ValueError, match=r"got '.*parts', where strategy was 'TPESampler' and is 'cma'\. Choose another directory"
    ):
        search(lambda hp: line(hp.x), Space(x=Float(1.0, 3.0)), strategy="cma", directory=tmp_path / "parts")
    with pytest.raises(ValueError, match=r"strategy was 'TPESampler' and is 'random'"):
        search(lambda hp: line(hp.x), Space(x=Float(1.0, 3.0)), directory=tmp_path / "parts")


class Size(keras.callbacks.Callback):
    """Puts the size of the model into the logs."""

    def on_epoch_end(self, epoch, logs=None):
        logs["size"] = 5.0 - 1.5 * abs(float(self.model.weights[0][0, 0]))


def test_several_objectives_have_a_pareto_set():
    objectives = ["val_loss", keras_tuner.Objective("size", "min")]
    result = search(
        lambda hp: line(hp.x + (1.0 if hp.worse else 0.0)),
        Space(x=Choice([1.0, 2.0]), worse=Bool()),
        strategy="nsga2",
        objective=objectives,
        callbacks=lambda: [Size()],
    )
    assert len(result.trials) == 4
    assert result.objectives == {"val_loss": "min", "size": "min"}
    found = {(t.values.x, t.values.worse): t.metrics for t in result.trials if t.status == "completed"}
    assert {key: (m["val_loss"], m["size"]) for key, m in found.items()} == {
        (1.0, False): (1.0, 3.5), (1.0, True): (2.0, 2.0), (2.0, False): (2.0, 2.0), (2.0, True): (3.0, 0.5),
    }  # fmt: skip
    assert len(result.pareto) == 4  # none is better in both, and of equals all are in it
    head, _, first, *_ = result.table().splitlines()
    assert head.split()[:4] == ["trial", "val_loss", "size", "x"]
    assert first.split()[1:3] == ["3", "0.5"]  # the lowest sum
    single = search(lambda hp: line(hp.x), Space(x=Int(1, 3)), strategy="grid")
    assert single.pareto == [single.best_trial]


def test_a_dominated_trial_is_not_in_the_pareto_set():
    def trial(number, a, b, status="completed"):
        return ok.tuning.Trial(number, ok.tuning.Values(), 0.0, {"a": a, "b": b}, status=status)

    from keras_optkit.tuning.trials import pareto

    trials = [trial(0, 1, 1), trial(1, 2, 2), trial(2, 0, 0), trial(3, 1, 1.5), trial(4, 0, 9, "failed")]
    assert {found.number for found in pareto(trials, {"a": "min", "b": "max"})} == {1, 2, 3}
    assert {found.number for found in pareto(trials, {"a": "min", "b": "min"})} == {2}


# The Gaussian process, in a process without TensorFlow


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch, which is never imported here")
def test_gaussian_process_is_computed_elsewhere(tmp_path):
    space = Space(x=Float(0.0, 1.0), kind=Choice(["a", "b"]), y=Float(0.0, 1.0, when={"kind": "b"}))

    def oracle():
        return OptunaOracle(None, 12, "gp", space=space, seed=0)

    def score(hp):
        return (hp["x"] - 0.3) ** 2 + (hp["kind"] != "a")

    first, again = oracle(), oracle()
    first._set_project_dir(str(tmp_path / "whole"), "search")
    dead = subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    dead.wait()
    first._caught_up(space)._process = dead  # another one is started
    drive(first, tmp_path / "whole", 11, score)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    again._set_project_dir(str(tmp_path / "parts"), "search")
    again.reload()
    again._caught_up(space)._process = first._study._process  # starting one takes seconds
    points = drive(again, tmp_path / "parts", score=score)
    assert drive(first, tmp_path / "whole", score=score) == points
    with contextlib.suppress(BrokenPipeError):  # of what could not be written to it
        dead.stdin.close()
    dead.stdout.close()
    assert "torch" not in sys.modules
    assert len(points) == 12
    assert min(map(score, points[10:])) < min(map(score, points[:10]))


# Mistakes


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"strategy": "bayes"}, ValueError, r"strategy must be one of 'qmc', 'tpe', .* got 'bayes'"),
        ({"strategy": 3}, TypeError, r"strategy must be a name or an Optuna sampler, got 3"),
        ({"strategy": "cma", "objective": ["loss", "val_loss"]}, ValueError, r"for several objectives, .* got 'cma'"),
        ({"max_trials": 0}, ValueError, r"max_trials must be an integer at least 1 or None, got 0"),
        ({"seed": -1}, ValueError, r"seed must be an integer at least 0 or None, got -1"),
        ({"space": {"x": Int(1, 2)}}, TypeError, r"space must be a Space or None, got {'x'"),
        ({"hyperparameters": keras_tuner.HyperParameters()}, ValueError, r"hyperparameters must be None where space"),
        ({"space": Space(x=Int(1, 2), constraints=["x > 2"])}, ValueError, r"No point meets the constraints"),
    ],
)
def test_bad_arguments_of_the_oracle(changed, error, message):
    with pytest.raises(error, match=message):
        OptunaOracle(**{"objective": None, "space": Space(x=Int(1, 2)), **changed})


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"strategy": 3}, TypeError, r"strategy must be a name or an Optuna sampler, got 3"),
        ({"objective": ["val_loss"]}, ValueError, r"objective must be a name or a list of at least two"),
        ({"objective": ["val_loss", 3]}, TypeError, r"objective must be the name of a metric, got 3"),
        ({"objective": ["val_loss", "val_loss"]}, ValueError, r"objective must be different metrics"),
        (
            {"objective": ["loss", "val_loss"], "direction": "min"},
            ValueError,
            r"direction must be None where there are",
        ),
        ({"strategy": "tpe", "points": 3}, ValueError, r"points must be None where strategy is not \"grid\""),
        ({"max_model_size": 0}, ValueError, r"max_model_size must be an integer at least 1 or None, got 0"),
    ],
)
def test_bad_arguments_of_a_search(changed, error, message):
    with pytest.raises(error, match=message):
        search(lambda hp: line(hp.x), Space(x=Int(1, 2)), **changed)


def test_a_gaussian_process_of_optuna_is_not_run_in_this_process():
    class Other(optuna.samplers.GPSampler):
        def __init__(self):
            pass

    with pytest.raises(ValueError, match=r"strategy must be \"gp\" instead of a GPSampler, which would import torch"):
        OptunaOracle(None, 3, Other(), space=Space(x=Int(1, 2)))


def test_what_is_not_installed_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # noqa: ARG005
    with pytest.raises(ImportError, match=r"strategy='cma' needs cmaes: pip install \"keras-optkit\[search\]\""):
        OptunaOracle(None, 3, "cma")
    with pytest.raises(ImportError, match=r"strategy='gp' needs scipy"):
        OptunaOracle(None, 3, "gp")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r"strategy='tpe' needs Optuna: pip install \"keras-optkit\[search\]\""):
        search(lambda hp: line(hp.x), Space(x=Int(1, 2)), strategy="tpe")


def test_the_file_of_the_oracle_is_plain_json(tmp_path):
    oracle = OptunaOracle(None, 12, "cma", space=Space(x=Float(0.0, 1.0), y=Float(0.0, 1.0)), seed=0)
    drive(oracle, tmp_path, score=lambda hp: hp["x"] + hp["y"])
    saved = json.loads((tmp_path / "search" / "oracle.json").read_text())["optuna"]
    assert saved["strategy"] == "cma"
    assert {type(value) for entry in saved["proposals"].values() for value in entry["params"].values()} == {float}
    assert {name for entry in saved["proposals"].values() for name in entry} == {"params", "rejected", "told"}


def test_a_tuner_whose_trials_ask_for_hyperparameters(tmp_path):
    """Its first trial runs before there is a space."""

    class Tuner(keras_tuner.Tuner):
        def run_trial(self, trial, **_):
            return trial.hyperparameters.Float("x", -1.0, 1.0) ** 2

    oracle = OptunaOracle(keras_tuner.Objective("default_objective", "min"), 4, seed=0)
    tuner = Tuner(oracle=oracle, directory=tmp_path, project_name="x")
    tuner.search(verbose=0)
    assert len({trial.hyperparameters.values["x"] for trial in oracle.trials.values()}) == 4
    again = OptunaOracle(keras_tuner.Objective("default_objective", "min"), 6, seed=0)
    Tuner(oracle=again, directory=tmp_path, project_name="x").search(verbose=0)
    assert len(again.trials) == 6

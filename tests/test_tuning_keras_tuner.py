"""Build functions and hypermodels of KerasTuner: their space is found, and they run unchanged."""

import warnings

import keras
import keras_tuner
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Bool, Choice, Float, Int, Space
from keras_optkit.tuning.found import found_space, space_of

ONES, ZEROS = np.ones((4, 1), "float32"), np.zeros((4, 1), "float32")
DATA = (ONES, ZEROS, ONES, ZEROS)


def line(start):
    """A model whose val_loss is |start|."""
    kernel = keras.initializers.Constant(start)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(0.0), "mae", run_eagerly=True)
    return model


def test_every_call_becomes_a_parameter():
    def build(hp):
        hp.Int("units", 32, 512, step=32, default=64)
        hp.Int("heads", 1, 8, sampling="log", step=2)
        hp.Float("rate", 1e-4, 1e-1, sampling="log")
        hp.Float("momentum", 0.1, 0.9, sampling="reverse_log", default=0.5)
        hp.Float("dropout", 0.0, 0.5, step=0.1, default=0.25)  # between two steps, which KerasTuner takes
        hp.Float("wide", 0.0, 0.5, step=0.6)
        hp.Choice("activation", ["relu", "tanh", "relu"], default="tanh")
        hp.Boolean("bias", default=True)
        hp.Fixed("version", 3)
        with hp.name_scope("head"):
            hp.Int("units", 1, 2)

    assert found_space(build) == Space({
        "units": Int(32, 512, step=32, default=64),
        "heads": Int(1, 8, log=True, step=2),
        "rate": Float(1e-4, 1e-1, log=True),
        "momentum": Float(0.1, 0.9, log="reverse", default=0.5),
        "dropout": Float(0.0, 0.5, step=0.1),
        "wide": Choice([0.0]),
        "activation": Choice(["relu", "tanh"], default="tanh"),
        "bias": Bool(default=True),
        "version": Choice([3]),
        "head/units": Int(1, 2),
    })  # fmt: skip


def test_conditions_of_scopes_and_of_code_are_found():
    calls = []

    def build(hp):
        calls.append(dict(hp.values))
        kind = hp.Choice("kind", ["mlp", "cnn"])
        layers = hp.Int("layers", 1, 20)
        for i in range(layers):
            if i < 2:
                hp.Int(f"units_{i}", 32, 512, step=32)
                if hp.Boolean(f"drop_{i}"):
                    hp.Float(f"rate_{i}", 0.1, 0.5)
        with hp.conditional_scope("kind", ["cnn"]):
            filters = hp.Choice("filters", [8, 16])
            if kind == "cnn" and filters == 16:  # inside of a scope, and three levels deep
                hp.Choice("pool", ["max", "mean"], parent_name="filters", parent_values=[16])
        if kind == "cnn" and layers == 20:
            hp.Float("both", 0.0, 1.0)
        hp.Int("alpha", 1, 2, parent_name="kind", parent_values=["mlp"])

    more = tuple(range(2, 21))
    when = {name: parameter.when for name, parameter in found_space(build).items()}
    assert when == {
        "kind": None, "layers": None, "units_0": None, "drop_0": None,
        "units_1": {"layers": more}, "drop_1": {"layers": more},
        "rate_0": {"drop_0": (True,)}, "rate_1": {"drop_1": (True,)},
        "filters": {"kind": ("cnn",)}, "pool": {"kind": ("cnn",), "filters": (16,)},
        "both": {"kind": ("cnn",), "layers": (20,)},
        "alpha": {"kind": ("mlp",)},
    }  # fmt: skip
    assert len(calls) < 200


def test_what_depends_on_a_wide_range_is_searched_everywhere():
    def build(hp):
        if hp.Float("x", 0.0, 1.0) > 0.5:
            hp.Int("a", 1, 2)
        if hp.Int("y", 1, 1000) > 500:
            hp.Int("b", 1, 2)
        if hp.Int("n", 1, 3) == 2 and hp.Int("m", 1, 3) == 2 and hp.Choice("o", [1, 2]) == 2:
            hp.Int("c", 1, 2)

    space = found_space(build)
    assert [space[name].when for name in "xaybnmoc"] == [
        None, None, None, None, None, {"n": (2,)}, {"m": (2,)}, {"o": (2,)},
    ]  # fmt: skip


def test_points_at_which_build_raises_say_nothing():
    def build(hp):
        if hp.Int("size", 1, 5) == 4:
            raise ValueError("no model has 4")
        if hp.Boolean("more"):
            hp.Int("extra", 1, 2)

    assert found_space(build)["more"].when is None

    def hopeless(hp):
        raise KeyError(f"nothing at {hp.Int('size', 1, 5)}")

    with pytest.raises(KeyError, match="nothing at 1"):
        ok.tuning.search(hopeless, data=DATA, objective="val_loss")


def test_build_functions_without_hyperparameters_are_refused():
    with pytest.raises(ValueError, match=r"build must ask hp for hyperparameters where space is None"):
        found_space(lambda hp: line(1.0))  # noqa: ARG005


def test_one_name_under_two_conditions():
    hp = keras_tuner.HyperParameters()
    hp.Choice("kind", ["a", "b", "c"])
    for value in ("a", "b"):
        hp.Int("n", 1, 2, parent_name="kind", parent_values=[value])
    assert space_of(hp)["n"] == Int(1, 2, when={"kind": ["a", "b"]})
    hp.Int("n", 1, 5, parent_name="kind", parent_values=["c"])
    with pytest.raises(ValueError, match=r"'n' is asked for as .*high=2\) and as .*high=5\): give it two names"):
        space_of(hp)


def search(build, **arguments):
    return ok.tuning.search(
        build, data=DATA, **{"objective": "val_loss", "epochs": 1, "seed": 0, "verbose": 0, **arguments}
    )


def test_a_build_function_of_keras_tuner_runs_unchanged(tmp_path):
    def build(hp):
        if hp.Choice("kind", ["a", "b"]) == "a":
            return line(hp.Float("x", 1.0, 2.0, step=1.0))
        return line(hp.Int("n", 3, 4) + (0.5 if hp.Boolean("half") else 0.0))

    result = search(build, strategy="grid", directory=tmp_path)
    assert result.space == Space(
        kind=Choice(["a", "b"]),
        x=Float(1.0, 2.0, step=1.0, when={"kind": "a"}),
        n=Int(3, 4, when={"kind": "b"}),
        half=Bool(when={"kind": "b"}),
    )
    assert [(trial.values, trial.score) for trial in result.trials] == [
        ({"kind": "a", "x": 1.0}, 1.0),
        ({"kind": "a", "x": 2.0}, 2.0),
        ({"kind": "b", "n": 3, "half": False}, 3.0),
        ({"kind": "b", "n": 3, "half": True}, 3.5),
        ({"kind": "b", "n": 4, "half": False}, 4.0),
        ({"kind": "b", "n": 4, "half": True}, 4.5),
    ]
    assert search(build, strategy="grid", directory=tmp_path).best == {"kind": "a", "x": 1.0}  # nothing is run again


def test_what_is_asked_for_later_has_its_default_and_a_warning():
    class Model(keras_tuner.HyperModel):
        def build(self, hp):
            return line(hp.Int("x", 1, 2))

        def fit(self, hp, model, *args, **kwargs):
            assert hp.get("x") in (1, 2)
            return model.fit(*args, batch_size=hp.Choice("batch_size", [2, 4]), **kwargs)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = search(Model(), strategy="grid")
    (message,) = [str(warning.message) for warning in caught if warning.category is UserWarning]
    assert message.startswith("'batch_size' of hp is asked for at {'x': 1}, and was not when the space was looked for")
    assert [trial.score for trial in result.trials] == [1.0, 2.0]
    with pytest.raises(TypeError, match=r"space must be None where build is a keras_tuner.HyperModel"):
        ok.tuning.HyperModel(Model(), Space(x=Int(1, 2)))


def test_constraints_hold_with_oracles_that_do_not_know_of_them(tmp_path):
    space = Space(x=Int(1, 2), y=Int(1, 2), constraints=["x < y"])
    hypermodel = ok.tuning.HyperModel(lambda hp: line(hp.x), space)
    goal = keras_tuner.Objective("val_loss", "min")
    oracle = keras_tuner.oracles.GridSearchOracle(
        objective=goal, hyperparameters=hypermodel.hyperparameters(), max_consecutive_failed_trials=9
    )
    tuner = ok.tuning.Tuner(oracle, hypermodel, directory=tmp_path, verbose=0)
    tuner.search(ONES, ZEROS, validation_data=(ONES, ZEROS))
    statuses = {(t.values.x, t.values.y): t.status for t in tuner.trials()}
    assert statuses == {(1, 1): "failed", (1, 2): "completed", (2, 1): "failed", (2, 2): "failed"}
    assert tuner.trials()[0].reason == "The constraints ['x < y'] do not hold. (x=1, y=1)"


def test_what_is_asked_for_under_either_of_two_conditions_is_searched_everywhere():
    def build(hp):
        either = hp.Boolean("either")
        if hp.Choice("kind", ["p", "q", "r"]) == "r" or either:
            hp.Float("rate", 0.1, 0.5)

    assert found_space(build)["rate"] == Float(0.1, 0.5)


def test_one_name_with_two_ranges():
    def build(hp):
        hp.Int("units", 4, 8) if hp.Boolean("small") else hp.Int("units", 100, 200)

    with pytest.raises(
        ValueError, match=r"'units' is asked for as Int\(low=100, .* and as Int\(low=4, .*: give it two names"
    ):
        found_space(build)


def test_an_oracle_without_hyperparameters_searches_those_of_the_hypermodel(tmp_path):
    space = Space(start=Float(-1.0, 1.0, normal=(0.0, 0.01)), least=Float(-0.5, 0.5), constraints=["least < start"])
    hypermodel = ok.tuning.HyperModel(lambda hp: line(hp.start), space)
    goal = keras_tuner.Objective("val_loss", "min")
    for oracle in (
        ok.tuning.OptunaOracle(goal, 3, "tpe", seed=0),
        ok.tuning.OptunaOracle(goal, 3, "tpe", seed=0, hyperparameters=hypermodel.hyperparameters()),
    ):
        tuner = ok.tuning.Tuner(oracle, hypermodel, directory=tmp_path, overwrite=True, verbose=0)
        tuner.search(ONES, ZEROS, validation_data=(ONES, ZEROS), epochs=1)
        assert [trial.status for trial in tuner.trials()] == ["completed"] * 3
        assert all(abs(trial.values.start) < 0.05 for trial in tuner.trials())
    narrow = ok.tuning.HyperModel(lambda hp: line(hp.start), Space(start=Float(0.5, 0.6))).hyperparameters()
    plain = ok.tuning.HyperModel(lambda hp: line(hp.start), Space(start=Float(-1.0, 1.0)))
    tuner = ok.tuning.Tuner(
        ok.tuning.OptunaOracle(goal, 2, "tpe", seed=0, hyperparameters=narrow),
        plain,
        directory=tmp_path,
        overwrite=True,
        verbose=0,
    )
    tuner.search(ONES, ZEROS, validation_data=(ONES, ZEROS), epochs=1)
    assert all(0.5 <= trial.values.start <= 0.6 for trial in tuner.trials())
    oracle = keras_tuner.oracles.RandomSearchOracle(goal, max_trials=2, seed=0)
    tuner = ok.tuning.Tuner(oracle, plain, directory=tmp_path, overwrite=True, verbose=0)
    tuner.search(ONES, ZEROS, validation_data=(ONES, ZEROS), epochs=1)
    assert len({trial.values.start for trial in tuner.trials()}) == 2

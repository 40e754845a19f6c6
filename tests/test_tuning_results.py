"""What a search leaves to look at: tables for other programs, importance, figures, the report."""

import csv
import json
import math
import re
import sys
from pathlib import Path

import keras
import matplotlib.colors
import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Bool, Choice, Float, Int, Result, Space, Trial
from keras_optkit.tuning.plots import BEST, FAILED

NASTY = "<script>alert('$x_$')</script>"
SPACE = Space(
    {
        "rate": Float(1e-4, 1.0, log=True),
        "kind": Choice(["a", "b"]),
        "units": Choice([8, 16], when={"kind": "a"}),
        "momentum": Float(0.5, 0.99, log="reverse", when={"kind": "b"}),
        "flag": Bool(when={"kind": "b"}),
        "epochs": Int(1, 2),
        NASTY: Choice(["x", ""]),
    },
)


def run(*losses):
    return {"epochs": list(range(1, len(losses) + 1)), "metrics": {"val_loss": list(losses)}}


def trial(number, values, val_loss, **more):
    metrics = {"val_loss": val_loss, "val_accuracy": more.pop("accuracy", 0.5)}
    fields = {"epochs": 2, "best_epoch": 2, "seconds": 1.5, "history": [run(val_loss + 1, val_loss)]}
    return Trial(number, ok.tuning.Values(values), val_loss, metrics, **{**fields, **more})


def failed(number, values, message, history=()):
    return Trial(number, ok.tuning.Values(values), None, epochs=1, status="failed", message=message, history=[*history])


TRIALS = [
    trial(0, {"rate": 0.1, "kind": "a", "units": 8, "epochs": 2, NASTY: "x"}, 0.3, accuracy=0.9),
    failed(1, {"rate": 1.0, "kind": "a", "units": 16, "epochs": 1, NASTY: "x"}, f"=NaN, {NASTY}\n", [run(math.nan)]),
    trial(2, {"rate": 0.01, "kind": "b", "momentum": 0.9, "flag": True, "epochs": 1, NASTY: ""}, 0.2, accuracy=0.8),
    trial(3, {"rate": 0.001, "kind": "b", "momentum": 0.5, "flag": False, "epochs": 1, NASTY: "x"}, 0.25, accuracy=0.7),
]


def result_of(trials, space, objectives=None, directory="nowhere", model="model.keras"):
    objectives = objectives or {"val_loss": "min"}
    name, direction = next(iter(objectives.items())) if len(objectives) == 1 else ("multi_objective", "min")
    return Result(trials, space, name, direction, 7, Path(directory), Path(directory, model), objectives=objectives)


@pytest.fixture
def result():
    return result_of(TRIALS, SPACE)


@pytest.fixture
def several():
    def summed(trial):
        return None if trial.score is None else trial.metrics["val_loss"] - trial.metrics["val_accuracy"]

    trials = [Trial(**{**vars(trial), "score": summed(trial)}) for trial in TRIALS]
    return result_of(trials, SPACE, {"val_loss": "min", "val_accuracy": "max"})


# For other programs


def test_columns_of_the_table_are_told_apart(result):
    space = Space(trial=Int(1, 2), epochs=Int(1, 2), seconds=Int(1, 2))
    head, *_ = result_of([trial(0, {"trial": 1, "epochs": 2, "seconds": 1}, 0.5)], space).table().splitlines()
    names = re.split(r"  +", head.strip())
    assert names == [
        "trial", "val_loss", "values.trial", "epochs", "values.seconds", "best epoch", "epochs trained", "seconds",
    ]  # fmt: skip
    assert "history" not in result.rows()[0]


def test_data_frame_keeps_types_beside_what_is_missing(result):
    frame = result.to_pandas()
    assert list(frame["number"]) == [0, 1, 2, 3]
    assert str(frame["values.units"].dtype) == str(frame["best_epoch"].dtype) == "Int64"
    assert str(frame["values.flag"].dtype) == "boolean"
    assert frame["values.units"].isna().tolist() == [False, False, True, True]
    assert math.isnan(frame["score"][1])
    assert frame["values.rate"].dtype == "float64"
    assert frame[f"values.{NASTY}"].tolist() == ["x", "x", "", "x"]
    assert frame["epochs"].tolist() == [2, 1, 2, 2]
    assert frame["values.epochs"].tolist() == [2, 1, 1, 1]


def test_csv_has_every_trial(result, tmp_path):
    result.trials[0].metrics["gap"] = math.inf
    result.to_csv(tmp_path / "trials.csv")
    result.trials[0].metrics.pop("gap")
    with (tmp_path / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["values.rate"]) for row in rows] == [each.values.rate for each in TRIALS]
    assert [row["score"] for row in rows] == ["0.3", "", "0.2", "0.25"]
    assert [row["values.units"] for row in rows] == ["8", "16", "", ""]
    assert rows[1]["message"] == TRIALS[1].message
    assert rows[0]["metrics.gap"] == "inf"
    frame = pd.read_csv(tmp_path / "trials.csv")
    assert frame["metrics.val_loss"].tolist()[2:] == [0.2, 0.25]
    assert frame["metrics.gap"][0] == math.inf


def strict(text):
    """JSON without the numbers that it does not have."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def test_json_holds_everything(result, tmp_path):
    result.to_json(tmp_path / "result.json")
    held = strict((tmp_path / "result.json").read_text())
    assert Space.from_config(held["space"]) == SPACE
    assert (held["seed"], held["best"], held["objectives"]) == (7, 2, {"val_loss": "min"})
    again = [Trial(**{**entry, "values": ok.tuning.Values(entry["values"])}) for entry in held["trials"]]
    assert again[1].history == [{"epochs": [1], "metrics": {"val_loss": ["nan"]}}]
    assert math.isnan(float(again[1].history[0]["metrics"]["val_loss"][0]))
    assert [each for each in again if each.number != 1] == [each for each in TRIALS if each.number != 1]
    assert "units" not in again[2].values


@pytest.mark.parametrize("method", ["to_csv", "to_json", "report"])
def test_a_path_that_cannot_be_written_is_refused(result, tmp_path, method):
    write = getattr(result, method)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(IsADirectoryError, match=r"path must be that of a file, got the directory"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"path must be in a directory that exists, got .*; make '.*absent'"):
        write(tmp_path / "absent" / "x")
    with pytest.raises(NotADirectoryError, match="path must be in a directory that exists"):
        write(tmp_path / "file" / "x")
    with pytest.raises(TypeError, match=r"path must be a path, .* got 3 of type int"):
        write(3)
    with pytest.raises(ValueError, match="path must be a path, which is not empty"):
        write("")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_leaves_the_old_file(result, tmp_path):
    place = tmp_path / "result.json"
    result.to_json(place)
    before = place.read_bytes()
    result.trials[0].metrics["odd"] = object()
    try:
        with pytest.raises(TypeError):
            result.to_json(place)
    finally:
        result.trials[0].metrics.pop("odd")
    assert place.read_bytes() == before
    link = tmp_path / "link"
    link.symlink_to(place)
    result.to_csv(link)  # what it points to is written
    assert link.is_symlink()
    assert place.read_text().startswith("number,")


@pytest.mark.parametrize(
    ("package", "method", "message"),
    [
        ("pandas", "to_pandas", r"result\.to_pandas needs pandas: pip install pandas"),
        ("optuna", "importance", r'result\.importance needs optuna: pip install "keras-optkit\[search\]"'),
        ("sklearn", "importance", r'result\.importance needs sklearn: pip install "keras-optkit\[search\]"'),
        ("matplotlib", "plot", r"result\.plot needs matplotlib: pip install matplotlib"),
        ("matplotlib", "plot_history", r"result\.plot_history needs matplotlib: pip install matplotlib"),
    ],
)
def test_a_missing_package_is_named(result, monkeypatch, package, method, message):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        getattr(result, method)()


# Importance


def scored(space, score, number=60):
    rng = np.random.default_rng(0)
    points = [space.sample(rng) for _ in range(number)]
    return result_of([trial(i, point, score(point)) for i, point in enumerate(points)], space)


def test_importance_finds_the_order():
    space = Space(
        {
            "much": Float(1e-4, 1.0, log=True),  # linearly, nearly all of it would be between 0.1 and 1
            "little": Int(0, 10),
            "nothing": Choice(["a", "b", "c"]),
            "some": Choice(["a", "b", "c"]),
            "single": Choice([3]),
        }
    )
    effect = {"a": 0.0, "b": 1.0, "c": 2.0}
    result = scored(space, lambda hp: 1.5 * math.log10(hp.much) + effect[hp.some] + 0.08 * hp.little)
    found = result.importance()
    assert list(found)[:3] == ["much", "some", "little"]
    assert found["much"] > 0.5
    assert found["some"] > 0.05 > found["little"] > found["nothing"]
    assert found["single"] == 0.0
    assert sum(found.values()) <= 1
    assert result.importance("val_loss") == found  # the same numbers again
    result.trials += [failed(60 + i, {"much": 1e-4, "little": i, "nothing": "a"}, "no") for i in range(10)]
    assert result.importance() == found


def test_importance_of_a_conditional_hyperparameter():
    """It is that of the function that does not look at it where it is inactive, and takes nothing from its parent."""
    space = Space(
        kind=Choice(["on", "off"]),
        inner=Float(0.0, 1.0, when={"kind": "on"}),
        idle=Float(0.0, 1.0, when={"kind": "off"}),
        outer=Float(0.0, 1.0),
    )
    found = scored(space, lambda hp: 2 * hp.outer + 2 * hp.get("inner", 0.5) + 0.3 * (hp.kind == "on"), 70).importance()
    assert list(found)[:2] == ["outer", "inner"]
    assert found["outer"] > 2 * found["inner"]  # as large an effect, in half of the trials
    assert found["inner"] > 2 * found["kind"] > 4 * found["idle"]


def test_importance_needs_enough_trials_and_one_objective(result, several):
    with pytest.raises(
        ValueError, match=r"importance needs at least 10 completed trials, got 3 of 4\. Run more: .*max"
    ):
        result.importance()
    with pytest.raises(ValueError, match=r"objective must be one of 'val_loss', 'val_accuracy', got None"):
        several.importance()
    with pytest.raises(ValueError, match=r"objective must be one of 'val_loss', got 'val_los'\. Did you mean"):
        result.importance("val_los")
    assert scored(Space(x=Int(1, 9)), lambda _: 0.5, 10).importance() == {"x": 0.0}


def test_importance_is_of_the_objective_that_is_named():
    space = Space(x=Float(0.0, 1.0), y=Float(0.0, 1.0))
    rng = np.random.default_rng(0)
    points = [space.sample(rng) for _ in range(16)]
    trials = [trial(i, point, point.x, accuracy=point.y) for i, point in enumerate(points)]
    result = result_of(trials, space, {"val_loss": "min", "val_accuracy": "max"})
    assert next(iter(result.importance("val_loss"))) == "x"
    assert next(iter(result.importance("val_accuracy"))) == "y"
    figure = result.plot_importance()
    assert [axis.get_yticklabels()[-1].get_text() for axis in figure.axes] == ["x", "y"]


# Figures


def colored(axis, color):
    """The lines of a color."""
    wanted = matplotlib.colors.to_rgba(color)
    return [line for line in axis.lines if matplotlib.colors.to_rgba(line.get_color()) == wanted]


def test_history_shows_the_best_so_far(several):
    losses, accuracies = several.plot_history().axes
    assert colored(losses, BEST)[0].get_ydata().tolist() == [0.3, 0.2, 0.2]
    assert colored(accuracies, BEST)[0].get_ydata().tolist() == [0.9, 0.9, 0.9]
    assert colored(losses, FAILED)[0].get_xdata() == [1]
    assert len(several.plot_history("val_accuracy").axes) == 1


def test_slice_has_the_axes_of_the_space(result):
    rate, kind, units, momentum, *_, bar = result.plot_slice().axes
    assert (rate.get_xscale(), kind.get_xscale()) == ("log", "linear")
    assert [label.get_text() for label in kind.get_xticklabels()] == ["a", "b"]
    assert units.collections[0].get_offsets().tolist() == [[0.0, 0.3]]  # where it is active, of what was completed
    assert momentum.collections[1].get_offsets().tolist() == [[0.9, 0.2]]  # the ring around the best
    assert bar.get_ylabel() == "trial"
    assert len(result.plot_slice(["rate"]).axes) == 2
    with pytest.raises(ValueError, match=r"names must be one of 'rate', .* got 'rat'"):
        result.plot_slice(["rat"])
    with pytest.raises(TypeError, match="names must be a list of hyperparameters or None, got 'rate'"):
        result.plot_slice("rate")


def test_parallel_coordinates_are_as_even_as_the_space(result):
    (axis,) = result.plot_parallel_coordinates().axes
    best = max(colored(axis, BEST), key=lambda line: len(line.get_ydata())).get_ydata()
    inactive = min(best)
    assert best == pytest.approx([0.5, 1.0, inactive, best[3], 1.0, 0.0, 1.0, 0.0])
    assert inactive < 0
    assert 1 - best[3] == pytest.approx(math.log(0.59 / 0.5) / math.log(0.99 / 0.5))  # log="reverse", seen from 0.99
    (line,) = colored(axis, FAILED)
    assert len(line.get_ydata()) == len(SPACE)  # it has no score
    assert [label.get_text() for label in axis.get_xticklabels()][-1] == "val_loss"


def test_pareto_front(result, several):
    (axis,) = several.plot_pareto_front().axes
    (front,) = colored(axis, BEST)
    np.testing.assert_array_equal(front.get_xydata(), [[0.2, 0.8], [0.3, 0.9]])
    with pytest.raises(ValueError, match=r"needs a search with several objectives, got \['val_loss'\]"):
        result.plot_pareto_front()


def test_learning_curves_have_every_epoch(result):
    (axis,) = result.plot_learning_curves().axes
    np.testing.assert_array_equal(colored(axis, BEST)[0].get_xydata(), [[1, 1.2], [2, 0.2]])
    assert len(axis.lines) == 3  # the failed one has no finite value
    with pytest.raises(ValueError, match=r"metric must be one of 'val_loss', got 'loss'"):
        result.plot_learning_curves("loss")
    old = result_of([Trial(0, ok.tuning.Values(rate=0.1), 0.5, {"val_loss": 0.5})], SPACE)
    with pytest.raises(ValueError, match="needs the epochs of the trials, which this search has not kept"):
        old.plot_learning_curves()


def test_scores_far_apart_are_on_a_logarithmic_axis():
    space = Space(x=Int(1, 3))
    result = result_of([trial(i, {"x": i + 1}, score) for i, score in enumerate([0.01, 1.0, 1e4])], space)
    assert result.plot_history().axes[0].get_yscale() == "log"
    assert result.plot_slice().axes[0].get_yscale() == "log"


# The report


def test_report_is_one_file_with_everything(several, tmp_path):
    place = tmp_path / "report.html"
    several.space = Space({name: SPACE[name] for name in ("rate", "kind", NASTY)})  # of more, it takes seconds
    several.directory, several.model_path = tmp_path, tmp_path / "it's <b>.keras"
    several.model_path.write_bytes(b"")
    several.report(place, title=NASTY)
    text = place.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert text.count("<script>") == 1  # its own
    assert "<b>" not in text
    assert re.findall(r"<h2>(.*)</h2>", text) == [
        "Summary", "Best hyperparameters", "Best model", "Trials", "Failures", "History", "Importance",
        "Hyperparameters", "Parallel coordinates", "Pareto front", "Learning curves",
    ]  # fmt: skip
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/png;base64,iVBOR[^"]+">', text)) == 5
    assert "importance needs at least 10 completed trials, got 3 of 4." in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "load_model(&quot;" in text
    assert "4, of which 1 failed" in text
    assert re.search(r"<li>Trial 1: =NaN, &lt;script&gt;alert", text)
    assert f"directory=&#x27;{tmp_path}&#x27; and a larger max_trials=" in text
    assert keras.__version__ in text
    assert [path.name for path in tmp_path.iterdir() if "tmp" in path.name] == []
    with pytest.raises(TypeError, match="title must be a string, got 3 of type int"):
        several.report(place, title=3)


def test_report_says_how_to_load_weights_and_what_is_gone(tmp_path):
    from keras_optkit.tuning.report import _model, _summary

    result = result_of(TRIALS, SPACE, directory=tmp_path, model="model.weights.h5")
    assert "There is no file" in _model(result)
    result.model_path.write_bytes(b"")
    assert "load_weights(&#x27;" in _model(result)
    result.temporary = True
    assert "The file is deleted with the result" in _model(result)
    assert "The directory was a temporary one" in _summary(result)


# Learning curves of a search

ONES, ZEROS = np.ones((4, 1), "float32"), np.zeros((4, 1), "float32")


def build(hp):
    """Its val_loss is x, half of it after an epoch; it diverges at 9."""
    start = math.nan if hp.x == 9.0 else hp.x
    kernel = keras.initializers.Constant(start)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=kernel)])
    model.compile(keras.optimizers.SGD(0.25), "mse", run_eagerly=True)
    return model


def search(directory, space=None, **more):
    space = space or Space(x=Choice([2.0, 9.0, 4.0]))
    return ok.tuning.search(
        build, space, (ONES, ZEROS, ONES, ZEROS), objective="val_loss", epochs=2, strategy="grid", seed=0, verbose=0,
        directory=directory, fit_arguments={"validation_freq": 1}, **more,
    )  # fmt: skip


def test_learning_curves_are_kept_with_each_trial(tmp_path):
    first = search(tmp_path, max_trials=2)
    assert first.trials[0].history == [
        {"epochs": [1, 2], "metrics": {"loss": [4.0, 1.0], "val_loss": [1.0, 0.25]}}
    ]  # fmt: skip
    (stopped,) = first.trials[1].history
    assert stopped["epochs"] == [1]
    assert math.isnan(stopped["metrics"]["loss"][0])
    assert "multi_objective" not in stopped["metrics"]
    (tmp_path / "trial_1" / "history.json").unlink()  # as in a directory of a version that kept none
    result = search(tmp_path, max_trials=3)
    assert [len(each.history) for each in result.trials] == [1, 0, 1]
    assert result.trials[0].history == first.trials[0].history
    assert result.trials[2].history[0]["metrics"]["val_loss"] == [4.0, 1.0]
    book = tmp_path / "trial_0" / "history.json"
    book.write_bytes(book.read_bytes().replace(b"0.25", b"0.21"))
    with pytest.raises(RuntimeError, match=r"'.*trial_0/history\.json' is damaged: "):
        search(tmp_path, max_trials=3)


def test_another_search_is_refused_by_what_differs():
    from keras_optkit.tuning.books import OtherSearchError, differences

    old = Space(x=Float(1e-4, 1e-1, log=True), y=Int(1, 2), z=Bool(), constraints=["y < 2"])
    new = Space(x=Float(1e-3, 1e-1, log=True), y=Int(1, 2), w=Bool(), constraints=["y < 3"])
    found = differences(
        {"space": old.get_config(), "seed": 0, "fit_arguments": {"a": 1, "b": 2}},
        {"space": new.get_config(), "seed": 1, "fit_arguments": {"a": 1, "b": 3}},
    )
    assert found == [
        "space has the new 'w'",
        "space has no 'z' any more",
        "space['x'] was Float(low=0.0001, high=0.1, log=True) and is Float(low=0.001, high=0.1, log=True)",
        "space['constraints'] was ['y < 2'] and is ['y < 3']",
        "seed was 0 and is 1",
        "fit_arguments['b'] was 2 and is 3",
    ]
    one, other = Space(x=Bool(), y=Bool()).get_config(), Space(y=Bool(), x=Bool()).get_config()
    assert differences({"space": one}, {"space": other}) == ["the order of space was x, y and is y, x"]
    assert differences({"space": one}, {"space": one}) == []
    assert str(OtherSearchError("/d", "where seed was 0 and is 1")) == (
        "directory must be new or hold the same search, got '/d', where seed was 0 and is 1. Choose another directory, "
        "or pass overwrite=True to start over."
    )


def test_a_file_that_is_replaced_keeps_its_permissions(result, tmp_path):
    path = tmp_path / "trials.csv"
    path.touch(0o600)
    result.to_csv(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_completed_trial_there_is_no_best(tmp_path):
    nothing = result_of([failed(0, {"x": 1.0}, "loss is nan")], Space(x=Float(0, 1)))
    for ask in (lambda: nothing.best_trial, lambda: nothing.best, lambda: nothing.report(tmp_path / "report.html")):
        with pytest.raises(ValueError, match="no best trial: of 1 trials none was completed"):
            ask()
    assert not list(tmp_path.iterdir())


def test_names_in_a_plot_are_no_mathematics(tmp_path):
    figure = result_of([trial(0, {r"$\frac$": 0.5}, 0.1)], Space({r"$\frac$": Float(0, 1)})).plot()
    figure.savefig(tmp_path / "plot.png")
    assert figure.axes[1].get_xlabel() == r"\$\\frac\$"
    matplotlib.pyplot.close(figure)


def test_ends_of_a_range_are_told_apart_and_whole_numbers_are_written_out():
    space = Space(beta=Float(0.99, 0.9999), steps=Int(1000, 4000), seed=Int(0, 2**31 - 1), width=Int(8, 32, log=True))
    values = {"beta": 0.995, "steps": 2000, "seed": 3, "width": 16}
    found = result_of([trial(0, values, 0.1), trial(1, values, 0.2)], space)
    (axis,) = found.plot_parallel_coordinates().axes
    texts = [text.get_text() for text in axis.texts]
    assert {"0.99", "0.9999", "1000", "2500", "4000", "2147483647", "8", "16", "32"} <= set(texts)
    assert [tick.get_text() for tick in found.plot_slice(["width"]).axes[0].get_xticklabels()] == [
        "8",
        "13",
        "20",
        "32",
    ]

"""The benchmarks measure what they say, e.g. the same update everywhere. How long it takes is not tested."""

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_optkit as ok

LABELS = ["keras, graph", "keras, XLA", "ours, graph", "ours, XLA", "torch, fused"]


@pytest.fixture
def script(monkeypatch, request):
    """Imports a script as Python finds it when it is run."""
    monkeypatch.syspath_prepend(request.config.rootpath / "examples" / "benchmarks")
    return importlib.import_module


@pytest.fixture
def bench(script):
    """The benchmark of optimizers."""
    return script("optimizer_step")


def tables(printed):
    """The cells of the Markdown tables below their headings, by title."""
    found = re.findall(r"^([^|\n]+):\n\n\|.*\n\| ---.*\n((?:\|.*\n)+)", printed, re.MULTILINE)
    return {title: [row.strip("| ").split(" | ") for row in rows.splitlines()] for title, rows in found}


@pytest.mark.long
def test_updates_of_one_set(bench, capsys):
    bench.main(["--sets", "mlp", "--repeats", "2", "--sample-seconds", "0.01", "--markdown"])
    printed, progress = capsys.readouterr()
    assert "mlp: round 2 of 2" in progress
    times, means, weights, traces = tables(printed).values()
    assert [row[:2] for row in times] == [["mlp", label] for label in [*LABELS, "(empty function)"]]
    assert times[0][4] == "1.00 [1.00, 1.00]"
    assert [row[0] for row in means] == LABELS
    assert [row[1] for row in weights] == ["ours - keras", "ours - float64", "keras - float64"]
    assert all(0 < float(row[2]) < 1e-6 for row in weights)
    assert f"ours and Keras's: {weights[0][2]} of the weights, below 1e-06" in printed
    assert [row[1] for row in traces] == LABELS[:4]
    assert all(float(cell) > 0 for row in traces for cell in row[2:])


@pytest.mark.long
def test_choice_of_alternatives_and_tables_on_a_terminal(bench, capsys):
    choice = ["--sets", "mlp", "--alternatives", "ours-graph", "--repeats", "1", "--sample-seconds", "0.001"]
    bench.main(choice)
    printed = capsys.readouterr().out
    assert re.search(r"│ mlp │ ours, graph +│ +[\d.-]+ │ +[\d.]+ │ +- │", printed)  # nothing to take a ratio to
    assert "keras, graph" not in printed
    bench.main([*choice, "--trace"])
    printed = capsys.readouterr().out
    assert re.search(r"│ mlp │ ours, graph │ +[\d.]+ │ +[\d.]+ │ +[\d.]+ │ +- │", printed)
    assert "One update" not in printed


@pytest.mark.parametrize("wrong", ["keras", "ours"])
def test_a_wrong_update_is_seen_and_attributed(bench, monkeypatch, wrong):
    correct = bench.new_optimizer

    def planted(kind):
        optimizer = correct(kind)
        if kind == wrong:
            optimizer.learning_rate = 1.001 * bench.LEARNING_RATE
        return optimizer

    monkeypatch.setattr(bench, "new_optimizer", planted)
    found = {pair: max(difference) for pair, difference in bench.differences([(30, 20), (20,)]).items()}
    right = ({"keras", "ours"} - {wrong}).pop()
    assert found["ours - keras"] > 5e-4
    assert found[f"{wrong} - float64"] > 5e-4
    assert found[f"{right} - float64"] < 5e-5


def test_timing_reports_net_and_ratio_of_each_round(bench, monkeypatch):
    """With a clock that advances by fixed amounts: 2 for passing the gradients, 10 and 6 for the updates."""
    now = [0.0]

    def taking(seconds):
        return lambda *_: now.__setitem__(0, now[0] + seconds)

    def timeit(call, number):
        start = now[0]
        for _ in range(number):
            call()
        return now[0] - start

    monkeypatch.setattr(bench.timeit, "timeit", timeit)
    monkeypatch.setattr(bench.timeit, "repeat", lambda call, number, repeat: [timeit(call, number)] * repeat)
    monkeypatch.setattr(bench, "trace", lambda *_: taking(2.0))
    cost = bench.Cost(1, 2, 3)
    seconds = {"keras-graph": 10.0, "ours-graph": 6.0}
    monkeypatch.setattr(bench, "prepare", lambda name, *_: bench.Update(taking(seconds[name]), cost))
    monkeypatch.setattr(bench, "prepare_torch", lambda _: taking(4.0))
    timings, costs = bench.time_set("x", [(1,)], [*seconds, "torch"], 3, 20.0)
    assert timings["keras-graph"] == (10, 8, [1, 1, 1])
    assert timings["ours-graph"] == (6, 4, [0.5, 0.5, 0.5])
    assert timings["torch"] == (4, 4, [0.5, 0.5, 0.5])  # nothing is subtracted from torch
    assert timings["empty"].gross == 2
    assert costs == dict.fromkeys(seconds, cost)


@pytest.mark.long
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the kernel's account in /proc")
def test_memory_and_fit(bench, capsys):
    bench.main(["--sets", "mlp", "--memory", "--fit", "--repeats", "1", "--markdown"])
    memory, fit = tables(capsys.readouterr().out).values()
    assert [row[:2] for row in memory] == [["mlp", "keras, graph"], ["mlp", "ours, graph"]]
    assert all(0 < float(row[2]) <= float(row[3]) for row in memory)
    assert [row[0] for row in fit] == ["keras, Adam", "ours, Adam"]
    assert all(float(row[1]) > 0 for row in fit)


def test_sets_have_the_sizes_of_their_models(bench):
    shapes = {name: bench.SETS[name]() for name in bench.SETS}
    sizes = {name: sum(map(math.prod, of_set)) for name, of_set in shapes.items()}
    assert sizes == {
        "mlp": 669_706,
        "small": 1_000_000,
        "mobilenetv2": 3_504_872,
        "resnet50": 25_583_592,
        "bert": 109_482_240,
        "large": 25_000_000,
    }
    assert len(shapes["bert"]) == 199


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--sets", "mlp,mpl"], "unknown 'mpl'; allowed: mlp, small, mobilenetv2, resnet50, bert, large"),
        (["--alternatives", "ours"], "unknown 'ours'; allowed: keras-graph, keras-xla, ours-graph, ours-xla, torch"),
        (["--repeats", "0"], "must be a whole number above 0, got '0'"),
        (["--sample-seconds", "nan"], "must be a number above 0, got 'nan'"),
    ],
)
def test_wrong_arguments_are_refused_with_what_is_allowed(bench, capsys, arguments, complaint):
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err.replace("\n", " ")


def test_numbers_keep_three_digits(bench):
    assert [bench.number(x) for x in (0.00123456, 1.5, 12.345, 1234.5)] == ["0.00123", "1.50", "12.3", "1,234"]
    assert bench.spread([]) == "-"
    assert bench.spread([1.0, 2.0, 3.0]) == "2.00 [1.50, 2.50]"
    assert bench.geometric_mean([0.5, 2.0]) == "1.00"
    assert bench.geometric_mean([0.5, -0.1]) == "-"  # the empty function took longer: noise


# The benchmarks of callbacks


def tiny():
    return keras.Sequential([keras.Input((32, 32, 3)), keras.layers.Flatten(), keras.layers.Dense(10, "relu")])


def test_cost_of_the_guard(script, monkeypatch, capsys):
    guard = script("guard_overhead")
    monkeypatch.setitem(guard.MODELS, "tiny", (tiny, 2))
    for other in ("every batch", "guard"):
        monkeypatch.delitem(guard.ALTERNATIVES, other)
    guard.main(["--models", "tiny", "--steps", "2", "--rounds", "1"])
    ours, *_ = re.findall(r"│ +tiny │ +[\d.]+ \(1\.00\) │ +[\d.]+ \(([\d.]+)\) │ +([\d.]+) │", capsys.readouterr().out)
    assert all(float(cell) > 0 for cell in ours)


def test_cost_of_a_second_gradient(script, monkeypatch, capsys):
    sharpness = script("sharpness_aware")
    monkeypatch.setitem(sharpness.MODELS, "tiny", (tiny, 2))
    for other in ("adaptive", "GSAM(AdamW)", "SAM(AdamW)", "AdaHessian"):
        monkeypatch.delitem(sharpness.ALTERNATIVES, other)
    sharpness.main(["--models", "tiny", "--steps", "2", "--rounds", "1"])
    ((time, ratio),) = re.findall(r"│ +tiny │ +[\d.]+ \(1\.00\) │ +([\d.]+) \(([\d.]+)\) │", capsys.readouterr().out)
    assert float(time) > 0
    assert float(ratio) > 0


def test_cost_of_resume(script, capsys):
    script("resume_overhead").main(
        ["--width", "4", "--batch-size", "2", "--every", "2", "--blocks", "2", "--rounds", "1"]
    )
    printed = capsys.readouterr().out
    assert "350 parameters, bundles of 0 MB every 2 steps" in printed
    times = re.findall(r"│ +(without|with Resume) │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", printed)
    assert [name for name, *_ in times] == ["without", "with Resume"]
    assert all(0 < float(low) <= float(middle) <= float(high) for _, middle, low, high in times)
    assert re.search(r"With bundles a step takes [+-][\d.]+ %\.", printed)


def test_cost_of_the_monitor(script, monkeypatch, capsys):
    monitor = script("monitor_overhead")
    kept, of_all = ("plain", "monitor"), monitor.alternatives
    monkeypatch.setattr(monitor, "network", lambda size: tiny())  # noqa: ARG005
    monkeypatch.setattr(monitor, "alternatives", lambda *given: {name: of_all(*given)[name] for name in kept})
    monitor.main(["--size", "32", "--batch", "2", "--every", "2", "--rounds", "1"])
    rows = re.findall(r"│ (\S.*?) +│ +-?[\d.]+ │ +([\d.]+) │ +([\d.]+) │ +([\d.]+) │", capsys.readouterr().out)
    assert [name for name, *_ in rows] == list(kept)
    assert rows[0][2:] == ("1.000", "1.000")
    assert all(float(cell) > 0 for _, *cells in rows for cell in cells)


def test_structured_optimizers_have_the_state_that_the_table_says(script, capsys):
    small = ["--width", "8", "--layers", "1", "--repeats", "1", "--sample-seconds", "0.01"]
    script("structured_optimizers").main([*small, "--only", "LAMB", "Adafactor"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    state = {row[0]: float(row[4]) for row in rows[1:]}
    assert state["AdamW"] == pytest.approx(state["LAMB"], rel=0.01)
    assert state["LAMB"] > 8 > 2 > state["Adafactor"]
    assert rows[1][2] == "1.00"


@pytest.mark.long
def test_bytes_of_state_on_a_device(request):
    """In a process, since the number of devices is set before JAX starts."""
    root = request.config.rootpath
    done = subprocess.run(
        [sys.executable, str(root / "examples" / "benchmarks" / "state_sharding.py"), "--width", "8", "--steps", "1"],
        env=os.environ | {"KERAS_BACKEND": "jax", "COLUMNS": "120", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"│ +(\w[\w ]+?) │ +(\w[\w ,]*?) │ +([\d,]+) │ +([\d,]+) │", done.stdout)
    state = {(where, which): int(size.replace(",", "")) for where, which, _, size in rows}
    assert len(state) == 8
    for where in ("DataParallel", "ModelParallel"):
        assert state[where, "ours"] == state[where, "keras"]
    assert 7 < state["DataParallel", "ours"] / state["DataParallel", "ours, shard_state"] <= 8


@pytest.fixture
def contest(script, monkeypatch, tmp_path):
    """The benchmark that trains, with one tiny task for two optimizers, and where it records."""
    module = script("optimizers")
    x = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    y = x.sum(axis=1, keepdims=True)
    task = module.Task(lambda: module.Data(x, y, x, y), linear, "mse", batch_size=16, steps=8, every=2, target=0.5)
    monkeypatch.setattr(module, "TASKS", {"tiny": task})
    monkeypatch.setattr(module, "SEEDS", (5,))
    path = tmp_path / "runs.jsonl"
    arguments = ["--optimizers", "AdamW,Prodigy", "--tasks", "tiny", "--trials", "2", "--runs", str(path)]
    return module, path, arguments


def linear():
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])


@pytest.mark.long
def test_recording_goes_on_where_it_was_stopped(contest, capsys):
    module, path, arguments = contest
    arguments = [*arguments, "--optimizers", "AdamW"]
    module.main(["record", *arguments])
    lines = path.read_text().splitlines(keepends=True)
    runs = [json.loads(line) for line in lines]
    assert [(run.get("trial"), run["seed"]) for run in runs] == [(0, 0), (1, 0), (None, 5)]
    assert "0 runs are left." in capsys.readouterr().err
    path.write_text("".join(lines[:1]) + lines[1][:40])  # killed while it wrote
    module.main(["record", *arguments])
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [run | {"seconds": 0} for run in again] == [run | {"seconds": 0} for run in runs]


def test_settings_are_those_that_were_recorded(contest):
    module, _, _ = contest
    first, second = module.settings({}, "AdamW", 2)
    rates = sorted([first["learning_rate"], second["learning_rate"]])
    assert rates[0] < 1e-3 < rates[1]
    known = {"": {"optimizer": "AdamW", "trial": 1, "setting": {"learning_rate": 0.5}}}
    assert module.settings(known, "AdamW", 2) == [first, {"learning_rate": 0.5}]


def test_report_of_recorded_runs(contest, capsys, tmp_path):
    module, path, arguments = contest
    given = argparse.Namespace(optimizers=["AdamW", "Prodigy"], tasks=["tiny"], trials=2)
    for _ in ("trials", "fresh seeds"):
        for run in module.pending(module.read(path), given):
            module.append(path, {**run, "updates": 2 if run["optimizer"] == "AdamW" else 4, "losses": [1.0]})
    times, picture = tmp_path / "times.json", tmp_path / "picture.png"
    times.write_text(json.dumps({"tiny": {"AdamW": 0.5, "Prodigy": 0.75}}))
    module.main(["report", *arguments, "--times", str(times), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert printed.count("| `AdamW` | 2 (2 to 2) | 1.00 | 1.00 |") == 2
    assert printed.count("| `Prodigy` | 4 (4 to 4) | 2.00 | 3.00 |") == 2
    assert picture.stat().st_size > 5000


def test_report_of_a_recording_that_is_not_complete(contest):
    module, path, arguments = contest
    path.write_text("")
    with pytest.raises(ValueError, match="is not complete: record first"):
        module.main(["report", *arguments])


# The benchmark of searches


@pytest.fixture(scope="module")
def replay(request):
    """Searches replayed on a table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "examples" / "benchmarks")
        yield importlib.import_module("search_replay")


def curves_of(replay, count=40):
    """A table whose best point is near the middle of its range, and whose order after one epoch is the last one."""
    points = [{"rate": float(rate), "units": 8, "kind": "ab"[i % 2]} for i, rate in enumerate(np.linspace(1, 9, count))]
    space = ok.tuning.Space(
        rate=ok.tuning.Float(1, 9), units=ok.tuning.Choice([8, 16]), kind=ok.tuning.Choice(["a", "b"])
    )
    last = np.array([1 - abs(point["rate"] - 4.6) / 10 for point in points])
    return replay.Table(space, points, last[:, None] * (1 - 0.5 ** np.arange(1, 10)))


METHODS = {
    "KerasTuner RandomSearch": "once",
    "KerasTuner BayesianOptimization": "long",
    "KerasTuner Hyperband": "once",
    "Optuna": "long",
    "ASHA": "once",
    "PASHA": "once",
    "Hyperband": "once",
    "TPE, ASHA": "once",
    "TPE, PASHA": "long",
}


def test_all_methods_are_replayed_here(replay):
    assert list(METHODS) == list(replay.METHODS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=getattr(pytest.mark, mark)) for n, mark in METHODS.items()])
def test_a_replayed_search(replay, name):
    """No epoch of a row is trained twice or left out, and the budget is kept."""
    table = curves_of(replay)
    parts = replay.replayed(name, table, 0, 90)
    trained = dict.fromkeys(range(len(table)), 0)
    for row, begin, end in parts:
        assert trained[row] == begin < end <= table.epochs
        trained[row] = end
    assert sum(trained.values()) < 90 + table.epochs
    assert sum(trained.values()) >= 90 or min(trained.values()) > 0  # PASHA: all were tried
    assert max(trained.values()) == table.epochs
    assert parts == replay.replayed(name, table, 0, 90)
    assert parts != replay.replayed(name, table, 1, 90)
    if len(set(trained.values())) > 2:  # those that are promoted are better
        half, most = (np.mean([table.best[i, -1] for i, n in trained.items() if n == e]) for e in (1, table.epochs))
        assert name == "KerasTuner Hyperband" or most > half


def test_rows_next_to_a_proposal(replay):
    table = curves_of(replay, 5)  # rates 1, 3, 5, 7, 9
    assert table.nearest({"rate": 4.9, "units": 8, "kind": "a"}, []) == 2
    assert table.nearest({"rate": 4.9, "units": 8, "kind": "a"}, [2]) == 0  # 0.49 away; a row of kind b is 1 away
    assert table.nearest({"rate": 4.9, "units": 8, "kind": "b"}, [3]) == 1
    assert table.nearest({"rate": 4.9, "units": 8, "kind": "b"}, range(5)) is None


def test_epochs_until_a_score(replay, script):
    scores = np.array([[0.1, 0.3, 0.2], [0.2, 0.1, 0.4], [0.1, 0.1, 0.2]])
    table = replay.Table(ok.tuning.Space(x=ok.tuning.Int(1, 3)), [{"x": 1}, {"x": 2}, {"x": 3}], scores)
    parts = [(0, 0, 1), (1, 0, 3), (0, 1, 3)]
    assert [replay.epochs_to(table, parts, target, 6) for target in (0.1, 0.2, 0.3, 0.4, 0.5)] == [1, 2, 4, 4, math.inf]
    assert replay.epochs_to(table, parts, 0.4, 3) == math.inf
    assert [replay.best_of(table, parts, budget) for budget in (1, 3, 4)] == [0.1, 0.2, 0.4]
    assert script("search").target_of(table, 1, 0.05) == pytest.approx(0.25)  # of 0.2, 0.3, 0.4
    assert script("search").target_of(table, 3, 0.0) == 0.4


@pytest.mark.only_on("tensorflow", because="an epoch is a tf.function")
def test_points_are_recorded_again_to_the_same_curves(script, tmp_path):
    search, table, task = script("search"), script("search_table"), script("search_task")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(search, "EPOCHS", 2)
        patch.setattr(task, "one_core", lambda: None)
        paths = {name: tmp_path / name for name in ("whole", "parts")}
        for name, path in paths.items():
            arguments = ["record", "--points", "2", "--table", f"{path}.npz", "--lines", f"{path}.jsonl"]
            search.main(arguments)
            if name == "parts":
                lines = path.with_suffix(".jsonl").read_text().splitlines(keepends=True)
                path.with_suffix(".jsonl").write_text(lines[0] + lines[1][:30])  # killed while it wrote
                search.main(arguments)
                held = table.read(path.with_suffix(".npz"))
                path.with_suffix(".jsonl").unlink()
                search.main(arguments)  # resumes from the table
                assert not path.with_suffix(".jsonl").exists()
                np.testing.assert_array_equal(table.read(path.with_suffix(".npz"))[1], held[1])
    whole, parts = (table.read(path.with_suffix(".npz")) for path in paths.values())
    assert whole[0] == parts[0] == list(table.points_of(2))
    np.testing.assert_array_equal(whole[1], parts[1])
    assert whole[1].shape == (2, 27)
    assert (whole[1][:, :2] > 0).all()

"""The examples do what they say: run as a newcomer runs them, on less work."""

import gzip
import importlib
import re
import struct

import keras
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.util.tensor_util import make_ndarray

import keras_optkit as ok

ROWS = ("base", "+ initialisation", "+ optimizer", "+ regularisation and augmentation", "+ early stopping, schedule")


@pytest.fixture
def example(monkeypatch, request, tmp_path):
    """Imports an example as `python examples/NAME.py` finds its neighbours, in an empty working directory."""
    monkeypatch.syspath_prepend(request.config.rootpath / "examples")
    monkeypatch.chdir(tmp_path)
    return importlib.import_module


def accuracies(printed):
    """The numbers of the table, by row."""
    found = {row: re.search(rf"│ {re.escape(row)}.*?│ +(\d+\.\d\d)", printed) for row in ROWS}
    return {row: float(match[1]) for row, match in found.items()}


def scalars(directory, tag):
    """The values that one training wrote to TensorBoard under a tag."""
    events = EventAccumulator(str(directory), size_guidance={"tensors": 0})
    events.Reload()
    return [float(make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]


# -- what the examples share ------------------------------------------------------------------------------------------


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def test_every_row_trains_the_same_five_layers(example):
    cnn = example("five_layer_cnn")
    shapes = []
    for row in cnn.Row:
        model = cnn.build(cnn.DIGITS, row, steps=10)
        kernels = [layer.kernel.shape for layer in layers_of(model, keras.layers.Conv2D | keras.layers.Dense)]
        shapes.append([tuple(shape) for shape in kernels])
    assert shapes[0] == [(3, 3, 1, 32), (3, 3, 32, 64), (3, 3, 64, 64), (1024, 256), (256, 10)]
    assert all(row == shapes[0] for row in shapes)


def test_each_row_adds_its_technique_and_keeps_those_before(example):
    cnn = example("five_layer_cnn")
    models = {row: cnn.build(cnn.DIGITS, row, steps=10) for row in cnn.Row}
    for row, model in models.items():
        conv, dense = layers_of(model, keras.layers.Conv2D)[1], layers_of(model, keras.layers.Dense)
        initialised = row >= cnn.Row.INITIALISATION
        expected = {conv: np.sqrt(2 / (9 * 32)), dense[0]: np.sqrt(2 / (1024 + 256))}
        for layer, std in expected.items():
            assert np.std(layer.kernel) == pytest.approx(std if initialised else 0.05, rel=0.03)
        assert type(model.optimizer).__name__ == ("Adam" if row >= cnn.Row.OPTIMIZER else "SGD")
        regularised = row >= cnn.Row.REGULARISATION
        assert len(layers_of(model, keras.layers.BatchNormalization)) == (3 if regularised else 0)
        assert [layer.rate for layer in layers_of(model, keras.layers.Dropout)] == ([0.5] if regularised else [])
        assert len(model.losses) == (5 if regularised else 0)
        rates = []
        for step in (0, 3, 9):
            model.optimizer.iterations.assign(step)
            rates.append(float(keras.ops.convert_to_tensor(model.optimizer.learning_rate)))
        if row == cnn.Row.SCHEDULE:
            assert rates[2] < rates[0] < rates[1] <= cnn.DIGITS.peak_rate
        else:
            assert rates == pytest.approx([0.001 if row >= cnn.Row.OPTIMIZER else 0.01] * 3)


def test_penalty_is_l2_of_the_five_kernels(example):
    cnn = example("five_layer_cnn")
    model = cnn.build(cnn.DIGITS, cnn.Row.REGULARISATION, steps=10)
    kernels = [np.asarray(layer.kernel, "f8") for layer in layers_of(model, keras.layers.Conv2D | keras.layers.Dense)]
    assert float(sum(model.losses)) == pytest.approx(cnn.DIGITS.l2 * sum((k**2).sum() for k in kernels), rel=1e-5)


def test_digits_are_split_without_overlap_and_stratified(example):
    cnn = example("five_layer_cnn")
    data = cnn.digits(seed=3)
    assert [len(x) for x, _ in data] == [1221, 216, 360]
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    ours = np.concatenate([np.c_[x.reshape(len(x), -1) * 16, y.argmax(-1)] for x, y in data])
    theirs = np.c_[pixels, labels]
    assert np.array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])  # every image once
    for _, y in data:
        assert y.mean(0) == pytest.approx(np.bincount(labels) / len(labels), abs=0.01)
    assert data.train[0].max() == 1
    assert not np.array_equal(data.test[0], cnn.digits(seed=4).test[0])


def test_table_shows_mean_and_sample_deviation(example):
    from rich.console import Console

    cnn = example("five_layer_cnn")
    runs = [cnn.Result(row, a, s, [0.1, 0.2]) for row in cnn.Row for a, s in ((0.90, 1.0), (0.92, 4.0))]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(cnn.table(runs, "title"))
    assert captured.get().count("91.00 ± 1.41 │     2.5 │      2 │") == 5  # std of 90, 92 is sqrt(2)


@pytest.mark.long
def test_early_stopping_ends_a_run(example, tmp_path):
    cnn = example("five_layer_cnn")
    # At a rate of 10 the network does not learn, so that the first epoch after the warm-up is the best for long.
    recipe = cnn.dataclasses.replace(cnn.DIGITS, peak_rate=10.0, epochs=12, widths=(4, 4, 4), units=8)
    data = cnn.digits(0)
    small = cnn.Data(*((x[:96], y[:96]) for x, y in data))
    ticks = []
    result = cnn.train(recipe, cnn.Row.SCHEDULE, small, 0, tmp_path, lambda: ticks.append(1))
    assert len(ticks) == len(result.curve) < 12
    assert 0 <= result.accuracy <= 1


# -- the examples -----------------------------------------------------------------------------------------------------


def test_quickstart(example, tmp_path, capsys):
    example("quickstart").main(["--quick"])
    printed = capsys.readouterr().out
    found = accuracies(printed)
    assert found["+ optimizer"] > 80  # in one epoch
    assert found["+ optimizer"] > found["base"]
    assert all(0 <= accuracy <= 100 for accuracy in found.values())
    for strategy in ("random", "grid"):
        assert f"A {strategy} search" in printed
    assert "tensorboard --logdir runs/quickstart" in printed

    logs = tmp_path / "runs" / "quickstart"
    picture = (logs / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (960, 600)
    runs = sorted(logs.glob("[0-9]-*/seed-0"))
    assert len(runs) == len(ROWS)
    for run in runs:
        curve = scalars(run, "epoch/val_accuracy")
        assert len(curve) == 1
        assert all(0 <= value <= 1 for value in curve)
        assert len(scalars(run, "train/gradient_norm")) == 7  # of 39 updates: 1, 2, 4, 8 and every 10th
    searched = {
        strategy: [session_hparams(trial) for trial in sorted((logs / f"search-{strategy}").glob("trial_*"))]
        for strategy in ("random", "grid")
    }
    for trials in searched.values():
        assert len(trials) == 2
        assert trials[0] != trials[1]
        assert all(set(trial) == {"learning_rate", "batch_size", "width"} for trial in trials)


def session_hparams(directory):
    """The hyperparameters of one trial, as TensorBoard's HParams table reads them."""
    events = EventAccumulator(str(directory))
    events.Reload()
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    return {name: value.number_value for name, value in start.hparams.items()}


@pytest.mark.long
def test_quickstart_again_replaces_its_logs(example, tmp_path):
    cnn = example("five_layer_cnn")
    recipe = cnn.dataclasses.replace(cnn.DIGITS, epochs=1, widths=(4, 4, 4), units=8)
    for _ in range(2):
        cnn.train(recipe, cnn.Row.BASE, cnn.digits(0), 0, tmp_path, lambda: None)
    assert len(scalars(tmp_path / "0-base" / "seed-0", "epoch/val_accuracy")) == 1


@pytest.mark.long
def test_learning_rate_transfer(example, tmp_path, capsys):
    figure = tmp_path / "transfer.png"
    command = ["--widths", "8", "16", "--powers", "-8", "-6", "--epochs", "1", "--figure", str(figure)]
    example("learning_rate_transfer").main(command)
    tables = capsys.readouterr().out.split("with muP")
    assert figure.read_bytes().startswith(b"\x89PNG")
    for table in tables:
        assert re.findall(r"2\^-\d+", table.splitlines()[1]) == ["2^-8", "2^-7", "2^-6"]
    narrow, wide = (re.findall(r"^ +(?:8|16) (.*)$", table, re.MULTILINE) for table in tables)
    assert narrow[0] == wide[0]  # at the base width nothing is changed
    assert narrow[1] != wide[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["batch-norm", "deep-relu", "dead-relus", "deep-linear", "overfitting", "large-batch"])
def test_experiments(example, name, tmp_path, capsys, monkeypatch):
    """On little data, for an epoch."""
    module, figure = example("experiments"), tmp_path / "figure.png"
    monkeypatch.setattr(module, "digits", few_digits)
    monkeypatch.setattr(module.Runs, "fit", short(module.Runs.fit))
    with pytest.raises(SystemExit):
        module.main([name, "--seeds", "0"])
    assert "--seeds must be at least 1, got 0." in capsys.readouterr().err
    module.main([name, "--seeds", "1", "--figure", str(figure)])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == {"deep-relu": 4, "dead-relus": 8, "overfitting": 5, "batch-norm": 2}.get(name, 6)
    assert figure.read_bytes().startswith(b"\x89PNG")


def few_digits(*_):
    """Images and labels for training and for testing."""
    images = np.random.default_rng(0).normal(size=(64, 64)).astype("float32")
    return images, np.arange(64) % 10, images[:32], np.arange(32) % 10


def short(fit):
    """A `Runs.fit` of one epoch."""
    return lambda runs, *args, **given: fit(runs, *args, **given | {"epochs": 1})


def test_runs_of_an_experiment_begin_with_the_weights_and_the_state_of_their_seed(example):
    module = example("experiments")
    runs = module.Runs(lambda: module.classifier(keras.layers.Dense(4)), keras.optimizers.SGD(0.1, 0.9))
    x, y = np.ones((8, 64), "float32"), np.arange(8)
    first, other, again = (runs.fit(seed, 0.1, x, y, epochs=2)["loss"] for seed in (0, 1, 0))
    assert first == again != other


@pytest.mark.long
def test_custom_loop(example, capsys):
    example("custom_loop").main(["--epochs", "2"])
    printed = capsys.readouterr().out
    rows = [re.findall(r"[\d.]+(?:e[+-]\d+)?", line.split("│", 2)[2]) for line in printed.splitlines() if "%" in line]
    assert len(rows) == 3
    for accuracy, first, last, difference, _ in rows:
        assert float(accuracy) > 80
        assert float(last) < float(first) / 2
        assert float(difference) < 1e-3
    assert len({first for _, first, *_ in rows}) == 1
    assert float(rows[1][3]) != 0 or float(rows[2][3]) != 0  # three runs, not one shown three times


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seeds", "-1"], ["--epochs", "1.5"]])
def test_counts_must_be_positive(example, capsys, arguments):
    with pytest.raises(SystemExit):
        example("quickstart").main(arguments)
    assert f"must be a whole number above 0, got '{arguments[1]}'" in capsys.readouterr().err


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A directory like Fashion-MNIST's with a few made-up images: class k is bright in its k-th pair of rows."""
    directory = tmp_path / "fashion"
    directory.mkdir()
    rng = np.random.default_rng(0)
    for part, size in (("train", 600), ("t10k", 100)):
        labels = np.arange(size, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (size, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[4 + 2 * label : 6 + 2 * label] += 180
        (directory / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (directory / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return directory


@pytest.mark.long  # the quickstart trains the same rows
def test_fashion_mnist(example, fashion, tmp_path, capsys):
    example("fashion_mnist").main(["--data", str(fashion), "--epochs", "2"])
    printed = capsys.readouterr().out
    assert "550 for train, 50 for validation, 100 for test." in printed
    assert int(re.search(r"([\d,]+) parameters", printed)[1].replace(",", "")) < 1_000_000
    found = accuracies(printed)
    assert found["+ optimizer"] > 50
    assert (tmp_path / "runs" / "fashion_mnist" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_fashion_mnist_reads_the_numbers_as_they_are(example, fashion):
    images, labels = example("fashion_mnist").load(fashion, "test")
    assert images.shape == (100, 28, 28, 1)
    assert images.dtype == np.float32
    raw = gzip.decompress((fashion / "t10k-images-idx3-ubyte.gz").read_bytes())
    assert images[3, 20, 5, 0] == np.float32(raw[16 + 3 * 784 + 20 * 28 + 5]) / np.float32(255)
    assert labels[:12].tolist() == [*range(10), 0, 1]


WHOLE = idx(np.zeros((600, 28, 28), np.uint8))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"train-images-idx3-ubyte.gz does not exist.*dataset-fashion-mnist"),
        (b"<html>not found</html>", "train-images-idx3-ubyte.gz is not a whole gzip file"),
        (gzip.compress(WHOLE)[:-200], "is not a whole gzip file"),
        (gzip.compress(WHOLE)[:100] + bytes([255] * 20) + gzip.compress(WHOLE)[120:], "is not a whole gzip file"),
        (gzip.compress(b""), "is not an IDX file of bytes"),
        (gzip.compress(b"\0\0\x0d" + WHOLE[3:]), "is not an IDX file of bytes"),
        (gzip.compress(WHOLE[:-1]), r"shape \(600, 28, 28\), but has 470399 numbers"),
        (gzip.compress(WHOLE[:9]), "ends within the sizes of its 3 axes"),
        (gzip.compress(idx(np.zeros((600, 32, 32), np.uint8))), r"images of 28x28.*\(600, 32, 32\)"),
        (gzip.compress(idx(np.zeros((599, 28, 28), np.uint8))), "as many labels"),
    ],
    ids=range(10),  # gzip writes the time into its header, and all xdist workers must name the tests alike
)
def test_fashion_mnist_says_what_is_wrong_with_the_files(example, fashion, capsys, content, complaint):
    path = fashion / "train-images-idx3-ubyte.gz"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        example("fashion_mnist").main(["--data", str(fashion), "--epochs", "1"])
    assert stopped.value.code == 2
    assert re.search(complaint, capsys.readouterr().err.replace("\n", " "))


def test_fashion_mnist_refuses_labels_above_9(example, fashion, capsys):
    (fashion / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.full(100, 10, np.uint8))))
    with pytest.raises(SystemExit):
        example("fashion_mnist").main(["--data", str(fashion), "--epochs", "1"])
    assert "labels from 0 to 9" in capsys.readouterr().err


# -- a training that is killed ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_killed_training_goes_on_and_ends_the_same(example, capsys):
    example("resume_after_kill").main(["--kills", "1", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert re.search(r"│ 1 +│ +\d+ +│ SIGKILL", printed)
    assert "Without a kill it is 47 batches." in printed
    assert "bitwise: True; the log of the epochs: True." in printed.replace("\n", " ")


@pytest.mark.long
def test_a_learning_rate_is_found_drawn_and_tried(example, tmp_path, capsys):
    example("find_learning_rate").main(["--steps", "60", "--epochs", "1", "--max-size", "16"])
    printed = capsys.readouterr().out
    suggested = float(re.search(r"steepest +(\S+) \*", printed)[1])
    rows = re.findall(r"│ (\S+e-\d+) +│ (\d+\.\d) +│", printed)
    rows = [(float(rate), float(accuracy)) for rate, accuracy in rows]
    assert [rate for rate, _ in rows] == pytest.approx([0.1 * suggested, suggested, 10 * suggested], rel=0.05)
    assert rows[1][1] > rows[0][1]
    assert "gradient noise scale" in printed
    assert (tmp_path / "runs/find_learning_rate.png").stat().st_size > 0


@pytest.mark.once
def test_the_search_has_its_report(example, tmp_path):
    example("search_report").main(["--trials", "2", "--epochs", "1"])
    assert "<h2>Learning curves</h2>" in (tmp_path / "runs/search_report.html").read_text()


@pytest.mark.once
def test_the_picture_has_every_schedule(example, tmp_path, capsys):
    schedules = example("schedules")
    schedules.main([])
    assert "15 schedules in" in capsys.readouterr().out
    assert sorted(type(each).__name__ for each in schedules.ALL) == [card.name for card in ok.cards("schedule")]
    assert (tmp_path / "runs/schedules.png").stat().st_size > 0

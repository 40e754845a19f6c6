"""What TrainingMonitor tells its sinks; `tests/sink_cases.py` reads back what other packages have stored."""

import importlib
import json
import struct
import sys

import keras
import numpy as np
import pytest
from small import fit, linear_model, regression

import keras_optkit as ok
from keras_optkit.callbacks import TrainingMonitor, sinks


class Recording(sinks.Sink):
    """Keeps the calls; may raise in one of the methods, and may know its last steps."""

    def __init__(self, raises=None, last=None):
        self.calls, self.raises, self.last = [], raises, last

    def _called(self, *call):
        self.calls.append(call)
        if call[0] == self.raises:
            raise OSError("The disk is full.")

    def of(self, name):
        return [call for call in self.calls if call[0] == name]

    def open(self, opening):
        self._called("open", opening)

    def last_step(self, *, of_epoch):
        return self.last and self.last[of_epoch]

    def write_values(self, values, step, *, of_epoch):
        self._called("values", dict(values), step, of_epoch)

    def write_hparams(self, hparams):
        self._called("hparams", dict(hparams))

    def write_text(self, tag, text, step):
        self._called("text", tag, text, step)

    def write_histograms(self, arrays, step):
        self._called("histograms", arrays, step)

    def write_figure(self, tag, png, step):
        self._called("figure", tag, png, step)

    def flush(self):
        self._called("flush")

    def close(self, *, failed):
        self._called("close", failed)


class Least(sinks.Sink):
    def __init__(self):
        self.steps = []

    def write_values(self, values, step, *, of_epoch):
        self.steps.append((step, of_epoch))


class Restore(keras.callbacks.Callback):
    """Sets a monitor back to update 0 when a `fit` begins, as if the run had been restored from its beginning."""

    def __init__(self, monitor):
        super().__init__()
        self.monitor = monitor

    def on_train_begin(self, logs=None):
        running = {"clips": {}, "noise": []}
        self.monitor.load_state_dict({"step": 0, "offset": 0, "due": 1, "epoch_step": -1, "writes": 0, **running})


@pytest.fixture(scope="module")
def compiled():
    """One for all tests, since the model keeps its compiled steps."""
    return linear_model("sgd", dtype="float32")


@pytest.fixture
def model(compiled):
    """As new."""
    compiled.layers[0].kernel.assign(np.full((3, 1), 0.5))
    compiled.optimizer.iterations.assign(0)
    return compiled


def test_sinks_are_told_what_the_lines_hold_in_order(model, tmp_path):
    x, y = regression(8, dtype="float32")
    sink, least = Recording(), Least()
    monitor = TrainingMonitor(tmp_path, every=1, sinks=[sink, least], histograms=2, figures=True)
    fit(model, x, y, monitor)
    assert [call[0] for call in sink.calls[:2]] == ["open", "hparams"]
    assert sink.calls[0][1].log_dir == str(tmp_path)
    assert not sink.calls[0][1].unchanged
    assert "train/loss_scale" in sink.calls[0][1].absent
    assert sink.calls[1][1] | {"optimizer": "SGD", "batch_size": 4, "epochs": 2} == sink.calls[1][1]
    lines = [json.loads(line) for line in (tmp_path / "monitor.jsonl").read_text().splitlines()]
    told = [(step, values) for _, values, step, _ in sink.of("values")]
    assert told == [
        (line["step"], {k: v for k, v in line.items() if k not in ("step", "epoch", "time")}) for line in lines
    ]
    assert [(step, of_epoch) for *_, step, of_epoch in sink.of("values")] == least.steps
    assert least.steps == [(1, False), (2, False), (2, True), (3, False), (4, False), (4, True)]
    assert [step for *_, step in sink.of("histograms")] == [2, 4]
    np.testing.assert_array_equal(
        sink.of("histograms")[-1][1][f"weights/{model.layers[0].name}/kernel"], model.layers[0].kernel
    )
    assert len(sink.of("flush")) == 2
    assert [call[0] for call in sink.calls[-2:]] == ["figure", "close"]
    assert sink.calls[-2][1] == "charts"
    assert sink.calls[-2][3] == 4
    assert sink.calls[-2][2].startswith(b"\x89PNG")
    assert sink.calls[-1] == ("close", False)
    assert list(tmp_path.glob("*tfevents*")) == []


def test_findings_are_told_as_they_are_written(model, tmp_path):
    x, y = regression(8, dtype="float32")
    model.layers[0].kernel.assign(np.full((3, 1), np.inf))
    sink = Recording()
    fit(model, x, y, TrainingMonitor(tmp_path, every=1, sinks=[sink], findings=True))
    found = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    told = sink.of("text")
    assert [(tag, step) for _, tag, _, step in told] == [("findings", line["step"]) for line in found]
    for (*_, text, _), line in zip(told, found, strict=True):
        assert all(each["reason"] in text and each["fix"] in text for each in line["findings"])


def test_without_sinks_only_lines_are_written(model, tmp_path):
    x, y = regression(8, dtype="float32")
    fit(model, x, y, TrainingMonitor(tmp_path, sinks=[]), epochs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["monitor.jsonl"]


@pytest.mark.parametrize(("last", "expected"), [(None, []), ({True: -1, False: 1}, [(2, False), (2, True)])])
def test_steps_that_are_computed_again_are_written_where_they_are_missing(model, last, expected, tmp_path):
    """A sink that cannot tell its steps has those of the lines."""
    x, y = regression(8, dtype="float32")
    fit(model, x, y, TrainingMonitor(tmp_path, every=1, sinks=[]), epochs=1)
    model.optimizer.iterations.assign(0)
    sink = Recording(last=last)
    monitor = TrainingMonitor(tmp_path, every=1, sinks=[sink])
    fit(model, x, y, monitor, Restore(monitor), epochs=1)
    assert [(step, of_epoch) for *_, step, of_epoch in sink.of("values")] == expected


def test_the_axis_continues_from_the_furthest_sink(model, tmp_path):
    x, y = regression(8, dtype="float32")
    sink = Recording(last={True: 10, False: 9})
    fit(model, x, y, TrainingMonitor(tmp_path, every=1, sinks=[sink]), epochs=1)
    assert [(step, of_epoch) for *_, step, of_epoch in sink.of("values")] == [(11, False), (12, False), (12, True)]


@pytest.mark.parametrize("method", ["open", "values", "flush"])
def test_all_sinks_are_closed_and_the_lines_are_whole_when_one_raises(model, method, tmp_path):
    x, y = regression(8, dtype="float32")
    first, bad, last = Recording(), Recording(raises=method), Recording()
    monitor = TrainingMonitor(tmp_path, every=1, sinks=[first, bad, last])
    with pytest.raises(OSError, match="The disk is full"):
        fit(model, x, y, monitor, epochs=1)
    assert first.calls[-1] == bad.calls[-1] == ("close", True)
    assert len(last.of("close")) == (method != "open")
    steps = ok.callbacks.read_monitor(tmp_path)["train/loss"].steps.tolist() if method != "open" else []
    assert steps == {"open": [], "values": [1], "flush": [1, 2]}[method]
    bad.raises = None
    fit(model, x, y, monitor, epochs=1)  # which can be used again
    assert last.calls[-1] == ("close", False)


def test_the_second_fit_of_a_callback_is_told_that_nobody_has_written_since(model, tmp_path):
    x, y = regression(8, dtype="float32")
    sink = Recording()
    monitor = TrainingMonitor(tmp_path, sinks=[sink])
    for _ in range(2):
        fit(model, x, y, monitor, epochs=1)
    (tmp_path / "monitor.jsonl").unlink()
    fit(model, x, y, monitor, epochs=1)
    assert [opening.unchanged for _, opening in sink.of("open")] == [False, True, False]


@pytest.mark.once
def test_a_report_of_inspect_goes_to_any_sink(model):
    x, y = regression(8, dtype="float32")
    sink = Recording()
    report = ok.inspect(model, x, y)
    report.to_sink(sink, step=3)
    assert [call[0] for call in sink.calls] == ["open", "text", "figure", "close"]
    assert sink.calls[0][1].log_dir is None
    assert sink.calls[1][1:] == ("inspect/report", "\n".join(f"    {x}" for x in str(report).splitlines()), 3)
    assert sink.calls[2][1:] == ("inspect/layers", sink.calls[2][2], 3)
    with pytest.raises(OSError, match="The disk is full"):
        report.to_sink(bad := Recording(raises="text"))
    assert bad.calls[-1] == ("close", True)
    with pytest.raises(ValueError, match=r"log_dir of sinks\.TensorBoard must be a path where no monitor has one"):
        report.to_sink(sinks.TensorBoard())
    with pytest.raises(TypeError, match=r"sink must be an ok\.callbacks\.sinks\.Sink, got 'logs' of type str\."):
        report.to_sink("logs")


def test_an_exception_at_the_end_is_a_failure_for_all_sinks(model, tmp_path):
    first, raising = Recording(), Recording(raises="figure")
    with pytest.raises(OSError, match="The disk is full"):
        fit(model, *regression(8, dtype="float32"), TrainingMonitor(tmp_path, sinks=[raising, first], figures=True))
    assert first.calls[-1] == raising.calls[-1] == ("close", True)


@pytest.mark.once
def test_tensorboard_has_the_figure_in_its_size(model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x, y = regression(8, dtype="float32")
    elsewhere = tmp_path / "events"
    monitor = TrainingMonitor(tmp_path / "lines", sinks=[sinks.TensorBoard(elsewhere)], figures=True)
    fit(model, x, y, monitor, epochs=1)
    events = EventAccumulator(str(elsewhere))
    events.Reload()
    (event,) = events.Tensors("charts")
    width, height, png = event.tensor_proto.string_val
    assert (int(width), int(height)) == struct.unpack(">II", png[16:24])
    assert [path.name for path in (tmp_path / "lines").iterdir()] == ["monitor.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sinks": "tensorboard"}, TypeError, r"sinks must be None or a list of .*Sink, got 'tensorboard' of type str"),
        ({"sinks": [3]}, TypeError, r"sinks must be None or a list of .*Sink, got 3 of type int in it"),
        ({"sinks": [sinks.Sink()]}, TypeError, r"that override write_values, got .*Sink object"),
        ({"sinks": [Least()] * 2}, ValueError, r"sinks must be .* that write to different places, got \["),
        ({"sinks": [sinks.TensorBoard("a"), sinks.TensorBoard("a")]}, ValueError, "that write to different places"),
        ({"sinks": [Least()], "histograms": 1}, ValueError, r"histograms must be left out: .*sinks \(Least\) takes"),
        ({"sinks": [], "figures": True}, ValueError, r"figures must be left out: none of the sinks \(there are none\)"),
        ({"figures": 1}, TypeError, r"figures must be True or False, got 1 of type int"),
    ],
)
def test_what_cannot_be_written_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingMonitor("logs", **arguments)


@pytest.mark.once
@pytest.mark.parametrize("kind", ["WandB", "MLflow", "Trackio"])
def test_a_missing_package_is_named_when_training_begins(model, kind, tmp_path, monkeypatch):
    x, y = regression(8, dtype="float32")
    monkeypatch.setitem(sys.modules, kind.lower(), None)  # also where it is installed
    monitor = TrainingMonitor(tmp_path, sinks=[getattr(sinks, kind)(object)])
    with pytest.raises(
        ImportError, match=rf"sinks\.{kind} needs {kind.lower()}: pip install 'keras-optkit\[{kind.lower()}\]'"
    ):
        fit(model, x, y, monitor)


def test_runs_are_refused_at_once_if_they_cannot_be_ones():
    with pytest.raises(TypeError, match=r"run must be a run of trackio\.init or a function .*, got None\."):
        sinks.Trackio(None)
    with pytest.raises(TypeError, match=r"run must be a function without arguments if it is one"):
        sinks.WandB(lambda directory: directory)


@pytest.mark.once
def test_names_that_mlflow_refuses_are_written_by_code_points():
    module = importlib.import_module("keras_optkit.callbacks.sinks.mlflow")
    assert module._name("update_ratio/block>a:b/conv 1.x-y_z") == "update_ratio/block_x3e_a_x3a_b/conv 1.x-y_z"

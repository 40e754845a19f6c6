"""Findings of runs: each rule by itself, and `diagnose` on logs of runs that were good, bad, cut off, or none."""

import json
import math

import diagnose_cases
import keras
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.advice import KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport, findings
from keras_optkit.advice.following import Following
from keras_optkit.callbacks import TrainingMonitor
from keras_optkit.callbacks.monitor.facts import facts

KERNEL = KernelReport("kernel", (50, 50), 50, 50, std=0.2, asked=0.2, low=0.14, high=0.2)
NAMES = ("a", "b", "c", "d")


def model(**given):
    """Four layers; `kernel` has the standard deviations, `activation` all activations."""
    std, activation = given.pop("kernel", {}), given.pop("activation", "relu")
    layers = tuple(
        LayerReport(
            name,
            "Dense",
            activation,
            is_output=name == "d",
            kernels=(KernelReport(**{**vars(KERNEL), "key": name, "std": std.get(name, 0.2)}),),
        )
        for name in NAMES
    )
    output = OutputReport(loss="sparse_categorical_crossentropy", units=10)
    return ModelReport(layers, outputs=(output,), update=UpdateReport(("Adam",)), **given)


def write(place, changes):
    """The values of a healthy write, the loss of which falls, with changes: numbers, or functions of the place."""
    values = {
        "train/loss": 2.3 * 0.97**place,
        "train/learning_rate": 1e-3,
        "train/gradient_norm": 1.0,
        "train/nonfinite": 0.0,
        **{
            f"{kind}/{name}": value
            for name in NAMES
            for kind, value in (("gradient_norm", 0.5), ("update_ratio", 1e-3))
        },
    }
    changed = {tag: value(place) if callable(value) else value for tag, value in changes.items()}
    return {tag: value for tag, value in (values | changed).items() if value is not None}


def found(changes, writes=30, known=None, every=10):
    following = Following(model() if known is None else known)
    for place in range(writes):
        following.add(every * (place + 1), write(place, changes))
    following.ask()
    return following.findings


def by_layer(tag, value, names=NAMES):
    return {f"{tag}/{name}": value for name in names}


FLAT = {"train/loss": 2.3}
#: It falls, but to no more than two thirds.
SLOW = {"train/loss": lambda place: 2.3 * 0.99**place}


@pytest.mark.parametrize(
    ("rule", "where", "changes", "known"),
    [
        ("loss_value", "loss", {"train/loss": lambda i: 2.0 if i < 9 else math.nan}, None),
        ("missing_gradient", "b", {"nonfinite/a": 3.0, "nonfinite/b": 1.0}, None),
        ("missing_gradient", "b", by_layer("gradient_norm", 0.0, "ab"), None),
        ("missing_gradient", "d", FLAT | by_layer("gradient_norm", 0.0) | by_layer("update_ratio", 0.0), None),
        ("vanishing_gradient", "a", SLOW | {"gradient_norm/a": 1e-7}, None),
        ("kernel_scale", "b to c", FLAT, model(kernel={"b": 5.0, "c": 9.0})),
        ("l2_and_adaptive", "optimizer", {}, model(penalized=("a/kernel",))),
        ("rate_is_zero", "optimizer", {"train/learning_rate": lambda i: 1e-3 if i < 20 else 0.0}, None),
        ("update_size", "optimizer", by_layer("update_ratio", 0.3), None),
        (
            "update_size",
            "optimizer",
            {
                "train/loss": lambda i: 9.0 if i < 5 else 2.3,
                **by_layer("update_ratio", lambda i: 0.9 if i < 5 else 1e-4),
            },
            None,
        ),
        ("update_size", "optimizer", FLAT | by_layer("update_ratio", lambda i: 0.9 if i < 5 else 1e-4), None),
        ("update_size", "optimizer", FLAT | by_layer("update_ratio", 1e-5), None),
        # the first batches have larger losses than the last
        (
            "update_size",
            "optimizer",
            {"train/loss": lambda i: 2.3 if i < 5 else 2.0} | by_layer("update_ratio", 1e-6),
            None,
        ),
        ("stands_still", "a to b", SLOW | by_layer("update_ratio", 1e-7, "ab"), None),
        (
            "exploding_gradient",
            "optimizer",
            {"train/gradient_norm": lambda i: 10.0**i, "train/loss": lambda i: 2.3 + i / 9},
            None,
        ),
        ("loss_at_start", "loss", {"train/loss": lambda i: 1e3 * 0.97**i}, None),
        ("loss_rises", "loss", {"train/loss": lambda i: 2.3 + i}, None),
        ("loss_does_not_move", "loss", FLAT, None),
        (
            "dead_units",
            "a to c",
            by_layer("activation_dead", 0.9, "abc") | by_layer("activation_zeros", 0.95, "abc"),
            None,
        ),
        ("saturation", "b", SLOW | by_layer("activation_saturated", 0.7, "b"), model(activation="tanh")),
        (
            "vanishing",
            "b",
            SLOW | {**by_layer("activation_std", 1.0, "acd"), "activation_std/b": 1e-6, "activation_mean/b": 0.0},
            None,
        ),
        ("growth", "c", SLOW | {**by_layer("activation_std", 1.0, "ab"), "activation_std/c": 1e3}, None),
        ("clipping", "optimizer", {"train/clip_rate": 1.0}, None),
    ],
)
def test_rule_names_its_cause(rule, where, changes, known):
    each = next(iter(found(changes, known=known)))
    assert (each.rule, each.where) == (rule, where), found(changes, known=known)
    assert each.reason.endswith(".")
    assert each.fix.endswith(".")
    assert each.is_hint == (rule == "clipping")
    assert f"since update {each.step}" in str(each)


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({}, None),
        # the end of a schedule, a warm-up from 0, a rate so low that the loss does not move yet
        ({"train/learning_rate": lambda i: 1e-3 * (29 - i) / 29}, None),
        ({"train/learning_rate": lambda i: 1e-3 * i / 29} | FLAT, None),
        # weights that stand still since the rate is lowered, or a loss of 0
        (
            {
                "train/learning_rate": lambda i: 1e-3 if i < 5 else 1e-8,
                **by_layer("update_ratio", lambda i: 1e-3 if i < 5 else 1e-8),
            },
            None,
        ),
        ({"train/loss": 0.0, **by_layer("gradient_norm", 0.0), **by_layer("update_ratio", 0.0)}, None),
        # a rate of 1e-5, as in fine-tuning
        (by_layer("update_ratio", 5e-5), None),
        # half of the units dead and the others always active: alike examples; dead outputs of a linear layer
        (by_layer("activation_dead", 0.5, "a") | by_layer("activation_zeros", 0.51, "a"), None),
        (by_layer("activation_dead", 1.0, "a") | by_layer("activation_zeros", 1.0, "a"), model(activation="linear")),
        # an output as large as the labels
        ({**by_layer("activation_std", 1.0, "abc"), "activation_std/d": 1e5}, None),
        # layers that have moved, in a run that goes well
        (
            {"train/loss": lambda i: 2.3 * 0.8**i, **by_layer("update_ratio", lambda i: 1e-3 if i < 8 else 1e-6, "a")},
            None,
        ),
        # NaN that has passed, and a GAN's loss
        ({"train/loss": lambda i: math.nan if i == 3 else 2.3 * 0.97**i}, None),
        ({"train/loss": None, "train/loss/d_optimizer": 0.7, "train/loss/g_optimizer": 0.7}, None),
    ],
)
def test_nothing_is_found_in_healthy_values(changes, known):
    assert found(changes, known=known) == ()


def test_kernels_of_a_run_that_goes_well_are_a_hint():
    (hint,) = found({"train/loss": lambda i: 2.3 * 0.8**i}, known=model(kernel={"b": 5.0}))
    assert (hint.rule, hint.is_hint) == ("kernel_scale", True)
    warning, *_ = found({"train/loss": lambda i: 9.0 * 0.8**i}, known=model(kernel={"b": 5.0}))
    assert (warning.rule, warning.is_hint) == ("kernel_scale", False)


def test_what_does_no_harm_is_a_hint():
    changes = {"train/loss": lambda i: 2.3 * 0.8**i, **by_layer("activation_std", 1.0, "ab"), "activation_std/c": 1e3}
    hints = found(changes | by_layer("update_ratio", 1e-7, "a"))
    assert [(each.rule, each.where, each.is_hint) for each in hints] == [
        ("growth", "c", True),
        ("stands_still", "a", True),
    ]


def test_layers_stand_still_since_their_initialisation_is_too_small():
    small = model(kernel={"a": 1e-3, "b": 1e-3})
    _, still, *_ = found(FLAT | by_layer("update_ratio", 1e-7, "ab"), known=small)
    assert (still.rule, still.where) == ("stands_still", "a to b")
    assert still.reason.startswith("They stand still: their initialisation is too small.")


def test_a_finding_has_the_update_since_which_it_has_held():
    (nan,) = found({"train/loss": lambda i: 2.0 if i < 9 else math.nan}, every=1)
    assert nan.step == 10
    following = Following(model())
    for place in range(30):
        following.add(place + 1, write(place, {"train/clip_rate": float(place < 25)}))
    assert [each.rule for each in following.findings] == ["clipping"]
    for place in range(30, 40):
        following.add(place + 1, write(place, {"train/clip_rate": 0.0}))
    assert following.findings == ()


def test_epochs_without_an_update():
    following = Following()
    following.add(1, {"epoch/loss": 2.0}, of_epoch=True)
    assert [each.rule for each in following.findings] == ["no_update"]


# -- logs -------------------------------------------------------------------------------------------------------------


def train(directory, deviation=0.005, epochs=3, build=True, **given):
    keras.utils.set_random_seed(0)
    x, y = diagnose_cases.images(np.random.default_rng(0), 256)
    made = diagnose_cases.deep_cnn(deviation, depth=5, filters=4)
    if not build:
        made = keras.Sequential([type(layer).from_config(layer.get_config()) for layer in made.layers])
    made.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    monitor = TrainingMonitor(directory, every=2, findings=True, **given)
    made.fit(x, y, batch_size=8, epochs=epochs, verbose=0, callbacks=[monitor])
    return made, monitor


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("logs")
    train(directory, epochs=4)
    return directory


def test_the_log_of_small_weights_is_diagnosed(logs):
    diagnosis = ok.diagnose(logs)
    first, *others = diagnosis.warnings
    assert (first.rule, first.where) == ("kernel_scale", "conv0 to conv4")
    (still,) = [each for each in others if each.rule == "stands_still"]
    assert still.where.startswith("conv0 to conv")
    assert "their initialisation is too small" in still.reason
    assert str(diagnosis).startswith("128 updates, ")
    assert diagnosis.runs["."].unmeasured == ()


def test_what_is_known_of_recurrent_and_nested_layers():
    """Under the paths of the values: weights of a recurrent layer are those of its cell."""
    inner = keras.Sequential([keras.Input((5, 4)), keras.layers.LSTM(3, name="lstm")], name="inner")
    nested = keras.Sequential(
        [keras.Input((5, 4)), inner, keras.layers.Dense(2, name="out"), keras.layers.ReLU(name="re_lu")]
    )
    known = {layer.path: layer for layer in facts(nested).layers}
    assert list(known) == ["inner/lstm/lstm_cell", "out", "re_lu"]
    assert [kernel.shape for kernel in known["inner/lstm/lstm_cell"].kernels] == [(4, 12), (3, 12)]
    assert known["out"].activation == "relu"
    assert [path for path, layer in known.items() if layer.is_output] == ["out", "re_lu"]
    assert findings(ModelReport(tuple(known.values()))) == []


def test_what_is_written_while_training_is_what_is_read_afterwards(logs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (logs / "findings.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    wanted = [(each.rule, each.where, each.step) for each in ok.diagnose(logs).warnings + ok.diagnose(logs).hints]
    assert sorted((each["rule"], each["where"], each["step"]) for each in lines[-1]["findings"]) == sorted(wanted)
    events = EventAccumulator(str(logs), size_guidance={"tensors": 0})
    events.Reload()
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("findings")]
    assert len(texts) == len(lines)
    assert "1. kernel_scale (conv0 to conv4" in texts[-1]


def test_logs_that_are_cut_off_are_read(logs, tmp_path):
    """A run that was killed while it wrote a line, one before its first, and one without facts."""
    content = (logs / "monitor.jsonl").read_bytes()
    for name, part in (("killed", content[: len(content) // 2]), ("early", b'{"step": 1, "ep'), ("plain", content)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "monitor.jsonl").write_bytes(part)
    (tmp_path / "killed" / "model.json").write_bytes((logs / "model.json").read_bytes())
    diagnosis = ok.diagnose(tmp_path)
    assert list(diagnosis.runs) == ["early", "killed", "plain"]
    assert diagnosis.runs["early"].unmeasured[0] == "Everything: the log ends before its first value."
    assert diagnosis.runs["killed"].updates < 128
    assert diagnosis.runs["killed"].warnings[0].rule == "kernel_scale"
    assert diagnosis.runs["plain"].unmeasured == ("Kernels: the monitor had findings=False.",)
    rules = {each.rule for each in diagnosis.runs["plain"].warnings}
    assert rules & {"stands_still", "missing_gradient"}  # where XLA makes 0 of what is very small
    assert str(diagnosis).startswith("early: 0 updates, 0 warnings.")


def test_directories_without_a_log_and_logs_of_others_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log_dir must be .* or have some in it, got .*: there is no monitor"):
        ok.diagnose(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"log_dir must be .*nowhere.*: no directory"):
        ok.diagnose(tmp_path / "nowhere")
    with pytest.raises(TypeError, match=r"log_dir must be a path.*3 of type int"):
        ok.diagnose(3)
    for line in ("hello", '{"hello": 1}'):
        (tmp_path / "monitor.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="line 1 is not a line of TrainingMonitor"):
            ok.diagnose(tmp_path)
    (tmp_path / "monitor.jsonl").write_text("")
    (tmp_path / "model.json").write_text("[]")
    with pytest.raises(ValueError, match=r"model\.json is not the file of a TrainingMonitor: TypeError"):
        ok.diagnose(tmp_path)
    with pytest.raises(TypeError, match="findings must be True or False, got 1"):
        TrainingMonitor(tmp_path, findings=1)


@pytest.mark.once
def test_a_model_that_the_first_step_builds_is_known_and_a_second_fit_follows_on(tmp_path):
    made, monitor = train(tmp_path, build=False, epochs=1)
    known = json.loads((tmp_path / "model.json").read_text())
    assert [layer["path"] for layer in known["layers"]] == [*(f"conv{place}" for place in range(5)), "head"]
    assert known["optimizer"] == ["Adam"]
    x, y = diagnose_cases.images(np.random.default_rng(0), 256)
    made.fit(x, y, batch_size=8, epochs=1, verbose=0, callbacks=[monitor])
    assert json.loads((tmp_path / "model.json").read_text()) == known  # the kernels of the beginning
    assert ok.diagnose(tmp_path).runs["."].updates == 64


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", dict.fromkeys(["NaN in the data", "mlp, Adam", *diagnose_cases.BROKEN, *diagnose_cases.HEALTHY])
)
def test_runs(name, tmp_path):
    make, data, optimizer, *wanted = (diagnose_cases.BROKEN | diagnose_cases.HEALTHY)[name]
    warned = diagnose_cases.run(make, data, optimizer, tmp_path, epochs=2 if name.startswith("NaN") else 4).warnings
    assert [(each.rule, each.where) for each in warned[:1]] == ([tuple(wanted)] if wanted else [])

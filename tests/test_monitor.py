"""TrainingMonitor in real training, against hand-written loops in NumPy and gradients of a tape of one's own."""

import collections
import contextlib
import importlib
import json
import math
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest
from keras import ops
from test_callbacks import (
    DECAY,
    DIGITS,
    EXECUTION,
    JAX,
    MOMENTUM,
    RATE,
    SGD_SCHEDULES,
    STOCK,
    At,
    boom,
    counting_model,
    fit,
    gradients,
    linear_model,
    numpy_sgd,
    regression,
    twin_of,
)

import keras_optkit as ok
from keras_optkit.callbacks import EarlyStopping, ScheduleHyperparameters, TrainingMonitor
from keras_optkit.callbacks.monitor.step import Probe
from keras_optkit.callbacks.sinks import Opening, TensorBoard
from keras_optkit.schedules import Linear
from keras_optkit.testing.problems import two_replicas

on_tensorflow = pytest.mark.only_on("tensorflow", because="tapes, or what does not come out of what JAX differentiates")


def event_files(directory):
    """In the order written; by their names, the tenth of a process and second comes before the ninth."""
    files = pathlib.Path(directory).glob("*tfevents*")
    return sorted(files, key=lambda file: [int(number) for number in re.findall(r"\d+", file.name)])


def events(directory):
    """Tag of a scalar to a list of (step, value), in the order written, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    found = collections.defaultdict(list)
    for file in event_files(directory):
        read = EventAccumulator(str(file), size_guidance={TENSORS: 0})
        read.Reload()
        for tag in read.Tags()["tensors"]:
            if read.summary_metadata[tag].plugin_data.plugin_name == "scalars":
                found[tag] += [(e.step, float(tensor_util.make_ndarray(e.tensor_proto))) for e in read.Tensors(tag)]
    return dict(found)


def steps_of(found, tag):
    return [step for step, _ in found[tag]]


def numpy_run(x, y, rates, batch=4):
    """(rate, loss, gradient norm) of plain SGD for each step."""
    w, found = [np.full((3, 1), 0.5)], []
    for t, (rate, g) in enumerate(zip(rates, gradients(x, y, w, batch), strict=False)):
        i = t * batch % len(x)
        found.append((rate, np.mean((x[i : i + batch] @ w[-1] - y[i : i + batch]) ** 2), np.sqrt(np.sum(g * g))))
        w.append(w[-1] - rate * g)
    return np.array(found)


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("execution", ["graph", "xla", "eager"])
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_values_are_those_of_each_single_batch(room, execution, tmp_path):
    x, y = regression(dtype="float32")
    rate = Linear(0.05, 12, final=0.01)
    model = linear_model(room.SGD(rate), dtype="float32", **EXECUTION[execution])
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), validation_data=(x, y))
    found = events(tmp_path)
    expected = numpy_run(x, y, [twin_of(rate)(t) for t in range(12)])
    for column, tag in enumerate(("train/learning_rate", "train/loss", "train/gradient_norm")):
        assert steps_of(found, tag) == list(range(1, 13))
        np.testing.assert_allclose([v for _, v in found[tag]], expected[:, column], rtol=2e-5, err_msg=tag)
    assert {tag for tag in found if tag.startswith("epoch/")} == {"epoch/loss", "epoch/val_loss"}
    assert steps_of(found, "epoch/val_loss") == [6, 12]
    assert found["epoch/val_loss"][1][1] == pytest.approx(model.history.history["val_loss"][1], rel=1e-6)


def test_loss_has_the_regularisation_and_sample_weights_of_its_batch(tmp_path):
    x = np.array([1, 2, 3, 4], "float32")[:, None]
    model = keras.Sequential(
        [
            keras.Input((1,)),
            keras.layers.Dense(
                1, use_bias=False, kernel_initializer="ones", kernel_regularizer=keras.regularizers.L2(0.5)
            ),
        ]
    )
    model.compile(optimizer=STOCK.SGD(0.0), loss="mse")
    weight = np.array([1, 3, 2, 2], "float32")
    fit(model, x, 0 * x, TrainingMonitor(tmp_path, every=1), batch_size=2, epochs=1, sample_weight=weight)
    expected = [(1 * 1 + 3 * 4) / 2 + 0.5, (2 * 9 + 2 * 16) / 2 + 0.5]
    assert [v for _, v in events(tmp_path)["train/loss"]] == pytest.approx(expected, rel=1e-6)


def penalized_model(optimizer):
    """Three weights, of which one is frozen and one has no regularizer."""
    regular = keras.regularizers
    layers = [
        keras.layers.Dense(2, use_bias=False, kernel_regularizer=regular.L2(0.3), trainable=False),
        keras.layers.Dense(2, kernel_regularizer=regular.L1(0.1), bias_regularizer=regular.L2(0.2)),
        keras.layers.Dense(1, use_bias=False),
    ]
    model = keras.Sequential([keras.Input((3,)), *layers])
    model.compile(optimizer, loss="mse")
    return model


@pytest.mark.few(1)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_the_penalty_is_that_of_the_trained_weights_before_the_update(room, scaled, tmp_path):
    x, y = regression(8, dtype="float32")
    optimizer = room.SGD(0.1)
    model = penalized_model(STOCK.LossScaleOptimizer(optimizer) if scaled else optimizer)
    model.layers[1].bias.assign([1.0, -2.0])
    expected = []
    for _ in range(3):
        kernel, bias = model.layers[1].get_weights()
        expected.append(0.1 * np.sum(np.abs(kernel)) + 0.2 * np.sum(bias**2))
        data = np.mean((model.predict(x, verbose=0) - y) ** 2)
        fit(model, x, y, TrainingMonitor(tmp_path, every=1), batch_size=8, epochs=1)
        found = ok.callbacks.read_monitor(tmp_path)
        assert found["train/loss"].values[-1] - found["train/penalty"].values[-1] == pytest.approx(data, rel=1e-4)
    assert found["train/penalty"].values == pytest.approx(expected, rel=1e-5)


@on_tensorflow
def test_the_penalty_on_two_replicas_is_that_of_one(tmp_path):
    x, y = regression(8, dtype="float32")
    with two_replicas().scope():
        model = penalized_model(ok.optimizers.SGD(0.1))
    kernel, bias = model.layers[1].get_weights()
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), batch_size=8, epochs=1)
    (penalty,) = ok.callbacks.read_monitor(tmp_path)["train/penalty"].values
    assert penalty == pytest.approx(0.1 * np.sum(np.abs(kernel)) + 0.2 * np.sum(bias**2), rel=1e-5)


def test_there_is_no_penalty_without_regularizers(tmp_path):
    x, y = regression(8, dtype="float32")
    fit(linear_model("sgd", dtype="float32"), x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    assert not any("penalty" in tag for tag in ok.callbacks.read_monitor(tmp_path))


@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_mixed_precision_norm_is_unscaled_and_a_skipped_update_has_no_step(room, tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    model = counting_model(room.SGD(0.125))
    x = np.array([1, -1.5, np.inf, 0.5, 0.25], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    found = events(tmp_path)
    assert found["train/gradient_norm"] == [(1, 1.0), (2, 1.5), (3, 0.5), (4, 0.25)]
    assert found["train/loss"][0] == (1, 1.0)
    assert {rate for _, rate in found["train/learning_rate"]} == {0.125}


def test_keras_multi_optimizer_is_monitored_and_cannot_be_driven(tmp_path):
    x, y = regression(dtype="float32")
    optimizers = STOCK.OptimizerMap(STOCK.SGD(0.1))
    optimizers["dense.*/kernel"] = STOCK.Adam(0.01)
    model = linear_model(STOCK.MultiOptimizer(optimizers), dtype="float32")
    with pytest.raises(ValueError, match=r"MultiOptimizer has no hyperparameter 'learning_rate'.*Allowed: none"):
        fit(model, x, y, ScheduleHyperparameters({"learning_rate": RATE}))
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    found = events(tmp_path)
    assert steps_of(found, "train/gradient_norm") == list(range(1, 7))
    assert "train/learning_rate" not in found


def test_fixed_loss_scale_is_taken_out(tmp_path):
    model = counting_model(STOCK.SGD(0.125, loss_scale_factor=1024.0))
    x = np.array([1, -2], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    found = events(tmp_path)
    assert found["train/gradient_norm"] == [(1, 1.0), (2, 2.0)]
    assert found["train/loss"] == [(1, 1.0), (2, -1.75)]


def test_the_loss_scale_is_written_also_when_every_update_fails(tmp_path):
    model = counting_model(ok.optimizers.LossScale(STOCK.SGD(0.125), initial_scale=8.0, dynamic_growth_steps=2))
    x = np.array([1, np.inf, 1, 1, 1], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    fit(model, np.full_like(x, np.inf), x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    found = events(tmp_path)
    assert found["train/loss_scale"] == [(1, 8.0), (2, 4.0), (3, 4.0), (4, 8.0)]
    assert [scale for _, scale in found["epoch/loss_scale"]] == [8.0, 1.0]


def test_rows_that_occur_twice_in_a_sparse_gradient_are_summed(tmp_path):
    last = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", trainable=False)
    layers = [keras.Input((2,), dtype="int32"), keras.layers.Embedding(5, 1), keras.layers.Flatten(), last]
    model = keras.Sequential(layers)
    model.compile(optimizer=STOCK.SGD(0.0), loss=lambda _, p: ops.mean(p))
    ids = np.array([[1, 1], [1, 3]])
    fit(model, ids, np.zeros((2, 1)), TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    assert [v for _, v in events(tmp_path)["train/gradient_norm"]] == pytest.approx([2.0, math.sqrt(2)], rel=1e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("every", "steps_per_execution", "expected"),
    [
        (1, 1, range(1, 13)),
        (5, 1, [1, 2, 4, 5, 10]),
        (1, 3, [3, 6, 9, 12]),
        (4, 3, [3, 6, 9, 12]),
        (100, 1, [1, 2, 4, 8]),
    ],
)
def test_every(every, steps_per_execution, expected, tmp_path):
    """And the first updates, at powers of two: what explodes does so early."""
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32", steps_per_execution=steps_per_execution)
    fit(model, x, y, TrainingMonitor(tmp_path, every=every))
    found = events(tmp_path)
    assert steps_of(found, "train/loss") == list(expected)
    assert steps_of(found, "epoch/loss") == [6, 12]


@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_accumulation_counts_updates(room, tmp_path):
    model = counting_model(room.SGD(0.1, gradient_accumulation_steps=3))
    x = np.array([1, 2, 3, 0, 0, 3, 2, 4], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    # ours makes an update of the two that are left at the end of the epoch
    assert found_pairs(tmp_path) == [(1, 3.0), (2, 3.0), (3, 4.0)][: 3 if room is ok.optimizers else 2]


def found_pairs(directory):
    return events(directory)["train/gradient_norm"]


@pytest.mark.once
def test_the_step_axis_goes_on(tmp_path):
    """Over fits with one callback, over a new optimizer, and with a new callback, as in a new process."""
    x, y = regression(dtype="float32")
    model, monitor = linear_model(STOCK.SGD(0.01), dtype="float32"), TrainingMonitor(tmp_path, every=2)
    fit(model, x, y, monitor)
    fit(model, x, y, monitor, epochs=1)
    assert steps_of(events(tmp_path), "train/loss") == [1, *range(2, 19, 2)]
    model.compile(optimizer=STOCK.SGD(0.01), loss="mse")  # begins at 0 again
    fit(model, x, y, monitor, epochs=1)
    assert steps_of(events(tmp_path), "train/loss") == [1, *range(2, 25, 2)]
    fresh = linear_model(STOCK.SGD(0.01), dtype="float32")
    fit(fresh, x, y, TrainingMonitor(str(tmp_path), every=2), epochs=1)
    found = events(tmp_path)
    assert steps_of(found, "train/loss") == [1, *range(2, 31, 2)]
    assert steps_of(found, "epoch/loss") == [6, 12, 18, 24, 30]


def test_a_restored_optimizer_keeps_its_own_count(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    fit(model, x, y, epochs=1)  # without the monitor, which must not matter later
    model.optimizer.iterations.assign(1000)
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    assert steps_of(events(tmp_path), "train/loss") == list(range(1001, 1013))


def test_failure_leaves_everything_written(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    monitor = TrainingMonitor(tmp_path, every=1)
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, x, y, monitor, At(boom, batch=4))
    assert steps_of(events(tmp_path), "train/loss") == [1, 2, 3, 4, 5]
    assert not {"apply", "scale_loss"} & set(vars(model.optimizer))
    fit(model, x, y, monitor, epochs=1)
    assert steps_of(events(tmp_path), "train/loss") == list(range(1, 12))


def test_two_monitors_and_two_functions_share_one_step(tmp_path):
    """On JAX all of them travel through the same step, each with its own numbers."""
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.7, momentum=0.1), dtype="float32")
    functions = {"learning_rate": lambda step: 0.01 * (step + 1), "momentum": lambda step: 0.05 * step}
    driven = [ScheduleHyperparameters({name: function}) for name, function in functions.items()]
    fit(model, x, y, TrainingMonitor(tmp_path / "a", every=1), *driven, TrainingMonitor(tmp_path / "b", every=5))
    expected = numpy_sgd(x, y, 12, *functions.values(), lambda _: 0.0)
    np.testing.assert_allclose(model.get_weights()[0], expected[-1], rtol=1e-4)
    found = {name: events(tmp_path / name)["train/learning_rate"] for name in "ab"}
    np.testing.assert_allclose([rate for _, rate in found["a"]], 0.01 * np.arange(1, 13), rtol=1e-6)
    assert found["b"] == [found["a"][step - 1] for step in (1, 2, 4, 5, 10)]
    assert not {"train_step", "make_train_function"} & set(vars(model))


@pytest.mark.few(1)
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 1, 0)])
def test_the_three_work_together_in_any_order(order, tmp_path):
    x, y = regression()
    model = linear_model(STOCK.SGD(0.7, momentum=0.1))
    three = [
        ScheduleHyperparameters(SGD_SCHEDULES),
        TrainingMonitor(tmp_path, every=1),
        EarlyStopping("val_loss", patience=9, mode="max", restore_best_weights=True),
    ]
    fit(model, x, y, *(three[i] for i in order), validation_data=(x, y), epochs=3)
    expected = numpy_sgd(x, y, 18, twin_of(RATE), twin_of(MOMENTUM), twin_of(DECAY))
    best = 6 * (three[2].best_epoch + 1)
    np.testing.assert_allclose(model.get_weights()[0], expected[best], rtol=100 * DIGITS)
    rates = [value for _, value in events(tmp_path)["train/learning_rate"]]
    np.testing.assert_allclose(rates, [twin_of(RATE)(t) for t in range(18)], rtol=1e-6)
    assert not {"apply", "scale_loss"} & set(vars(model.optimizer))


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_two_replicas_are_driven_and_monitored_as_one(room, tmp_path):
    x, y = regression()
    with two_replicas().scope():
        model = linear_model(STOCK.LossScaleOptimizer(room.SGD(0.7, momentum=0.1), initial_scale=16.0))
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), ScheduleHyperparameters(SGD_SCHEDULES))
    w = numpy_sgd(x, y, 12, twin_of(RATE), twin_of(MOMENTUM), twin_of(DECAY))
    np.testing.assert_allclose(model.get_weights()[0], w[-1], rtol=1e-10)
    losses, norms = [], []
    for t in range(12):
        a, b = (array[4 * t % 24 : 4 * t % 24 + 4] for array in (x, y))
        losses.append(np.mean((a @ w[t] - b) ** 2))
        norms.append(np.linalg.norm(2 * a.T @ (a @ w[t] - b) / 4))
    found = events(tmp_path)
    for tag, expected in {"train/loss": losses, "train/gradient_norm": norms}.items():
        assert steps_of(found, tag) == list(range(1, 13))
        np.testing.assert_allclose([v for _, v in found[tag]], expected, rtol=1e-6, err_msg=tag)


# -- layers, against a tape -------------------------------------------------------------------------------------------


def network(optimizer, **arguments):
    """A convolution with normalisation, so that there are weights that no gradient trains, and two dense layers."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            keras.layers.Conv2D(3, 3, name="conv"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.ReLU(name="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(4, "tanh", name="hidden"),
            keras.layers.Dense(1, name="out"),
        ],
        name="net",
    )
    model.compile(optimizer, loss="mse", **arguments)
    return model


def images(n=24):
    rng = np.random.default_rng(3)
    return rng.normal(size=(n, 6, 6, 2)).astype("float32"), rng.normal(size=(n, 1)).astype("float32")


LAYERS = ["conv", "norm", "hidden", "out"]


class Weights(keras.callbacks.Callback):
    """Notes all weights before every batch, and at the end."""

    def on_train_begin(self, logs=None):
        self.noted = []

    def on_train_batch_begin(self, batch, logs=None):
        self.noted.append([ops.convert_to_numpy(v).copy() for v in self.model.variables])

    def on_train_end(self, logs=None):
        self.on_train_batch_begin(None)


def of_layers(arrays, model):
    """The norm of all arrays of each layer."""
    sums = dict.fromkeys(LAYERS, 0.0)
    for array, variable in zip(arrays, model.trainable_variables, strict=True):
        sums[variable.path.split("/")[-2]] += np.sum(np.asarray(array, "float64") ** 2)
    return {name: math.sqrt(value) for name, value in sums.items()}


def norm_of(arrays):
    return math.sqrt(sum(np.sum(np.asarray(array, "float64") ** 2) for array in arrays))


def mean_square(y, prediction):
    return ops.mean(ops.square(ops.cast(prediction, "float32") - y))


def gradient_at(model, values, x, y, loss_of=mean_square):
    """The gradient of one batch at noted weights, by a tape or by JAX, outside of any training step."""
    for variable, value in zip(model.variables, values, strict=True):
        variable.assign(value)
    if JAX:
        import jax

        held = [v.value for v in model.non_trainable_variables]

        def loss(weights):
            prediction, _ = model.stateless_call(weights, held, x, training=True)
            return loss_of(y, prediction)

        return [np.asarray(g) for g in jax.grad(loss)([v.value for v in model.trainable_variables])]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        loss = loss_of(y, model(x, training=True))
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, [v.value for v in model.trainable_variables])]


def assert_values_of_layers(found, model, noted, x, y, steps, batch=4, rtol=1e-4):
    """Every tag of every layer in `found` equals what the noted weights and a tape give."""
    trained = [i for i, v in enumerate(model.variables) if v.trainable]
    for step in steps:
        i = (step - 1) * batch % len(x)
        grads = gradient_at(model, noted[step - 1], x[i : i + batch], y[i : i + batch])
        before, after = ([noted[t][k] for k in trained] for t in (step - 1, step))
        weight, change = of_layers(before, model), of_layers([a - b for a, b in zip(after, before, strict=True)], model)
        expected = {f"gradient_norm/{name}": value for name, value in of_layers(grads, model).items()}
        expected |= {f"weight_norm/{name}": value for name, value in weight.items()}
        expected |= {f"update_ratio/{name}": change[name] / weight[name] for name in LAYERS}
        whole = {kind: math.hypot(*v.values()) for kind, v in {"weight": weight, "change": change}.items()}
        expected["train/weight_norm"] = whole["weight"]
        expected["train/update_ratio"] = whole["change"] / whole["weight"]
        expected["train/gradient_norm"] = math.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in grads))
        for tag, value in expected.items():
            assert dict(found[tag])[step] == pytest.approx(value, rel=rtol), (tag, step)


@pytest.mark.few(1)
@pytest.mark.parametrize("execution", ["graph", "xla"])
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_layers_have_the_norms_that_a_tape_gives(room, execution, tmp_path):
    x, y = images()
    model, weights = network(room.Adam(0.01), **EXECUTION[execution]), Weights()
    fit(model, x, y, TrainingMonitor(tmp_path, every=2), weights)
    found = events(tmp_path)
    assert {tag.split("/")[1] for tag in found if tag.startswith("update_ratio/")} == set(LAYERS)
    assert steps_of(found, "update_ratio/conv") == [1, 2, 4, 6, 8, 10, 12]
    assert_values_of_layers(found, model, weights.noted, x, y, [2, 4, 12])
    assert [value for _, value in found["train/nonfinite"]] == [0] * 7


@pytest.mark.long
@pytest.mark.once
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_layers_in_mixed_precision(room, tmp_path):
    keras.config.set_dtype_policy("mixed_float16")
    x, y = images()
    model, weights = network(STOCK.LossScaleOptimizer(room.Adam(0.01), initial_scale=64.0)), Weights()
    fit(model, x, y, TrainingMonitor(tmp_path, every=3), weights)
    assert_values_of_layers(events(tmp_path), model, weights.noted, x, y, [3, 9], rtol=0.02)


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_layers_on_two_replicas_are_those_of_one(room, tmp_path):
    x, y = regression(48, dtype="float32")
    found = {}
    for name, scope in {"one": None, "two": two_replicas().scope()}.items():
        with scope or contextlib.nullcontext():
            model = keras.Sequential(
                [keras.Input((3,)), keras.layers.Dense(4, "relu", name="hidden"), keras.layers.Dense(1, name="out")]
            )
            model.compile(STOCK.LossScaleOptimizer(room.SGD(0.05), initial_scale=8.0), loss="mse")
        model.set_weights([np.full(w.shape, 0.1 * (i + 1)) for i, w in enumerate(model.get_weights())])
        monitor = TrainingMonitor(tmp_path / name, every=2, activations="hidden", noise_scale=True)
        fit(model, x, y, monitor, batch_size=8, epochs=1)
        found[name] = events(tmp_path / name)
    compared = [tag for tag in found["one"] if not tag.startswith(("memory/", "throughput/", "train/noise_scale"))]
    assert "update_ratio/out" in compared
    assert "activation_std/hidden" in compared
    for tag in compared:
        assert steps_of(found["two"], tag) == steps_of(found["one"], tag)
        values = ([value for _, value in found[name][tag]] for name in found)
        np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-6, err_msg=tag)


@pytest.mark.once
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_the_clip_rate_under_accumulation_is_about_the_mean(room, scaled, tmp_path):
    optimizer = room.SGD(0.125, global_clipnorm=2.0, gradient_accumulation_steps=2)
    model = counting_model(STOCK.LossScaleOptimizer(optimizer, initial_scale=8.0) if scaled else optimizer)
    x = np.array([1, 2, 4, 1, 1, 2.5], "float32")[:, None]  # with means 1.5, 2.5 and 1.75
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    assert [rate for _, rate in events(tmp_path)["train/clip_rate"]] == [0, 1 / 2, pytest.approx(1 / 3)]


@pytest.mark.parametrize("length", ["known", "unknown"])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # what Keras says of any data of unknown length
def test_under_accumulation_the_gradient_is_the_micro_batch_s_and_change_and_clipping_those_of_the_update(
    length, tmp_path
):
    """Also in the update of the two micro-batches that an epoch ends with, however that end is found."""
    model = counting_model(ok.optimizers.SGD(0.5, gradient_accumulation_steps=3, global_clipnorm=2.0))
    x = np.array([1, 2, 6, 2, 1], "float32")[:, None]  # with means 3, which is clipped, and 1.5
    monitor = TrainingMonitor(tmp_path, every=1)
    if length == "known":
        fit(model, x, x, monitor, batch_size=1)
    else:
        import tensorflow as tf  # on JAX, too

        data = tf.data.Dataset.from_tensor_slices((x, x)).batch(1)
        fit(model, data.filter(lambda *_: True), None, monitor, batch_size=None)
    found = events(tmp_path)
    assert found["train/gradient_norm"] == [(1, 6.0), (2, 1.0), (3, 6.0), (4, 1.0)]
    weights = [1, 0, -0.75, -1.75, -2.5]
    assert [value for _, value in found["train/weight_norm"]] == pytest.approx(np.abs(weights[:-1]), abs=1e-6)
    changes = [value * abs(w) for (_, value), w in zip(found["train/update_ratio"], weights, strict=False) if w]
    assert changes == pytest.approx([1.0, 1.0, 0.75])
    assert [value for _, value in found["train/clip_rate"]] == [1, 1 / 2, pytest.approx(2 / 3), 1 / 2]
    assert monitor._batches == 10


# -- models that the first step builds, and layers that are unfrozen --------------------------------------------------


@pytest.mark.long
def test_the_first_example_of_the_readme_logs_true_norms(tmp_path, request):
    """Its model has no Input, and is built by the first step."""
    readme = (request.config.rootpath / "README.md").read_text()
    code = readme.split("```python\n")[1].split("```")[0]
    for old, new in {
        '"runs/readme"': "log_dir",
        "epochs=20": "epochs=1, shuffle=False",
        "[stop, watch]": "[stop, watch, weights]",
        "verbose=2": "verbose=0",
    }.items():
        assert old in code
        code = code.replace(old, new)
    names = {"log_dir": tmp_path, "weights": Weights()}
    exec(code, names)
    found, model, x, y = (ok.callbacks.read_monitor(tmp_path), *(names[name] for name in ("model", "x", "y")))
    noted = names["weights"].noted
    loss = keras.losses.BinaryCrossentropy()
    assert found["train/loss"].steps.tolist() == [1, 2, 4, 8, 10]
    for step in (2, 8, 10):
        batch = slice(32 * (step - 1), 32 * step)
        before, after = noted[step - 1], noted[step]
        grads = gradient_at(model, before, x[batch], y[batch][:, None], loss)
        trained = [i for i, v in enumerate(model.variables) if v.trainable]
        norms = {}
        for name, places in {names["hidden"].name: trained[:2], names["output"].name: trained[2:]}.items():
            norms[f"weight_norm/{name}"] = norm_of(before[i] for i in places)
            change = norm_of(after[i] - before[i] for i in places)
            norms[f"update_ratio/{name}"] = change / norms[f"weight_norm/{name}"]
            norms[f"gradient_norm/{name}"] = norm_of(grads[trained.index(i)] for i in places)
        norms["train/gradient_norm"], norms["train/weight_norm"] = norm_of(grads), norm_of(before[i] for i in trained)
        for tag, value in norms.items():
            curve = found[tag]
            assert curve.values[curve.steps == step] == pytest.approx(value, rel=1e-4), (tag, step)


class Subclassed(keras.Model):
    """Without `build`; the first call makes the weights."""

    def __init__(self):
        super().__init__()
        self.block = keras.Sequential(
            [keras.layers.Dense(4, "relu", name="inner"), keras.layers.Dense(3, name="inner_1")]
        )
        self.head = keras.layers.Dense(1, name="head")

    def call(self, x):
        return self.head(self.block(x))


class BuildsItself(keras.Model):
    def build(self, shape):
        self.only = keras.layers.Dense(1, name="only")
        self.only.build(shape)

    def call(self, x):
        return self.only(x)


@pytest.mark.once
@pytest.mark.each_once
@pytest.mark.parametrize("execution", ["graph", "eager"])
@pytest.mark.parametrize("make", [Subclassed, BuildsItself])
def test_layers_of_a_model_that_the_first_step_builds(make, execution, tmp_path):
    x, y = regression(dtype="float32")
    model, weights = make(), Weights()
    model.compile(ok.optimizers.SGD(0.01, global_clipnorm=1e6), loss="mse", **EXECUTION[execution])
    fit(model, x, y, TrainingMonitor(tmp_path, every=2), weights, epochs=1)
    found = ok.callbacks.read_monitor(tmp_path)
    layers = {"BuildsItself": {"only"}, "Subclassed": {"head", "sequential/inner", "sequential/inner_1"}}[make.__name__]
    shown = {
        re.sub("sequential_[0-9]+", "sequential", tag.split("/", 1)[1])
        for tag in found
        if "update_ratio/" in tag and tag != "train/update_ratio"
    }
    assert shown == layers
    for step in (2, 4, 6):
        trained = [a for a, v in zip(weights.noted[step - 1], model.variables, strict=True) if v.trainable]
        curve = found["train/weight_norm"]
        assert curve.values[curve.steps == step] == pytest.approx(norm_of(trained), rel=1e-5)
    assert found["train/clip_rate"].values.tolist() == [0] * 4


@pytest.mark.long
@on_tensorflow
def test_activations_of_a_model_that_the_first_step_builds(tmp_path):
    x, y = regression(4, dtype="float32")
    model = Subclassed()
    model.compile(STOCK.SGD(0.0), loss="mse")
    fit(model, x, y, TrainingMonitor(tmp_path, activations="inner$"), epochs=1)
    (name,) = {tag.split("/", 1)[1] for tag in events(tmp_path) if tag.startswith("activation_mean")}
    expected = ops.convert_to_numpy(model.block.layers[0](x)).mean()
    assert events(tmp_path)[f"activation_mean/{name}"] == [(1, pytest.approx(expected, rel=1e-5))]
    other = Subclassed()
    other.compile(STOCK.SGD(0.0), loss="mse")
    with pytest.raises(ValueError, match="activations must match the path of a layer, got 'nothing'"):
        fit(other, x, y, TrainingMonitor(tmp_path, activations="nothing"))


@pytest.mark.few(1)
@pytest.mark.parametrize("by", ["Unfreeze", "a second fit"])
def test_layers_that_are_unfrozen_are_shown_from_then_on(by, tmp_path):
    x, y = regression(8, dtype="float32")
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(1, name="head")]
    )
    optimizer, monitor = ok.optimizers.SGD(0.01), TrainingMonitor(tmp_path, every=1)
    if by == "Unfreeze":
        model.compile(optimizer, loss="mse")
        fit(model, x, y, ok.callbacks.Unfreeze({0: "head", 1: ".*"}), monitor)
    else:
        model.get_layer("body").trainable = False
        model.compile(optimizer, loss="mse")
        fit(model, x, y, monitor, epochs=1)
        model.get_layer("body").trainable = True
        fit(model, x, y, monitor, epochs=1)
    found = events(tmp_path)
    assert steps_of(found, "weight_norm/head") == [1, 2, 3, 4]
    assert steps_of(found, "weight_norm/body") == [3, 4]
    body, head = (dict(found[f"weight_norm/{name}"]) for name in ("body", "head"))
    assert dict(found["train/weight_norm"]) == {
        step: pytest.approx(math.hypot(head[step], body.get(step, 0.0)), rel=1e-5) for step in head
    }


# -- several optimizers, and none -------------------------------------------------------------------------------------


class Duel(keras.Model):
    """Two parts of one weight with an optimizer each, where a batch makes several updates, or one of the two only.

    The gradient of each part is the mean of the inputs.
    """

    def __init__(self, held, updates=lambda _: ("left", "right")):
        super().__init__()
        self.left, self.right = (keras.layers.Dense(1, use_bias=False, kernel_initializer="ones") for _ in range(2))
        self.held, self.updates = held, updates
        self.batches = 0
        self.build((None, 1))

    def build(self, shape):
        self.left.build(shape)
        self.right.build(shape)
        self.built = True

    def train_step(self, data):
        import tensorflow as tf

        x = data[0] if isinstance(data, tuple) else data
        self.batches += 1
        for name in self.updates(self.batches):
            part, optimizer = getattr(self, name), self.held[name]
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_mean(part(x)))
            optimizer.apply_gradients([(tape.gradient(loss, part.kernel), part.kernel)])
        return {"done": tf.reduce_mean(x)}


ONES = np.array([1, 2, 3, 4], "float32")[:, None]


@on_tensorflow
@pytest.mark.parametrize("compiled", [{}, {"optimizer": None}], ids=["unused default", "None"])
def test_each_of_two_optimizers_has_its_rate_and_its_layers(compiled, tmp_path):
    held = {"left": ok.optimizers.SGD(0.5, momentum=0.5, global_clipnorm=1.5), "right": STOCK.SGD(0.25)}
    model = Duel(held)
    model.compile(**compiled)
    fit(model, ONES, None, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    found = events(tmp_path)
    assert [rate for _, rate in found["train/learning_rate/held/left"]] == [0.5] * 4
    assert [rate for _, rate in found["train/learning_rate/held/right"]] == [0.25] * 4
    assert "train/learning_rate" not in found
    assert found["hyperparameters/held/left/momentum"][0] == (1, 0.5)
    assert [rate for _, rate in found["train/clip_rate/held/left"]] == [0, 1 / 2, pytest.approx(2 / 3), 3 / 4]
    names = [f"weight_norm/{layer.name}" for layer in (model.left, model.right)]
    weights = 1 - 0.25 * np.array([0, 1, 3, 6])
    assert [value for _, value in found[names[1]]] == pytest.approx(abs(weights))
    assert found["train/gradient_norm"] == [(step, pytest.approx(step * math.sqrt(2))) for step in (1, 2, 3, 4)]
    assert steps_of(found, names[0]) == [1, 2, 3, 4]
    assert found["train/loss/held/right"][0] == (1, 1.0)


@on_tensorflow
def test_an_optimizer_that_rests_has_no_values(tmp_path):
    """Eagerly, where the conditions are Python's."""
    held = {"left": STOCK.SGD(0.5), "right": STOCK.SGD(0.25)}
    model = Duel(held, updates=lambda batch: ("left", "right") if batch % 2 == 0 else ("left",))
    model.compile(run_eagerly=True)
    fit(model, ONES, None, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    found = events(tmp_path)
    assert steps_of(found, f"gradient_norm/{model.left.name}") == [1, 2, 3, 4]
    assert found[f"gradient_norm/{model.right.name}"] == [(2, 2.0), (4, 4.0)]
    assert steps_of(found, "train/learning_rate/held/right") == [2, 4]


@on_tensorflow
def test_updates_are_counted_where_a_batch_makes_several(tmp_path):
    held = {"left": STOCK.SGD(0.01), "right": STOCK.SGD(0.01)}
    model = Duel(held, updates=lambda _: ("left", "left", "right"))
    model.compile(optimizer=None)
    fit(model, np.tile(ONES, (3, 1)), None, TrainingMonitor(tmp_path, every=6), batch_size=1, epochs=1)
    assert steps_of(events(tmp_path), "train/gradient_norm") == [2, 4, 6, 12, 18, 24]


def test_an_epoch_without_an_update_is_written_also_the_first_one(tmp_path):
    model = counting_model(ok.optimizers.SGD(0.1, skip_nonfinite=9))
    x = np.array([np.nan, np.nan], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path), batch_size=1)
    fit(model, ONES, ONES, TrainingMonitor(tmp_path), batch_size=1, epochs=1)
    assert steps_of(events(tmp_path), "epoch/loss") == [0, 1, 5]


def test_rates_inside_of_keras_s_multi_optimizer(tmp_path):
    x, y = regression(8, dtype="float32")
    parts = {"kernel": STOCK.SGD(0.1), "bias": STOCK.SGD(0.2)}
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, name="dense")])
    model.compile(STOCK.MultiOptimizer(lambda v: parts[v.path.split("/")[-1]]), loss="mse")
    fit(model, x, y, TrainingMonitor(tmp_path), epochs=1)
    found = events(tmp_path)
    rates = {tag: pairs[0] for tag, pairs in found.items() if tag.startswith("train/learning_rate")}
    assert sorted(rates.values()) == [(1, pytest.approx(0.1)), (1, pytest.approx(0.2))]
    assert set(rates) == {"train/learning_rate/0", "train/learning_rate/1"}


def test_what_is_no_number_in_the_logs_is_left_out_with_one_warning(tmp_path):
    values = {"array": np.ones(3), "text": "warm-up", "nothing": None, "scalar": np.array([2.0]), "flag": True}

    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs.update(values)

    x, y = regression(4, dtype="float32")
    with pytest.warns(UserWarning, match=r"'array' \(ndarray\), 'text' \(str\), 'nothing' \(NoneType\)") as caught:
        fit(linear_model("sgd", dtype="float32"), x, y, Own(), TrainingMonitor(tmp_path), epochs=3)
    assert len([w for w in caught if "TrainingMonitor" in str(w.message)]) == 1
    found = events(tmp_path)
    assert {tag for tag in found if tag.startswith("epoch/")} == {"epoch/loss", "epoch/scalar", "epoch/flag"}
    assert [value for _, value in found["epoch/scalar"]] == [2.0] * 3


# -- single values ----------------------------------------------------------------------------------------------------


@pytest.mark.few(3)
@pytest.mark.parametrize("limit", [{"global_clipnorm": 2.0}, {"clipnorm": 2.0}, {"clipvalue": 2.0}])
@pytest.mark.parametrize("room", [STOCK, ok.optimizers], ids=["keras", "ours"])
def test_clip_rate(room, limit, tmp_path):
    model = counting_model(room.SGD(0.125, **limit))
    x = np.array([1, 3, -2.5, 1.5], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    assert [rate for _, rate in events(tmp_path)["train/clip_rate"]] == pytest.approx([0, 1 / 2, 2 / 3, 1 / 2])


@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
@pytest.mark.parametrize(("room", "expected"), [(STOCK, [0, 1 / 2]), (ok.optimizers, [1, 1])], ids=["keras", "ours"])
def test_clip_rate_on_replicas_is_that_of_what_is_clipped(room, expected, tmp_path):
    """Keras clips the gradient of each replica, 1.5 and 0.5 and then 2 and 0, and ours their sum."""
    x = np.array([1.5, 0.5, 2, 0], "float32")[:, None]  # the loss of each replica is not divided by two
    with two_replicas().scope():
        model = counting_model(room.SGD(0.125, global_clipnorm=1.8))
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=2, epochs=1)
    assert [rate for _, rate in events(tmp_path)["train/clip_rate"]] == expected


def test_numbers_that_are_not_finite_are_counted_by_layer(tmp_path):
    x, y = images(8)
    model, weights = network(STOCK.SGD(0.01)), Weights()
    x[4, 0, 0, 0] = np.nan
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), weights, epochs=1)
    found = events(tmp_path)
    counts = [np.sum(~np.isfinite(g)) for g in gradient_at(model, weights.noted[1], x[4:], y[4:])]
    assert found["train/nonfinite"] == [(1, 0), (2, sum(counts))]
    assert found["nonfinite/hidden"] == [(2, sum(counts[4:6]))]
    assert sum(counts[4:6]) == 3 * 16 * 4 + 4
    assert math.isnan(found["gradient_norm/hidden"][1][1])
    read = ok.callbacks.read_monitor(tmp_path)
    assert math.isnan(read["gradient_norm/hidden"].values[1])


def test_updates_that_were_left_out_are_counted(tmp_path):
    model = counting_model(ok.optimizers.SGD(0.125, skip_nonfinite=3))
    x = np.array([1, np.inf, 1, np.nan, np.inf, 1], "float32")[:, None]
    fit(model, x, x, TrainingMonitor(tmp_path, every=1), batch_size=1, epochs=1)
    assert events(tmp_path)["train/skipped"] == [(1, 0), (2, 1), (3, 3)]


@pytest.mark.parametrize("driven", [True, False])
def test_hyperparameters_are_those_of_the_update(driven, tmp_path):
    x, y = regression(dtype="float32")
    momentum = Linear(0.5, 6, final=0.9)
    optimizer = STOCK.SGD(0.1, momentum=0.1) if driven else ok.optimizers.SGD(0.1, momentum=momentum)
    schedules = {"momentum": momentum, "weight_decay": lambda step: 0.01 * step}
    callbacks = [ScheduleHyperparameters(schedules)] if driven else []
    fit(linear_model(optimizer, dtype="float32"), x, y, *callbacks, TrainingMonitor(tmp_path, every=2), epochs=1)
    found = events(tmp_path)
    expected = [(step, pytest.approx(twin_of(momentum)(step - 1))) for step in (1, 2, 4, 6)]
    assert found["hyperparameters/momentum"] == expected
    assert "hyperparameters/weight_decay" not in found  # a function of the user's is not called once more
    assert "hyperparameters/learning_rate" not in found


class Estimates(keras.callbacks.Callback):
    """Notes, before each update, what `explain` shows; and after the last one."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        self.seen.append({row.group: row.estimate for row in self.model.optimizer.explain(self.model).rows})

    def on_train_end(self, logs=None):
        self.on_train_batch_begin(0)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("make", "of_next"),
    [
        (lambda: ok.optimizers.Prodigy(0.5, initial_d=1e-5, d_coef=5.0), True),  # which updates with the old d
        (lambda: ok.optimizers.DoG(0.5, initial_distance=0.1), False),
        (lambda: ok.optimizers.COCOB(0.5), False),
        (lambda: ok.optimizers.ScheduleFree(ok.optimizers.Prodigy(0.5, initial_d=1e-5)), True),
        (lambda: ok.optimizers.SAM(ok.optimizers.DoWG(0.5)), False),
    ],
    ids=["Prodigy", "DoG", "COCOB", "Schedule-Free", "SAM"],
)
def test_estimates_are_those_of_the_update_and_what_explain_shows(make, of_next, tmp_path):
    x, y = regression(dtype="float32")
    model, noted = linear_model(make(), dtype="float32"), Estimates()
    fit(model, x, y, noted, TrainingMonitor(tmp_path, every=1), epochs=1)
    found, shown = events(tmp_path), [seen[""] for seen in noted.seen]
    expected = shown[:-1] if of_next else shown[1:]
    assert len(set(expected)) > 1
    np.testing.assert_allclose([v for _, v in found["train/estimate"]], expected, rtol=1e-5)
    rates = [v for _, v in found["train/learning_rate"]]
    np.testing.assert_allclose([v for _, v in found["train/effective_rate"]], np.multiply(rates, expected), rtol=1e-5)


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
def test_estimates_of_groups_on_replicas_under_loss_scaling(tmp_path):
    x, y = regression(dtype="float32")
    group = ok.Group("kernel", rule=ok.optimizers.Prodigy(initial_d=1e-5, d_coef=50.0))
    with two_replicas().scope():
        optimizer = ok.optimizers.SGD(0.1, groups=[group])
        model = linear_model(STOCK.LossScaleOptimizer(optimizer, initial_scale=16.0), dtype="float32")
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    found = events(tmp_path)
    assert "train/estimate" not in found  # SGD has none
    assert found["train/estimate/group_1"][0] == (1, pytest.approx(1e-5))
    (row,) = optimizer.explain(model).rows
    assert row.estimate > found["train/estimate/group_1"][0][1]
    assert found["train/effective_rate/group_1"][0][1] == pytest.approx(1e-6)


def test_throughput_counts_batches_and_memory_is_there(tmp_path, monkeypatch):
    now = iter(range(0, 1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now)))
    x, y = regression(dtype="float32")
    fit(linear_model(STOCK.SGD(0.01), dtype="float32"), x, y, TrainingMonitor(tmp_path, every=2), epochs=1)
    found = events(tmp_path)
    updates, examples = dict(found["throughput/updates"]), dict(found["throughput/examples"])
    assert list(updates) == [2, 4, 6]
    assert examples == {step: pytest.approx(4 * rate) for step, rate in updates.items()}
    assert 10 < found["memory/process"][0][1] <= found["memory/process_peak"][0][1] + 1 < 1e6


# -- on request -------------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@on_tensorflow
@pytest.mark.parametrize("execution", ["graph", "xla", "eager"])
def test_activations(execution, tmp_path):
    x, y = images(8)
    model, weights = network(STOCK.SGD(0.1), **EXECUTION[execution]), Weights()
    model.layers[1].beta.assign([0.0, -100.0, 0.5])  # the second channel is dead after the ReLU
    monitor = TrainingMonitor(tmp_path, every=2, activations="relu|hidden", noise_scale=True)
    fit(model, x, y, monitor, weights, epochs=1, validation_data=(x, y))
    for variable, value in zip(model.variables, weights.noted[1], strict=True):
        variable.assign(value)
    relu = x[4:]
    for layer in model.layers[:3]:
        relu = layer(relu, **({"training": True} if layer.name == "norm" else {}))
    relu = ops.convert_to_numpy(relu)
    found = events(tmp_path)
    expected = {"mean": relu.mean(), "std": relu.std(), "zeros": np.mean(relu == 0), "dead": 1 / 3}
    for kind, value in expected.items():
        assert dict(found[f"activation_{kind}/relu"])[2] == pytest.approx(value, rel=1e-4), kind
    assert found["activation_dead/hidden"] == [(1, 0), (2, 0)]


@on_tensorflow
def test_units_are_not_dead_for_nan(tmp_path):
    """A ReLU makes 0 of NaN, on CPUs."""
    x, y = images(4)
    model = network(STOCK.SGD(0.1))
    model.get_layer("conv").kernel.assign(np.full((3, 3, 2, 3), np.nan))
    fit(model, x, y, TrainingMonitor(tmp_path, activations="conv|relu|out"), epochs=1)
    found = events(tmp_path)
    for tag in ("activation_dead/relu", "activation_zeros/relu", "activation_mean/conv", "activation_dead/out"):
        assert math.isnan(found[tag][0][1]), tag


@on_tensorflow
def test_noise_scale_is_that_of_the_two_norms(tmp_path):
    x, y = images()
    model, weights = network(STOCK.SGD(0.01)), Weights()
    fit(model, x, y, TrainingMonitor(tmp_path, noise_scale=True, every=1), weights, batch_size=8)
    norm = noise = None
    found = dict(events(tmp_path)["train/noise_scale"])
    for step in range(1, 7):
        i = (step - 1) * 8 % 24
        big, small = (
            sum(np.sum(g.astype("float64") ** 2) for g in gradient_at(model, weights.noted[step - 1], a, b))
            for a, b in ((x[i : i + 8], y[i : i + 8]), (x[i : i + 4], y[i : i + 4]))
        )
        new = (8 * big - 4 * small) / 4, (small - big) / (1 / 4 - 1 / 8)
        norm, noise = new if norm is None else (0.9 * norm + 0.1 * new[0], 0.9 * noise + 0.1 * new[1])
        assert found.get(step) == (pytest.approx(noise / norm, rel=1e-3) if norm > 0 else None)
    assert found


@on_tensorflow
def test_noise_scale_of_a_known_distribution(tmp_path):
    """Gradients in 100 dimensions with a squared mean of 4 and variance 1 in each: the noise scale is 100 / 4."""
    x = (0.2 + np.random.default_rng(0).normal(size=(6400, 100))).astype("float32")
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(1, use_bias=False)])
    model.compile(STOCK.SGD(0.0), loss=lambda _, p: ops.mean(p))
    fit(model, x, x[:, :1], TrainingMonitor(tmp_path, noise_scale=True, every=1), batch_size=64, epochs=1)
    values = [value for step, value in events(tmp_path)["train/noise_scale"] if step > 20]
    assert np.mean(values) == pytest.approx(25, rel=0.2)


@pytest.mark.only_on("jax", because="it is refused there")
@pytest.mark.parametrize("asked", [{"activations": "dense"}, {"noise_scale": True}])
def test_what_jax_cannot_give_is_refused(asked, tmp_path):
    x, y = regression(dtype="float32")
    with pytest.raises(RuntimeError, match=f"{next(iter(asked))} must be left out on the jax backend"):
        fit(linear_model("sgd", dtype="float32"), x, y, TrainingMonitor(tmp_path, **asked))


@pytest.mark.once
def test_histograms_of_weights(tmp_path):
    x, y = images(16)
    model = network(STOCK.SGD(0.01))
    fit(model, x, y, TrainingMonitor(tmp_path, histograms=2, every=1), epochs=1)
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from tensorboard.util import tensor_util

    read = EventAccumulator(str(tmp_path), size_guidance={TENSORS: 0})
    read.Reload()
    last = read.Tensors("weights/out/kernel")
    assert [event.step for event in last] == [2, 4]
    buckets = tensor_util.make_ndarray(last[1].tensor_proto)  # (left, right, count)
    kernel = model.get_layer("out").kernel.numpy()
    assert buckets[:, 2].sum() == kernel.size
    assert buckets[0, 0] == pytest.approx(kernel.min())
    assert buckets[-1, 1] == pytest.approx(kernel.max())


# -- training is not changed ------------------------------------------------------------------------------------------


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("execution", ["graph", "xla"])
def test_training_is_bitwise_what_it_is_without(execution, tmp_path):
    x, y = images()
    asked = {} if JAX else {"activations": ".", "noise_scale": True}
    ends = []
    for callbacks in ([], [TrainingMonitor(tmp_path, every=2, histograms=1, **asked)]):
        model = network(ok.optimizers.AdamW(0.01, global_clipnorm=1.0), metrics=["mae"], **EXECUTION[execution])
        history = fit(model, x, y, *callbacks).history
        ends.append([*model.get_weights(), *(v.numpy() for v in model.optimizer.variables), *history.values()])
    for a, b in zip(*ends, strict=True):
        np.testing.assert_array_equal(a, b)


def test_only_steps_that_are_written_compute(tmp_path, monkeypatch):
    """Eagerly, where every step runs the computations that it has."""
    x, y = regression(dtype="float32")
    computed, see_update = [], Probe._see_update

    def counted(probe, *args):
        computed.append(args)
        see_update(probe, *args)

    monkeypatch.setattr(Probe, "_see_update", counted)
    fit(linear_model(STOCK.SGD(0.01), dtype="float32", run_eagerly=True), x, y, TrainingMonitor(tmp_path, every=3))
    assert len(computed) == 6
    assert steps_of(events(tmp_path), "train/loss") == [1, 2, 3, 6, 9, 12]


# -- files ------------------------------------------------------------------------------------------------------------


def lines(directory):
    return [json.loads(line) for line in (directory / "monitor.jsonl").read_text().splitlines()]


def test_lines_hold_what_tensorboard_shows(tmp_path):
    x, y = regression(dtype="float32")
    fit(linear_model(STOCK.SGD(0.01), dtype="float32"), x, y, TrainingMonitor(tmp_path, every=4))
    found, read = events(tmp_path), ok.callbacks.read_monitor(tmp_path)
    steps = [(line["step"], line["epoch"]) for line in lines(tmp_path)]
    assert steps == [(1, 0), (2, 0), (4, 0), (6, 0), (8, 1), (12, 1), (12, 1)]
    assert set(read) == {tag for tag in found if not tag.startswith("log10_")}
    for tag, curve in read.items():
        assert curve.steps.tolist() == steps_of(found, tag)
        np.testing.assert_allclose(curve.values, [value for _, value in found[tag]], rtol=1e-6)


def test_a_torn_last_line_is_cut_off_and_a_foreign_one_refused(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    file = tmp_path / "monitor.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"step": 7, "epo')
    assert ok.callbacks.read_monitor(tmp_path)["train/loss"].steps.tolist() == [1, 2, 3, 4, 5, 6]
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    assert file.read_bytes().startswith(whole)
    assert ok.callbacks.read_monitor(tmp_path)["train/loss"].steps.tolist() == list(range(1, 13))
    file.write_bytes(b"something else\n" + whole)
    with pytest.raises(ValueError, match=r"monitor\.jsonl, line 1 is not a line of TrainingMonitor.*something else"):
        ok.callbacks.read_monitor(tmp_path)


def test_a_torn_event_file_is_continued(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    (file,) = tmp_path.glob("events*")
    file.write_bytes(file.read_bytes()[:-7])  # of the epoch's values
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    found = events(tmp_path)
    assert steps_of(found, "train/loss") == list(range(1, 13))
    assert steps_of(found, "epoch/loss") == [12]


def test_event_files_are_continued_from_their_last_step_whatever_their_names(tmp_path):
    """TensorBoard numbers the files of a process and second, without leading zeros."""
    x, y = regression(dtype="float32")
    model = linear_model(STOCK.SGD(0.01), dtype="float32")
    names = [tmp_path / f"events.out.tfevents.1.host.1.{number}" for number in (9, 10)]
    for name in names:
        fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
        (new,) = set(event_files(tmp_path)).difference(names)
        new.rename(name)
    (tmp_path / "monitor.jsonl").unlink()  # which has the steps as well
    files = TensorBoard()
    files.open(Opening(str(tmp_path)))
    files.close(failed=False)
    assert files.last_step(of_epoch=True) == files.last_step(of_epoch=False) == 12
    model.compile(STOCK.SGD(0.01), loss="mse")  # whose count begins at 0
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    assert steps_of(events(tmp_path), "train/loss") == list(range(1, 19))


def test_nothing_to_read_or_plot_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log_dir must be the directory of a TrainingMonitor.*monitor\.jsonl"):
        ok.callbacks.read_monitor(tmp_path)


def test_layers_are_charted_by_their_logarithms(tmp_path):
    """Of 0 there is none."""
    x, y = images(8)
    model = network(STOCK.SGD(0.01))
    model.get_layer("out").kernel.assign(np.zeros((4, 1)))
    fit(model, x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    found = events(tmp_path)
    assert dict(found["gradient_norm/conv"])[1] == 0
    assert found["log10_gradient_norm/conv"] == [
        (2, pytest.approx(math.log10(found["gradient_norm/conv"][1][1]), rel=1e-5))
    ]
    assert "log10_gradient_norm/conv" not in ok.callbacks.read_monitor(tmp_path)


def test_plot_draws_the_charts_of_the_layout(tmp_path):
    x, y = images(16)
    fit(network(STOCK.SGD(0.01)), x, y, TrainingMonitor(tmp_path, every=1), epochs=1)
    figure = ok.callbacks.plot_monitor(tmp_path)
    charts = {axes.get_title(): axes for axes in figure.axes}
    assert "training: loss" in charts
    assert "training: loss scale" not in charts
    drawn = {
        line.get_label(): line.get_ydata() for line in charts["layers: update-to-weight ratio by layer"].get_lines()
    }
    assert set(drawn) == {f"update_ratio/{name}" for name in LAYERS}
    chart = charts["layers: update-to-weight ratio by layer"]
    assert chart.get_yscale() == "log"
    assert [text.get_text() for text in chart.get_legend().get_texts()] == list(drawn)
    assert drawn["update_ratio/out"].tolist() == ok.callbacks.read_monitor(tmp_path)["update_ratio/out"].values.tolist()


def summaries(directory, plugin):
    """The summaries that a plugin of TensorBoard finds in the event files, in the order written."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    return [
        value
        for file in event_files(directory)
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == plugin
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("hparams", ["auto", {"width": 3, "kind": "plain", "deep": False}, None])
def test_layout_and_hparams_are_written_once(hparams, tmp_path):
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    x, y = regression(dtype="float32")
    model = linear_model(ok.optimizers.SGD(Linear(0.01, 9), momentum=0.5), dtype="float32")
    for _ in range(2):
        fit(model, x, y, TrainingMonitor(tmp_path, hparams=hparams, every=1))
    (layout,) = summaries(tmp_path, "custom_scalars")
    charts = [
        pattern
        for category in layout_pb2.Layout.FromString(layout.tensor.string_val[0]).category
        for chart in category.chart
        for pattern in chart.multiline.tag
    ]
    not_shown = ("hyperparameters/", "update_ratio/", "gradient_norm/", "weight_norm/")  # but their logarithms
    shown = [tag for tag in events(tmp_path) if not tag.startswith(not_shown)]
    assert all(any(re.match(pattern, tag) for pattern in charts) for tag in shown)
    written = summaries(tmp_path, "hparams")
    if hparams is None:
        assert written == []
        return
    content = plugin_data_pb2.HParamsPluginData.FromString(written[0].metadata.plugin_data.content)
    assert len(written) == 1
    table = content.session_start_info.hparams
    if hparams == "auto":
        assert table["optimizer"].string_value == "SGD"
        assert table["learning_rate"].string_value == "Linear"
        assert (table["momentum"].number_value, table["batch_size"].number_value) == (0.5, 4)
        assert table["epochs"].number_value == 2
    else:
        assert {name: getattr(v, v.WhichOneof("kind")) for name, v in table.items()} == hparams


# -- going on ---------------------------------------------------------------------------------------------------------


class Snapshot(keras.callbacks.Callback):
    """Keeps the state of a monitor, model and optimizer after one batch, or gives it back before the first."""

    def __init__(self, monitor, after=None, state=None):
        super().__init__()
        self.monitor, self.after, self.state = monitor, after, state

    def on_epoch_begin(self, epoch, logs=None):
        if self.state is not None and self.after is None:
            monitor, arrays = self.state
            self.monitor.load_state_dict(json.loads(monitor))
            for variable, array in zip([*self.model.variables, *self.model.optimizer.variables], arrays, strict=True):
                variable.assign(array)

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.after:
            variables = [*self.model.variables, *self.model.optimizer.variables]
            self.state = json.dumps(self.monitor.state_dict()), [ops.convert_to_numpy(v).copy() for v in variables]


def unmeasured(found):
    return {tag: pairs for tag, pairs in found.items() if not tag.startswith(("memory/", "throughput/"))}


@pytest.mark.long
@pytest.mark.parametrize(("every", "after"), [(2, 2), (2, 3), (3, 2)])
def test_steps_that_are_computed_again_are_not_written_again(every, after, tmp_path):
    """A run is resumed from a state before what its files hold, with the rest of the epoch's data, by a new monitor."""
    x, y = images(32)
    asked = {} if JAX else {"noise_scale": True}

    def compiled():
        return network(ok.optimizers.SGD(0.01, momentum=0.9, global_clipnorm=1.0))

    one = TrainingMonitor(tmp_path / "one", every=every, **asked)
    snapshot = Snapshot(one, after)
    fit(compiled(), x, y, one, snapshot, epochs=1)
    for name in ("killed", "lost"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    for file in (tmp_path / "lost").glob("*"):  # whose files were not on disk yet
        file.unlink()
    for name in ("killed", "lost"):
        again = TrainingMonitor(tmp_path / name, every=every, **asked)
        rest = 4 * (after + 1)
        fit(compiled(), x[rest:], y[rest:], again, Snapshot(again, state=snapshot.state), epochs=1)
    expected, killed, lost = (unmeasured(events(tmp_path / name)) for name in ("one", "killed", "lost"))
    assert killed == expected
    steps = steps_of(lost, "train/loss")
    assert steps == [step for step in steps_of(expected, "train/loss") if step > after + 1]
    for tag in set(expected) - {"epoch/loss"}:
        assert lost.get(tag, []) == [pair for pair in expected[tag] if pair[0] > after + 1], tag


def test_every_tag_rises_strictly(tmp_path):
    """Over fits, new callbacks, a new optimizer, and epochs without an update."""
    x = np.array([1, np.inf, 1, 1], "float32")[:, None]
    model = counting_model(ok.optimizers.LossScale(STOCK.SGD(0.125), initial_scale=8.0))
    monitor = TrainingMonitor(tmp_path, every=1)
    bad = np.full_like(x, np.inf)
    later = TrainingMonitor(tmp_path, every=1)
    for data, callback in ((x, monitor), (bad, monitor), (x, monitor), (bad, later)):
        fit(model, data, x, callback, batch_size=1)
    model.compile(STOCK.SGD(0.125), loss=lambda _, p: ops.mean(p))
    fit(model, x[2:], x[2:], later, batch_size=1)
    for tag, pairs in events(tmp_path).items():
        assert np.all(np.diff([step for step, _ in pairs]) > 0), tag
    assert len(events(tmp_path)["epoch/loss"]) == 10


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"log_dir": 3}, TypeError, "int"),
        ({"every": 0}, ValueError, "every.*at least 1.*0"),
        ({"histograms": 0}, ValueError, "histograms.*at least 1 or None.*0"),
        ({"activations": 3}, TypeError, "activations must be a regular expression.*3 of type int"),
        ({"activations": "("}, ValueError, r"activations must be a regular expression.*'\('"),
        ({"noise_scale": 1}, TypeError, "noise_scale must be True or False, got 1"),
        ({"hparams": 3}, TypeError, 'hparams must be "auto", None, or a dict.*3 of type int'),
        ({"hparams": {"a": None}}, TypeError, "hparams must be.*'a': None"),
    ],
)
def test_monitor_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        TrainingMonitor(**{"log_dir": "x"} | arguments)


@on_tensorflow
def test_what_cannot_be_had_is_refused_when_training_begins(tmp_path):
    x, y = regression(dtype="float32")
    model = linear_model("sgd", dtype="float32")
    with pytest.raises(
        ValueError, match=r"activations must match the path of a layer, got 'relu'\. The layers are dense"
    ):
        fit(model, x, y, TrainingMonitor(tmp_path, activations="relu", every=1))

    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    own = Own(model.layers)
    own.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match="noise_scale must be False for Own, which has a train_step of its own"):
        fit(own, x, y, TrainingMonitor(tmp_path, noise_scale=True, every=1))
    assert not {"train_step", "make_train_function"} & set(vars(own))


@pytest.mark.long
@on_tensorflow
def test_the_benchmark_shows_every_alternative(monkeypatch, request, capsys):
    monkeypatch.syspath_prepend(request.config.rootpath / "examples" / "benchmarks")
    bench = importlib.import_module("monitor_overhead")

    def small(size):
        layers = [keras.Input((size, size, 3)), keras.layers.Conv2D(2, 3), keras.layers.ReLU(name="relu")]
        return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])

    monkeypatch.setattr(bench, "network", small)
    bench.main(["--every", "2", "--batch", "3", "--size", "32", "--rounds", "2"])
    printed = capsys.readouterr().out
    rows = re.findall(r"│ ([^│]+?) +│ +(-?[\d.]+) │ +([\d.]+) │ +([\d.]+) \[.*?\] │ +([\d.]+) \[.*?\] │", printed)
    monitors, tapes = ["monitor", "monitor, on request"], ["second tape", "second tape, eager"]
    assert [row[0] for row in rows] == ["plain", "plain, again", *monitors, *tapes]
    assert rows[0][3:] == ("1.000", "1.000")
    with pytest.raises(SystemExit):
        bench.main(["--every", "0"])
    assert "must be at least 1" in capsys.readouterr().err

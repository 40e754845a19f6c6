"""A look at a model: each rule by itself, what is measured of all kinds of models, and that nothing is changed."""

import json
import random

import inspect_cases
import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_optkit as ok
from keras_optkit.advice import KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport, findings
from keras_optkit.private import global_seed

ON_JAX = keras.config.backend() == "jax"
KERNEL = KernelReport("kernel", (50, 50), 50, 50, std=0.2, asked=0.2, low=0.14, high=0.2, key="1")
HEALTHY = LayerReport("a", "Dense", "relu", kernels=(KERNEL,), std=1.0, input_rms=1.0, input_mean=0.0)


def kernel(**changes):
    return KernelReport(**{**vars(KERNEL), **changes})


def layer(path="a", **changes):
    return LayerReport(**{**vars(HEALTHY), "path": path, **changes})


def model_of(*found, **given):
    return ModelReport(found, **given)


def output(**given):
    return ModelReport((), outputs=(OutputReport(**given),))


SPARSE = {"loss": "sparse_categorical_crossentropy", "units": 3, "range": (-1.0, 1.0), "from_logits": True}
BINARY = {"loss": "binary_crossentropy", "units": 1, "range": (0.2, 0.8), "from_logits": False, "activation": "sigmoid"}
UPDATE = {"optimizer": ("Adam",), "rate": 1e-3, "size": 1.0, "spread": 1.0}


def updated(ratio, **given):
    return model_of(layer(update_ratio=ratio), update=UpdateReport(**{**UPDATE, **given}), loss_value=1.0)


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        ("output_and_loss", output(**{**SPARSE, "is_distribution": True})),
        ("output_and_loss", output(**{**SPARSE, "from_logits": False})),
        ("output_and_loss", output(**{**SPARSE, "activation": "relu"})),
        ("output_and_loss", output(**{**BINARY, "from_logits": True})),
        ("output_and_loss", output(**{**BINARY, "from_logits": True, "activation": None})),
        ("output_and_loss", output(**{**BINARY, "activation": "softmax"})),
        ("output_and_loss", output(**{**BINARY, "loss": "categorical_crossentropy"})),
        ("labels", output(**SPARSE, label_range=(1.0, 3.0), labels_are_whole=True)),
        ("labels", output(**SPARSE, label_range=(0.0, 1.5), labels_are_whole=False)),
        ("labels", output(**BINARY, label_range=(-1.0, 1.0))),
        (
            "labels",
            output(**{**SPARSE, "loss": "categorical_crossentropy"}, label_range=(0.0, 1.0), labels_add_up=False),
        ),
        ("labels", output(loss="mean_squared_error", activation="sigmoid", label_range=(0.0, 7.0))),
        ("labels", output(loss="mean_squared_error", label_range=(0.0, float("nan")))),
        ("labels", ModelReport((), problem="ValueError: shapes")),
        ("unscaled_inputs", model_of(layer(sees_input=True, input_rms=150.0, input_mean=130.0))),
        ("unscaled_inputs", model_of(layer(sees_input=True, input_rms=1e-4))),
        ("unscaled_inputs", model_of(layer(sees_input=True, input_rms=0.0))),
        ("unscaled_inputs", model_of(layer(sees_input=True, input_rms=float("nan")))),
        ("identical_layers", model_of(HEALTHY, layer("b"))),
        ("frozen", model_of(HEALTHY, layer("b", trainable=False, behind_trained=True, kernels=(kernel(key="2"),)))),
        ("frozen", model_of(layer(trainable=False))),
        ("kernel_scale", model_of(layer(kernels=(kernel(std=0.6),)))),
        ("kernel_scale", model_of(layer(kernels=(kernel(std=0.008),)))),
        ("kernel_scale", model_of(layer(kernels=(kernel(std=0.0),)), layer("b", kernels=(), input_differs=False))),
        ("kernel_scale", model_of(layer(kernels=(kernel(std=0.0, mean=0.1),)))),
        ("update_size", updated(0.5)),
        ("update_size", updated(1e-4)),
        ("update_size", model_of(layer(update_ratio=0.0, gradient_norm=1.0), update=UpdateReport(**UPDATE))),
        ("update_size", updated(0.05, loss_after=50.0)),
        ("update_size", updated(1e-5, size=1e-3, loss_after=0.9999)),
        ("update_size", updated(0.05, optimizer=("Lion",))),
        ("dead_units", model_of(layer(dead=0.6, always_active=0.1))),
        (
            "dead_units",
            model_of(
                HEALTHY, layer("b", dead=1.0, std=0.0, kernels=()), layer("c", std=1e-9, kernels=(kernel(key="2"),))
            ),
        ),
        ("saturation", model_of(layer(activation="tanh", saturated=0.6))),
        ("growth", model_of(HEALTHY, layer("b", std=2e2, kernels=()))),
        ("growth", model_of(HEALTHY, layer("b", std=float("inf"), kernels=()))),
        ("vanishing", model_of(HEALTHY, layer("b", std=1e-5, kernels=(kernel(key="2"),)))),
        (
            "vanishing_gradient",
            model_of(layer(gradient_norm=1e-7), layer("b", kernels=(kernel(key="2"),), gradient_norm=0.1)),
        ),
        ("loss_value", ModelReport((), loss_value=float("nan"))),
        ("missing_gradient", model_of(layer(has_gradient=False, gradient_norm=1.0))),
        ("missing_gradient", model_of(layer(has_gradient=True, has_zero_gradient=True, gradient_norm=0.0))),
        ("missing_gradient", model_of(layer(has_gradient=True, gradient_norm=float("nan")))),
        ("missing_gradient", model_of(layer(has_gradient=True, was_called=False))),
        ("output_bias", output(**SPARSE, frequencies=(0.9, 0.1), predicted=(0.1, 0.9), by_bias=(0.1, 0.9))),
        ("output_bias", output(**BINARY, frequencies=(0.5,), predicted=(0.01,), by_bias=(0.01,))),
        ("l2_and_adaptive", ModelReport((), update=UpdateReport(**UPDATE), penalized=("a/kernel",))),
        ("decay_on_vectors", ModelReport((), update=UpdateReport(**UPDATE, decayed_vectors=("a/bias",)))),
        ("bias_before_batch_norm", model_of(layer(feeds_batch_norm=True, has_bias=True))),
    ],
)
def test_rule_names_its_cause(rule, model):
    found = findings(model)
    assert [each.rule for each in found] == [rule]
    assert found[0].reason.endswith(".")
    assert found[0].fix.endswith(".")
    assert found[0].is_hint == (rule in ("decay_on_vectors", "bias_before_batch_norm"))


@pytest.mark.parametrize(
    "model",
    [
        model_of(layer(sees_input=True), update=UpdateReport(**UPDATE)),
        output(**SPARSE, label_range=(0.0, 2.0), labels_are_whole=True),
        output(**BINARY, label_range=(0.0, 1.0)),
        # a rate that begins low, one that is found, steps in proportion to the gradient
        updated(1e-6, rate_ahead=1e3),
        updated(1e-6, finds_rate=True),
        updated(1e-3, size=1e-2),
        updated(1e-5, size=1e-2, loss_after=0.99),
        updated(0.5, spread=9.0),
        # a frozen start, and a frozen model behind a trained one
        model_of(layer(trainable=False, behind_trained=False), layer("b", kernels=(kernel(key="2"),))),
        model_of(
            HEALTHY,
            *(layer(p, trainable=False, behind_trained=True, kernels=(kernel(key=p),)) for p in ("b", "c")),
        ),
        # zeros that end a residual branch, and what has no gradient before them
        model_of(
            layer(kernels=(kernel(std=0.0, key=None),), has_gradient=True, has_zero_gradient=True, gradient_norm=0.0),
            layer("b", kernels=(), input_differs=True),
            zero_factors=("a/kernel",),
        ),
        model_of(HEALTHY, layer("scale", std=1e-6, kernels=()), layer("b", is_output=True, std=1e-5, kernels=())),
        # alike examples in a deep network, centred pixels before a normalization, identities, a small last kernel
        model_of(layer(dead=0.55, always_active=0.45)),
        model_of(layer(sees_input=True, input_rms=70.0, input_mean=5.0, feeds_norm=True)),
        model_of(layer(kernels=(kernel(key=None),)), layer("b", kernels=(kernel(key=None),))),
        model_of(layer(is_output=True, kernels=(kernel(std=1e-3),))),
        # a third of the kernels made smaller for depth
        model_of(*(layer(str(i), kernels=(kernel(key=str(i), std=0.02 if i % 3 else 0.2),)) for i in range(6))),
        # a bias that trained weights make up for
        output(**SPARSE, frequencies=(0.9, 0.1), predicted=(0.9, 0.1), by_bias=(0.1, 0.9)),
    ],
)
def test_nothing_is_found_in_healthy_measurements(model):
    assert findings(model) == []


# -- nothing is changed -----------------------------------------------------------------------------------------------


def state_of(model):
    optimizer = model.optimizer
    variables = [*model.variables, *optimizer.variables, *model.metrics_variables]
    arrays = [np.array(ops.convert_to_numpy(v)) for v in variables]
    return arrays, random.getstate(), np.random.get_state()[1].copy(), global_seed(), optimizer.built, model.losses


def assert_as_before(model, look):
    before, calls = state_of(model), [each.call for each in model.layers]
    result = look()
    after = state_of(model)
    assert len(after[0]) == len(before[0])
    for a, b in zip(after[0], before[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert after[1] == before[1]
    np.testing.assert_array_equal(after[2], before[2])
    np.testing.assert_array_equal(after[3], before[3])
    assert after[4] == before[4]
    assert [each.call for each in model.layers] == calls
    return result


class Noisy(layers.Layer):
    """Draws from all generators there are, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.seed = keras.random.SeedGenerator(1)
        self.count = self.add_weight(initializer="zeros", trainable=False, name="count")

    def call(self, x):
        self.count.assign_add(1.0)
        # JAX refuses to draw without a seed while shapes are inferred
        drawn = keras.random.normal(ops.shape(x), seed=self.seed if ON_JAX else None)
        return x + 1e-3 * (drawn + random.random() + np.random.normal())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("optimizer", ["Adam", "ScheduleFreeAdamW"])
def test_everything_is_as_before(trained, optimizer):
    parts = [layers.Dense(8, "relu"), layers.BatchNormalization(), Noisy(), layers.Dropout(0.5), layers.Dense(1)]
    model = keras.Sequential([keras.Input((5,)), *parts])
    owner = keras.optimizers if optimizer == "Adam" else ok.optimizers
    model.compile(getattr(owner, optimizer)(1e-2), "mse", metrics=["mae"], run_eagerly=True)
    x, y = np.random.default_rng(0).normal(size=(16, 5)).astype("float32"), np.ones((16, 1), "float32")
    if trained:
        model.fit(x, y, verbose=0)
    else:
        keras.random.normal((1,))  # there is a global generator
    report = assert_as_before(model, lambda: ok.inspect(model, x, y))
    assert report.model.update.loss_after != report.model.loss_value
    assert report.unmeasured == ()
    if trained and optimizer == "Adam":  # the next step is the one that it would have been
        again = ok.inspect(model, x, y)
        assert again.to_dict() == report.to_dict()


def test_what_fails_leaves_everything_as_before():
    class Fails(layers.Layer):
        fails = False

        def call(self, x):
            if self.fails:
                raise RuntimeError("in the middle")
            return x

    last = Fails()
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.BatchNormalization(), last])
    model.compile("adam", "mse")
    last.fails = True

    def look():
        with pytest.raises(RuntimeError, match="in the middle"):
            ok.inspect(model, np.ones((8, 3), "float32"), np.ones((8, 4), "float32"))

    assert_as_before(model, look)


# -- what is measured -------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_numpy():
    dense = layers.Dense(3, "tanh")
    model = keras.Sequential([keras.Input((4,)), dense])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x, y = np.random.default_rng(1).normal(size=(10, 4)).astype("float32"), np.zeros((10, 3), "float32")
    report = ok.inspect(model, x, y)
    found = report.model.layers[0]
    w = np.array(ops.convert_to_numpy(dense.kernel), "float64")
    out = np.tanh(x @ w)
    back = 2 * out * (1 - out**2) / out.size
    gradient, bias = x.T @ back, back.sum(0)
    assert found.mean == pytest.approx(out.mean(), rel=1e-5)
    assert found.std == pytest.approx(out.std(), rel=1e-5)
    assert found.saturated == pytest.approx(np.mean(np.abs(out) > 0.99))
    assert found.input_rms == pytest.approx(np.sqrt(np.mean(x**2)), rel=1e-5)
    assert (found.kernel.fan_in, found.kernel.fan_out) == (4, 3)
    assert found.kernel.std == pytest.approx(w.std(), rel=1e-6)
    assert found.kernel.asked == pytest.approx(5 / 3 / 2)
    assert found.gradient_norm == pytest.approx(np.sqrt((gradient**2).sum() + (bias**2).sum()), rel=1e-5)
    assert found.update_ratio == pytest.approx(0.5 * np.linalg.norm(gradient) / np.linalg.norm(w), rel=1e-4)
    assert report.model.loss_value == pytest.approx((out**2).mean(), rel=1e-5)
    after = np.tanh(x @ (w - 0.5 * gradient) - 0.5 * bias)
    assert report.model.update.loss_after == pytest.approx((after**2).mean(), rel=1e-4)
    assert report.model.update.rate == 0.5


def two_outputs():
    numbers, words = keras.Input((6,), name="numbers"), keras.Input((4,), name="words")
    body = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, "relu", kernel_regularizer="l2", name="dense")], name="body"
    )
    x = layers.Concatenate()([body(numbers), layers.Flatten()(layers.Embedding(10, 4, name="embedding")(words))])
    outputs = [layers.Dense(3, "softmax", name="kind")(x), layers.Dense(1, name="size")(x)]
    model = keras.Model({"numbers": numbers, "words": words}, outputs)
    losses = {"kind": "sparse_categorical_crossentropy", "size": "mse"}
    model.compile("sgd", losses, loss_weights={"kind": 1.0, "size": 0.5}, metrics={"kind": "accuracy"})
    rng = np.random.default_rng(0)
    x = {"numbers": rng.normal(size=(16, 6)), "words": rng.integers(0, 10, (16, 4))}
    return model, x, {"kind": rng.integers(0, 3, 16), "size": rng.normal(size=16)}


def test_inputs_and_outputs_of_all_forms_and_the_loss_of_keras():
    model, x, y = two_outputs()
    report = assert_as_before(model, lambda: ok.inspect(model, x, y))  # 64-bit labels, also on JAX
    found = {each.path: each for each in report.model.layers}
    assert set(found) == {"body/dense", "embedding", "kind", "size"}
    assert [(each.name, each.loss) for each in report.model.outputs] == [
        ("kind", "sparse_categorical_crossentropy"),
        ("size", "mean_squared_error"),
    ]
    assert report.model.outputs[0].frequencies == pytest.approx((np.bincount(y["kind"], minlength=3) + 1) / 19)
    assert {path for path, each in found.items() if each.is_output} == {"kind", "size"}
    assert report.model.penalized == ("body/dense/kernel",)
    as_list = {name: np.asarray(value, "float32") for name, value in x.items()}
    wanted = model.evaluate(as_list, [np.int32(y["kind"]), np.float32(y["size"])], verbose=0, return_dict=True)["loss"]
    assert report.model.loss_value == pytest.approx(wanted, rel=1e-5)


class Own(keras.Model):
    def __init__(self):
        super().__init__()
        self.blocks = [[layers.Dense(4, "silu"), layers.Dense(4)] for _ in range(2)]
        self.scale = self.add_weight(shape=(4,), initializer="ones", name="scale")

    def call(self, x):
        for first, second in self.blocks:
            x = x + second(first(x))
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x * self.scale


def test_subclassed_model_with_a_loss_of_its_own():
    model = Own()
    x, y = np.random.default_rng(0).normal(size=(8, 4)).astype("float32"), np.zeros((8, 4), "float32")
    out = np.array(model(x))
    model.compile("sgd", "mse")
    report = assert_as_before(model, lambda: ok.inspect(model, x, y))
    assert len({each.path for each in report.model.layers}) == len(report.model.layers) == 4
    assert all(each.gradient_norm > 0 for each in report.model.layers)
    assert report.model.loss_value == pytest.approx(1.1 * (out**2).mean(), rel=1e-5)
    assert report.warnings == ()


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(16, "relu"), layers.Dense(3, "softmax")])
    model.compile(keras.optimizers.Adam(1e-3), "categorical_crossentropy")
    x, y = (
        np.random.default_rng(0).normal(size=(32, 6)).astype("float32"),
        np.eye(3, dtype="float32")[np.arange(32) % 3],
    )
    report = assert_as_before(model, lambda: ok.inspect(model, x, y))
    assert report.warnings == ()
    assert report.unmeasured == ()
    assert 1e-3 < report.model.layers[0].update_ratio < 1e-2
    assert "Adam" in report.model.update.optimizer


def dense_model(optimizer, x, **compiled):
    model = keras.Sequential([keras.Input((x.shape[1],)), layers.Dense(16, "relu"), layers.Dense(1)])
    model.compile(optimizer, "mse", **compiled)
    return model


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: ok.optimizers.SAM("SGD", learning_rate=0.1), None),
        (lambda: ok.optimizers.AdamW(1e-3, gradient_accumulation_steps=3), 1.0),
        (lambda: ok.optimizers.Lion(1e-3, groups=[ok.Group("^dense", lr_scale=0.1)]), 0.1),
        (lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2), 1.0),
        (lambda: ok.optimizers.Prodigy(), None),
        (lambda: ok.optimizers.Muon(1e-3), None),
    ],
    ids=["SAM", "accumulation", "groups", "Keras's accumulation", "Prodigy", "Muon"],
)
def test_updates_of_other_optimizers(make, size):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8)).astype("float32"), rng.normal(size=32).astype("float32")
    model = dense_model(make(), x)
    names = [each.name for each in model.layers]
    if "groups" in str(size):
        assert names
    report = assert_as_before(model, lambda: ok.inspect(model, x, y))
    assert report.unmeasured == ()
    assert all(each.update_ratio > 0 for each in report.model.layers)
    if size is not None:
        assert report.model.update.size == pytest.approx(size, rel=0.1)
    assert report.warnings == () or type(model.optimizer).__name__ == "Lion"


def test_sam_is_measured_with_its_second_gradient():
    x, y = np.random.default_rng(0).normal(size=(32, 8)).astype("float32"), np.ones((32, 1), "float32")
    model = dense_model(ok.optimizers.SAM("SGD", learning_rate=0.1, rho=0.5), x)
    report = ok.inspect(model, x, y)
    before = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]
    model.train_on_batch(x, y)
    after = [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]
    ratios = [np.linalg.norm(after[i] - before[i]) / np.linalg.norm(before[i]) for i in (0, 2)]
    assert [each.update_ratio for each in report.model.layers] == pytest.approx(ratios, rel=1e-4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ok.optimizers.SophiaH(1e-3), "SophiaH needs products with the Hessian"),
        (lambda: keras.optimizers.SGD(0.0), "the learning rate is 0 in this step"),
        (lambda: None, "the model is not compiled"),
    ],
)
def test_what_cannot_be_measured_is_said(make, said):
    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    optimizer = make()
    model = dense_model(optimizer, x) if optimizer else keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    report = ok.inspect(model, x, np.ones((16, 1), "float32"), loss="mse")
    assert any(said in each for each in report.unmeasured)
    assert f"Not measured: {report.unmeasured[0]}" in str(report)
    assert all(each.update_ratio is None and each.gradient_norm > 0 for each in report.model.layers)


def test_recurrent_and_repeated_layers_and_loops():
    class Loop(layers.Layer):
        def __init__(self):
            super().__init__()
            self.inner = layers.Dense(4, "tanh", name="inner")

        def build(self, shape):
            self.inner.build(shape)

        def call(self, x):
            # the body is compiled by itself, so that nothing in it can be read
            if ON_JAX:
                import jax

                return jax.jit(self.inner)(x)
            import tensorflow as tf

            return tf.function(self.inner)(x)

        def compute_output_shape(self, shape):
            return shape

    parts = [layers.TimeDistributed(layers.Dense(4, "relu")), layers.Bidirectional(layers.LSTM(2)), Loop()]
    model = keras.Sequential([keras.Input((3, 5)), *parts, layers.Dense(1)])
    model.compile("adam", "mse")
    x = np.random.default_rng(0).normal(size=(16, 3, 5)).astype("float32")
    report = ok.inspect(model, x, np.zeros((16, 1), "float32"))
    found = {each.path: each for each in report.model.layers}
    lstm = next(each for path, each in found.items() if "forward" in path)
    assert [each.name for each in lstm.kernels] == ["kernel", "recurrent_kernel"]
    assert (lstm.kernel.fan_in, lstm.kernel.fan_out) == (4, 2)
    assert lstm.gradient_norm > 0
    assert all(each.std is not None for path, each in found.items() if "inner" not in path)
    assert any("inner" in each and "compiled function" in each for each in report.unmeasured)


@pytest.mark.parametrize(
    ("units", "loss", "y", "said"),
    [
        (3, "categorical_crossentropy", np.arange(8) % 3, "labels that add up to 1"),
        (3, "sparse_categorical_crossentropy", np.arange(8) % 3 + 1, "whole labels from 0 to 2"),
        (1, "binary_crossentropy", np.arange(8) % 2 * 2.0 - 1, "labels from 0 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_told(units, loss, y, said):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, "softmax" if units > 1 else "sigmoid")])
    model.compile("adam", loss)
    report = ok.inspect(model, np.random.default_rng(0).normal(size=(8, 4)), y)
    assert report.warnings[0].rule == "labels"
    assert said in report.warnings[0].reason


def test_labels_of_an_ignored_class_do_not_count():
    model = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(3, 1)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255))
    y = np.arange(8 * 16).reshape(8, 4, 4) % 3
    y[:, 0] = 255
    report = ok.inspect(model, np.random.default_rng(0).normal(size=(8, 4, 4, 2)), y)
    assert report.warnings == ()
    assert report.model.outputs[0].label_range == (0, 2)


def test_weight_decay_on_biases_and_bias_before_batch_normalization_are_hints():
    x, y = np.random.default_rng(0).normal(size=(32, 4)).astype("float32"), np.ones((32, 1), "float32")
    found = {}
    for name, optimizer in {"keras": keras.optimizers.AdamW(1e-3), "ours": ok.optimizers.AdamW(1e-3)}.items():
        parts = [layers.Dense(8), layers.BatchNormalization(), layers.Dense(1)]
        model = keras.Sequential([keras.Input((4,)), *parts])
        model.compile(optimizer, "mse")
        report = ok.inspect(model, x, y)
        assert report.warnings == ()
        found[name] = [each.rule for each in report.hints]
    assert found == {"keras": ["decay_on_vectors", "bias_before_batch_norm"], "ours": ["bias_before_batch_norm"]}
    spared = keras.optimizers.AdamW(1e-3)
    spared.exclude_from_weight_decay(var_names=["bias"])
    assert [each.rule for each in ok.inspect(dense_model(spared, x), x, y).hints] == []


# -- the report -------------------------------------------------------------------------------------------------------


def test_report_prints_and_plots_and_goes_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    x = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
    report = ok.inspect(dense_model("adam", x), 255 * x, np.ones((16, 1), "float32"))
    assert str(report).splitlines()[0].split()[:3] == ["layer", "kind", "activation"]
    assert "1. unscaled_inputs (x)" in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["warnings"][0]["rule"] == "unscaled_inputs"
    figure = report.plot()
    assert [axis.get_lines()[0].get_label() for axis in figure.axes] == [
        *("kernel std", "activation std", "gradient norm", "update-to-weight ratio")
    ]
    assert list(figure.axes[3].get_lines()[0].get_xdata()) == [each.update_ratio for each in report.model.layers]
    report.to_tensorboard(tmp_path / "run", step=3)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    text, image = events.Tensors("inspect/report")[0], events.Tensors("inspect/layers")[0]
    assert text.step == image.step == 3
    assert b"unscaled_inputs" in text.tensor_proto.string_val[0]
    assert image.tensor_proto.string_val[2].startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="step must be an integer at least 0, got -1"):
        report.to_tensorboard(tmp_path, step=-1)


def test_without_labels_there_is_a_forward_pass_only():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    report = ok.inspect(model, np.ones((2, 4), "float32"))
    assert report.model.layers[0].std is not None
    assert report.model.layers[0].gradient_norm is None
    assert [each.split(":")[0] for each in report.unmeasured] == ["Loss and gradients", "Updates"]
    assert report.to_dict()["model"]["loss_value"] is None


def test_bad_arguments():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    x = np.ones((2, 4), "float32")
    with pytest.raises(TypeError, match=r"model must be a keras.Model, got 3 of type int\."):
        ok.inspect(3, x)
    with pytest.raises(ValueError, match=r"which is not. Call it on a batch"):
        ok.inspect(keras.Sequential([layers.Dense(3)]), x)
    with pytest.raises(ValueError, match="loss must be given"):
        ok.inspect(model, x, np.ones((2, 3), "float32"))
    with pytest.raises(ValueError, match=r"batch must hold at least one example, got arrays of \(0, 4\)\."):
        ok.inspect(model, x[:0])


# -- cases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dead ReLUs", "missing gradient", "frozen by mistake"])
def test_broken_models(how):
    found, _ = inspect_cases.first("mlp", inspect_cases.WAYS[how][0])
    assert found in inspect_cases.BROKEN[how]


@pytest.mark.long
@pytest.mark.parametrize("kind", inspect_cases.KINDS)
def test_all_broken_models(kind):
    found = {how: inspect_cases.first(kind, ways[0])[0] for how, ways in inspect_cases.WAYS.items()}
    assert {how: rule for how, rule in found.items() if rule not in inspect_cases.BROKEN[how]} == {}


@pytest.mark.parametrize("name", ["residual net", pytest.param("transformer with warm-up", marks=pytest.mark.long)])
def test_healthy_models(name):
    report = ok.inspect(*inspect_cases.HEALTHY[name](np.random.default_rng(0)))
    assert report.warnings == ()


def test_state_that_is_no_kernel_is_not_frozen():
    wrapped = ok.layers.SpectralNormalization(layers.Dense(16, "relu"), seed=1)
    model = keras.Sequential([keras.Input((20,)), layers.Dense(16, "relu"), wrapped, layers.Dense(4)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(32, 20)).astype("float32")
    assert ok.inspect(model, x, np.arange(32, dtype="int32") % 4).warnings == ()

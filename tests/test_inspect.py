"""A look at a model: each rule by itself, what is measured, and that nothing is changed."""

import random

import inspect_cases
import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_optkit.inspection import LayerReport, ModelReport, inspect, rules
from keras_optkit.private import global_seed

HEALTHY = LayerReport("a", "Dense", "relu", fan_in=50, fan_out=50, kernel_std=0.2, kernel_key="1", std=1.0)


def model_of(**changes):
    return ModelReport((LayerReport(**{**vars(HEALTHY), **changes}),))


@pytest.mark.parametrize(
    ("rule", "model"),
    [
        ("output_and_loss", ModelReport((), loss="binary_crossentropy", from_logits=True, output_activation="sigmoid")),
        ("output_and_loss", ModelReport((), loss="binary_crossentropy", from_logits=False, output_activation="linear")),
        ("labels", ModelReport((), loss="sparse_categorical_crossentropy", classes=3, label_range=(1.0, 3.0))),
        ("labels", ModelReport((), loss="binary_crossentropy", classes=1, label_range=(-1.0, 1.0))),
        ("unscaled_inputs", ModelReport((), input_scale=150.0)),
        ("unscaled_inputs", ModelReport((), input_scale=float("nan"))),
        ("identical_layers", ModelReport((HEALTHY, HEALTHY))),
        ("frozen", ModelReport((HEALTHY, LayerReport("b", "Dense", trainable=False, kernel_std=0.2)))),
        ("kernel_scale", model_of(kernel_std=1.0)),
        ("kernel_scale", model_of(kernel_std=0.0)),
        ("update_size", model_of(update_ratio=0.5)),
        ("update_size", model_of(update_ratio=1e-8)),
        ("dead_units", model_of(dead=0.6)),
        ("saturation", model_of(activation="tanh", saturated=0.6)),
        ("growth", ModelReport((HEALTHY, LayerReport("b", "Dense", std=2e3)))),
        ("missing_gradient", model_of(gradient_norm=0.0)),
        ("missing_gradient", model_of(gradient_norm=float("nan"))),
        ("output_bias", ModelReport((), frequencies=(0.5, 0.5), predicted=(1.0, 1e-9))),
        ("l2_and_adaptive", ModelReport((), optimizer="Adam", has_l2=True)),
        ("bias_before_batch_norm", model_of(activation="linear", feeds_batch_norm=True, has_bias=True)),
    ],
)
def test_rule_names_its_cause(rule, model):
    found = rules.findings(model)
    assert [each.rule for each in found] == [rule]
    assert found[0].reason.endswith(".")
    assert found[0].fix.endswith(".")


def test_nothing_is_found_in_healthy_measurements():
    assert rules.findings(ModelReport((HEALTHY,), input_scale=1.0, optimizer="Adam")) == []


def numbers(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


@pytest.mark.parametrize("trained", [False, True])
def test_everything_is_as_before(trained):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), layers.Dense(1)]
    )
    model.compile(keras.optimizers.Adam(), "mse", metrics=["mae"])
    x, y = np.random.default_rng(0).normal(size=(16, 5)).astype("float32"), np.ones((16, 1), "float32")
    if trained:
        model.fit(x, y, verbose=0)

    def state():
        of_all = numbers([*model.variables, *model.optimizer.variables, *model.metrics_variables])
        return of_all, random.getstate(), np.random.get_state()[1].copy(), global_seed()

    before = state()
    calls = [layer.call for layer in model.layers]
    report = inspect(model, x, y)
    after = state()
    assert len(after[0]) == len(before[0])
    for a, b in zip(after[0], before[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert after[1] == before[1]
    np.testing.assert_array_equal(after[2], before[2])
    np.testing.assert_array_equal(after[3], before[3])
    assert model.optimizer.built == trained
    assert [layer.call for layer in model.layers] == calls
    assert {each.gradient_norm is not None for each in report.model.layers} == {True}


def test_numbers_are_those_of_numpy():
    keras.utils.set_random_seed(2)
    dense = layers.Dense(3, "tanh")
    model = keras.Sequential([keras.Input((4,)), dense])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x, y = np.random.default_rng(1).normal(size=(10, 4)).astype("float32"), np.zeros((10, 3), "float32")
    found = inspect(model, x, y).model.layers[0]
    w = np.array(ops.convert_to_numpy(dense.kernel), "float64")
    out = np.tanh(x @ w)
    back = 2 * out * (1 - out**2) / out.size
    gradient, bias = x.T @ back, back.sum(0)
    assert found.mean == pytest.approx(out.mean(), rel=1e-5)
    assert found.std == pytest.approx(out.std(), rel=1e-5)
    assert found.saturated == pytest.approx(np.mean(np.abs(out) > 0.99))
    assert found.kernel_std == pytest.approx(w.std(), rel=1e-6)
    assert (found.fan_in, found.fan_out) == (4, 3)
    assert found.gradient_norm == pytest.approx(np.sqrt((gradient**2).sum() + (bias**2).sum()), rel=1e-5)
    assert found.update_ratio == pytest.approx(0.5 * np.linalg.norm(gradient) / np.linalg.norm(w), rel=1e-4)


def test_without_labels_there_is_a_forward_pass_only():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    report = inspect(model, np.ones((2, 4), "float32"))
    assert report.model.layers[0].gradient_norm is None
    assert "no update ratios" in str(report)
    assert report.to_dict()["model"]["loss_value"] is None


def test_bad_arguments():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    x = np.ones((2, 4), "float32")
    with pytest.raises(TypeError, match=r"model must be a keras.Model, got 3"):
        inspect(3, x)
    with pytest.raises(ValueError, match=r"which is not. Call it on a batch"):
        inspect(keras.Sequential([layers.Dense(3)]), x)
    with pytest.raises(ValueError, match="loss must be given"):
        inspect(model, x, np.ones((2, 3), "float32"))


@pytest.mark.parametrize("how", ["dead ReLUs", "missing gradient", "unscaled inputs"])
def test_broken_models(how):
    assert inspect_cases.first("mlp", how) in inspect_cases.BROKEN[how]

"""zero_residual: blocks that begin as the identity, and nothing else that is changed."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_optkit as ok
from keras_optkit.initializers import zero_residual


def block(x, units, *after, name):
    y = layers.Dense(2 * units, activation="relu", name=f"{name}_in")(x)
    y = layers.Dense(units, name=f"{name}_out", bias_initializer="ones")(y)
    for layer in after:
        y = layer(y)
    return layers.Add()([x, y])


def functional(body, width=6):
    x = keras.Input((width,))
    return keras.Model(x, body(x))


def assert_identity(model, shape=(4, 6)):
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    np.testing.assert_array_equal(model(x), x)


def test_blocks_begin_as_the_identity_and_the_rest_stays():
    drop = layers.Dropout(0.5)
    model = functional(lambda x: block(block(x, 6, name="a"), 6, drop, name="b"))
    before = {v.path: np.array(v) for v in model.variables}
    found = zero_residual(model)
    assert found == ["a_out/kernel", "a_out/bias", "b_out/kernel", "b_out/bias"]
    assert_identity(model)
    for variable in model.variables:
        if variable.path not in found:
            np.testing.assert_array_equal(variable, before[variable.path])


def test_the_operator_plus_and_nested_models_are_found():
    inner = functional(lambda x: x + layers.Dense(6, name="in_inner")(x))
    rest = keras.Sequential([keras.Input((6,)), layers.Dense(6, "relu"), layers.Dense(6, name="last")])
    outer = functional(lambda x: layers.Add()([inner(x), rest(inner(x))]))
    found = ["/".join(path.split("/")[-2:]) for path in zero_residual(outer)]
    assert found == ["last/kernel", "last/bias", "in_inner/kernel", "in_inner/bias"]
    assert_identity(outer)


@pytest.mark.long
def test_stock_networks():
    resnet = keras.applications.ResNet50(weights=None, input_shape=(32, 32, 3))
    found = zero_residual(resnet)
    assert len(found) == 2 * 16
    assert all("_3_bn/" in path for path in found)  # the last of each block, and never the one of a projection
    mobile = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3))
    assert len(zero_residual(mobile)) == 2 * 10
    assert all("project_BN/" in path for path in zero_residual(mobile))


def test_attention_and_separable_convolutions():
    def body(x):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(2, 3, name="attention")(y, y)
        x = layers.Add()([x, layers.Dropout(0.1)(y)])
        return layers.Add()([x, layers.SeparableConv1D(6, 1, name="separable")(x)])

    x = keras.Input((5, 6))
    model = keras.Model(x, body(x))
    paths = ["kernel", "bias"]
    assert zero_residual(model) == [
        *(f"attention/attention_output/{name}" for name in paths),
        *(f"separable/{name}" for name in ("pointwise_kernel", "bias")),
    ]
    assert_identity(model, (2, 5, 6))


def test_scales_of_normalizations_and_of_layer_scale():
    def body(x):
        y = ok.layers.LayerScale(0.1, name="small")(layers.Dense(6)(x))
        x = layers.Add()([x, ok.layers.DropPath(0.1)(y)])
        x = layers.Add()([x, layers.RMSNormalization(name="rms")(layers.Dense(6)(x))])
        return layers.Add()([x, layers.LayerNormalization(name="norm")(layers.Dense(6)(x))])

    model = functional(body)
    assert zero_residual(model) == ["small/gamma", "rms/scale", "norm/gamma", "norm/beta"]
    assert_identity(model)


def test_branches_that_are_models_and_ends_that_are_passed():
    def body(x):
        x = layers.Add()([x, functional(lambda y: layers.Dense(6, name="of_model")(layers.ReLU()(y)))(x)])
        x = x + 0.1 * layers.Dense(6, name="scaled")(x)
        return layers.Add()([x, layers.Activation("linear")(layers.Dense(6, name="linear")(x))])

    model = functional(body)
    found = [path.split("/")[-2] for path in zero_residual(model)]
    assert sorted(set(found)) == ["linear", "of_model", "scaled"]
    assert_identity(model)


def test_only_the_output_of_attention_whatever_its_name():
    x = keras.Input((5, 6))
    model = keras.Model(x, layers.Add()([x, layers.MultiHeadAttention(2, 3, name="my_attention_output")(x, x)]))
    assert [path.split("/")[-2:] for path in zero_residual(model)] == [
        ["attention_output", "kernel"],
        ["attention_output", "bias"],
    ]
    assert_identity(model, (2, 5, 6))


def test_a_branch_that_cannot_be_zero_is_told():
    def body(x):
        x = layers.Add()([x, keras.Sequential([layers.Dense(6), layers.ReLU()])(x)])
        return layers.Add()([x, layers.Dense(6, name="last")(x)])

    model = functional(body)
    with pytest.warns(UserWarning, match=r"The residual branches that add\w* of model .* adds are left as they are"):
        assert zero_residual(model) == ["last/kernel", "last/bias"]


def test_what_is_no_branch_is_left_alone():
    def two_towers(x):
        other = keras.Input((6,))
        return other, layers.Add()([layers.Dense(6)(layers.Dense(6)(x)), layers.Dense(6)(other)])

    x = keras.Input((6,))
    other, y = two_towers(x)
    with pytest.raises(ValueError, match="no residual branch was found"):
        zero_residual(keras.Model([x, other], y))

    def ends_with_what_is_an_identity_at_zero(x):
        return layers.Add()([x, ok.layers.GlobalResponseNormalization()(layers.Dense(6)(x))])

    def equal_paths(x):
        return layers.Add()([layers.Dense(6)(x), layers.Dense(6)(x)])

    def ends_with_an_activation(x):
        return layers.Add()([x, layers.ReLU()(layers.Dense(6)(x))])

    def activation_of_the_layer(x):
        return layers.Add()([x, layers.Dense(6, activation="relu")(x)])

    for body in (
        equal_paths,
        ends_with_an_activation,
        activation_of_the_layer,
        ends_with_what_is_an_identity_at_zero,
        layers.Dense(6),
    ):
        model = functional(body)
        before = model.get_weights()
        with pytest.raises(ValueError, match="no residual branch was found"):
            zero_residual(model)
        for a, b in zip(model.get_weights(), before, strict=True):
            np.testing.assert_array_equal(a, b)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(6, name="branch")

    def call(self, x):
        return x + self.dense(x)


def test_a_subclassed_model_takes_a_pattern():
    model = Subclassed()
    with pytest.raises(ValueError, match="model must be built"):
        zero_residual(model)
    model(np.ones((1, 6), "float32"))
    with pytest.raises(ValueError, match="pass pattern="):
        zero_residual(model)
    with pytest.raises(ValueError, match="matches the path of no layer"):
        zero_residual(model, "other")
    assert [path.rpartition("/")[2] for path in zero_residual(model, "branch$")] == ["kernel", "bias"]
    assert_identity(model)
    named = functional(lambda x: layers.Add()([x, layers.Dense(6, name="branch")(x)]))
    assert zero_residual(named, "branch$") == ["branch/kernel", "branch/bias"]


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model must be a keras.Model, got 1"):
        zero_residual(1)
    for pattern, error in ((3, TypeError), ("(", ValueError)):
        with pytest.raises(error, match="pattern must be a regular expression"):
            zero_residual(functional(layers.Dense(6)), pattern)

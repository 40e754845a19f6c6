"""Unit variances on a batch of data: measured by other means, and nothing else is changed."""

import random

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_optkit.initializers import lsuv

RNG = np.random.default_rng(0)


def array(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


def assert_units(*outputs):
    for y in outputs:
        assert array(y).var() == pytest.approx(1.0, abs=0.02)


def mlp(depth=5):
    hidden = [layers.Dense(40, "relu", bias_initializer="random_normal") for _ in range(depth)]
    return keras.Sequential([keras.Input((20,)), *hidden, layers.Dense(3)])


def test_units_of_an_mlp():
    model, x = mlp(), RNG.normal(3.0, 2.0, size=(256, 20)).astype("float32")
    variances = lsuv(model, x)
    assert list(variances) == [layer.path for layer in model.layers]
    for layer in model.layers:  # in NumPy, with the activation that was there before
        y = x @ array(layer.kernel) + array(layer.bias)
        assert_units(y)
        assert y.var() == pytest.approx(variances[layer.path], abs=1e-4)
        x = np.maximum(y, 0)


@pytest.mark.once
def test_units_of_a_cnn():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="fused")(inputs)
    outputs = [layers.Conv2D(12, 3, groups=4, padding="same")(x)]
    outputs += [layers.DepthwiseConv2D(3)(layers.ReLU()(outputs[-1]))]
    outputs += [layers.SeparableConv2D(16, 2)(layers.BatchNormalization()(outputs[-1]))]
    outputs += [layers.Conv2DTranspose(4, 2, strides=2)(layers.ReLU()(outputs[-1]))]
    outputs += [layers.Dense(5)(layers.Dropout(0.5)(layers.Flatten()(outputs[-1])))]
    model = keras.Model(inputs, outputs[-1])
    batch = RNG.normal(size=(128, 8, 8, 3)).astype("float32")
    variances = lsuv(model, batch)
    assert len(variances) == 6
    assert_units(*keras.Model(inputs, outputs)(batch))
    fused = model.get_layer("fused")
    assert_units(ops.conv(batch, fused.kernel))
    assert fused.activation is keras.activations.relu


class Block(layers.Layer):
    """A Transformer's, called from a model that is a subclass, too."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm = layers.MultiHeadAttention(4, 8), layers.LayerNormalization()
        self.wide, self.narrow = layers.Dense(32, "gelu"), layers.Dense(16)

    def call(self, x):
        x = x + self.attention(x, x)
        return x + self.narrow(self.wide(self.norm(x)))


class Transformer(keras.Model):
    def __init__(self):
        super().__init__()
        self.embed, self.block, self.head = layers.Embedding(50, 16), Block(), layers.Dense(7)

    def call(self, tokens):
        return self.head(self.block(self.embed(tokens)))


def test_units_of_a_model_with_attention():
    model, tokens = Transformer(), RNG.integers(0, 50, size=(64, 10))
    model(tokens)
    table = array(model.embed.embeddings)
    variances = lsuv(model, tokens, seed=3)
    assert len(variances) == 4 + 3
    np.testing.assert_array_equal(array(model.embed.embeddings), table)
    block, x = model.block, model.embed(tokens)
    attention = block.attention
    assert_units(attention.query_dense(x), attention.key_dense(x), attention.value_dense(x), attention(x, x))
    x = x + attention(x, x)
    normed = block.norm(x)
    assert_units(ops.matmul(normed, block.wide.kernel) + block.wide.bias, block.narrow(block.wide(normed)))
    assert_units(model(tokens))


def state_of(model):
    kernels = {id(v) for layer in model.layers if isinstance(layer, layers.Dense) for v in [layer.kernel]}
    parts = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    return [array(v) for v in parts if id(v) not in kernels], random.getstate()


def test_everything_else_stays_as_it_is():
    class Noise(layers.Layer):
        on = False  # in a compiled step, where JAX refuses it

        def call(self, x):
            return x + keras.random.normal(ops.shape(x)) if self.on else x  # from Keras's global generator

    noise = Noise()
    model = keras.Sequential(
        [
            keras.Input((20,)),
            layers.Dense(30, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=1),
            noise,
            layers.Dense(1),
        ]
    )
    model.compile("adam", "mse", metrics=["mae"])
    x = RNG.normal(size=(64, 20)).astype("float32")
    model.train_on_batch(x, np.zeros((64, 1)))
    keras.utils.set_random_seed(0)
    array(keras.random.normal((1,)))
    before, python = state_of(model)
    noise.on = True
    variances = lsuv(model, x, training=True, seed=1)
    noise.on = False
    assert all(abs(variance - 1) < 0.02 for variance in variances.values())
    after, python_after = state_of(model)
    assert python_after == python
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)
    drawn = array(keras.random.normal((3,)))
    keras.utils.set_random_seed(0)
    array(keras.random.normal((1,)))
    np.testing.assert_array_equal(array(keras.random.normal((3,))), drawn)
    model.train_on_batch(x, np.zeros((64, 1)))


@pytest.mark.once
def test_directions_can_be_kept_and_seeds_repeat():
    x = RNG.normal(size=(256, 20)).astype("float32")
    model = mlp(2)
    before = [array(layer.kernel) for layer in model.layers]
    lsuv(model, x, orthogonal=False)
    for layer, old in zip(model.layers, before, strict=True):
        ratios = array(layer.kernel) / old
        np.testing.assert_allclose(ratios, ratios.mean(), rtol=1e-5)
    drawn = []
    for _ in range(2):
        lsuv(model, x, seed=5)
        drawn.append(array(model.layers[0].kernel))
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=1e-6)
    kernel = drawn[0] @ drawn[0].T
    np.testing.assert_allclose(kernel, kernel[0, 0] * np.eye(20), atol=1e-5)


@pytest.mark.once
def test_frozen_and_recurrent_layers_keep_their_weights():
    model = keras.Sequential([keras.Input((5, 4)), layers.Dense(6), layers.LSTM(8), layers.Dense(3)])
    model.layers[0].trainable = False
    before = [array(v) for v in model.variables]
    variances = lsuv(model, RNG.normal(size=(64, 5, 4)).astype("float32"))
    assert list(variances) == [model.layers[2].path]
    changed = [not np.array_equal(array(v), old) for v, old in zip(model.variables, before, strict=True)]
    assert [v.path for v, new in zip(model.variables, changed, strict=True) if new] == [model.layers[2].kernel.path]


@pytest.mark.once
@pytest.mark.parametrize(
    ("prepare", "x", "message"),
    [
        (lambda _: None, np.full((32, 20), np.nan, "float32"), r"'\S*dense\S*' must vary .* variance of nan"),
        (
            lambda model: model.layers[0].bias.assign(np.arange(40.0)),
            np.ones((32, 20), "float32"),
            r"must come within 0\.02 of 1 in 10 iterations",
        ),
    ],
)
def test_a_failure_leaves_the_model_as_it_was(prepare, x, message):
    model = mlp(1)
    prepare(model)
    before = [array(v) for v in model.variables]
    with pytest.raises(ValueError, match=message):
        lsuv(model, x)
    for v, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(v), old)
    assert model.layers[0].activation is keras.activations.relu


def test_a_compiled_call_is_refused():
    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def call(self, x):
            return ops.vectorized_map(lambda row: self.dense(row[None])[0], x)

    model = Compiled()
    model.dense.build((None, 4))
    x = np.ones((8, 4), "float32")
    model(x)
    with pytest.raises(RuntimeError, match=r"The output of layer '\S*dense\S*' cannot be read"):
        lsuv(model, x)


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lsuv(layers.Dense(3), np.ones((2, 2))), ["model", "keras.Model", "Dense"]),
        (lambda: lsuv(keras.Sequential([layers.Dense(3)]), np.ones((2, 2))), ["model", "built"]),
        (lambda: lsuv(mlp(1), np.ones((2, 20)), tolerance=0), ["tolerance", "0", "(0"]),
        (lambda: lsuv(mlp(1), np.ones((2, 20)), max_iterations=0), ["max_iterations", "0", "at least 1"]),
        (lambda: lsuv(mlp(1), np.ones((2, 20)), orthogonal=1), ["orthogonal", "1", "True or False"]),
        (lambda: lsuv(mlp(1), np.ones((2, 20)), training=None), ["training", "None", "True or False"]),
        (lambda: lsuv(mlp(1), np.ones((2, 20)), seed=-1), ["seed", "-1", "at least 0"]),
        (
            lambda: lsuv(keras.Sequential([keras.Input((2,)), layers.ReLU()]), np.ones((2, 2))),
            ["model", "kernel", "trainable"],
        ),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_layer_that_is_not_called_keeps_its_kernel():
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.used, self.unused = keras.layers.Dense(4), keras.layers.Dense(4)

        def build(self, shape):
            self.used.build(shape)
            self.unused.build(shape)

        def call(self, x):
            return self.used(x)

    model = Model()
    model.build((None, 3))
    before = np.array(model.unused.kernel)
    assert list(lsuv(model, np.random.default_rng(0).normal(size=(64, 3)).astype("float32"))) == [model.used.path]
    np.testing.assert_array_equal(model.unused.kernel, before)


def test_a_layer_for_each_step_is_scaled_by_all_steps():
    inner = [layers.Dense(8), layers.Conv1D(4, 2)]
    model = keras.Sequential([keras.Input((6, 5)), layers.TimeDistributed(inner[0])])
    images = keras.Sequential([keras.Input((6, 5, 3)), layers.TimeDistributed(inner[1])])
    rng = np.random.default_rng(0)
    for built, shape in ((model, (64, 6, 5)), (images, (64, 6, 5, 3))):
        x = (rng.normal(size=shape) * 10.0 ** np.arange(-2, 4).reshape(6, *[1] * (len(shape) - 2))).astype("float32")
        assert list(lsuv(built, x, seed=1).values()) == [pytest.approx(1, abs=0.02)]
        assert np.var(built(x)) == pytest.approx(1, abs=0.02)
        assert "call" not in vars(built.layers[0])


def test_layers_of_one_path_are_both_told():
    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="m")
            self.one, self.two = layers.Dense(4, name="d"), layers.Dense(4, name="d")

        def call(self, x):
            return self.two(self.one(x))

    model, x = Model(), np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
    model(x)
    assert list(lsuv(model, x)) == ["m/d", "m/d (2)"]

"""muP: sizes and rates of the paper, and activations that do not depend on the width."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_optkit as ok
from keras_optkit.optimizers.mup import rate_of, size_of


def network(width, inputs=8, depth=2, activation="relu", seed=0, **given):
    keras.utils.set_random_seed(seed)
    hidden = [layers.Dense(width, activation, name=f"hidden{place}", **given) for place in range(depth)]
    return keras.Sequential([keras.Input((inputs,)), *hidden, layers.Dense(3, name="out", **given)])


def rms(variable):
    return float(np.sqrt(np.mean(np.square(keras.ops.convert_to_numpy(variable)))))


def rates(groups, model, rate=1.0, **given):
    """The rate and the decay times the rate of each weight."""
    rows = ok.optimizers.AdamW(rate, groups=groups, **given).explain(model).rows
    return {row.path: (row.learning_rate, row.weight_decay) for row in rows}


@pytest.mark.parametrize(
    ("kind", "size", "adam", "sgd"),
    # table 3 for fans that are 4 times as large: variances of 1 / fan_in, 1 / fan_in and 1 / fan_in^2
    [("input", 1.0, 1.0, 4.0), ("hidden", 0.5, 0.25, 1.0), ("output", 0.25, 0.25, 0.25), ("fixed", 1.0, 1.0, 1.0)],
)
def test_sizes_and_rates_are_those_of_the_paper(kind, size, adam, sgd):
    inputs = 4.0 if kind in ("hidden", "output") else 1.0
    outputs = 4.0 if kind in ("input", "hidden") else 1.0
    assert size_of(kind, inputs) == size
    assert rate_of(kind, inputs, outputs, "adam") == adam
    assert rate_of(kind, inputs, outputs, "sgd") == sgd


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_network_is_scaled(optimizer):
    model, base = network(64), network(16)
    before = [keras.ops.convert_to_numpy(v) for v in base.weights]
    groups = ok.mup(model, base, optimizer)
    for v, value in zip(base.weights, before, strict=True):
        np.testing.assert_array_equal(v, value)
    for layer, factor in (("hidden0", 1.0), ("hidden1", 0.5), ("out", 0.25)):
        wanted = factor * rms(base.get_layer(layer).kernel)
        assert rms(model.get_layer(layer).kernel) == pytest.approx(wanted, rel=1e-5)
    found = {path: rate for path, (rate, _) in rates(groups, model).items()}
    of_sgd = optimizer == "sgd"
    assert found == {
        "hidden0/kernel": 4.0 if of_sgd else 1.0,
        "hidden0/bias": 4.0 if of_sgd else 1.0,
        "hidden1/kernel": 1.0 if of_sgd else 0.25,
        "hidden1/bias": 4.0 if of_sgd else 1.0,
        "out/kernel": 0.25,
        "out/bias": 1.0,
    }


def test_nothing_is_changed_at_the_base_width():
    model, base = network(16, seed=1), network(16, seed=2)
    before = [keras.ops.convert_to_numpy(v) for v in model.weights]
    assert ok.mup(model, base, "adam", 0.1) == []
    for v, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(v, value)


def test_decay_times_rate_does_not_depend_on_the_width():
    model = network(64)
    groups = ok.mup(model, network(16), weight_decay=0.1)
    found = rates(groups, model, rate=0.5, weight_decay=0.1)
    for path in ("hidden0/kernel", "hidden1/kernel", "out/kernel"):
        rate, decay = found[path]
        assert rate * decay == pytest.approx(0.05), path


def test_other_kernels():
    """Tables, convolutions, attention with more heads, scales, and kernels that are all 0."""

    def make(width):
        tokens = keras.Input((6,), dtype="int32")
        x = layers.Embedding(11, width, name="table")(tokens)
        x = x + layers.MultiHeadAttention(width // 4, 4, name="attention")(x, x)
        x = layers.Conv1D(2 * width, 3, padding="same", name="conv")(layers.LayerNormalization(name="norm")(x))
        x = layers.DepthwiseConv1D(3, padding="same", name="depthwise")(x)
        x = layers.LSTM(width, name="lstm")(x)
        return keras.Model(tokens, layers.Dense(2, name="out", kernel_initializer="zeros")(x))

    model, base = make(16), make(8)
    table, depthwise = rms(base.get_layer("table").embeddings), rms(base.get_layer("depthwise").kernel)
    conv = rms(base.get_layer("conv").kernel)
    found = {path: rate for path, (rate, _) in rates(ok.mup(model, base), model).items()}
    slow = {path for path, rate in found.items() if rate == 0.5}
    assert slow == {path for path in found if "kernel" in path and "depthwise" not in path}
    assert {path for path, rate in found.items() if rate == 1.0} == set(found) - slow
    assert rms(model.get_layer("table").embeddings) == pytest.approx(table, rel=1e-5)
    assert rms(model.get_layer("depthwise").kernel) == pytest.approx(depthwise, rel=1e-5)
    assert rms(model.get_layer("conv").kernel) == pytest.approx(conv / np.sqrt(2), rel=1e-5)
    assert rms(model.get_layer("out").kernel) == 0
    of_sgd = {path: rate for path, (rate, _) in rates(ok.mup(model, base, "sgd"), model).items()}
    assert of_sgd["norm/gamma"] == of_sgd["table/embeddings"] == of_sgd["depthwise/kernel"] == 2.0


def change_of_outputs(width, *, scaled):
    """How much four small steps of Adam change the second hidden layer, and the output, per element."""
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    y = (x[:, :3] @ np.ones((3, 3))).astype("float32")
    model = network(width, kernel_initializer="he_normal")
    groups = ok.mup(model, network(64, seed=1, kernel_initializer="he_normal")) if scaled else None
    model.compile(ok.optimizers.Adam(1e-4, groups=groups or None), loss="mse")
    inside = keras.Model(model.inputs[0], [model.get_layer("hidden1").output, model.outputs[0]])
    before = [keras.ops.convert_to_numpy(part) for part in inside(x)]
    for _ in range(4):
        model.train_on_batch(x, y)
    after = [keras.ops.convert_to_numpy(part) for part in inside(x)]
    return [float(np.sqrt(np.mean((b - a) ** 2))) for a, b in zip(after, before, strict=True)]


@pytest.mark.once
def test_coordinates_do_not_grow_with_the_width():
    """The coordinate check of the paper's appendix D.1: with muP the changes are those of the base width."""
    wide, narrow = change_of_outputs(1024, scaled=True), change_of_outputs(64, scaled=True)
    plain, plain_narrow = change_of_outputs(1024, scaled=False), change_of_outputs(64, scaled=False)
    assert plain_narrow == narrow
    for place in range(2):
        assert 0.5 < wide[place] / narrow[place] < 1.5
        assert plain[place] / plain_narrow[place] > 3


@pytest.mark.parametrize(
    ("model", "base", "given", "error", "message"),
    [
        (lambda: 3, lambda: network(8), {}, TypeError, r"model must be a keras\.Model, got 3 of type int"),
        (lambda: network(8), lambda: None, {}, TypeError, r"base must be a keras\.Model, got None"),
        (lambda: network(8), lambda: keras.Sequential([layers.Dense(3)]), {}, ValueError, "base must be built, got"),
        (
            lambda: network(8),
            lambda: network(8),
            {"optimizer": "muon"},
            ValueError,
            "optimizer must be one of 'adam', 'sgd'",
        ),
        (lambda: network(8), lambda: network(8), {"weight_decay": -1}, ValueError, "weight_decay must be .*, got -1"),
        (
            lambda: network(8),
            lambda: network(8, depth=3),
            {},
            ValueError,
            "architecture of model, got 8 trained weights for 6",
        ),
        (
            lambda: network(8),
            lambda: network(8, kernel_initializer="zeros"),
            {},
            None,
            None,
        ),
        (
            lambda: network(16),
            lambda: network(8, kernel_initializer="zeros"),
            {},
            ValueError,
            "initializers of model; 'hidden0/kernel' is all 0 in base only",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model, base, given, error, message):
    if error is None:
        assert ok.mup(model(), base(), **given) == []
        return
    with pytest.raises(error, match=message):
        ok.mup(model(), base(), **given)


def test_other_keys_a_trained_model_and_other_tables_are_refused():
    def attention(key_dim, rows=7):
        inputs = keras.Input((4,), dtype="int32")
        x = layers.Embedding(rows, 8, name="table")(inputs)
        return keras.Model(inputs, layers.MultiHeadAttention(2, key_dim, name="attention")(x, x))

    with pytest.raises(ValueError, match="dimension of keys of base, 4, in 'attention', got 8"):
        ok.mup(attention(8), attention(4))
    with pytest.raises(ValueError, match="as many rows in 'table/embeddings' as model, 9, got 7"):
        ok.mup(attention(4, 9), attention(4))
    model = network(16)
    model.compile("sgd", loss="mse")
    model.train_on_batch(np.zeros((2, 8)), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"model must not have been trained, got .* after 1 updates"):
        ok.mup(model, network(8))
    with pytest.raises(ValueError, match=r"base must not have been trained, got .* after 1 updates"):
        ok.mup(network(32), model)


def test_layers_whose_size_does_not_follow_from_their_kernel_are_refused():
    def normalized(width):
        return keras.Sequential(
            [keras.Input((8,)), layers.Dense(width), ok.layers.WeightNormalization(layers.Dense(3))]
        )

    def attending(width):
        inputs = keras.Input((4, 8))
        return keras.Model(inputs, layers.Attention()([layers.Dense(width)(inputs), layers.Dense(width)(inputs)]))

    with pytest.raises(ValueError, match="model must have no WeightNormalization, got 'weight_normalization"):
        ok.mup(normalized(16), normalized(8))
    assert ok.mup(normalized(8), normalized(8)) == []
    with pytest.raises(ValueError, match=r"model must have no Attention, got 'attention.*'. Use MultiHeadAttention"):
        ok.mup(attending(16), attending(8))

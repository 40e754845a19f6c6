"""Initializers whose claims are more than a distribution: identities, few connections, sines, depth, biases."""

import math

import keras
import numpy as np
import pytest
from keras import layers, ops
from scipy.linalg import hadamard
from torch_references import biases, gains, in_torch, initialized

from keras_optkit import initializers
from keras_optkit.initializers import (
    SIREN,
    BiasPrior,
    BiasUniform,
    DeltaOrthogonal,
    DepthScaled,
    Dirac,
    HeNormal,
    LeCunNormal,
    Sparse,
    XavierNormal,
    ZerO,
    calculate_gain,
    torch_biases,
)

pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.once]


def array(x):
    return np.asarray(ops.convert_to_numpy(x), "float64")


# -- gains -------------------------------------------------------------------------------------------------------------


def test_gains_are_torchs_but_for_selu_and_the_default_slope():
    same = [("linear",), ("sigmoid",), ("tanh",), ("relu",), ("leaky_relu", 0.1), ("leaky_relu", -2)]
    np.testing.assert_allclose([calculate_gain(*each) for each in same], in_torch(gains, same), rtol=1e-15)
    assert calculate_gain("selu") == 1.0
    assert calculate_gain("leaky_relu") == calculate_gain("leaky_relu", 0.2)
    with pytest.raises(ValueError, match=r"nonlinearity must be one of 'linear'.*got 'gelu'"):
        calculate_gain("gelu")
    with pytest.raises(ValueError, match=r"param must be None for 'relu'.*got 0\.1"):
        calculate_gain("relu", 0.1)


def test_a_gain_scales_the_values_of_the_same_seed():
    for cls, name in ((XavierNormal, "tanh"), (LeCunNormal, "relu"), (DeltaOrthogonal, "leaky_relu")):
        one, scaled = (array(cls(seed=1, gain=gain)((3, 4, 5), "float64")) for gain in (1.0, name))
        np.testing.assert_allclose(scaled, calculate_gain(name) * one, rtol=1e-12)


# -- identities --------------------------------------------------------------------------------------------------------

IDENTITIES = {
    "Dense": ((4, 6), lambda i: layers.Dense(6, kernel_initializer=i)),
    "Conv1D": ((7, 6), lambda i: layers.Conv1D(6, 3, padding="same", kernel_initializer=i)),
    "Conv2D, even": ((7, 8, 6), lambda i: layers.Conv2D(6, (4, 2), padding="same", kernel_initializer=i)),
    "Conv2D, groups": ((5, 5, 6), lambda i: layers.Conv2D(6, 3, padding="same", groups=3, kernel_initializer=i)),
    "Conv3D": ((4, 4, 4, 2), lambda i: layers.Conv3D(2, 3, padding="same", kernel_initializer=i)),
    "DepthwiseConv2D": ((5, 5, 6), lambda i: layers.DepthwiseConv2D(3, padding="same", depthwise_initializer=i)),
    "Conv2DTranspose": ((5, 5, 6), lambda i: layers.Conv2DTranspose(6, 3, padding="same", kernel_initializer=i)),
    "EinsumDense": ((5, 6), lambda i: layers.EinsumDense("abc,dc->abd", (None, 6), kernel_initializer=i)),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_dirac_layers_are_the_identity(name):
    shape, make = IDENTITIES[name]
    x = np.random.default_rng(0).normal(size=(2, *shape)).astype("float32")
    np.testing.assert_allclose(array(make(Dirac())(x)), x, atol=1e-6)


@pytest.mark.parametrize(("shape", "groups"), [((6, 2, 3), 3), ((4, 6, 5, 3), 1), ((6, 4, 3, 3, 3), 2)])
def test_dirac_is_torchs_dirac(shape, groups):
    """Which has (out, in, *window)."""
    expected = np.moveaxis(in_torch(initialized, "dirac_", shape, groups), (0, 1), (-1, -2))
    np.testing.assert_array_equal(array(Dirac(groups=groups)(expected.shape, "float64")), expected)


def test_dirac_needs_groups_that_divide():
    with pytest.raises(ValueError, match=r"groups must divide the last axis of shape=\(3, 2, 5\), got groups=2"):
        Dirac(groups=2)((3, 2, 5))


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 5), (7, 3), (5, 12), (1, 8), (8, 9)])
def test_zero_is_the_identity_or_a_part_of_a_hadamard_matrix(inputs, outputs):
    p = 2 ** math.ceil(math.log2(outputs))
    expected = np.eye(inputs, p) @ (hadamard(p) / p**0.5) @ np.eye(p, outputs)
    if outputs <= inputs:
        expected = np.eye(inputs, outputs)
    np.testing.assert_allclose(array(ZerO()((inputs, outputs), "float64")), expected, rtol=1e-14)
    kernel = array(ZerO()((3, 4, inputs, outputs), "float64"))
    np.testing.assert_allclose(kernel[1, 1], expected, rtol=1e-14)
    assert np.count_nonzero(kernel) == np.count_nonzero(expected)


# -- orthogonal convolutions -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "make"),
    [
        ((9, 3), lambda i: layers.Conv1D(5, 4, padding="same", kernel_initializer=i, dtype="float64")),
        ((6, 7, 4), lambda i: layers.Conv2D(4, 3, padding="same", kernel_initializer=i, dtype="float64")),
        ((5, 5, 4), lambda i: layers.Conv2D(6, 3, padding="same", groups=2, kernel_initializer=i, dtype="float64")),
        ((5, 5, 3), lambda i: layers.Conv2DTranspose(4, 3, padding="same", kernel_initializer=i, dtype="float64")),
    ],
)
def test_delta_orthogonal_convolutions_keep_the_norm_of_images(shape, make):
    x = np.random.default_rng(0).normal(size=(3, *shape))
    y = array(make(DeltaOrthogonal(gain=2.0))(x))
    axes = tuple(range(1, len(shape) + 1))
    np.testing.assert_allclose(np.sum(y**2, axes), 4 * np.sum(x**2, axes), rtol=1e-12)


def test_fewer_channels_out_keep_the_norm_of_gradients():
    kernel = array(DeltaOrthogonal()((3, 3, 7, 4), "float64"))
    np.testing.assert_allclose(kernel[1, 1].T @ kernel[1, 1], np.eye(4), atol=1e-13)


# -- few connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.75])
def test_sparse_has_as_many_zeros_as_torchs_sparse(sparsity):
    """Which has them in each column of its tensor, whatever that is for a layer."""
    theirs = in_torch(initialized, "sparse_", (30, 40), sparsity, 0.01)
    ours = array(Sparse(sparsity=sparsity, stddev=0.01)((30, 40), "float64"))
    np.testing.assert_array_equal((ours == 0).sum(axis=0), (theirs == 0).sum(axis=0))


def test_sparse_units_have_their_connections_in_whole_windows():
    layer = layers.Conv2D(50, 3, kernel_initializer=Sparse(connections=4))
    layer.build((None, 8, 8, 10))
    kernel = array(layer.kernel)
    np.testing.assert_array_equal((kernel != 0).sum(axis=(0, 1, 2)), 4)
    assert np.count_nonzero(kernel.any(axis=(2, 3))) == 9
    few = array(Sparse(connections=100)((7, 3)))
    assert np.count_nonzero(few) == 21


def test_which_weights_are_chosen_does_not_depend_on_their_values():
    """Both come from one seed; the same bits would make the chosen ones larger, or smaller."""
    values = array(Sparse(sparsity=0.5, seed=1)((400, 400)))
    chosen = values[values != 0]
    assert abs(chosen.mean()) < 5 / math.sqrt(chosen.size)
    assert abs(chosen.var() - 1) < 5 * math.sqrt(2 / chosen.size)


# -- sines -------------------------------------------------------------------------------------------------------------


def test_signals_of_sine_networks_keep_their_size():
    """Behind an arcsine distribution they have a variance v = 1, and from layer to layer v becomes 1 - exp(-2 v)."""
    x = np.random.default_rng(0).uniform(-1, 1, size=(1000, 2))
    expected = None
    for depth in range(6):
        kernel = array(SIREN(30.0, first=depth == 0, seed=depth)((x.shape[1], 512), "float32"))
        before = 30 * x @ kernel
        if expected is not None:
            assert before.var() == pytest.approx(expected, rel=0.05)
        expected = 1.0 if expected is None else 1 - math.exp(-2 * expected)
        x = np.sin(before)


# -- depth -------------------------------------------------------------------------------------------------------------


def deviation(layer):
    return array(layer.kernel).std()


@pytest.mark.parametrize("inner", [HeNormal, keras.initializers.HeNormal])
def test_depth_scaled_attention_has_the_fans_of_what_it_scales(inner):
    scaled = DepthScaled(depth=8, initializer=inner(seed=1))
    layer = layers.MultiHeadAttention(8, 32, kernel_initializer=scaled)
    layer.build((None, 9, 100), (None, 9, 100))
    assert deviation(layer.query_dense) == pytest.approx(math.sqrt(2 / 100 / 16), rel=0.03)
    assert deviation(layer.output_dense) == pytest.approx(math.sqrt(2 / 256 / 16), rel=0.03)


def test_depth_scaled_is_gpt_2s_by_default_and_takes_names():
    layer = layers.Dense(200, kernel_initializer=DepthScaled(depth=12))
    layer.build((None, 300))
    assert deviation(layer) == pytest.approx(0.02 / math.sqrt(24), rel=0.03)
    layer = layers.Dense(200, kernel_initializer=DepthScaled(4, "keras_optkit>HeNormal", branches=1))
    layer.build((None, 300))
    assert deviation(layer) == pytest.approx(math.sqrt(2 / 300 / 4), rel=0.03)


def test_the_generator_of_what_is_scaled_moves_on():
    scaled = DepthScaled(2, HeNormal(seed=keras.random.SeedGenerator(3)))
    dense = [layers.EinsumDense("ab,bc->ac", 3, kernel_initializer=scaled) for _ in range(2)]
    for layer in dense:
        layer.build((None, 4))
    assert not np.allclose(array(dense[0].kernel), array(dense[1].kernel))


def test_scales_by_depth():
    assert initializers.fixup_gain(16) == 0.25
    assert initializers.fixup_gain(16, layers=3) == 0.5
    assert initializers.t_fixup_gain(16, 9) == pytest.approx({"encoder": 0.335, "decoder": 1 / 3})
    assert set(initializers.t_fixup_gain(decoder_layers=2)) == {"decoder"}
    assert initializers.deepnorm(8)["encoder"] == pytest.approx((2.0, 0.125**0.5))
    assert initializers.deepnorm(decoder_layers=8) == {"decoder": initializers.deepnorm(8)["encoder"]}
    both = initializers.deepnorm(16, 27)
    assert both["encoder"] == pytest.approx((0.81 * 2 * 27 ** (1 / 16), 0.87 / 2 / 27 ** (1 / 16)))
    assert both["decoder"] == pytest.approx((3.0, 18**-0.5))


# -- biases ------------------------------------------------------------------------------------------------------------

#: A layer with this bias initializer, its input's shape, its bias, and torch's layer.
BIASES = {
    "Dense": (
        lambda i: layers.Dense(3000, bias_initializer=i),
        (None, 50),
        lambda layer: layer.bias,
        ("Linear", {"in_features": 50, "out_features": 3000}, "bias"),
    ),
    "Conv2D, groups": (
        lambda i: layers.Conv2D(3000, 3, groups=4, bias_initializer=i),
        (None, 5, 5, 8),
        lambda layer: layer.bias,
        ("Conv2d", {"in_channels": 8, "out_channels": 3000, "kernel_size": 3, "groups": 4}, "bias"),
    ),
    "DepthwiseConv1D": (
        lambda i: layers.DepthwiseConv1D(5, bias_initializer=i),
        (None, 9, 3000),
        lambda layer: layer.bias,
        ("Conv1d", {"in_channels": 3000, "out_channels": 3000, "kernel_size": 5, "groups": 3000}, "bias"),
    ),
    "LSTM": (
        lambda i: layers.LSTM(600, bias_initializer=i, unit_forget_bias=False),
        (None, 9, 5),
        lambda layer: layer.cell.bias,
        ("LSTM", {"input_size": 5, "hidden_size": 600}, "bias_ih_l0"),
    ),
}


def test_biases_are_torchs():
    theirs = in_torch(biases, {name: each[-1] for name, each in BIASES.items()})
    for name, (make, shape, bias, _) in BIASES.items():
        layer = make(BiasUniform())
        layer.build(shape)
        ours, expected = array(bias(layer)), np.asarray(theirs[name], "float64")
        assert ours.shape == expected.shape
        assert ours.max() == pytest.approx(expected.max(), rel=0.01), name
        assert ours.min() == pytest.approx(expected.min(), rel=0.01), name
        assert ours.std() == pytest.approx(expected.std(), rel=0.05), name


def test_the_fan_in_of_attention_and_separable_layers():
    dense = layers.EinsumDense("abc,cde->abde", (None, 20, 50), bias_axes="de", bias_initializer=BiasUniform())
    dense.build((None, 7, 16))
    separable = layers.SeparableConv1D(2000, 3, depth_multiplier=2, bias_initializer=BiasUniform())
    separable.build((None, 9, 18))
    for bias, fan_in in ((dense.bias, 16), (separable.bias, 36)):
        assert abs(array(bias)).max() == pytest.approx(fan_in**-0.5, rel=0.01)


class Lazy(keras.Model):
    """Keras makes such a model's variables after its layers have been called."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_lazily_made_biases_have_true_fans():
    shared = BiasUniform()
    one, two = layers.Dense(1000, bias_initializer=shared), layers.Dense(2000, bias_initializer=shared)
    Lazy(one, two)(np.zeros((1, 16), "float32"))
    assert abs(array(one.bias)).max() == pytest.approx(0.25, rel=0.01)
    assert abs(array(two.bias)).max() == pytest.approx(1000**-0.5, rel=0.01)
    one, two = (layers.Dense(1000, bias_initializer=shared) for _ in range(2))  # of one shape
    Lazy(one, two)(np.zeros((1, 16), "float32"))
    assert abs(array(one.bias)).max() == pytest.approx(0.25, rel=0.01)
    assert abs(array(two.bias)).max() == pytest.approx(1000**-0.5, rel=0.01)
    with pytest.raises(ValueError, match=r"fan_in must be an integer .* got fan_in=None for a bias of shape=\(5,\)"):
        BiasUniform()((5,))


def test_torch_biases_sets_those_of_all_kernels_and_no_others():
    inputs = keras.Input((5, 16))
    x = layers.MultiHeadAttention(2, 8)(inputs, inputs)
    x = layers.LayerNormalization()(x)
    x = layers.LSTM(12)(x)
    model = keras.Model(inputs, layers.Dense(4)(layers.Dense(3, use_bias=False)(x)))
    assert torch_biases(model, seed=1) == 2
    attention = model.layers[1]
    kept = {v.path for v in attention.variables}
    named = {v.path: array(v) for v in model.variables if "bias" in v.path and v.path not in kept}
    assert len(named) == 2
    assert not any(array(v).any() for v in attention.variables if "bias" in v.path)
    assert all(len(np.unique(values)) == values.size for values in named.values())
    dense = next(layer for layer in model.layers if isinstance(layer, layers.Dense) and layer.use_bias)
    assert abs(array(dense.bias)).max() <= 3**-0.5
    assert not array(next(v for v in model.variables if v.path.endswith("beta"))).any()
    assert torch_biases(model, seed=1) == 2
    for v in model.variables:
        if v.path in named:
            np.testing.assert_array_equal(array(v), named[v.path])
    with pytest.raises(ValueError, match="must be built"):
        torch_biases(layers.Dense(3))
    with pytest.raises(TypeError, match="layer must be a Keras model or layer, got 3"):
        torch_biases(3)


def test_a_model_begins_at_its_prior():
    x = np.zeros((1, 4))
    frequencies = [900, 80, 20]
    prior = BiasPrior(np.array(frequencies), activation="softmax")
    layer = layers.Dense(3, "softmax", bias_initializer=prior, dtype="float64")
    np.testing.assert_allclose(array(layer(x))[0], [0.9, 0.08, 0.02], rtol=1e-12)
    layer = layers.Dense(3, "sigmoid", bias_initializer=BiasPrior([0.5, 0.1, 1e-9]), dtype="float64")
    np.testing.assert_allclose(array(layer(x))[0], [0.5, 0.1, 1e-9], rtol=1e-12)
    focal = array(BiasPrior()((2, 3), "float64"))
    np.testing.assert_allclose(focal, np.full((2, 3), -math.log(0.99 / 0.01)), rtol=1e-15)


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Dirac(groups=0), ["groups", "0", "at least 1"]),
        (lambda: Dirac(gain=0), ["gain", "0", "(0"]),
        (lambda: ZerO()((4,)), ["(4,)", "rank 2 or more"]),
        (lambda: DepthScaled(depth=0), ["depth", "0", "at least 1"]),
        (lambda: DepthScaled(3, branches=1.5), ["branches", "1.5", "integer"]),
        (lambda: DepthScaled(3, 0.02), ["initializer", "0.02", "initializer, its name or None"]),
        (lambda: DepthScaled(3, "he_norml"), ["initializer", "'he_norml'", "its name or None"]),
        (lambda: BiasUniform(fan_in=0), ["fan_in", "0", "at least 1"]),
        (lambda: BiasPrior(1.0), ["prior", "1.0", "(0, 1.0)"]),
        (lambda: BiasPrior([0.1, 0]), ["prior[1]", "0", "(0, 1.0)"]),
        (lambda: BiasPrior([]), ["prior", "[]", "at least one"]),
        (lambda: BiasPrior("0.1"), ["prior", "'0.1'", "number"]),
        (lambda: BiasPrior(0.1, "softmax"), ["prior", "0.1", "softmax", "list"]),
        (lambda: BiasPrior([3, -1], "softmax"), ["prior[1]", "-1", "(0"]),
        (lambda: BiasPrior(0.1, "tanh"), ["activation", "'tanh'", "'sigmoid', 'softmax'"]),
        (lambda: BiasPrior([0.1, 0.2])((3,)), ["prior", "(3,)", "2"]),
        (lambda: initializers.fixup_gain(0), ["branches", "0", "at least 1"]),
        (lambda: initializers.fixup_gain(4, layers=1), ["layers", "1", "at least 2"]),
        (lambda: initializers.deepnorm(), ["encoder_layers", "decoder_layers", "0"]),
        (lambda: initializers.t_fixup_gain(-1), ["encoder_layers", "-1", "at least 0"]),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


# -- one initializer in several layers of a model that its first step builds -------------------------------------------


class Built(keras.Model):
    """A model whose variables are made after its layers were called for shapes."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        return sum(keras.ops.sum(part(x)) for part in self.parts)


def test_kernels_of_one_shape_have_the_fans_of_their_own_layers():
    start = initializers.HeNormal(seed=keras.random.SeedGenerator(1))
    depthwise = keras.layers.DepthwiseConv2D(3, depth_multiplier=8, depthwise_initializer=start)
    convolution = keras.layers.Conv2D(8, 3, kernel_initializer=start)
    Built(depthwise, convolution)(np.zeros((1, 8, 8, 64), "float32"))
    assert depthwise.kernel.shape == convolution.kernel.shape
    assert np.std(depthwise.kernel) == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert np.std(convolution.kernel) == pytest.approx((2 / 576) ** 0.5, rel=0.05)
    assert np.std(start((3, 3, 64, 8))) == pytest.approx((2 / 576) ** 0.5, rel=0.05)  # whatever it was used for before


def test_gates_are_orthogonal_beside_a_dense_kernel_of_their_shape():
    start = initializers.Orthogonal()
    recurrent, dense = keras.layers.LSTM(8, kernel_initializer=start), keras.layers.Dense(32, kernel_initializer=start)
    Built(recurrent, dense)(np.zeros((1, 5, 8), "float32"))
    for gate in np.split(np.array(recurrent.cell.kernel), 4, axis=1):
        np.testing.assert_allclose(gate.T @ gate, np.eye(8), atol=1e-5)
    kernel = np.array(dense.kernel)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(8), atol=1e-5)


class Crossed(keras.layers.Layer):
    """Builds its layers in another order than it calls them."""

    def __init__(self, **arguments):
        super().__init__()
        self.first, self.second = (keras.layers.Dense(400, name="same", **arguments) for _ in range(2))

    def build(self, shape):
        self.second.build((None, 400))
        self.first.build(shape)

    def call(self, x):
        return self.second(self.first(x))


def test_biases_have_the_fan_in_of_their_own_layer():
    start = initializers.BiasUniform()
    crossed, attention = (
        Crossed(bias_initializer=start),
        keras.layers.MultiHeadAttention(2, 200, bias_initializer=start),
    )
    recurrent = keras.layers.LSTM(400, bias_initializer=start)
    shared = keras.layers.Dense(400, bias_initializer=start)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [crossed, attention, recurrent, shared]

        def call(self, x):
            x = shared(shared(crossed(x)))
            return recurrent(attention(x, x))

    Model()(np.zeros((1, 3, 4), "float32"))
    fans = {crossed.first: 4, crossed.second: 400, shared: 400, attention._query_dense: 400}
    for layer, fan_in in fans.items():
        assert np.max(np.abs(layer.bias)) == pytest.approx(fan_in**-0.5, rel=0.02)
    forget = np.array(recurrent.cell.bias)[400:800]
    assert np.max(np.abs(np.array(recurrent.cell.bias)[:400])) == pytest.approx(0.05, rel=0.02)
    np.testing.assert_array_equal(forget, 1.0)  # Keras's unit_forget_bias


# -- maps side by side, and what has no meaning ------------------------------------------------------------------------


def test_each_map_of_an_einsum_is_orthogonal_by_itself():
    layer = keras.layers.EinsumDense("abc,bcd->abd", (5, 6), kernel_initializer=initializers.Orthogonal())
    layer.build((None, 5, 6))
    for matrix in np.array(layer.kernel):
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(6), atol=1e-5)


def test_the_depthwise_kernel_of_a_window_of_1_is_told_from_the_pointwise_one():
    start = initializers.HeNormal()
    layer = keras.layers.SeparableConv2D(
        5, 1, depth_multiplier=50, depthwise_initializer=start, pointwise_initializer=start
    )
    layer.build((None, 4, 4, 40))
    assert np.std(layer.depthwise_kernel) == pytest.approx(2**0.5, rel=0.1)
    assert np.std(layer.pointwise_kernel) == pytest.approx((2 / 2000) ** 0.5, rel=0.1)


@pytest.mark.parametrize(("sparsity", "weights"), [(0.55, 45), (0.07, 93), (0.3, 70), (0.0, 100)])
def test_zeros_of_a_unit_are_counted_without_rounding_errors(sparsity, weights):
    kernel = np.array(initializers.Sparse(sparsity=sparsity)((100, 3)))
    np.testing.assert_array_equal(np.count_nonzero(kernel, axis=0), weights)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: initializers.Sparse(sparsity=0.95)((10, 5)),
            ValueError,
            "sparsity must leave .* 10 inputs .* 0.95",
        ),
        (lambda: initializers.BiasPrior({1: 900, 2: 80}, "softmax"), TypeError, "prior must be a number or a list"),
        (lambda: initializers.HeNormal()(5), TypeError, "shape must be a list or tuple of integers, got 5"),
        (lambda: initializers.HeNormal()((-1, 5)), ValueError, r"shape\[0\] must be an integer at least 0, got -1"),
        (lambda: initializers.HeNormal()((2.7, 3)), TypeError, r"shape\[0\] must be an integer .* got 2.7"),
        (
            lambda: initializers.LeCunNormal(input_axes=(0, 0), output_axes=(1,)),
            ValueError,
            r"input_axes must not name an axis twice, got \(0, 0\)",
        ),
        (
            lambda: keras.layers.Conv2DTranspose(4, 3, kernel_initializer=initializers.Dirac(groups=2)).build(
                (None, 4, 4, 4)
            ),
            ValueError,
            "groups must be None where a kernel's last axis has its inputs, got 2",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_recurrent_and_attention_biases_are_those_of_torch():
    """torch adds two biases in a cell, and begins attention with zeros."""
    lstm, gru = keras.layers.LSTM(400), keras.layers.GRU(400)
    attention = keras.layers.MultiHeadAttention(2, 8)
    for layer in (lstm, gru):
        layer.build((None, 3, 4))
        assert initializers.torch_biases(layer, seed=1) == 1
    attention.build((None, 3, 16), (None, 3, 16))
    assert initializers.torch_biases(attention, seed=1) == 0
    assert np.std(lstm.cell.bias) == pytest.approx((2 / 3 / 400) ** 0.5, rel=0.05)
    assert np.std(gru.cell.bias) == pytest.approx((1 / 3 / 400) ** 0.5, rel=0.05)
    assert not np.any(attention._query_dense.bias)

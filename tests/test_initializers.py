"""Initializers: distributions, fans through real layers, seeds. The conformance suite has what all of them promise."""

import math

import keras
import numpy as np
import pytest
from keras import layers
from scipy import stats

import keras_optkit as ok
from keras_optkit.initializers import (
    SIREN,
    DeltaOrthogonal,
    HeNormal,
    HeUniform,
    LeCunNormal,
    LeCunUniform,
    Orthogonal,
    RandomNormal,
    RandomTruncatedNormal,
    RandomUniform,
    Sparse,
    XavierNormal,
    XavierUniform,
)
from keras_optkit.registry import Card
from keras_optkit.testing import roundtrip
from keras_optkit.testing.checks.initializers import KERNELS

TRUNCATED_STD = stats.truncnorm(-2, 2).std()


def uniform(a, b):
    return stats.uniform(a, b - a)


def truncated(std):
    return stats.truncnorm(-2, 2, scale=std / TRUNCATED_STD)


def xavier(fan_in, fan_out):
    return math.sqrt(2 / (fan_in + fan_out))


def he(fan_in, _fan_out):
    return math.sqrt(2 / fan_in)


# Instance, and the distribution that SEED.md's formula gives for fan-in and fan-out.
CLAIMS = {
    "XavierUniform": (XavierUniform(seed=1), lambda i, o: uniform(-math.sqrt(6 / (i + o)), math.sqrt(6 / (i + o)))),
    "XavierNormal": (XavierNormal(seed=1), lambda i, o: stats.norm(0, xavier(i, o))),
    "XavierNormal truncated": (XavierNormal(seed=1, truncated=True), lambda i, o: truncated(xavier(i, o))),
    "HeUniform": (HeUniform(seed=1), lambda i, _: uniform(-math.sqrt(6 / i), math.sqrt(6 / i))),
    "HeNormal": (HeNormal(seed=1), lambda i, o: stats.norm(0, he(i, o))),
    "HeNormal truncated": (HeNormal(seed=1, truncated=True), lambda i, o: truncated(he(i, o))),
    "HeNormal, leaky": (HeNormal(seed=1, negative_slope=0.5), lambda i, _: stats.norm(0, math.sqrt(2 / 1.25 / i))),
    "LeCunUniform": (LeCunUniform(seed=1), lambda i, _: uniform(-math.sqrt(3 / i), math.sqrt(3 / i))),
    "LeCunNormal": (LeCunNormal(seed=1, gain="tanh"), lambda i, _: stats.norm(0, 5 / 3 / math.sqrt(i))),
    "LeCunNormal truncated": (LeCunNormal(seed=1, truncated=True), lambda i, _: truncated(1 / math.sqrt(i))),
    "SIREN": (SIREN(20.0, seed=1), lambda i, _: uniform(-math.sqrt(6 / i) / 20, math.sqrt(6 / i) / 20)),
    "SIREN, first": (SIREN(first=True, seed=1), lambda i, _: uniform(-1 / i, 1 / i)),
    "RandomTruncatedNormal": (RandomTruncatedNormal(stddev=2.0, seed=1), lambda *_: truncated(2.0)),
    "RandomUniform": (RandomUniform(-1.0, 3.0, seed=1), lambda *_: uniform(-1, 3)),
    "RandomNormal": (RandomNormal(1.0, 2.0, seed=1), lambda *_: stats.norm(1, 2)),
}
ALL = [
    *(XavierUniform, XavierNormal, HeUniform, HeNormal, LeCunUniform, LeCunNormal, SIREN, Sparse, DeltaOrthogonal),
    *(RandomUniform, RandomNormal, RandomTruncatedNormal, Orthogonal),
]


def draw(initializer, shape, dtype="float64"):
    return np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(initializer(shape, dtype=dtype), "float64")))


def kernel(layer):
    return np.asarray(keras.ops.convert_to_numpy(layer.kernel), "float64")


# -- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize(
    "layer", ["Dense", "Conv2D", "Conv2D, 4 groups", "DepthwiseConv2D", "MultiHeadAttention, output"]
)
def test_real_kernel_has_the_claimed_distribution(claim, layer):
    initializer, distribution = CLAIMS[claim]
    expected = distribution(KERNELS[layer].fan_in, KERNELS[layer].fan_out)
    values = KERNELS[layer].values(initializer).ravel()
    assert stats.kstest(values, expected.cdf).pvalue > 1e-3


@pytest.mark.parametrize("claim", CLAIMS)
def test_variance_and_mean_are_exact(claim):
    initializer, distribution = CLAIMS[claim]
    values = draw(initializer, (800, 1250))
    expected = distribution(800, 1250)
    mean, variance, _, excess = (float(m) for m in expected.stats("mvsk"))
    n = values.size
    assert abs(values.mean() - mean) < 5 * math.sqrt(variance / n)
    assert abs(values.var() / variance - 1) < 5 * math.sqrt((excess + 2) / n)  # standard error of a sample variance
    low, high = expected.support()
    assert low <= values.min()
    assert values.max() <= high


@pytest.mark.parametrize(
    ("wrong", "claim"),
    [
        (keras.initializers.HeNormal(seed=1), "HeNormal"),  # truncated instead of plain, with the right variance
        (HeNormal(seed=1), "HeNormal truncated"),
        (HeNormal(seed=1, input_axes=(1,), output_axes=(0,)), "HeNormal"),  # fans swapped
        (HeUniform(seed=1, input_axes=(1,), output_axes=(0,)), "HeUniform"),
        (HeNormal(seed=1), "XavierNormal"),
        (HeUniform(seed=1), "HeNormal"),
    ],
)
def test_these_tests_can_fail(wrong, claim):
    expected = CLAIMS[claim][1](300, 200)
    assert stats.kstest(KERNELS["Dense"].values(wrong).ravel(), expected.cdf).pvalue < 1e-6


@pytest.mark.parametrize(
    ("ours", "keras_own"),
    [
        (XavierUniform(seed=3), keras.initializers.GlorotUniform(seed=3)),
        (XavierNormal(seed=3, truncated=True), keras.initializers.GlorotNormal(seed=3)),
        (XavierNormal(seed=3), keras.initializers.VarianceScaling(1.0, "fan_avg", "untruncated_normal", seed=3)),
        (HeUniform(seed=3), keras.initializers.HeUniform(seed=3)),
        (HeNormal(seed=3, truncated=True), keras.initializers.HeNormal(seed=3)),
        (LeCunUniform(seed=3), keras.initializers.LecunUniform(seed=3)),
        (LeCunNormal(seed=3, truncated=True), keras.initializers.LecunNormal(seed=3)),
        (LeCunNormal(seed=3, gain="relu"), HeNormal(seed=3)),
        (
            RandomTruncatedNormal(1.0, 2.0, corrected=False, seed=3),
            keras.initializers.TruncatedNormal(1.0, 2.0, seed=3),
        ),
        (RandomNormal(1.0, 2.0, seed=3), keras.initializers.RandomNormal(1.0, 2.0, seed=3)),
        (RandomUniform(1.0, 2.0, seed=3), keras.initializers.RandomUniform(1.0, 2.0, seed=3)),
        (Orthogonal(2.0, seed=3), keras.initializers.Orthogonal(2.0, seed=3)),
    ],
)
def test_keras_draws_the_same_where_the_claims_coincide(ours, keras_own):
    for shape in ((6, 5), (3, 3, 2, 7), (2, 2, 2, 3, 40)):
        np.testing.assert_allclose(draw(ours, shape), draw(keras_own, shape), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cls", ALL)
def test_half_precision_is_float32_rounded(cls, dtype):
    initializer = cls(seed=5)
    rounded = keras.ops.cast(keras.ops.cast(initializer((30, 20), dtype="float32"), dtype), "float64")
    np.testing.assert_array_equal(draw(initializer, (30, 20), dtype), keras.ops.convert_to_numpy(rounded))


def test_bfloat16_uniform_is_centred():
    ours, keras_own = (
        draw(cls(-1.0, 1.0, seed=1), (1000, 1000), "bfloat16")
        for cls in (RandomUniform, keras.initializers.RandomUniform)
    )
    error = math.sqrt(1 / 3 / ours.size)
    assert abs(ours.mean()) < 5 * error
    assert abs(keras_own.mean()) > 10 * error  # the reason for drawing in float32


# -- fans -------------------------------------------------------------------------------------------------------------


class Lazy(keras.Model):
    """Keras makes such a model's variables after its layers have been called."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = list(parts)

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


def test_lazily_made_variables_have_true_fans():
    shared = HeNormal(seed=2)
    depthwise = layers.DepthwiseConv2D(3, depth_multiplier=4, depthwise_initializer=shared)
    again = layers.DepthwiseConv2D(3, depthwise_initializer=shared, padding="same")
    conv = layers.Conv2D(5, 3, kernel_initializer=shared)
    Lazy(depthwise, again, conv)(np.zeros((1, 7, 7, 1000), "float32"))
    for layer, fan_in in ((depthwise, 9), (again, 9), (conv, 9 * 4000)):
        values = kernel(layer)
        assert abs(values.var() * fan_in / 2 - 1) < 5 * math.sqrt(2 / values.size)


def test_one_instance_serves_kernels_of_one_shape_in_different_layers():
    shared = HeUniform()
    depthwise = layers.DepthwiseConv2D(3, depthwise_initializer=shared)
    conv = layers.Conv2D(1, 3, kernel_initializer=shared)
    for layer in (depthwise, conv):
        layer.build((None, 9, 9, 500))
    assert kernel(depthwise).shape == kernel(conv).shape
    assert math.sqrt(6 / 9) * 0.95 < abs(kernel(depthwise)).max() <= math.sqrt(6 / 9)
    assert math.sqrt(6 / 4500) * 0.95 < abs(kernel(conv)).max() <= math.sqrt(6 / 4500)


def test_axes_can_be_given():
    shape = (3, 3, 400, 4)
    by_hand = HeUniform(seed=1, input_axes=(0, 1), output_axes=[0, 1, 3])
    assert math.sqrt(6 / 9) * 0.99 < abs(draw(by_hand, shape)).max() <= math.sqrt(6 / 9)
    by_hand = XavierUniform(seed=1, input_axes=(0, 1), output_axes=(0, 1, 3))
    assert math.sqrt(6 / 45) * 0.99 < abs(draw(by_hand, shape)).max() <= math.sqrt(6 / 45)
    assert draw(HeUniform(input_axes=(0,), output_axes=()), (5,)).shape == (5,)
    vector = draw(Orthogonal(input_axes=(0,), output_axes=()), (5,))
    assert np.sum(vector**2) == pytest.approx(1, abs=1e-12)


def conv_lstm(rank, **arguments):
    cls = (layers.ConvLSTM1D, layers.ConvLSTM2D, layers.ConvLSTM3D)[rank - 1]
    return cls(40 // rank, 2, **arguments), (None, 3, *[4] * rank, 12 // rank), 4


RECURRENT = {
    "LSTM": lambda **a: (layers.LSTM(40, **a), (None, 3, 30), 4),
    "GRU": lambda **a: (layers.GRU(40, **a), (None, 3, 30), 3),
    "GRU, reset before": lambda **a: (layers.GRU(40, reset_after=False, **a), (None, 3, 30), 3),
    "SimpleRNN": lambda **a: (layers.SimpleRNN(60, **a), (None, 3, 50), 1),
    "RNN(cell)": lambda **a: (layers.RNN(layers.LSTMCell(40, **a)), (None, 3, 30), 4),
    "RNN([cells])": lambda **a: (layers.RNN([layers.GRUCell(30, **a), layers.GRUCell(40, **a)]), (None, 3, 30), 3),
    "Bidirectional": lambda **a: (layers.Bidirectional(layers.LSTM(40, **a)), (None, 3, 30), 4),
    "ConvLSTM1D": lambda **a: conv_lstm(1, **a),
    "ConvLSTM2D": lambda **a: conv_lstm(2, **a),
    "ConvLSTM3D": lambda **a: conv_lstm(3, **a),
}


def gates(name, initializer):
    """Each gate of each kernel of a recurrent layer as a matrix, with its window."""
    layer, shape, count = RECURRENT[name](kernel_initializer=initializer, recurrent_initializer=initializer)
    layer.build(shape)
    kernels = [np.asarray(keras.ops.convert_to_numpy(v), "float64") for v in layer.weights if "kernel" in v.name]
    assert len(kernels) >= 2
    return [
        (gate.reshape(-1, gate.shape[-1]), math.prod(kernel.shape[:-2]))
        for kernel in kernels
        for gate in np.split(kernel, count, axis=-1)
    ]


@pytest.mark.parametrize("name", RECURRENT)
def test_each_gate_is_a_map_of_its_own(name):
    for matrix, _ in gates(name, Orthogonal(gain=2.0)):
        short = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        np.testing.assert_allclose(short @ short.T, 4 * np.eye(len(short)), atol=1e-5)
    for initializer, variance in ((XavierUniform(), xavier), (XavierNormal(), xavier), (HeUniform(), he)):
        for matrix, window in gates(name, initializer):
            claimed = variance(matrix.shape[0], window * matrix.shape[1]) ** 2
            assert abs(matrix.var() / claimed - 1) < 5 * math.sqrt(2 / matrix.size)


def test_one_instance_serves_gates_and_what_looks_like_them():
    shared = Orthogonal()
    lstm, dense = layers.LSTM(5, kernel_initializer=shared), layers.Dense(20, kernel_initializer=shared)
    lstm.build((None, 3, 10))
    dense.build((None, 10))
    matrix = kernel(dense)
    assert tuple(lstm.cell.kernel.shape) == matrix.shape
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(10), atol=1e-5)  # all 20 columns are one map
    lazily = layers.LSTM(5, kernel_initializer=shared)
    Lazy(lazily)(np.zeros((1, 3, 10), "float32"))
    for gate in np.split(kernel(lazily.cell), 4, axis=1):
        np.testing.assert_allclose(gate.T @ gate, np.eye(5), atol=1e-5)


def test_a_cell_of_ones_own_has_gates_where_it_says_so():
    class Minimal(layers.Layer):
        def __init__(self, units, recurrent_initializer, **arguments):
            super().__init__(**arguments)
            self.units = self.state_size = units
            self.recurrent_initializer = recurrent_initializer

        def build(self, shape):
            self.kernel = self.add_weight(shape=(self.units, 2 * self.units), initializer=self.recurrent_initializer)

    cell = Minimal(30, XavierUniform())
    cell.build((None, 7))
    assert abs(kernel(cell).var() * 30 - 1) < 5 * math.sqrt(2 / 1800)


# -- orthogonality ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(7, 4), (4, 7), (5, 5), (3, 2, 9), (3, 3, 2, 5), (3, 3, 2, 40), (2, 2, 2, 3, 6), (1, 1)]
)
def test_orthogonal_to_rounding_in_float64(shape):
    matrix = draw(Orthogonal(gain=1.5, seed=1), shape).reshape(-1, shape[-1])
    product = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
    np.testing.assert_allclose(product, 2.25 * np.eye(min(matrix.shape)), atol=1e-13)


def test_orthogonal_keeps_the_norm_through_attention():
    layer = layers.EinsumDense("abc,cde->abde", (None, 4, 8), kernel_initializer=Orthogonal(), dtype="float64")
    x = np.random.default_rng(0).normal(size=(2, 3, 20))
    y = np.asarray(keras.ops.convert_to_numpy(layer(x)))
    np.testing.assert_allclose(np.sum(y**2, axis=(2, 3)), np.sum(x**2, axis=2), rtol=1e-12)


def test_orthogonal_matrices_are_uniform():
    layer = layers.DepthwiseConv1D(2, depth_multiplier=2, depthwise_initializer=Orthogonal(seed=1))
    layer.build((None, 5, 5000))
    values = kernel(layer)
    # An entry of a Haar matrix of rank 2 is the cosine of a uniform angle; a bare QR has a fixed sign on the diagonal.
    for i in range(2):
        for j in range(2):
            angle = np.arccos(np.clip(values[i, :, j], -1, 1))
            assert stats.kstest(angle, uniform(0, math.pi).cdf).pvalue > 1e-3


# -- seeds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_unseeded_draws_follow_the_global_seed(cls):
    keras.utils.set_random_seed(11)
    first = draw(cls(), (4, 3))
    keras.utils.set_random_seed(11)
    np.testing.assert_array_equal(draw(cls(), (4, 3)), first)


def test_attention_kernels_differ():
    layer = layers.MultiHeadAttention(2, 4, kernel_initializer=HeNormal())
    layer.build((None, 3, 8), (None, 3, 8))
    kernels = [kernel(part) for part in (layer.query_dense, layer.key_dense, layer.value_dense)]
    assert not np.allclose(kernels[0], kernels[1])
    assert not np.allclose(kernels[1], kernels[2])


def test_seed_generator_moves_on_and_is_saved():
    initializer = HeNormal(seed=keras.random.SeedGenerator(3))
    first, second = draw(initializer, (4, 3)), draw(initializer, (4, 3))
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(draw(roundtrip.through_json(initializer, {}), (4, 3)), first)


def test_numpy_seed_becomes_an_int():
    assert type(HeNormal(seed=np.int64(3)).get_config()["seed"]) is int


def test_replicas_start_from_the_same_unseeded_weights():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((4,)), layers.Dense(3, kernel_initializer=HeNormal())])
    one, two = strategy.experimental_local_results(model.layers[0].kernel.value)
    np.testing.assert_array_equal(one.numpy(), two.numpy())


# -- use and misuse ---------------------------------------------------------------------------------------------------


def test_drops_into_a_compiled_model():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 6, 6, 2)), rng.integers(0, 3, 64)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3, activation="relu", kernel_initializer="keras_optkit>HeNormal"),
            layers.DepthwiseConv2D(3, depthwise_initializer=HeUniform()),
            layers.Flatten(),
            layers.Dense(8, kernel_initializer=Orthogonal(), bias_initializer=RandomNormal(stddev=0.01)),
            layers.Dense(3, kernel_initializer=XavierNormal()),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    losses = model.fit(x, y, epochs=8, batch_size=32, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    np.testing.assert_array_equal(roundtrip.through_file(model).predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: HeNormal(seed=1.5), ["seed", "1.5", "integer"]),
        (lambda: HeNormal(seed=True), ["seed", "True", "integer"]),
        (lambda: Orthogonal(seed="3"), ["seed", "'3'", "integer"]),
        (lambda: HeNormal(truncated=1), ["truncated", "1", "True or False"]),
        (lambda: XavierUniform(input_axes=(0,)), ["input_axes", "output_axes", "together", "(0,)"]),
        (lambda: XavierUniform(input_axes=0, output_axes=1), ["input_axes", "0", "list or tuple"]),
        (lambda: XavierUniform(input_axes=(-1,), output_axes=(0,)), ["input_axes[0]", "-1", "at least 0"]),
        (lambda: XavierUniform(input_axes=(0,), output_axes=(5,))((3, 4)), ["output_axes", "(5,)", "0 to 1", "(3, 4)"]),
        (lambda: RandomNormal(stddev=0), ["stddev", "0", "(0"]),
        (lambda: RandomNormal(stddev=-1.0), ["stddev", "-1.0", "(0"]),
        (lambda: RandomNormal(mean=float("nan")), ["mean", "nan", "finite"]),
        (lambda: RandomNormal(mean="0"), ["mean", "'0'", "number"]),
        (lambda: RandomUniform(1.0, 1.0), ["maxval", "1.0"]),
        (lambda: RandomUniform(-math.inf, 1.0), ["minval", "inf"]),
        (lambda: Orthogonal(gain=0.0), ["gain", "0.0", "(0"]),
        (lambda: Orthogonal(gain="rleu"), ["gain", "'rleu'", "'linear'", "Did you mean 'relu'"]),
        (lambda: LeCunNormal(gain=-1.0), ["gain", "-1.0", "(0"]),
        (lambda: XavierUniform(gain=None), ["gain", "None", "number"]),
        (lambda: HeUniform(negative_slope="0.1"), ["negative_slope", "'0.1'", "number"]),
        (lambda: SIREN(omega_0=0), ["omega_0", "0", "(0"]),
        (lambda: SIREN(first=1), ["first", "1", "True or False"]),
        (lambda: RandomTruncatedNormal(stddev=0.0), ["stddev", "0.0", "(0"]),
        (lambda: RandomTruncatedNormal(corrected="no"), ["corrected", "'no'", "True or False"]),
        (lambda: Sparse(connections=0), ["connections", "0", "at least 1"]),
        (lambda: Sparse(sparsity=1.0), ["sparsity", "1.0", "[0, 1)"]),
        (lambda: Sparse(3, 0.5), ["connections", "sparsity", "3", "0.5", "together"]),
        (lambda: DeltaOrthogonal()((5,)), ["(5,)", "rank 2 or more"]),
        (lambda: HeNormal()((5,)), ["(5,)", "rank 2 or more", "input_axes"]),
        (lambda: Orthogonal()((5,)), ["(5,)", "rank 2 or more", "input_axes"]),
        (lambda: RandomNormal()(()), ["()", "rank 1 or more"]),
        (lambda: HeNormal(input_axes=(), output_axes=())(()), ["()", "rank 1 or more"]),
        (lambda: HeNormal()((2, 3), dtype="int32"), ["dtype", "int32", "float32"]),
    ],
)
def test_bad_input_is_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


@keras.saving.register_keras_serializable("tests")
class Swapped(XavierUniform):
    """He's formula with the wrong fan, and a config that loses its seed."""

    def _variance(self, _fan_in, fan_out):
        return 2 / fan_out

    def get_config(self):
        return {}


@keras.saving.register_keras_serializable("tests")
class Frozen(keras.initializers.Orthogonal):
    """Keras's own: one seed for all calls of an instance, and a depthwise kernel read as one matrix."""


def test_the_suite_finds_planted_bugs():
    claims = {"tags": frozenset({"variance"}), "twin": lambda fan_in, _out, **_: math.sqrt(2 / fan_in)}
    broken = ok.testing.failures(Card(name="Swapped", kind="initializer", make=Swapped, cases=({"seed": 1},), **claims))
    assert {"variance", "config_round_trip"} <= set(broken)
    claims = {"tags": frozenset({"orthogonal"}), "twin": lambda **_: 1.0}
    broken = ok.testing.failures(Card(name="Frozen", kind="initializer", make=Frozen, **claims))
    assert {"orthogonal", "fresh_without_seed", "dtype"} <= set(broken)

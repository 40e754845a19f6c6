"""Kernels in another form: against NumPy and torch, folded, trained. The conformance suite has what layers promise."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from torch_references import in_torch, parametrized_run

import keras_optkit as ok
from keras_optkit.kernels import as_matrices
from keras_optkit.layers import SpectralNormalization, WeightNormalization, WeightStandardization
from keras_optkit.testing import roundtrip
from keras_optkit.testing.tools import float64, numbers

WRAPPERS = [WeightNormalization, WeightStandardization, SpectralNormalization]


def array(x):
    return numbers(x.value if isinstance(x, keras.Variable) else x)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(0.5, 2.0, size=shape)


def numpy_weight_norm(v, inputs, g):
    return g * v / np.sqrt(np.sum(v**2, inputs, keepdims=True))


def numpy_standardized(v, inputs, g=1.0, gain=None):
    fan_in = np.prod([v.shape[axis] for axis in inputs])
    scale = 1.0 if gain is None else g * gain * fan_in**-0.5
    return scale * (v - v.mean(inputs, keepdims=True)) / np.sqrt(v.var(inputs, keepdims=True) + 1e-6)


#: Layers, the shape of an input, and over which axes of each kernel a unit's inputs run.
KERNELS = {
    "Dense": (lambda **k: layers.Dense(3, **k), (2, 5), [(0,)]),
    "Conv1D": (lambda **k: layers.Conv1D(3, 2, **k), (2, 6, 4), [(0, 1)]),
    "Conv2D": (lambda **k: layers.Conv2D(4, 3, padding="same", groups=2, **k), (2, 5, 5, 4), [(0, 1, 2)]),
    "Conv3D": (lambda **k: layers.Conv3D(2, 2, **k), (1, 3, 3, 3, 2), [(0, 1, 2, 3)]),
    "Conv2DTranspose": (lambda **k: layers.Conv2DTranspose(4, 3, **k), (2, 4, 4, 3), [(0, 1, 3)]),
    "DepthwiseConv2D": (lambda **k: layers.DepthwiseConv2D(3, **k), (2, 5, 5, 4), [(0, 1)]),
    "SeparableConv1D": (lambda **k: layers.SeparableConv1D(4, 3, **k), (2, 5, 3), [(0,), (0, 1)]),
    "EinsumDense": (lambda **k: layers.EinsumDense("abc,cde->abde", (None, 2, 3), **k), (2, 4, 5), [(0,)]),
    "Embedding": (lambda **k: layers.Embedding(6, 3, **k), (2, 5), [(1,)]),
    "LSTM": (lambda **k: layers.LSTM(3, unroll=True, **k), (2, 2, 4), [(0,), (0,)]),
}
CASES = [(make, name) for make in WRAPPERS for name in KERNELS if (make, name) != (WeightStandardization, "Embedding")]


def built(make, name, **more):
    """A wrapper around a float64 layer, its input, and over which axes a unit's inputs run."""
    layer, shape, inputs = KERNELS[name]
    wrapper = make(layer(dtype="float64"), **more)
    wrapper.build(shape)
    x = np.arange(10).reshape(shape) % 6 if name == "Embedding" else normal(*shape)
    return wrapper, x, inputs


@pytest.mark.few(12)
@pytest.mark.once  # on JAX each operation is compiled by itself, which takes minutes
@pytest.mark.parametrize(("make", "name"), CASES)
@float64()
def test_forms_are_the_formula_and_fold_bit_for_bit(make, name):
    more = {
        WeightNormalization: {},
        WeightStandardization: {"scaled": True, "gain": 1.7},
        SpectralNormalization: {"seed": 1, "power_iterations": 60},
    }[make]
    wrapper, x, inputs = built(make, name, **more)
    start = array(wrapper(x))
    if make is WeightNormalization:  # which changes nothing at first
        np.testing.assert_allclose(array(wrapper.layer(x)), start, 1e-12, 1e-12)
    if make is SpectralNormalization:
        wrapper(x, training=True)
    plain = wrapper.fold()
    assert type(plain) is type(wrapper.layer)
    assert plain.get_config() == wrapper.layer.get_config()
    assert len(wrapper._parts) == len(inputs)
    for part, axes in zip(wrapper._parts, inputs, strict=True):
        assert part.axes.inputs == axes or make is SpectralNormalization
        for extra in part.extra:
            assert extra.dtype == "float64"
            if make is not SpectralNormalization:
                extra.assign(normal(*extra.shape))
    plain = wrapper.fold()
    np.testing.assert_array_equal(array(plain(x)), array(wrapper(x)))
    where = {id(variable): place for place, variable in enumerate(wrapper.layer.variables)}
    for part, axes in zip(wrapper._parts, inputs, strict=True):
        v, w = array(part.kernel), array(plain.variables[where[id(part.kernel)]])
        if make is WeightNormalization:
            np.testing.assert_allclose(w, numpy_weight_norm(v, axes, array(part.extra[0])), rtol=1e-12)
        elif make is WeightStandardization:
            np.testing.assert_allclose(w, numpy_standardized(v, axes, array(part.extra[0]), 1.7), rtol=1e-10)
        else:
            matrices = [array(as_matrices(keras.ops.convert_to_tensor(k[None]), part.axes)) for k in (v, w)]
            norms = [np.linalg.norm(m, 2, axis=(1, 2)) for m in matrices]
            np.testing.assert_allclose(norms[1], 1.0, atol=0.02)
            sigma = matrices[0][:, 0, 0] / matrices[1][:, 0, 0]
            assert (sigma <= norms[0] * (1 + 1e-12)).all()  # an estimate from below
            np.testing.assert_allclose(matrices[0], sigma[:, None, None] * matrices[1], rtol=1e-12)


@float64()
def test_unscaled_standardisation_is_the_formula():
    for name in ("Dense", "Conv2D"):
        wrapper, _, (axes,) = built(WeightStandardization, name)
        expected = numpy_standardized(array(wrapper.layer.kernel), axes)
        np.testing.assert_allclose(array(wrapper.fold().kernel), expected, rtol=1e-10)


@float64()
def test_spectral_norm_is_algorithm_1():
    wrapper = SpectralNormalization(layers.Dense(3, use_bias=False, dtype="float64"), power_iterations=2, seed=1)
    x = normal(2, 5)
    wrapper.build(x.shape)
    w, (u, v) = array(wrapper.layer.kernel).T, (array(part)[0, :, 0] for part in wrapper._parts[0].extra)
    for training in (True, True, False):
        y = array(wrapper(x, training=training))
        for _ in range(2 * training):
            v = w.T @ u / np.linalg.norm(w.T @ u)
            u = w @ v / np.linalg.norm(w @ v)
        for kept, expected in zip(wrapper._parts[0].extra, (u, v), strict=True):
            np.testing.assert_allclose(array(kept)[0, :, 0], expected, rtol=1e-10)
        np.testing.assert_allclose(y, x @ w.T / (u @ w @ v), rtol=1e-10)
    np.testing.assert_array_equal(array(wrapper.layer.kernel).T, w)  # which Keras's own overwrites


@pytest.mark.once
@pytest.mark.parametrize(("name", "images"), [("weight_norm", False), ("weight_norm", True), ("spectral_norm", False)])
def test_training_is_that_of_torch(name, images, float64):  # noqa: ARG001
    """torch does the two halves of a power iteration in the paper's order for the transposed matrix, `dim=1`."""
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(6, 5, 5, 4) if images else (6, 5)) for _ in range(3)]
    ys = [rng.normal(size=(6, 4, 3, 3) if images else (6, 3)) for _ in range(3)]
    made = {"use_bias": False, "dtype": "float64"}
    inner = layers.Conv2D(3, (2, 3), **made) if images else layers.Dense(3, **made)
    layer = SpectralNormalization(inner, power_iterations=2) if name == "spectral_norm" else WeightNormalization(inner)
    model = keras.Sequential([keras.Input(xs[0].shape[1:], dtype="float64"), layer])
    start, extra = array(inner.kernel), layer._parts[0].extra
    state, arguments = {}, {"dim": 0}
    if name == "spectral_norm":
        state = {"_u": array(extra[1])[0, :, 0], "_v": array(extra[0])[0, :, 0]}
        arguments = {"dim": 1, "n_power_iterations": 2}

    def theirs(x):
        return np.moveaxis(x, -1, 1) if images else x

    weight = np.transpose(start, (3, 2, 0, 1)) if images else start.T
    batches = [[theirs(x) for x in each] for each in (xs, ys)]
    found = in_torch(parametrized_run, name, arguments, {"weight": weight, **state}, *batches, 0.5)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    for x, y, step in zip(xs, ys, found, strict=False):
        model.train_on_batch(x, y)
        v = step["original" if name == "spectral_norm" else "original1"]
        np.testing.assert_allclose(array(inner.kernel), np.transpose(v, (2, 3, 1, 0)) if images else v.T, rtol=1e-9)
        kept = [step["_v"], step["_u"]] if name == "spectral_norm" else [step["original0"]]
        for variable, expected in zip(extra, kept, strict=True):
            np.testing.assert_allclose(array(variable).ravel(), expected.ravel(), rtol=1e-9)
    np.testing.assert_allclose(theirs(array(model(xs[0]))), found[-1]["outputs"], 1e-8, 1e-12)


class Counting(layers.Layer):
    """A layer with a kernel, and variables of its own that a call changes and that no precision holds."""

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 2))
        self.total = self.add_weight(name="total", shape=(1, 2), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.total.assign(self.total + keras.ops.convert_to_tensor(0.1, self.total.dtype))
        self.add_loss(keras.ops.sum(keras.ops.cast(self.total, "float32")))
        return keras.ops.matmul(inputs, self.kernel)


@pytest.mark.parametrize("dtype", ["float64", "mixed_float16"])
@float64()
def test_other_variables_keep_their_precision(dtype):
    """Also where a layer of another precision calls the wrapper."""
    wrapper = SpectralNormalization(Counting(dtype=dtype))
    kept = wrapper.layer
    outer = layers.TimeDistributed(wrapper, dtype="mixed_bfloat16")
    outer(np.ones((3, 2, 4), "float32"))
    third = 1 / 3 if dtype == "float64" else float(np.float32(1 / 3))
    kept.total.assign(np.full((1, 2), third))
    kept.kernel.assign(np.full((4, 2), third))
    outer(np.ones((3, 2, 4), "float32"), training=True)
    assert kept.kernel.dtype == wrapper._parts[0].extra[0].dtype == ("float64" if dtype == "float64" else "float32")
    np.testing.assert_array_equal(array(kept.kernel), third)
    assert (array(kept.total) > third).all()
    size = array(wrapper._parts[0].extra[0])  # all elements are equal in length, as no half precision has them
    np.testing.assert_allclose(np.abs(size), 0.5**0.5, rtol=1e-12 if dtype == "float64" else 1e-6)


@pytest.mark.few(1)
@pytest.mark.parametrize("make", WRAPPERS)
def test_losses_and_random_states_are_those_of_the_layer(make):
    """A penalty of the kernel is of that which is used, of activities it counts once, and `fit` adds up all."""
    inner = layers.Dense(3, kernel_regularizer="l2", activity_regularizer=ok.regularizers.L1(0.5))
    counting = make(Counting())
    model = keras.Sequential([keras.Input((5,)), make(inner), counting])
    model.compile(keras.optimizers.SGD(0.0), lambda _, y: 0.0 * y, jit_compile=True)
    x = normal(4, 5).astype("float32")
    y = array(model.layers[0](x))
    expected = [0.01 * np.sum(array(model.layers[0].fold().kernel) ** 2), 0.5 * np.abs(y).sum() / 4, 0.2]
    model(x)
    penalties = sorted(float(loss) for loss in model.losses)
    np.testing.assert_allclose(penalties, sorted(expected), rtol=1e-5)
    expected = sum(expected) + 0.2  # the total is counted up, twice
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), expected, rtol=1e-5)
    if make is not SpectralNormalization:  # whose norm is another one in training
        np.testing.assert_allclose(model.train_on_batch(x, y), expected + 0.2, rtol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("make", WRAPPERS)
def test_recurrent_layers(make):
    """Random states move, state and masks are those of the layer."""
    inner = layers.LSTM(2, dropout=0.5, stateful=True, unroll=True, seed=1)
    inputs = keras.Input(batch_shape=(3, 2, 4))
    model = keras.Model(inputs, make(inner)(layers.Masking()(inputs)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = normal(3, 2, 4).astype("float32")
    x[0, 1] = 0.0  # masked
    moving = [*model.trainable_variables, inner.cell.seed_generator.state]
    before = [array(v) for v in moving]
    model.train_on_batch(x, np.ones((3, 2)))
    for variable, value in zip(moving, before, strict=True):
        assert (array(variable) != value).any(), variable.path
    plain = model.layers[-1].fold()
    for _ in range(2):
        expected = array(model.layers[-1](x, mask=x.any(-1)))
        np.testing.assert_array_equal(array(plain(x, mask=x.any(-1))), expected)
    assert all(array(state).all() for state in inner.states)
    again = roundtrip.through_file(model)
    inner.reset_state()  # which Keras does not save
    np.testing.assert_allclose(array(again(x)), array(model(x)), 1e-6, 1e-6)


def test_attention_has_four_kernels():
    plain = layers.MultiHeadAttention(2, 3)
    plain.build((2, 4, 5), (2, 4, 5))
    wrapper, x = WeightNormalization(plain), normal(2, 4, 5).astype("float32")
    wrapper.build((2, 4, 5))
    assert len(wrapper._parts) == 4
    np.testing.assert_allclose(array(wrapper(x, x)), array(plain(x, x)), 1e-5, 1e-5)
    inputs = keras.Input((4, 5))
    assert wrapper(inputs, inputs).shape == (None, 4, 5)
    assert wrapper.compute_output_shape((2, 4, 5), (2, 4, 5)) == (2, 4, 5)
    with pytest.raises(ValueError, match="layer must be built if it has several inputs"):
        WeightNormalization(layers.MultiHeadAttention(2, 3))(x, x)


def test_half_precision_is_computed_in_float32():
    inner = layers.Dense(3, dtype="mixed_float16")
    wrapper = WeightNormalization(inner)
    wrapper.build((2, 4))
    inner.kernel.assign(np.full((4, 3), 300.0))  # whose squares float16 does not hold
    assert wrapper.compute_dtype == "float16"
    np.testing.assert_allclose(array(wrapper(np.ones((1, 4), "float32"))), 2 * array(wrapper._parts[0].extra[0]), 1e-3)


@pytest.mark.parametrize("make", WRAPPERS)
def test_a_kernel_of_zeros_trains(make):
    wrapper = make(layers.Dense(3, kernel_initializer="zeros"))
    model = keras.Sequential([keras.Input((4,)), wrapper])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(normal(2, 4), np.ones((2, 3)))
    assert all(np.isfinite(array(v)).all() for v in model.weights)
    if make is SpectralNormalization:  # and finds its way from there
        for _ in range(9):
            model(normal(2, 4), training=True)
        np.testing.assert_allclose(np.linalg.norm(array(wrapper.fold().kernel), 2), 1.0, rtol=1e-3)


def test_a_model_folds_by_cloning():
    inputs = keras.Input((6, 3))
    x = layers.ReLU()(SpectralNormalization(layers.Conv1D(4, 2))(inputs))
    model = keras.Model(inputs, WeightNormalization(layers.Dense(2))(x))
    plain = keras.models.clone_model(model, clone_function=lambda layer: getattr(layer, "fold", lambda: layer)())
    x = normal(2, 6, 3).astype("float32")
    assert not any(isinstance(layer, layers.Wrapper) for layer in plain.layers)
    np.testing.assert_array_equal(array(plain(x)), array(model(x)))


def test_a_frozen_wrapper_iterates_not_and_is_loaded():
    wrapper = SpectralNormalization(layers.Dense(3))
    model = keras.Sequential([keras.Input((4,)), wrapper])
    wrapper.trainable = False
    before = [array(v) for v in wrapper.variables]
    model(normal(2, 4), training=True)
    for variable, value in zip(wrapper.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), value)
    again = roundtrip.through_file(model)
    np.testing.assert_array_equal(array(again(normal(2, 4))), array(model(normal(2, 4))))


def quantized():
    wrapper = WeightNormalization(layers.Dense(2))
    wrapper.build((2, 3))
    wrapper.layer.quantize("int8")
    return wrapper(np.ones((2, 3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WeightNormalization("dense"), ["layer", "'dense'", "keras.Layer"]),
        (lambda: WeightNormalization(WeightNormalization(layers.Dense(2))), ["layer", "already"]),
        (lambda: WeightNormalization(keras.Sequential([layers.Dense(2)])), ["layer", "model"]),
        (lambda: WeightNormalization(layers.Dense(2), dtype="float64"), ["dtype", "'float32'", "'float64'"]),
        (lambda: WeightNormalization(layers.ReLU())(np.ones((2, 3))), ["layer", "kernels or embeddings", "ReLU"]),
        (lambda: WeightStandardization(layers.Embedding(2, 3))(np.ones((2, 3))), ["layer", "kernels", "Embedding"]),
        (lambda: WeightStandardization(layers.DepthwiseConv1D(1))(np.ones((2, 3, 4))), ["one input", "(1, 4, 1)"]),
        (
            lambda: WeightNormalization(layers.Dense(2, kernel_constraint="non_neg"))(np.ones((2, 3))),
            ["constraint", "NonNeg", "kernel"],
        ),
        (lambda: WeightNormalization(layers.Dense(2, lora_rank=1))(np.ones((2, 3))), ["layer", "LoRA"]),
        (quantized, ["replaced", "quantize", "fold()"]),
        (lambda: WeightNormalization(layers.Dense(2)).fold(), ["fold", "built"]),
        (lambda: WeightStandardization(layers.Dense(2), scaled=1), ["scaled", "1", "True or False"]),
        (lambda: WeightStandardization(layers.Dense(2), gain=2.0), ["gain", "2.0", "scaled"]),
        (lambda: WeightStandardization(layers.Dense(2), epsilon=0), ["epsilon", "0", "(0"]),
        (lambda: SpectralNormalization(layers.Dense(2), 0), ["power_iterations", "0", "at least 1"]),
        (lambda: SpectralNormalization(layers.Dense(2), seed="a"), ["seed", "'a'", "integer"]),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.only_on("tensorflow", because="elsewhere no step is begun without a batch")
def test_state_moves_once_for_each_batch():
    """Also where the data end, and TensorFlow runs a step up to what needs the batch that is missing."""
    import tensorflow as tf

    model = keras.Sequential([keras.Input((4,)), SpectralNormalization(layers.Dense(3), seed=1)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    part = model.layers[0]._parts[0]
    part.extra[0].assign(np.ones((1, 3, 1)) / 3**0.5)
    w, u = array(part.kernel).T, np.ones(3) / 3**0.5
    data = tf.data.Dataset.from_generator(
        lambda: iter([(np.ones((2, 4), "float32"), np.ones((2, 3), "float32"))] * 2),
        output_signature=(tf.TensorSpec((2, 4)), tf.TensorSpec((2, 3))),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras's, that the data ran out
        for _ in range(2):
            model.fit(data, shuffle=False, verbose=0)
    for _ in range(4):
        u = w @ w.T @ u / np.linalg.norm(w @ w.T @ u)
    np.testing.assert_allclose(array(part.extra[0])[0, :, 0], u, 1e-4, 1e-5)

"""Penalties on kernels as matrices, on distances and on activations, against NumPy: values and gradients."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_optkit.kernels import role
from keras_optkit.regularizers import (
    L2SP,
    ConfidencePenalty,
    GroupLasso,
    KLSparsity,
    NuclearNorm,
    Orthogonality,
    SpectralNorm,
)
from keras_optkit.testing import roundtrip
from keras_optkit.testing.checks.regularizers import _value_and_gradient
from keras_optkit.testing.tools import float64, numbers

START = np.random.default_rng(9).normal(size=(4, 3))
#: The random vectors of the estimates.
VECTOR = np.random.default_rng(0).normal(size=3)


def srip(w):
    a = w.T @ w - np.eye(3)
    return np.linalg.norm(a @ a @ VECTOR) / np.linalg.norm(a @ VECTOR)


def spectral(w, iterations):
    v = VECTOR
    for _ in range(iterations):
        v = w.T @ w @ v / np.linalg.norm(w.T @ w @ v)
    return v


def entropy(p):
    return -(p * np.log(p)).sum(-1)


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def divergence(x, rho):
    means = x.mean(0)
    return len(x) * (rho * np.log(rho / means) + (1 - rho) * np.log((1 - rho) / (1 - means))).sum()


#: Regularizers and their penalties on a (4, 3) matrix of elements between 0 and 1, or with a known gradient.
FORMULAS = {
    "group lasso": (GroupLasso(0.3), lambda w: 0.3 * 4**0.5 * np.sqrt((w**2).sum(0)).sum()),
    "group lasso, inputs": (GroupLasso(0.3, by="input"), lambda w: 0.3 * 3**0.5 * np.sqrt((w**2).sum(1)).sum()),
    "soft": (Orthogonality(0.3), lambda w: 0.3 * ((w.T @ w - np.eye(3)) ** 2).sum()),
    "double": (
        Orthogonality(0.3, "double"),
        lambda w: 0.3 * (((w.T @ w - np.eye(3)) ** 2).sum() + ((w @ w.T - np.eye(4)) ** 2).sum()),
    ),
    "srip": (Orthogonality(0.3, "srip"), lambda w: 0.3 * srip(w)),
    "spectral": (SpectralNorm(0.3, power_iterations=60), lambda w: 0.15 * np.linalg.norm(w, 2) ** 2),
    "nuclear": (NuclearNorm(0.3), lambda w: 0.3 * np.linalg.norm(w, "nuc")),
    "distance": (L2SP(START, 0.3), lambda w: 0.3 * ((w - START) ** 2).sum()),
    "confidence": (ConfidencePenalty(0.3), lambda w: -0.3 * entropy(w).sum()),
    "confidence, logits": (ConfidencePenalty(0.3, from_logits=True), lambda w: -0.3 * entropy(softmax(w)).sum()),
    "confidence, threshold": (
        ConfidencePenalty(0.3, 1.05, from_logits=True),
        lambda w: 0.3 * np.maximum(0, 1.05 - entropy(softmax(w))).sum(),
    ),
    "sparsity": (KLSparsity(0.3, 0.2), lambda w: 0.3 * divergence(w, 0.2)),
}


def difference(function, w, step=1e-5):
    """The gradient by central differences."""
    gradient = np.zeros(w.shape)
    for place in np.ndindex(w.shape):
        moved = np.zeros(w.shape)
        moved[place] = step
        gradient[place] = (function(w + moved) - function(w - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("name", FORMULAS)
@float64()
def test_values_and_gradients_are_the_formula(name):
    regularizer, formula = FORMULAS[name]
    w = np.random.default_rng(1).uniform(0.05, 0.95, size=(4, 3))
    value, gradient = _value_and_gradient(regularizer, w)
    np.testing.assert_allclose(value, formula(w), rtol=1e-12)
    np.testing.assert_allclose(gradient, difference(formula, w), 1e-7, 1e-8)
    single, gradient_single = _value_and_gradient(regularizer, w.astype("float32"))
    np.testing.assert_allclose(single, value, rtol=1e-5)
    np.testing.assert_allclose(gradient_single, gradient, 1e-4, 1e-5)


@float64()
def test_the_spectral_norm_is_estimated_from_a_fixed_vector():
    w = np.random.default_rng(1).normal(size=(4, 3))
    v = spectral(w, 2)
    value, gradient = _value_and_gradient(SpectralNorm(0.3, power_iterations=2), w)
    np.testing.assert_allclose(value, 0.15 * np.sum((w @ v) ** 2), rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.3 * np.outer(w @ v, v), rtol=1e-10)  # factor σ u vᵀ
    assert value < 0.15 * np.linalg.norm(w, 2) ** 2


#: Layers, the shape of an input, and what tells a regularizer the axes of their kernel.
LAYOUTS = {
    "Dense": (layers.Dense(3), (2, 4), {}),
    "Conv2D": (layers.Conv2D(4, (2, 3)), (2, 5, 5, 3), {}),
    "grouped": (layers.Conv1D(6, 2, groups=2), (2, 5, 4), {"groups": 2}),
    "LSTM": (layers.LSTM(2), (2, 3, 4), {"groups": 4}),
    "Conv2DTranspose": (layers.Conv2DTranspose(4, 3), (2, 4, 4, 3), {"layout": "transposed"}),
    "DepthwiseConv1D": (layers.DepthwiseConv1D(3, depth_multiplier=2), (2, 5, 4), {"layout": "depthwise"}),
    "EinsumDense": (layers.EinsumDense("abc,cde->abde", (None, 2, 3)), (2, 4, 5), {"layout": "abc,cde->abde"}),
    "EinsumDense, maps": (layers.EinsumDense("abc,bcd->abd", (4, 3)), (2, 4, 5), {"layout": "abc, bcd -> abd"}),
}


@pytest.mark.once  # on JAX each operation is compiled by itself
@pytest.mark.parametrize("name", LAYOUTS)
@float64()
def test_axes_are_those_of_the_layer(name):
    layer, shape, arguments = LAYOUTS[name]
    layer.build(shape)
    layer = getattr(layer, "cell", layer)
    _, axes = role(layer.kernel, layer)
    w = np.random.default_rng(1).normal(size=layer.kernel.shape)
    found = GroupLasso(**arguments)._axes(w.shape)
    assert found == axes
    # each separate map: its inputs, with the window, by its units
    rank, groups, window = w.ndim, axes.groups, [axis for axis in axes.inputs if axis in axes.outputs]
    apart = axes.separate(rank)
    inputs = [axis for axis in axes.inputs if axis not in window]
    units = [axis for axis in axes.outputs if axis not in window]
    size = lambda chosen: int(np.prod([w.shape[axis] for axis in chosen]))  # noqa: E731
    maps = np.transpose(w, [*apart, *window, *inputs, *units])
    maps = maps.reshape(size(apart), size(window), size(inputs), groups, size(units) // groups)
    maps = np.moveaxis(maps, 3, 1).reshape(-1, *maps.shape[1:3], maps.shape[4])
    by_unit = np.sqrt((maps**2).sum((1, 2))).sum() * (maps.shape[1] * maps.shape[2]) ** 0.5
    by_input = np.sqrt((maps**2).sum((1, 3))).sum() * (maps.shape[1] * maps.shape[3]) ** 0.5
    np.testing.assert_allclose(numbers(GroupLasso(1.0, "unit", **arguments)(w)), by_unit, rtol=1e-12)
    np.testing.assert_allclose(numbers(GroupLasso(1.0, "input", **arguments)(w)), by_input, rtol=1e-12)
    matrices = maps.reshape(len(maps), -1, maps.shape[-1])
    nuclear = np.linalg.norm(matrices, "nuc", axis=(1, 2)).sum()
    np.testing.assert_allclose(numbers(NuclearNorm(1.0, **arguments)(w)), nuclear, rtol=1e-12)
    off = np.swapaxes(matrices, 1, 2) @ matrices - np.eye(matrices.shape[-1])
    np.testing.assert_allclose(numbers(Orthogonality(1.0, **arguments)(w)), (off**2).sum(), rtol=1e-12)


@float64()
def test_gradients_at_the_edges_are_zero():
    w = np.random.default_rng(1).normal(size=(4, 3))
    w[:, 1] = 0.0
    _, gradient = _value_and_gradient(GroupLasso(0.3), w)
    np.testing.assert_array_equal(gradient[:, 1], 0.0)
    assert (gradient[:, [0, 2]] != 0).all()
    q = np.eye(4)[:, :3]
    for regularizer in (Orthogonality(0.3), Orthogonality(0.3, "srip")):
        value, gradient = _value_and_gradient(regularizer, q)
        assert value == 0.0
        np.testing.assert_array_equal(gradient, 0.0)
    value, gradient = _value_and_gradient(NuclearNorm(0.3), np.outer(w[:, 0], w[0]))  # of rank 1
    np.testing.assert_allclose(gradient, 0.3 * np.outer(w[:, 0], w[0]) / (value / 0.3), 1e-6, 1e-9)
    _, gradient = _value_and_gradient(ConfidencePenalty(0.3), np.array([[0.0, 0.5, 0.5]]))
    np.testing.assert_allclose(gradient, 0.3 * np.array([[0.0, np.log(0.5) + 1, np.log(0.5) + 1]]), rtol=1e-12)


def test_group_lasso_removes_inputs_that_do_not_matter():
    x = np.random.default_rng(0).normal(size=(256, 6))
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, kernel_regularizer=GroupLasso(0.2, by="input"))])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(x, 3.0 * x[:, :2] @ np.ones((2, 4)), batch_size=64, epochs=15, verbose=0)
    lengths = np.linalg.norm(numbers(model.layers[0].kernel), axis=1)
    assert lengths[:2].min() > 3
    assert lengths[2:].max() < 0.1


def test_activity_penalties_are_means_over_the_batch():
    x = np.random.default_rng(1).normal(size=(5, 4)).astype("float32")
    for regularizer, expected in (
        (ConfidencePenalty(0.3), lambda p: -0.3 * entropy(p).mean()),
        (KLSparsity(0.3, 0.2), lambda p: 0.3 * divergence(p, 0.2) / len(p)),
    ):
        layer = layers.Dense(3, activation="softmax", activity_regularizer=regularizer)
        p = numbers(layer(x))
        np.testing.assert_allclose(numbers(layer.losses[0]), expected(p), rtol=1e-5)


def test_starting_points_are_saved_with_the_model():
    layer = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layer])
    layer.kernel_regularizer = layer.kernel.regularizer = L2SP(layer.kernel, 0.3)
    start = numbers(layer.kernel)
    assert float(model.losses[0]) == 0.0
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.train_on_batch(np.ones((2, 4)), np.ones((2, 3)))
    distance = 0.3 * np.sum((numbers(layer.kernel) - start) ** 2)
    assert distance > 0
    again = roundtrip.through_file(model)
    np.testing.assert_allclose([float(loss) for loss in again.losses], [distance], rtol=1e-5)
    np.testing.assert_array_equal(numbers(again.layers[0].kernel_regularizer.start), start)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GroupLasso(-1.0), ["factor", "-1.0", "[0"]),
        (lambda: GroupLasso(by="units"), ["by", "'units'", "'unit'"]),
        (lambda: GroupLasso(layout="conv"), ["layout", "'conv'", "'depthwise'"]),
        (lambda: GroupLasso(layout="abc->ab"), ["layout", "'abc->ab'", "'depthwise'"]),
        (lambda: GroupLasso(groups=0), ["groups", "0", "at least 1"]),
        (lambda: GroupLasso(groups=2, layout="transposed"), ["groups", "2", "'transposed'"]),
        (lambda: GroupLasso(groups=2)(np.ones((2, 3))), ["groups", "2", "(2, 3)"]),
        (lambda: NuclearNorm()(np.ones(3)), ["2 axes", "(3,)"]),
        (lambda: NuclearNorm(layout="depthwise")(np.ones((3, 2))), ["3 axes", "(3, 2)", "'depthwise'"]),
        (lambda: NuclearNorm(layout="ab,bc->ac")(np.ones((3, 2, 2))), ["layout", "'ab,bc->ac'", "(3, 2, 2)"]),
        (lambda: Orthogonality(mode="hard"), ["mode", "'hard'", "'srip'"]),
        (lambda: SpectralNorm(power_iterations=0), ["power_iterations", "0", "at least 1"]),
        (lambda: L2SP("a"), ["start", "'a'", "numeric"]),
        (lambda: L2SP([[1.0], [1.0, 2.0]]), ["start", "[[1.0], [1.0, 2.0]]", "numeric"]),
        (lambda: L2SP(np.nan), ["start", "nan", "finite"]),
        (lambda: L2SP(np.ones(3))(np.ones((2, 3))), ["start", "(2, 3)", "(3,)"]),
        (lambda: ConfidencePenalty(threshold=0), ["threshold", "0", "(0"]),
        (lambda: ConfidencePenalty(from_logits=1), ["from_logits", "1", "True or False"]),
        (lambda: ConfidencePenalty()(np.ones(3)), ["(batch, ..., units)", "(3,)"]),
        (lambda: KLSparsity(target=1), ["target", "1", "(0, 1)"]),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert all(word in str(error.value) for word in words), str(error.value)

"""SophiaH and AdaHessian, and training steps that multiply the Hessian by a random vector."""

import contextlib
import itertools
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import layers, ops
from test_second_gradient import (
    assert_a_saved_model_goes_on,
    assert_an_interruption_makes_no_difference,
    assert_near,
    fit,
    network,
    with_step,
)

import keras_optkit as ok
from keras_optkit.optimizers import Optimizer, RandomVector, Rule, count
from keras_optkit.testing import problems
from keras_optkit.testing.tools import float64

SophiaH, AdaHessian, SGD = ok.optimizers.SophiaH, ok.optimizers.AdaHessian, ok.optimizers.SGD


@dataclass(frozen=True)
class KeepingRule(Rule):
    """SGD that keeps the last vector and its product."""

    needs = frozenset({"hessian_vector"})
    elementwise = True
    every: int = count(1)
    seed: int = count(0, 0)

    def random_vector(self):
        return RandomVector("normal", self.every, self.seed)

    def slots(self):
        return {"v": 0.0, "product": 0.0}

    def update(self, u, slots, p, h):
        kept = h.with_product(lambda v, product: {"v": v, "product": product}, lambda: slots)
        return h.learning_rate * u, kept


class Keeping(Optimizer):
    def __init__(self, learning_rate=0.01, every=1, seed=0, **common):
        super().__init__(learning_rate, KeepingRule(every, seed), **common)


def kept(optimizer, name):
    state = problems.state_of(optimizer)
    return [state[f"slot.{name}.{i}"] for i in range(len(optimizer._held.variables))]


# -- the product ------------------------------------------------------------------------------------------------------


def dense():
    normalization = layers.BatchNormalization()
    return [keras.Input((4,)), layers.Dense(5, "tanh"), normalization, layers.Dropout(0.3, seed=5), layers.Dense(1)]


def recurrent():
    return [keras.Input((4,)), layers.Reshape((2, 2)), layers.LSTM(3), layers.Dense(1)]


def convolutional():
    convolution = layers.Conv2D(3, 2, padding="same", activation="gelu")
    pooled = [layers.AveragePooling2D(2, 1), layers.GroupNormalization(3), layers.Flatten(), layers.Dense(1)]
    return [keras.Input((4,)), layers.Reshape((2, 2, 1)), convolution, *pooled]


def attending():
    inputs = keras.Input((4,))
    x = layers.Dense(2)(layers.Reshape((4, 1))(inputs))
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 3)(x, x) + x)
    return inputs, layers.Dense(1)(layers.Flatten()(x))


def made(make):
    keras.utils.set_random_seed(0)
    parts = make()
    return keras.Model(*parts) if isinstance(parts, tuple) else keras.Sequential(parts)


@pytest.mark.few(1)
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make", [recurrent, attending, dense, convolutional])
@float64()
def test_the_product_is_the_derivative_of_the_gradient(make, jit_compile):
    """In the direction of the vector, with the same numbers for dropout: central differences in float64."""
    keras.config.set_dtype_policy("float64")
    try:
        model, other = made(make), made(make)
        for layer in [*model.layers, *other.layers]:
            if isinstance(layer, layers.Dropout) and jit_compile:
                layer.rate = 0.0  # TensorFlow draws other numbers under XLA
    finally:
        keras.config.set_dtype_policy("float32")
    x, y = (array[:16].astype("float64") for array in problems.regression())
    model.compile(Keeping(), loss="mse", jit_compile=jit_compile)
    model.train_on_batch(x, y)
    vectors, products = kept(model.optimizer, "v"), kept(model.optimizer, "product")
    weights, others = other.trainable_variables, other.non_trainable_variables
    start, state = ([ops.convert_to_numpy(v).copy() for v in each] for each in (weights, others))

    def gradient(distance):
        for variables, values in (
            (weights, [w + distance * v for w, v in zip(start, vectors, strict=True)]),
            (others, state),
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        return problems.loss_and_gradients(other, x, y)[1]

    on_jax = keras.config.backend() == "jax"  # where Keras computes tanh and others in float32
    distance, tolerance = (1e-2, 3e-3) if on_jax else (1e-5, 1e-5)
    scale = max(np.max(np.abs(product)) for product in products)
    for product, ahead, behind in zip(products, gradient(distance), gradient(-distance), strict=True):
        difference = (ahead - behind) / (2 * distance)
        np.testing.assert_allclose(product, difference, rtol=tolerance, atol=tolerance * scale)
    assert scale > 1e-3


def test_vectors_are_a_function_of_seed_and_count():
    weights = problems.variables([np.zeros((64, 64)), np.zeros((64, 64))], "float32")

    def vectors(updates=0, make=SophiaH, **how):
        optimizer = make(0.1, **how)
        optimizer.build(weights)
        optimizer.iterations.assign(updates)
        return [ops.convert_to_numpy(v) for v in optimizer.hessian_vectors(weights)]

    first, second = vectors()
    assert abs(np.mean(first)) < 0.05
    assert abs(np.std(first) - 1) < 0.05
    assert abs(np.mean(first * second)) < 0.05  # those of the other parameter
    for other in (vectors(1)[0], vectors(seed=1)[0], second):
        assert abs(np.mean(first * other)) < 0.05
    np.testing.assert_array_equal(vectors(seed=3)[1], vectors(seed=3)[1])
    signs = vectors(make=AdaHessian)[0]
    np.testing.assert_array_equal(np.abs(signs), 1)
    assert abs(np.mean(signs)) < 0.05


def test_products_are_computed_when_they_are_due():
    model = network(Keeping(0.01, every=3), dropout=0.0)
    x, y = problems.regression()
    seen = []
    for _ in range(5):
        model.train_on_batch(x[:16], y[:16])
        seen.append(kept(model.optimizer, "product")[0])
    same = [np.array_equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True]


@pytest.mark.only_on("tensorflow", because="a function of NumPy in the graph")
def test_nothing_is_computed_when_they_are_not_due():
    import tensorflow as tf

    calls = []

    def counted(dy):
        calls.append(1)
        return dy

    @tf.custom_gradient
    def slope(x):
        return 2 * x, lambda dy: 2 * tf.numpy_function(counted, [dy], dy.dtype)

    @tf.custom_gradient
    def square(x):
        return x * x, lambda dy: dy * slope(x)

    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.Lambda(square), layers.Dense(1)])
    model.compile(SophiaH(0.01, update_period=4), loss="mse")
    fit(model)  # 8 steps
    assert len(calls) == 2


# -- around the step --------------------------------------------------------------------------------------------------


def test_everything_else_is_as_with_one_run():
    """Metrics, statistics of batches and what dropout draws are those of plain SGD."""
    found = []
    for optimizer in (SGD(0.0), AdaHessian(0.0)):
        model, history = fit(network(optimizer))
        others = [ops.convert_to_numpy(v) for v in model.non_trainable_variables]
        found.append([*others, history["loss"], history["mae"]])
    for expected, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_micro_batches_are_one_batch(how):
    def trained(steps, size):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(1)])
        model.compile(AdaHessian(0.02, epsilon=0.1, gradient_accumulation_steps=steps), loss="mse", **how)
        x, y = problems.regression()
        model.fit(x, y, batch_size=size, epochs=2, shuffle=False, verbose=0)
        return model

    assert_near(trained(2, 16), trained(None, 32), 1e-5)


@pytest.mark.long
def test_the_last_micro_batches_of_an_epoch():
    """Three of four, and again from a file."""
    model = network(AdaHessian(0.02, epsilon=0.1, gradient_accumulation_steps=3), dropout=0.0)
    x, y = problems.regression()
    for i in range(0, 64, 16):
        model.train_on_batch(x[i : i + 16], y[i : i + 16])
    state = problems.state_of(model.optimizer)
    assert np.any(state["product.0"])
    other = network(AdaHessian(0.02, epsilon=0.1, gradient_accumulation_steps=3), dropout=0.0)
    other.set_weights(model.get_weights())
    other.optimizer.build(other.trainable_variables)
    other.optimizer.load_own_variables(state)
    for each in (model, other):
        each.optimizer.flush()
    assert_near(model, other, 1e-7)
    assert int(model.optimizer.iterations) == 2
    assert not np.any(problems.state_of(model.optimizer)["product.0"])


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="a strategy of TensorFlow")
@pytest.mark.parametrize("period", [1, 2])
def test_two_replicas_are_one(period):
    def trained(scope):
        with scope:
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(1)])
            model.compile(AdaHessian(0.02, epsilon=0.1, update_period=period), loss="mse")
        return fit(model)[0]

    two = trained(problems.two_replicas().scope())
    assert_near(two, trained(contextlib.nullcontext()), 1e-5)


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="a strategy of TensorFlow")
def test_replicas_with_normalization_and_dropout():
    with problems.two_replicas().scope():
        model = network(None)
        model.compile(SophiaH(0.1, update_period=2), loss="mse", metrics=["mae"])
    history = fit(model)[1]
    assert history["loss"][-1] < history["loss"][0]
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) == 8


@pytest.mark.long
def test_clipping_leaves_the_product_alone():
    def trained(**how):
        model, _ = fit(network(Keeping(0.0, **how), dropout=0.0))
        return kept(model.optimizer, "product")

    for a, b in zip(trained(), trained(global_clipnorm=1e-3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


class Steep(keras.Sequential):
    """`c w²` at a small w, with a second derivative beyond float32."""

    def __init__(self):
        kernel = keras.initializers.Constant(1e-30)
        super().__init__([keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer=kernel)])

    def call(self, x, training=None, mask=None):
        out = super().call(x)
        return 2.5e38 * out * out


def test_a_product_that_is_not_finite_changes_nothing():
    model = Steep()
    model.compile(AdaHessian(0.1, skip_nonfinite=3), loss=lambda y, p: ops.mean(p - y))
    model.train_on_batch(np.ones((4, 1), "float32"), np.zeros((4, 1), "float32"))
    assert model.optimizer.nonfinite.skipped == 1
    assert "kernel" in model.optimizer.nonfinite.variable
    np.testing.assert_array_equal(model.get_weights()[0], np.float32(1e-30))
    assert int(model.optimizer.iterations) == 0


def test_loss_scaling_sees_a_product_that_is_not_finite():
    model = Steep()
    optimizer = ok.optimizers.LossScale(AdaHessian(0.1), initial_scale=8.0)
    model.compile(optimizer, loss=lambda y, p: ops.mean(p - y))
    model.train_on_batch(np.ones((4, 1), "float32"), np.zeros((4, 1), "float32"))
    assert optimizer.loss_scale == 4.0
    assert optimizer.skipped == 1
    assert int(optimizer.inner_optimizer.iterations) == 0


@pytest.mark.long
def test_half_precision_with_loss_scaling():
    def make():
        return ok.optimizers.LossScale(AdaHessian(0.02, epsilon=0.3), initial_scale=2.0**7)

    model, _ = fit(network(make(), dtype="mixed_float16", dropout=0.0))
    assert int(model.optimizer.inner_optimizer.iterations) == 8
    assert_near(model, fit(network(AdaHessian(0.02, epsilon=0.3), dropout=0.0))[0], 3e-2)


@pytest.mark.long
def test_a_constant_scale_of_the_loss():
    scaled = fit(network(AdaHessian(0.02, loss_scale_factor=64.0), dropout=0.0))[0]
    assert_near(scaled, fit(network(AdaHessian(0.02), dropout=0.0))[0], 1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: SGD(0.05, groups=[ok.Group("kernel$", rule=SophiaH())]), id="group"),
        pytest.param(lambda: ok.optimizers.SAM(AdaHessian(0.02, epsilon=0.1), rho=0.1), id="sam"),
        pytest.param(lambda: AdaHessian(0.02, epsilon=0.1, use_ema=True, clipnorm=0.5, weight_decay=0.1), id="ema"),
        pytest.param(lambda: ok.optimizers.Lookahead(SophiaH(0.5, update_period=3), 3), id="lookahead"),
        pytest.param(
            lambda: AdaHessian(
                0.02,
                epsilon=0.1,
                groups=[ok.Group("bias$", rule=SophiaH(update_period=3))],
            ),
            id="two rules",
        ),
    ],
)
def test_compiled_is_eager(make):
    compiled, _ = fit(network(make(), dropout=0.0, jit_compile=True))
    assert_near(compiled, fit(network(make(), dropout=0.0, run_eagerly=True))[0], 5e-4)
    plain, _ = fit(network(SGD(0.05), dropout=0.0))
    assert max(np.max(np.abs(a - b)) for a, b in zip(compiled.get_weights(), plain.get_weights(), strict=True)) > 1e-3


def test_vectors_are_zeros_for_other_rules():
    model = network(SGD(0.05, groups=[ok.Group("kernel$", rule=SophiaH())]))
    vectors = model.optimizer.hessian_vectors(model.trainable_variables)
    for variable, vector in zip(model.trainable_variables, vectors, strict=True):
        assert bool(np.any(ops.convert_to_numpy(vector))) == variable.path.endswith("kernel")


@pytest.mark.long
def test_a_frozen_layer_and_a_layer_that_joins():
    model = network(AdaHessian(0.02, epsilon=0.1, update_period=3), dropout=0.0)
    model.layers[0].trainable = False
    before = model.layers[0].get_weights()
    fit(model)  # 8 updates; the next product is in the tenth
    for a, b in zip(before, model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.layers[0].trainable = True
    model.make_train_function(force=True)
    x, y = problems.regression()
    model.train_on_batch(x[:16], y[:16])
    for a, b in zip(before, model.layers[0].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    model.train_on_batch(x[:16], y[:16])
    assert np.max(np.abs(before[0] - model.layers[0].get_weights()[0])) > 1e-4
    assert all(np.all(np.isfinite(w)) for w in model.get_weights())


@pytest.mark.long
def test_an_interruption_makes_no_difference(tmp_path):
    assert_an_interruption_makes_no_difference(lambda: SophiaH(0.1, update_period=3, use_ema=True), tmp_path)


@pytest.mark.long
def test_a_saved_model_goes_on(tmp_path):
    assert_a_saved_model_goes_on(SophiaH(0.1, update_period=3, seed=7), tmp_path)


@pytest.mark.long
def test_the_monitor_sees_one_update(tmp_path):
    monitor = ok.callbacks.TrainingMonitor(tmp_path, every=1)
    _, history = fit(network(AdaHessian(0.01)), epochs=1, callbacks=[monitor])
    loss = ok.callbacks.read_monitor(tmp_path)["train/loss"].values
    assert len(loss) == 4
    np.testing.assert_allclose(np.mean(loss), history["loss"][0], rtol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("make", [SophiaH, lambda: ok.optimizers.SAM(SGD(0.1))])
def test_a_grouped_convolution(make):
    """Which Keras puts into a compiled function of its own on TensorFlow."""
    keras.utils.set_random_seed(0)
    image = [layers.Reshape((2, 2, 1)), layers.Conv2D(4, 1), layers.Conv2D(4, 2, groups=2), layers.Flatten()]
    model = keras.Sequential([keras.Input((4,)), *image, layers.Dense(1)])
    model.compile(make(), loss="mse", jit_compile=False)
    history = fit(model)[1]
    assert history["loss"][-1] < history["loss"][0]


# -- steps and loops of one's own -------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="a tape")
@pytest.mark.parametrize("eagerly", [False, True])
def test_a_step_of_one_s_own(eagerly):
    import tensorflow as tf

    def train_step(self, data):
        x, y = data

        @tf.function
        def train():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            weights = self.trainable_variables
            self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
            return loss

        return {"loss": train()}

    def optimizer():
        return AdaHessian(0.02, epsilon=0.1)

    own, _ = fit(with_step(train_step, optimizer(), run_eagerly=eagerly))
    stock, _ = fit(with_step(keras.Sequential.train_step, optimizer()))
    assert_near(own, stock, 1e-5)


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="a tape")
@pytest.mark.parametrize("wrap", ["eager", "graph"])
def test_a_loop_of_one_s_own(wrap):
    import tensorflow as tf

    model, optimizer = network(dropout=0.0), SophiaH(0.5, update_period=3)
    weights = model.trainable_variables

    def step(x, y):
        def gradient():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
            return tape.gradient(loss, weights)

        optimizer.apply(optimizer.with_products(gradient, weights), weights)

    step = tf.function(step) if wrap == "graph" else step
    x, y = problems.regression()
    for i in (0, 16, 32, 48) * 2:
        step(tf.constant(x[i : i + 16]), tf.constant(y[i : i + 16]))
    assert_near(model, fit(network(SophiaH(0.5, update_period=3), dropout=0.0))[0], 1e-5)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_an_update_without_a_product_is_refused():
    weights = problems.variables(problems.start(), "float32")
    grads = [ops.ones(w.shape) for w in weights]
    optimizer = SophiaH(0.1)
    with pytest.raises(ValueError, match=r"needs products with the Hessian.*with_products"):
        optimizer.apply(grads, weights)
    assert int(optimizer.iterations) == 0
    with optimizer.given_products(grads, weights):
        optimizer.apply(grads, weights)
    with pytest.raises(ValueError, match="needs products with the Hessian"):  # one each
        optimizer.apply(grads, weights)
    for ask in (SGD(0.1).hessian_vectors, lambda w: SGD(0.1).with_products(list, w)):
        with pytest.raises(ValueError, match="takes gradients alone"):
            ask(weights)


def test_several_optimizers_are_refused():
    class Two(keras.Sequential):
        pass

    model = Two([keras.Input((4,)), layers.Dense(1)])
    model.other = SGD(0.1)
    model.compile(SophiaH(0.1), loss="mse")
    with pytest.raises(ValueError, match=r"multiplies the Hessian by a vector, so it must be the only optimizer"):
        fit(model)


@pytest.mark.only_on("tensorflow", because="an operation of TensorFlow")
def test_an_operation_without_a_second_derivative():
    import tensorflow as tf

    parts = [layers.Reshape((2, 2, 1)), layers.Conv2D(4, 1), layers.Lambda(tf.nn.local_response_normalization)]
    model = keras.Sequential([keras.Input((4,)), *parts, layers.Flatten(), layers.Dense(1)])
    model.compile(SophiaH(0.1), loss="mse", jit_compile=False)
    with pytest.raises(RuntimeError, match=r"cannot differentiate the gradient of an operation.*LRNGrad"):
        fit(model)


@dataclass(frozen=True)
class Unsaid(Rule):
    elementwise = True

    def random_vector(self):
        return RandomVector()


@dataclass(frozen=True)
class Empty(Rule):
    needs = frozenset({"hessian_vector"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SophiaH(update_period=0), "update_period must be"),
        (lambda: SophiaH(rho=-1.0), "rho must be"),
        (lambda: SophiaH(distribution="uniform"), "distribution must be"),
        (lambda: AdaHessian(hessian_power=0.0), "hessian_power must be"),
        (lambda: AdaHessian(seed=-1), "seed must be"),
        (lambda: Optimizer(0.1, Unsaid()), r"must say needs = {'hessian_vector'} and have a `random_vector`"),
        (lambda: Optimizer(0.1, Empty()), r"must say needs = {'hessian_vector'} and have a `random_vector`"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

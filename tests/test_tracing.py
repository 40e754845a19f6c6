"""The first step of a model, which TensorFlow traces once after a rehearsal that makes its variables."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from small import regression

import keras_optkit as ok
from keras_optkit.fit import tracing
from keras_optkit.private import clear_session, op_determinism

pytestmark = pytest.mark.only_on("tensorflow", because="elsewhere Keras builds everything before the first step")

X, Y = regression(24, dtype="float32")
Z = (Y > 0).astype("float32")
CLASSES = np.arange(24) % 3


class Counted(layers.Layer):
    """Does nothing, and counts how often its gradient is traced."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.traced = 0

    def call(self, x):
        @tf.custom_gradient
        def counted(x):
            def gradient(upstream):
                self.traced += 1
                return upstream

            return x, gradient

        return counted(x)


class Subclassed(keras.Model):
    """Built by its first batch, with states of layers and random draws."""

    def __init__(self):
        super().__init__()
        self.counted = Counted()
        self.parts = [layers.Dense(8, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
        self.head = layers.Dense(1)

    def call(self, x, training=None):
        dense, normalization, dropout = self.parts
        return self.head(dropout(normalization(self.counted(dense(x)), training=training), training=training))


class OwnStep(Subclassed):
    """With a step that updates a part of the weights."""

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        head = self.head.trainable_variables
        self.optimizer.apply(tape.gradient(loss, head), head)
        return {"loss": loss}


def sequential():
    hidden = [layers.Dense(4, activation="relu"), Counted(), layers.Dropout(0.5)]
    model = keras.Sequential([keras.Input((3,)), *hidden, layers.Dense(1)])
    model.counted = model.layers[1]
    return model


def compiled(make, optimizer="adam", **arguments):
    keras.utils.set_random_seed(1)
    model = make()
    model.compile(optimizer, "mse", metrics=["mae", "accuracy"], **arguments)
    return model


def batches():
    while True:
        yield X[:8], Z[:8]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model.fit(X, Z, verbose=0),
        lambda model: model.fit(batches(), steps_per_epoch=2, shuffle=False, verbose=0),
        lambda model: [model.train_on_batch(X, Z) for _ in range(2)],
    ],
    ids=["fit", "generator", "train_on_batch"],
)
@pytest.mark.each_once
@pytest.mark.parametrize("make", [sequential, Subclassed])
def test_the_first_step_is_traced_once(make, run):
    model = compiled(make)
    run(model)
    assert model.counted.traced == 1


@pytest.mark.parametrize(
    "arguments", [{"steps_per_execution": 2}, pytest.param({"jit_compile": True}, marks=pytest.mark.long)], ids=str
)
def test_it_is_however_it_is_compiled(arguments):
    model = compiled(sequential, ok.optimizers.Lion(1e-3), **arguments)
    model.fit(X, Z, batch_size=4, verbose=0)
    assert model.counted.traced == 1


def test_a_step_that_is_measured_is_traced_once(tmp_path):
    model = compiled(sequential, ok.optimizers.SGD(0.01))
    model.fit(X, Z, batch_size=4, verbose=0, callbacks=[ok.callbacks.TrainingMonitor(tmp_path, every=4)])
    assert model.counted.traced == 2  # and one that is not


# -- as Keras has it --------------------------------------------------------------------------------------------------


class BuiltInTraining(keras.Model):
    """Has a part that a call outside of training does not build."""

    def __init__(self):
        super().__init__()
        self.always, self.in_training = layers.Dense(1), layers.Dense(1)

    def call(self, x, training=False):
        return self.always(x) + (self.in_training(x) if training else 0)


class Heads(keras.Model):
    """Two outputs in training, one otherwise."""

    def __init__(self):
        super().__init__()
        self.heads = [layers.Dense(1), layers.Dense(1)]

    def call(self, x, training=False):
        main, auxiliary = (head(x) for head in self.heads)
        return [main, auxiliary] if training else main


def called(kind):
    def make():
        model = kind()
        model(X)
        return model

    return make


def classifier(*shape, last=()):
    return lambda: keras.Sequential([keras.Input(shape), layers.Dense(3, "softmax", name="dense"), *last])


def two_outputs():
    given = keras.Input((3,))
    return keras.Model(given, {name: layers.Dense(1, name=name)(given) for name in "ab"})


SPARSE = {"loss": "sparse_categorical_crossentropy", "metrics": ["accuracy"]}
CASES = {
    "random draws": (Subclassed, X, Z, {"loss": "mse", "metrics": ["mae"]}),
    "labels are squeezed": (classifier(1), X[:, 0], CLASSES, SPARSE),
    "output_shape is wrong": (
        classifier(3, last=[layers.Lambda(lambda x: x, output_shape=(1,))]),
        X,
        CLASSES,
        SPARSE,
    ),
    "heads": (called(Heads), X, [Y, Z], {"loss": ["mse", "mae"], "metrics": [["mae"], ["mse"]]}),
    "built in training": (called(BuiltInTraining), X, Y, {"loss": "mse", "metrics": ["mae"]}),
    "outputs": (two_outputs, X, {"a": Y, "b": Z}, {"loss": {"a": "mse", "b": "mae"}, "metrics": {"a": ["mae"]}}),
}


def trained(make, x, y, how, optimizer, alone):
    clear_session()  # names begin again
    keras.utils.set_random_seed(2)
    with op_determinism():
        model = make()
        if alone:
            step = {"make_train_function": keras.Model.make_train_function.__wrapped__}
            model.__class__ = type(type(model).__name__, (type(model),), step)
        model.compile(optimizer(), **how)
        history = model.fit(x, y, batch_size=8, epochs=2, verbose=0).history
        variables = [*model.optimizer.variables, *model.metrics_variables]
    return history, [v.path for v in variables], [np.array(v) for v in [*model.weights, *variables]]


def assert_as_keras(case, optimizer):
    history, paths, values = trained(*case, optimizer, alone=False)
    expected_history, expected_paths, expected_values = trained(*case, optimizer, alone=True)
    assert history == expected_history
    assert paths == expected_paths
    for value, expected in zip(values, expected_values, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.filterwarnings("ignore:`build")
@pytest.mark.parametrize("case", CASES)
def test_what_is_trained_is_what_keras_trains(case):
    """Bit for bit: metrics, weights, states of layers, random draws and the optimizer's slots."""
    assert_as_keras(CASES[case], lambda: keras.optimizers.Adam(0.01))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.Nadam(0.01),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
        lambda: ok.optimizers.ScheduleFreeAdamW(0.01),
    ],
    ids=["Nadam", "LossScaleOptimizer", "ScheduleFreeAdamW"],
)
def test_an_optimizer_has_the_state_that_keras_gives_it(optimizer):
    assert_as_keras((classifier(3), X, CLASSES, SPARSE), optimizer)


def test_a_step_of_ones_own_is_left_to_keras():
    model = OwnStep()
    model.compile("adam", "mse")
    model.fit(X, Z, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * 2  # and nothing for what it does not train


def test_after_a_first_step_that_fails_the_next_fit_works():
    """In Keras alone, variables cannot be made any more; and metrics are of the kind that the right labels call for."""
    model = classifier(3)()
    model.compile("adam", **SPARSE)
    with pytest.raises(ValueError, match="must have"):
        model.fit(X, np.eye(3)[CLASSES], verbose=0)
    model.fit(X, CLASSES, verbose=0)
    accuracy = np.mean(model.predict(X, verbose=0).argmax(1) == CLASSES)
    np.testing.assert_allclose(model.evaluate(X, CLASSES, verbose=0)[1], accuracy, rtol=1e-6)


def test_the_function_gives_way_to_that_of_keras():
    model = compiled(sequential)
    model.make_train_function()
    before = model.train_function
    model.fit(X, Z, verbose=0)
    assert model.train_function is before.__wrapped__


def test_gradients_of_other_threads_are_theirs():
    found = []

    def elsewhere():
        x = tf.Variable(3.0)
        with tf.GradientTape() as tape:
            loss = x * x
        found.append(float(tape.gradient(loss, x)))

    def rehearsing():
        with tracing._gradients_of_zeros():
            elsewhere()
            entered.set()
            left.wait()

    gradient, entered, left = tf.GradientTape.gradient, threading.Event(), threading.Event()
    thread = threading.Thread(target=rehearsing)
    with tracing._gradients_of_zeros():
        elsewhere()
        thread.start()
        entered.wait()
    elsewhere()  # while the other one goes on
    left.set()
    thread.join()
    elsewhere()
    assert found == [0.0, 0.0, 6.0, 6.0]
    assert tf.GradientTape.gradient is gradient


def test_a_model_that_has_no_optimizer_since_nothing_is_trained():
    model = keras.Sequential([keras.Input((3,)), layers.Rescaling(2.0)])
    model.compile(optimizer=None, loss="mse", metrics=["mae"])
    with pytest.warns(UserWarning, match="does not have any trainable weights"):
        history = model.fit(X, 2 * X, verbose=0).history
    assert history == {"loss": [0.0], "mae": [0.0]}


def test_a_first_value_that_depends_on_the_batch_is_made_by_the_step():
    class Starting(layers.Layer):
        first = None

        def call(self, x):
            if self.first is None:
                vars(self)["first"] = tf.Variable(tf.reduce_mean(x))
            return x

    model = keras.Sequential([Starting(), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    model.fit(X, Y, batch_size=24, verbose=0)
    np.testing.assert_allclose(model.layers[0].first.numpy(), ops.mean(X), rtol=1e-5)

"""The first step of a model, which TensorFlow traces once."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import regression

import keras_optkit as ok
from keras_optkit.private import op_determinism

pytestmark = pytest.mark.only_on("tensorflow", because="elsewhere Keras builds everything before the first step")

X, Y = regression(24, dtype="float32")
Z = (Y > 0).astype("float32")


class Counted:
    """Mean squared error, and how often it was traced."""

    def __init__(self):
        self.traced = 0

    def __call__(self, y, p):
        self.traced += 1
        return ops.mean(ops.square(p - y), axis=-1)


class Subclassed(keras.Model):
    """Built by its first batch, with states of layers and random draws."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.parts = [layers.Dense(8, activation="relu"), layers.BatchNormalization(), layers.Dropout(0.3)]
        self.head = layers.Dense(1)

    def call(self, x, training=None):
        dense, normalization, dropout = self.parts
        return self.head(dropout(normalization(dense(x), training=training), training=training))


class OwnStep(Subclassed):
    """With a step that updates a part of the weights."""

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        head = self.head.trainable_variables
        self.optimizer.apply(tape.gradient(loss, head), head)
        return {"loss": loss}


def sequential():
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="relu"), layers.Dense(1)])


def called(kind=Subclassed):
    model = kind()
    model(X)
    return model


def compiled(make, optimizer="adam", **arguments):
    keras.utils.set_random_seed(1)
    loss, model = Counted(), make()
    model.compile(optimizer, loss, metrics=["mae"], **arguments)
    return model, loss


def batches():
    while True:
        yield X[:8], Z[:8]


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model.fit(X, Z, verbose=0),
        lambda model: model.fit(batches(), steps_per_epoch=2, shuffle=False, verbose=0),
        lambda model: [model.train_on_batch(X, Z) for _ in range(2)],
        lambda model: model.evaluate(X, Z, verbose=0),
    ],
    ids=["fit", "generator", "train_on_batch", "evaluate"],
)
@pytest.mark.each_once
@pytest.mark.parametrize("make", [sequential, called])
def test_the_step_of_a_built_model_is_traced_once(make, run):
    model, loss = compiled(make)
    run(model)
    assert loss.traced == 1


@pytest.mark.parametrize(
    "arguments", [{"steps_per_execution": 2}, pytest.param({"jit_compile": True}, marks=pytest.mark.long)], ids=str
)
def test_it_is_however_it_is_compiled(arguments):
    model, loss = compiled(sequential, **arguments)
    model.fit(X, Z, batch_size=4, verbose=0)
    assert loss.traced == 1


@pytest.mark.parametrize("outputs", [dict, lambda pairs: [output for _, output in pairs]], ids=["dict", "list"])
def test_with_several_outputs_the_losses_alone_are_traced_more_often(outputs):
    class Seen(layers.Layer):
        traced = 0

        def call(self, x):
            Seen.traced += 1
            return x

    given = keras.Input((3,))
    hidden = Seen()(given)
    model = keras.Model(given, outputs([(name, layers.Dense(1, name=name)(hidden)) for name in "ab"]))
    model.compile("sgd", outputs([(name, "mse") for name in "ab"]), metrics=outputs([(name, ["mae"]) for name in "ab"]))
    Seen.traced = 0
    history = model.fit(X, outputs([("a", Y), ("b", Z)]), verbose=0).history
    assert Seen.traced == 1
    assert {"a_loss", "b_loss", "a_mae", "b_mae"} < set(history)


def test_a_step_that_is_measured_is_traced_once(tmp_path):
    model, loss = compiled(sequential)
    model.fit(X, Z, batch_size=4, verbose=0, callbacks=[ok.callbacks.TrainingMonitor(tmp_path, every=4)])
    assert loss.traced == 2  # and one that is not


@pytest.mark.parametrize("stock", [True, False])
def test_what_is_trained_is_what_keras_trains(stock):
    """Bit for bit: weights, states of layers, random draws, metrics and the optimizer's slots."""

    class TracedTwice(Subclassed):
        make_train_function = keras.Model.make_train_function.__wrapped__  # without ours around it

    results = []
    for kind, traced in [(Subclassed, 1), (TracedTwice, 2)]:
        with op_determinism():
            made = keras.optimizers.Adam(0.01) if stock else ok.optimizers.ScheduleFreeAdamW(0.01)
            model, loss = compiled(lambda kind=kind: called(kind), made)
            history = model.fit(X, Z, batch_size=8, epochs=2, verbose=0).history
        assert loss.traced == traced
        results.append([history, model.get_weights(), [np.array(v) for v in model.optimizer.variables]])
    (history, *ours), (history_of_keras, *of_keras) = results
    assert history == history_of_keras
    for a, b in zip(keras.tree.flatten(ours), keras.tree.flatten(of_keras), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_of_ones_own_and_a_model_that_is_not_built_are_left_to_keras():
    model, loss = compiled(Subclassed)
    model.fit(X, Z, verbose=0)
    assert loss.traced == 2
    model = called(OwnStep)
    model.compile("adam", "mse")
    model.fit(X, Z, verbose=0)
    assert len(model.optimizer.variables) == 2 + 2 * 2  # and nothing for what it does not train


def test_after_a_first_step_that_fails_the_next_fit_works():
    """In Keras alone, variables cannot be made any more."""
    model, _ = compiled(sequential)
    with pytest.raises(Exception, match=r"Input 0 of layer .* is incompatible|expected axis|expected shape"):
        model.fit(X[:, :2], Z, verbose=0)
    model.fit(X, Z, verbose=0)
    assert model.optimizer.iterations == 1


def test_the_function_gives_way_to_that_of_keras():
    model, _ = compiled(sequential)
    model.make_train_function()
    before = model.train_function
    model.fit(X, Z, verbose=0)
    assert model.train_function is before.__wrapped__

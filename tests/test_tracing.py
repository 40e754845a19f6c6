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
    """With an optimizer, a metric and a variable that are made in its step."""

    made = None

    def train_step(self, data):
        import tensorflow as tf

        logs = super().train_step(data)
        if self.made is None:  # not tracked: it is built by now
            vars(self)["made"] = tf.Variable(0.0), keras.metrics.Mean(name="own")
        self.made[0].assign_add(1.0)
        self.made[1].update_state(self.made[0])
        return {**logs, "own": self.made[1].result()}


class TracedTwice(Subclassed):
    """As Keras has it."""

    make_train_function = keras.Model.make_train_function.__wrapped__


def sequential(**arguments):
    return keras.Sequential([keras.Input((3,)), layers.Dense(4, activation="relu"), layers.Dense(1)], **arguments)


def compiled(make, optimizer="adam", **arguments):
    keras.utils.set_random_seed(1)
    loss, model = Counted(), make()
    model.compile(optimizer, loss, metrics=["mae", keras.metrics.AUC(name="auc")], **arguments)
    return model, loss


def batches():
    while True:
        yield X[:8], (Y[:8] > 0).astype("float32")


Z = (Y > 0).astype("float32")


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
@pytest.mark.parametrize("make", [sequential, Subclassed, OwnStep])
def test_the_first_step_is_traced_once(make, run):
    model, loss = compiled(make)
    run(model)
    assert loss.traced == 1


@pytest.mark.parametrize("arguments", [{"steps_per_execution": 2}, {"jit_compile": True}], ids=str)
def test_it_is_however_steps_are_compiled(arguments):
    model, loss = compiled(sequential, ok.optimizers.Lion(1e-3), **arguments)
    model.fit(X, Z, batch_size=4, verbose=0)
    assert loss.traced == 1


def test_losses_of_several_outputs_are_traced_once():
    given, losses = keras.Input((3,)), [Counted(), Counted()]
    model = keras.Model(given, {"a": layers.Dense(1, name="a")(given), "b": layers.Dense(1, name="b")(given)})
    model.compile("sgd", dict(zip("ab", losses, strict=True)), metrics={"a": ["mae"], "b": ["mae"]})
    history = model.fit(X, {"a": Y, "b": Z}, verbose=0).history
    assert [loss.traced for loss in losses] == [1, 1]
    assert {"a_loss", "b_loss", "a_mae", "b_mae"} < set(history)


def test_a_step_that_is_measured_is_traced_once(tmp_path):
    model, loss = compiled(sequential)
    model.fit(X, Z, batch_size=4, verbose=0, callbacks=[ok.callbacks.TrainingMonitor(tmp_path, every=4)])
    assert loss.traced == 2  # and one that is not


@pytest.mark.parametrize("optimizer", ["adam", "ScheduleFreeAdamW"])
def test_what_is_trained_is_what_keras_trains(optimizer):
    """Bit for bit: weights, states of layers, random draws, metrics and the optimizer's slots."""
    results = []
    for kind in (Subclassed, TracedTwice):
        made = keras.optimizers.get(optimizer) if optimizer == "adam" else ok.optimizers.ScheduleFreeAdamW(0.01)
        with op_determinism():
            model, loss = compiled(kind, made)
            history = model.fit(X, Z, batch_size=8, epochs=2, verbose=0).history
        assert loss.traced == (1 if kind is Subclassed else 2)
        results.append([model.get_weights(), history, [np.array(v) for v in model.optimizer.variables]])
    (weights, history, slots), (weights_of_keras, history_of_keras, slots_of_keras) = results
    assert history == history_of_keras
    for a, b in zip([*weights, *slots], [*weights_of_keras, *slots_of_keras], strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_variable_whose_first_value_is_computed_in_the_step_is_made_as_tensorflow_does():
    import tensorflow as tf

    class Starting(Subclassed):
        first = None

        def train_step(self, data):
            logs = super().train_step(data)
            if self.first is None:
                vars(self)["first"] = tf.Variable(tf.reduce_mean(data[0]))
            return logs

    model, loss = compiled(Starting)
    model.fit(X, Z, batch_size=24, verbose=0)
    assert loss.traced == 2
    np.testing.assert_allclose(model.first.numpy(), X.mean(), rtol=1e-5)


def test_an_error_of_the_first_step_is_that_of_keras_and_the_next_works():
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

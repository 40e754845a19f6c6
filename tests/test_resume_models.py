"""Models of every kind that `Resume` puts back: with a step of their own, several optimizers, more than Keras lists.

Steps are eager, since nothing here is about compiled ones and compiling takes most of the time.
"""

import contextlib

import keras
import numpy as np
import pytest
from keras import ops
from small import without_names
from test_resume import Crash, CrashAt

import keras_optkit as ok
from keras_optkit.callbacks import Resume, bundle
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.private import op_determinism

X = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
Y = X[:, :1]


@pytest.fixture(autouse=True)
def _deterministic():
    with op_determinism():
        yield


def resumed(tmp_path, make, data, *, crash=7, every=2, warns=None, **arguments):
    """The weights, history and state of a run that was left alone, and of one that crashed after so many batches."""
    found = []
    for name, crashes in (("whole", [None]), ("cut", [crash, None])):
        for after in crashes:
            keras.utils.set_random_seed(1)
            model, given = make(), data()
            given = given if isinstance(given, tuple) else (given,)
            callbacks = [Resume(tmp_path / name, every), *([CrashAt(after)] if after else [])]
            with (
                contextlib.suppress(Crash),
                contextlib.nullcontext() if warns is None else pytest.warns(UserWarning, match=warns),
            ):
                model.fit(*given, epochs=3, callbacks=callbacks, verbose=0, **arguments)
        assert callbacks[0].resumed_from is None if name == "whole" else callbacks[0].resumed_from > (0, 0)
        found.append((model, packed(TrainingState.of(model)), dict(model.history.history)))
    return found


def packed(state):
    return bundle.pack(without_names(vars(state)))


def assert_same(one, other):
    assert one.text == other.text
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes()


def assert_resumed(*arguments, **more):
    (_, state, history), (_, again, history_again) = resumed(*arguments, **more)
    assert_same(state, again)
    assert history == history_again


def shuffled(*data):
    return ok.data.Shuffled(*(data or (X, Y)), batch_size=8, seed=3)


# -- what the first step builds ---------------------------------------------------------------------------------------


class OwnStep(keras.Model):
    """A model with layers `a` and `b` whose forward pass, without a `call`, is in its step, for TensorFlow."""

    def __init__(self, optimizers=None):
        super().__init__()
        self.a, self.b = keras.layers.Dense(3), keras.layers.Dense(4)
        self.noise = keras.layers.GaussianNoise(0.1)
        self.seen = keras.metrics.Mean(name="loss")
        self.optimizers = optimizers

    @property
    def metrics(self):
        return [self.seen]

    def loss_of(self, data):
        x = data[0] if isinstance(data, tuple) else data
        return ops.mean(ops.square(self.b(self.noise(self.a(x), training=True)) - x))

    def train_step(self, data):
        import tensorflow as tf

        with tf.GradientTape(persistent=True) as tape:
            loss = self.loss_of(data)
        parts = [self.trainable_variables]
        if self.optimizers is not None:
            parts = [self.a.trainable_variables, self.b.trainable_variables]
        for optimizer, part in zip(self.used(), parts, strict=True):
            optimizer.apply(tape.gradient(loss, part), part)
        self.seen.update_state(loss)
        return {"loss": self.seen.result()}

    def used(self):
        return [self.optimizer] if self.optimizers is None else [self.optimizers["a"], self.optimizers["b"]]


class Unpacking(OwnStep):
    """As Keras's guide writes it, for two inputs; and it is tested on other data than it is trained on."""

    def used(self):
        return [self.optimizer]

    def train_step(self, data):
        (x, other), y = data
        return super().train_step(x + other * y)

    def test_step(self, data):
        x, y = data
        self.seen.update_state(ops.mean(x * y))
        return {"loss": self.seen.result()}


class Late(OwnStep):
    """Its second layer and a metric are made in the first step."""

    def __init__(self):
        super().__init__()
        self.b = None

    def used(self):
        return [self.optimizer]

    def loss_of(self, data):
        if self.b is None:
            self.b, self.late = keras.layers.Dense(4), keras.metrics.MeanAbsoluteError()
        x = data[0] if isinstance(data, tuple) else data
        out = self.b(self.a(x))
        self.late.update_state(x, out)
        return ops.mean(ops.square(out - x))


def own(kind, **arguments):
    def make():
        model = kind(**arguments)
        model.compile(ok.optimizers.AdamW(1e-2), run_eagerly=True)
        return model

    return make


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="the steps are written for TensorFlow")
@pytest.mark.parametrize(
    ("make", "data", "arguments"),
    [
        pytest.param(own(OwnStep), lambda: shuffled(X), {}, id="no call"),
        pytest.param(own(Late), lambda: shuffled(X), {}, id="layers of the first step"),
        pytest.param(
            own(Unpacking), lambda: shuffled((X, X[::-1]), Y), {"validation_data": (X, Y)}, id="unpacked in the step"
        ),
    ],
)
def test_models_with_a_step_of_their_own(tmp_path, make, data, arguments):
    assert_resumed(tmp_path, make, data, **arguments)


def sequential(**arguments):
    model = keras.Sequential([keras.layers.Dense(3), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile(ok.optimizers.AdamW(1e-2), "mse", metrics=["mae"], run_eagerly=True, **arguments)
    return model


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return X[8 * index : 8 * index + 8], Y[8 * index : 8 * index + 8]


def generator():
    for _ in range(3):
        for index in range(3):
            yield Batches()[index]


def dataset():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(8).filter(lambda *_: True)  # of unknown length


@pytest.mark.few(1)
@pytest.mark.filterwarnings("ignore:Your input ran out of data")  # so Keras of data of unknown length
@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        pytest.param(lambda: (X, Y), {"batch_size": 8, "shuffle": False}, id="arrays"),
        pytest.param(lambda: Batches(), {"shuffle": False}, id="PyDataset"),
        pytest.param(
            dataset, {"shuffle": False}, id="tf.data", marks=pytest.mark.only_on("tensorflow", because="tf.data")
        ),
    ],
)
def test_a_model_that_the_first_step_builds_is_resumed_at_the_end_of_an_epoch(tmp_path, data, arguments):
    warns = None if "batch_size" in arguments else "x must be"
    assert_resumed(tmp_path, sequential, data, every="epoch", warns=warns, **arguments)


def test_a_generator_loses_no_batch(tmp_path):
    """What comes after an interruption is what the generator gives; the step that only builds takes none of it."""
    given = []

    def data():
        given.append(0)
        for x, y in generator():
            given[-1] += 1
            yield x, y

    more = {"every": "epoch", "steps_per_epoch": 3, "shuffle": False, "warns": "x must be"}
    model = resumed(tmp_path, sequential, data, crash=4, **more)[1][0]
    assert int(model.optimizer.iterations) == 9
    assert given[-1] == 6


@pytest.mark.long
@pytest.mark.parametrize("form", [list, tuple])
def test_inputs_in_lists_and_tuples(tmp_path, form):
    def make():
        a, b = keras.Input((4,)), keras.Input((4,))
        model = keras.Model([a, b], keras.layers.Dense(1)(keras.layers.add([a, keras.layers.Dropout(0.5)(b)])))
        model.compile("adam", "mse", run_eagerly=True)
        return model

    data = form([X, X[::-1]])
    assert_resumed(tmp_path, make, lambda: (data, Y), every="epoch", batch_size=8, shuffle=False)


@pytest.mark.long
def test_losses_of_outputs_with_weights_are_bitwise_the_same(tmp_path):
    weights = {"p": np.linspace(0.1, 2, 24).astype("float32"), "q": np.ones(24, "float32")}
    targets = {"p": Y**2, "q": X[:, :2]}

    def make():
        x = keras.Input((4,))
        model = keras.Model(x, {"p": keras.layers.Dense(1, name="p")(x), "q": keras.layers.Dense(2, name="q")(x)})
        model.compile("adam", {"p": "mse", "q": "mse"}, metrics={"q": "mae"}, weighted_metrics={"p": ["mae"]})
        return model

    more = {"validation_data": (X, targets, weights), "validation_batch_size": 10}
    assert_resumed(tmp_path, make, lambda: shuffled(X, targets, weights), **more)


# -- several optimizers -----------------------------------------------------------------------------------------------

MAKE = {
    "ours": lambda: ok.optimizers.AdamW(1e-2),
    "lookahead": lambda: ok.optimizers.Lookahead(ok.optimizers.AdamW(1e-2), sync_period=2),
    "keras": lambda: keras.optimizers.Adagrad(1e-2),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-2)),
    "ours scaled": lambda: keras.optimizers.LossScaleOptimizer(ok.optimizers.Adam(1e-2)),
    "several": lambda: keras.optimizers.MultiOptimizer(_by_kind()),
}


def _by_kind():
    made = {"kernel": keras.optimizers.Adam(1e-2), "bias": keras.optimizers.SGD(1e-2, momentum=0.9)}
    return lambda variable: made[variable.path.split("/")[-1]]


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="Keras on JAX has no place for the state of a second optimizer")
@pytest.mark.parametrize("compiled", ["rmsprop", None])
@pytest.mark.parametrize(("a", "b"), [("ours", "keras"), ("lookahead", "scaled"), ("ours scaled", "several")])
def test_every_optimizer_of_a_model_is_put_back(tmp_path, a, b, compiled):
    def make():
        model = OwnStep(optimizers={"a": MAKE[a](), "b": MAKE[b]()})
        model.compile(compiled, run_eagerly=True)
        return model

    (model, state, _), (_, again, _) = resumed(tmp_path, make, lambda: shuffled(X))
    assert_same(state, again)
    assert [int(o.iterations) for o in model.used()] == [9, 9]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["several", "scaled"])
def test_optimizers_inside_of_the_compiled_one_are_put_back(tmp_path, name):
    def make():
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dropout(0.5)])
        model.add(keras.layers.Dense(1))
        model.compile(MAKE[name](), "mse")
        return model

    assert_resumed(tmp_path, make, shuffled)


@pytest.mark.only_on("tensorflow", because="the steps are written for TensorFlow")
@pytest.mark.parametrize(("a", "b"), [("ours", "keras"), ("lookahead", "scaled"), ("ours scaled", "several")])
def test_a_state_from_before_optimizers_were_built_is_put_back(a, b):
    model = OwnStep(optimizers={"a": MAKE[a](), "b": MAKE[b]()})
    model.compile(None, run_eagerly=True)
    model.loss_of(X)
    before, ends = TrainingState.of(model), []
    for _ in range(2):
        model.fit(X, batch_size=8, shuffle=False, verbose=0)
        ends.append(packed(TrainingState.of(model)))
        before.into(model, metrics=False)
    assert_same(*ends)


@pytest.mark.only_on("tensorflow", because="the steps are written for TensorFlow")
def test_an_optimizer_of_weights_outside_of_the_model_is_refused(tmp_path):
    outside = keras.layers.Dense(4)
    outside.build((3,))

    class Outside(OwnStep):
        def train_step(self, data):
            self.optimizers["b"].apply([ops.ones_like(v) for v in outside.trainable_variables], outside.weights)
            return {"loss": 0.0}

    model = Outside(optimizers={"a": MAKE["ours"](), "b": MAKE["ours"]()})
    model.compile(None, run_eagerly=True)
    with pytest.raises(
        ValueError, match=r"'adam_w.*' updates 2 variables that are not of model .*, among them .*kernel"
    ):
        model.fit(shuffled(X), callbacks=[Resume(tmp_path)], verbose=0)


# -- more than Keras lists --------------------------------------------------------------------------------------------


class Holding(OwnStep):
    """Variables that Keras does not list: in attributes, lists, dicts, and in a layer."""

    def __init__(self):
        import tensorflow as tf

        super().__init__()
        self.queue = tf.Variable(tf.zeros((4,)))
        self.others = [tf.Variable(0.0), {"deep": (tf.Variable([1, 2]),)}]
        self.generator = tf.random.Generator.from_seed(3)
        self.a.count = tf.Variable(0, dtype="int64")

    def used(self):
        return [self.optimizer]

    def loss_of(self, data):
        self.queue.assign(0.9 * self.queue + ops.mean(data[0], 0) + self.generator.normal((4,)))
        self.others[0].assign_add(1.0)
        self.others[1]["deep"][0].assign_add([1, 2])
        self.a.count.assign_add(1)
        return super().loss_of(data) + ops.mean(self.queue * self.b(self.a(data[0])))


@pytest.mark.only_on("tensorflow", because="tf.Variable")
def test_variables_that_keras_does_not_list_are_put_back(tmp_path):
    (model, state, _), (_, again, _) = resumed(tmp_path, own(Holding), lambda: shuffled(X))
    assert_same(state, again)
    assert model.others[0].numpy() == model.a.count.numpy() == 9


class Centred(keras.layers.Layer):
    """Computes something from its variable when it is loaded."""

    def build(self, shape):
        self.middle = self.add_weight(shape=(shape[-1],), trainable=False, name="middle")

    def set(self, value):
        self.middle.assign(value)
        self.derived = ops.convert_to_numpy(self.middle) * 2

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.set(self.middle)

    def call(self, x):
        return x - self.derived


ADAPTED = {
    "Normalization": (keras.layers.Normalization, lambda layer: layer.adapt(3 * X + 1)),
    "Discretization": (lambda: keras.layers.Discretization(num_bins=5), lambda layer: layer.adapt(X)),
    "own": (Centred, lambda layer: layer.set(np.full(4, 0.5, "float32"))),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ADAPTED)
def test_what_layers_have_adapted_is_put_back(tmp_path, name):
    """The second script leaves the pass over all data out."""
    make, adapt = ADAPTED[name]
    history = []
    for directory, adapts, after in (("whole", True, None), ("cut", True, 7), ("cut", False, None)):
        keras.utils.set_random_seed(1)
        layer = make()
        layer.build((None, 4))
        model = keras.Sequential([layer, keras.layers.Dense(3), keras.layers.Dense(1)])
        model.compile(ok.optimizers.SGD(0.01), "mse", run_eagerly=name != "Normalization")
        if adapts:
            adapt(layer)
        elif name == "own":
            layer.set(np.zeros(4))
        else:
            layer.finalize_state() if name == "Normalization" else None
        callbacks = [Resume(tmp_path / directory, every=2), *([CrashAt(after)] if after else [])]
        with contextlib.suppress(Crash):
            history.append(model.fit(shuffled(), epochs=3, callbacks=callbacks, verbose=0).history)
    assert history[0] == history[1]


@pytest.mark.only_on("tensorflow", because="lookups are TensorFlow's")
@pytest.mark.parametrize("mode", ["int", "tf_idf"])
def test_vocabularies_are_put_back(mode):
    def made():
        layer = keras.layers.TextVectorization(output_mode=mode)
        return layer, keras.Sequential([layer])

    layer, model = made()
    layer.adapt(["a b c", "a b", "a"])
    other, twin = made()
    if mode == "int":
        other.adapt(["x", "y"])
    state = TrainingState.of(model)
    state.into(twin)
    assert other.get_vocabulary() == layer.get_vocabulary()
    np.testing.assert_array_equal(other(["a b x"]), layer(["a b x"]))
    assert_same(packed(state), packed(TrainingState.of(twin)))


def test_a_compiled_step_does_not_keep_adapted_values_of_before():
    layer = keras.layers.Normalization()
    model = keras.Sequential([keras.Input((4,)), layer, keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    layer.adapt(X)
    state, expected = TrainingState.of(model), model.evaluate(X, Y, verbose=0)
    layer.adapt(9 * X)
    model.fit(X, Y, verbose=0)
    model.evaluate(X, Y, verbose=0)
    state.into(model, metrics=False)
    assert model.evaluate(X, Y, verbose=0) == expected

"""Finding a learning rate and a batch size: against loops and formulas in NumPy, and what is left behind."""

import random
import warnings

import keras
import numpy as np
import pytest
from keras import ops
from small import without_names

import keras_optkit as ok
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.finding import BatchSizes, LearningRates, Measured, batch_size, curve
from keras_optkit.finding.batch_size import is_out_of_memory
from keras_optkit.finding.noise_scale import noise_scale
from keras_optkit.private import global_seed
from keras_optkit.testing.problems import two_replicas

STOCK = keras.optimizers
START = 0.5


def regression(n=40, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3)).astype("float32")
    return x, (x @ np.array([[1.0], [-2.0], [0.5]]) + 0.1 * rng.normal(size=(n, 1))).astype("float32")


def linear_model(optimizer, **arguments):
    """y = x w with mean squared error; its gradient is 2/n xᵀ(x w - y)."""
    start = keras.initializers.Constant(START)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False, kernel_initializer=start)])
    model.compile(**{"optimizer": optimizer, "loss": "mse"} | arguments)
    return model


SWEEP = {"low": 1e-4, "high": 1.0, "steps": 30, "verbose": 0}


def find(model, data, **arguments):
    """A short sweep, whose curve is not looked at."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "find_learning_rate: ")
        return ok.find_learning_rate(model, data, **SWEEP | arguments)


# -- the curve --------------------------------------------------------------------------------------------------------


def synthetic(seed):
    """A plateau, a fall and a divergence, with noise; and a smoother one."""
    rng = np.random.default_rng(seed)
    x = np.linspace(-6, 1, 80)
    clean = 2.3 - 1.8 / (1 + np.exp(-4 * (x + 2.5))) + np.exp(3 * (x + 0.3))
    return 10**x, clean + 0.05 * seed * rng.normal(size=80)


@pytest.mark.parametrize("beta", [0.0, 0.7, 0.95])
def test_smoothing_is_the_sum_it_is_said_to_be(beta):
    _, losses = synthetic(1)
    places = np.arange(len(losses))
    weights = float(beta) ** np.abs(places[:, None] - places)
    np.testing.assert_allclose(curve.smooth(losses, beta), weights @ losses / weights.sum(1), rtol=1e-12)
    past = np.tril(weights)
    np.testing.assert_allclose(curve.running(losses, beta), past @ losses / past.sum(1), rtol=1e-12)


def test_limit_is_a_multiple_of_the_least_mean_and_above_a_negative_one():
    assert curve.limit(np.array([3.0, 2.0, 5.0]), 0.0, 4.0) == 8.0
    assert curve.limit(np.array([-1.0, -2.0, 5.0]), 0.0, 4.0) == 4.0  # -2 + 3 * 2


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rules_are_the_formulas(seed):
    rates, losses = synthetic(seed)
    s = curve.smooth(losses, 0.9 if seed else 0.0)
    m = min(range(80), key=lambda i: s[i])
    slope = {i: (s[i + 1] - s[i - 1]) / np.log(rates[i + 1] / rates[i - 1]) for i in range(1, m)}
    assert curve.steepest(rates, s) == rates[min(slope, key=slope.get)]
    assert curve.minimum(rates, s) == pytest.approx(rates[m] / 10)
    runs = [
        (i, j) for i in range(80) for j in range(i + 1, 80) if all(s[k + 1] < s[k] for k in range(i, j))
    ]  # all that fall, the whole ones among them
    begin, end = max(runs, key=lambda run: s[run[0]] - s[run[1]])
    assert curve.valley(rates, s) == rates[begin + (end - begin) // 3]
    quarter = min(slope.values()) / 4
    assert curve.slide(rates, s) == rates[max(i for i in slope if slope[i] <= quarter)]


def test_rules_find_the_place_on_a_clean_curve():
    rates, losses = synthetic(0)
    assert curve.steepest(rates, losses) == pytest.approx(10**-2.5, rel=0.2)  # where the fall was put
    assert curve.valley(rates, losses) < 10**-2.5
    assert 10**-2.5 < curve.slide(rates, losses) < rates[np.argmin(losses)]


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_fall(seed):
    losses = 2.3 + 0.1 * np.random.default_rng(seed).normal(size=100)
    assert not curve.falls(losses, curve.smooth(losses, 0.9))


def test_a_rise_or_a_constant_is_no_fall():
    for losses in (np.linspace(1, 2, 50), np.ones(50)):
        assert not curve.falls(losses, curve.smooth(losses, 0.9))


# -- the sweep --------------------------------------------------------------------------------------------------------


def warm():
    """A schedule that begins with 0, where no multiplier of it would make a rate."""
    return ok.schedules.Warmup(ok.schedules.Cosine(0.3, 50), steps=10)


def stock_schedule():
    return STOCK.schedules.ExponentialDecay(0.3, 10, 0.5)


SWEPT = {
    "stock": (lambda: STOCK.SGD(0.3), {}),
    "ours": (lambda: ok.optimizers.SGD(0.3), {}),
    "stock_schedule": (lambda: STOCK.SGD(stock_schedule()), {}),
    "our_schedule": (lambda: ok.optimizers.SGD(warm()), {}),
    "groups": (lambda: ok.optimizers.SGD(0.3, groups=[ok.Group("kernel", lr_scale=0.5)]), {"scale": 0.5}),
    "accumulated": (lambda: ok.optimizers.SGD(warm(), gradient_accumulation_steps=2), {"micro": 2}),
    "accumulated_stock": (lambda: STOCK.SGD(stock_schedule(), gradient_accumulation_steps=2), {"micro": 2}),
    "scaled": (lambda: ok.optimizers.LossScale(ok.optimizers.SGD(warm())), {}),
    "scaled_stock": (lambda: STOCK.LossScaleOptimizer(STOCK.SGD(stock_schedule())), {}),
}


def numpy_losses(x, y, rates, batch=8, scale=1.0, micro=1, seed=0):
    """The loss of every update's batches before it, in a loop."""
    w, losses, epoch, queue = np.full((3, 1), START), [], 0, []
    for rate in rates:
        while len(queue) < micro:
            order = np.random.default_rng((seed, epoch)).permutation(len(x))
            queue += [order[i : i + batch] for i in range(0, len(x), batch)]
            epoch += 1
        rows, queue = queue[:micro], queue[micro:]
        errors = [x[r] @ w - y[r] for r in rows]
        losses.append(np.mean([np.mean(e**2) for e in errors]))
        gradient = np.mean([2 * x[r].T @ e / len(r) for r, e in zip(rows, errors, strict=True)], axis=0)
        w = w - scale * rate * gradient
    return np.array(losses)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", SWEPT)
def test_losses_are_those_of_a_loop_with_the_same_rates(name):
    make, how = SWEPT[name]
    x, y = regression(48)  # 6 batches an epoch, which accumulation divides
    model = linear_model(make())
    rate = float(ops.convert_to_numpy(ops.convert_to_tensor(model.optimizer.learning_rate)))
    found = find(model, (x, y), batch_size=8, high=0.2)
    rates = 1e-4 * (0.2 / 1e-4) ** (np.arange(30) / 29)
    np.testing.assert_allclose(found.learning_rates, rates, rtol=1e-12)
    np.testing.assert_allclose(found.losses, numpy_losses(x, y, rates, **how), rtol=2e-5)
    assert float(ops.convert_to_numpy(ops.convert_to_tensor(model.optimizer.learning_rate))) == rate
    assert np.all(model.get_weights()[0] == START)


EXECUTION = {
    "xla": {"jit_compile": True},
    "eager": {"run_eagerly": True},
    "five_steps_at_once": {"jit_compile": False, "steps_per_execution": 5},
}


@pytest.mark.few(2)
@pytest.mark.parametrize("execution", EXECUTION)
def test_losses_are_the_same_however_the_step_is_run(execution):
    x, y = regression()
    model = linear_model(ok.optimizers.SGD(warm()), metrics=["mae"], **EXECUTION[execution])
    found = find(model, (x, y), batch_size=8, high=0.2)
    np.testing.assert_allclose(found.losses, numpy_losses(x, y, found.learning_rates), rtol=2e-5)
    assert model.steps_per_execution == EXECUTION[execution].get("steps_per_execution", 1)


@pytest.mark.only_on("tensorflow", because="its strategies are TensorFlow's")
def test_losses_with_two_replicas_are_those_of_the_whole_batch():
    x, y = regression()
    with two_replicas().scope():
        model = linear_model(ok.optimizers.SGD(warm()))
    found = find(model, (x, y), batch_size=8, high=0.2)
    np.testing.assert_allclose(found.losses, numpy_losses(x, y, found.learning_rates), rtol=2e-5)


def test_the_suggestion_trains_a_quadratic_and_is_below_its_edge_of_stability():
    x, y = regression(512)
    found = find(linear_model("sgd"), (x, y), low=1e-4, high=10.0, steps=60, batch_size=64)
    edge = 2 / np.linalg.eigvalsh(2 * x.T @ x / len(x))[-1]
    assert edge / 100 < found.suggestion < edge / 2
    assert all(edge / 1000 < rate < 2 * edge for rate in found.suggestions.values())
    assert found.ended == "the loss had risen above the limit"
    assert len(found.losses) < 60


@pytest.mark.long
def test_a_schedule_of_the_weight_decay_goes_on_as_it_is():
    x, y = regression()
    decay = ok.schedules.Linear(0.5, 20)
    model = linear_model(ok.optimizers.SGD(warm(), weight_decay=decay))
    driven = linear_model(ok.optimizers.SGD(0.1, weight_decay=decay))
    assert np.array_equal(find(model, (x, y)).losses, find(driven, (x, y)).losses)


# -- the data ---------------------------------------------------------------------------------------------------------


class Given(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return self.x[8 * index :][:8], self.y[8 * index :][:8]


def endless(x, y):
    while True:
        yield from ((x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8))


def as_dataset(x, y):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def of_unknown_length(x, y):
    return as_dataset(x, y).filter(lambda *_: True)


@pytest.mark.few(2)
@pytest.mark.parametrize("make", [Given, endless, as_dataset, of_unknown_length])
def test_data_that_give_batches(make):
    x, y = regression(24)
    found = find(linear_model("sgd"), make(x, y), high=0.01)
    # where data of unknown length end, Keras counts an update more on TensorFlow
    assert len(found.losses) == len(found.learning_rates)
    assert len(found.losses) == 30 or (make is of_unknown_length and len(found.losses) == 23)
    assert found.learning_rates[-1] > 0.008
    w = np.full((3, 1), START)
    first = [np.mean((x[i : i + 8] @ w - y[i : i + 8]) ** 2) for i in (0, 8, 16)]
    expected = first if make is Given else first[:1]  # Keras shuffles the batches of a PyDataset
    assert min(abs(found.losses[0] - value) for value in expected) < 1e-4


def test_a_generator_that_ends_too_early():
    x, y = regression()
    model = linear_model("sgd")
    before = TrainingState.of(model)
    with pytest.raises(ValueError, match=r"data must give enough batches for 30 updates.*ended after 7"):
        find(model, (batch for batch, _ in zip(endless(x, y), range(7), strict=False)))
    assert same(before, TrainingState.of(model))


def test_weights_of_samples_and_classes():
    x, y = regression(16)
    labels = (y > 0).astype("int32")
    weights = np.where(labels[:, 0] > 0, 3.0, 1.0).astype("float32")
    found = find(linear_model("sgd"), (x, labels, weights), batch_size=16, steps=10)
    other = find(linear_model("sgd"), (x, labels), batch_size=16, steps=10, class_weight={0: 1.0, 1: 3.0})
    np.testing.assert_allclose(found.losses, other.losses, rtol=1e-5)
    plain = np.mean((x @ np.full((3, 1), START) - labels) ** 2 * weights[:, None])
    assert found.losses[0] == pytest.approx(plain, rel=1e-5)


def two_inputs():
    """Two inputs and two outputs, by name."""
    inputs = {"a": keras.Input((2,)), "b": keras.Input((1,))}
    joined = keras.layers.concatenate([inputs["a"], inputs["b"]])
    outputs = [keras.layers.Dense(1, kernel_initializer="ones", name=name)(joined) for name in "yz"]
    model = keras.Model(list(inputs.values()), outputs)
    model.compile("sgd", loss=["mse", "mse"])
    return model


@pytest.mark.long
def test_several_inputs_and_outputs_are_given_as_to_fit():
    x, y = regression(24)
    forms = [
        ([x[:, :2], x[:, 2:]], [y, y], [np.full(24, 2.0), np.full(24, 2.0)]),
        ((x[:, :2], x[:, 2:]), [y, y], np.full(24, 2.0)),
    ]
    for data in forms:
        rows = np.random.default_rng((0, 0)).permutation(24)[:8]
        found = find(two_inputs(), data, batch_size=8, steps=10)
        expected = 4 * np.mean((x[rows].sum(1, keepdims=True) - y[rows]) ** 2)
        assert found.losses[0] == pytest.approx(expected, rel=1e-4)
    sizes = ok.find_batch_size(two_inputs(), forms[0], [8], steps=1, noise_warm_up=0, verbose=0)
    assert sizes.noise_scale > 0
    with pytest.raises(ValueError, match="class_weight must be None for a model with several outputs"):
        find(two_inputs(), forms[1][:2], class_weight={0: 1.0})


FINDERS = {
    "learning_rate": lambda model, data: find(model, data, steps=20),
    "batch_size": lambda model, data: ok.find_batch_size(
        model, data, [4, 8], steps=2, warm_up=1, noise_batches=3, noise_warm_up=3, verbose=0
    ),
}


# -- models with several optimizers, and those that are not built -----------------------------------------------------


class Layered(keras.Model):
    """Built by its first step."""

    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(4, "tanh")
        self.normal = keras.layers.BatchNormalization()
        self.out = keras.layers.Dense(1)

    def call(self, x, training=False):
        return self.out(self.normal(self.hidden(x), training=training))


def unbuilt():
    keras.utils.set_random_seed(3)
    model = Layered()
    model.compile(ok.optimizers.Adam(0.01), loss="mse", metrics=["mae"])
    return model


def lazy_sequential():
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.layers.Dense(4), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    model.compile(STOCK.Adam(0.01), loss="mse")
    return model


@pytest.mark.long
@pytest.mark.parametrize(("make", "finder"), [(unbuilt, "learning_rate"), (lazy_sequential, "batch_size")])
def test_a_model_that_its_first_step_builds(make, finder):
    x, y = regression()
    model, twin = make(), make()
    FINDERS[finder](model, (x, y))
    logs = [m.fit(ok.data.Shuffled(x, y, seed=1), epochs=2, verbose=0).history for m in (model, twin)]
    assert logs[0] == logs[1]
    assert same(TrainingState.of(model), TrainingState.of(twin))


def test_building_takes_no_batch_away():
    x, y = regression(24)
    model = keras.Sequential(
        [keras.layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))]
    )
    model.compile("sgd", loss="mse")
    found = find(model, endless(x, y), high=0.01, steps=10)
    assert found.losses[0] == pytest.approx(np.mean((x[:8] @ np.full((3, 1), START) - y[:8]) ** 2), rel=1e-4)


class Halves(keras.Model):
    """Two layers, each trained by an optimizer of its own, in an attribute and in a dict; all are built by a step."""

    def __init__(self, first, second):
        super().__init__()
        start = keras.initializers.Constant(START)
        self.inner = keras.layers.Dense(2, use_bias=False, kernel_initializer=start)
        self.outer = keras.layers.Dense(1, use_bias=False, kernel_initializer=start)
        self.first, self.others = first, {"second": second} if second else {}
        self.mean = keras.metrics.Mean(name="loss")
        self.seen = tensorflow_variable(0)

    def call(self, x):
        return self.outer(self.inner(x))

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = ops.mean(ops.square(self(x) - y))
        halves = [self.inner.trainable_variables, self.outer.trainable_variables]
        optimizers = [self.first, *self.others.values()]
        for optimizer, half, gradients in zip(optimizers, halves, tape.gradient(loss, halves), strict=False):
            optimizer.apply(gradients, half)
        self.mean.update_state(loss)
        self.seen.assign_add(1)
        return {"loss": self.mean.result()}


def tensorflow_variable(value):
    """One that Keras does not track."""
    import tensorflow as tf

    return tf.Variable(value)


def numpy_halves(x, y, rates, others, batch=8):
    """The losses of `Halves`, whose first optimizer has these rates and whose second one the others."""
    inner, outer, losses, queue, epoch = np.full((3, 2), START), np.full((2, 1), START), [], [], 0
    for rate, other in zip(rates, others, strict=True):
        if not queue:
            order = np.random.default_rng((0, epoch)).permutation(len(x))
            queue, epoch = [order[i : i + batch] for i in range(0, len(x), batch)], epoch + 1
        r, queue = queue[0], queue[1:]
        error = x[r] @ inner @ outer - y[r]
        losses.append(np.mean(error**2))
        gradients = 2 / len(r) * x[r].T @ error @ outer.T, 2 / len(r) * (x[r] @ inner).T @ error
        inner, outer = inner - rate * gradients[0], outer - other * gradients[1]
    return np.array(losses)


@pytest.mark.only_on("tensorflow", because="a train_step with a gradient tape")
class TestSeveralOptimizers:
    @staticmethod
    def halves(second="adam"):
        model = Halves(STOCK.SGD(0.02), ok.optimizers.Adam(warm()) if second == "adam" else second)
        model.compile(optimizer=None)
        return model

    @pytest.mark.parametrize("chosen", ["first", "second"])
    def test_the_rate_of_the_chosen_one_is_swept_and_all_are_put_back(self, chosen):
        x, y = regression()
        model, twin = (self.halves(ok.optimizers.SGD(stock_schedule())) for _ in range(2))
        optimizer = model.first if chosen == "first" else model.others["second"]
        found = find(model, (x, y), optimizer=optimizer, batch_size=8, high=0.2, steps=12)
        kept = np.full(12, 0.02) if chosen == "second" else 0.3 * 0.5 ** (np.arange(12) / 10)
        rates = (found.learning_rates, kept) if chosen == "first" else (kept, found.learning_rates)
        np.testing.assert_allclose(found.losses, numpy_halves(x, y, *rates), rtol=2e-5)
        assert int(model.seen) == 0
        for m in (model, twin):
            m.fit(ok.data.Shuffled(x, y, batch_size=8), epochs=2, verbose=0)
        for mine, other in zip(model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, other)

    def test_without_a_choice_it_is_an_error(self):
        model = self.halves()
        with pytest.raises(ValueError, match=r"must be one of the 2 .* SGD \('sgd\S*'\), Adam \('adam\S*'\); got None"):
            find(model, regression())

    def test_all_are_put_back_after_measuring_batches_and_the_noise_is_not_measured(self):
        x, y = regression()
        model, twin = self.halves(), self.halves()
        with pytest.warns(UserWarning, match="the noise scale was not measured, since the model's train_step may use"):
            found = ok.find_batch_size(model, (x, y), [4, 8], steps=2, verbose=0)
        assert found.noise_scale is None
        assert found.suggestion in (4, 8)
        assert "The noise scale was not measured" in found.table()
        for m in (model, twin):
            m.fit(ok.data.Shuffled(x, y, batch_size=8), epochs=2, verbose=0)
        for mine, other in zip(model.get_weights(), twin.get_weights(), strict=True):
            np.testing.assert_array_equal(mine, other)

    def test_the_only_one_that_a_model_holds_needs_no_choice(self):
        assert len(find(self.halves(second=None), regression(), steps=10).losses) == 10

    def test_a_part_that_was_compiled_before_does_not_matter(self):
        x, y = regression()
        part = linear_model("adam")
        model = keras.Sequential([keras.Input((3,)), part])
        model.compile("sgd", loss="mse")
        assert len(find(model, (x, y), steps=10).losses) == 10


@pytest.mark.parametrize("chosen", [0, 1])
def test_one_of_the_optimizers_in_keras_s_multioptimizer(chosen):
    x, y = regression()
    start = keras.initializers.Constant(START)
    layers = [keras.layers.Dense(n, use_bias=False, kernel_initializer=start) for n in (2, 1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    inner = [STOCK.SGD(0.02), STOCK.SGD(0.03)]
    of_layer = {layer.name: optimizer for layer, optimizer in zip(layers, inner, strict=True)}
    model.compile(STOCK.MultiOptimizer(lambda v: of_layer[v.path.split("/")[-2]]), loss="mse")
    with pytest.raises(ValueError, match="optimizer must be one of the 2"):
        find(model, (x, y))
    found = find(model, (x, y), optimizer=inner[chosen], batch_size=8, high=0.2, steps=12)
    rates = (found.learning_rates, np.full(12, 0.03)) if chosen == 0 else (np.full(12, 0.02), found.learning_rates)
    np.testing.assert_allclose(found.losses, numpy_halves(x, y, *rates), rtol=2e-5)
    assert np.all(model.get_weights()[0] == START)


# -- where there is nothing to find -----------------------------------------------------------------------------------


def test_a_flat_curve_gives_a_warning_and_no_suggestion():
    x, y = regression()
    with pytest.warns(UserWarning, match="no learning rate from .* makes the loss fall clearly"):
        found = ok.find_learning_rate(linear_model("sgd"), (x, y), low=1e-12, high=1e-10, verbose=0)
    assert found.suggestion is None
    assert found.suggestions == {}
    assert "No learning rate from" in found.table()


@pytest.mark.long
def test_a_curve_that_still_falls_gives_a_warning():
    x, y = regression(64)
    with pytest.warns(UserWarning, match="still falls at the highest rate"):
        found = ok.find_learning_rate(linear_model("sgd"), (x, y), low=1e-3, high=3e-2, batch_size=64, verbose=0)
    assert found.suggestion is not None


def test_a_first_loss_that_is_not_finite_is_an_error():
    x, y = regression()
    model = linear_model("sgd")
    with pytest.raises(ValueError, match="model must have a finite loss on the first batch"):
        find(model, (x, y * np.nan))
    assert np.all(model.get_weights()[0] == START)


def test_a_loss_that_is_no_longer_finite_ends_the_sweep():
    x, y = regression()
    model = linear_model(
        "sgd", loss=lambda t, p: ops.mean(ops.square(t - p)) / ops.cast(ops.max(ops.abs(p)) < 50, p.dtype)
    )
    found = find(model, (x, y), high=1e4, steps=50, stop_factor=1e9)
    assert found.ended == "the loss was no longer finite"
    assert np.all(np.isfinite(found.losses))
    assert len(found.losses) == len(found.learning_rates) == len(found.smoothed) < 50


def half(optimizer, **arguments):
    """A model in float16."""
    keras.config.set_dtype_policy("mixed_float16")
    return linear_model(optimizer, **arguments)


def test_a_skipped_update_is_tried_again_with_its_rate():
    x, y = regression()
    model = half(STOCK.LossScaleOptimizer(STOCK.SGD(0.1), initial_scale=2.0**24))
    found = find(model, (x, y), steps=10)
    assert len(found.losses) == 10
    assert found.ended == ""
    assert float(model.optimizer.dynamic_scale) == 2.0**24
    weights = np.float16(START)
    every = [np.mean((x @ np.full((3, 1), weights) - y)[i : i + 8] ** 2) for i in range(0, 40, 8)]
    assert min(every) * 0.5 < found.losses[0] < max(every) * 2  # the mean of several batches


def test_a_sweep_without_updates_ends():
    x, y = regression()
    loss = lambda t, p: ops.mean(ops.sqrt(ops.abs(p - p)))  # noqa: E731, ARG005 (0, and its gradient is infinite)
    found = find(half(STOCK.LossScaleOptimizer(STOCK.SGD(0.1)), loss=loss), (x, y))
    assert found.ended == "there was no update in 40 batches"


# -- what is left behind ----------------------------------------------------------------------------------------------


def flat(state):
    return keras.tree.flatten(without_names(vars(state)))


def same(one, other):
    """Whether two states are bitwise the same."""
    pairs = list(zip(flat(one), flat(other), strict=True))
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs) and len(pairs) > 5


def rich_model(optimizer):
    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((3,)), layers.Dense(8, "relu"), layers.Dropout(0.3), layers.BatchNormalization(), layers.Dense(1)]
    )
    model.compile(optimizer=optimizer, loss="mse", metrics=["mae"])
    return model


OPTIMIZERS = {
    # on JAX, a second `fit` with Keras's average fails whatever there was in between
    "stock": lambda: STOCK.Adam(stock_schedule(), use_ema=keras.config.backend() != "jax"),
    "ours": lambda: ok.optimizers.AdamW(warm(), gradient_accumulation_steps=3),
    "averaged": lambda: ok.optimizers.ScheduleFreeAdamW(0.01),
    "scaled": lambda: ok.optimizers.LossScale(ok.optimizers.AdamW(0.01)),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_there_had_been_no_finder(optimizer, finder):
    x, y = regression()
    ends = []
    for searched in (False, True):
        model = rich_model(OPTIMIZERS[optimizer]())
        data = ok.data.Shuffled(x, y, batch_size=8, seed=1)
        model.fit(data, epochs=2, verbose=0)
        history, function, stopped = model.history, model.train_function, model.stop_training
        if searched:
            before, unseeded = TrainingState.of(model), global_seed()
            FINDERS[finder](model, (x, y))
            assert same(before, TrainingState.of(model))
            assert (model.history, model.train_function, model.stop_training) == (history, function, stopped)
            assert np.array_equal(global_seed(), unseeded)
        logs = model.fit(data, epochs=2, verbose=0).history
        draws = [random.random(), np.random.random(), keras.random.uniform(()).__float__()]
        ends.append((TrainingState.of(model), logs, draws))
    (one, logs, draws), (other, other_logs, other_draws) = ends
    assert same(one, other)
    assert (logs, draws) == (other_logs, other_draws)


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_that_was_not_trained_yet(optimizer):
    x, y = regression()
    model, twin = (rich_model(OPTIMIZERS[optimizer]()) for _ in range(2))
    found = find(model, (x, y), steps=20)
    assert not hasattr(model, "history")
    assert model.train_function is None
    assert np.all(np.concatenate([np.ravel(v) for v in model.metrics_variables]) == 0)
    again = find(model, (x, y), steps=20)
    assert np.array_equal(found.losses, again.losses)  # the seeds of the dropout, too
    logs = [m.fit(ok.data.Shuffled(x, y, seed=1), epochs=2, verbose=0).history for m in (model, twin)]
    assert logs[0] == logs[1]
    assert same(TrainingState.of(model), TrainingState.of(twin))


class Fails:
    """A loss that fails at its n-th call from when it is told so."""

    calls_left = float("inf")
    error = RuntimeError

    def __call__(self, y_true, y_pred):
        self.calls_left -= 1
        if self.calls_left == 0:
            raise self.error("stop")
        return ops.mean(ops.square(y_true - y_pred))


@pytest.mark.each_once
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("schedule", [warm, stock_schedule])
def test_everything_is_put_back_after_an_exception(finder, error, calls, schedule):
    x, y = regression()
    loss = Fails()
    optimizer = (ok.optimizers if schedule is warm else STOCK).SGD(schedule(), momentum=0.9)
    model = linear_model(optimizer, loss=loss, run_eagerly=True)
    model.fit(ok.data.Shuffled(x, y, batch_size=8), verbose=0)
    before, function, history = TrainingState.of(model), model.train_function, model.history
    rate = float(ops.convert_to_numpy(optimizer.learning_rate))
    loss.calls_left, loss.error = calls, error
    with pytest.raises(error, match="stop"):
        FINDERS[finder](model, (x, y))
    assert same(before, TrainingState.of(model))
    assert (model.train_function, model.history, model.optimizer) == (function, history, optimizer)
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) == rate
    model.fit(ok.data.Shuffled(x, y, batch_size=8), verbose=0)


# -- arguments and result ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0}, "low must be a finite number in"),
        ({"low": 2.0}, r"high must be a finite number in \(2.0"),
        ({"steps": 9}, "steps must be an integer at least 10, got 9"),
        ({"rule": "steepist"}, "rule must be one of .*Did you mean 'steepest'"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"stop_factor": 1.0}, "stop_factor must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"verbose": 3}, "verbose must be one of"),
        ({"seed": -1}, "seed must be an integer at least 0"),
        ({"optimizer": 3}, "optimizer must be an optimizer or None, got 3"),
        ({"optimizer": STOCK.SGD()}, r"optimizer must be one that model holds, SGD \('sgd\S*'\); got <keras"),
        ({"class_weight": []}, r"class_weight must be a dict of class to weight, or None, got \[\]"),
        ({"class_weight": {0: "x"}}, r"class_weight\[0\] must be a finite number"),
        ({"class_weight": {"x": 1.0}}, "each class of class_weight must be an integer"),
    ],
)
def test_arguments_of_the_learning_rate_finder(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        find(linear_model("sgd"), regression(), **arguments)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (lambda x, _: x, TypeError, "data must be a tuple .* got a ndarray"),
        (lambda x, y: [x, y], TypeError, "got a list"),
        (lambda x, y: (x, y, y, y), TypeError, "got a tuple of 4 parts"),
        (lambda *_: 3.0, TypeError, "data must be .* got a float"),
        (lambda *_: "x", TypeError, "data must be .* got a str"),
        (lambda *_: object(), TypeError, "data must be .* got a object"),
        (lambda x, y: (x.tolist(), y), TypeError, "x must be an array, or arrays in lists"),
        (lambda x, y: (x, y[:3]), ValueError, "the same number of rows"),
    ],
)
def test_data_that_are_none(data, error, message):
    for finder in (find, lambda model, given: ok.find_batch_size(model, given, [4], verbose=0)):
        with pytest.raises(error, match=message):
            finder(linear_model("sgd"), data(*regression()))


def test_a_batch_size_is_for_arrays():
    with pytest.raises(ValueError, match="batch_size must be None for data that give batches"):
        find(linear_model("sgd"), Given(*regression()), batch_size=4)


@pytest.mark.parametrize("finder", FINDERS)
def test_models_that_cannot_be_trained(finder):
    data = regression()
    with pytest.raises(TypeError, match=r"model must be a keras.Model, got 'model'"):
        FINDERS[finder]("model", data)
    model = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="model must be compiled"):
        FINDERS[finder](model, data)
    model.compile(optimizer=None, loss="mse")
    with pytest.raises(ValueError, match="model must have an optimizer"):
        FINDERS[finder](model, data)


def test_an_optimizer_without_a_rate_is_refused():
    class Rateless(STOCK.SGD):
        @property
        def learning_rate(self):
            raise AttributeError("none")

    with pytest.raises(ValueError, match="must have an optimizer with a learning rate, got Rateless"):
        find(linear_model(Rateless()), regression())


def test_the_result_as_table_and_plot():
    rates, losses = synthetic(1)
    found = LearningRates(rates, losses, curve.smooth(losses, 0.9), "valley", {"minimum": 0.01, "valley": 0.002}, "x")
    assert found.suggestion == 0.002
    assert found.table().splitlines() == [
        "80 updates, learning rates 1.00e-06 to 1.00e+01",
        "",
        "minimum   1.00e-02",
        "valley    2.00e-03 *",
        "The sweep ended early: x.",
    ]
    assert str(found) == found.table()
    ax = found.plot()
    assert ax.get_xscale() == "log"
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [0.01, 0.002]
    assert found.plot(ax) is ax


def test_progress_is_shown(capsys):
    find(linear_model("sgd"), regression(), steps=10, verbose=1)
    printed = capsys.readouterr().out
    assert "10/10" in printed
    assert "learning_rate: 1.0000" in printed


# -- batch sizes ------------------------------------------------------------------------------------------------------


def test_the_noise_scale_is_the_estimate_of_the_paper():
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 4)) + 1
    b_small, b_big = 3, 18
    small, big = np.mean((gradients**2).sum(1)), (gradients.mean(0) ** 2).sum()
    signal = (b_big * big - b_small * small) / (b_big - b_small)
    noise = (small - big) / (1 / b_small - 1 / b_big)
    assert noise_scale(gradients.sum(0), list((gradients**2).sum(1)), 3) == pytest.approx(noise / signal)
    assert noise_scale(np.zeros(4), [1.0, 1.0], 3) == np.inf
    assert noise_scale(np.ones(4), [4.0], 3) is None
    assert noise_scale(np.full(4, np.nan), [4.0, np.nan], 3) is None


NOISE = {
    "stock": lambda: "adam",
    "scaled": lambda: STOCK.LossScaleOptimizer(STOCK.SGD(0.1)),
    "clipped": lambda: ok.optimizers.SGD(0.1, clipnorm=1e-3, gradient_accumulation_steps=2),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("optimizer", NOISE)
def test_the_noise_scale_is_that_of_the_data(optimizer):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 3)).astype("float32")
    y = (x.sum(1, keepdims=True) + rng.normal(size=(1200, 1))).astype("float32")
    found = ok.find_batch_size(
        linear_model(NOISE[optimizer]()), (x, y), [4], steps=1, noise_batches=300, noise_warm_up=0, verbose=0
    )
    each = 2 * x * (x @ np.full((3, 1), START) - y)  # the gradient of every example
    mean, noise = each.mean(0), each.var(0, ddof=1).sum()
    assert found.noise_scale == pytest.approx(noise / (mean @ mean - noise / len(x)), rel=0.1)


def test_the_noise_is_measured_after_a_warm_up_and_all_is_put_back():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1200, 3)).astype("float32")
    y = (x @ np.array([[9.0], [-9.0], [9.0]]) + rng.normal(size=(1200, 1))).astype("float32")  # far from the weights
    model = linear_model(ok.optimizers.SGD(0.05, momentum=0.5))
    before = TrainingState.of(model)
    fresh, later = (
        ok.find_batch_size(model, (x, y), [8, 32], steps=1, noise_batches=30, noise_warm_up=n, verbose=0).noise_scale
        for n in (0, 12)
    )
    assert same(before, TrainingState.of(model))

    w, velocity = np.full((3, 1), START), 0.0
    order = np.random.default_rng((0, 0)).permutation(1200)
    of_examples = lambda w, r: 2 * x[r] * (x[r] @ w - y[r])  # noqa: E731
    scales = []
    for i in range(13):
        if i in (0, 12):
            each = of_examples(w, order[: 30 * 32])
            mean, noise = each.mean(0), each.var(0, ddof=1).sum()
            scales.append(noise / (mean @ mean - noise / len(each)))
        # the second half of the warm-up begins an epoch
        rows = order if i < 6 else np.random.default_rng((0, 1)).permutation(1200)
        velocity = 0.5 * velocity - 0.05 * of_examples(w, rows[32 * (i % 6) :][:32]).mean(0)[:, None]
        w = w + velocity
    assert scales[1] > 4 * scales[0]
    np.testing.assert_allclose([fresh, later], scales, rtol=0.25)  # b is 32, and so the noise is that of 30 means


def test_a_noise_scale_that_still_rises_is_a_lower_bound():
    rows = measured(100, 200, 400, 800)
    limited = batch_size._with_doubt(BatchSizes(rows, 8.0), [2.0, 8.0], 100)
    assert limited.doubt == (
        "the noise scale is a lower bound, and so may be the suggestion: it rose from 2 to 8 examples between updates "
        "50 and 100; raise noise_warm_up"
    )
    assert limited.table().endswith("raise noise_warm_up.")
    assert batch_size._with_doubt(BatchSizes(rows, 64.0), [2.0, 64.0], 100).doubt == ""  # which limits nothing
    assert batch_size._with_doubt(BatchSizes(rows, 8.0), [7.0, 8.0], 100).doubt == ""


def test_a_warm_up_that_breaks_says_so():
    x, y = regression(64)
    with pytest.warns(
        UserWarning, match="the noise scale was not measured, since the gradient is not finite after 60 upd"
    ):
        found = ok.find_batch_size(linear_model(STOCK.SGD(1e4)), (x, y), [8], steps=1, noise_warm_up=60, verbose=0)
    assert found.noise_scale is None


def test_sizes_are_measured_as_far_as_there_are_examples():
    x, y = regression(40)
    found = ok.find_batch_size(linear_model("sgd"), (x, y), max_size=64, steps=2, noise_batches=0, verbose=0)
    assert [row.size for row in found.rows] == [8, 16, 32]
    assert all(row.seconds > 0 and row.throughput == row.size / row.seconds for row in found.rows)
    assert all(row.memory > 2**20 for row in found.rows)
    assert found.noise_scale is None


@pytest.mark.few(1)
@pytest.mark.parametrize("make", [Given, endless, as_dataset])
def test_examples_are_taken_from_data_that_give_batches(make):
    x, y = regression(24)
    found = ok.find_batch_size(
        linear_model("sgd"), make(x, y), [2, 16], steps=1, noise_batches=2, noise_warm_up=0, verbose=0
    )
    assert [row.size for row in found.rows] == [2, 16]
    assert found.noise_scale > 0


def test_with_no_noise_the_noise_scale_is_0():
    x, y = np.ones((8, 3), "float32"), np.ones((8, 1), "float32")
    assert ok.find_batch_size(linear_model("sgd"), (x, y), [2], steps=1, noise_warm_up=0, verbose=0).noise_scale == 0


class Greedy(keras.layers.Layer):
    """Needs n⁴ numbers for n examples."""

    def call(self, x):
        n = ops.shape(x)[0]
        return x * ops.mean(ops.sort(ops.broadcast_to(ops.reshape(x[:, 0], (-1, 1, 1, 1)), (n, n, n, n)), axis=0))


def test_a_size_that_does_not_fit_into_memory_ends_the_measuring():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1), Greedy()])
    model.compile("adam", loss="mse")
    x, y = np.ones((4200, 3), "float32"), np.ones((4200, 1), "float32")
    before = TrainingState.of(model)
    sizes = [4, 4096, 4100]  # 1 PiB
    found = ok.find_batch_size(model, (x, y), sizes, steps=1, noise_batches=2, noise_warm_up=0, verbose=0)
    assert [(row.size, row.seconds is None) for row in found.rows] == [(4, False), (4096, True)]
    assert found.suggestion == 4
    assert "4096" in found.table()
    assert "out of memory" in found.table()
    assert same(before, TrainingState.of(model))
    model.fit(x[:8], y[:8], verbose=0)
    with pytest.warns(UserWarning, match="not even batches of 4096 examples fit"):
        assert ok.find_batch_size(model, (x, y), [4096], verbose=0).suggestion is None


def test_other_errors_are_no_lack_of_memory():
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
    model = linear_model("sgd", loss=lambda t, p: ops.matmul(t, p))
    with pytest.raises(Exception, match=r"(?i)matmul|dimension|incompatible"):
        ok.find_batch_size(model, regression(), [4], verbose=0)


def measured(*throughputs):
    return tuple(Measured(2**k, 2**k / t if t else None, 0 if t else None) for k, t in enumerate(throughputs, 3))


@pytest.mark.parametrize(
    ("throughputs", "noise", "size"),
    [
        ((100, 200, 390, 400, 380), None, 32),  # the smallest within 10 % of the best
        ((100, 200, 390, 400, 380), 8.0, 16),  # up to twice the noise scale
        ((100, 200, 390, 400, 380), 1.0, 8),  # never less than the smallest
        ((100, 200, 390, 800, 0), np.inf, 64),  # what fits
        ((0,), None, None),
    ],
)
def test_the_suggested_batch_size(throughputs, noise, size):
    assert BatchSizes(measured(*throughputs), noise).suggestion == size


def test_batch_sizes_as_table_and_plot():
    found = BatchSizes((Measured(8, 0.01, 3 * 2**20), Measured(16, 0.01, None), Measured(32)), 12.345)
    assert found.table().splitlines() == [
        "batch size  ms/step  examples/s  peak MiB",
        "         8    10.00         800         3",
        "        16    10.00        1600            *",
        "        32                                 out of memory",
        "",
        "gradient noise scale: 12.3 examples",
    ]
    assert str(found) == found.table()
    ax = found.plot()
    assert list(ax.lines[0].get_xdata()) == [8, 16]
    assert [line.get_xdata()[0] for line in ax.lines[1:]] == [32, 12.345, 16]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sizes": []}, ValueError, "sizes must be at least one integer, and rising"),
        ({"sizes": [8, 4]}, ValueError, "sizes must be at least one integer, and rising"),
        ({"sizes": [4.0]}, TypeError, "each of sizes must be an integer"),
        ({"sizes": [64]}, ValueError, "data must have at least 64 examples, the smallest size, got 40"),
        ({"max_size": 0}, ValueError, "max_size must be"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"warm_up": 0}, ValueError, "warm_up must be"),
        ({"noise_batches": -1}, ValueError, "noise_batches must be"),
        ({"noise_warm_up": -1}, ValueError, "noise_warm_up must be"),
        ({"sizes": 8}, TypeError, "sizes must be integers in a list, or None, got 8"),
        ({"seed": "x"}, TypeError, "seed must be an integer"),
        ({"verbose": "loud"}, ValueError, "verbose must be one of"),
    ],
)
def test_arguments_of_the_batch_size_finder(arguments, error, message):
    with pytest.raises(error, match=message):
        ok.find_batch_size(linear_model("sgd"), regression(), **arguments)

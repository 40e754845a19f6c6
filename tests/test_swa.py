"""Windows of stochastic weight averaging, against torch's."""

import keras
import numpy as np
import pytest
from keras import ops
from small import Alternating
from torch_references import averaged_run, in_torch

import keras_optkit as ok
from keras_optkit.callbacks import AveragedWeights

RNG = np.random.default_rng(0)
X = RNG.normal(2.0, 3.0, size=(64, 4)).astype("float32")
Y = np.sin(X[:, :1] + X[:, 1:2]).astype("float32")
UPDATES = 4  # in an epoch


def network(optimizer=None):
    keras.utils.set_random_seed(2)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dense(3, "tanh"),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Dense(1),
        ]
    )
    model.compile(optimizer or keras.optimizers.Adam(0.05), loss="mse")
    return model


def fit(model, *callbacks, epochs=4, **arguments):
    arguments = {"batch_size": 16, "validation_data": (X[:20], Y[:20])} | arguments
    return model.fit(X, Y, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments).history


def trainable(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def close(got, expected, tolerance=1e-6):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Record(keras.callbacks.Callback):
    """The weights at some moments; after batches only if it is asked, since that has Keras wait for every one."""

    def __init__(self, *hooks):
        super().__init__()
        self.hooks = hooks

    def on_train_begin(self, logs=None):
        self.seen = {hook: [] for hook in self.hooks}

    def _look(self, hook):
        if hook in self.hooks:
            self.seen[hook].append(trainable(self.model))

    def on_train_batch_end(self, batch, logs=None):
        self._look("on_train_batch_end")

    def on_epoch_begin(self, epoch, logs=None):
        self._look("on_epoch_begin")

    def on_epoch_end(self, epoch, logs=None):
        self._look("on_epoch_end")


def statistics(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.variables if "moving" in v.path]


@pytest.mark.long
def test_a_window_of_epochs_is_torchs_averaged_model():
    plain, model = network(), network()
    trained, training, shown = Record("on_epoch_end"), Record("on_epoch_begin"), Record("on_epoch_end")
    swa = AveragedWeights(batch_norm_data=X, start=1)
    without = fit(plain, trained)
    history = fit(model, training, swa, shown)
    trained, training, shown = (r.seen[r.hooks[0]] for r in (trained, training, shown))
    for seen, expected in zip(training[1:], trained[:-1], strict=True):
        same(seen, expected)  # the average is not seen in the training
    assert history["loss"] == without["loss"]
    assert history["val_loss"][0] == without["val_loss"][0]
    same(shown[0], trained[0])
    twin, fresh = in_torch(averaged_run, trained[1:], X, 16), network()
    for (mean, recalibrated), seen, loss in zip(twin, shown[1:], history["val_loss"][1:], strict=True):
        close(seen, mean)
        close(statistics_of(fresh, seen), recalibrated, 1e-5)
        assert fresh.evaluate(X[:20], Y[:20], verbose=0) == pytest.approx(loss, rel=1e-5)
    close(trainable(model), mean)
    close(statistics(model), recalibrated, 1e-5)
    assert model.evaluate(X[:20], Y[:20], verbose=0) == pytest.approx(loss, rel=1e-5)


def statistics_of(model, weights):
    for variable, value in zip(model.trainable_variables, weights, strict=True):
        variable.assign(value)
    ok.recalibrate_batch_norm(model, X, batch_size=16, verbose=0)
    return statistics(model)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("start", "every", "points"),
    [(0, 1, range(1, 13)), (0, 3, [1, 4, 7, 10]), (3, 3, [3, 6, 9, 12]), (4, 4, [4, 8, 12]), (5, 4, [5, 9])],
)
def test_a_window_of_updates_is_the_mean_of_the_weights_after_them(start, every, points):
    model = network(ok.optimizers.AdamW(0.05))
    trained = Record("on_train_batch_end")
    fit(model, trained, AveragedWeights(start=start, every=every, by="update"), epochs=3)
    after = trained.seen["on_train_batch_end"]
    parts = zip(*(after[u - 1] for u in points), strict=True)
    close(trainable(model), [np.mean(np.stack(part).astype("float64"), 0) for part in parts])


@pytest.mark.long
def test_every_second_epoch_and_a_second_window_of_the_next_fit():
    model = network()
    trained = Record("on_epoch_begin")
    swa = AveragedWeights(start=0, every=2)
    fit(model, trained, swa, epochs=4)
    weights = trained.seen["on_epoch_begin"]
    close(trainable(model), [(a + b) / 2 for a, b in zip(weights[1], weights[3], strict=True)])
    first = trainable(model)
    fit(model, trained, swa, epochs=1)
    same(trained.seen["on_epoch_begin"][0], first)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(trainable(model), first, strict=True))


@pytest.mark.long
def test_an_exception_leaves_the_weights_of_training():
    class Crash(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise RuntimeError("crash")

    model, plain = network(), network()
    with pytest.raises(RuntimeError, match="crash"):
        fit(model, AveragedWeights(start=0), Crash())
    fit(plain, epochs=2)
    same(trainable(model), trainable(plain))


@pytest.mark.long
def test_weights_that_a_callback_assigns_stay_and_the_others_go_back():
    class Set(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[-1].bias.assign([7.0])

    model, plain = network(), network()
    begun, expected = Record("on_epoch_begin"), Record("on_epoch_begin")
    fit(model, begun, AveragedWeights(start=0), Set(), epochs=3)
    fit(plain, expected, epochs=3)
    begun, expected = begun.seen["on_epoch_begin"][2], expected.seen["on_epoch_begin"][2]
    assert begun[-1] == 7.0
    same(begun[:-1], expected[:-1])


@pytest.mark.only_on("tensorflow", because="elsewhere weights join between two calls of fit")
def test_weights_that_are_thawed_are_averaged_from_then_on():
    class Thaw(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                self.model.layers[1].trainable = True
                self.model.make_train_function(force=True)

    model = network()
    model.layers[1].trainable = False
    model.compile(ok.optimizers.SGD(0.1), loss="mse")
    trained = Record("on_train_batch_end")
    fit(model, trained, AveragedWeights(start=0), Thaw(), epochs=4)
    ends = trained.seen["on_train_batch_end"][UPDATES - 1 :: UPDATES]
    kernels = [weights[2] for weights in ends[2:]]  # the third, once it is there
    close([model.layers[1].kernel], [np.mean(kernels, 0)])
    close([model.layers[3].bias], [np.mean([weights[-1] for weights in ends], 0)])


@pytest.mark.long
@pytest.mark.parametrize("window", [{"start": 1}, {"start": 1, "every": 3, "by": "update"}], ids=["epochs", "updates"])
def test_it_goes_on_after_a_crash(window, tmp_path):
    class Crash(keras.callbacks.Callback):
        stateless = True

        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 9:
                raise RuntimeError("crash")

    def fitted(directory, *callbacks):
        model = network()
        resume = ok.callbacks.Resume(tmp_path / directory, every=1)
        callbacks = [AveragedWeights(batch_norm_data=X, **window), resume, *callbacks]
        data = ok.data.Shuffled(X, Y, batch_size=16, seed=1)
        history = model.fit(data, epochs=4, validation_data=(X, Y), verbose=0, callbacks=callbacks)
        return history.history, model.get_weights()

    history, weights = fitted("whole")
    with pytest.raises(RuntimeError, match="crash"):
        fitted("cut", Crash())
    again = fitted("cut")
    assert again[0] == history
    same(again[1], weights)


def test_what_is_refused():
    with pytest.raises(ValueError, match="start must be given with every and by, got start=None, every=2"):
        AveragedWeights(every=2)
    with pytest.raises(ValueError, match="start must be"):
        AveragedWeights(start=-1)
    with pytest.raises(ValueError, match=r"by must be one of 'epoch', 'update', got 'updates'\. Did you mean"):
        AveragedWeights(start=1, by="updates")
    with pytest.raises(ValueError, match="start must be less than the 4 epochs of fit, got 4"):
        fit(network(), AveragedWeights(start=4))
    with pytest.raises(ValueError, match="start must be None with an optimizer that averages"):
        fit(network(ok.optimizers.SGD(use_ema=True)), AveragedWeights(start=1))
    with pytest.raises(ValueError, match="has averaged nothing yet that could be shown"):
        network().evaluate(X, Y, verbose=0, callbacks=[AveragedWeights(start=1)])


@pytest.mark.long
def test_a_window_that_never_begins_is_told():
    model, plain = network(), network()
    with pytest.warns(UserWarning, match="averaged nothing: training ended before update start=99"):
        fit(model, AveragedWeights(start=99, by="update"), epochs=1)
    fit(plain, epochs=1)
    same(trainable(model), trainable(plain))


def test_half_precision_is_averaged_in_float32():
    keras.config.set_dtype_policy("bfloat16")
    model = network(keras.optimizers.SGD(0.1))
    trained = Record("on_train_batch_end")
    fit(model, trained, AveragedWeights(start=1, by="update"), epochs=3)
    after = [np.stack(part).astype("float32") for part in zip(*trained.seen["on_train_batch_end"], strict=True)]
    for got, part in zip(trainable(model), after, strict=True):
        expected = np.mean(part.astype("float64"), 0).astype("float32").astype(got.dtype)
        # a mean that is rounded at each step is further away than the last bit
        np.testing.assert_allclose(got.astype("float32"), expected.astype("float32"), rtol=2.0**-8)


# -- several updates in a step, and several optimizers ----------------------------------------------------------------


@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
def test_where_a_step_makes_several_updates_the_last_of_those_that_are_due_counts():
    model = Alternating(ok.optimizers.SGD(0.05), keras.optimizers.SGD(0.05), updates=(1, 2), inputs=4)
    model.compile()
    trained = Record("on_train_batch_end")
    fit(model, trained, AveragedWeights(start=3, every=4, by="update"), epochs=2)
    after = trained.seen["on_train_batch_end"]
    assert len(after) == 2 * UPDATES
    parts = zip(*(after[step] for step in steps_due(2, 3, 4, len(after))), strict=True)
    close(trainable(model), [np.mean(np.stack(part).astype("float64"), 0) for part in parts])


def steps_due(per_step, start, every, steps):
    """The steps after which an update start, start + every, ... has been reached since the step before."""
    points = range(start, per_step * steps + 1, every)
    return sorted({-(-point // per_step) - 1 for point in points})


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="a training step of one's own is written for a backend")
@pytest.mark.parametrize("room", [ok.optimizers, keras.optimizers], ids=["ours", "keras"])
def test_all_optimizers_that_average_take_part(room):
    def made():
        model = Alternating(room.SGD(0.05, use_ema=True, ema_momentum=0.5), room.SGD(0.05), inputs=4)
        model.compile()
        return model

    model, plain = made(), made()
    training, shown, expected = Record("on_epoch_begin"), Record("on_epoch_end"), Record("on_train_batch_end")
    fit(plain, expected, epochs=3)
    fit(model, training, shown, AveragedWeights(), epochs=3)
    after = expected.seen["on_train_batch_end"]
    average = [after[0][0]]
    for weights in after[1:]:
        average.append(0.5 * average[-1] + 0.5 * weights[0])
    ends = range(UPDATES - 1, len(after), UPDATES)
    for found, end in zip(shown.seen["on_epoch_end"], ends, strict=True):
        close(found, [average[end], after[end][1]])
    for found, end in zip(training.seen["on_epoch_begin"][1:], ends, strict=False):
        same(found, after[end])
    close(trainable(model), [average[-1], after[-1][1]])


def test_parts_of_a_multi_optimizer_that_average_take_part():
    """Also where the model is built by its first step, on TensorFlow."""
    norm = keras.layers.BatchNormalization()
    model = keras.Sequential([norm, keras.layers.Dense(1)])
    parts = keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.5), keras.optimizers.SGD(0.05)
    multi = keras.optimizers.MultiOptimizer(lambda variable: parts["kernel" not in variable.path])
    model.compile(multi, loss="mse")
    trained, shown = Record("on_train_batch_end"), Record("on_epoch_end")
    fit(model, trained, shown, AveragedWeights(), epochs=1)
    after = trained.seen["on_train_batch_end"]
    average = after[0][2]
    for weights in after[1:]:
        average = 0.5 * average + 0.5 * weights[2]
    for found in (shown.seen["on_epoch_end"][0], trainable(model)):
        close(found, [*after[-1][:2], average, after[-1][3]])


def test_an_average_that_was_never_updated_is_not_shown():
    class Early(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.seen = self.model.evaluate(X, Y, verbose=0)

    def made():
        return network(keras.optimizers.SGD(0.05, use_ema=True))

    model, plain, early = made(), made(), Early()
    fit(model, AveragedWeights(), early, epochs=1)
    assert early.seen == plain.evaluate(X, Y, verbose=0)
    with pytest.raises(ValueError, match="has no average that could be shown: its optimizer has made no update"):
        plain.evaluate(X, Y, verbose=0, callbacks=[AveragedWeights()])


# -- models that the first step builds, and data to recalibrate with --------------------------------------------------


class Own(keras.Model):
    def __init__(self, norm=True):
        super().__init__()
        self.parts = [keras.layers.BatchNormalization()] * norm + [keras.layers.Dense(1)]

    def call(self, x, training=None):
        for part in self.parts:
            x = part(x, training=training) if isinstance(part, keras.layers.BatchNormalization) else part(x)
        return x


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.Sequential([keras.layers.BatchNormalization(), keras.layers.Dense(1)]),
        Own,
        lambda: keras.Sequential([Own()]),
    ],
    ids=["sequential", "subclass", "nested"],
)
def test_batch_normalisation_of_a_model_that_is_not_built_is_found(make):
    model = make()
    model.compile("sgd", loss="mse")
    fit(model, AveragedWeights(batch_norm_data=X, start=0), epochs=1, batch_size=64)
    close(statistics(model), [X.mean(0), X.var(0)], 1e-5)


def test_a_model_that_turns_out_to_have_none_is_refused():
    model = Own(norm=False)
    model.compile("sgd", loss="mse")
    with pytest.raises(ValueError, match=r"batch_norm_data must be None for model 'own.*no batch normalisation"):
        fit(model, AveragedWeights(batch_norm_data=X, start=2), epochs=3)
    assert int(ops.convert_to_numpy(model.optimizer.iterations)) <= UPDATES  # on JAX it is built before


class Around(keras.Model):
    """As a GAN: a step around models, and no call."""

    def __init__(self):
        super().__init__()
        self.inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        self.built = True


def test_a_model_without_call_cannot_be_recalibrated():
    model = Around()
    with pytest.raises(ValueError, match=r"model 'around.*' has no call"):
        ok.recalibrate_batch_norm(model, X, verbose=0)
    assert ok.recalibrate_batch_norm(model.inner, X, verbose=0) == 1


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (object(), TypeError),
        (float("nan"), TypeError),
        (True, TypeError),
        ("x", TypeError),
        (b"x", TypeError),
        ([], TypeError),
        ([1.0, 2.0], TypeError),
        (np.float32(3), TypeError),
        ((row for row in X), TypeError),
        (X[:0], ValueError),
        ({"a": X, "b": "x"}, TypeError),
    ],
    ids=lambda value: type(value).__name__,
)
def test_data_to_recalibrate_with_is_checked_at_once(data, error):
    with pytest.raises(error, match="batch_norm_data must "):
        AveragedWeights(batch_norm_data=data, start=0)
    if not hasattr(data, "__next__"):  # which one pass can be made over
        with pytest.raises(error, match="data must "):
            ok.recalibrate_batch_norm(network(), data, verbose=0)

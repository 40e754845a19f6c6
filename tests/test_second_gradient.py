"""SAM, and training steps that compute the gradient twice."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops
from small import At

import keras_optkit as ok
from keras_optkit.private import op_determinism
from keras_optkit.testing import problems
from keras_optkit.testing.tools import float64
from keras_optkit.testing.twins.optimizers import perturbed

SAM, SGD, AdamW = ok.optimizers.SAM, ok.optimizers.SGD, ok.optimizers.AdamW


# -- in `fit` ---------------------------------------------------------------------------------------------------------


def network(optimizer=None, build=True, dtype=None, seed=0, dropout=0.3, **how):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            *([keras.Input((4,))] if build else []),
            layers.Dense(8, activation="tanh", dtype=dtype),
            layers.BatchNormalization(dtype=dtype),
            *([layers.Dropout(dropout, seed=5)] if dropout else []),
            layers.Dense(1, dtype=dtype),
        ]
    )
    if optimizer is not None:
        model.compile(optimizer, loss="mse", metrics=["mae"], **how)
    return model


def fit(model, epochs=2, callbacks=(), **how):
    x, y = problems.regression()
    history = model.fit(
        x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **how
    ).history
    return model, history


def assert_near(model, other, tolerance=1e-5):
    for a, b in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def by_hand(inner, rho, adaptive=False, epochs=2, every=1, dropout=0.3):
    """The model and the mean losses after a loop with one gradient function, and the twin's perturbation."""
    model, (x, y) = network(dropout=dropout), problems.regression()
    weights, others, losses, collected = model.trainable_variables, model.non_trainable_variables, [], []

    def gradient(x, y):
        loss, grads = problems.loss_and_gradients(model, x, y)
        losses.append(loss)
        return grads

    def values(variables):
        return [ops.convert_to_numpy(v).copy() for v in variables]

    def assign(variables, arrays):
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)

    for _ in range(epochs):
        for i in range(0, 64, 16):
            batch = x[i : i + 16], y[i : i + 16]
            origin, before = values(weights), values(others)
            grads, after = gradient(*batch), values(others)
            assign(others, before)  # the same numbers for dropout
            assign(weights, perturbed(origin, grads, rho, adaptive))
            collected.append(gradient(*batch))
            losses.pop()
            assign(weights, origin)
            assign(others, after)
            if len(collected) == every:
                inner.apply([ops.convert_to_tensor(np.mean(g, axis=0)) for g in zip(*collected, strict=True)], weights)
                collected = []
    return model, np.mean(np.reshape(losses, (epochs, -1)), axis=1)


@pytest.mark.few(1)
@pytest.mark.parametrize("how", [{"steps_per_execution": 2}, {"jit_compile": True}, {}, {"run_eagerly": True}])
def test_fit_is_a_loop_by_hand(how):
    how["dropout"] = 0.0 if "jit_compile" in how else 0.3  # TensorFlow draws other numbers under XLA
    model, history = fit(network(SAM(SGD(0.1, momentum=0.9), rho=0.1), **how))
    expected, losses = by_hand(SGD(0.1, momentum=0.9), 0.1, dropout=how["dropout"])
    assert_near(model, expected)  # weights, statistics of the normalisation, numbers that dropout has drawn
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)
    assert "train_step" not in vars(model)
    assert "apply" not in vars(model.optimizer)


def test_adaptive_and_accumulated():
    make = SAM(AdamW(0.01), rho=0.5, adaptive=True, gradient_accumulation_steps=2)
    assert_near(fit(network(make))[0], by_hand(AdamW(0.01), 0.5, adaptive=True, every=2)[0])


@pytest.mark.long
@pytest.mark.parametrize("jit_compile", [False, True])
def test_without_a_radius_it_is_the_inner_optimizer(jit_compile):
    def trained(optimizer):
        return fit(network(optimizer, jit_compile=jit_compile))[0]

    assert_near(trained(SAM(AdamW(0.01), rho=0.0)), trained(AdamW(0.01)), 1e-6)


@pytest.mark.long
def test_a_batch_at_a_time_is_fit():
    x, y = problems.regression()
    model = network(SAM(SGD(0.1), rho=0.1))
    for i in [0, 16, 32, 48] * 2:
        model.train_on_batch(x[i : i + 16], y[i : i + 16])
    assert_near(model, fit(network(SAM(SGD(0.1), rho=0.1)))[0])


@pytest.mark.long
def test_a_function_that_was_made_before_fit():
    model = network(SAM(SGD(0.1), rho=0.1))
    model.make_train_function()
    assert_near(fit(model)[0], fit(network(SAM(SGD(0.1), rho=0.1)))[0], 1e-7)


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: SAM(ok.optimizers.Muon(0.02), rho=0.1), id="muon"),
        pytest.param(lambda: SGD(0.05, groups=[ok.Group("kernel$", rule=SAM(SGD(momentum=0.9), rho=0.2))]), id="group"),
        pytest.param(lambda: SAM(AdamW(0.01), rho=0.1, use_ema=True, global_clipnorm=0.5), id="ema"),
        pytest.param(lambda: ok.optimizers.Lookahead(SAM(SGD(0.1), rho=0.1), 3), id="lookahead"),
        pytest.param(lambda: ok.optimizers.ScheduleFree(SAM(SGD(0.1), rho=0.1)), id="schedule-free"),
        pytest.param(
            lambda: SAM(ok.optimizers.Prodigy(initial_d=1e-3), rho=ok.schedules.Cosine(0.1, 8)), id="schedule"
        ),
        pytest.param(lambda: SAM(ok.optimizers.LAMB(0.02), rho=0.1, gradient_accumulation_steps=2), id="lamb"),
        pytest.param(lambda: ok.optimizers.LossScale(SAM(SGD(0.05), rho=0.1)), id="loss scale"),
        pytest.param(lambda: SAM(ok.optimizers.SOAP(0.01, initial_basis="identity"), rho=0.1), id="soap"),
    ],
)
def test_compiled_is_eager_and_the_radius_counts(make):
    compiled, _ = fit(network(make(), dropout=0.0, jit_compile=True))
    assert_near(compiled, fit(network(make(), dropout=0.0, run_eagerly=True))[0], 2e-4)
    plain, _ = fit(network(SGD(0.05), dropout=0.0))
    assert max(np.max(np.abs(a - b)) for a, b in zip(compiled.get_weights(), plain.get_weights(), strict=True)) > 1e-3


def test_a_group_moves_alone():
    """A group with SAM as its rule is moved, and counts in the norm, without the others."""
    optimizer = SGD(0.1, groups=[ok.Group("weight_[02]", rule=SAM(SGD(), rho=0.3))])
    start, grads = problems.start(), problems.gradients(1)[0]
    with float64():
        moved = optimizer.perturbed_values([ops.convert_to_tensor(g) for g in grads], problems.variables(start))
    theirs = dict(zip((0, 2), perturbed([start[i] for i in (0, 2)], [grads[i] for i in (0, 2)], 0.3), strict=True))
    for i, value in enumerate(moved):
        np.testing.assert_allclose(ops.convert_to_numpy(value), theirs.get(i, start[i]), rtol=1e-12)


def test_missing_gradients_stay_and_do_not_count():
    optimizer = SAM(SGD(0.1), rho=0.3)
    start, grads = problems.start(), problems.gradients(1)[0]
    there = [i for i in range(len(grads)) if i not in (1, 4)]
    with float64(), pytest.warns(UserWarning, match="Gradients do not exist"):
        moved = optimizer.perturbed_values(
            [ops.convert_to_tensor(g) if i in there else None for i, g in enumerate(grads)], problems.variables(start)
        )
    theirs = dict(zip(there, perturbed([start[i] for i in there], [grads[i] for i in there], 0.3), strict=True))
    for i, value in enumerate(moved):
        np.testing.assert_allclose(ops.convert_to_numpy(value), theirs.get(i, start[i]), rtol=1e-12)


@pytest.mark.long
def test_a_schedule_of_the_radius_is_driven_by_a_callback():
    def driven(radius):
        model, _ = fit(network(SAM(SGD(0.1), rho=0.0)), epochs=1)
        return fit(model, callbacks=[ok.callbacks.ScheduleHyperparameters({"rho": radius})])[0]

    constant, none = driven(lambda _: 0.1), driven(lambda _: 0.0)
    expected, _ = fit(network(SAM(SGD(0.1), rho=0.0)), epochs=1)
    expected.optimizer.rho = 0.1
    expected.make_train_function(force=True)
    assert_near(constant, fit(expected)[0], 1e-6)
    assert_near(none, fit(network(SGD(0.1)), epochs=3)[0], 1e-6)
    fresh, _ = fit(
        network(SAM(SGD(0.1), rho=0.0)), callbacks=[ok.callbacks.ScheduleHyperparameters({"rho": lambda _: 0.1})]
    )
    assert_near(fresh, fit(network(SAM(SGD(0.1), rho=0.1)))[0], 1e-6)  # in the first fit, too


def test_a_bad_batch_changes_nothing():
    x, y = problems.regression()
    x = x.copy()
    x[20] = np.nan
    model = network(SAM(SGD(0.1), rho=0.1, skip_nonfinite=3))
    trained = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    model.fit(x[16:32], y[16:32], batch_size=16, verbose=0)
    for variable, value in zip(model.trainable_variables, trained, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    assert model.optimizer.nonfinite.skipped == 1


@pytest.mark.long
def test_half_precision_with_loss_scaling():
    def make():
        return ok.optimizers.LossScale(SAM(SGD(0.05), rho=0.1), initial_scale=2.0**10, dynamic_growth_steps=3)

    model, _ = fit(network(make(), dtype="mixed_float16"))
    assert int(ops.convert_to_numpy(model.optimizer.step_counter)) == 2  # of 8 updates 2 x 3 have doubled the scale
    assert model.optimizer.loss_scale == 2.0**12
    assert int(model.optimizer.inner_optimizer.iterations) == 8
    assert_near(model, fit(network(SAM(SGD(0.05), rho=0.1)))[0], 2e-2)


def assert_an_interruption_makes_no_difference(make, directory):
    def train(name, seed=0, crash=None):
        x, y = problems.regression()
        model = network(make(), seed=seed)
        callbacks = [ok.callbacks.Resume(directory / name, every=1)]
        if crash is not None:
            callbacks.append(At(interrupt, batch=crash))
        model.fit(ok.data.Shuffled(x, y, batch_size=16), epochs=2, verbose=0, callbacks=callbacks)
        return model

    with op_determinism():
        expected = train("whole")
        with pytest.raises(InterruptedError):
            train("cut", crash=2)
        for a, b in zip(expected.get_weights(), train("cut", seed=1).get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def interrupt(_):
    raise InterruptedError


def assert_a_saved_model_goes_on(optimizer, directory):
    with op_determinism():
        model, _ = fit(network(optimizer, dropout=0.0))
        model.save(directory / "model.keras")
        loaded = keras.models.load_model(directory / "model.keras")
        for a, b in zip(fit(model)[0].get_weights(), fit(loaded)[0].get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)


def test_an_interruption_makes_no_difference(tmp_path):
    assert_an_interruption_makes_no_difference(lambda: SAM(AdamW(0.01), rho=0.1, use_ema=True), tmp_path)


@pytest.mark.long
def test_a_saved_model_goes_on(tmp_path):
    assert_a_saved_model_goes_on(SAM(SGD(0.1, momentum=0.9), rho=0.1), tmp_path)


@pytest.mark.long
def test_the_monitor_sees_one_update_with_the_second_gradient(tmp_path):
    """`train/loss` is that at the weights themselves, and the norm that of the gradient that makes the update."""
    monitor = ok.callbacks.TrainingMonitor(tmp_path, every=1)
    model, _ = fit(network(SAM(SGD(0.1), rho=0.1)), epochs=1, callbacks=[monitor])
    expected, losses = by_hand(SGD(0.1), 0.1, epochs=1)
    assert_near(model, expected)
    found = ok.callbacks.read_monitor(tmp_path)
    loss, norm, ratio, weight = (
        np.array(found[f"train/{tag}"].values) for tag in ("loss", "gradient_norm", "update_ratio", "weight_norm")
    )
    assert len(loss) == 4
    np.testing.assert_allclose(np.mean(loss), losses[0], rtol=1e-5)
    np.testing.assert_allclose(ratio * weight, 0.1 * norm, rtol=1e-2)  # the ratio is to the weights before


# -- models of one's own ----------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="on JAX Keras builds the model before its step")
@pytest.mark.parametrize("eagerly", [False, True])
def test_a_model_that_its_first_step_builds(eagerly):
    how = {"run_eagerly": eagerly}
    model, _ = fit(network(SAM(SGD(0.1), rho=0.1), build=False, **how))
    expected, _ = fit(network(SAM(SGD(0.1), rho=0.1), **how))
    assert_near(model, expected, 1e-6)


@pytest.mark.only_on("tensorflow", because="on JAX the state after a step is what the step returns")
def test_a_teacher_follows_the_updated_weights():
    """What a train_step of one's own does after the update is done to the weights after the update."""

    class Student(keras.Sequential):
        def train_step(self, data):
            logs = super().train_step(data)
            for mean, weight in zip(self.means, self.trainable_variables, strict=True):
                mean.assign(0.5 * mean + 0.5 * weight)
            self.steps.assign_add(1)
            return logs

    keras.utils.set_random_seed(0)
    model = Student([keras.Input((4,)), layers.Dense(3, activation="tanh"), layers.Dense(1)])
    model.means = [keras.Variable(v.numpy(), trainable=False) for v in model.trainable_variables]
    model.steps = keras.Variable(0, dtype="int32", trainable=False)
    model.compile(SAM(SGD(0.1), rho=0.1), loss="mse")
    means = [v.numpy() for v in model.means]
    x, y = problems.regression()
    for _ in range(3):
        model.train_on_batch(x, y)
        means = [0.5 * m + 0.5 * v.numpy() for m, v in zip(means, model.trainable_variables, strict=True)]
    for got, expected in zip(model.means, means, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6, atol=1e-7)
    assert int(model.steps) == 3


def with_step(train_step, optimizer=None, **how):
    """A model with a training step of its own, and the weights of one with Keras's after the same `fit`."""

    class Own(keras.Sequential):
        pass

    Own.train_step = train_step
    keras.utils.set_random_seed(0)
    model = Own([keras.Input((4,)), layers.Dense(3, activation="tanh"), layers.Dense(1)])
    model.compile(optimizer or SAM(SGD(0.1), rho=0.1), loss="mse", **how)
    return model


def stepping(wrap, read=lambda loss: loss):
    import tensorflow as tf

    @wrap
    def train(self, x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        weights = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    return lambda self, data: {"loss": read(train(self, *data))}


@pytest.mark.only_on("tensorflow", because="a tf.function")
@pytest.mark.parametrize("eagerly", [False, True])
def test_an_update_inside_of_a_function(eagerly):
    import tensorflow as tf

    model, _ = fit(with_step(stepping(tf.function), run_eagerly=eagerly))
    expected, _ = fit(with_step(stepping(lambda function: function), run_eagerly=eagerly))
    assert int(model.optimizer.iterations) == 8
    assert_near(model, expected, 1e-6)
    assert not tf.config.functions_run_eagerly()


@pytest.mark.only_on("tensorflow", because="a step that is not traced")
def test_a_step_that_reads_values():
    model, _ = fit(with_step(stepping(lambda function: function, lambda loss: float(loss.numpy())), run_eagerly=True))
    expected, _ = fit(with_step(stepping(lambda function: function)))
    assert_near(model, expected, 1e-5)


@pytest.mark.only_on("tensorflow", because="tf.cond")
def test_an_update_under_a_condition_is_refused():
    import tensorflow as tf

    def train_step(self, data):
        return tf.cond(
            tf.reduce_all(data[0] < 100), lambda: keras.Sequential.train_step(self, data)["loss"], lambda: 0.0
        )

    model = with_step(train_step)
    with pytest.raises(ValueError, match=r"Own\.train_step must make its update in every step"):
        fit(model)
    assert not tf.config.functions_run_eagerly()


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="a strategy of TensorFlow")
def test_two_replicas_are_one():
    def trained(scope):
        with scope:
            model = network(None)
            model.layers[2].rate = 0.0  # replicas draw numbers of their own
            for layer in model.layers:
                if isinstance(layer, layers.BatchNormalization):
                    layer.trainable = False  # and have statistics of their own
            model.compile(SAM(SGD(0.1, momentum=0.9), rho=0.2), loss="mse")
        return fit(model)[0]

    two = trained(problems.two_replicas().scope())
    assert_near(two, trained(contextlib.nullcontext()), 1e-5)


def test_the_norm_is_over_routed_parameters_too():
    """Those of Muon's matrices and of its AdamW together."""
    start, grads = problems.start(), problems.gradients(1)[0]
    with float64():
        weights = problems.variables(start)
        moved = SAM(ok.optimizers.Muon(0.1, exclude_output=False), rho=0.3).perturbed_values(
            [ops.convert_to_tensor(g) for g in grads], weights
        )
    for value, expected in zip(moved, perturbed(start, grads, 0.3), strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(value), expected, rtol=1e-12)


@pytest.mark.long
def test_data_of_unknown_length_and_a_second_fit():
    x, y = problems.regression()
    # without dropout, of which Keras draws numbers for the batch that is missing, with any optimizer
    model, expected = (network(SAM(SGD(0.1, momentum=0.9), rho=0.1), dropout=0.0) for _ in range(2))

    def batches():
        for i in range(0, 64, 16):
            yield x[i : i + 16], y[i : i + 16]

    for _ in range(2):
        with pytest.warns(UserWarning, match="ran out of data"):
            model.fit(batches(), shuffle=False, epochs=1, verbose=0)
    assert int(model.optimizer.iterations) == 8
    assert_near(model, fit(expected)[0], 1e-6)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_first_gradient_is_refused():
    weights = problems.variables(problems.start(), "float32")
    grads = [ops.ones(w.shape) for w in weights]
    optimizer = SAM(SGD(0.1))
    with pytest.raises(ValueError, match=r"needs a second gradient.*optimizer\.perturbed"):
        optimizer.apply(grads, weights)
    assert int(optimizer.iterations) == 0
    with optimizer.perturbed(grads, weights):
        pass
    optimizer.apply(grads, weights)
    with pytest.raises(ValueError, match="needs a second gradient"):  # one each
        optimizer.apply(grads, weights)
    with optimizer.perturbed(grads, weights), pytest.raises(ValueError, match="not inside"):
        optimizer.apply(grads, weights)
    with pytest.raises(ValueError, match="takes one gradient alone"):
        SGD(0.1).perturbed_values(grads, weights)


def test_a_first_gradient_is_refused_after_fit():
    model, _ = fit(network(SAM(SGD(0.1))))
    weights = model.trainable_variables
    with pytest.raises(ValueError, match="needs a second gradient"):
        model.optimizer.apply([ops.ones(w.shape) for w in weights], weights)


@pytest.mark.only_on("tensorflow", because="on JAX a step calls stateless_apply")
def test_an_update_that_is_made_behind_the_step_s_back_is_refused():
    def train_step(self, data):
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(data[0], training=True) - data[1]))
        weights = self.trainable_variables
        SAM.apply(self.optimizer, tape.gradient(loss, weights), weights)
        return {"loss": loss}

    with pytest.raises(ValueError, match="needs a second gradient"):
        fit(with_step(train_step))


def test_several_optimizers_are_refused():
    class Two(keras.Sequential):
        pass

    model = Two([keras.Input((4,)), layers.Dense(1)])
    model.other = SGD(0.1)
    model.compile(SAM(SGD(0.1)), loss="mse")
    with pytest.raises(ValueError, match=r"must be the only optimizer of the model, got sam"):
        fit(model)


def test_several_updates_in_a_step_are_refused():
    class Twice(keras.Sequential):
        def train_step(self, *args):
            if keras.config.backend() == "jax":
                state, data = args
                _, state = super().train_step(state, data)
                return super().train_step(state, data)
            super().train_step(*args)
            return super().train_step(*args)

    keras.utils.set_random_seed(0)
    model = Twice([keras.Input((4,)), layers.Dense(1)])
    model.compile(SAM(SGD(0.1)), loss="mse", run_eagerly=keras.config.backend() == "jax")
    with pytest.raises(ValueError, match=r"Twice\.train_step must make one update, but it makes several"):
        fit(model)
    assert "apply" not in vars(model.optimizer)
    assert "stateless_apply" not in vars(model.optimizer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SAM(SGD(0.1), rho=-1.0), "rho must be"),
        (lambda: SAM(ok.optimizers.Lookahead("SGD")), "without an average of its own"),
        (lambda: SAM("Adan2"), "must be an optimizer of keras_optkit"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

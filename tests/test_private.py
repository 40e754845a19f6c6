"""Canaries: each private name that `keras_optkit.private` uses still exists and still does what it is used for."""

import jax
import keras
import keras_tuner
import tensorflow as tf
from keras import layers
from tensorflow.python.framework import config

from keras_optkit.private import (
    accumulated_gradients,
    clear_session,
    compile_arguments,
    compiled_loss,
    compiled_metrics,
    current_layer,
    directory_of,
    forget_trace,
    global_seed,
    in_stateless_scope,
    is_decayed,
    known_variables,
    losses_inside,
    op_determinism,
    schedule_of,
    set_global_seed,
    sublayers,
    variable_to_initialize,
    with_trials_saved_by,
    without_autocast,
)


def test_determinism_is_on_inside_only():
    assert not config.is_op_determinism_enabled()
    with op_determinism():
        assert config.is_op_determinism_enabled()
        assert tf.config.experimental.enable_op_determinism() is None
    assert not config.is_op_determinism_enabled()


def test_the_layer_at_work_is_known():
    seen = []

    class Spy(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            seen.append(current_layer())
            return keras.ops.zeros(shape, dtype)

    layer = layers.Dense(2, kernel_initializer=Spy())
    layer.build((None, 3))
    assert seen == [layer]
    assert current_layer() is None


def test_variables_are_read_in_their_own_dtype():
    seen = []

    class Spy(layers.Layer):
        def call(self, inputs):
            with without_autocast():
                seen.append(keras.backend.standardize_dtype(self.weight.value.dtype))
            seen.append(keras.backend.standardize_dtype(self.weight.value.dtype))
            return inputs

    spy = Spy(dtype="mixed_bfloat16")
    spy.weight = spy.add_weight(shape=(2,))
    spy(keras.ops.ones((1,)))
    assert seen == ["float32", "bfloat16"]


def test_the_variable_that_is_given_its_value_is_known_in_a_subclassed_model():
    seen = []

    class Spy(keras.initializers.Initializer):
        def __call__(self, shape, dtype=None):
            seen.append((in_stateless_scope(), variable_to_initialize()))
            return keras.ops.zeros(shape, dtype)

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = layers.Dense(2, kernel_initializer=Spy(), bias_initializer=Spy())

        def call(self, x):
            return self.layer(x)

    model = Model()
    model(keras.ops.ones((1, 3)))
    values = [variable for for_shapes, variable in seen if not for_shapes]
    assert [id(v) for v in values] == [id(model.layer.kernel), id(model.layer.bias)]
    assert all(variable is None for for_shapes, variable in seen if for_shapes)
    assert variable_to_initialize() is None


def test_calls_for_shapes_are_told_from_others():
    seen = []

    class Spy(layers.Layer):
        def call(self, x):
            seen.append(in_stateless_scope())
            return x

    spy = Spy()
    spy(keras.ops.ones((1, 2)))
    spy(keras.Input((2,)))
    assert seen == [False, True]


def test_layers_at_any_depth_are_found():
    inner = layers.Dense(1)
    wrapped = layers.Bidirectional(layers.LSTM(2))
    model = keras.Sequential([keras.Input((3, 2)), wrapped, keras.Sequential([inner])])
    assert hasattr(model, "_flatten_layers")
    found = {id(layer) for layer in sublayers(model)}
    assert {id(inner), id(wrapped), id(wrapped.forward_layer)} <= found
    direct = sublayers(wrapped, direct=True)
    assert {id(layer) for layer in direct} == {id(wrapped.forward_layer), id(wrapped.backward_layer)}


def test_a_trace_is_forgotten_and_others_are_not():
    class Counts:
        def __init__(self):
            self.traces = 0

        def step(self, x):
            self.traces += 1
            return x

    one, other = Counts(), Counts()
    held = [jax.jit(one.step), jax.jit(other.step)]
    for compiled in (*held, jax.jit(one.step)):
        compiled(1.0)
    assert one.traces == 1  # another jax.jit of the same method is the same to it: else there is nothing to forget
    forget_trace(one.step)
    for compiled in (jax.jit(one.step), jax.jit(other.step)):
        compiled(1.0)
    assert (one.traces, other.traces) == (2, 1)
    assert hasattr(held[0], "clear_cache")


def test_the_trace_of_a_function_that_lives_on_is_forgotten():
    """As of a `train_step` that was set as an attribute of a model, of which `clear_cache` leaves something."""
    traces = []

    def step(x):
        traces.append(x)
        return x

    for forgets in (False, True):
        if forgets:
            forget_trace(step)
        for _ in range(2):
            jax.jit(step, donate_argnums=0)(jax.numpy.ones(2))  # as Keras compiles it
        assert len(traces) == 1 + forgets


def test_the_generator_of_unseeded_draws_can_be_set_back():
    set_global_seed(None)
    assert global_seed() is None
    first = keras.random.uniform((3,))
    state = global_seed()
    assert state is not None
    second = keras.random.uniform((3,))
    set_global_seed(state)
    assert keras.ops.all(keras.random.uniform((3,)) == second)
    assert not keras.ops.all(first == second)


def test_an_optimizer_of_keras_knows_its_variables():
    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    optimizer = keras.optimizers.Adam()
    optimizer.build(variables)
    assert [id(v) for v in known_variables(optimizer)] == [id(v) for v in variables]


def test_an_optimizer_of_keras_knows_its_micro_batches():
    variables = [keras.Variable(1.0), keras.Variable(2.0)]
    optimizer = keras.optimizers.Adam(gradient_accumulation_steps=3)
    optimizer.build(variables)
    for n in range(5):
        optimizer.apply([keras.ops.convert_to_tensor(float(n))] * 2)
    sums, count = accumulated_gradients(optimizer)
    assert [float(s) for s in sums] == [7.0, 7.0]
    assert int(count) == 2


def test_a_model_knows_the_functions_that_it_was_compiled_with():
    def loss(y, p):
        return y - p

    model = keras.Sequential([keras.Input((1,)), layers.Dense(1)])
    model.compile("sgd", loss)
    assert compile_arguments(model)["loss"] is loss
    vars(model)["_compile_config"] = None  # as if there were no such name
    model.get_compile_config = lambda: {"loss": "loss"}
    assert compile_arguments(model) == {"loss": "loss"}


def test_compiled_metrics_are_built_by_labels_and_outputs():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"])
    metrics = compiled_metrics(model)
    assert not metrics.built
    metrics.build(keras.KerasTensor((None, 1)), keras.KerasTensor((None, 1)))
    assert metrics.built
    assert [metric.name for metric in metrics.metrics] == ["mae"]
    vars(model)["_compile_metrics"] = None  # as if there were no such name
    assert compiled_metrics(model) is None


def test_the_schedule_of_an_optimizer_is_the_one_that_it_was_given():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    assert hasattr(optimizer, "_learning_rate")
    assert schedule_of(optimizer) is schedule
    vars(optimizer)["_learning_rate"] = None  # as if there were no such name
    optimizer.get_config = lambda: {"learning_rate": keras.saving.serialize_keras_object(schedule)}
    assert schedule_of(optimizer).get_config() == schedule.get_config()


def test_settings_survive_when_the_session_is_cleared():
    class Own(layers.Layer):
        pass

    keras.config.set_dtype_policy("mixed_bfloat16")
    keras.config.disable_interactive_logging()
    keras.config.disable_traceback_filtering()
    try:
        with keras.saving.custom_object_scope({"Own": Own}):
            layers.Dense(2)
            clear_session()
            assert layers.Dense(2).name == "dense"
            assert keras.config.dtype_policy().name == "mixed_bfloat16"
            assert not keras.config.is_interactive_logging_enabled()
            assert not keras.config.is_traceback_filtering_enabled()
            assert keras.saving.get_registered_object("Own") is Own
            keras.backend.clear_session()  # what is kept is what this forgets
            assert keras.config.dtype_policy().name == "float32"
    finally:
        keras.config.enable_interactive_logging()
        keras.config.enable_traceback_filtering()


def test_an_oracle_has_its_trials_saved_by_another(tmp_path):
    class Tuner(keras_tuner.Tuner):
        def run_trial(self, trial):
            return 1.0

    space, saved = keras_tuner.HyperParameters(), []
    space.Int("x", 1, 3)
    oracle = keras_tuner.oracles.GridSearchOracle(keras_tuner.Objective("score", "min"), 1, hyperparameters=space)
    with_trials_saved_by(oracle, lambda path, trial: saved.append((path, trial.status)))
    Tuner(oracle, directory=str(tmp_path), project_name="p").search()
    path = tmp_path / "p" / "trial_0" / "trial.json"
    assert saved == [(str(path), status) for status in ("RUNNING", "RUNNING", "COMPLETED")]
    assert not path.exists()
    assert directory_of(oracle) == str(tmp_path / "p")


def test_a_loss_is_computed_as_in_a_compiled_model_and_tells_its_parts():
    inputs = keras.Input((2,))
    model = keras.Model(inputs, [layers.Dense(1, name="a")(inputs), layers.Dense(3, name="b")(inputs)])
    losses, weights = {"a": "mse", "b": "sparse_categorical_crossentropy"}, {"a": 2.0, "b": 0.5}
    model.compile("sgd", losses, loss_weights=weights)
    x, y = keras.ops.ones((4, 2)), {"a": keras.ops.ones((4, 1)), "b": keras.ops.convert_to_tensor([0, 1, 2, 0])}
    compiled = compiled_loss(losses, weights, model.output_names)
    assert losses_inside(compiled) == []  # before the first call
    value = float(compiled(y, model(x)))
    assert value == float(model.compute_loss(x=x, y=y, y_pred=model(x)))
    assert hasattr(compiled, "_flat_losses")
    assert {name for _, _, name in losses_inside(compiled)} == {"a", "b"}


def test_what_a_stock_optimizer_decays_is_known():
    optimizer, layer = keras.optimizers.AdamW(), layers.Dense(2)
    layer.build((None, 3))
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    assert hasattr(optimizer, "_use_weight_decay")
    assert [is_decayed(optimizer, v) for v in layer.weights] == [True, False]

"""The optimizer's state where a model is built by its first step, is frozen, trains with several, or was saved so."""

import json
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit import optimizers
from keras_optkit.testing import problems

X = np.random.default_rng(0).normal(size=(24, 3)).astype("float32")
Y = np.sin(X[:, :1] + X[:, 1:2])
COPIES = {
    "use_ema": lambda **k: optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5, **k),
    "Lookahead": lambda **k: optimizers.Lookahead(optimizers.SGD(0.05, momentum=0.9), 2, **k),
    "ScheduleFree": lambda **k: optimizers.ScheduleFreeAdamW(0.05, **k),
}


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def same(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=str(i))


def constant(units, **arguments):
    start = keras.initializers.RandomNormal(seed=units)
    return keras.layers.Dense(units, kernel_initializer=start, **arguments)


def sequential(*, built=True):
    layers = [constant(4, activation="tanh", name="body"), constant(1, name="head")]
    return keras.Sequential([*([keras.Input((3,))] if built else []), *layers], name="model")


class Subclassed(keras.Model):
    """A model with a `build` of its own."""

    def __init__(self, **held):
        super().__init__()
        self.body, self.head = constant(4, activation="tanh"), constant(1)
        for name, value in held.items():
            setattr(self, name, value)

    def build(self, shape):
        self.body.build(shape)
        self.head.build((None, 4))
        self.built = True

    def call(self, x):
        return self.head(self.body(x))


def fit(model, *callbacks, epochs=1, **arguments):
    return model.fit(
        X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments
    )


def compiled(optimizer, model=None, *, eager=True):
    """A model with an optimizer. Eager, since tracing would be most of what these tests do."""
    model = sequential() if model is None else model
    model.compile(optimizer, loss=keras.losses.MeanSquaredError(), run_eagerly=eager)
    return model


# -- models that their first step builds ------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_model_that_fit_builds_is_trained_as_one_that_is_built(make):
    expected, unbuilt = (compiled(make(), sequential(built=built), eager=False) for built in (True, False))
    for model in (expected, unbuilt):
        fit(model)
        assert model.optimizer.evaluating
    same(values(unbuilt.variables), values(expected.variables))


@pytest.mark.long
def test_so_is_a_subclassed_one_with_averages_in_evaluation_and_accumulation():
    models = [
        compiled(COPIES["use_ema"](gradient_accumulation_steps=2), m(), eager=False) for m in (sequential, Subclassed)
    ]
    histories = [fit(m, ok.callbacks.AveragedWeights(), validation_data=(X, Y)).history for m in models]
    same(values(models[1].trainable_variables), values(models[0].trainable_variables))
    np.testing.assert_allclose(histories[1]["val_loss"], histories[0]["val_loss"], rtol=1e-6)


def test_masters_of_a_model_that_is_not_built():
    def trained(*, built):
        model = keras.Sequential([*([keras.Input((3,))] if built else []), constant(1, dtype="bfloat16")])
        fit(compiled(optimizers.SGD(1e-3, master_weights=True), model, eager=False))
        return model

    same(values(trained(built=False).optimizer.variables[2:]), values(trained(built=True).optimizer.variables[2:]))


@pytest.mark.only_on("tensorflow", because="a loop of one's own in a tf.function")
def test_a_custom_loop_that_builds_model_and_optimizer():
    import tensorflow as tf

    def trained(model):
        optimizer = COPIES["Lookahead"]()

        @tf.function
        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(X) - Y))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        for _ in range(3):
            step()
        optimizer.swap_weights(evaluating=True)
        return values(model.variables)

    same(trained(Subclassed()), trained(sequential()))


def test_what_has_no_gradient_in_the_first_update_begins_as_it_is_then():
    """φ of Lookahead is the weight of the first update, also where it comes without a gradient, alone or packed."""
    start = [np.ones((2, 2)), np.ones(2), np.ones((2, 3))]
    weights = problems.variables(start, "float32")
    optimizer = optimizers.Lookahead("SGD", 2, 0.5, learning_rate=0.1)
    optimizer.build(weights)
    for weight in weights:
        weight.assign(2 * np.ones(weight.shape))
    ones = [ops.ones(w.shape) for w in weights]
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        optimizer.apply([ones[0], None, None], weights)  # the bias is in a bucket of its own, the last kernel is not
    for evaluating, expected in ((True, [2.0, 2.0, 2.0]), (False, [1.9, 2.0, 2.0])):
        optimizer.swap_weights(evaluating)
        assert [float(np.max(w)) for w in values(weights)] == pytest.approx(expected)
    optimizer.apply(ones, weights)
    assert [float(np.max(w)) for w in values(weights)] == pytest.approx(
        [1.9, 1.95, 1.95]
    )  # 2 + 0.5 (1.8 - 2) and so on


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_what_joined_since_the_last_update_is_evaluated_as_it_is(make):
    weights = problems.variables([np.ones((2, 2)), np.full((2, 2), 3.0)], "float32")
    optimizer, one = make(), ops.ones((2, 2))
    for _ in range(3):
        optimizer.apply([one], weights[:1])
    optimizer.build(weights)
    before, state = values(weights), problems.state_of(optimizer)
    optimizer.swap_weights(evaluating=True)
    same(values(weights[1:]), before[1:])
    assert np.any(values(weights)[0] != before[0])
    fresh, copies = make(), problems.variables(values(weights), "float32")
    fresh.build(copies)
    fresh.load_own_variables(problems.state_of(optimizer))
    for each, of in ((optimizer, weights), (fresh, copies)):
        each.swap_weights(evaluating=False)
        same(values(of), before)
        each.apply([one, one], of)
    same(values(copies), values(weights))
    assert set(state) == set(problems.state_of(optimizer))


def test_state_that_is_saved_before_the_first_update_begins_with_it():
    start = [np.ones((2, 2))]
    expected = problems.train(COPIES["ScheduleFree"](), [[np.ones((2, 2))]] * 3, values=start, dtype="float32")[-1]
    saved = COPIES["ScheduleFree"]()
    saved.build(problems.variables([np.zeros((2, 2))], "float32"))
    optimizer = COPIES["ScheduleFree"]()
    optimizer.load_own_variables(problems.state_of(saved))
    same(problems.train(optimizer, [[np.ones((2, 2))]] * 3, values=start, dtype="float32")[-1], expected)


def test_weights_cannot_be_swapped_before_it_is_known_which():
    trained = optimizers.SGD(0.1, use_ema=True)
    trained.apply([ops.ones((2,))], [keras.Variable([1.0, 2.0])])
    optimizer = optimizers.SGD(0.1, use_ema=True)
    optimizer.swap_weights(evaluating=True)  # nothing was trained: they are the same
    optimizer.load_own_variables(problems.state_of(trained))
    optimizer.swap_weights(evaluating=False)  # as the file says
    with pytest.raises(ValueError, match=r"before it is built.*Call optimizer\.build\(model\.trainable_variables\)"):
        optimizer.swap_weights(evaluating=True)


# -- nothing to train -------------------------------------------------------------------------------------------------


def unfreeze(model):
    for layer in [model, *model.layers]:  # Keras does not tell the layers of a model that was loaded
        layer.trainable = True


def untrainable():
    return pytest.warns(UserWarning, match="does not have any trainable weights")


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda o: o,
        pytest.param(
            optimizers.LossScale,
            marks=pytest.mark.only_on("tensorflow", because="on JAX loss scaling has no room for more variables"),
        ),
    ],
    ids=["plain", "LossScale"],
)
def test_a_frozen_model_is_fitted_and_unfrozen(wrap, tmp_path):
    optimizer = wrap(COPIES["use_ema"](gradient_accumulation_steps=2))
    model = sequential()
    model.trainable = False
    before = values(compiled(optimizer, model).variables)
    tensorflow = keras.config.backend() == "tensorflow"
    with untrainable() if tensorflow else warnings.catch_warnings():
        fit(model)
        model.train_on_batch(X, Y)
    same(values(model.variables), before)
    optimizer.apply([], [])
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 0
    model.save(tmp_path / "frozen.keras")
    opened = keras.models.load_model(tmp_path / "frozen.keras")
    expected = compiled(wrap(COPIES["use_ema"](gradient_accumulation_steps=2)))
    for each in (model, opened):
        unfreeze(each)
        fit(compiled(each.optimizer, each), epochs=2)
    fit(expected, epochs=2)
    same(values(model.variables), values(expected.variables))
    same(values(opened.variables), values(expected.variables))


def test_groups_are_looked_for_once_there_are_variables():
    optimizer = optimizers.SGD(0.1, groups=[ok.Group("nowhere")])
    optimizer.build([])
    with pytest.raises(ValueError, match="'nowhere' matches none of the 1 variables"):
        optimizer.build([keras.Variable([1.0])])


def test_state_of_a_model_that_was_frozen_before_it_was_saved_waits(tmp_path):
    model = compiled(COPIES["Lookahead"]())
    fit(model)
    model.trainable = False
    model.save(tmp_path / "frozen.keras")
    with pytest.warns(
        UserWarning, match=r"saved state \(update 3\) is for 4 variables \(kernel \(3, 4\), bias.*is kept"
    ):
        opened = keras.models.load_model(tmp_path / "frozen.keras")
    opened.save(tmp_path / "again.keras")
    with pytest.warns(UserWarning, match="is kept until these are trained again"):
        again = keras.models.load_model(tmp_path / "again.keras")
    for each in (model, opened, again):
        unfreeze(each)
        fit(compiled(each.optimizer, each))
        assert int(ops.convert_to_numpy(each.optimizer.iterations)) == 6
        same(values(each.variables), values(model.variables))


@pytest.mark.once
def test_what_was_frozen_before_saving_is_left_out_with_a_warning_and_the_rest_is_used(tmp_path):
    model = compiled(
        optimizers.Adam(0.05, gradient_accumulation_steps=2, groups=[ok.Group("bias", rule="SGD", required=False)])
    )
    fit(model, epochs=2)
    model.layers[0].trainable = False
    model.save(tmp_path / "partly.keras")
    message = r"update 4\) is not used for 2 variables \(kernel \(3, 4\), bias \(4,\)\).*now trains 2 variables"
    with pytest.warns(UserWarning, match=message):
        opened = keras.models.load_model(tmp_path / "partly.keras")
    mine, theirs = problems.state_of(model.optimizer), problems.state_of(opened.optimizer)
    for name, value in theirs.items():
        stem, _, place = name.rpartition(".")
        if name != "schema":
            np.testing.assert_array_equal(value, mine[f"{stem}.{int(place) + 2}" if place.isdigit() else name])
    assert json.loads(theirs["schema"].tobytes())["rules"] == {"1": "SGDRule with no state"}
    assert "slot.m.0" in theirs
    fit(opened)
    with pytest.raises(ValueError, match="number of variables: 4 != 2"):  # only while a file is opened
        opened.optimizer.load_own_variables(mine)


@pytest.mark.once
def test_state_is_not_mistaken_for_that_of_another_layer_of_the_same_shape(tmp_path):
    def model():
        return keras.Sequential([keras.Input((3,)), constant(3, name="one"), constant(3, name="two"), constant(1)])

    trained = model()
    trained.get_layer("one").trainable = False
    fit(compiled(COPIES["ScheduleFree"](), trained))
    trained.get_layer("one").trainable, trained.get_layer("two").trainable = True, False
    trained.save(tmp_path / "other.keras")
    with pytest.warns(UserWarning, match="is not used for 4 variables.*which start without state"):
        opened = keras.models.load_model(tmp_path / "other.keras")
    state = problems.state_of(opened.optimizer)
    assert int(state["iterations"]) == 3
    assert not any(np.any(value) for name, value in state.items() if name.startswith("slot."))
    before = values(opened.trainable_variables)
    opened.optimizer.swap_weights(evaluating=True)  # nothing has been trained yet
    same(values(opened.trainable_variables), before)
    fit(opened)
    assert all(np.all(np.isfinite(v)) for v in values(opened.variables))
    assert int(ops.convert_to_numpy(opened.optimizer.iterations)) == 6


def test_a_file_opens_where_groups_and_flags_freeze_everything(tmp_path):
    sequence = keras.Sequential([keras.Input((3,)), constant(4, name="body"), constant(1, name="head")])
    fit(compiled(optimizers.SGD(0.1, groups=[ok.Group("body/", trainable=False)]), sequence))
    sequence.get_layer("head").trainable = False
    sequence.save(tmp_path / "model.keras")
    with pytest.warns(
        UserWarning, match="left without state for now: .* has nothing to train: its groups freeze all 2"
    ):
        opened = keras.models.load_model(tmp_path / "model.keras")
    same(values(opened.variables), values(sequence.variables))
    with pytest.raises(ValueError, match="has nothing to train"):
        fit(opened)


# -- paths ------------------------------------------------------------------------------------------------------------


def fine_grained():
    groups = [ok.Group("bias", lr_scale=0.5), ok.Group("kernel", rule="RMSprop")]
    return optimizers.Adam(0.05, groups=groups, use_ema=True, gradient_accumulation_steps=2, skip_nonfinite=3, name="a")


ALL = {
    "groups": fine_grained,
    "LossScale": lambda: optimizers.LossScale(COPIES["ScheduleFree"](name="inner"), name="outer"),
}


ON_JAX = "on JAX a model that an .h5 file has built for no variables cannot be trained inside of loss scaling"
MARKS = {"LossScale": pytest.mark.only_on("tensorflow", because=ON_JAX)}


@pytest.mark.few(1)
@pytest.mark.parametrize("make", [pytest.param(make, id=name, marks=MARKS.get(name, ())) for name, make in ALL.items()])
def test_state_tree_and_h5_file_continue_the_run(make, tmp_path):
    models = [compiled(make()) for _ in range(2)]
    fit(models[0], epochs=2)
    paths = [variable.path for variable in models[0].optimizer.variables]
    assert len(set(paths)) == len(paths)
    models[0].save(tmp_path / "model.h5")
    models.append(keras.models.load_model(tmp_path / "model.h5"))
    models[2].run_eagerly = True
    models[1].optimizer.build(models[1].trainable_variables)
    assert [v.path for v in models[1].optimizer.variables] == paths
    models[1].set_state_tree(models[0].get_state_tree("numpy_array"))
    for model in models:
        fit(model)
    for model in models[1:]:
        same(values(model.trainable_variables), values(models[0].trainable_variables))
        same(values(model.optimizer.variables), values(models[0].optimizer.variables))


def test_an_h5_file_of_other_variables_is_refused_aloud_when_training_begins(tmp_path):
    model = compiled(optimizers.Adam(0.05))
    fit(model)
    model.layers[0].trainable = False
    model.save(tmp_path / "model.h5")
    opened = keras.models.load_model(tmp_path / "model.h5")
    with pytest.warns(UserWarning, match=r"given by an `\.h5` file is not saved"):
        opened.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match=r"state of the `\.h5` file is not used: weights must have"):
        fit(opened)
    assert int(ops.convert_to_numpy(opened.optimizer.iterations)) == 3


def twins(*frozen, optimizer=None):
    """A model with two layers of one shape, whose optimizer packs nothing unless one is given."""
    layers = [*(constant(3, name=name) for name in ("one", "two")), constant(1, name="head")]
    model = keras.Sequential([keras.Input((3,)), *layers], name="twins")
    for name in frozen:
        model.get_layer(name).trainable = False
    if optimizer is None:
        optimizer = optimizers.Adam(0.05, use_ema=True, name="a")
        optimizer.pack_below = 0
    return compiled(optimizer, model)


def refit(model, *, one, two):
    for name, trainable in (("one", one), ("two", two)):
        model.get_layer(name).trainable = trainable
    fit(compiled(model.optimizer, model))
    return model


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("packed", [False, True])
def test_state_reaches_its_weights_where_they_joined_in_another_order(packed, tmp_path):
    def fresh():
        optimizer = optimizers.Adam(0.05, gradient_accumulation_steps=2, name="another") if packed else None
        return twins(optimizer=optimizer)

    trained = twins("one", optimizer=fresh().optimizer if packed else None)
    fit(trained)
    refit(trained, one=True, two=True)
    models = [fresh(), fresh(), fresh()]
    models[0].optimizer.build(models[0].trainable_variables)
    for model in models[:2]:  # one that is built, and one that is not
        model.set_state_tree(trained.get_state_tree())
    trained.save_weights(tmp_path / "all.weights.h5")
    models[2].load_weights(tmp_path / "all.weights.h5")
    again = trained.get_state_tree("numpy_array")
    for model in [trained, *models]:
        fit(model)
    for model in models:
        same(values(model.variables), values(trained.variables))
    trained.set_state_tree(again)  # of the same packing, also where steps are compiled
    fit(trained)
    same(values(trained.variables), values(models[0].variables))

    trained.save(tmp_path / "model.h5")
    opened = keras.models.load_model(tmp_path / "model.h5")
    with pytest.warns(UserWarning, match=r"`\.h5` file is not used"):
        fit(opened)


@pytest.mark.once
def test_an_h5_file_of_weights_that_joined_later_is_refused_where_numbers_and_shapes_fit(tmp_path):
    trained = twins("one")
    fit(trained)
    refit(trained, one=True, two=True).save(tmp_path / "model.h5")
    opened = keras.models.load_model(tmp_path / "model.h5")
    opened.optimizer.pack_below = 0
    with pytest.warns(UserWarning, match=r"not used: of the state in it, average_joined_3, .* and here none is"):
        fit(opened)


@pytest.mark.once
def test_state_of_another_layer_of_the_same_shape_is_refused(tmp_path):
    trained, other = twins("one"), twins("two")
    fit(trained)
    fit(other)
    trained.save_weights(tmp_path / "two.weights.h5")
    message = (
        r"(?s)belong to this Adam.*variable 0: two/kernel, number 2 of the model's weights != one/kernel, number 0"
    )
    for load in (
        lambda model: model.load_weights(tmp_path / "two.weights.h5"),
        lambda model: model.set_state_tree(trained.get_state_tree()),
    ):
        with pytest.raises(ValueError, match=message):
            load(other)
    # a model's own file opens, and what fits of it is used
    trained.get_layer("one").trainable, trained.get_layer("two").trainable = True, False
    trained.save(tmp_path / "other.keras")
    with pytest.warns(UserWarning, match="is not used for 4 variables.*which start without state"):
        keras.models.load_model(tmp_path / "other.keras")


def test_a_state_tree_without_a_description_is_used_as_far_as_paths_fit_and_says_so():
    trained, model = twins(), twins()
    fit(trained)
    tree = trained.get_state_tree("numpy_array")
    del tree["optimizer_variables"]["a"]["packed"]
    model.optimizer.build(model.trainable_variables)
    model.set_state_tree(tree)
    same(values(model.optimizer.variables), values(trained.optimizer.variables))
    del tree["optimizer_variables"]["a"]["m_1"]
    with pytest.warns(UserWarning, match=r"no value for 1 variables of a, which keep theirs: a/m_1"):
        model.set_state_tree(tree)


# -- several optimizers -----------------------------------------------------------------------------------------------


def held(model):
    """The optimizers of `Pair`."""
    return [model.optimizers_["body"], model.optimizers_["others"][0]]


@keras.saving.register_keras_serializable(package="tests")
class Pair(Subclassed):
    """Trains body and head with an optimizer each, in a dict and in a list."""

    def __init__(self, body, head):
        super().__init__(optimizers_={"body": body, "others": [head]})

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        for layer, optimizer in zip((self.body, self.head), held(self), strict=True):
            optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
        return {"loss": loss}


@pytest.mark.only_on("tensorflow", because="a train_step with several optimizers; on JAX it threads their state itself")
def test_optimizers_that_a_model_holds_are_flushed_and_finalised_and_begin_again():
    def make():
        return optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), optimizers.Adam(0.05, gradient_accumulation_steps=2)

    pair, seen = Pair(*make()), []
    pair.compile(optimizer=None)
    at_end = keras.callbacks.LambdaCallback(
        on_train_begin=lambda *_: seen.append([o.evaluating for o in held(pair)]),
        on_train_end=lambda *_: seen.append([o.evaluating for o in held(pair)]),
    )
    fit(pair, at_end, epochs=2)  # of three batches
    fit(pair, at_end)
    assert seen == [[False, False], [True, False]] * 2
    assert [int(ops.convert_to_numpy(o.iterations)) for o in held(pair)] == [9, 6]

    by_hand = Pair(*make())
    by_hand(X)
    for epoch in range(3):
        if epoch == 2:  # fit ended before
            held(by_hand)[0].swap_weights(evaluating=True)
            held(by_hand)[0].swap_weights(evaluating=False)
        for i in range(0, 24, 8):
            by_hand.train_step((X[i : i + 8], Y[i : i + 8]))
        held(by_hand)[1].flush()
    held(by_hand)[0].swap_weights(evaluating=True)
    for a, b in zip(values(pair.variables), values(by_hand.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


@pytest.mark.once
@pytest.mark.few(1)
@pytest.mark.parametrize("built", [True, False])
def test_optimizers_inside_of_a_multi_optimizer_are_trained_as_alone(built):
    settings = {"use_ema": True, "ema_momentum": 0.5, "gradient_accumulation_steps": 2}
    alone = compiled(optimizers.SGD(0.1, **settings))
    kernels, biases = optimizers.SGD(0.1, **settings), optimizers.SGD(0.1, **settings)
    multi = keras.optimizers.MultiOptimizer(lambda v: kernels if "kernel" in v.path else biases)
    model = compiled(multi, sequential(built=built))
    for each in (alone, model):
        fit(each, epochs=2)
        fit(each)
    assert kernels.evaluating
    assert [int(ops.convert_to_numpy(o.iterations)) for o in (kernels, biases, alone.optimizer)] == [6, 6, 6]
    for a, b in zip(values(model.variables), values(alone.variables), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda o: o, optimizers.LossScale], ids=["plain", "LossScale"])
def test_keras_callback_for_averages_is_refused_with_the_name_of_ours(wrap):
    model = compiled(wrap(optimizers.ScheduleFreeSGD(0.1)))
    for call in (fit, lambda m, c: m.evaluate(X, Y, verbose=0, callbacks=[c])):
        with pytest.raises(ValueError, match=r"SwapEMAWeights.*keras_optkit\.callbacks\.AveragedWeights\(\)"):
            call(model, keras.callbacks.SwapEMAWeights())
    stock = compiled(keras.optimizers.SGD(0.1, use_ema=True))
    fit(stock, keras.callbacks.SwapEMAWeights(), validation_data=(X, Y))

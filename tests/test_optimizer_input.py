"""What optimizers accept: gradients, variables, keywords, and what they inherit from Keras's optimizers."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.testing import problems

TENSORFLOW = keras.config.backend() == "tensorflow"
ONLY_ON_TENSORFLOW = pytest.mark.only_on("tensorflow", because="elsewhere there are no gradients of rows")


def variable(*shape, name=None):
    return keras.Variable(np.ones(shape, "float32"), name=name)


def values(*variables):
    return [ops.convert_to_numpy(v).tolist() for v in variables]


def rows(values, indices, shape):
    import tensorflow as tf

    return tf.IndexedSlices(tf.constant(values, "float32"), tf.constant(indices), shape and tf.constant(shape))


# -- gradients --------------------------------------------------------------------------------------------------------

WRONG_SHAPES = {
    "transposed": ((2, 3), (3, 2)),
    "flat": ((2, 3), (6,)),
    "broadcasts as a row": ((2, 3), (3,)),
    "one more axis": ((2,), (1, 2)),
    "one number": ((2,), ()),
    "a vector for a scalar": ((), (1,)),
    "large": ((300, 300), (300, 1)),
    "empty": ((0,), (0, 4)),
}


@pytest.mark.parametrize("make", [np.ones, ops.ones])
@pytest.mark.parametrize("case", WRONG_SHAPES)
def test_a_gradient_of_another_shape_changes_nothing(case, make):
    shape, wrong = WRONG_SHAPES[case]
    good, bad = variable(4, name="good"), variable(*shape, name="bad")
    for optimizer in (ok.optimizers.Adam(0.1), ok.optimizers.SGD(0.1, gradient_accumulation_steps=2)):
        before = values(good, bad)
        with pytest.raises(ValueError, match=r"grads\[1\] must have the shape .* of .*bad"):
            optimizer.apply([ops.ones(4), make(wrong)], [good, bad])
        assert not optimizer.built
        optimizer.build([good, bad])
        with pytest.raises(ValueError, match=r"grads\[1\] must have the shape"):
            optimizer.apply([ops.ones(4), make(wrong)])
        assert values(good, bad) == before
        assert int(optimizer.iterations) == 0
        assert not optimizer._held.state.has("micro") or int(optimizer._held.state.micro) == 0


@ONLY_ON_TENSORFLOW
@pytest.mark.parametrize(
    "wrong",
    [
        ([[1.0, 1.0]], [0], (6, 2)),  # narrower rows
        ([[1.0, 1.0, 1.0]], [0], (7, 3)),  # a longer table
        ([[1.0, 1.0, 1.0]], [0, 1], (6, 3)),  # fewer rows than indices
        ([1.0], [0], None),
    ],
)
@pytest.mark.parametrize("graph", [False, True])
def test_rows_of_another_table_change_nothing(wrong, graph):
    import tensorflow as tf

    table = variable(6, 3)
    optimizer = ok.optimizers.Adam(0.1)
    optimizer.pack_below = 0
    call = lambda: optimizer.apply([rows(*wrong)], [table])  # noqa: E731
    with pytest.raises(ValueError, match=r"grads\[0\] must have the shape \(6, 3\) .* with rows"):
        (tf.function(call, autograph=False) if graph else call)()
    assert np.all(ops.convert_to_numpy(table) == 1)


@ONLY_ON_TENSORFLOW
def test_a_shape_that_is_known_in_the_step_alone():
    import tensorflow as tf

    weights = variable(2, 3)
    optimizer = ok.optimizers.SGD(1.0)
    optimizer.build([weights])

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(None)])
    def step(gradient):
        optimizer.apply([gradient])

    with pytest.raises(tf.errors.InvalidArgumentError, match="is not compatible with expected shape"):
        step(tf.ones((3, 2)))
    assert np.all(ops.convert_to_numpy(weights) == 1)
    step(tf.ones((2, 3)))
    assert np.all(ops.convert_to_numpy(weights) == 0)


@pytest.mark.parametrize("wrong", [np.ones(2, "complex64"), np.ones(2, bool)])
def test_a_gradient_that_is_not_real(wrong):
    weights = variable(2)
    with pytest.raises(TypeError, match=r"grads\[0\].*real numbers, got (complex64|bool)"):
        ok.optimizers.SGD(1.0).apply([wrong], [weights])
    assert values(weights) == [[1.0, 1.0]]


def test_whole_numbers_and_lists_are_gradients():
    weights = [variable(2), variable(2)]
    ok.optimizers.SGD(1.0).apply([np.array([1, 2]), [3.0, 4.0]], weights)
    assert values(*weights) == [[0.0, -1.0], [-2.0, -3.0]]


def test_variables_that_are_not_floats():
    with pytest.raises(ValueError, match=r"cannot train .*counter, which is not made of floats"):
        ok.optimizers.SGD(1.0).build([keras.Variable(np.zeros(2, "int32"), name="counter", trainable=False)])


# -- variables --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("built", [False, True])
def test_the_gradients_of_a_variable_that_is_given_twice_are_summed(built, k):
    once, twice, other = variable(3), variable(3), variable(3)
    for weights, grads in (([once], [4 * ops.ones(3)]), ([twice, other, twice], [ops.ones(3), None, 3 * ops.ones(3)])):
        optimizer = ok.optimizers.Adam(0.1, gradient_accumulation_steps=k)
        if built:
            optimizer.build(weights)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the missing gradient
            for _ in range(2 * (k or 1)):
                optimizer.apply(grads, weights)
        assert int(optimizer.iterations) == 2
        assert len(optimizer.explain(weights).rows) == len({id(w) for w in weights})
    assert values(once) == values(twice)
    assert values(other) == [[1.0] * 3]


@ONLY_ON_TENSORFLOW
def test_rows_of_a_table_that_is_given_twice():
    summed, table, both = variable(4, 2), variable(4, 2), variable(4, 2)
    a, b = rows([[1.0, 1.0]], [0], (4, 2)), rows([[2.0, 2.0], [3.0, 3.0]], [2, 0], (4, 2))
    ok.optimizers.Adam(0.1).apply([rows([[4.0, 4.0], [2.0, 2.0]], [0, 2], (4, 2))], [summed])
    ok.optimizers.Adam(0.1).apply([a, b], [table, table])
    assert values(table) == values(summed)
    ok.optimizers.SGD(1.0).apply([a, ops.ones((4, 2))], [both, both])
    assert values(both) == [[[-1.0, -1.0], *[[0.0, 0.0]] * 3]]


# -- keywords ---------------------------------------------------------------------------------------------------------

WRONG_VALUES = {
    "learning_rate": -1.0,
    "weight_decay": -1.0,
    "clipnorm": 0.0,
    "clipvalue": "1",
    "global_clipnorm": float("nan"),
    "gradient_accumulation_steps": 1,
    "use_ema": 1,
    "ema_momentum": 1.0,
    "skip_nonfinite": 0,
    "decay_mask": "biases",
    "decay_exclude": "bias",
    "layer_decay": 0.0,
    "layer_blocks": 12,  # without layer_decay
    "sparse": None,
    "fuse": np.array([1.0]),
    "master_weights": "float32",
    "stochastic_rounding": None,
    "slot_dtype": "float16",
    "state_dtype": "float16",
    "loss_scale_factor": 0,
    "shard_state": 1,
    "momentum": 1e40,
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_an_attribute_is_checked_as_the_argument_is(name):
    with pytest.raises((TypeError, ValueError)) as given:
        ok.optimizers.SGD(**{name: WRONG_VALUES[name]})
    optimizer = ok.optimizers.SGD(0.1)
    before = getattr(optimizer, name)
    with pytest.raises(given.type) as assigned:
        setattr(optimizer, name, WRONG_VALUES[name])
    assert name in str(assigned.value)
    assert str(assigned.value).split(",")[0] == str(given.value).split(",")[0]
    assert getattr(optimizer, name) is before


def test_every_common_keyword_is_checked():
    from keras_optkit.optimizers.inner import shared

    assert set(shared()) - {"name", "groups", "transforms"} <= set(WRONG_VALUES)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"clipnorm": 1.0}, {"clipvalue": 1.0}),
        ({"global_clipnorm": 1.0}, {"clipnorm": 1.0}),
        ({"master_weights": True}, {"stochastic_rounding": True}),
    ],
)
def test_attributes_that_exclude_each_other(first, second):
    ((name, value),) = second.items()
    optimizer = ok.optimizers.SGD(0.1, **first)
    with pytest.raises(ValueError, match="At most one of"):
        setattr(optimizer, name, value)
    with pytest.raises(ValueError, match="At most one of"):
        ok.optimizers.SGD(0.1, **first, **second)
    for other in first:
        setattr(optimizer, other, ok.optimizers.SGD().get_config()[other])
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value


def test_the_average_of_a_rule_excludes_another():
    optimizer = ok.optimizers.ScheduleFreeSGD(0.1)
    with pytest.raises(ValueError, match="has an average of its own"):
        optimizer.use_ema = True


LATE = {
    "use_ema": True,
    "gradient_accumulation_steps": 2,
    "skip_nonfinite": 2,
    "decay_mask": "all",
    "decay_exclude": ["w"],
    "layer_decay": 0.5,
    "master_weights": True,
    "stochastic_rounding": True,
    "slot_dtype": "bfloat16",
}


@pytest.mark.parametrize("name", LATE)
def test_what_decides_about_the_state_cannot_be_set_after_build(name):
    early, late = ok.optimizers.SGD(0.1), ok.optimizers.SGD(0.1)
    setattr(early, name, LATE[name])
    assert early.get_config()[name] == LATE[name]
    for optimizer in (early, late):
        optimizer.build([variable(2, name="w")])
    with pytest.raises(ValueError, match=f"{name} can only be set before the optimizer is built"):
        setattr(late, name, LATE[name])
    setattr(late, name, getattr(late, name))


def test_state_is_not_sharded_without_a_distribution():
    where = "on the tensorflow backend" if TENSORFLOW else "without a distribution"
    with pytest.raises(ValueError, match=f"shard_state must be False {where}, got True: .*keras.distribution"):
        ok.optimizers.SGD(0.1, shard_state=True).build([variable(2)])


@pytest.mark.only_on("jax", because="elsewhere it is refused at once")
def test_shard_state_is_in_the_config_and_set_before_build_alone():
    optimizer = ok.optimizers.SGD(0.1, shard_state=True)
    again = type(optimizer).from_config(optimizer.get_config())
    assert again.shard_state is True
    again.shard_state = False
    again.build([variable(2)])
    with pytest.raises(ValueError, match="shard_state can only be set before the optimizer is built, got True"):
        again.shard_state = True


def test_counts_may_change_after_build():
    weights = variable()
    optimizer = ok.optimizers.SGD(1.0, gradient_accumulation_steps=4, skip_nonfinite=5)
    for _ in range(3):
        optimizer.apply([ops.ones(())], [weights])
    optimizer.gradient_accumulation_steps, optimizer.skip_nonfinite = 2, 1
    optimizer.apply([ops.ones(())])  # more than there should be by now
    assert (values(weights), int(optimizer.iterations)) == ([0.0], 1)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("clip_norm", "clipnorm"),
        ("globalclipnorm", "global_clipnorm"),
        ("weight_deacy", "weight_decay"),
        ("lr", "learning_rate"),
        ("decay", "weight_decay"),
        ("max_grad_norm", "global_clipnorm"),
        ("use_nesterov", "nesterov"),
        ("momentun", "momentum"),
        ("beta1", "beta_1"),  # of other optimizers
        ("beta_1", "It is a hyperparameter of ADOPT, "),
    ],
)
def test_a_misspelt_attribute(name, meant):
    optimizer = ok.optimizers.SGD(0.1)
    with pytest.raises(AttributeError, match=f"SGD has no hyperparameter '{name}'") as error:
        setattr(optimizer, name, 0.1)
    assert meant in str(error.value)


@pytest.mark.parametrize(
    ("name", "instead"), [("groups", "new optimizer"), ("transforms", "new optimizer"), ("iterations", r"assign\(n\)")]
)
def test_attributes_that_cannot_be_set_say_what_to_do(name, instead):
    with pytest.raises(AttributeError, match=f"{name} cannot be set, got 3: .*{instead}"):
        setattr(ok.optimizers.SGD(0.1), name, 3)


def test_attributes_of_ones_own():
    optimizer = ok.optimizers.SGD(0.1)
    optimizer.comment = optimizer._lr = "as with Keras's"
    assert optimizer.comment == "as with Keras's"


# -- what is inherited ------------------------------------------------------------------------------------------------

#: What each public name of Keras's optimizers does in ours.
INHERITED = {
    # acts as in Keras, in the order of a step of ours
    *("apply", "apply_gradients", "stateless_apply", "build", "built", "name", "variables", "iterations"),
    *("learning_rate", "weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "use_ema", "ema_momentum"),
    *("gradient_accumulation_steps", "loss_scale_factor", "scale_loss", "exclude_from_weight_decay"),
    *("finalize_variable_values", "set_weights", "save_own_variables", "load_own_variables"),
    *("get_config", "from_config", "momentum", "nesterov"),
    # helps those who write an optimizer; makes or assigns variables
    *("add_variable", "add_variable_from_reference", "add_optimizer_variables", "assign", "assign_add", "assign_sub"),
    # refused
    *("ema_overwrite_frequency", "update_step"),
}


def test_every_public_name_of_kerass_optimizers_is_accounted_for():
    theirs = {name for name in dir(keras.optimizers.SGD(0.1)) if not name.startswith("_")}
    assert theirs <= INHERITED
    assert theirs <= set(dir(ok.optimizers.SGD(0.1))) | {"momentum", "nesterov"}


def test_names_that_would_do_nothing_are_refused():
    optimizer = ok.optimizers.SGD(0.1, use_ema=True)
    with pytest.raises(ValueError, match="ema_overwrite_frequency must be None"):
        optimizer.ema_overwrite_frequency = 2
    with pytest.raises(AttributeError, match="iterations"):
        optimizer.iterations = keras.Variable(5, dtype="int")
    with pytest.raises(NotImplementedError):
        optimizer.update_step(None, None, 0.1)
    with pytest.raises(TypeError, match="update_step would never be called"):

        class Own(ok.optimizers.SGD):
            def update_step(self, gradient, variable, learning_rate):
                pass


def test_the_loss_scale_factor_is_in_the_config():
    optimizer = ok.optimizers.SGD(1.0, loss_scale_factor=8.0)
    assert type(optimizer).from_config(optimizer.get_config()).loss_scale_factor == 8.0
    weights = variable(2)
    optimizer.apply_gradients([(ops.ones(2) * float(optimizer.scale_loss(1.0)), weights)])
    assert values(weights) == [[0.0, 0.0]]


def two_parts():
    """Two sub-models whose layers have the same names."""
    part = lambda name: keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="dense")], name=name)  # noqa: E731
    inputs = keras.Input((2,))
    return keras.Model(inputs, part("right")(part("left")(inputs)))


def decays(optimizer, model):
    return [row.weight_decay for row in optimizer.explain(model).rows]


@pytest.mark.parametrize("how", ["var_list", "var_names"])
def test_exclusion_from_weight_decay_is_kerass_and_is_saved(how, tmp_path):
    x = np.random.default_rng(0).normal(size=(8, 2)).astype("float32")
    after = []
    for module in (keras.optimizers, ok.optimizers):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2, name="a"), keras.layers.Dense(2, name="b")])
        more = {"decay_mask": "all"} if module is ok.optimizers else {}
        optimizer = module.SGD(0.1, weight_decay=0.5, **more)
        spared = {"var_list": [*model.layers[0].weights]} if how == "var_list" else {"var_names": ["a/"]}
        if module is keras.optimizers:  # which looks at names that have no layer in them on some backends
            spared = {"var_list": [*model.layers[0].weights]}
        optimizer.exclude_from_weight_decay(**spared)
        model.compile(optimizer, loss="mse")
        model.fit(x, x, batch_size=4, epochs=2, verbose=0, shuffle=False)
        after.append([ops.convert_to_numpy(w) for w in model.weights])
    for theirs, ours in zip(*after, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert decays(optimizer, model) == [0.0, 0.0, 0.5, 0.5]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert decays(loaded.optimizer, loaded) == [0.0, 0.0, 0.5, 0.5]
    loaded.fit(x, x, verbose=0)


def test_exclusion_replaces_an_earlier_one_and_acts_on_explain():
    weights = [variable(2, 2, name=name) for name in ("kernel", "gain", "table")]
    optimizer = ok.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_names=["gain", "tab"])
    assert decays(optimizer, weights) == [0.1, 0.0, 0.0]
    optimizer.exclude_from_weight_decay(weights[:1], ["tab"])
    assert decays(optimizer, weights) == [0.0, 0.1, 0.0]
    assert decays(type(optimizer).from_config(optimizer.get_config()), weights) == [0.0, 0.1, 0.0]
    optimizer.exclude_from_weight_decay()
    assert (decays(optimizer, weights), optimizer.decay_exclude) == ([0.1] * 3, None)


def test_a_variable_that_is_excluded_is_no_other_in_a_model_of_parts():
    model = two_parts()
    optimizer = ok.optimizers.AdamW(weight_decay=0.1)
    optimizer.exclude_from_weight_decay(var_list=[model.trainable_variables[0]])
    paths = [v.path for v in model.trainable_variables]
    if len(set(paths)) < len(paths):
        with pytest.raises(ValueError, match="cannot be told by path"):
            optimizer.build(model.trainable_variables)
    else:
        optimizer.build(model.trainable_variables)
        assert decays(optimizer, model) == [0.0, 0.0, 0.1, 0.0]


def test_exclusion_that_cannot_act_raises():
    optimizer = ok.optimizers.SGD(0.1, weight_decay=0.1)
    with pytest.raises(TypeError, match="var_names must be a list of regular expressions"):
        optimizer.exclude_from_weight_decay(var_names="bias")
    with pytest.raises(TypeError, match="var_list must be a list of variables"):
        optimizer.exclude_from_weight_decay(var_list=["bias"])
    with pytest.raises(ValueError, match="var_names must be a regular expression"):
        optimizer.exclude_from_weight_decay(var_names=["("])
    optimizer.exclude_from_weight_decay(var_names=["kernal"])
    with pytest.raises(ValueError, match=r"'kernal' matches none of the 1 variables. Nearest: 'kernel'"):
        optimizer.build([variable(2, name="kernel")])
    optimizer.exclude_from_weight_decay(var_names=["kernel"])
    optimizer.build([variable(2, name="kernel")])
    with pytest.raises(ValueError, match="only be called before the optimizer is built"):
        optimizer.exclude_from_weight_decay(var_names=["kernel"])


# -- other arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30])
@pytest.mark.parametrize(
    "make",
    [ok.initializers.HeNormal, ok.initializers.Orthogonal, lambda seed: ok.layers.ScheduledDropout(0.5, seed=seed)],
)
def test_seeds_that_keras_cannot_draw_with(make, seed):
    with pytest.raises(ValueError, match="seed must be an integer at least 0 and at most 4294967295"):
        make(seed=seed)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ok.schedules.Linear(0.1, 2, final=-1.0),
        lambda: ok.schedules.Cosine(-0.1, 2),
        lambda: ok.schedules.OneCycle(0.1, 10, initial=-0.1),
        lambda: ok.schedules.Warmup(0.1, 2, start=-1.0),
        lambda: ok.optimizers.SGD(1e308),
        lambda: ok.optimizers.Adam(epsilon=10**400),
    ],
)
def test_rates_below_zero_or_beyond_float32(make):
    with pytest.raises(ValueError, match=r"must be a finite number in \["):
        make()


@pytest.mark.only_on("tensorflow", because="it tracks lists")
def test_a_list_that_tensorflow_tracks_is_a_list_of_variables():
    import tensorflow as tf

    holder = tf.Module()
    holder.weights = problems.variables([np.ones(2), np.ones((2, 2))])
    optimizer = ok.optimizers.Adam(0.1)
    optimizer.build(holder.weights)
    assert [row.shape for row in optimizer.explain(holder.weights).rows] == [(2,), (2, 2)]
    assert len(problems.state_of(optimizer)) > 4  # there is state for both

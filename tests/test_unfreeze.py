"""Unfreeze against a fit for each stage with the flags set by hand, and against optimizers of their own."""

import itertools
import json

import keras
import numpy as np
import pytest
from small import At, Snapshots, assert_weights, boom, fit, interrupted, regression

import keras_optkit as ok
from keras_optkit.callbacks import AveragedWeights, Checkpoint, TrainingMonitor, Unfreeze
from keras_optkit.optimizers.of_model import ours_of
from keras_optkit.testing import problems
from keras_optkit.testing.problems import two_replicas

STOCK = keras.optimizers
JAX = keras.config.backend() == "jax"
STAGES = {0: "head", 1: "middle/", 3: ".*"}


def network(optimizer, **arguments):
    """Three blocks; the lowest is a model of its own, with normalisation and a layer in a layer."""
    keras.utils.set_random_seed(0)
    base = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, "tanh", name="first"),
            keras.layers.BatchNormalization(name="norm", momentum=0.5),
        ],
        name="base",
    )
    model = keras.Sequential(
        [keras.Input((3,)), base, keras.layers.Dense(3, "tanh", name="middle"), keras.layers.Dense(1, name="head")]
    )
    model.compile(optimizer, "mse", **arguments)
    return model


def data():
    return regression(dtype="float32")


def trained_names(model):
    return sorted({v.path.split("/")[-2] for v in model.trainable_variables})


class Trained(keras.callbacks.Callback):
    """Which layers are trained in each batch, and how many updates there have been before it."""

    stateless = True

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append("".join(name[0] for name in trained_names(self.model)))


# -- what is trained when ---------------------------------------------------------------------------------------------


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("unit", "stages", "arguments", "expected"),
    [
        ("epoch", STAGES, {}, "h" * 6 + "hm" * 12 + "fhmn" * 6),
        ("update", {0: "head", 4: "middle", 7: ".*"}, {}, "h" * 4 + "hm" * 3 + "fhmn" * 17),
        ("update", {0: "head", 4: "middle", 7: ".*"}, {"steps_per_execution": 3}, "h" * 2 + "hm" + "fhmn" * 5),
        ("update", {0: "head", 24: ".*"}, {}, "h" * 24),
    ],
)
def test_stages_begin_when_they_are_to(unit, stages, arguments, expected):
    model, seen = network(ok.optimizers.SGD(0.05), **arguments), Trained()
    before = model.get_weights()
    fit(model, *data(), Unfreeze(stages, unit=unit), seen, epochs=4)
    assert "".join(seen.seen) == expected
    moved = [bool(np.any(old != new)) for old, new in zip(before, model.get_weights(), strict=True)]
    assert all(moved) if "f" in expected else moved == [False] * 8 + [True] * 2


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("head", ["head"]),
        ("head/.*", ["head"]),
        ("^head$", ["head"]),
        ("base$", ["first", "norm"]),
        ("base/", ["first", "norm"]),
        ("^base/first$", ["first"]),
        (["norm", "middle"], ["middle", "norm"]),
        (".*", ["first", "head", "middle", "norm"]),
        ("", ["first", "head", "middle", "norm"]),
    ],
)
def test_a_pattern_is_looked_for_in_the_paths_of_layers(pattern, names):
    model = network(ok.optimizers.SGD(0.05))
    model.trainable = False
    fit(model, *data(), Unfreeze({0: pattern}), epochs=1, batch_size=24)
    assert trained_names(model) == names


class Block(keras.layers.Layer):
    """A layer with a weight of its own and a layer inside."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inside = keras.layers.Dense(3, use_bias=False, name="inside")

    def build(self, shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.inside.build(shape)

    def call(self, x):
        return self.scale * self.inside(x)


def test_a_layer_inside_does_not_take_the_weights_of_the_one_around_with_it():
    model = keras.Sequential([keras.Input((3,)), Block(name="block"), keras.layers.Dense(1, name="head")])
    model.compile(ok.optimizers.SGD(0.05), "mse")
    fit(model, *data(), Unfreeze({0: "inside"}), epochs=1)
    assert [v.name for v in model.trainable_variables] == ["kernel"]
    fit(model, *data(), Unfreeze([(0, "inside"), (1, ["block"])]), epochs=2)
    assert [v.name for v in model.trainable_variables] == ["scale", "kernel"]


class Twins(keras.Model):
    """Two layers of one name, the first of which is in another one as well, and a weight of the model's own."""

    def __init__(self):
        super().__init__()
        self.twin, self.other = Block(name="block"), Block(name="block")
        self.around = keras.Sequential([self.twin, keras.layers.Dense(1, name="head")], name="around")
        self.offset = self.add_weight(shape=(), initializer="zeros", name="offset")

    def call(self, x):
        return self.around(self.other(x)) + self.offset


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^block$", ["block/inside/kernel", "block/scale"]),
        ("block_1", ["block_1/inside/kernel", "block_1/scale"]),
        ("^around/block/inside", ["block/inside/kernel"]),
        ("around/head", ["around/head/bias", "around/head/kernel"]),
        ("around$", ["around/head/bias", "around/head/kernel", "block/inside/kernel", "block/scale"]),
        ("^offset", ["offset"]),
    ],
)
def test_layers_are_known_by_their_place(pattern, expected):
    model = Twins()
    model(np.zeros((1, 3), "float32"))
    model.compile(ok.optimizers.SGD(0.05), "mse")
    fit(model, *data(), Unfreeze({0: pattern}), epochs=1, batch_size=24)
    assert sorted(row.path for row in model.optimizer.explain(model).rows) == expected


class Alternating(keras.Model):
    """Two parts with an optimizer each, of which the second makes several updates in a batch."""

    def __init__(self, updates):
        super().__init__()
        self.one = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="low"), keras.layers.Dense(1)])
        self.two = keras.Sequential([keras.Input((3,)), keras.layers.Dense(3, name="low"), keras.layers.Dense(1)])
        self.updates = updates

    def compile(self, first, second):
        super().compile(optimizer=None)
        self.optimizers = {"one": [first], "two": second}

    def train_step(self, data):
        import tensorflow as tf

        x, y = data
        parts = [(self.one, self.optimizers["one"][0]), *[(self.two, self.optimizers["two"])] * self.updates]
        for part, optimizer in parts:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(part(x) - y))
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"loss": loss}


@pytest.mark.only_on("tensorflow", because="a train_step with several optimizers")
def test_several_optimizers_are_counted_by_updates_and_make_room_for_their_parts():
    model, counts = Alternating(3), []
    model.build((None, 3))
    model.compile(ok.optimizers.SGD(0.05), ok.optimizers.SGD(0.05))

    class Count(keras.callbacks.Callback):
        stateless = True

        def on_train_batch_end(self, batch, logs=None):
            counts.append(len(self.model.trainable_variables))

    fit(model, *data(), Unfreeze({0: "dense", 4: ".*"}, unit="update"), Count(), epochs=1)
    assert counts == [4, 4, 8, 8, 8, 8]  # the second has made 3 updates before the second batch, and 6 before the third
    assert [len(o.explain(m).rows) for o, m in zip(ours_of(model), (model.one, model.two), strict=True)] == [4, 4]
    assert [int(o.iterations) for o in ours_of(model)] == [6, 18]
    model.compile(ok.optimizers.SGD(0.05), STOCK.SGD(0.05))
    with pytest.raises(ValueError, match="by this SGD, which has to be built, for the variables of all stages"):
        fit(model, *data(), Unfreeze({0: "dense", 1: ".*"}))


@pytest.mark.only_on("tensorflow", because="on JAX it is refused for another reason")
def test_what_cannot_leave_variables_out_is_refused():
    inside = ok.optimizers.SGD(0.05)
    multi = STOCK.MultiOptimizer(lambda _: inside)
    with pytest.raises(ValueError, match="by this MultiOptimizer, which updates all of its variables at once"):
        fit(network(multi), *data(), Unfreeze(STAGES))


def test_fewer_updates_than_batches_are_counted():
    model, seen = network(ok.optimizers.SGD(0.05, gradient_accumulation_steps=4)), Trained()
    fit(model, *data(), Unfreeze({0: "head", 2: ".*"}, unit="update"), seen, epochs=2)
    assert "".join(seen.seen) == "h" * 6 + "fhmn" * 6  # an update after 4 batches, and one at the end of the epoch


def test_updates_cannot_be_counted_without_an_optimizer():
    model = network(None)
    with pytest.raises(ValueError, match=r"unit must be 'epoch' for 'sequential.*no optimizer"):
        fit(model, *data(), Unfreeze({0: "head"}, unit="update"))


def test_normalisation_in_a_frozen_layer_keeps_its_statistics():
    model, seen = network(ok.optimizers.SGD(0.05)), Snapshots()
    start = model.get_weights()[4:6]
    fit(model, *data(), Unfreeze({0: "head", 2: "norm"}), seen, epochs=3)
    for epoch in (0, 1):
        for mine, other in zip(seen.weights[epoch][4:6], start, strict=True):
            np.testing.assert_array_equal(mine, other)
    assert np.any(seen.weights[2][4] != start[0])


# -- the optimizer ----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "AdamW": lambda: ok.optimizers.AdamW(0.05, weight_decay=0.1, global_clipnorm=0.5),
    "over a schedule, averaged": lambda: ok.optimizers.SGD(
        ok.schedules.Linear(0.1, 30), momentum=0.9, use_ema=True, ema_momentum=0.5
    ),
    "accumulating": lambda: ok.optimizers.Adam(0.05, gradient_accumulation_steps=4),
    "groups": lambda: ok.optimizers.Adam(
        0.05, groups=[ok.Group("base/first/", lr_scale=0.5), ok.Group("bias", trainable=False)]
    ),
}


def fit_by_hand(model):
    """What STAGES say, with the flags set by hand and a fit for each stage."""
    base, middle = model.layers[0], model.layers[1]
    base.trainable = middle.trainable = False
    for layers, first, last in (([], 0, 1), ([middle], 1, 3), ([base], 3, 4)):
        for layer in layers:
            layer.trainable = True
        model.make_train_function(force=True)
        fit(model, *data(), initial_epoch=first, epochs=last)


@pytest.mark.few(1)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_it_is_a_fit_for_each_stage_with_the_flags_set_by_hand(make):
    model, by_hand = network(make()), network(make())
    fit(model, *data(), Unfreeze(STAGES), epochs=4)
    fit_by_hand(by_hand)
    for mine, other in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    mine, other = problems.state_of(model.optimizer), problems.state_of(by_hand.optimizer)
    assert mine.keys() == other.keys()
    for name in set(mine) - {"schema"}:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(mine["schema"], other["schema"])  # with when each variable joined


def test_a_group_of_layers_that_join_later_trains_them_at_its_rate(tmp_path):
    weights = {}
    for scale in (0.0, 1.0):
        group = ok.Group("base/first/", lr_scale=scale)  # which nothing is in that is trained at first
        model = network(ok.optimizers.SGD(0.05, groups=[group]))
        start = model.layers[0].get_weights()[0]
        checkpoint = Checkpoint(tmp_path / str(scale), top_k=0)
        fit(model, *data(), Unfreeze({0: "head", 1: ".*"}), checkpoint, epochs=1)
        model = checkpoint.load_latest()  # in which the layers of the group are frozen
        assert trained_names(model) == ["head"]
        fit(model, *data(), Unfreeze({0: "head", 1: ".*"}), initial_epoch=1, epochs=2)
        weights[scale] = model.layers[0].get_weights()[0]
    np.testing.assert_array_equal(weights[0.0], start)
    assert np.all(weights[1.0] != start)
    model = network(ok.optimizers.SGD(0.05, groups=[ok.Group("frist/")]))
    with pytest.raises(ValueError, match=r"groups: the pattern 'frist/' matches none of the 10 variables.*base/first"):
        fit(model, *data(), Unfreeze({0: "head", 1: ".*"}))


def test_old_slots_are_kept_bitwise_and_new_ones_are_fresh():
    """At the moment at which the second stage has begun, and no step has been made in it."""
    model, states = network(ok.optimizers.Adam(0.05)), []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            states.append(problems.state_of(self.model.optimizer))

        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0 and states:
                states.append(problems.state_of(self.model.optimizer))

    fit(model, *data(), Unfreeze({0: "head", 1: ".*"}), Look(), epochs=2)
    before, after = states[:2]
    count = len(model.trainable_variables)
    for slot in "mv":
        for i in (0, 1):  # the kernel and the bias of the head, which come last in the model
            old, new = before[f"slot.{slot}.{i}"], after[f"slot.{slot}.{count - 2 + i}"]
            assert np.any(old)
            np.testing.assert_array_equal(old, new)
        assert not any(np.any(after[f"slot.{slot}.{i}"]) for i in range(count - 2))
    assert after["iterations"] == before["iterations"] == 6


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="on JAX they update all of their variables at once")
@pytest.mark.parametrize("wrap", [lambda o: o, STOCK.LossScaleOptimizer], ids=["plain", "loss scaling"])
def test_optimizers_of_keras_are_built_for_all_stages(wrap):
    model, by_hand = network(wrap(STOCK.Adam(0.05))), network(wrap(STOCK.Adam(0.05)))
    seen = Trained()
    fit(model, *data(), Unfreeze(STAGES), seen, epochs=4)
    assert "".join(seen.seen) == "h" * 6 + "hm" * 12 + "fhmn" * 6
    by_hand.optimizer.build(by_hand.trainable_variables)
    fit_by_hand(by_hand)
    for mine, other in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.only_on("tensorflow", because="on JAX they are refused for another reason")
def test_an_optimizer_of_keras_that_was_built_for_fewer_is_refused_before_training():
    model = network(STOCK.Adam(0.05))
    model.layers[0].trainable = False
    fit(model, *data(), epochs=1)
    before = model.get_weights()
    with pytest.raises(
        ValueError, match=r"by this Adam, which was built for fewer variables.*keras_optkit\.optimizers"
    ):
        fit(model, *data(), Unfreeze(STAGES))
    assert_weights(model, before)


@pytest.mark.only_on("jax", because="elsewhere they can leave variables out")
@pytest.mark.parametrize("make", [lambda: STOCK.Adam(), lambda: STOCK.LossScaleOptimizer(ok.optimizers.Adam())])
def test_what_updates_all_of_its_variables_at_once_is_refused(make):
    model = network(make())
    with pytest.raises(ValueError, match=r"updates all of its variables at once on JAX.*keras_optkit\.optimizers"):
        fit(model, *data(), Unfreeze(STAGES))
    fit(network(STOCK.Adam()), *data(), Unfreeze({0: [".*"], 1: "head"}))  # that is no unfreezing


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="on JAX there is no room for more variables in it")
def test_under_loss_scaling_the_optimizer_inside_gets_room():
    model = network(ok.optimizers.LossScale(ok.optimizers.Adam(0.05)))
    plain = network(ok.optimizers.Adam(0.05))
    for each in (model, plain):
        fit(each, *data(), Unfreeze(STAGES), epochs=4)
    for mine, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
def test_two_replicas_are_as_one():
    with two_replicas().scope():
        model = network(ok.optimizers.Adam(0.05))
    plain = network(ok.optimizers.Adam(0.05))
    for each in (model, plain):  # without normalisation in training, which looks at the part of a replica
        fit(each, *data(), Unfreeze({0: "head", 1: "middle", 2: "first"}), epochs=3)
    for mine, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-5)


# -- with others, again, and after an interruption --------------------------------------------------------------------


def test_it_goes_together_with_what_reaches_into_the_step(tmp_path):
    model = network(ok.optimizers.Adam(0.05, use_ema=True, ema_momentum=0.5))
    checkpoint, seen = Checkpoint(tmp_path / "files", "loss", last_n=1), Snapshots()
    fit(
        model,
        *data(),
        TrainingMonitor(tmp_path / "logs", every=1),
        AveragedWeights(),
        Unfreeze(STAGES),
        checkpoint,
        seen,
        epochs=3,
    )
    loaded = checkpoint.load_latest()
    assert_weights(loaded, seen.weights[-1])
    assert trained_names(loaded) == ["head", "middle"]
    assert int(loaded.optimizer.iterations) == 18
    fit(loaded, *data(), Unfreeze(STAGES), initial_epoch=3, epochs=4)
    assert trained_names(loaded) == ["first", "head", "middle", "norm"]


def test_the_flags_stay_and_another_fit_goes_on_by_its_epochs():
    model, seen = network(ok.optimizers.SGD(0.05)), Trained()
    with pytest.raises(RuntimeError, match="boom"):
        fit(model, *data(), Unfreeze(STAGES), At(boom, batch=2, epoch=1), epochs=4)
    assert trained_names(model) == ["head", "middle"]
    fit(model, *data(), Unfreeze(STAGES), seen, initial_epoch=2, epochs=4)
    assert "".join(seen.seen) == "hm" * 6 + "fhmn" * 6
    assert int(model.optimizer.iterations) == 9 + 12


@pytest.mark.only_on("tensorflow", because="on JAX a step has to update all variables of the optimizer")
def test_another_fit_from_its_first_epoch_freezes_again():
    model, seen = network(ok.optimizers.SGD(0.05, momentum=0.9)), Snapshots()
    unfreeze = Unfreeze({0: "head", 1: ".*"})
    for _ in range(2):
        fit(model, *data(), unfreeze, seen, epochs=2)
    first = [weights[0] for weights in seen.weights]  # of the lowest layer, after each of four epochs
    assert [bool(np.any(a != b)) for a, b in itertools.pairwise(first)] == [True, False, True]


@pytest.mark.only_on("jax", because="elsewhere layers can be frozen again")
def test_a_stage_with_fewer_variables_than_the_optimizer_has_is_refused():
    model = network(ok.optimizers.SGD(0.05))
    unfreeze = Unfreeze({0: "head", 1: ".*"})
    fit(model, *data(), unfreeze, epochs=2)
    with pytest.raises(ValueError, match="built for 8 variables and cannot continue with 2 on the jax backend"):
        fit(model, *data(), unfreeze, epochs=2)


def test_new_weights_join_at_the_update_that_thaws_them():
    """Callback and optimizer both wrap `fit`; the callback's wrapper is the one around the other."""
    model = network(ok.optimizers.Adam(0.05, use_ema=True))
    fit(model, *data(), Unfreeze({0: "head", 1: ".*"}), epochs=2)
    schema = bytes(np.asarray(problems.state_of(model.optimizer)["schema"])).decode()
    assert json.loads(schema[: schema.rindex("}") + 1])["since"] == [6] * 6 + [0] * 2


@pytest.mark.long
@pytest.mark.parametrize("after", [0, 2, 3])
@pytest.mark.parametrize("first", [False, True])
def test_an_interruption_makes_no_difference(after, first, tmp_path):
    def run(*others):
        model, seen = network(ok.optimizers.Adam(0.05)), Trained()
        callbacks = [Unfreeze(STAGES), seen]
        fit(model, *data(), *([*others, *callbacks] if first else [*callbacks, *others]), epochs=5)
        return seen.seen, model.get_weights(), problems.state_of(model.optimizer)

    expected, found = run(), interrupted(run, tmp_path, after=after)
    assert found[0] == expected[0][-len(found[0]) :]
    for mine, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(mine, other)
    for name, value in expected[2].items():
        np.testing.assert_array_equal(found[2][name], value, err_msg=name)


@pytest.mark.few(1)
@pytest.mark.parametrize("stages", [{0: "head", 8: ".*"}, {0: "head", 9: "middle", 10: ".*"}])
def test_an_interruption_inside_of_an_epoch_makes_no_difference(stages, tmp_path):
    """By updates: a stage has begun before the bundle, or between it and the crash."""
    x, y = data()

    def run(*others):
        model, seen = network(ok.optimizers.Adam(0.05)), Trained()
        batches = ok.data.Shuffled(x, y, batch_size=4, seed=1)
        model.fit(batches, epochs=3, verbose=0, callbacks=[Unfreeze(stages, unit="update"), seen, *others])
        return seen.seen, model.get_weights(), problems.state_of(model.optimizer)

    expected, found = run(), interrupted(run, tmp_path, after=1, batch=4, every=3)
    assert len(found[0]) == 9
    assert found[0] == expected[0][-9:]
    for mine, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(mine, other)
    for name, value in expected[2].items():
        np.testing.assert_array_equal(found[2][name], value, err_msg=name)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_changed():
    model = network(ok.optimizers.SGD(0.05))
    message = r"stages: the pattern 'midle/' matches none of the 5 layers with weights\. Nearest: 'middle'"
    with pytest.raises(ValueError, match=message):
        fit(model, *data(), Unfreeze({0: "head", 2: "midle/"}))
    assert trained_names(model) == ["first", "head", "middle", "norm"]


def test_a_model_that_is_not_built_is_refused():
    model = keras.Sequential([keras.layers.Dense(1, name="head")])
    model.compile(ok.optimizers.SGD(0.05), "mse")
    with pytest.raises(ValueError, match=r"needs a model that is built.*Give it an Input"):
        fit(model, *data(), Unfreeze({0: "head"}))


def test_it_says_when_a_stage_begins(capsys):
    fit(network(ok.optimizers.SGD(0.05)), *data(), Unfreeze({0: "head", 1: ".*"}, verbose=1), epochs=2, batch_size=24)
    assert capsys.readouterr().out == "Unfreeze: stage 1, 8 variables are trained.\n"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stages": {}}, ValueError, "stages must have one that begins at 0, got none"),
        ({"stages": {1: "head"}}, ValueError, r"begins at 0, got \[1\]"),
        ({"stages": "head"}, TypeError, "stages must be a dict of when to pattern, or a list.*'head'"),
        ({"stages": {-1: "head"}}, ValueError, "stages: when must be an integer at least 0, got -1"),
        ({"stages": {0: "head", "1": "body"}}, TypeError, "stages: when must be an integer.*'1'"),
        ({"stages": {0: 3}}, TypeError, r"stages\[0\] must be a regular expression, got 3"),
        ({"stages": {0: "("}}, ValueError, r"stages\[0\] must be a regular expression, got '\('"),
        ({"stages": {0: []}}, ValueError, r"stages\[0\] must have a pattern, got \[\]"),
        ({"stages": [(0, "a"), (0, "b")]}, ValueError, "stages must begin at different times, got 0 twice"),
        ({"stages": {0: "a"}, "unit": "batch"}, ValueError, "unit.*'epoch', 'update'.*'batch'"),
        ({"stages": {0: "a"}, "verbose": 2}, ValueError, "verbose.*2"),
    ],
)
def test_it_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Unfreeze(**arguments)


def test_stages_are_pairs_in_the_config():
    config = json.loads(json.dumps(Unfreeze({3: "b", 0: ["a", "c"]}).get_config()))
    assert config["stages"] == [[0, ["a", "c"]], [3, ["b"]]]
    assert Unfreeze.from_config(config).stages == {0: ["a", "c"], 3: ["b"]}

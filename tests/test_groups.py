"""Groups, layer-wise decay of the learning rate, and what `explain` says of them."""

import copy
import gc
import json
import pickle
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from small import At, boom

import keras_optkit as ok
from keras_optkit.optimizers.layer_paths import BLOCKS, DEEP, LayerTree
from keras_optkit.testing import problems


def network():
    keras.utils.set_random_seed(0)
    layers = [
        keras.layers.Dense(5, name="stem"),
        keras.layers.Dense(4, name="body"),
        keras.layers.Dense(1, name="head"),
    ]
    return keras.Sequential([keras.Input((4,)), *layers])


def test_explain_shows_what_training_does():
    groups = [ok.Group("head/", lr_scale=2.0, weight_decay=0.0), ok.Group("stem/", trainable=False)]
    optimizer = ok.optimizers.AdamW(0.01, weight_decay=0.1, groups=groups)
    model = network()
    shown = optimizer.explain(model)
    assert not optimizer.built
    rows = {row.path: row for row in shown.rows}
    assert rows["head/kernel"][2:6] == ("head/", "AdamRule", 0.02, 0.0)
    assert rows["body/kernel"][2:6] == ("", "AdamRule", 0.01, 0.1)
    assert rows["body/bias"][2:6] == ("", "AdamRule", 0.01, 0.0)  # spared by decay_mask
    assert rows["stem/kernel"][2:] == ("stem/", "frozen", 0.0, 0.0, 0, None)
    assert rows["body/kernel"].state_bytes == 2 * 5 * 4 * 4
    assert "body/kernel" in str(shown)
    assert str(shown).splitlines()[-1].split() == ["6", "variables", str(sum(row.state_bytes for row in shown.rows))]
    optimizer.build(model.trainable_variables)
    state = problems.state_of(optimizer)
    held = sum(value.nbytes for name, value in state.items() if name.startswith("slot."))
    assert held == sum(row.state_bytes for row in shown.rows)


def test_explain_follows_the_rate():
    optimizer = ok.optimizers.SGD(ok.schedules.Linear(0.1, 10, final=0.0), groups=[ok.Group("head", lr_scale=0.5)])
    optimizer.learning_rate = 0.05
    assert optimizer.explain(network()).rows[-1].learning_rate == pytest.approx(0.025)


def test_a_pattern_that_matches_nothing_raises_with_near_misses():
    optimizer = ok.optimizers.AdamW(groups=[ok.Group("heads/kernel", lr_scale=0.1)])
    with pytest.raises(ValueError, match=r"'heads/kernel' matches none of the 6 variables.*head/kernel"):
        optimizer.build(network().trainable_variables)
    assert not optimizer.built


def test_the_first_group_that_matches_counts():
    groups = [ok.Group("kernel", lr_scale=0.5), ok.Group("head", lr_scale=0.1)]
    rows = ok.optimizers.SGD(1.0, groups=groups).explain(network()).rows
    assert [row.learning_rate for row in rows[-2:]] == [0.5, 0.1]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"match": 3}, TypeError, "match.*3"),
        ({"match": "("}, ValueError, r"match.*'\('"),
        ({"match": "a", "lr_scale": -1}, ValueError, r"lr_scale.*\[0"),
        ({"match": "a", "weight_decay": -0.1}, ValueError, r"weight_decay.*\[0"),
        ({"match": "a", "trainable": 1}, TypeError, "trainable.*True or False"),
    ],
)
def test_bad_groups(arguments, error, words):
    with pytest.raises(error, match=words):
        ok.Group(**arguments)


@pytest.mark.parametrize("wrong", [ok.Group("a"), "head", ["head"], [{"match": "head"}]])
def test_groups_that_are_none(wrong):
    with pytest.raises(TypeError, match=r"groups must be a list of keras_optkit\.Group"):
        ok.optimizers.SGD(groups=wrong)


def test_everything_frozen():
    optimizer = ok.optimizers.SGD(groups=[ok.Group("", trainable=False)])
    with pytest.raises(ValueError, match="freeze all 6 variables"):
        optimizer.build(network().trainable_variables)


def test_layer_decay_counts_layers_from_the_last():
    rows = ok.optimizers.SGD(1.0, layer_decay=0.5, groups=[ok.Group("body/bias", lr_scale=3.0)]).explain(network()).rows
    assert [row.learning_rate for row in rows] == [0.25, 0.25, 0.5, 1.5, 1.0, 1.0]
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=r"layer_decay.*\(0, 1\]"):
            ok.optimizers.SGD(layer_decay=wrong)


def depths(paths):
    depth = LayerTree.of_paths(paths).depths()
    return [depth[i] for i in range(len(paths))]


def test_depths_do_not_depend_on_the_name_of_the_model():
    blocks = ["block_0/dense/kernel", "block_0/norm/gamma", "block_1/dense/kernel", "head/kernel"]
    assert depths(blocks) == [0, 0, 1, 2]
    assert depths([f"model/inner/{path}" for path in blocks]) == [0, 0, 1, 2]
    assert depths(["kernel", "bias"]) == [0, 0]


def test_global_clipping_is_over_all_groups_but_the_frozen():
    values = [np.zeros((2, 2)), np.zeros((2, 2)), np.zeros((2, 2))]
    grads = [np.full((2, 2), c) for c in (3.0, 4.0, 100.0)]
    groups = [ok.Group("weight_1", lr_scale=0.5), ok.Group("weight_2", trainable=False)]
    got = problems.train(ok.optimizers.SGD(1.0, global_clipnorm=5.0, groups=groups), [grads], values=values)[0]
    np.testing.assert_allclose(got[0], -1.5)  # the norm of all that count is 10
    np.testing.assert_allclose(got[1], -1.0)
    np.testing.assert_array_equal(got[2], 0.0)


def test_groups_survive_a_file_under_other_paths(tmp_path):
    x, y = problems.regression()
    groups = [ok.Group("stem/", trainable=False), ok.Group("head/", lr_scale=0.1, weight_decay=0.5)]
    model = network()
    model.compile(ok.optimizers.AdamW(0.01, groups=groups), loss="mse")
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.groups == groups
    assert [v.path for v in loaded.trainable_variables] != [v.path for v in model.trainable_variables]
    before = loaded.optimizer.explain(loaded).rows
    assert [row[1:] for row in before] == [row[1:] for row in model.optimizer.explain(model).rows]
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
    for got, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_plateau_acts_on_all_groups():
    optimizer = ok.optimizers.SGD(1.0, groups=[ok.Group("weight_0", lr_scale=0.5)])
    weights = problems.variables([np.zeros(2), np.zeros(2)])
    one = ops.ones(2, "float64")
    optimizer.apply([one, one], weights)
    optimizer.learning_rate = 0.1
    optimizer.apply([one, one], weights)
    np.testing.assert_allclose([ops.convert_to_numpy(w)[0] for w in weights], [-0.55, -1.1])


def test_a_group_with_a_rule_of_its_own_is_shown_and_survives_the_config():
    groups = [ok.Group("stem/", rule=ok.optimizers.SGD(momentum=0.5)), ok.Group("head/", rule="RMSprop")]
    optimizer = ok.optimizers.AdamW(0.01, groups=groups)
    again = type(optimizer).from_config(json.loads(json.dumps(optimizer.get_config())))
    assert again.groups == groups
    model = network()
    rows = {row.path: row for row in again.explain(model).rows}
    shown = [rows[f"{layer}/kernel"].rule for layer in ("stem", "body", "head")]
    assert shown == ["SGDRule", "AdamRule", "RMSpropRule"]
    assert rows["stem/kernel"].state_bytes == 4 * 4 * 5
    assert again.groups[0].own_rule.momentum == 0.5


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ("SDG", ValueError, r"rule must be an optimizer of keras_optkit, got 'SDG'\. Did you mean 'SGD'"),
        (3, TypeError, "rule must be an optimizer of keras_optkit, its name or its config, got 3"),
        (lambda: ok.optimizers.SGD(0.5), ValueError, "rule must leave learning_rate .* SGD with learning_rate=0.5"),
        (lambda: ok.optimizers.SGD(clipnorm=1.0), ValueError, "rule must leave clipnorm .* clipnorm=1.0"),
        (lambda: ok.optimizers.ScheduleFreeSGD(), ValueError, "rule must be a rule without an average of its own"),
    ],
)
def test_a_rule_that_a_group_cannot_have_is_refused(rule, error, message):
    with pytest.raises(error, match=message):
        ok.Group("head", rule=rule() if callable(rule) else rule)


def test_a_schedule_in_the_rule_of_a_group_follows_the_updates():
    momentum = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.0, 0.5])
    optimizer = ok.optimizers.SGD(0.1, groups=[ok.Group("weight_0", rule=ok.optimizers.SGD(momentum=momentum))])
    weights = problems.variables([np.zeros(2), np.zeros(2)])
    for _ in range(3):
        optimizer.apply([ops.convert_to_tensor(np.ones(2))] * 2, weights)
    np.testing.assert_allclose(ops.convert_to_numpy(weights[0]), -0.1 - 0.1 - 0.15 - 0.05 + 0.05, rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(weights[1]), -0.3, rtol=1e-12)


def test_a_group_with_a_rule_of_its_own_that_joins_later_counts_by_itself():
    """Each weight against its formula; clipping is by the norm of all of them, and they have one decay."""
    groups = [
        ok.Group("weight_0", rule="RMSprop", lr_scale=0.3, required=False),
        ok.Group("weight_1", rule="AdamW", lr_scale=0.5, required=False),
    ]
    optimizer = ok.optimizers.SGD(0.1, momentum=0.9, weight_decay=0.1, global_clipnorm=1.0, groups=groups)
    start, grads = problems.start([(2, 3)] * 3), problems.gradients(6, [(2, 3)] * 3)
    weights = problems.variables(start)
    expected, state = [np.array(value) for value in start], [{"t": 0, "m": 0.0, "v": 0.0} for _ in start]
    for step, given in enumerate(grads):
        here = [2] if step < 3 else [0, 1, 2]
        optimizer.apply([ops.convert_to_tensor(given[i]) for i in here], [weights[i] for i in here])
        shrink = 1 / max(1.0, np.sqrt(sum(np.sum(given[i] ** 2) for i in here)))
        for i in here:
            g, s, rate = given[i] * shrink, state[i], 0.1 * (0.3, 0.5, 1.0)[i]
            s["t"] += 1
            if i == 0:
                s["v"] = 0.9 * s["v"] + 0.1 * g**2
                change = rate * g / np.sqrt(s["v"] + 1e-8)
            elif i == 1:
                s["m"], s["v"] = 0.9 * s["m"] + 0.1 * g, 0.999 * s["v"] + 0.001 * g**2
                change = rate * s["m"] / (1 - 0.9 ** s["t"]) / (np.sqrt(s["v"] / (1 - 0.999 ** s["t"])) + 1e-8)
            else:
                s["m"] = 0.9 * s["m"] + rate * g
                change = s["m"]
            expected[i] = expected[i] - change - rate * 0.1 * expected[i]
    for weight, value in zip(weights, expected, strict=True):
        np.testing.assert_allclose(ops.convert_to_numpy(weight), value, rtol=1e-12)


# -- layer_decay when variables join ----------------------------------------------------------------------------------


def scalars(*layers):
    """One scalar variable for each layer, by name."""
    variables = [keras.Variable(0.0, name=layer) for layer in layers]
    for variable in variables:
        variable._path = f"net/{variable.name}/kernel"
    return variables


def steps_of(optimizer, variables):
    """What one update with gradients of 1 subtracts from each variable."""
    before = [float(ops.convert_to_numpy(v)) for v in variables]
    optimizer.apply([ops.ones(())] * len(variables), variables)
    return [b - float(ops.convert_to_numpy(v)) for b, v in zip(before, variables, strict=True)]


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 2, 0), (0, 2, 1)])
@pytest.mark.parametrize("groups", [None, [ok.Group("body", lr_scale=0.5)]])
def test_layer_decay_follows_the_variables_that_join(order, groups):
    layers = scalars("stem", "body", "head")
    optimizer = ok.optimizers.SGD(1.0, layer_decay=0.5, groups=groups, gradient_accumulation_steps=None)
    for count in (1, 2, 3):
        here = [v for i, v in enumerate(layers) if i in order[:count]]
        if groups and not any("body" in v.path for v in here):
            continue  # a group has to match something
        expected = [row.learning_rate for row in optimizer.explain(here).rows]
        assert steps_of(optimizer, here) == pytest.approx(expected)
    store = {}
    optimizer.save_own_variables(store)
    again = ok.optimizers.SGD.from_config(optimizer.get_config())
    again.build(layers)
    again.load_own_variables({name: np.array(value) for name, value in store.items()})
    assert steps_of(again, layers) == pytest.approx([0.25, 0.25 if groups else 0.5, 1.0])


def test_variables_of_one_rate_that_come_apart_keep_their_state():
    """The first two have one rate, by their layers and a group, until a layer between them joins."""
    layers, grads = scalars("a", "b", "c"), [ops.ones(())] * 3
    how = {"momentum": 0.5, "use_ema": True, "layer_decay": 0.5, "groups": [ok.Group("/c/", lr_scale=0.5)]}
    joined, late = (ok.optimizers.SGD(1.0, **how) for _ in range(2))
    joined.build([layers[0], layers[2]])
    assert len({b.treatment.lr_scale for b in joined._held.buckets}) == 1
    joined.apply(grads[:2], [layers[0], layers[2]])
    joined.build(layers)
    rates = [row.learning_rate for row in joined.explain(layers).rows]
    assert rates == [0.25, 0.5, 0.5]
    store = {}
    joined.save_own_variables(store)
    others = [keras.Variable(ops.copy(v.value), name=v.name) for v in layers]
    for other, layer in zip(others, layers, strict=True):
        other._path = layer.path
    late.build(others)
    late.load_own_variables({name: np.array(value) for name, value in store.items()})
    for _ in range(2):
        steps = steps_of(joined, layers)
        assert steps == steps_of(late, others)
        assert steps[0] > 0.25  # there is a velocity
    stores: list = [{}, {}]
    joined.save_own_variables(stores[0])
    late.save_own_variables(stores[1])
    for name, value in stores[0].items():
        np.testing.assert_array_equal(value, stores[1][name])


# -- layers of models in models ---------------------------------------------------------------------------------------


def rates(model, **arguments):
    """The rate of each variable by its path, with a rate of 1 for the whole."""
    rows = ok.optimizers.SGD(1.0, **arguments).explain(model).rows
    return {row.path: row.learning_rate for row in rows}


def chain(layers, name, size=3):
    """A functional model, whose variables do not carry its name."""
    x = inputs = keras.Input((size,))
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x, name=name)


def tower(name):
    return chain([keras.layers.Dense(3, use_bias=False, name=n) for n in ("low", "high")], name)


def two_towers():
    """Two models of one function, whose variables have the same paths in Keras."""
    inputs = keras.Input((3,))
    joined = keras.layers.Concatenate()([tower("left")(inputs), tower("right")(inputs)])
    return keras.Model(inputs, keras.layers.Dense(1, use_bias=False, name="head")(joined))


def test_models_of_one_function_are_different_layers():
    model = two_towers()
    assert len({v.path for v in model.trainable_variables}) == 3
    found = rates(model, groups=[ok.Group("left/", lr_scale=0.5), ok.Group("^right/high", lr_scale=0.25)])
    assert found == {
        "left/low/kernel": 0.5,
        "left/high/kernel": 0.5,
        "right/low/kernel": 1.0,
        "right/high/kernel": 0.25,
        "head/kernel": 1.0,
    }
    assert sorted(rates(model, layer_decay=0.5).values()) == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0]


class Twins(keras.Model):
    """Layers of one name, one of them in two places."""

    def __init__(self):
        super().__init__(name="twins")
        one = tower("tower")
        self.both = keras.Sequential([one, keras.layers.Dense(1, use_bias=False, name="head")], name="both")
        self.one, self.two = one, tower("tower")
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, x):
        return self.scale * self.both(self.two(x))


def test_each_layer_has_a_path_of_its_own_and_is_found_under_all():
    model = Twins()
    model(np.zeros((1, 3), "float32"))
    found = rates(model, groups=[ok.Group("^both/", lr_scale=0.5), ok.Group("tower_1/", lr_scale=0.25)])
    assert found.pop("scale") == 1.0
    assert len(found) == 5
    assert found["both/head/kernel"] == 0.5
    assert found["tower/low/kernel"] == found["tower/high/kernel"] == 0.5
    assert found["tower_1/low/kernel"] == found["tower_1/high/kernel"] == 0.25


class Backbone(keras.layers.Layer):
    """Several layers in a layer, one of which has two."""

    def __init__(self, count=3, **arguments):
        super().__init__(**arguments)
        self.parts = [keras.layers.Dense(3, use_bias=False, name=f"part_{i}") for i in range(count)]
        self.wrapped = keras.layers.Bidirectional(keras.layers.SimpleRNN(2, use_bias=False), name="wrapped")

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return self.wrapped(x)


def test_a_backbone_in_one_layer_has_the_depth_of_its_parts():
    model = keras.Sequential([keras.Input((2, 3)), Backbone(name="backbone"), keras.layers.Dense(1, name="head")])
    found = rates(model, layer_decay=0.5)
    assert [found[f"backbone/part_{i}/kernel"] for i in range(3)] == [1 / 16, 1 / 8, 1 / 4]
    assert {rate for path, rate in found.items() if path.startswith("backbone/wrapped/")} == {1 / 2}
    assert found["head/kernel"] == found["head/bias"] == 1.0


def deep(count, nested=True):
    layers = [keras.layers.Dense(2, use_bias=False, name=f"stage{i // 9}_dense{i}") for i in range(count)]
    head = keras.layers.Dense(1, use_bias=False, name="head")
    body = [keras.Sequential([keras.Input((2,)), *layers], name="body")] if nested else layers
    return keras.Sequential([keras.Input((2,)), *body, head])


def test_a_deep_model_is_counted_in_blocks():
    found = list(rates(deep(36), layer_decay=0.75).values())
    assert found == [0.75 ** (BLOCKS - i // 3) for i in range(36)] + [1.0]
    assert len(set(rates(deep(DEEP - 1), layer_decay=0.75).values())) == DEEP
    flat = rates(deep(36, nested=False), layer_decay=0.75)
    assert len(set(flat.values())) == BLOCKS


def test_what_is_a_block_can_be_said():
    found = list(rates(deep(36), layer_decay=0.5, layer_blocks=2).values())
    assert found == [0.25] * 18 + [0.5] * 18 + [1.0]
    found = list(rates(deep(36), layer_decay=0.5, layer_blocks="stage([12])_").values())
    assert found == [0.5**4] * 9 + [0.5**3] * 9 + [0.5**2] * 9 + [0.5] * 9 + [1.0]  # stages 0 and 3 have no match
    optimizer = ok.optimizers.SGD(layer_decay=0.5, layer_blocks="stage(.)_")
    assert type(optimizer).from_config(optimizer.get_config()).layer_blocks == "stage(.)_"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layer_blocks": 3}, ValueError, "layer_blocks .* must be None without it, got 3"),
        ({"layer_decay": 0.5, "layer_blocks": 0}, ValueError, "layer_blocks must be an integer at least 1, got 0"),
        ({"layer_decay": 0.5, "layer_blocks": 2.5}, TypeError, "an integer at least 1, a regular expression or None"),
        ({"layer_decay": 0.5, "layer_blocks": "("}, ValueError, r"layer_blocks must be a regular expression.*'\('"),
        (
            {"layer_decay": 0.5, "layer_blocks": "bodi"},
            ValueError,
            "layer_blocks: the pattern 'bodi' matches none of the 3 layers. Nearest: 'body'",
        ),
    ],
)
def test_blocks_that_are_none_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        rates(network(), **arguments)


def test_a_factor_that_stops_a_layer_is_warned_of():
    with pytest.warns(UserWarning, match=r"layer_decay=0.02 .* 'stem/kernel' by 0.0004.*layer_blocks"):
        rates(network(), layer_decay=0.02)
    rates(network(), layer_decay=0.04)
    rates(network(), layer_decay=0.02, layer_blocks=1)


# -- which model it is ------------------------------------------------------------------------------------------------


def pretrained():
    keras.utils.set_random_seed(0)
    body = chain([keras.layers.Dense(3, "tanh", name="stem")], "body", size=4)
    return keras.Sequential([keras.Input((4,)), body, keras.layers.Dense(1, name="head")])


def moved(model, x, y):
    """By how much the first weight of each layer is changed by one step of `fit`."""
    before = model.get_weights()
    model.fit(x, y, batch_size=64, verbose=0)
    return [np.max(np.abs(a - b)) for a, b in zip(before, model.get_weights(), strict=True)][::2]


@pytest.mark.parametrize("again", [None, "same", "new"], ids=["not compiled", "compiled", "new optimizer"])
def test_a_frozen_backbone_is_unfrozen_later(again):
    """Its group matches nothing that is trained when the optimizer is built."""

    def optimizer():
        return ok.optimizers.Adam(0.01, epsilon=1e-12, groups=[ok.Group("^body/", lr_scale=0.1)])

    x, y = problems.regression()
    model = pretrained()
    model.layers[0].trainable = False
    model.compile(optimizer(), "mse")
    stem, head = moved(model, x, y)
    assert stem == 0.0
    assert head == pytest.approx(0.01, rel=1e-3)
    model.layers[0].trainable = True
    if again:
        model.compile(model.optimizer if again == "same" else optimizer(), "mse")
    stem, _ = moved(model, x, y)
    assert stem == pytest.approx(0.001, rel=1e-3)  # Adam's first step is the rate


def test_two_phases_are_resumed_where_they_were_interrupted(tmp_path):
    x, y = problems.regression()

    def script(directory, *others):
        model = pretrained()
        model.compile(ok.optimizers.Adam(0.01, groups=[ok.Group("^body/", lr_scale=0.1)], layer_decay=0.5), "mse")
        train = ok.data.Shuffled(x, y, batch_size=16, seed=1)
        model.layers[0].trainable = False
        model.fit(train, verbose=0, callbacks=[ok.callbacks.Resume(directory / "head")])
        model.layers[0].trainable = True
        everything = ok.callbacks.Resume(directory / "all", every=1)
        history = model.fit(train, epochs=2, verbose=0, callbacks=[everything, *others])
        return history.history, model.get_weights(), problems.state_of(model.optimizer)

    expected = script(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="boom"):
        script(tmp_path / "interrupted", At(boom, batch=2, epoch=0))
    for found in (script(tmp_path / "interrupted"), script(tmp_path / "interrupted")):  # and once it has finished
        assert found[0] == expected[0]
        for got, wanted in zip(found[1], expected[1], strict=True):
            np.testing.assert_array_equal(got, wanted)
        for name, value in expected[2].items():
            np.testing.assert_array_equal(found[2][name], value, err_msg=name)


@pytest.mark.only_on("tensorflow", because="on JAX a step has to update all variables of the optimizer")
def test_layers_that_are_frozen_again_stay_as_they_are():
    x, y = problems.regression()
    model = pretrained()
    model.compile(ok.optimizers.SGD(0.1, momentum=0.5), "mse")
    assert min(moved(model, x, y)) > 0
    model.layers[0].trainable = False
    stem, head = moved(model, x, y)
    assert stem == 0.0 < head


@pytest.mark.only_on("tensorflow", because="on JAX a step has to update all variables of the optimizer")
def test_layers_of_a_model_that_the_first_step_has_built_are_frozen():
    x, y = problems.regression()
    model = keras.Sequential([keras.layers.Dense(3, name="stem"), keras.layers.Dense(1, name="head")])
    model.compile(ok.optimizers.SGD(0.1), "mse")
    model.fit(x, y, verbose=0)
    model.layers[0].trainable = False
    stem, head = moved(model, x, y)
    assert stem == 0.0 < head


def test_a_model_that_the_first_step_builds_is_known():
    x, y = problems.regression()
    body = keras.Sequential([keras.layers.Dense(3, name="stem")], name="body")
    model = keras.Sequential([body, keras.layers.Dense(1, name="head")])
    model.compile(ok.optimizers.SGD(0.1, groups=[ok.Group("body/stem/kernel", trainable=False)]), "mse")
    model.fit(x, y, verbose=0)
    kernel = body.layers[0].kernel
    after = ops.convert_to_numpy(kernel)
    model.fit(x, y, verbose=0)
    np.testing.assert_array_equal(ops.convert_to_numpy(kernel), after)


def test_a_file_is_loaded_with_the_groups_of_models_in_it(tmp_path):
    x, y = problems.regression()
    model = pretrained()
    groups = [ok.Group("^body/stem/", lr_scale=0.5)]
    model.compile(ok.optimizers.SGD(0.1, momentum=0.9, groups=groups, layer_decay=0.5), "mse")
    model.fit(x, y, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.explain(loaded) == model.optimizer.explain(model)
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
    for got, expected in zip(loaded.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_in_a_loop_of_ones_own_the_model_is_told():
    model = pretrained()
    gradients = [ops.ones(v.shape) for v in model.trainable_variables]
    groups = [ok.Group("^body/", trainable=False)]
    with pytest.raises(ValueError, match=r"'\^body/' matches none of the 4 variables.*call optimizer\.build\(model\)"):
        ok.optimizers.SGD(0.1, groups=groups).apply(gradients, model.trainable_variables)
    optimizer = ok.optimizers.SGD(0.1, groups=groups)
    optimizer.build(model)
    before = model.get_weights()
    optimizer.apply(gradients, model.trainable_variables)
    for place, (old, new) in enumerate(zip(before, model.get_weights(), strict=True)):
        np.testing.assert_allclose(new, old - (0.1 if place >= 2 else 0.0), rtol=1e-6)


class Pair(keras.Model):
    """Two models with an optimizer each, and one that is compiled and never used."""

    def __init__(self):
        super().__init__()
        self.one, self.two = tower("one"), tower("two")

    def compile(self, first, second):
        super().compile()
        self.first, self.second = first, second

    def train_step(self, data):
        import tensorflow as tf

        for part, optimizer in ((self.one, self.first), (self.two, self.second)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(part(data))
            optimizer.apply(tape.gradient(loss, part.trainable_variables), part.trainable_variables)
        return {"loss": loss}


@pytest.mark.only_on("tensorflow", because="a train_step with several optimizers")
def test_each_of_several_optimizers_has_its_groups():
    model = Pair()
    model.compile(
        ok.optimizers.SGD(0.1, groups=[ok.Group("^one/low", trainable=False)]),
        ok.optimizers.SGD(0.1, groups=[ok.Group("^two/high", trainable=False)]),
    )
    model.build((None, 3))
    before = model.get_weights()
    model.fit(np.ones((4, 3), "float32"), verbose=0)
    same = [bool(np.all(a == b)) for a, b in zip(before, model.get_weights(), strict=True)]
    assert same == [True, False, False, True]


# -- what is set between two fits -------------------------------------------------------------------------------------


def losses(changes, rate, *, eagerly, on_batches=False):
    """The loss of one update, then of two after attributes of the optimizer were set."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(ok.optimizers.SGD(rate, momentum=0.9), "mse", run_eagerly=eagerly)
    x = np.random.default_rng(0).normal(size=(32, 4)).astype("float32")
    found = []
    for epochs in (1, 2):
        if on_batches:
            found += [float(model.train_on_batch(x, x[:, :1])) for _ in range(epochs)]
        else:
            found += model.fit(x, x[:, :1], epochs=epochs, verbose=0, shuffle=False).history["loss"]
        for name, value in changes.items():
            setattr(model.optimizer, name, value)
    return found


SETTINGS = [
    {"learning_rate": ok.schedules.Cosine(0.02, 1000)},
    {"momentum": 0.1},
    {"weight_decay": 5.0},
    {"clipnorm": 0.01},
]


@pytest.mark.few(1)
@pytest.mark.parametrize("on_batches", [False, True], ids=["fit", "train_on_batch"])
@pytest.mark.parametrize("changes", SETTINGS, ids=lambda changes: next(iter(changes)))
def test_what_is_set_between_two_fits_acts_in_the_second(changes, on_batches):
    for rate in (0.01, ok.schedules.Cosine(0.05, 500)):
        found = losses(changes, rate, eagerly=False, on_batches=on_batches)
        assert found == pytest.approx(losses(changes, rate, eagerly=True), rel=1e-5)
        assert found[2] != pytest.approx(losses({}, rate, eagerly=True)[2], rel=1e-3)


@keras.saving.register_keras_serializable("tests")
class Counting(keras.Sequential):
    """Counts the traces of its training step."""

    traces = 0

    def train_step(self, *given):
        self.traces += 1
        return super().train_step(*given)


def test_a_step_is_traced_once_for_many_fits_of_a_model_which_can_be_copied_and_is_not_kept_alive():
    def rate_of(model):
        return lambda: 0.01 if model.stop_training else 0.1

    def fit(model):
        model.fit(x, x[:, :1], verbose=0)

    model = Counting([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(ok.optimizers.SGD(ok.schedules.Cosine(0.1, 50), clipnorm=1.0), "mse")
    x = np.ones((8, 4), "float32")
    for _ in range(3):
        fit(model)
    assert model.traces == 1
    for copier in (copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))):
        copied = copier(model)
        for each in (model, copied):
            each.train_on_batch(x, x[:, :1])
        np.testing.assert_array_equal(copied.get_weights()[0], model.get_weights()[0])
    fit(model)
    traces = model.traces
    model.optimizer.learning_rate = rate_of(model)
    fit(model)
    fit(model)
    assert model.traces == traces + 1
    held = weakref.ref(model)
    del model, each, copied
    gc.collect()
    assert held() is None


def test_a_schedule_cannot_be_set_while_a_compiled_step_runs():
    class Sets(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch:
                self.model.optimizer.learning_rate = ok.schedules.Cosine(0.01, 10)

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    x = np.ones((8, 4), "float32")
    model.compile(ok.optimizers.SGD(0.01), "mse")
    with pytest.raises(ValueError, match="learning_rate can be set to a number while `fit` runs a compiled step"):
        model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=[Sets()])
    model.optimizer.learning_rate = ok.schedules.Cosine(0.01, 10)  # it may after it
    model.compile(ok.optimizers.SGD(0.01), "mse", run_eagerly=True)
    model.fit(x, x[:, :1], epochs=2, verbose=0, callbacks=[Sets()])
    assert float(model.optimizer.learning_rate) < 0.01


# -- estimates of the learning rate -----------------------------------------------------------------------------------


def estimated(optimizer, model):
    return [(row.estimate, row.effective_rate) for row in optimizer.explain(model).rows]


def test_explain_shows_the_estimates_that_training_starts_with():
    """Before the optimizer is built and when it is."""
    optimizer = ok.optimizers.AdamW(
        0.5,
        groups=[ok.Group("body/kernel", rule=ok.optimizers.Prodigy(initial_d=1e-4), lr_scale=0.1)],
    )
    model = network()
    shown = estimated(optimizer, model)
    assert shown[1] == (None, 0.5)  # AdamW estimates nothing
    assert shown[2] == pytest.approx((1e-4, 0.5 * 0.1 * 1e-4))
    optimizer.build(model)
    assert estimated(optimizer, model)[2] == pytest.approx(shown[2])
    assert "estimate" in str(optimizer.explain(model))
    assert "estimate" not in str(ok.optimizers.AdamW().explain(model))
    start = {type(o).__name__: o.explain(model).rows[0].estimate for o in (ok.optimizers.DoG(), ok.optimizers.COCOB())}
    assert start == {"DoG": 0.0, "COCOB": pytest.approx(1 / (100 * 1e-8))}


def test_the_estimate_of_elements_is_the_median_over_the_model():
    model, optimizer = network(), ok.optimizers.COCOB(alpha=3.0)
    optimizer.build(model)
    rng = np.random.default_rng(0)
    grads = [rng.normal(size=v.shape).astype("float32") for v in model.trainable_variables]
    optimizer.apply([keras.ops.convert_to_tensor(g) for g in grads])
    sizes = np.concatenate([np.ravel(np.abs(g)) for g in grads])  # R is 0, and G equals L
    factors = np.sort(sizes / (sizes * np.maximum(2 * sizes, 3 * sizes)))
    (estimate,) = {row.estimate for row in optimizer.explain(model).rows}
    assert estimate == pytest.approx(factors[len(factors) // 2], 1e-5)


WRAPPERS = (lambda o: o, ok.optimizers.Lookahead, ok.optimizers.SAM, ok.optimizers.ScheduleFree)


@pytest.mark.parametrize("wrapped", WRAPPERS)
def test_estimates_survive_saving(wrapped, tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(wrapped(ok.optimizers.Prodigy(initial_d=1e-5)), loss="mse")
    model.fit(x, x[:, :1], batch_size=8, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    shown = model.optimizer.explain(model)
    assert shown.rows[0].estimate > 1e-5
    assert loaded.optimizer.explain(loaded) == shown
    loaded.compile(wrapped(ok.optimizers.Prodigy(initial_d=1e-5)), loss="mse")
    assert loaded.optimizer.explain(loaded).rows[0].estimate == pytest.approx(1e-5)

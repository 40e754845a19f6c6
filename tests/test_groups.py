"""Groups, layer-wise decay of the learning rate, and what `explain` says of them."""

import json

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.optimizers.groups import depths
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
    rows = {row.path.split("/", 1)[1]: row for row in shown.rows}
    assert rows["head/kernel"][2:6] == ("head/", "AdamRule", 0.02, 0.0)
    assert rows["body/kernel"][2:6] == ("", "AdamRule", 0.01, 0.1)
    assert rows["body/bias"][2:6] == ("", "AdamRule", 0.01, 0.0)  # spared by decay_mask
    assert rows["stem/kernel"][2:] == ("stem/", "frozen", 0.0, 0.0, 0)
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
    rows = {row.path.split("/", 1)[1]: row for row in again.explain(model).rows}
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


# -- layer_decay when variables join ----------------------------------------------------------------------------------


def chain(*layers):
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
    layers = chain("stem", "body", "head")
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
    layers, grads = chain("a", "b", "c"), [ops.ones(())] * 3
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

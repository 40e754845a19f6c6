"""Optimizers that look at whole parameters: what is theirs alone. (test_parity.py compares them with others.)"""

import keras
import numpy as np
import pytest
from every_optimizer import continued, network, recurrent, transformer
from keras import layers, ops

import keras_optkit as ok
from keras_optkit.optimizers.rules import kron, muon
from keras_optkit.testing import problems
from keras_optkit.testing.parity.problem import Parts


def trained(make, grads):
    """The weights after each step."""
    model = Parts("float32")
    for variable, value in zip(model.trainable_variables, model.start(), strict=True):
        variable.assign(value)
    optimizer = make()
    optimizer.build(model)
    trajectory = []
    for arrays in grads:
        optimizer.apply([ops.convert_to_tensor(g, "float32") for g in arrays], model.trainable_variables)
        trajectory.append([ops.convert_to_numpy(v) for v in model.trainable_variables])
    return trajectory


def error(got, expected):
    """The largest difference relative to the size of the parameter."""
    return max(
        np.max(np.abs(a - np.reshape(b, a.shape))) / np.max(np.abs(b))
        for step, other in zip(got, expected, strict=True)
        for a, b in zip(step, other, strict=True)
    )


# -- which parameters ------------------------------------------------------------------------------------------------


def rules_of(optimizer, model):
    return {row.path: row.rule for row in optimizer.explain(model).rows}


def test_muon_takes_kernels_and_leaves_vectors_embeddings_and_the_last_layer_to_adamw():
    rules = rules_of(ok.optimizers.Muon(), transformer())
    muon = {path for path, rule in rules.items() if rule == "MuonRule"}
    attention = {f"attention/{name}/kernel" for name in ("query", "key", "value", "attention_output")}
    assert muon == attention | {"dense/kernel"}
    assert {rule for path, rule in rules.items() if path not in muon} == {"AdamRule"}
    rules = rules_of(ok.optimizers.Muon(), network())
    assert {path for path, rule in rules.items() if rule == "MuonRule"} == {
        f"{name}/kernel" for name in ("conv", "depthwise", "transposed", "grouped")
    }


def test_what_muon_takes_can_be_told():
    def taken(**arguments):
        found = rules_of(ok.optimizers.Muon(**arguments), transformer())
        return {path for path, rule in found.items() if rule == "MuonRule"}

    assert "head/kernel" in taken(exclude_output=False)
    assert "embedding/embeddings" in taken(exclude_embeddings=False)
    assert not any("attention" in path for path in taken(exclude_layers=["^attention/"]))
    optimizer = ok.optimizers.Muon(groups=[ok.Group("^dense/", rule="AdamW")])
    assert rules_of(optimizer, transformer())["dense/kernel"] == "AdamRule"
    optimizer = ok.optimizers.AdamW(groups=[ok.Group("^attention/", rule=ok.optimizers.Muon())])
    rules = rules_of(optimizer, transformer())
    assert rules["attention/query/kernel"] == "MuonRule"
    assert rules["attention/query/bias"] == rules["dense/kernel"] == "AdamRule"


def test_the_biases_of_attention_are_vectors():
    rows = {row.path: row for row in ok.optimizers.AdamW(weight_decay=0.1).explain(transformer()).rows}
    assert len(rows["attention/query/bias"].shape) == 2
    assert rows["attention/query/bias"].weight_decay == 0.0
    assert rows["attention/query/kernel"].weight_decay == rows["embedding/embeddings"].weight_decay == 0.1


def test_each_model_of_two_with_an_optimizer_of_its_own_has_a_last_layer():
    class Gan(keras.Model):
        def __init__(self):
            super().__init__()
            units = {"generator": (3, 4), "critic": (4, 1)}
            for name, (inputs, outputs) in units.items():
                hidden = layers.Dense(8, name="hidden")
                setattr(
                    self, name, keras.Sequential([keras.Input((inputs,)), hidden, layers.Dense(outputs)], name=name)
                )

    gan = Gan()
    for part in (gan.generator, gan.critic):
        optimizer = ok.optimizers.Muon()
        optimizer.set_model(gan)  # as `fit` does
        rows = optimizer.explain(part.trainable_variables).rows
        assert [row.rule for row in rows if len(row.shape) == 2] == ["MuonRule", "AdamRule"]
    assert [row.rule for row in ok.optimizers.Muon().explain(gan).rows if len(row.shape) == 2].count("AdamRule") == 1


def test_muon_that_does_not_know_the_model_says_so():
    weights = problems.variables([np.ones((3, 4)), np.ones(4)])
    with pytest.warns(UserWarning, match=r"optimizer.build\(model\)"):
        ok.optimizers.Muon().build(weights)


@pytest.mark.parametrize("make", [transformer, network, recurrent])
def test_muons_steps_are_orthogonal_for_the_maps_of_the_layers(make):
    """Each separate map has singular values near 1, in units of the scale for its shape."""
    model = make()
    optimizer = ok.optimizers.Muon(1.0, weight_decay=None, coefficients="polar_express", ns_steps=9)
    before = [ops.convert_to_numpy(v).copy() for v in model.trainable_variables]
    optimizer.build(model)
    rng = np.random.default_rng(0)
    optimizer.apply([ops.convert_to_tensor(rng.normal(size=v.shape), "float32") for v in model.trainable_variables])
    rules = rules_of(optimizer, model)
    checked = 0
    for row, variable, old in zip(optimizer.explain(model).rows, model.trainable_variables, before, strict=True):
        if rules[row.path] != "MuonRule":
            continue
        step = old - ops.convert_to_numpy(variable)
        maps = {
            "depthwise/kernel": lambda x: np.transpose(x, (2, 0, 1, 3)).reshape(6, 9, 1),
            "transposed/kernel": lambda x: np.transpose(x, (0, 1, 3, 2)).reshape(1, 54, 4),
            "grouped/kernel": lambda x: np.stack([x[..., :2].reshape(18, 2), x[..., 2:].reshape(18, 2)]),
            "attention/attention_output/kernel": lambda x: x.reshape(1, 8, 8),
            "attention/query/kernel": lambda x: x.reshape(1, 8, 8),
            "lstm/lstm_cell/kernel": lambda x: np.stack(np.split(x, 4, axis=1)),
            "lstm/lstm_cell/recurrent_kernel": lambda x: np.stack(np.split(x, 4, axis=1)),
        }.get(row.path, lambda x: x.reshape(1, -1, x.shape[-1]))(step)
        singular = np.linalg.svd(maps / (0.2 * np.sqrt(max(maps.shape[1:]))), compute_uv=False)
        np.testing.assert_allclose(singular, 1.0, atol=0.02, err_msg=row.path)
        checked += 1
    assert checked >= 2


def test_adafactor_keeps_a_number_for_each_row_and_column():
    rows = {row.path: row for row in ok.optimizers.Adafactor().explain(network()).rows}
    assert rows["conv/kernel"].state_bytes == 4 * (27 + 6)
    assert rows["transposed/kernel"].state_bytes == 4 * (54 + 4)
    assert rows["depthwise/kernel"].state_bytes == 4 * 6 * (9 + 1)
    assert rows["conv/bias"].state_bytes == 4 * 6
    model = network()
    optimizer = ok.optimizers.Adafactor()
    optimizer.build(model)
    held = sum(np.prod(v.shape) * 4 for v in optimizer.variables) - 4 * 2  # the update count and the rate
    assert held == sum(row.state_bytes for row in optimizer.explain(model).rows)


def test_state_for_kernels_with_other_axes_is_refused():
    def optimizer_for(layer, shape):
        model = keras.Sequential([keras.Input(shape), layer, layers.GlobalAveragePooling2D(), layers.Dense(1)])
        optimizer = ok.optimizers.Adafactor()
        optimizer.build(model)
        return optimizer

    ours = optimizer_for(layers.Conv2D(4, 3), (8, 8, 4))
    with pytest.raises(ValueError, match="rules"):
        ours.load_own_variables(problems.state_of(optimizer_for(layers.Conv2DTranspose(4, 3), (8, 8, 4))))


# -- inside of others -------------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["Muon", "SOAP", "Adafactor", "LAMB", "Prodigy"])
def test_lookahead_with_a_step_of_1_is_the_inner_optimizer(name):
    inner = {
        "Muon": ok.optimizers.Muon(0.01),
        "SOAP": ok.optimizers.SOAP(0.01, initial_basis="identity", precondition_frequency=2),
        "Adafactor": ok.optimizers.Adafactor(0.01),
        "LAMB": ok.optimizers.LAMB(0.01, weight_decay=0.1),
        "Prodigy": ok.optimizers.Prodigy(initial_d=1e-2),
    }[name]
    grads = Parts("float32").gradients(6)
    alone = type(inner).from_config(inner.get_config())
    expected = trained(lambda: type(alone).from_config(alone.get_config()), grads)

    def around():
        again = type(inner).from_config(inner.get_config())
        return ok.optimizers.Lookahead(again, sync_period=2, slow_step_size=1.0)

    assert error(trained(around, grads), expected) < 1e-5


# -- Kron --------------------------------------------------------------------------------------------------------------


def scalar(optimizer, name):
    return float(problems.state_of(optimizer)[f"scalars.{name}"])


def test_kron_fits_in_every_update_first_and_then_ever_less_often():
    """As often as the annealed probability of timm's Kron says: in 3 of 100 updates in the end."""
    weights = problems.variables([np.ones((2, 3))])
    optimizer = ok.optimizers.Kron(1e-4)
    optimizer.build(weights)
    gradient = [ops.convert_to_tensor(np.ones((2, 3)))]

    def due(updates):
        found = []
        for _ in range(updates):
            optimizer.apply(gradient, weights)
            found.append(scalar(optimizer, "due"))
        return found

    assert due(5) == [1.0] * 5
    optimizer.iterations.assign(1194)  # from where on exp((501 - t) / 1000) is a little below 1/2
    assert due(6) == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    optimizer.iterations.assign(10**6)
    first, second = [i for i, each in enumerate(due(68)) if each]
    assert second - first == 34


def test_kron_gives_its_factors_the_same_largest_element(monkeypatch):
    """Which leaves their product as it is, so that no comparison of weights can see it."""
    rng = np.random.default_rng(0)
    grads = [[ops.convert_to_tensor(rng.normal(size=(4, 6)) * 10.0)] for _ in range(6)]

    def factors(period):
        monkeypatch.setattr(kron, "BALANCE_PERIOD", period)
        weights = problems.variables([np.ones((4, 6))])
        optimizer = ok.optimizers.Kron(1e-3, preconditioner_learning_rate=0.3, initial_scale=2.0)
        optimizer.build(weights)
        for arrays in grads:
            optimizer.apply(arrays, weights)
        state = problems.state_of(optimizer)
        slots = {i: np.squeeze(value) for i in (0, 1) for key, value in state.items() if f"q_{i}" in key}
        return [q + 2.0**0.5 * np.eye(len(q)) for q in slots.values()], np.array(weights[0])

    (left, right), weights = factors(3)
    assert np.abs(left).max() == pytest.approx(np.abs(right).max(), rel=1e-12)
    (a, b), plain = factors(100)
    assert np.abs(a).max() != pytest.approx(np.abs(b).max(), rel=1e-3)
    np.testing.assert_allclose(np.kron(left, right), np.kron(a, b), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(weights, plain, rtol=1e-9)


# -- in `fit` ---------------------------------------------------------------------------------------------------------


MADE = {
    "Muon": lambda: ok.optimizers.Muon(0.01),
    "SOAP": lambda: ok.optimizers.SOAP(0.01, precondition_frequency=5),
    "Adafactor": lambda: ok.optimizers.Adafactor(0.05),
    "LAMB": lambda: ok.optimizers.LAMB(0.02),
    "Prodigy": lambda: ok.optimizers.Prodigy(),
    "SAM": lambda: ok.optimizers.SAM(ok.optimizers.AdamW(0.01), rho=0.05),
}


@pytest.mark.long
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("make", [network, transformer, recurrent])
@pytest.mark.parametrize("name", list(MADE))
def test_it_trains_and_continues_bitwise_from_a_file(name, make, jit_compile):
    first, last = continued(MADE[name](), make, jit_compile, 96, 10)
    assert last[-1] < 0.8 * first[0]


@pytest.mark.parametrize(("rows", "columns"), [(6, 24), (40, 9), (8, 10), (1, 5)])
@pytest.mark.parametrize("name", ["keller_jordan", "polar_express"])
def test_orthogonalized_is_its_formula_whatever_the_shape(rows, columns, name):
    """Where there are many columns to a row, iterations are multiplied before they meet the matrix."""
    rng = np.random.default_rng(0)
    u, _, v = np.linalg.svd(rng.normal(size=(3, rows, columns)), full_matrices=False)
    x = u * np.logspace(0, -4, u.shape[2]) @ v
    polynomials = muon.polynomials(name, 5)
    expected = x / np.linalg.norm(x, axis=(1, 2), keepdims=True)
    for a, b, c in polynomials:
        gram = expected @ np.swapaxes(expected, 1, 2)
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    for dtype, tolerance in (("float64", 1e-9), ("float32", 1e-4)):
        got = muon.orthogonalized(ops.convert_to_tensor(x, dtype), polynomials, 1e-20)
        np.testing.assert_allclose(ops.convert_to_numpy(got), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("steps", "lengths"), [(1, [1]), (2, [2]), (3, [2, 1]), (5, [2, 3]), (9, [2, 3, 3, 1])])
def test_blocks_of_iterations(steps, lengths):
    coefficients = muon.polynomials("polar_express", steps)
    blocks = muon._blocks(coefficients, 2.0)
    assert [len(block) for block in blocks] == lengths
    assert [each for block in blocks for each in block] == list(coefficients)
    assert [len(block) for block in muon._blocks(coefficients, 1.5)] == [1] * steps

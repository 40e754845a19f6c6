"""Optimizers that look at whole parameters: parity with their references, and what is theirs alone."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops
from torch_references import Made, in_torch, muon_run, optax_run, optim, optimizer_run, soap_run

import keras_optkit as ok
from keras_optkit.private import op_determinism
from keras_optkit.testing import problems
from keras_optkit.testing.tools import float64

STEPS = 100


class Parts(keras.Model):
    """A kernel of each kind, with its bias, and an embedding; the last kernel is that of `head`."""

    def __init__(self, dtype):
        super().__init__(dtype=dtype)
        self.wide = layers.Dense(6, dtype=dtype)
        self.tall = layers.Dense(4, dtype=dtype, use_bias=False)
        self.conv = layers.Conv2D(4, 3, dtype=dtype)
        self.query = layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de", dtype=dtype)
        self.merged = layers.EinsumDense("abcd,cde->abe", (None, 5), dtype=dtype)
        self.table = layers.Embedding(7, 3, dtype=dtype)
        self.head = layers.Dense(2, dtype=dtype, use_bias=False)
        for layer, shape in (
            (self.wide, (None, 4)),
            (self.tall, (None, 6)),
            (self.conv, (None, 8, 8, 2)),
            (self.query, (None, 5, 8)),
            (self.merged, (None, 5, 2, 3)),
            (self.table, (None, 2)),
            (self.head, (None, 3)),
        ):
            layer.build(shape)
        self.built = True


def start_of(model, seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=v.shape)) for v in model.trainable_variables]


def gradients_of(model, steps=STEPS, seed=1):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.uniform(-2, 1, len(model.trainable_variables))
    return [
        [np.asarray(c * rng.normal(size=v.shape)) for c, v in zip(scales, model.trainable_variables, strict=True)]
        for _ in range(steps)
    ]


def trained(make, dtype, grads, injected=None):
    """The weights after each step, with the state saved and loaded in the middle."""
    model = Parts(dtype)
    for variable, value in zip(model.trainable_variables, start_of(model), strict=True):
        variable.assign(value)
    optimizer = make()
    optimizer.build(model)
    trajectory = []
    for step, arrays in enumerate(grads):
        if step == len(grads) // 2 or (step == 1 and injected):
            state = problems.state_of(optimizer)
            state |= injected if step == 1 and injected else {}
            optimizer = make()
            optimizer.build(model)
            optimizer.load_own_variables(state)
        optimizer.apply([ops.convert_to_tensor(g, dtype) for g in arrays], model.trainable_variables)
        trajectory.append([ops.convert_to_numpy(v) for v in model.trainable_variables])
    return trajectory


def error(got, expected):
    """The largest difference relative to the size of the parameter."""
    return max(
        np.max(np.abs(a - np.reshape(b, a.shape))) / np.max(np.abs(b))
        for step, other in zip(got, expected, strict=True)
        for a, b in zip(step, other, strict=True)
    )


def is_matrix(variable):
    return len(variable.shape) > 1 and "bias" not in variable.name


def as_matrix(variable, value):
    """A kernel from inputs to outputs, in the orientation that torch has: outputs first."""
    inputs = {"merged": 2, "query": 1}.get(named(variable), len(variable.shape) - 1)
    rows = int(np.prod(variable.shape[:inputs]))
    return np.reshape(value, (rows, -1)).T


def named(variable):
    """Which of the einsum layers a kernel is of, by its shape; the others are matrices or convolutions."""
    return {(8, 2, 3): "query", (2, 3, 5): "merged"}.get(tuple(variable.shape), "")


def from_matrix(variable, matrix):
    return np.reshape(np.asarray(matrix).T, variable.shape)


TOLERANCE = {"float32": 1e-5, "float64": 1e-9}


@pytest.mark.each_once
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@float64()
def test_lamb_is_optaxs(decay, dtype):
    model = Parts(dtype)
    grads = gradients_of(model)
    expected = in_torch(
        optax_run, "lamb", {"learning_rate": 0.01, "weight_decay": decay}, start_of(model), grads, dtype
    )
    got = trained(lambda: ok.optimizers.LAMB(0.01, weight_decay=decay, decay_mask="all"), dtype, grads)
    assert error(got, expected) < TOLERANCE[dtype]


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rate", [0.01, 0.5])  # below 1/√t for long, and above it from the fifth step on
@float64()
def test_adafactor_is_torchs(rate, decay, dtype):
    model = Parts(dtype)
    variables, grads = model.trainable_variables, gradients_of(model)

    def seen(values):
        return [as_matrix(v, x) if is_matrix(v) else np.ravel(x) for v, x in zip(variables, values, strict=True)]

    theirs = optim("Adafactor", lr=rate, weight_decay=decay, eps=(1e-15, 1e-3))
    run = in_torch(optimizer_run, theirs, seen(start_of(model)), [seen(g) for g in grads], dtype)[0]
    expected = [
        [from_matrix(v, x) if is_matrix(v) else x for v, x in zip(variables, step, strict=True)] for step in run
    ]
    got = trained(lambda: ok.optimizers.Adafactor(rate, weight_decay=decay, decay_mask="all"), dtype, grads)
    assert error(got, expected) < TOLERANCE[dtype]


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "ours",
    [
        {},
        {"bias_correction": True, "safeguard_warmup": True},
        {"growth_rate": 1.02, "d_coef": 0.5, "beta_1": 0.8, "beta_3": 0.9},
    ],
)
@float64()
def test_prodigy_is_its_authors(ours, decay, dtype):
    model = Parts(dtype)
    grads = gradients_of(model)
    d_0 = 1e-6 if dtype == "float64" else 1e-2  # steps of 1e-6 are below the resolution of float32 weights
    names = {"bias_correction": "use_bias_correction", "beta_3": "beta3"}
    theirs = {names.get(k, k): v for k, v in ours.items() if k != "beta_1"}
    theirs |= {"betas": (ours.get("beta_1", 0.9), 0.999), "weight_decay": decay, "d0": d_0}
    expected = in_torch(optimizer_run, Made("prodigyopt:Prodigy", theirs), start_of(model), grads, dtype)[0]
    got = trained(
        lambda: ok.optimizers.Prodigy(initial_d=d_0, weight_decay=decay, decay_mask="all", **ours), dtype, grads
    )
    assert error(got, expected) < TOLERANCE[dtype]


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"adjust_lr_fn": "match_rms_adamw"}),
        ({"scaling": "keller_jordan", "nesterov": False}, {"adjust_lr_fn": "original", "nesterov": False}),
        ({"momentum": 0.8, "ns_steps": 3}, {"momentum": 0.8, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"}),
    ],
)
@float64()
def test_muon_is_torchs(ours, theirs, decay, dtype):
    model = Parts(dtype)
    variables, grads = model.trainable_variables, gradients_of(model)
    matrices = [i for i, v in enumerate(variables) if is_matrix(v) and v is not model.table.embeddings][:-1]
    rest = [i for i in range(len(variables)) if i not in matrices]

    def seen(values):
        return [as_matrix(variables[i], values[i]) for i in matrices]

    common = {"lr": 0.01, "weight_decay": decay}
    run = in_torch(muon_run, common | theirs, seen(start_of(model)), [seen(g) for g in grads], dtype)
    others = optim("AdamW", betas=(0.9, 0.95), **common)
    parts = [[g[i] for i in rest] for g in grads]
    adam = in_torch(optimizer_run, others, [start_of(model)[i] for i in rest], parts, dtype)[0]
    got = trained(lambda: ok.optimizers.Muon(0.01, weight_decay=decay, decay_mask="all", **ours), dtype, grads)
    expected = [[from_matrix(variables[i], x) for i, x in zip(matrices, step, strict=True)] for step in run]
    assert error([[step[i] for i in matrices] for step in got], expected) < TOLERANCE[dtype]
    assert error([[step[i] for i in rest] for step in got], adam) < TOLERANCE[dtype]


@pytest.mark.few(1)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@float64()
def test_soap_is_its_reference_from_the_same_first_bases(decay, dtype):
    model = Parts(dtype)
    variables, grads = model.trainable_variables, gradients_of(model)

    def seen(values):
        return [x if is_matrix(v) else np.ravel(x) for v, x in zip(variables, values, strict=True)]

    theirs = {"lr": 0.01, "weight_decay": decay, "precondition_frequency": 3, "max_precondition_dim": 7}
    expected, bases = in_torch(soap_run, theirs, seen(start_of(model)), [seen(g) for g in grads], dtype)
    first = {
        f"slot.basis_{axis}.{i}": q
        for i, sides in enumerate(bases)
        if is_matrix(variables[i])
        for axis, q in enumerate(sides)
        if q is not None
    }
    common = {"precondition_frequency": 3, "max_precondition_dim": 7, "weight_decay": decay, "decay_mask": "all"}
    got = trained(lambda: ok.optimizers.SOAP(0.01, **common), dtype, grads, first)
    assert error(got, expected) < TOLERANCE[dtype]


# -- which parameters ------------------------------------------------------------------------------------------------


def transformer():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(tokens)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Dense(12, activation="relu", name="dense")(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(3, name="head")(x))


def network():
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(image)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.Conv2DTranspose(4, 3, name="transposed")(x)
    x = layers.Conv2D(4, 3, groups=2, name="grouped")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(3, name="head")(x))


def recurrent():
    return keras.Sequential([keras.Input((5, 4)), layers.LSTM(6, name="lstm"), layers.Dense(3, name="head")])


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


@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["Muon", "SOAP", "Adafactor", "LAMB", "Prodigy"])
def test_lookahead_with_a_step_of_1_is_the_inner_optimizer(name):
    inner = {
        "Muon": ok.optimizers.Muon(0.01),
        "SOAP": ok.optimizers.SOAP(0.01, initial_basis="identity", precondition_frequency=2),
        "Adafactor": ok.optimizers.Adafactor(0.01),
        "LAMB": ok.optimizers.LAMB(0.01, weight_decay=0.1),
        "Prodigy": ok.optimizers.Prodigy(initial_d=1e-2),
    }[name]
    grads = gradients_of(Parts("float32"), 6)
    alone = type(inner).from_config(inner.get_config())
    expected = trained(lambda: type(alone).from_config(alone.get_config()), "float32", grads)

    def around():
        again = type(inner).from_config(inner.get_config())
        return ok.optimizers.Lookahead(again, sync_period=2, slow_step_size=1.0)

    assert error(trained(around, "float32", grads), expected) < 1e-5


# -- in `fit` ---------------------------------------------------------------------------------------------------------


def problem(make, seed=0):
    """Inputs and classes that a small model can learn."""
    rng = np.random.default_rng(seed)
    if make is transformer:
        x = rng.integers(0, 11, (96, 6)).astype("int32")
        return x, np.argmax([np.sum(x == n, axis=1) + 0.1 * n for n in range(3)], axis=0)
    shape = (8, 8, 3) if make is network else (5, 4)
    x = rng.normal(size=(96, *shape)).astype("float32")
    return x, np.argmax(np.mean(x, axis=tuple(range(1, x.ndim - 1)))[:, :3], axis=1)


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
def test_it_trains_and_continues_bitwise_from_a_file(name, make, jit_compile, tmp_path):
    x, y = problem(make)
    with contextlib.nullcontext() if jit_compile else op_determinism():  # Keras refuses XLA with it
        keras.utils.set_random_seed(0)
        model = make()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(MADE[name](), loss=loss, jit_compile=jit_compile)
        how = {"batch_size": 16, "shuffle": False, "verbose": 0}
        first = model.fit(x, y, epochs=10, **how).history["loss"]
        model.save(tmp_path / "model.keras")
        last = model.fit(x, y, epochs=10, **how).history["loss"]
        assert last[-1] < 0.8 * first[0]
        loaded = keras.models.load_model(tmp_path / "model.keras")
        loaded.compile(loaded.optimizer, loss=loss, jit_compile=jit_compile)
        assert loaded.fit(x, y, epochs=10, **how).history["loss"] == last
        for a, b in zip(loaded.get_weights(), model.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)

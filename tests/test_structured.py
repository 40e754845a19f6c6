"""Optimizers that look at whole parameters: parity with their references, and what is theirs alone."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from torch_references import Made, in_torch, muon_run, optax_run, optim, optimizer_run, soap_run

import keras_optkit as ok
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

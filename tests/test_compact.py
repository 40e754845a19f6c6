"""How large the state of the compact optimizers is, and which blocks Adam-mini has."""

import keras
import numpy as np
import pytest
from keras import layers

import keras_optkit as ok

FLOAT = 4


def model():
    tokens = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 8, name="embedding")(tokens)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Reshape((6, 4, 2), name="reshape")(x)
    x = layers.Conv2D(5, 3, name="conv")(x)
    x = layers.Flatten(name="flatten")(x)
    return keras.Model(tokens, layers.Dense(12, name="dense")(x))


def state_of(optimizer):
    """Elements of state by path of the variable."""
    network = model()
    optimizer.build(network)
    return {row.path: row.state_bytes // FLOAT for row in optimizer.explain(network).rows}


#: What a parameter has in addition to a first moment in its own shape.
ADDITIONAL = [
    # rows and columns of v and of the residual; the convolution is a matrix of 18 × 5, the attention's output 8 × 8
    ("CAME", "dense/kernel", 2 * (40 + 12)),
    ("CAME", "conv/kernel", 2 * (18 + 5)),
    ("CAME", "attention/query/kernel", 2 * (8 + 8)),
    ("CAME", "embedding/embeddings", 2 * (11 + 8)),
    ("CAME", "norm/gamma", 8),
    # one for each place along each axis
    ("SM3", "dense/kernel", 40 + 12),
    ("SM3", "conv/kernel", 3 + 3 + 2 + 5),
    ("SM3", "attention/query/kernel", 8 + 2 + 4),
    ("SM3", "norm/gamma", 8),
    # units; heads of queries and keys; rows of the embedding; one of a scale, one for each element of a bias
    ("AdamMini", "dense/kernel", 12),
    ("AdamMini", "conv/kernel", 5),
    ("AdamMini", "attention/query/kernel", 2),
    ("AdamMini", "attention/key/kernel", 2),
    ("AdamMini", "attention/value/kernel", 8),
    ("AdamMini", "attention/attention_output/kernel", 8),
    ("AdamMini", "embedding/embeddings", 11),
    ("AdamMini", "norm/gamma", 1),
    ("AdamMini", "norm/beta", 8),
    # one for each parameter, and the engine's count of its updates
    ("NovoGrad", "dense/kernel", 2),
    ("NovoGrad", "norm/gamma", 2),
]


@pytest.mark.parametrize("name", ["CAME", "SM3", "AdamMini", "NovoGrad"])
def test_state_is_a_first_moment_and_little_more(name):
    found = state_of(getattr(ok.optimizers, name)())
    sizes = {v.path: int(np.prod(v.shape)) for v in model().trainable_variables}
    for optimizer, path, more in ADDITIONAL:
        if optimizer == name:
            assert found[path] == sizes[path] + more, path


def test_sm3_without_momentum_has_no_state_of_full_size():
    assert state_of(ok.optimizers.SM3(momentum=0.0))["dense/kernel"] == 40 + 12


def test_apollos_state_is_of_its_rank():
    found = state_of(ok.optimizers.APOLLO(rank=3))
    assert found["dense/kernel"] == 2 * 3 * 40 + 1
    assert found["conv/kernel"] == 2 * 3 * 18 + 1
    assert found["embedding/embeddings"] == 2 * 11 * 8


def test_apollos_kernels_that_are_no_longer_than_its_rank_are_left_to_adam():
    assert state_of(ok.optimizers.APOLLO(rank=12))["dense/kernel"] == 2 * 40 * 12


def test_adam_minis_heads_may_be_named_or_left_out():
    assert state_of(ok.optimizers.AdamMini(head_layers=None))["attention/query/kernel"] == 64 + 8
    assert state_of(ok.optimizers.AdamMini(head_layers=["value"]))["attention/value/kernel"] == 64 + 2


def test_apollos_projection_is_normal():
    from keras_optkit.optimizers.rules.low_rank import projection

    drawn = [keras.ops.convert_to_numpy(projection(1, keras.ops.array(i), 4, 1000, "float32")) for i in range(2)]
    for x in drawn:
        assert abs(x.mean()) < 0.03
        assert x.std() == pytest.approx(0.5, rel=0.05)
    assert abs(np.corrcoef(*(x.ravel() for x in drawn))[0, 1]) < 0.05


def test_lars_leaves_vectors_to_sgd():
    network = model()
    optimizer = ok.optimizers.LARS()
    optimizer.build(network)
    rules = {row.path: row.rule for row in optimizer.explain(network).rows}
    assert rules["dense/kernel"] == rules["embedding/embeddings"] == "LARSRule"
    assert rules["dense/bias"] == rules["norm/gamma"] == rules["attention/query/bias"] == "LARSVectorRule"

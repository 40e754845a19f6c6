"""The state of an optimizer in `tf.train.Checkpoint`: exact, refused where it does not belong, however it is packed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

import keras_optkit as ok
from keras_optkit.testing import problems

X, Y = problems.regression()


def adamw(**more):
    return ok.optimizers.AdamW(0.01, **{"use_ema": True, "gradient_accumulation_steps": 2} | more)


def compiled(optimizer, fits=0):
    model = problems.network()
    model.compile(optimizer, loss="mse")
    for _ in range(fits):
        fit(model)
    return model


def fit(model, **how):
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, **how)
    return [ops.convert_to_numpy(w) for w in model.weights]


def checkpoint(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def state_of(optimizer):
    """Without the schema, which has the names of layers, that Keras numbers through in a process."""
    return {name: value for name, value in problems.state_of(optimizer).items() if name != "schema"}


@pytest.fixture
def saved(tmp_path):
    """A trained model and the path of its checkpoint."""
    model = compiled(adamw(), fits=1)
    return model, tf.train.CheckpointManager(checkpoint(model), tmp_path, max_to_keep=1).save()


@pytest.mark.few(1)
@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("pack_below", [None, 0])
def test_training_goes_on_as_if_nothing_had_happened(saved, built, pack_below):
    model, path = saved
    other = compiled(adamw())
    if pack_below is not None:
        other.optimizer.pack_below = pack_below
    if built:
        other.optimizer.build(other.trainable_variables)
    status = checkpoint(other).restore(path)
    if built:
        status.assert_consumed()
    expected = fit(model)
    for a, b in zip(fit(other), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    assert int(other.optimizer.iterations) == int(model.optimizer.iterations) == 4
    names = state_of(model.optimizer)
    for name, value in state_of(other.optimizer).items():
        np.testing.assert_allclose(value, names[name], rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda: adamw(use_ema=False), "state: .*'average'"),
        (lambda: ok.optimizers.SGD(), "optimizer: .*AdamW.* != .*SGD"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(saved, optimizer, message):
    other = compiled(optimizer())
    other.optimizer.build(other.trainable_variables)
    with pytest.raises(ValueError, match=message):
        checkpoint(other).restore(saved[1])


@pytest.mark.long
def test_variables_that_joined_later_are_in_it(tmp_path):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")]
    model = keras.Sequential([keras.Input((4,)), *layers])
    layers[0].trainable = False
    model.compile(adamw(), loss="mse")
    fit(model)
    layers[0].trainable = True
    optimizer = model.optimizer
    model.compile(optimizer, loss="mse")
    fit(model)
    path = checkpoint(model).save(tmp_path / "checkpoint")
    other = keras.models.clone_model(model)
    other.compile(adamw(), loss="mse")
    other.optimizer.build(other.trainable_variables)
    checkpoint(other).restore(path).assert_consumed()
    ours, theirs = state_of(optimizer), state_of(other.optimizer)
    assert len(ours) == len(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(theirs[name], value, err_msg=name)


@pytest.mark.long
def test_from_two_replicas_to_one_and_back(tmp_path):
    with problems.two_replicas().scope():
        pair = compiled(adamw())
    fit(pair)
    path = checkpoint(pair).save(tmp_path / "pair")
    single = compiled(adamw())
    single.optimizer.build(single.trainable_variables)
    checkpoint(single).restore(path).assert_consumed()
    path = checkpoint(single).save(tmp_path / "single")
    with problems.two_replicas().scope():
        again = compiled(adamw())
        again.optimizer.build(again.trainable_variables)
        checkpoint(again).restore(path)
    states = [state_of(model.optimizer) for model in (pair, single, again)]
    for name, value in states[0].items():
        for other in states[1:]:
            np.testing.assert_array_equal(other[name], value, err_msg=name)
    for slots in again.optimizer._held.state.slots:
        for variable in slots.values():
            one, two = variable.value.values
            np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.long
def test_with_loss_scaling(tmp_path):
    def scaled():
        return ok.optimizers.LossScale(adamw(), initial_scale=2.0, maximum_scale=8.0, dynamic_growth_steps=1)

    model = compiled(scaled(), fits=1)
    path = checkpoint(model).save(tmp_path / "checkpoint")
    other = compiled(scaled())
    other.optimizer.build(other.trainable_variables)
    checkpoint(other).restore(path).assert_consumed()
    assert other.optimizer.loss_scale == 8.0
    for a, b in zip(fit(other), fit(model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_compiled_model_is_exported(saved, tmp_path):
    model, _ = saved
    model.export(tmp_path / "exported", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "exported")
    np.testing.assert_allclose(loaded.serve(X), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


def test_set_weights_sets_all():
    model = compiled(adamw(), fits=1)
    values = [ops.convert_to_numpy(v) for v in model.optimizer.variables]
    other = compiled(adamw())
    other.optimizer.build(other.trainable_variables)
    other.optimizer.set_weights(values)
    for a, b in zip(other.optimizer.variables, values, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(a), b)
    with pytest.raises(ValueError, match=f"one value for each of {len(values)}, got 1"):
        other.optimizer.set_weights(values[:1])

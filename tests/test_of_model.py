"""Which optimizers a model has."""

import keras
import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.optimizers import of_model


class Holder(keras.Model):
    def __init__(self, **held):
        super().__init__()
        self.dense = keras.layers.Dense(2)
        for name, value in held.items():
            setattr(self, name, value)

    def call(self, x):
        return self.dense(x)


def sgd():
    return ok.optimizers.SGD(0.1)


def test_the_compiled_optimizer_comes_first_and_each_is_listed_once():
    a, b = sgd(), keras.optimizers.SGD(0.1)
    model = Holder(mine=b, again=[a, b])
    model.compile(a, "mse")
    assert of_model.optimizers_of(model) == [a, b]


@pytest.mark.parametrize(
    "hold",
    [
        lambda a, b: {"first": a, "second": b},
        lambda a, b: {"both": [a, b]},
        lambda a, b: {"both": (a, b)},
        lambda a, b: {"both": {"generator": a, "critics": [b]}},
    ],
    ids=["attributes", "list", "tuple", "dict with a list"],
)
def test_optimizers_are_found_wherever_a_model_holds_them(hold):
    a, b = sgd(), sgd()
    model = Holder(**hold(a, b))
    model.compile(optimizer=None)
    assert of_model.optimizers_of(model) == [a, b]


def test_names_are_those_of_the_attributes():
    a, b, c, d = sgd(), sgd(), sgd(), sgd()
    model = Holder(inner=Holder(mine=c), both={"critics": [b]})
    model.compile(a, "mse")
    model.inner.compile(d, "mse")
    assert of_model.named_optimizers_of(model) == {
        "optimizer": a,
        "both/critics/0": b,
        f"{model.inner.name}/mine": c,
        f"{model.inner.name}/optimizer": d,
    }
    scaled = keras.optimizers.LossScaleOptimizer(a)
    assert of_model.unscaled(scaled) is of_model.unscaled(a) is a


def test_optimizers_of_models_inside_are_found():
    a, b = sgd(), sgd()
    inner = Holder(mine=a)
    model = Holder(inner=inner)
    model.compile(b, "mse")
    assert of_model.optimizers_of(model) == [b, a]


def test_those_inside_of_others_are_not_listed_but_reached():
    a, b, c = sgd(), keras.optimizers.SGD(0.1), sgd()
    multi = keras.optimizers.MultiOptimizer(lambda variable: a if "kernel" in variable.path else b)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.also = [a, keras.optimizers.LossScaleOptimizer(c), c]
    model.compile(multi, "mse")
    multi.build(model.trainable_variables)
    scaled = model.also[1]
    assert of_model.optimizers_of(model) == [multi, scaled]
    assert of_model.innermost(multi) == [a, b]
    assert of_model.innermost(scaled) == [c]
    assert of_model.ours_of(model) == [a, c]
    assert of_model.paths_of(of_model.named_optimizers_of(model)) == {"optimizer/0": a, "optimizer/1": b, "also/1": c}


def test_updates_are_counted_by_the_optimizer_that_is_used():
    used, unused = sgd(), sgd()
    model = Holder(mine=used)
    model.compile(unused, "mse")
    model(keras.ops.ones((1, 3)))
    assert of_model.update_counter(model) is unused.iterations
    used.apply([keras.ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    assert of_model.update_counter(model) is used.iterations
    assert of_model.paths_of(of_model.used_optimizers_of(model)) == {"": used}
    for _ in range(2):
        used.apply([keras.ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    unused.apply([keras.ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    assert of_model.update_counter(model) is unused.iterations  # the compiled one, once it is used
    assert of_model.paths_of(of_model.used_optimizers_of(model)) == {"optimizer": unused, "mine": used}
    model.compile(optimizer=None)
    assert of_model.update_counter(model) is used.iterations
    assert of_model.update_counter(keras.Sequential([])) is None


def test_callbacks_count_the_updates_of_the_optimizer_that_is_used():
    callback, used = ok.callbacks.EarlyStopping("loss"), sgd()
    model = Holder(mine=used)
    callback.set_model(model)
    model.compile(optimizer=None)
    model(keras.ops.ones((1, 3)))
    used.apply([keras.ops.ones(v.shape) for v in model.trainable_variables], model.trainable_variables)
    assert callback._updates() == 1
    other = Holder()
    other.compile(optimizer=None)
    callback.set_model(other)
    assert callback._updates() == 0


@pytest.mark.parametrize("make", [sgd, lambda: keras.optimizers.SGD(0.1)], ids=["ours", "keras"])
def test_the_optimizer_of_a_frozen_teacher_makes_no_updates(make):
    teacher = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    teacher.compile(make(), "mse", run_eagerly=True)
    x, y = np.zeros((4, 3)), np.zeros((4, 2))
    teacher.train_on_batch(x, y)
    model = Holder(teacher=teacher)
    model.compile(make(), "mse", run_eagerly=True)
    model(x)
    assert of_model.update_counter(model) is teacher.optimizer.iterations
    teacher.trainable = False
    assert of_model.used_optimizers_of(model) == {"optimizer": model.optimizer}
    assert of_model.update_counter(model) is model.optimizer.iterations
    assert of_model.optimizers_of(model) == [model.optimizer, teacher.optimizer]

"""Ready spaces: every point makes an object, and several are joined."""

import json

import numpy as np
import pytest

import keras_optkit as ok
from keras_optkit.tuning import Choice, Space, spaces


@pytest.mark.parametrize("kind", ["optimizer", "initializer", "regularizer"])
def test_points_make_what_they_name(kind):
    space = {"regularizer": spaces.regularization}.get(kind, getattr(spaces, kind, None))("all")
    names = {card.name for card in ok.cards(kind) if not {"bias", "activity", "anchored"} & card.tags}
    assert names == set(space[kind].values) - {"none"}
    rng = np.random.default_rng(0)
    points = [space.sample(rng) for _ in range(600)]
    for name in space[kind].values:
        point = next(point for point in points if point[kind] == name)
        made = space.make({**point, "units": 3})
        assert made is None if name == "none" else type(made).__name__ == name
        for full, value in point.items():
            if full != kind:
                prefix, cls, argument = full.split("/")
                assert (prefix, cls) == (kind, name)
                assert made.get_config()[argument] == pytest.approx(value)


def test_default_choices():
    assert spaces.optimizer()["optimizer"].values == ("AdamW", "Lion", "Muon", "SGD")
    assert spaces.regularization()["regularizer"].values == ("none", "L1", "L2", "L1L2")
    assert list(spaces.initializer()) == ["initializer"]
    assert spaces.initializer(["BiasUniform"])["initializer"].values == ("BiasUniform",)


def test_optimizers_take_more_arguments():
    space = spaces.optimizer(["AdamW", "DoG"])
    point = {"optimizer": "AdamW", "optimizer/AdamW/learning_rate": 0.5, "optimizer/AdamW/beta_1": 0.8}
    point |= {"optimizer/AdamW/beta_2": 0.9, "optimizer/AdamW/weight_decay": 0.1}
    made = space.make(point, weight_decay=0.2, clipnorm=1.0)
    assert (made.weight_decay, made.clipnorm) == (0.2, 1.0)
    made = space.make(point, learning_rate=lambda rate: ok.schedules.Cosine(rate, 10))
    assert float(made.learning_rate) == 0.5
    assert made.get_config()["learning_rate"]["class_name"] == "Cosine"
    with pytest.raises(ValueError, match=r"learning_rate must not be a function where DoG has none in the space"):
        space.make({"optimizer": "DoG", "optimizer/DoG/initial_distance": 1e-3}, learning_rate=lambda rate: rate)


def test_schedules_are_shares_of_the_run_and_of_the_rate():
    space = spaces.schedule()
    cosine = space.make({"schedule": "Cosine", "schedule/warmup": 0.1, "schedule/final": 0.1}, 2.0, 100)
    assert [round(float(cosine(step)), 6) for step in (0, 10, 55, 100)] == [0.0, 2.0, 1.1, 0.2]
    linear = space.make({"schedule": "Linear", "schedule/warmup": 0.0, "schedule/final": 0.0}, 2.0, 100)
    assert [float(linear(step)) for step in (0, 50, 100)] == [2.0, 1.0, 0.0]
    cycle = space.make({"schedule": "OneCycle", "schedule/OneCycle/pct_start": 0.5}, 2.0, 101)
    assert float(cycle(50)) == pytest.approx(2.0, abs=0.01)
    assert space.make({"schedule": "constant", "schedule/warmup": 0.0}, 2.0, 100) == 2.0
    assert float(space.make({"schedule": "constant", "schedule/warmup": 0.1}, 2.0, 100)(5)) == 1.0
    assert "schedule/final" not in spaces.schedule(["constant"])


def test_spaces_are_joined_without_clashes():
    first, second = spaces.initializer(name="first"), spaces.initializer(name="second")
    space = spaces.optimizer() | spaces.schedule() | spaces.regularization() | first | second | {"units": Choice([8])}
    assert type(space) is Space
    point = space.sample(0)
    assert type(first.make(point)).__name__ == point["first"]
    assert type(second.make(point)).__name__ == point["second"]
    assert Space.from_config(json.loads(json.dumps(space.get_config()))) == space
    assert ok.tuning.spaces.ReadySpace.from_config(first.get_config()) == first
    with pytest.raises(ValueError, match=r"given once, got 'initializer' twice"):
        _ = spaces.initializer() | spaces.initializer()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: spaces.optimizer("Adam"), TypeError, r"names must be a list of names, \"all\" or None, got 'Adam'"),
        (lambda: spaces.optimizer(["Muno"]), ValueError, r"names\[0\] must be .* 'Muno'. Did you mean 'Muon'"),
        (lambda: spaces.schedule(["Step"]), ValueError, r"names\[0\] must be one of 'constant', .* got 'Step'"),
        (lambda: spaces.regularization().make({}), ValueError, r"values must have 'regularizer', which is active"),
        (lambda: spaces.regularization().make({"regularizer": "L2"}), ValueError, r"must have 'regularizer/L2/l2'"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_there_are_schedules_for_the_shortest_runs():
    space = spaces.schedule()
    for seed in range(40):
        space.make(space.sample(seed), 0.1, steps=2 + seed % 4)

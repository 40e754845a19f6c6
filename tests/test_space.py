"""Search spaces: what is likely in them, what is not allowed, and what is saved of them."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

import keras_optkit as ok
from keras_optkit.tuning import Bool, Choice, Float, Int, Space

RNG = np.random.default_rng


def draws(parameter, count=4000):
    rng = RNG(0)
    return [parameter.sample(rng) for _ in range(count)]


def test_bool():
    parameter = Bool(default=True, when={"a": 1})
    assert parameter.grid() == (False, True)
    assert parameter.size == 2
    assert {type(value) for value in draws(parameter, 50)} == {bool}
    assert set(draws(parameter, 50)) == {False, True}
    space = Space(dropout=Bool(), rate=Choice([0.1, 0.5], when={"dropout": True}))
    assert list(space.grid()) == [{"dropout": False}, {"dropout": True, "rate": 0.1}, {"dropout": True, "rate": 0.5}]
    assert space.defaults() == {"dropout": False}


def test_weights_are_probabilities():
    drawn = draws(Choice(["a", "b", "c"], weights=[6, 3, 1]))
    counts = [drawn.count(value) for value in "abc"]
    assert stats.chisquare(counts, [2400, 1200, 400]).pvalue > 0.01
    assert Choice(["a", "b"], weights=[6, 3]).size == 2


def test_normal_floats_are_cut_off_at_the_ends():
    linear = Float(0.0, 1.0, normal=(0.2, 0.3))
    assert stats.kstest(draws(linear), stats.truncnorm(-2 / 3, 8 / 3, 0.2, 0.3).cdf).pvalue > 0.01
    log = Float(1e-4, 1e-1, log=True, normal=(1e-3, 3.0))
    ends = np.log([1e-1, 1e2]) / np.log(3)
    expected = stats.truncnorm(*ends, np.log(1e-3), np.log(3))
    assert stats.kstest(np.log(draws(log)), expected.cdf).pvalue > 0.01
    far = draws(Float(0.0, 1.0, normal=(0.0, 1e-3)), 200)
    assert 0 <= min(far) <= max(far) < 0.01


def test_normal_numbers_with_steps():
    for parameter in (Int(0, 20, normal=(5, 2.0)), Int(0, 20, step=5, normal=(5, 4.0))):
        grid = np.array(parameter.grid())
        drawn = draws(parameter)
        assert {type(value) for value in drawn} == {int}
        if parameter.step:
            density = np.exp(-((grid - 5) ** 2) / 32)
        else:
            density = np.diff(stats.norm(5, 2).cdf(np.append(grid - 0.5, 20.5)))
        counts = np.array([drawn.count(value) for value in grid])
        enough = density / density.sum() * 4000 > 5
        expected = density[enough] / density[enough].sum() * counts[enough].sum()
        assert stats.chisquare(counts[enough], expected).pvalue > 0.01
    drawn = draws(Float(1.0, 100.0, log=True, step=10, normal=(10, 10.0)))
    assert abs(drawn.count(10.0) / 4000 - 1 / (1 + 2 * math.exp(-0.5))) < 0.03


def test_logarithm_in_reverse():
    mirrored = [1.001 - value for value in draws(Float(1e-3, 1.0, log="reverse"))]
    assert stats.kstest(mirrored, stats.loguniform(1e-3, 1.0).cdf).pvalue > 0.01
    assert Float(1.0, 100.0, log="reverse").grid(3) == (1.0, 91.0, 100.0)
    assert Float(1.0, 100.0, log="reverse", step=10).grid() == (1.0, 91.0, 100.0)
    assert Int(1, 8, log="reverse", step=2).grid() == (1, 5, 7, 8)
    drawn = draws(Int(1, 7, log="reverse"), 8000)
    expected = np.diff(np.log(np.arange(1, 9))) / np.log(8)
    assert stats.chisquare(np.bincount(drawn, minlength=8)[:0:-1], 8000 * expected).pvalue > 0.01
    hp = ok.tuning.HyperModel(lambda hp: None, Space(x=Int(1, 8, log="reverse"))).hyperparameters()  # noqa: ARG005
    assert hp.space[0].sampling == "reverse_log"


DEEP = Space(
    optimizer=Choice(["SGD", "Adam"]),
    nesterov=Bool(when={"momentum": [0.5, 0.9]}),  # three levels, declared before its parent
    momentum=Choice([0.0, 0.5, 0.9], when={"optimizer": "SGD"}, weights=[1, 1, 2]),
    layers=Int(1, 3, default=2),
    width=Int(8, 32, log=True, step=2, when={"layers": [2, 3]}),
    last=Int(8, 32, log=True, step=2, when={"layers": 3, "width": [16, 32]}),
    constraints=["last < width", "not (optimizer == 'SGD' and layers == 3)"],
)


def allowed(point):
    return not (point.get("last", 0) >= point.get("width", 99)) and not (
        point["optimizer"] == "SGD" and point["layers"] == 3
    )


def test_levels_of_conditions_and_constraints():
    points = []
    for optimizer, momentum, nesterov, layers, width, last in itertools.product(
        ["SGD", "Adam"], [0.0, 0.5, 0.9], [False, True], [1, 2, 3], [8, 16, 32], [8, 16, 32]
    ):
        point = {"optimizer": optimizer, "layers": layers}
        if optimizer == "SGD":
            point["momentum"] = momentum
            if momentum:
                point["nesterov"] = nesterov
        if layers > 1:
            point["width"] = width
            if layers == 3 and width > 8:
                point["last"] = last
        if allowed(point) and point not in points:
            points.append(point)
    grid = list(DEEP.grid())
    assert len(grid) == DEEP.size == len(points)
    assert all(point in grid for point in points)
    rng = RNG(0)
    drawn = [DEEP.sample(rng) for _ in range(600)]
    assert all(point in points for point in drawn)
    assert all(point in drawn for point in points)


def test_everything_is_saved_as_json():
    space = Space(
        {**DEEP, "rate": Float(1e-3, 1, log=True, normal=(0.1, 3.0)), "beta": Float(0.1, 0.9, log="reverse")},
        constraints=DEEP.constraints,
    )
    assert Space.from_config(json.loads(json.dumps(space.get_config()))) == space
    assert eval(repr(space)) == space
    assert Space(dict(space)) != space
    # as it was before there were constraints and priors: a search of that time can be continued
    assert Space(a=Choice([1]), b=Float(0, 1)).get_config() == {
        "a": {"type": "Choice", "values": [1], "default": None, "when": None},
        "b": {
            "type": "Float", "low": 0.0, "high": 1.0, "log": False, "step": None, "default": None, "when": None,
        },
    }  # fmt: skip


def test_spaces_are_joined():
    joined = Space(a=Int(1, 3), b=Int(1, 3), constraints=["a < b"]) | Space(c=Int(1, 2), constraints=["c > 1"])
    assert list(joined) == ["a", "b", "c"]
    assert joined.constraints == ("a < b", "c > 1")
    assert joined.size == 3
    assert list(Space(a=Int(1, 3)) | {"d": Bool()}) == ["a", "d"]
    with pytest.raises(ValueError, match=r"given once, got 'a' twice"):
        _ = joined | {"a": Bool()}


def test_points_that_violate_a_constraint_are_not_tried():
    space = Space(a=Int(1, 30), b=Int(1, 30), constraints=["a == b", "a % 10 == 0"])
    assert space.size == 3
    rng = RNG(0)
    assert {space.sample(rng)["a"] for _ in range(30)} == {10, 20, 30}  # one in 300, and the loop has an end


def where(constraints):
    return Space(
        a=Int(1, 2), b=Int(2, 3), **({"c": Float(0, 1)} if "c" in str(constraints) else {}), constraints=constraints
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: where(["a > b"]).sample(0), ValueError, r"No point meets the constraints \['a > b'\]"),
        (lambda: where(["a > b"]).grid(), ValueError, r"No point meets the constraints \['a > b'\]"),
        (lambda: where(["c < 0"]).sample(0), ValueError, r"None of 10000 random points meets the constraints"),
        (lambda: where("a < b"), TypeError, r"constraints must be a list of expressions .* got 'a < b'"),
        (lambda: where([len]), TypeError, r"constraints\[0\] must be a string .* which a space can save"),
        (lambda: where(["a <"]), ValueError, r"constraints\[0\] must be an expression .* got 'a <': invalid syntax"),
        (lambda: where(["a < d"]), ValueError, r"constraints\[0\], 'a < d', must be one of 'a', 'b', got 'd'"),
        (lambda: where(["1 < 2"]), ValueError, r"must name a parameter, got '1 < 2'"),
        (lambda: where(["f(a)"]), ValueError, r"constraints\[0\] must be made of parameters, .* with Call"),
        (lambda: where(["a.real < 2"]), ValueError, r"with Attribute"),
        (lambda: where(["a < 'x'"]).sample(0), ValueError, r"cannot be computed at a=\d: TypeError"),
        (lambda: where(["a < b"]) | 3, TypeError, r"unsupported operand"),
        (lambda: Space({"constraints": Bool()}), ValueError, r"must not be 'constraints'"),
        (lambda: Choice([1, 2], weights=[1]), ValueError, r"weights must be 2 numbers, as many as values, got \[1\]"),
        (lambda: Choice([1, 2], weights=[1, 0]), ValueError, r"weights must be greater than 0, got \[1, 0\]"),
        (lambda: Choice([1, 2], weights=3), TypeError, r"weights must be a list .* got 3"),
        (lambda: Choice([1, 2], weights=["a", 1]), TypeError, r"weights\[0\] must be a finite number .* got 'a'"),
        (lambda: Float(0, 1, normal=0.5), TypeError, r"normal must be a pair .* got 0.5"),
        (lambda: Float(0, 1, normal=(2, 1)), ValueError, r"normal\[0\] must be a finite .* \[0.0, 1.0\], got 2"),
        (lambda: Float(0, 1, normal=(0, 0)), ValueError, r"deviation, must be greater than 0, got 0.0"),
        (lambda: Float(1, 2, log=True, normal=(1, 1)), ValueError, r"must be a factor greater than 1 where log=True"),
        (lambda: Float(1, 2, log="reverse", normal=(1, 2)), ValueError, r"normal must be None where log=\"reverse\""),
        (lambda: Float(1, 2, log="up"), TypeError, r"log must be True, False or \"reverse\", got 'up'"),
        (lambda: Bool(default=1), TypeError, r"default must be True or False, got 1"),
    ],
)  # fmt: skip
def test_bad_spaces(make, error, message):
    with pytest.raises(error, match=message):
        make()

"""Checks for transforms, made on an optimizer with momentum; many are those of optimizers.

The twin of a transform's card is a function; see `keras_optkit.testing.twins.transforms` for its form.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.optimizers.groups import Places
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rules.sgd import SGD
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers import execution, formula, gradients
from keras_optkit.testing.checks.optimizers.common import assert_close
from keras_optkit.testing.conformance import check, twin_of
from keras_optkit.testing.tools import float64, numbers
from keras_optkit.testing.twins.transforms import TWINS, Told

_RATE, _MOMENTUM = 0.1, 0.9


def in_optimizer(card: Card) -> Card:
    """A card of SGD with momentum whose only transform is that of `card`."""
    own = {field.name for field in dataclasses.fields(card.make)}  # type: ignore[arg-type]

    def make(**arguments: Any) -> Optimizer:
        transform = card.make(**{name: value for name, value in arguments.items() if name in own})
        common = {name: value for name, value in arguments.items() if name not in own}
        return SGD(**{"learning_rate": _RATE, "momentum": _MOMENTUM, **common}, transforms=[transform])

    def twin(
        ps: list[np.ndarray],
        grads: list[list[Any]],
        weight: list[Any],
        learning_rate: float = _RATE,
        weight_decay: Any = (),
        **arguments: Any,
    ) -> Iterator[list[np.ndarray]]:
        change, kind = twin_of(card, TWINS), card.make(**arguments)
        velocity = [np.zeros_like(p) for p in ps]
        for t, step in enumerate(grads, 1):
            there = [i for i, g in enumerate(step) if g is not None]
            some, decays = [ps[i] for i in there], [learning_rate * weight_decay[i] for i in there]
            given = [step[i] for i in there]
            told = Told([weight[i] for i in there], given, decays, learning_rate, t, there)
            if kind.changes == "gradient":
                given = change(given, some, told, **arguments)
            for i, g in zip(there, given, strict=True):
                velocity[i] = _MOMENTUM * velocity[i] + learning_rate * g
            steps = [velocity[i] for i in there]
            if kind.changes == "step":
                steps = change(steps, some, told, **arguments)
            if not kind.handles_decay:
                steps = [u + decay * p for u, p, decay in zip(steps, some, decays, strict=True)]
            ps = list(ps)
            for i, u in zip(there, steps, strict=True):
                ps[i] = ps[i] - u
            yield ps

    twin.of_model = True  # type: ignore[attr-defined]
    cases = tuple({"learning_rate": _RATE, **case} for case in card.cases)
    return Card(name=f"SGD with {card.name}", kind="optimizer", make=make, cases=cases, twin=twin)


@check("transform")
def check_twin(card: Card) -> None:
    """Equals its NumPy twin for 20 steps in float64, several shapes, every case, weight decay on and off."""
    formula.check_twin(in_optimizer(card))


@check("transform")
def check_config_round_trip(card: Card) -> None:
    """The config holds every argument, survives JSON, and rebuilds the same transform, alone and in an optimizer."""
    for case in card.cases:
        transform = card.make(**case)
        assert isinstance(transform, Transform), f"{card.name} must be a Transform, got {transform!r}"
        written = json.dumps(keras.saving.serialize_keras_object(transform))
        assert keras.saving.deserialize_keras_object(json.loads(written)) == transform, written
        optimizer = SGD(transforms=[transform])
        written = json.dumps(keras.optimizers.serialize(optimizer))
        assert keras.optimizers.deserialize(json.loads(written)).transforms == (transform,), written


@check("transform")
@float64()
def check_hyperparameters(card: Card) -> None:
    """Every number can be a schedule or a variable, and is read in every step."""
    for case in card.cases:
        for field in dataclasses.fields(card.make):  # type: ignore[arg-type]
            value = case.get(field.name, field.default)
            if isinstance(value, float) and value:
                _drive(card, case, field.name, (value, 0.5 * value))


def _drive(card: Card, case: Mapping[str, Any], name: str, pair: tuple[float, float]) -> None:
    shapes, card = ((2, 3), (4,)), in_optimizer(card)
    grads = [[100 * g for g in arrays] for arrays in problems.gradients(4, shapes)]  # beyond most limits
    try:
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], list(pair))
        card.make(**{**case, name: schedule})
    except (TypeError, ValueError):  # it is declared to be no schedule
        return

    def trained(value: Any, then: Any) -> list[np.ndarray]:
        """After two steps with the one value and two with the other, or once the other has been called."""
        optimizer, weights = card.make(**{**case, name: value}), problems.variables(problems.start(shapes))
        for step, arrays in enumerate(grads):
            if step == 2 and callable(then):
                then()
            elif step == 2:
                state, optimizer = problems.state_of(optimizer), card.make(**{**case, name: then})
                optimizer.build(weights)
                optimizer.load_own_variables(state)
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        return [numbers(w) for w in weights]

    expected = trained(*pair)
    assert_close(trained(schedule, lambda: None), expected, rtol=1e-6, what=f"{case}: {name} from a schedule,")
    variable = keras.Variable(pair[0], dtype="float64", trainable=False)
    got = trained(variable, lambda: variable.assign(pair[1]))
    assert_close(got, expected, rtol=1e-6, what=f"{case}: {name} from a variable,")


@check("transform")
def check_dtypes(card: Card) -> None:
    """Weights in half precision keep their dtype and are as in float64, to their resolution."""
    gradients.check_dtypes(in_optimizer(card))


@check("transform")
def check_missing_gradient(card: Card) -> None:
    """A parameter without a gradient stays as it is, and does not count in sums over the model."""
    card = in_optimizer(card)
    grads: list[list[Any]] = [list(arrays) for arrays in problems.gradients(4)]
    for step, arrays in enumerate(grads):
        arrays[1 + step % 2] = None
    with float64():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
            optimizer = card.make(**card.cases[-1])
            got = problems.train(optimizer, grads)
        told = _weights_of(problems.start())
        twin = card.twin(problems.start(), grads, told, weight_decay=[0.0] * len(told), **_own(card.cases[-1]))  # type: ignore[misc]
        for step, (a, b) in enumerate(zip(got, twin, strict=True)):
            assert_close(a, b, what=f"step {step},")


def _own(case: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in case.items() if name != "learning_rate"}


def _weights_of(values: list[np.ndarray]) -> list[Any]:
    variables = problems.variables(values)
    return Places(variables, None).weights(variables)


@check("transform")
@float64()
def check_zero(card: Card) -> None:
    """Gradients of zero leave the weights finite, and without momentum where they are."""
    card = in_optimizer(card)
    grads = [[np.zeros_like(p) for p in problems.start()] for _ in range(2)]
    for case in card.cases:
        got = problems.train(card.make(**case), grads)[-1]
        assert_close(got, problems.start(), rtol=0, what=f"{case},")


@check("transform", engine=True)
def check_modes_agree(card: Card) -> None:
    """Eager, graph and (of the last case) XLA give the same weights, and a step is traced once."""
    execution.check_modes_agree(in_optimizer(card))


@check("transform", engine=True)
def check_packing(card: Card) -> None:
    """Packed equals unpacked, and the order of the variables does not matter."""
    execution.check_packing(in_optimizer(card))


@check("transform", engine=True)
def check_accumulation(card: Card) -> None:
    """K micro-batches, or fewer at the end, equal one batch: it acts on the mean gradient."""
    execution.check_accumulation(in_optimizer(card))


@check("transform", only_on="tensorflow", because="elsewhere the gradients of embeddings are dense")
@float64()
def check_rows(card: Card) -> None:
    """Gradients of some rows of an embedding are changed as those of all rows, of which the others are zeros."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    values, rows = rng.normal(size=(4, 3)), [0, 2, 0, 5]
    for case in card.cases:
        ends = []
        for lazy in (True, False):
            layer = keras.layers.Embedding(7, 3, dtype="float64")
            model = keras.Sequential([layer, keras.layers.Flatten(), keras.layers.Dense(1, dtype="float64")])
            model.build((None, 2))
            for v, value in zip(model.trainable_variables, problems.start([(7, 3), (6, 1), (1,)]), strict=True):
                v.assign(value)
            grad = tf.IndexedSlices(tf.constant(values), tf.constant(rows), tf.constant([7, 3]))
            optimizer = SGD(0.1, transforms=[card.make(**case)])
            optimizer.pack_below = 0  # a packed table is updated as a whole
            optimizer.build(model)
            others = [tf.ones_like(v) for v in model.trainable_variables[1:]]
            for _ in range(2):
                optimizer.apply([grad if lazy else tf.convert_to_tensor(grad), *others])
            ends.append([numbers(v) for v in model.trainable_variables])
        assert_close(ends[0], ends[1], rtol=1e-12, what=f"{case},")

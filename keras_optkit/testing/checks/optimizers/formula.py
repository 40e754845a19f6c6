"""The formula: twins, hyperparameters, decay, clipping, learning."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.kernels import KERNEL, VECTOR, by_shape
from keras_optkit.optimizers.rule import Weight, Wrapper, rule_for, slots_of
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, by_twin, made
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import float64, numbers


@check("optimizer")
@float64()
def check_twin(card: Card) -> None:
    """Equals its NumPy twin for 20 steps in float64, several shapes, every case, weight decay on and off.

    There is decay in the last case, of matrices only; a rule with a decay of its own, or a single case, has both.
    """
    grads = problems.gradients(20)
    mode = "xla" if keras.config.backend() == "jax" else "graph"  # takes less than operation by operation
    for case, decay in itertools.product(card.cases, (None, 0.1)):
        optimizer, last = made(card, case, weight_decay=decay), case is card.cases[-1]
        both = optimizer.rule.handles_decay or len(card.cases) == 1
        if not both and last != (decay is not None):
            continue
        trajectory = problems.train(optimizer, grads, mode=mode)
        expected = by_twin(card, case, optimizer, grads)
        for i, path in enumerate(zip(*expected, strict=True)):
            assert_close([step[i] for step in trajectory], path, what=f"{case} decay {decay}, parameter {i}, at")


@check("optimizer")
@float64()
def check_hyperparameters(card: Card) -> None:
    """Every hyperparameter of the rule, and the weight decay, can be a schedule or a variable: as if it were set."""
    done = set()
    for case in card.cases:
        rule = made(card, case).rule
        given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
        for name, value in {**given, "weight_decay": 0.5}.items():
            pair = None if name in done else _two_values(rule, name, value)
            if pair is not None:
                done.add(name)
                _drive(card, case, name, pair)


def _two_values(rule: Any, name: str, value: Any) -> tuple[float, float] | None:
    """The number of a field and another one that it may be, in digits that float32 has; None if there are none.

    A number of 0 may switch state off, and then cannot be driven.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return None
    pair = float(np.float32(value)), float(np.float32(0.75 * value))
    if name == "weight_decay":
        return pair
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], list(pair))
    try:
        rules = [dataclasses.replace(rule, **{name: each}) for each in (*pair, schedule)]
    except (TypeError, ValueError):  # it is declared to be no schedule, or to be a whole number
        return None
    known = [
        Weight(shape, role=KERNEL, axes=by_shape(len(shape))) if len(shape) > 1 else Weight(shape, role=VECTOR)
        for shape in problems.SHAPES
    ]
    slots = {str([list(slots_of(rule_for(each, w), w)) for w in known]) for each in rules}
    return pair if len(slots) == 1 else None


def _drive(card: Card, case: Mapping[str, Any], name: str, pair: tuple[float, float]) -> None:
    """Four updates, the first two with the one value, the others with the other."""
    shapes = ((2, 3), (4,))
    grads = problems.gradients(4, shapes)

    def trained(value: Any, change: Callable[[Any], None]) -> list[np.ndarray]:
        optimizer, weights = made(card, case), problems.variables(problems.start(shapes))
        setattr(optimizer, name, value)
        for place, arrays in enumerate(grads):
            if place == 2:
                change(optimizer)
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        return [numbers(w) for w in weights]

    expected = trained(pair[0], lambda optimizer: setattr(optimizer, name, pair[1]))
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], list(pair))
    assert_close(trained(schedule, lambda _: None), expected, what=f"{case}: {name} from a schedule,")
    variable = keras.Variable(pair[0], dtype="float64", trainable=False)
    assert_close(
        trained(variable, lambda _: variable.assign(pair[1])), expected, what=f"{case}: {name} from a variable,"
    )


@check("optimizer", engine=True)
@float64()
def check_decay_mask(card: Card) -> None:
    """The "auto" mask decays matrices only, "all" decays everything; each by η λ θ more than without decay.

    Of rules with a decay of their own, which `twin` checks, only which parameters are decayed.
    """
    values, rule = problems.start(), made(card).rule
    if rule.handles_decay and not isinstance(rule, Wrapper):
        _decays_of_its_own(card, values)
        return
    grads = problems.gradients(1)
    plain = problems.train(made(card, weight_decay=None), grads)[-1]
    rate = float(made(card).learning_rate)
    for mask in ("auto", "all"):
        decayed = problems.train(made(card, weight_decay=0.1, decay_mask=mask), grads)[-1]
        expected = [
            w - (rate * 0.1 * p if mask == "all" or p.ndim > 1 else 0) for w, p in zip(plain, values, strict=True)
        ]
        assert_close(decayed, expected, what=mask)


def _decays_of_its_own(card: Card, values: list[np.ndarray]) -> None:
    """Each parameter by itself, since a decay may count in sums over the model.

    And two updates: a first one may move nothing, or by the sign of the gradient only.
    """
    grads = problems.gradients(2)
    for i, p in enumerate(values):
        if p.size == 1:  # steps that are scaled to a scalar hide it
            continue
        mine = [[arrays[i]] for arrays in grads]
        plain = problems.train(made(card, weight_decay=None), mine, values=[p])[-1][0]
        for mask in ("auto", "all"):
            decayed = problems.train(made(card, weight_decay=0.1, decay_mask=mask), mine, values=[p])[-1][0]
            applies = p.size > 1 and (mask == "all" or p.ndim > 1)
            assert applies != np.array_equal(plain, decayed), f"{mask}: shape {p.shape}"


@check("optimizer", unless={"hessian_vector"}, engine=True)  # products are not clipped
@float64()
def check_clipping(card: Card) -> None:
    """Each form of clipping equals clipping the gradients beforehand."""
    grads = problems.gradients(3)

    def clipped(form: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if form == "clipvalue":
            return [np.clip(g, -0.5, 0.5) for g in arrays]
        norms = [np.linalg.norm(g) for g in arrays]
        if form == "global_clipnorm":
            norms = [np.linalg.norm(norms)] * len(arrays)
        return [g * min(1.0, 0.5 / norm) if norm else g for g, norm in zip(arrays, norms, strict=True)]

    for form in ("clipvalue", "clipnorm", "global_clipnorm"):
        got = problems.train(made(card, **{form: 0.5}), grads)
        expected = problems.train(made(card), [clipped(form, arrays) for arrays in grads])
        assert_close(got[-1], expected[-1], what=form)


@check("optimizer")
def check_learns(card: Card) -> None:
    """The loss of a small regression falls; the last and weakest check."""
    x, y = problems.regression()
    model = problems.network()
    model.compile(made(card, learning_rate=0.05), loss="mse")
    losses = model.fit(x, y, batch_size=16, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0], f"loss went from {losses[0]} to {losses[-1]}"

"""The comparison of an optimizer with its reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import packages_distributions, version
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.registry import cards
from keras_optkit.testing import problems
from keras_optkit.testing.parity import differentiated, here, runs
from keras_optkit.testing.parity.problem import Arrays, Parts
from keras_optkit.testing.parity.process import elsewhere
from keras_optkit.testing.parity.reference import Reference
from keras_optkit.testing.tools import float64, numbers

STEPS = 100


@dataclass(frozen=True)
class Comparison:
    """One run of ours and one of the reference.

    Attributes:
        reference: The reference.
        case: Our arguments.
        decay: The weight decay.
        dtype: The dtype that both compute in.
    """

    reference: Reference
    case: Mapping[str, Any]
    decay: float
    dtype: str

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={value}" for name, value in self.case.items())
        return f"{self.reference.optimizer}({arguments}) decay {self.decay} {self.dtype}"

    @property
    def tolerance(self) -> float:
        """The largest error allowed."""
        return self.reference.tolerance[self.dtype]

    def error(self, steps: int = STEPS) -> float:
        """The largest difference between the weights, relative to the largest element of the parameter."""
        with float64():
            return self._error(steps)

    def _error(self, steps: int) -> float:
        reference, model = self.reference, Parts(self.dtype)
        variables = model.trainable_variables
        grads: Any = model.coefficients(steps) if reference.needs else model.gradients(steps)
        optimizer = self._ours()
        places = list(range(len(variables)))
        if reference.only is not None:
            rows = optimizer.explain(model).rows
            places = [i for i in places if rows[i].rule == reference.only]

        def seen(values: Any) -> Any:
            if isinstance(values, tuple):  # of coefficients
                return tuple(map(seen, values))
            return [model.seen(variables[i], values[i], reference.view) for i in places]

        if reference.needs == "hessian_vector":
            grads = [(*each, v) for each, v in zip(grads, self._vectors(model, optimizer, steps), strict=True)]
        config = optimizer.get_config()
        arguments = reference.translated(config | {"weight_decay": config["weight_decay"] or 0.0})
        task = (reference.implementation, arguments, seen(model.start()), [seen(g) for g in grads], self.dtype)
        run = reference.run or "usual"
        if hasattr(here, run):
            found, besides = getattr(here, run)(*task)
        else:
            of = differentiated if reference.needs else runs
            found, besides = elsewhere(getattr(of, run), *task, reference.evaluated)
        inject = reference.inject
        got = self._trained(grads, None if inject is None else inject([variables[i] for i in places], besides))
        expected = found if reference.evaluated is None else [[*a, *b] for a, b in zip(found, besides, strict=True)]
        each = len(variables)
        compared = places if reference.evaluated is None else [*places, *(each + i for i in places)]
        each_difference = [
            _difference(model.unseen(variables[i % each], theirs, reference.view), step[i])
            for step, other in zip(got, expected, strict=True)
            for i, theirs in zip(compared, other, strict=True)
        ]
        return float(np.max(each_difference))  # which keeps NaN, as `max` does not

    def _vectors(self, model: Parts, optimizer: Any, steps: int) -> list[Arrays]:
        """Our random vectors for each step."""
        found = []
        optimizer.build(model)
        for step in range(steps):
            optimizer.iterations.assign(step)
            found.append([np.array(v) for v in map(numbers, optimizer.hessian_vectors(model.trainable_variables))])
        return found

    def _ours(self) -> Any:
        card = _card(self.reference.optimizer)
        given = {"weight_decay": self.decay, "decay_mask": "all", **self.reference.ours, **self.case}
        return card.make(**given)

    def _stepper(self, model: Parts, mode: str) -> tuple[Any, Callable[[Any], None]]:
        """A new optimizer, and a function that makes one of its steps."""
        optimizer = self._ours()
        optimizer.build(model)
        if self.reference.needs:
            if self.reference.needs == "second_gradient":
                return optimizer, lambda problem: _perturbed_step(optimizer, problem, model)
            curved = partial(_curved_step, optimizer, model)
            if keras.config.backend() == "tensorflow" and mode == "graph":
                import tensorflow as tf

                curved = tf.function(curved, autograph=False)
            return optimizer, lambda problem: curved(
                *([ops.convert_to_tensor(x, self.dtype) for x in each] for each in problem[:2])
            )
        compiled = problems.stepper(optimizer, model.trainable_variables, mode)
        return optimizer, lambda grads: compiled([ops.convert_to_tensor(g, self.dtype) for g in grads])

    def _trained(self, grads: list[Any], injected: dict[str, Any] | None) -> list[Arrays]:
        """The weights after each step, and those to evaluate at, with the state saved and loaded in the middle."""
        model = Parts(self.dtype)
        for variable, value in zip(model.trainable_variables, model.start(), strict=True):
            variable.assign(value)
        # tracing takes as long as 50 steps, and with decompositions longer than 100
        mode = "eager" if len(grads) <= 50 or self._ours().rule.decomposes else "graph"
        optimizer, step = self._stepper(model, mode)
        trajectory = []
        for i, arrays in enumerate(grads):
            if i == len(grads) // 2 or (i == 1 and injected):
                state = problems.state_of(optimizer) | ((injected or {}) if i == 1 else {})
                optimizer, step = self._stepper(model, mode)
                optimizer.load_own_variables(state)
            step(arrays)
            weights = _values(model)
            if self.reference.evaluated is not None:
                optimizer.swap_weights(evaluating=True)
                weights += _values(model)
                optimizer.swap_weights(evaluating=False)
            trajectory.append(weights)
        return trajectory


def _perturbed_step(optimizer: Any, problem: Any, model: Parts) -> None:
    variables = model.trainable_variables
    a, b = ([ops.convert_to_tensor(x, model.dtype) for x in each] for each in problem)

    def gradient() -> list[Any]:
        return [x * y * ops.cos(y * ops.convert_to_tensor(p)) for p, x, y in zip(variables, a, b, strict=True)]

    with optimizer.perturbed(gradient(), variables):
        second = gradient()
    optimizer.apply(second, variables)


def _curved_step(optimizer: Any, model: Parts, a: list[Any], b: list[Any]) -> None:
    """One with the Hessian of `sum(a sin(b θ)) + (sum c θ)²`, where c is a tenth of b."""
    variables = model.trainable_variables
    c = [0.1 * y for y in b]
    weights = [ops.convert_to_tensor(p) for p in variables]
    vectors = optimizer.hessian_vectors(variables)

    def along(values: list[Any]) -> Any:
        return 2 * sum(ops.sum(z * value) for z, value in zip(c, values, strict=True))

    grads = [x * y * ops.cos(y * p) + along(weights) * z for p, x, y, z in zip(weights, a, b, c, strict=True)]
    products = [
        -x * y * y * ops.sin(y * p) * v + along(vectors) * z
        for p, x, y, z, v in zip(weights, a, b, c, vectors, strict=True)
    ]
    with optimizer.given_products(products, variables):
        optimizer.apply(grads, variables)


def _values(model: Parts) -> Arrays:
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def _difference(theirs: np.ndarray, ours: np.ndarray) -> float:
    return float(np.max(np.abs(ours - theirs)) / (np.max(np.abs(theirs)) or 1.0))


@cache
def _card(name: str) -> Any:
    (card,) = (card for card in cards("optimizer", package=None) if card.name == name)
    return card


def comparisons(reference: Reference) -> Iterator[Comparison]:
    """All runs of a reference: its cases, or those of the card, each without and with decay, in both dtypes."""
    cases = reference.cases if reference.cases is not None else _card(reference.optimizer).cases
    for dtype in reference.tolerance:
        for case in cases:
            for decay in reference.decays:
                yield Comparison(reference, case, decay, dtype)


def installed(reference: Reference) -> str:
    """The name of a reference with the version of its package."""
    module, _, name = reference.implementation.partition(":")
    distributions = packages_distributions().get(module.partition(".")[0], [module])
    return f"{module}.{name} {version(distributions[0]).partition('+')[0]}"

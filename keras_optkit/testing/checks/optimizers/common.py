"""What the checks of optimizers have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_optkit.optimizers.groups import Places
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import contributes
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.conformance import traits, twin_of
from keras_optkit.testing.twins.optimizers import TWINS

_COMMON = ("clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps", "use_ema", "ema_momentum")


def assert_close(got: Any, expected: Any, rtol: float = 1e-10, what: str = "") -> None:
    """Raises unless two lists of arrays are close, and says which is not."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=f"{what} variable {i}")


def assert_equal(got: Any, expected: Any, what: str = "") -> None:
    """Raises unless two lists of arrays are bitwise the same, and says which is not."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{what} variable {i}")


def made(card: Card, case: Mapping[str, Any] | None = None, /, **more: Any) -> Optimizer:
    """The optimizer of a card, by its first case or another one, with more arguments."""
    return card.make(**{**(card.cases[0] if case is None else case), **more})


def with_ema(card: Card, **more: Any) -> dict[str, Any]:
    """`use_ema=True` and more, or nothing for optimizers that refuse it, since they average by themselves."""
    return {} if "averages" in traits(card) else {"use_ema": True, **more}


def is_decayed(optimizer: Optimizer, shape: tuple[int, ...]) -> bool:
    """Whether a parameter that no layer is known of is decayed."""
    return optimizer.decay_mask == "all" or len(shape) > 1


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    """All elements of some arrays."""
    return np.concatenate([np.ravel(a) for a in arrays])


def by_twin(card: Card, case: Mapping[str, Any], optimizer: Optimizer, grads: list[Any]) -> list[list[np.ndarray]]:
    """The weights after each step by the twin.

    A twin is of one parameter, or, of a rule with sums over the whole model, of all of them at once, as one with the
    attribute `of_model` is. If it has an argument `weight`, it is told what the rule is told about the parameter.
    """
    twin = twin_of(card, TWINS)
    arguments = {k: v for k, v in case.items() if k not in (*_COMMON, "decay_mask", "weight_decay")}
    start = problems.start()
    decays = [optimizer.weight_decay if is_decayed(optimizer, p.shape) else 0.0 for p in start]
    decays = [decay or 0.0 for decay in decays]
    weights = Places(problems.variables(start), None).weights(problems.variables(start))
    told = {"weight": weights} if "weight" in inspect.signature(twin).parameters else {}
    if contributes(optimizer.rule) or hasattr(twin, "of_model"):
        return list(twin(start, grads, weight_decay=decays, **told, **arguments))
    paths = [
        list(
            twin(
                p,
                [g[i] for g in grads],
                weight_decay=decays[i],
                **{name: each[i] for name, each in told.items()},
                **arguments,
            )
        )
        for i, p in enumerate(start)
    ]
    return [list(step) for step in zip(*paths, strict=True)]

"""What `TrainingMonitor` shows of rules that find their learning rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.engine.plan import RuleId, with_routes
from keras_optkit.optimizers.of_model import innermost
from keras_optkit.optimizers.rule import estimates

Tensor = Any

_ESTIMATE = "estimate"


def names(optimizer: Any) -> list[str]:
    """The names of the values that `watched` is to return."""
    return [f"{_ESTIMATE}{place}" for _, place, _ in _estimating(optimizer)]


def watched(optimizer: Any) -> Callable[[], dict[str, Tensor]]:
    """A function that returns the estimates used in the update between the two calls."""
    parts = {id(part): part.watched_estimates() for part, *_ in _estimating(optimizer)}

    def read() -> dict[str, Tensor]:
        found = {key: estimates() for key, estimates in parts.items()}
        return {f"{_ESTIMATE}{place}": found[id(part)][rule] for part, place, rule in _estimating(optimizer)}

    return read


def effective_rates(scalars: Mapping[str, float]) -> dict[str, float]:
    """The learning rates of an optimizer times the estimates that its rules have used."""
    found = {}
    for name, value in scalars.items():
        what, *place = name.split("/")
        if what == _ESTIMATE:  # of an optimizer of several, the place is first that of the one inside
            rate = "learning_rate" if "learning_rate" in scalars else f"learning_rate/{place[0]}"
            found["/".join(["effective_rate", *place])] = value * scalars[rate]
    return found


def _estimating(optimizer: Any) -> Iterator[tuple[Optimizer, str, RuleId]]:
    """Each rule that finds its rate, with its optimizer and what tells it from the others: "/group_1", "/0"."""
    inside = innermost(optimizer)
    for place, part in enumerate(inside):
        if isinstance(part, Optimizer):
            for number, route in (r for r, x in with_routes(part._rules).items() if estimates(x.rule)):
                path = [str(place)] * (len(inside) > 1) + [f"group_{number}"] * bool(number) + [route] * bool(route)
                yield part, "".join(f"/{name}" for name in path), (number, route)

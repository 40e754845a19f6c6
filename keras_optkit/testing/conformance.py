"""The conformance suite: checks that every registered algorithm passes, for use in anybody's pytest run.

A check is a function of one card that raises when the card's algorithm breaks a promise. Which checks apply follows
from the card's kind and tags. An entry in `known_failures` is an expected failure with a reason, and strict: once the
check passes, the entry itself is the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from keras_optkit.registry import Card, cards

Function = Callable[[Card], None]


@dataclass(frozen=True)
class Check:
    """A named promise and the cards that it applies to."""

    name: str
    kind: str
    function: Function
    requires: frozenset[str]
    unless: frozenset[str]

    def applies(self, card: Card) -> bool:
        """Whether `card` makes this promise."""
        return self.kind == card.kind and self.requires <= card.tags and not self.unless & card.tags

    def __call__(self, card: Card) -> None:
        """Raises if the promise is broken, or if a known failure has stopped failing."""
        reason = card.known_failures.get(self.name)
        if reason is None:
            self.function(card)
            return
        try:
            self.function(card)
        except Exception:  # any way of failing is the expected failure
            return
        raise AssertionError(f"{card.name} passes {self.name}; remove its known failure ({reason!r}).")


_CHECKS: dict[tuple[str, str], Check] = {}


def check(kind: str, *, requires: Iterable[str] = (), unless: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Decorator: adds a check for the cards of `kind` that have all tags in `requires` and none in `unless`."""

    def add(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        if (kind, name) in _CHECKS:
            raise ValueError(f"A check {name!r} for {kind}s exists already.")
        _CHECKS[kind, name] = Check(name, kind, function, frozenset(requires), frozenset(unless))
        return function

    return add


def checks_for(card: Card) -> tuple[Check, ...]:
    """The checks that apply to `card`. A known failure that names no such check is an error."""
    from keras_optkit.testing import checks  # noqa: F401  (registers the checks)

    found = tuple(c for c in _CHECKS.values() if c.applies(card))
    unknown = set(card.known_failures) - {c.name for c in found}
    if unknown:
        raise ValueError(f"{card.name}: known_failures names no check that applies: {sorted(unknown)}.")
    return found


def conformance(which: Iterable[Card] | None = None) -> Any:
    """A pytest decorator that runs a test once for every card and check that applies.

    Args:
        which: The cards to test; every card of keras_optkit when left out.

    Example:
    ```python
    import keras_optkit as ok


    @ok.testing.conformance(ok.cards("initializer"))
    def test_conformance(card, check):
        check(card)
    ```
    """
    import pytest

    pairs = [(card, c) for card in (cards() if which is None else which) for c in checks_for(card)]
    return pytest.mark.parametrize(
        ("card", "check"), [pytest.param(card, c, id=f"{card.kind}-{card.name}-{c.name}") for card, c in pairs]
    )


def failures(card: Card) -> dict[str, Exception]:
    """Runs every check on `card` without pytest and returns those that failed, by name."""
    failed: dict[str, Exception] = {}
    for c in checks_for(card):
        try:
            c(card)
        except Exception as error:  # a check may fail in any way; the caller reads which
            failed[c.name] = error
    return failed

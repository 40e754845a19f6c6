"""The conformance suite: checks that every registered algorithm passes, for use in anybody's pytest run.

A check is a function of one card that raises when the card's algorithm breaks a promise. Which checks apply follows
from the card's kind and tags, and for those that exist on some backends only, with a reason, from the backend. An entry
in `known_failures` is an expected failure with a reason, and strict: once the check passes, the entry itself is the
error.

Checks of the engine, which is the same for all optimizers, need not run on each of them: in the package's own tests
they run on one card of each profile, which is what the engine can see of a rule. `python -m keras_optkit.testing` runs
all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras

from keras_optkit import arguments
from keras_optkit.kernels import KERNEL, by_shape
from keras_optkit.optimizers.provided import fixed_gradients
from keras_optkit.optimizers.rule import Weight, contributes, layout_of, rule_for, slots_of, treats_rows_alone
from keras_optkit.optimizers.slots import Fill, FromWeights
from keras_optkit.registry import KINDS, Card, cards

Function = Callable[[Card], None]

BACKENDS = ("tensorflow", "jax", "torch", "numpy", "openvino")


@dataclass(frozen=True)
class Check:
    """A named promise and the cards that it applies to.

    Attributes:
        name: Its name, unique among the checks of a kind.
        kind: The kind of cards it is for.
        function: Raises for a card that breaks the promise.
        requires: Traits that a card must have; see `traits`.
        unless: Traits that a card must not have.
        only_on: The backends that it exists on; empty for all.
        because: Why only on those.
        engine: Whether it tests the engine around the algorithm, which is the same for all cards of one profile.
    """

    name: str
    kind: str
    function: Function
    requires: frozenset[str]
    unless: frozenset[str]
    only_on: tuple[str, ...] = ()
    because: str = ""
    engine: bool = False

    def applies(self, card: Card) -> bool:
        """Whether `card` makes this promise, on the backends that the check exists on."""
        if self.kind != card.kind:
            return False
        found = traits(card) if self.requires or self.unless else frozenset()
        return self.requires <= found and not self.unless & found

    def exists_on(self, backend: str) -> bool:
        """Whether there is this check on a backend."""
        return not self.only_on or backend in self.only_on

    def __call__(self, card: Card) -> None:
        """Raises if the promise is broken, or if a known failure has stopped failing."""
        reason = card.known_failures.get(self.name)
        function = fixed_gradients()(self.function)
        if reason is None:
            function(card)
            return
        try:
            function(card)
        except Exception:  # any way of failing is the expected failure
            return
        raise AssertionError(f"{card.name} passes {self.name}; remove its known failure ({reason!r}).")


_CHECKS: dict[tuple[str, str], Check] = {}


def check(
    kind: str,
    *,
    requires: Iterable[str] = (),
    unless: Iterable[str] = (),
    only_on: str | Iterable[str] = (),
    because: str = "",
    engine: bool = False,
) -> Callable[[Function], Function]:
    """Decorator: adds a check for the cards of `kind` that have all traits in `requires` and none in `unless`.

    Args:
        kind: The kind of cards it is for.
        requires: Traits that a card must have; see `traits`.
        unless: Traits that a card must not have.
        only_on: The backend, or the backends, that the check exists on; all when left out. On others it is not run.
        because: Why only on those; needed with `only_on`, and only there.
        engine: Whether it tests the engine around the algorithm, which is the same for all cards of one profile; see
            `profile`.

    Raises:
        ValueError: For a second check of that name, an unknown backend, or one of `only_on` and `because` alone.
    """
    backends = (only_on,) if isinstance(only_on, str) else tuple(only_on)
    for backend in backends:
        arguments.choice("only_on", backend, BACKENDS)
    if bool(backends) != bool(because):
        raise ValueError(f"only_on and because must be given together, got {only_on=} and {because=}.")

    def add(function: Function) -> Function:
        name = function.__name__.removeprefix("check_")
        if (kind, name) in _CHECKS:
            raise ValueError(f"A check {name!r} for {kind}s exists already.")
        _CHECKS[kind, name] = Check(
            name, kind, function, frozenset(requires), frozenset(unless), backends, because, engine
        )
        return function

    return add


def checks_for(card: Card, backend: str | None = None) -> tuple[Check, ...]:
    """The checks that apply to `card`. A known failure that names no such check on any backend is an error.

    Args:
        card: The card.
        backend: Name of a backend; the present one when left out.
    """
    from keras_optkit.testing import checks  # noqa: F401  (registers the checks)

    backend = keras.config.backend() if backend is None else arguments.choice("backend", backend, BACKENDS)
    everywhere = [c for c in _CHECKS.values() if c.applies(card)]
    unknown = set(card.known_failures) - {c.name for c in everywhere}
    if unknown:
        raise ValueError(f"{card.name}: known_failures names no check that applies: {sorted(unknown)}.")
    return tuple(c for c in everywhere if c.exists_on(backend))


def not_on(backend: str, kind: str | None = None) -> dict[str, str]:
    """The checks that do not exist on a backend, `"kind-name"` to the reason; of all kinds, or of one.

    Args:
        backend: Name of a backend.
        kind: A kind of cards; all when left out.
    """
    from keras_optkit.testing import checks  # noqa: F401  (registers the checks)

    arguments.choice("backend", backend, BACKENDS)
    if kind is not None:
        arguments.choice("kind", kind, KINDS)
    return {
        f"{c.kind}-{c.name}": c.because for c in _CHECKS.values() if kind in (None, c.kind) and not c.exists_on(backend)
    }


_TRAITS: dict[int, tuple[Card, frozenset[str]]] = {}


def traits(card: Card) -> frozenset[str]:
    """What chooses the checks of a card: its tags and, of an optimizer, what its rule says of itself.

    That is the rule's layout, "rows" if rows of embeddings are updated alone, "averages", and what it `needs`.
    """
    if id(card) not in _TRAITS:
        found = card.tags
        if card.kind == "optimizer":
            rule = card.make(**card.cases[0]).rule
            alone = treats_rows_alone(rule) and rule.combination() is None
            found |= {layout_of(rule), *rule.needs, *(["averages"] * rule.averages), *(["rows"] * alone)}
        _TRAITS[id(card)] = card, found
    return _TRAITS[id(card)][1]


def twin_of(card: Card, known: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The NumPy twin of a card, or that of its name.

    Raises:
        ValueError: If there is none.
    """
    if card.twin is None and card.name not in known:
        raise ValueError(
            f"{card.name} needs a NumPy twin to be compared with: give its card twin=..., in the form that "
            f"keras_optkit.testing.twins.{card.kind}s describes."
        )
    return card.twin or known[card.name]


class Profile(NamedTuple):
    """What the engine can see of an algorithm.

    Attributes:
        traits: Those of an optimizer's rule that the engine goes another way by; of a transform what it changes; for
            anything else, its name.
        parts: What the engine has to do besides: the kinds of values that state starts as, sums over the model, routes.
    """

    traits: tuple[Any, ...]
    parts: frozenset[str] = frozenset()

    def covers(self, other: Profile) -> bool:
        """Whether checks of the engine need not run on the other one: there is less to do for it, but something."""
        return self.traits == other.traits and bool(other.parts) and other.parts < self.parts


def profile(card: Card) -> Profile:
    """What the engine can see of the algorithm of a card."""
    if card.kind == "transform":
        return Profile((card.kind, card.make(**card.cases[0]).changes))
    if card.kind != "optimizer":
        return Profile((card.kind, card.name))
    rule = card.make(**card.cases[0]).rule
    known = [slots_of(rule_for(rule, w), w) for w in _WEIGHTS]
    more = {
        "scalars": bool(rule.scalars()),
        "sums": contributes(rule),
        "first": rule.uses_first,
        "decomposes": rule.decomposes,
        "routes": any(rule.route(w) for w in _WEIGHTS),
        "different slots": known[0].keys() != known[1].keys(),
    }
    parts = {_kind(slot) for slots in known for slot in slots.values()} | {name for name, has in more.items() if has}
    traits = (layout_of(rule), rule.averages, rule.handles_decay)
    return Profile((*traits, *sorted(card.tags), *sorted(card.known_failures)), frozenset(parts))


#: A kernel and a vector, which rules may treat differently.
_WEIGHTS = (Weight((2, 3), role=KERNEL, axes=by_shape(2)), Weight((3,)))


def _kind(slot: Fill | FromWeights) -> str:
    return "function" if isinstance(slot, FromWeights) else "constant" if slot.shape is None else "shaped"


def one_of_each_profile(which: Iterable[Card]) -> list[Card]:
    """The cards whose optimizer has the least state of those of the same profile, in the given order.

    One whose profile is covered by another one's is left out.
    """
    found: dict[Profile, Card] = {}
    which = list(which)
    for card in sorted(which, key=_slots):
        found.setdefault(profile(card), card)
    chosen = [card for own, card in found.items() if not any(other.covers(own) for other in found)]
    return [card for card in which if card in chosen]


def _slots(card: Card) -> int:
    return len(slots_of(card.make(**card.cases[0]).rule, _WEIGHTS[0])) if card.kind == "optimizer" else 0


def conformance(which: Iterable[Card] | None = None) -> Any:
    """A pytest decorator that runs a test once for every card and check that applies.

    Args:
        which: The cards to test, with all checks. When left out, every card of keras_optkit, with the checks of the
            engine on one of each profile.

    Example:
    ```python
    import keras_optkit as ok


    @ok.testing.conformance(ok.cards("initializer"))
    def test_conformance(card, check):
        check(card)
    ```
    """
    import pytest

    chosen = list(cards() if which is None else which)
    for_engine = one_of_each_profile(chosen) if which is None else chosen
    pairs = [(card, c) for card in chosen for c in checks_for(card) if card in for_engine or not c.engine]
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

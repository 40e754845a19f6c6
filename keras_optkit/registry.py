"""The registry: one card for every public algorithm. Docs, conformance tests and the tuner read the cards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import keras

from keras_optkit import arguments

KINDS = ("optimizer", "transform", "schedule", "initializer", "regularizer", "layer", "callback")
PACKAGE = "keras_optkit"

_CARDS: dict[tuple[str, str], Card] = {}

Class = TypeVar("Class", bound=type)


def _frozen(mapping: Mapping[str, Any]) -> Mapping[str, Any]:
    return MappingProxyType(dict(mapping))


@dataclass(frozen=True, kw_only=True)
class Card:
    """The entry of one algorithm in the registry: where it comes from, how to build it, and what it claims.

    Attributes:
        name: Public name, the class's own.
        kind: One of `KINDS`.
        make: Builds an instance from keyword arguments; usually the class itself.
        paper: The source of the formula: an arXiv number, a book, or a sentence.
        parity: The independent implementation that the tests compare with, or "" where the formula is the reference.
        tags: Claims that choose which checks apply, e.g. `"elementwise"`.
        cases: Keyword arguments the conformance suite builds it with; the first should be the plain use.
        space: Default search space, hyperparameter name to `Float`, `Int`, `Bool` or `Choice`.
        twin: The same formula in plain NumPy, which the suite compares with. Its form depends on the kind; see
            `keras_optkit.testing`.
        known_failures: Check name to reason. Strict: a check listed here that passes is an error.
    """

    name: str
    kind: str
    make: Callable[..., Any]
    paper: str = ""
    parity: str = ""
    tags: frozenset[str] = frozenset()
    cases: tuple[Mapping[str, Any], ...] = (MappingProxyType({}),)
    space: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    twin: Callable[..., Any] | None = None
    known_failures: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        arguments.choice("kind", self.kind, KINDS)
        if not callable(self.make):
            raise TypeError(f"make must be callable, got {self.make!r}.")

    def __repr__(self) -> str:
        return f"Card({self.kind} {self.name})"


def register(
    kind: str,
    *,
    package: str = PACKAGE,
    paper: str = "",
    parity: str = "",
    tags: Iterable[str] = (),
    cases: Iterable[Mapping[str, Any]] = ({},),
    space: Mapping[str, Any] | None = None,
    twin: Callable[..., Any] | None = None,
    known_failures: Mapping[str, str] | None = None,
) -> Callable[[Class], Class]:
    """Class decorator: registers the class with Keras as `"package>Name"` and files a card for it.

    The class is afterwards loadable from saved models without `custom_objects`, usable by name
    (`compile(optimizer="keras_optkit>AdamW")`), listed by `cards()` and driven by the conformance suite.
    """

    def decorate(cls: Class) -> Class:
        if (package, cls.__name__) in _CARDS:
            known = _CARDS[package, cls.__name__].make
            raise ValueError(f"{package}>{cls.__name__} is registered already, by {known!r}.")
        keras.saving.register_keras_serializable(package=package, name=cls.__name__)(cls)
        _CARDS[package, cls.__name__] = Card(
            name=cls.__name__,
            kind=kind,
            make=cls,
            paper=paper,
            parity=parity,
            tags=frozenset(tags),
            cases=tuple(_frozen(case) for case in cases),
            space=_frozen(space or {}),
            twin=twin,
            known_failures=_frozen(known_failures or {}),
        )
        return cls

    return decorate


def cards(kind: str | None = None, *, package: str | None = PACKAGE) -> tuple[Card, ...]:
    """The registered cards in order of name; all kinds, or one. `package=None` lists third-party cards too."""
    if kind is not None:
        arguments.choice("kind", kind, KINDS)
    found = [card for (owner, _), card in _CARDS.items() if kind in (None, card.kind) and package in (None, owner)]
    return tuple(sorted(found, key=lambda card: (card.kind, card.name)))

"""Assertions that the checks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def refuses(make: Callable[..., Any], name: str, value: Any, allowed: str, **others: Any) -> None:
    """Asserts that `make(name=value)` raises ValueError or TypeError naming the argument, the value and `allowed`."""
    try:
        make(**{**others, name: value})
    except (TypeError, ValueError) as error:
        message = str(error)
        assert name in message, f"the message does not name the argument {name!r}: {message}"
        assert repr(value) in message or str(value) in message, f"the message does not show {value!r}: {message}"
        assert allowed in message, f"the message does not say what is allowed ({allowed}): {message}"
    else:
        raise AssertionError(f"{name}={value!r} was accepted")

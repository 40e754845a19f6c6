"""Checks of constructor arguments; every message names the argument, the value and what is allowed."""

from __future__ import annotations

import difflib
import inspect
import math
import os
import re
from collections.abc import Collection, Iterable
from datetime import timedelta
from numbers import Integral, Real
from typing import Any

#: The largest finite float32.
LARGEST = 3.4028234663852886e38


def real(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    closed: str = "both",
    optional: bool = False,
) -> Any:
    """Returns `value` if it is a finite real number between `low` and `high`, and raises otherwise.

    `closed` says which ends belong to the interval: "both", "left", "right" or "neither". With `optional`, None passes.
    NumPy scalars become Python numbers, so that configs stay JSON.
    """
    if value is None and optional:
        return None
    left = "[" if closed in ("both", "left") and low > -math.inf else "("
    right = "]" if closed in ("both", "right") and high < math.inf else ")"
    allowed = f"a finite number in {left}{low}, {high}{right}" + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    number = int(value) if isinstance(value, Integral) else float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(f"{name} must be {allowed}, at most {LARGEST} as float32 holds it, got {value!r}.")
    inside = (low <= number if left == "[" else low < number) and (number <= high if right == "]" else number < high)
    if not inside:
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return number


def integer(name: str, value: Any, low: int | None = None, high: int | None = None, *, optional: bool = False) -> Any:
    """Returns `value` as an int if it is a whole number between `low` and `high` (both included)."""
    if value is None and optional:
        return None
    bounds = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
    allowed = " ".join(["an integer", " and ".join(bounds)]).strip() + (" or None" if optional else "")
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {allowed}, got {value!r} of type {type(value).__name__}.")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")
    return number


def interval(name: str, value: Any) -> Any:
    """Returns `value` if it is `"epoch"`, an integer of at least 1, or a positive `timedelta`."""
    if isinstance(value, timedelta):
        if value <= timedelta(0):
            raise ValueError(f"{name} must be a positive timedelta, got {value!r}.")
        return value
    return choice(name, value, ("epoch",)) if isinstance(value, str) else integer(name, value, 1)


def boolean(name: str, value: Any) -> bool:
    """Returns `value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}.")
    return value


def path(name: str, value: Any) -> str:
    """Returns `value` as a string if it is the path of a file or directory."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise TypeError(
            f"{name} must be a path, a string or os.PathLike, got {value!r} of type {type(value).__name__}."
        )
    if not text or "\0" in text:
        raise ValueError(f"{name} must be a path, which is not empty and has no null character, got {value!r}.")
    return text


def pattern(name: str, value: Any, *, optional: bool = False) -> Any:
    """Returns `value` if it is a regular expression (or, with `optional`, None)."""
    if value is None and optional:
        return None
    wanted = f"a regular expression{' or None' * optional}"
    if not isinstance(value, str):
        raise TypeError(f"{name} must be {wanted}, got {value!r} of type {type(value).__name__}.")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"{name} must be {wanted}, got {value!r}: {error}.") from error
    return value


def choice(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Returns `value` if it is one of `allowed`."""
    if not any(value is known or _is_equal(value, known) for known in allowed):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.{near(value, allowed)}")
    return value


def _is_equal(value: Any, known: Any) -> bool:
    """Whether two values are equal, which arrays are to nothing here."""
    equal = value == known
    return isinstance(equal, bool) and equal


def seed(name: str, value: Any) -> Any:
    """Returns `value` if it is None or an integer that Keras can draw with."""
    return integer(name, value, 0, 2**32 - 1, optional=True)


def near(value: Any, allowed: Iterable[Any], cutoff: float = 0.6) -> str:
    """' Did you mean ...?' for a misspelt string, or an empty string."""
    matches = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=cutoff)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def without_arguments(name: str, function: Any) -> Any:
    """Returns `function` if it can be called without arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise TypeError(
            f"{name} must be a function without arguments if it is one, got {function!r}: {error}."
        ) from None
    except ValueError:  # a builtin, which does not say
        pass
    return function

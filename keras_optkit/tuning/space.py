"""A search space as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Float:
    """A real number between `low` and `high`, drawn uniformly or, with `log`, uniformly in its logarithm."""

    low: float
    high: float
    log: bool = False

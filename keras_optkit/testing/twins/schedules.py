"""NumPy twins of the schedules: `twin(step, **arguments) -> float`, written from the formula and nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np


def linear(step: int, initial: float, steps: int, final: float = 0.0) -> float:
    """A straight line through (0, initial) and (steps, final), flat afterwards."""
    return float(np.interp(step, [0, steps], [initial, final]))


def cosine(step: int, initial: float, steps: int, final: float = 0.0) -> float:
    """Half a period of a cosine, with the angle in degrees."""
    return float(final + (initial - final) * (1 + np.cos(np.deg2rad(180 * min(step, steps) / steps))) / 2)


def warmup(step: int, schedule: Any, steps: int, start: float = 0.0) -> float:
    """A straight line up to the first value of `schedule`, which then runs from its own step 0."""
    after = [float(schedule(k)) if callable(schedule) else schedule for k in (0, max(step - steps, 0))]
    return float(np.interp(step, [0, steps], [start, after[0]])) if step < steps else after[1]


def one_cycle(
    step: int,
    peak: float,
    steps: int,
    initial: float | None = None,
    final: float | None = None,
    pct_start: float = 0.3,
    anneal: str = "cosine",
    three_phase: bool = False,
) -> float:
    """The phases of Smith's policy as a table of knots; between two knots, a line or half a cosine."""
    initial = peak / 25 if initial is None else initial
    final = initial / 1e4 if final is None else final
    knots = [(0.0, initial), (pct_start * steps - 1, peak), (steps - 1.0, final)]
    if three_phase:
        knots.insert(2, (2 * pct_start * steps - 2, initial))
    times, values = zip(*knots, strict=True)
    position = np.interp(step, times, np.arange(len(times)))
    k = min(int(position), len(times) - 2)
    share = position - k if anneal == "linear" else np.sin((position - k) * np.pi / 2) ** 2
    return float(values[k] + (values[k + 1] - values[k]) * share)


#: The twin of each of the package's schedules, by the schedule's name.
TWINS = {"Linear": linear, "Cosine": cosine, "Warmup": warmup, "OneCycle": one_cycle}

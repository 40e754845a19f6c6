"""What can be read off a curve of losses over learning rates. Formulas alone, in NumPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Floats = np.ndarray

#: A fall of the smoothed loss below this many standard deviations of the losses around it does not count as one.
CLEAR = 1.5


def _discounted(values: Floats, beta: float) -> Floats:
    """f_i = Σ_{j <= i} β^(i-j) v_j."""
    sums, last = np.empty(len(values)), 0.0
    for i, value in enumerate(values):
        sums[i] = last = value + beta * last
    return sums


def running(losses: Floats, beta: float) -> Floats:
    """The bias-corrected exponential mean of each loss and those before it."""
    return _discounted(losses, beta) / _discounted(np.ones(len(losses)), beta)


def limit(losses: Floats, beta: float, factor: float) -> float:
    """The running mean above which a sweep has diverged: its least value m so far, and `(factor - 1) |m|` more."""
    least = float(np.min(running(losses, beta)))
    return least + (factor - 1) * abs(least)


def smooth(losses: Floats, beta: float) -> Floats:
    """The exponential mean to both sides, Σ_j β^|i-j| l_j / Σ_j β^|i-j|, which does not lag behind."""

    def both(values: Floats) -> Floats:
        return _discounted(values, beta) + _discounted(values[::-1], beta)[::-1] - values

    return both(losses) / both(np.ones(len(losses)))


def fall(smoothed: Floats) -> float:
    """How far the curve falls to its minimum."""
    lowest = int(np.argmin(smoothed))
    return float(np.max(smoothed[: lowest + 1]) - smoothed[lowest])


def falls(losses: Floats, smoothed: Floats) -> bool:
    """Whether the curve falls, for longer than a step and further than its noise would have it."""
    lowest = int(np.argmin(smoothed))
    noise = float(np.std((losses - smoothed)[: lowest + 1]))
    return lowest >= 2 and fall(smoothed) > CLEAR * noise


def _slopes(rates: Floats, smoothed: Floats) -> Floats:
    """Of the points between the first one and the minimum, over the logarithm of the rate."""
    lowest = int(np.argmin(smoothed))
    x = np.log(rates)
    return (smoothed[2 : lowest + 1] - smoothed[: lowest - 1]) / (x[2 : lowest + 1] - x[: lowest - 1])


def steepest(rates: Floats, smoothed: Floats) -> float:
    """Where the loss falls most over the logarithm of the rate, between the first point and the minimum."""
    return float(rates[1 + int(np.argmin(_slopes(rates, smoothed)))])


def minimum(rates: Floats, smoothed: Floats) -> float:
    """A tenth of the rate at the minimum."""
    return float(rates[int(np.argmin(smoothed))]) / 10


def valley(rates: Floats, smoothed: Floats) -> float:
    """One third into the run of points, of which each is below the one before, that falls furthest."""
    rises = np.flatnonzero(np.diff(smoothed) >= 0)
    begins, ends = np.append(0, rises + 1), np.append(rises, len(smoothed) - 1)
    furthest = int(np.argmax(smoothed[begins] - smoothed[ends]))
    begin, end = int(begins[furthest]), int(ends[furthest])
    return float(rates[begin + (end - begin) // 3])


def slide(rates: Floats, smoothed: Floats) -> float:
    """Down the rates from the minimum to the first where the loss falls at least a quarter as fast as it ever does."""
    slopes = _slopes(rates, smoothed)
    return float(rates[1 + int(np.flatnonzero(slopes <= np.min(slopes) / 4)[-1])])


RULES: dict[str, Callable[[Floats, Floats], float]] = {
    "steepest": steepest,
    "minimum": minimum,
    "valley": valley,
    "slide": slide,
}

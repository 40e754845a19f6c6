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


def polynomial(step: int, initial: float, steps: int, final: float = 0.0, power: float = 2.0) -> float:
    """The share that is left, to a power, as the distance from the end."""
    return final + (initial - final) * (max(steps - step, 0) / steps) ** power


def rex(step: int, initial: float, steps: int, final: float = 0.0) -> float:
    """The paper's (1 - x) / (1/2 + (1 - x) / 2), in whole numbers: 2 left / (T + left)."""
    left = max(steps - step, 0)
    return final + (initial - final) * 2 * left / (steps + left)


def exponential(step: int, initial: float, steps: int, decay_rate: float, final: float = 0.0) -> float:
    """A straight line in the logarithm."""
    return max(initial * float(np.exp(step / steps * np.log(decay_rate))), final)


def step(step: int, initial: float, steps: int, decay_rate: float = 0.1, final: float = 0.0) -> float:
    """As many factors as periods are over."""
    return max(initial * decay_rate ** (step // steps), final)


def piecewise(step: int, boundaries: list[int], values: list[float]) -> float:
    """The value behind the last boundary that was reached."""
    return values[int(np.searchsorted(boundaries, step, side="right"))]


def inverse_square_root(step: int, initial: float, steps: int) -> float:
    """Vaswani's s^-1/2 after a warm-up of `steps`, so s = step + steps, scaled to `initial` at its end."""
    return initial * float(np.sqrt(steps) * (step + steps) ** -0.5)


def cosine_restarts(
    step: int, initial: float, steps: int, final: float = 0.0, t_mul: int = 2, m_mul: float = 1.0
) -> float:
    """Whole periods are taken off the step; those of one length together."""
    n, left, length = (step // steps, step % steps, steps) if t_mul == 1 else (0, step, steps)
    while left >= length:
        n, left, length = n + 1, left - length, length * t_mul
    return cosine(left, final + (initial - final) * m_mul**n, length, final)


def cyclic(
    step: int,
    initial: float,
    peak: float,
    steps: int,
    steps_down: int | None = None,
    mode: str = "triangular",
    gamma: float = 1.0,
) -> float:
    """A triangle as a table of three knots, which begins again and again."""
    down = steps if steps_down is None else steps_down
    cycles, now = divmod(step, steps + down)
    scale = {"triangular": lambda: 1.0, "triangular2": lambda: 0.5**cycles, "exp_range": lambda: gamma**step}[mode]()
    return initial + (peak - initial) * scale * float(np.interp(now, [0, steps, steps + down], [0, 1, 0]))


def warmup_stable_decay(
    step: int,
    peak: float,
    steps: int,
    warmup_steps: int,
    decay_steps: int,
    initial: float = 0.0,
    final: float = 0.0,
    anneal: str = "1-sqrt",
) -> float:
    """A line, a constant, and one of four tails."""
    if step < warmup_steps:
        return initial + (peak - initial) * step / warmup_steps
    z = min(max(step - steps + decay_steps, 0) / decay_steps, 1.0)
    if anneal == "exponential":
        return float(np.exp((1 - z) * np.log(peak) + z * np.log(final)))
    kept = {"1-sqrt": 1 - np.sqrt(z), "linear": 1 - z, "cosine": np.cos(z * np.pi / 2) ** 2}[anneal]
    return float(final + (peak - final) * kept)


def sequence(step: int, schedules: list[Any], boundaries: list[int]) -> float:
    """The schedule behind the last boundary that was reached, from its own step 0."""
    i = int(np.searchsorted(boundaries, step, side="right"))
    return _value(schedules[i], step - [0, *boundaries][i])


def scale(step: int, schedule: Any, factor: Any = 1.0, offset: float = 0.0) -> float:
    """A product and a sum."""
    return _value(factor, step) * _value(schedule, step) + offset


def _value(schedule: Any, step: int) -> float:
    return float(schedule(step)) if callable(schedule) else schedule


#: The twin of each of the package's schedules, by the schedule's name.
TWINS = {
    "Cosine": cosine,
    "CosineRestarts": cosine_restarts,
    "Cyclic": cyclic,
    "Exponential": exponential,
    "InverseSquareRoot": inverse_square_root,
    "Linear": linear,
    "OneCycle": one_cycle,
    "Piecewise": piecewise,
    "Polynomial": polynomial,
    "REX": rex,
    "Scale": scale,
    "Sequence": sequence,
    "Step": step,
    "Warmup": warmup,
    "WarmupStableDecay": warmup_stable_decay,
}

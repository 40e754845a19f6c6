"""Which trials are trained further: decisions over the scores that trials have had so far, and nothing else.

A trial is trained in parts. It is paused where a part ends, at a rung, and promoted to the next rung or not. Every
decision is a function of the recorded scores, so that a search that is continued decides as it would have without the
interruption.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from keras_optkit import arguments

__all__ = ["ASHA", "PASHA", "Hyperband"]

_ENDLESS = 2**62


@dataclass(frozen=True)
class Standing:
    """What a decision knows of a trial.

    Attributes:
        costs: The best objective until each rung that the trial has reached, as a number to be small; infinite where
            the trial has failed or had no objective.
        paused: Whether the trial can be trained further.
        curve: The objective of each epoch, likewise.
        running: Whether it is trained at this moment, or was when the search was interrupted.
    """

    costs: tuple[float, ...]
    paused: bool
    curve: Mapping[int, float] = field(default_factory=dict)
    running: bool = False


def _ranking(trials: Sequence[Standing], rung: int, among: Sequence[int]) -> list[int]:
    """Those that have reached a rung, the best first; of equals the earlier."""
    reached = [i for i in among if len(trials[i].costs) > rung]
    return sorted(reached, key=lambda i: (trials[i].costs[rung], i))


def _waits(trial: Standing, rung: int) -> bool:
    """Whether a trial is paused at this rung, with a score."""
    return trial.paused and len(trial.costs) == rung + 1 and math.isfinite(trial.costs[rung])


@dataclass(frozen=True)
class RungPruner:
    """What the pruners that pause and promote trials have in common.

    Args:
        min_epochs: Epochs of a trial before it is compared.
        reduction_factor: One in so many trials is promoted, and trained for so many times the epochs.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `min_epochs` is less than 1, or `reduction_factor` less than 2.
    """

    min_epochs: int = 1
    reduction_factor: int = 3

    def __post_init__(self) -> None:
        arguments.integer("min_epochs", self.min_epochs, 1)
        arguments.integer("reduction_factor", self.reduction_factor, 2)

    def rungs(self, epochs: int, number: int = 0) -> tuple[int, ...]:  # noqa: ARG002  (of Hyperband)
        """The epochs after which trial `number` is paused; the last are all `epochs`."""
        if self.min_epochs > epochs:
            raise ValueError(f"min_epochs must be at most epochs={epochs}, got {self.min_epochs}.")
        powers = (self.min_epochs * self.reduction_factor**k for k in itertools.count())
        return (*itertools.takewhile(lambda rung: rung < epochs, powers), epochs)

    def grown(self, top: int, trials: Sequence[Standing], epochs: int) -> int:  # noqa: ARG002  (of PASHA)
        """The highest rung that trials may be promoted to, after a new score; it was `top`."""
        return len(self.rungs(epochs)) - 1

    def promoted(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> int | None:
        """The trial to be trained to its next rung; None: a new trial is to be started, or nothing is to be done.

        Args:
            trials: All that were started.
            epochs: The most epochs of a trial.
            top: See `grown`.
            left: How many new trials may be started; None: no limit.
        """
        raise NotImplementedError

    def hopeless(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> list[int]:
        """The paused trials that `promoted` can no longer return, unless all better ones fail."""
        raise NotImplementedError


@dataclass(frozen=True)
class ASHA(RungPruner):
    """Asynchronous successive halving: the best third of the trials so far at a rung is promoted at once.

    ```text
    rungs: r, r eta, r eta^2, ... below epochs, then epochs       r = min_epochs, eta = reduction_factor
    promoted: from the highest rung that has one, the best of the floor(n / eta) best of its n trials
              that was not promoted before; if there is none, a new trial is started
    ```

    The score at a rung is the best objective until then. When no new trial is to come and none has been trained to the
    end, the best trial of the highest rung is promoted, so that a search ends with a complete one. Trials that failed
    count, as the worst. Source: Li et al. 2020, https://arxiv.org/abs/1810.05934.

    When not to use it: where the order of the trials after few epochs says little about the end, e.g. with a long
    warm-up; give a larger `min_epochs`.

    Args:
        min_epochs: Epochs of a trial before it is compared, 1 by default.
        reduction_factor: One in so many trials is promoted, and trained for so many times the epochs; 3 by default.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `min_epochs` is less than 1, or `reduction_factor` less than 2.

    Example:
    ```python
    import keras_optkit as ok

    assert ok.tuning.pruners.ASHA(min_epochs=2).rungs(epochs=20) == (2, 6, 18, 20)
    ```
    """

    def promoted(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> int | None:
        """See `RungPruner`."""
        last = len(self.rungs(epochs)) - 1
        for rung in reversed(range(top)):
            order = _ranking(trials, rung, range(len(trials)))
            for i in order[: len(order) // self.reduction_factor]:
                if _waits(trials[i], rung):
                    return i
        if left == 0 and not _completed(trials, last) and not any(trial.running for trial in trials):
            return _best_of_highest(trials, last)
        return None

    def hopeless(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> list[int]:  # noqa: ARG002
        """See `RungPruner`."""
        last = len(self.rungs(epochs)) - 1
        most = _ENDLESS if left is None else len(trials) + left  # that can ever be at the rung
        kept: set[int] = set()
        for rung in range(last):
            order = _ranking(trials, rung, range(len(trials)))
            waiting = [i for i in order if _waits(trials[i], rung)]
            kept.update(i for i in waiting if order.index(i) < most // self.reduction_factor)
            if not _completed(trials, last):
                kept.update(waiting[:1])
            above = len(_ranking(trials, rung + 1, range(len(trials))))
            most = min(most, above + most // self.reduction_factor)
        return [i for i, trial in enumerate(trials) if trial.paused and i not in kept]


def _completed(trials: Sequence[Standing], last: int) -> bool:
    return any(len(trial.costs) > last and math.isfinite(trial.costs[last]) for trial in trials)


def _best_of_highest(trials: Sequence[Standing], last: int) -> int | None:
    for rung in reversed(range(last)):
        waiting = [i for i in _ranking(trials, rung, range(len(trials))) if _waits(trials[i], rung)]
        if waiting:
            return waiting[0]
    return None


@dataclass(frozen=True)
class PASHA(ASHA):
    """Progressive ASHA: trials are promoted to a further rung only once the order of the two highest still changes.

    As `ASHA`, but at first no trial is promoted beyond the second rung. With each score at the highest rung so far, the
    trials there are put in order by it, and by their scores at the rung below. Where a trial's place in the one order
    is held in the other by a trial whose score differs by more than epsilon, the next rung is opened.

    ```text
    epsilon = the 90th percentile of |f_a(e) - f_b(e)|, e the last epoch that both have, over the pairs of trials
              of the highest rung whose curves f cross at least twice; 0 without such a pair
    ```

    At the end, the best trial of the highest rung is trained with all epochs. Source: Bohdal et al. 2022,
    https://arxiv.org/abs/2207.06940, and the authors' code in syne-tune, which keeps the last epsilon where a newly
    opened rung has no such pair yet.

    When not to use it: for a few trials, whose order says little.

    Args:
        min_epochs: Epochs of a trial before it is compared, 1 by default.
        reduction_factor: One in so many trials is promoted, and trained for so many times the epochs; 3 by default.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `min_epochs` is less than 1, or `reduction_factor` less than 2.

    Example:
    ```python
    import keras_optkit as ok

    assert ok.tuning.pruners.PASHA().rungs(epochs=27) == (1, 3, 9, 27)
    ```
    """

    def grown(self, top: int, trials: Sequence[Standing], epochs: int) -> int:
        """See `RungPruner`."""
        last = len(self.rungs(epochs)) - 1
        top = min(max(top, 1), last)
        both = [i for i, t in enumerate(trials) if len(t.costs) > top and math.isfinite(t.costs[top])]
        if top < last and not is_consistent(trials, top, both, noise([trials[i].curve for i in both])):
            top += 1
        return top


def noise(curves: Sequence[Mapping[int, float]]) -> float:
    """PASHA's epsilon: how far trials are apart whose order is that of chance, since their curves cross repeatedly."""
    found = []
    for one, other in itertools.combinations(curves, 2):
        epochs = sorted(one.keys() & other.keys())
        signs = [math.copysign(1, one[e] - other[e]) for e in epochs if one[e] != other[e]]
        if sum(a != b for a, b in itertools.pairwise(signs)) >= 2:
            found.append(abs(one[epochs[-1]] - other[epochs[-1]]))
    return float(np.percentile(found, 90)) if found else 0.0


def is_consistent(trials: Sequence[Standing], top: int, among: Sequence[int], epsilon: float) -> bool:
    """Whether the order at rung `top` is that of the rung below, but for trials that are as good as each other."""
    above, below = _ranking(trials, top, among), _ranking(trials, top - 1, among)
    costs = [trial.costs[top - 1] if len(trial.costs) >= top else math.inf for trial in trials]
    return all(abs(costs[i] - costs[j]) <= epsilon or i == j for i, j in zip(above, below, strict=True))


@dataclass(frozen=True)
class Hyperband(RungPruner):
    """Successive halving in brackets, from many trials with few epochs to few trials with all of them.

    ```text
    s = s_max, ..., 1, 0, s_max, ...       s_max = floor(log_eta(epochs / min_epochs)), eta = reduction_factor
    bracket s: ceil((s_max + 1) / (s + 1) eta^s) new trials, with rungs at epochs / eta^s, ..., epochs / eta, epochs
    at rung i all of the bracket are awaited, and floor(n / eta^(i + 1)) of its n trials are promoted, the best
    ```

    The score at a rung is the best objective until then; trials that failed are the worst. In a bracket that
    `max_trials` cuts short n is what it has, and at least one trial is promoted at each rung. Source: Li et al. 2018,
    https://arxiv.org/abs/1603.06560.

    When not to use it: with fewer trials than the first bracket has, which then is all of the search; use `ASHA`.

    Args:
        min_epochs: The fewest epochs of a trial, 1 by default.
        reduction_factor: One in so many trials is promoted, and trained for so many times the epochs; 3 by default.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If `min_epochs` is less than 1, or `reduction_factor` less than 2.

    Example:
    ```python
    import keras_optkit as ok

    hyperband = ok.tuning.pruners.Hyperband()
    assert hyperband.brackets(epochs=9) == ((9, (1, 3, 9)), (5, (3, 9)), (3, (9,)))  # trials, and their rungs
    ```
    """

    def brackets(self, epochs: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """The number of trials and the rungs of each bracket, after the last of which the first comes again."""
        if self.min_epochs > epochs:
            raise ValueError(f"min_epochs must be at most epochs={epochs}, got {self.min_epochs}.")
        eta, most = self.reduction_factor, 0
        while self.min_epochs * eta ** (most + 1) <= epochs:
            most += 1
        made = []
        for s in range(most, -1, -1):
            trials = -(-(most + 1) * eta**s // (s + 1))  # rounded up, without the errors of floats
            made.append((trials, tuple(max(epochs // eta**i, 1) for i in range(s, -1, -1))))
        return tuple(made)

    def _bracket(self, epochs: int, number: int) -> tuple[int, int, tuple[int, ...]]:
        """Of the bracket that a trial is in: its first trial, how many it has, and its rungs."""
        first = 0
        for trials, rungs in itertools.cycle(self.brackets(epochs)):
            if number < first + trials:
                return first, trials, rungs
            first += trials
        raise AssertionError

    def rungs(self, epochs: int, number: int = 0) -> tuple[int, ...]:
        """The epochs after which trial `number` is paused; the last are all `epochs`."""
        return self._bracket(epochs, number)[2]

    def promoted(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> int | None:  # noqa: ARG002
        """See `RungPruner`."""
        first = 0
        while first < len(trials):
            _, size, rungs = self._bracket(epochs, first)
            members = list(range(first, min(first + size, len(trials))))
            if len(members) < size and left != 0:
                return None  # the bracket is filled first
            for rung in range(len(rungs) - 1):
                if any(trials[i].running and len(trials[i].costs) <= rung for i in members):
                    break
                members = self._survivors(trials, members, rung, min(size, len(trials) - first))
                waiting = [i for i in members if _waits(trials[i], rung)]
                if waiting:
                    return waiting[0]
            first += size
        return None

    def _survivors(self, trials: Sequence[Standing], members: Sequence[int], rung: int, size: int) -> list[int]:
        """Those of a rung that are promoted; fewer than usual if too many have failed."""
        order = _ranking(trials, rung, members)
        quota = max(size // self.reduction_factor ** (rung + 1), 1)
        return [i for i in order if math.isfinite(trials[i].costs[rung])][:quota]

    def hopeless(self, trials: Sequence[Standing], epochs: int, top: int, left: int | None) -> list[int]:  # noqa: ARG002
        """See `RungPruner`."""
        kept: set[int] = set()
        first = 0
        while first < len(trials):
            _, size, rungs = self._bracket(epochs, first)
            members = list(range(first, min(first + size, len(trials))))
            size = len(members) if left == 0 else size
            for rung in range(len(rungs) - 1):
                members = self._survivors(trials, members, rung, size)
                kept.update(i for i in members if _waits(trials[i], rung))
            first += size
        return [i for i, trial in enumerate(trials) if trial.paused and i not in kept]


NAMES: dict[str, Any] = {"asha": ASHA, "pasha": PASHA, "hyperband": Hyperband}

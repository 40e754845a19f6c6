"""Findings of a run, followed from write to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from keras_optkit.advice.history import RECENT, History
from keras_optkit.advice.measured import Finding, ModelReport
from keras_optkit.advice.running import findings_of


class Following:
    """The findings of a run so far.

    The rules are asked at writes 1, 2, 4, 8, 16, at every 20th, at the first one that is not finite, and when an epoch
    ends.

    Args:
        model: What was measured of the model when the run began, if that is known.

    Attributes:
        history: What has been measured.
        findings: What was found when the rules were asked last, causes first, each with the step since which it is so.
    """

    def __init__(self, model: ModelReport | None = None):
        self.history = History(model)
        self.findings: tuple[Finding, ...] = ()
        self._since: dict[str, int] = {}

    def add(self, step: int, values: Mapping[str, float], *, of_epoch: bool = False) -> bool:
        """Adds what was written at a step; returns whether other things are found than before."""
        good = self.history.bad_since is None
        self.history.add(step, values, of_epoch=of_epoch)
        count = self.history.count
        at_count = count % RECENT == 0 or (count < RECENT and count & (count - 1) == 0)
        if of_epoch or at_count or (good and self.history.bad_since is not None):
            return self.ask()
        return False

    def ask(self) -> bool:
        """Asks the rules; returns whether other things are found than before."""
        before = [(each.rule, each.where, each.is_hint) for each in self.findings]
        found = findings_of(self.history)
        self._since = {each.rule: self._since.get(each.rule, self.history.step) for each in found}
        self.findings = tuple(replace(each, step=self._since[each.rule]) for each in found)
        return [(each.rule, each.where, each.is_hint) for each in self.findings] != before

"""The findings of a run, while it runs: a line of JSON and a text for TensorBoard whenever they change."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keras_optkit.advice.following import Following
from keras_optkit.callbacks.monitor import facts
from keras_optkit.callbacks.monitor.files import LINES, is_of_epoch, records, values_of

#: The name of the file, and the tag of the text.
FINDINGS, TAG = "findings.jsonl", "findings"


def replayed(directory: str) -> Following:
    """The findings of the run that has written to a directory, as they were followed.

    Raises:
        ValueError: For files that are none of ours.
    """
    following = Following(facts.read(directory))
    for record in records(Path(directory) / LINES):
        following.add(int(record["step"]), values_of(record), of_epoch=is_of_epoch(record))
    return following


class FindingsFile:
    """Follows what is written, and writes what is found.

    Args:
        directory: Where the values are.

    Attributes:
        following: The findings so far.
    """

    def __init__(self, directory: str):
        self._path = Path(directory) / FINDINGS
        self._directory = directory
        self.following = replayed(directory)

    def see_model(self, model: Any) -> None:
        """Measures a model that is built, unless the files have been about it before."""
        if not self._knows_model:
            facts.write(facts.facts(model), self._directory)
            self.following.history.model = facts.read(self._directory) or self.following.history.model
            self._knows_model = True

    _knows_model = False

    def add(self, values: Mapping[str, float], step: int, *, of_epoch: bool) -> str | None:
        """Adds what was written; returns the text of what is found if that has changed."""
        return self._text() if self.following.add(step, values, of_epoch=of_epoch) else None

    def end(self) -> str | None:
        """Asks the rules for the last time; returns as `add` does."""
        return self._text() if self.following.ask() else None

    def write(self, epoch: int) -> None:
        """Writes a line with what is found now."""
        found = [asdict(each) for each in self.following.findings]
        record = {"step": self.following.history.step, "epoch": epoch, "time": time.time(), "findings": found}
        with self._path.open("ab") as file:
            file.write(json.dumps(record).encode() + b"\n")

    def _text(self) -> str:
        found = self.following.findings
        return "\n".join(f"{place}. {each}" for place, each in enumerate(found, 1)) if found else "Nothing is found."

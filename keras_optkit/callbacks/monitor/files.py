"""What `TrainingMonitor` always writes: a line of JSON for each write."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_optkit.callbacks.charts import EPOCH

Record = dict[str, Any]

LINES = "monitor.jsonl"


class LineFile:
    """A text file in which every line is a JSON object: step, epoch, time, and value by tag.

    What a killed process has left of its last line is cut off.

    Args:
        directory: The directory.
        known: What `close` has returned, if this callback has written there before.

    Attributes:
        last: The last step of the values of updates (False), and of those of epochs (True); -1 if there are none.
        known: Whether nobody else has written since.
    """

    def __init__(self, directory: str, known: Any = None):
        path = Path(directory) / LINES
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = known is not None and path.exists() and path.stat().st_size == known["size"]
        self.last = {**known["last"]} if self.known else {True: -1, False: -1}
        for record in () if self.known else records(path):
            self.last[is_of_epoch(record)] = max(self.last[is_of_epoch(record)], record["step"])
        self._file = path.open("ab")
        if not self.known:
            self._file.truncate(_whole(path))

    def write(self, values: Mapping[str, float], step: int, epoch: int, *, of_epoch: bool) -> bool:
        """Writes a line, unless there is one of this step or a later one already; returns whether it has."""
        if step <= self.last[of_epoch]:
            return False
        self.last[of_epoch] = step
        record: Record = {"step": step, "epoch": epoch, "time": time.time()}
        record |= {tag: value if math.isfinite(value) else str(float(value)) for tag, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        return True

    def flush(self) -> None:
        """Has what was written on disk, whatever happens to the machine."""
        os.fsync(self._file.fileno())

    def close(self) -> dict[str, Any]:
        """Ends the writing; returns what there is now."""
        size = self._file.tell()
        self._file.close()
        return {"size": size, "last": self.last}


def _whole(path: Path) -> int:
    """How many bytes the complete lines of a file have."""
    return path.read_bytes().rfind(b"\n") + 1


def is_of_epoch(record: Record) -> bool:
    """Whether a line has the logs of an epoch."""
    return any(tag.startswith(EPOCH) for tag in record)


def values_of(record: Record) -> dict[str, float]:
    """The values of a line, by tag."""
    return {tag: value for tag, value in record.items() if tag not in ("step", "epoch", "time")}


def records(path: Path) -> Iterator[Record]:
    """The lines of a file, as they were written; an incomplete last one is left out, and so is a file not there.

    Raises:
        ValueError: For a line that is none of ours.
    """
    if not path.exists():
        return
    lines = path.read_bytes()[: _whole(path)].splitlines()
    for place, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            values = {name: float(value) for name, value in record.items() if name not in ("step", "epoch", "time")}
            found = {**record, **values, "step": int(record["step"])}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{path}, line {place} is not a line of TrainingMonitor: {line[:80]!r}.") from error
        yield found

"""The argument `every` of callbacks that write files: every epoch, every so many updates or batches, or a time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from keras_optkit import arguments


def checked(every: Any) -> Any:
    """Returns `every` if it is `"epoch"`, an integer of at least 1, or a positive `timedelta`, or one from a config."""
    if isinstance(every, Mapping) and set(every) == {"seconds"}:
        every = timedelta(seconds=every["seconds"])
    if isinstance(every, timedelta):
        if every <= timedelta(0):
            raise ValueError(f"every must be a positive timedelta, got {every!r}.")
        return every
    if isinstance(every, str):
        return arguments.choice("every", every, ("epoch",))
    return arguments.integer("every", every, 1)


def in_config(every: Any) -> Any:
    """What a config holds for it: a time is a dict with the seconds."""
    return {"seconds": every.total_seconds()} if isinstance(every, timedelta) else every

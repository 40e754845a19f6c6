"""The directory in which a run keeps the bundles that it can be resumed from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_optkit.callbacks import bundle
from keras_optkit.files import lock, refuse_unless_file

_NAME = re.compile(r"bundle-(\d{8})\.npz")
_FINISHED = "finished.npz"


class Store:
    """Numbered bundles, the newest of which are kept, and one of the end of a run.

    Args:
        directory: Made if it does not exist.
        keep: How many of the numbered ones are kept.
    """

    def __init__(self, directory: Path, keep: int):
        self.directory = directory
        self._keep = keep
        self._last = 0

    @property
    def _finished(self) -> Path:
        return self.directory / _FINISHED

    @property
    def next_name(self) -> str:
        """The name of the next numbered bundle."""
        return f"bundle-{self._last + 1:08d}.npz"

    def lock(self) -> Callable[[], None]:
        """Makes sure that nobody else trains here, for as long as this process lives; returns what ends that.

        Raises:
            RuntimeError: If somebody does, or if something that is not a file has the name of one that is to be
                written.
            OSError: If the directory cannot be made or written to.
        """
        names = re.compile(f"{_NAME.pattern}|{re.escape(_FINISHED)}")
        release = lock(self.directory, names, user="fit")
        try:
            for path in [self._finished, *self._numbered()]:
                refuse_unless_file(path)
        except BaseException:
            release()
            raise
        return release

    def newest(self, epochs: int) -> dict[str, Any] | None:
        """The newest bundle that a run of so many epochs can be resumed from; None if there are no bundles.

        Damaged ones are skipped with a warning.

        Raises:
            RuntimeError: If all that there are, are damaged or have other names, or if none can be continued to so
                many epochs.
            ValueError: If it was trained for more epochs already, or if another version has written a bundle.
        """
        damaged: list[str] = []
        finished = self._read(self._finished, damaged) if self._finished.exists() else None
        end = None if finished is None else finished["finished"]
        if end is not None and (end["stopped"] or epochs <= end["epochs"]):
            found = finished
        else:
            readable = (self._read(path, damaged) for path in reversed(self._numbered()))
            found = next((each for each in readable if each is not None), None)
            if finished is not None and (found is None or _place(found) < _place(finished)):
                # after the end of a run a model may hold other weights than to train on, such as an average
                if finished["finished"]["continuable"]:
                    found = finished | {"finished": None}
                elif found is None:
                    damaged.append(f"{self._finished} holds what the run was left with, and not what it trained on.")
        damaged += [f"{path} looks like a bundle and has another name." for path in self._strays()]
        if found is None and damaged:
            lines = "\n  ".join(damaged)
            raise RuntimeError(f"No bundle is left to resume from:\n  {lines}\nRemove them to start over.")
        if found is None:
            return None
        for message in damaged:
            warnings.warn(f"{message} The run resumes from {found['name']}.", stacklevel=7)
        if found["position"]["epoch"] > epochs:
            raise ValueError(
                f"epochs={epochs}, but {self.directory / found['name']} comes from epoch {found['position']['epoch']} "
                "of a run."
            )
        self._last = found["number"]
        return found

    @staticmethod
    def _read(path: Path, damaged: list[str]) -> dict[str, Any] | None:
        """A bundle, or None and a line in `damaged`."""
        try:
            found = bundle.read(path)
            if found["name"] != path.name:
                raise bundle.DamagedError(f"{path} was written as {found['name']}.")
        except bundle.DamagedError as error:
            damaged.append(str(error))
            return None
        return found

    def _strays(self) -> list[Path]:
        """Bundles that somebody has renamed."""
        others = (path for path in self.directory.iterdir() if not _is_bundle(path.name) and path.is_file())
        return sorted(path for path in others if path.name != "lock" and bundle.looks_like_one(path))

    def write(self, packed: bundle.Packed) -> None:
        """Writes the next numbered bundle and removes what is not to be kept.

        Raises:
            OSError: If that fails; those that are there are kept.
        """
        bundle.write(self.directory / self.next_name, packed)
        self._last += 1
        for path in self._numbered():
            if not self._last - self._keep < self._number(path) <= self._last:
                path.unlink()

    def write_finished(self, packed: bundle.Packed) -> None:
        """Writes the bundle of the end of the run.

        Raises:
            OSError: If that fails.
        """
        bundle.write(self._finished, packed)

    def names(self, finished: bool) -> dict[str, Any]:
        """What a bundle has to say of itself: its name, and the number of the last one that was written with it."""
        return {
            "name": _FINISHED if finished else self.next_name,
            "number": self._last if finished else self._last + 1,
        }

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("bundle-*.npz") if _NAME.fullmatch(path.name))

    @staticmethod
    def _number(path: Path) -> int:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        return int(match[1])


def _is_bundle(name: str) -> bool:
    return name == _FINISHED or _NAME.fullmatch(name) is not None


def _place(found: dict[str, Any]) -> tuple[int, int]:
    return found["position"]["epoch"], found["position"]["batch"]

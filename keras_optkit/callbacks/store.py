"""The directory in which a training keeps the bundles that it can go on from."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from keras_optkit.callbacks import bundle
from keras_optkit.files import leftovers

_NAME = re.compile(r"bundle-(\d{8})\.npz")
_OURS = re.compile(rf"{_NAME.pattern}|finished\.npz")


class Store:
    """Numbered bundles, the newest of which are kept, and one of the end of a training.

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
        return self.directory / "finished.npz"

    def lock(self) -> Callable[[], None]:
        """Makes sure that nobody else trains here, for as long as this process lives; returns what ends that.

        Raises:
            RuntimeError: If somebody does.
            OSError: If the directory cannot be made or written to.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.directory / "lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout as error:
            raise RuntimeError(
                f"directory={str(self.directory)!r} is in use by another process, or by another fit of this one."
            ) from error
        for path in leftovers(self.directory, _OURS):
            path.unlink()
        return lock.release

    def newest(self, epochs: int) -> dict[str, Any] | None:
        """The newest bundle that a training of so many epochs can go on from; None if there are no bundles.

        Damaged ones are passed over with a warning.

        Raises:
            RuntimeError: If all that there are, are damaged.
            ValueError: If it was trained for more epochs already.
        """
        paths = [path for path in (self._finished, *reversed(self._numbered())) if path.exists()]
        damaged = []
        for path in paths:
            try:
                found = bundle.read(path)
            except bundle.DamagedError as error:
                damaged.append(str(error))
                continue
            if found["position"]["epoch"] > epochs:
                raise ValueError(
                    f"epochs={epochs}, but {path} comes from epoch {found['position']['epoch']} of a training."
                )
            finished = found["finished"]
            if finished and not finished["stopped"] and epochs > finished["epochs"]:
                continue  # a numbered one of the end of its last epoch can be gone on from
            for message in damaged:
                warnings.warn(f"{message} The training goes on from {path.name}.", stacklevel=7)
            if not finished:
                self._last = self._number(path)
            return found
        if damaged:
            raise RuntimeError(
                "No bundle is left to go on from:\n  " + "\n  ".join(damaged) + "\nRemove them to start anew."
            )
        return None

    def write(self, packed: bundle.Packed) -> None:
        """Writes the next numbered bundle and removes what is not to be kept.

        Raises:
            OSError: If that fails; those that are there are kept.
        """
        bundle.write(self.directory / f"bundle-{self._last + 1:08d}.npz", packed)
        self._last += 1
        for path in self._numbered():
            if not self._last - self._keep < self._number(path) <= self._last:
                path.unlink()

    def write_finished(self, packed: bundle.Packed) -> None:
        """Writes the bundle of the end of the training.

        Raises:
            OSError: If that fails.
        """
        bundle.write(self._finished, packed)

    def _numbered(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("bundle-*.npz") if _NAME.fullmatch(path.name))

    @staticmethod
    def _number(path: Path) -> int:
        match = _NAME.fullmatch(path.name)
        assert match is not None
        return int(match[1])

"""Files that are there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO

#: What is in the names of files that are being written; a process that was killed may leave one behind.
TEMPORARY = ".tmp"

#: The names that `atomic_write` and `atomic_path` give, with the one that is to be.
_UNFINISHED = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}|\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}\.(.+)")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Gives a binary file to write to, which takes the name `path` when the block ends.

    The file has another name in the same directory until it is complete and synced to the disk. If the block raises,
    or the disk is full, it is removed, and what was at `path` is as before. After a power failure there is the old
    content or the new one.

    Args:
        path: The name; its directory must exist.

    Raises:
        OSError: If the file cannot be written.

    Example:
    ```python
    import tempfile
    from pathlib import Path

    from keras_optkit.files import atomic_write

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "best.txt"
        with atomic_write(path) as file:
            file.write(b"0.93")
        assert path.read_bytes() == b"0.93"
    ```
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    with _replacing(path, unfinished), unfinished.open("xb") as file:
        yield file


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_write`, for what takes a name and no file: gives one that ends as `path` does.

    Args:
        path: The name; its directory must exist.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{secrets.token_hex(4)}{TEMPORARY}.{path.name}")
    with _replacing(path, unfinished):
        yield unfinished


@contextlib.contextmanager
def _replacing(path: Path, unfinished: Path) -> Iterator[None]:
    """Gives the name `path` to what is written to `unfinished`, or removes that."""
    try:
        yield
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Has a renaming or removal in a directory reach the disk; not every system can, nor needs to."""
    with contextlib.suppress(PermissionError, NotImplementedError):
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def leftovers(directory: Path, names: re.Pattern[str]) -> list[Path]:
    """Files whose writing was interrupted by the end of the process.

    Args:
        directory: Where they are.
        names: Matches the names that they would have been given, so that files of others are not taken for them.
    """
    found = {path: _UNFINISHED.fullmatch(path.name) for path in directory.iterdir()}
    return sorted(path for path, match in found.items() if match and names.fullmatch(match[1] or match[2]))

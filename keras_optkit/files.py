"""Files that are there as a whole or not at all, that show what was changed in them, and a directory's lock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import filelock

#: What is in the names of files that are being written; a process that was killed may leave one behind.
TEMPORARY = ".tmp"

#: The names that `atomic_write` and `atomic_path` give, with the one that is to be.
_UNFINISHED = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}|\.[0-9a-f]{{8}}{re.escape(TEMPORARY)}\.(.+)")


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Gives a binary file to write to, which takes the name `path` when the block ends.

    The file has another name in the same directory until it is complete and synced to the disk. If the block raises,
    or the disk is full, it is removed, and what was at `path` is as before. After a power failure there is the old
    content or the new one. A file that is replaced keeps its permissions.

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
        with contextlib.suppress(FileNotFoundError):
            unfinished.chmod(stat.S_IMODE(path.stat().st_mode))  # who may read it is not changed
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


def refuse_unless_file(path: Path, *, links: bool = True) -> None:
    """Raises if something that is not a file has the name of one that is to be written.

    Args:
        path: The name.
        links: Whether it may be a link to a file.

    Raises:
        RuntimeError: If there is something else.
    """
    if path.is_symlink() and not links:
        raise RuntimeError(f"{path} must be a file, and is a link. Remove it.")
    if (path.exists() or path.is_symlink()) and not path.is_file():
        raise RuntimeError(f"{path} must be a file, and is something else. Remove it.")


def lock(directory: Path, names: re.Pattern[str], *, user: str, folders: str = "") -> Callable[[], None]:
    """Makes sure that nobody else writes into a directory, for as long as this process lives.

    What was being written there when the process before ended is removed.

    Args:
        directory: Made if it does not exist.
        names: Matches the names of the files that are written there.
        user: What writes there, for the message: "fit", "search".
        folders: A pattern of folders in it that are written to as well.

    Returns:
        What ends it.

    Raises:
        RuntimeError: If somebody does, or if the lock is not a file.
        OSError: If the directory cannot be made or written to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    refuse_unless_file(path, links=False)  # what a link points to would be emptied
    held = filelock.FileLock(path, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise RuntimeError(
            f"directory={str(directory)!r} is in use by another process, or by another {user} of this one."
        ) from error
    try:
        inside = (path for path in directory.glob(folders) if path.is_dir()) if folders else ()
        for place in (directory, *inside):
            for path in leftovers(place, names):
                if path.is_file():
                    path.unlink()
    except BaseException:
        held.release()
        raise
    return held.release


def sealed(held: Mapping[str, Any], indent: int | None = None) -> bytes:
    """A mapping as JSON for people to read, and the same as one string with its digest, which is what is believed."""
    believed = json.dumps(held)
    digest = hashlib.sha256(believed.encode("utf-8")).hexdigest()
    return json.dumps({**held, "sealed": believed, "sha256": digest}, indent=indent).encode("utf-8")


def finite(value: Any) -> Any:
    """A nest of values with strings for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def opened(content: bytes, indent: int | None = None) -> tuple[dict[str, Any], bool]:
    """What `sealed` has been given, and whether what is there for people to read is as it was written, too.

    Raises:
        ValueError: If it is not what was written.
    """
    whole = json.loads(content)
    if not isinstance(whole, dict) or not isinstance(believed := whole.get("sealed"), str):
        raise ValueError("it has no digest")
    if hashlib.sha256(believed.encode("utf-8")).hexdigest() != whole.get("sha256"):
        raise ValueError("its digest is wrong")
    held = json.loads(believed)
    return held, sealed(held, indent) == content

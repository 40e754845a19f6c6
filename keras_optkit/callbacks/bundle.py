"""One file that holds a tree of numbers, strings and arrays, and that is either whole or refused.

A bundle is a zip file as `numpy.savez` writes them, so that `numpy.load` opens it: `state.json` is the tree, the other
entries are its arrays. A digest of the whole file stands at its end. It is written under another name, synced and
renamed.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from keras_optkit.files import atomic_write

_FORMAT = 2
_DIGEST_SIZE = 32
_CHUNK = 1 << 22
_PART = 1 << 20  # hardly leaves the cache between the two sums and the file
_ARRAY = "__array__"
_TEXT = "state.json"


class DamagedError(ValueError):
    """A bundle that is not what was written."""


@dataclass(frozen=True)
class Packed:
    """A tree that is ready to be written: its arrays, and JSON for the rest."""

    text: str
    arrays: dict[str, np.ndarray]


def pack(tree: Mapping[str, Any]) -> Packed:
    """Prepares a tree of None, bool, int, float, str, arrays, and lists and dicts of them. Arrays are not copied.

    Raises:
        TypeError: For anything else, with its place in the tree.
    """
    arrays: dict[str, np.ndarray] = {}
    return Packed(json.dumps({"format": _FORMAT, "tree": _packed(tree, "", arrays)}), arrays)


def write(path: Path, packed: Packed) -> None:
    """Writes what `pack` has returned.

    Raises:
        OSError: If it cannot be written; what was at `path` is as before.
    """
    with atomic_write(path) as file:
        summed = _Summed(file)
        with zipfile.ZipFile(summed, "w") as archive:  # type: ignore[call-overload]  # write and flush are enough
            archive.writestr(_TEXT, packed.text)
            for name, array in packed.arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    _write_array(entry, array)
        file.write(summed.digest.digest())


def read(path: Path) -> dict[str, Any]:
    """Reads what `write` has written.

    Raises:
        DamagedError: If a single bit of the file is not what was written, or if it cannot be read.
        ValueError: If another version of this package has written it, in another format.
    """
    try:
        _refuse_if_damaged(path)
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read(_TEXT))
            version = found["format"]

            def array(name: str) -> np.ndarray:
                with archive.open(f"{name}.npy") as entry:
                    return np.lib.format.read_array(io.BytesIO(entry.read()), allow_pickle=False)

            if version == _FORMAT:
                return _unpacked(found["tree"], array)
    except DamagedError:
        raise
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}.") from error
    except Exception as error:  # a file of another kind with a digest at its end
        raise DamagedError(f"{path} is not a bundle: {error!r}.") from error
    raise ValueError(
        f"{path} has format {version!r}, of another version of keras_optkit; this one reads {_FORMAT}. Finish the run "
        "with that version, or take another directory."
    )


def looks_like_one(path: Path) -> bool:
    """Whether a file begins as a bundle does."""
    try:
        with path.open("rb") as file:
            begin = file.read(30 + len(_TEXT))
    except OSError:
        return False
    return begin[:4] == b"PK\x03\x04" and begin[30:] == _TEXT.encode()


def _refuse_if_damaged(path: Path) -> None:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = size - _DIGEST_SIZE
        while left > 0:
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                break
            digest.update(chunk)
            left -= len(chunk)
        if left < 0 or file.read() != digest.digest():
            raise DamagedError(f"{path}, of {size} bytes, is torn or was changed: its digest is wrong.")


def _write_array(entry: Any, array: np.ndarray) -> None:
    """As `np.lib.format.write_array`, which copies every part to new memory, half of its time."""
    array = np.require(array, requirements="C")
    np.lib.format.write_array_header_1_0(entry, np.lib.format.header_data_from_array_1_0(array))
    content = array.reshape(-1).view(np.uint8).data
    for begin in range(0, len(content), _PART):
        entry.write(content[begin : begin + _PART])


class _Summed:
    """A file to write to that adds up a digest. It cannot seek, and so zipfile does not go back to earlier places."""

    def __init__(self, file: Any):
        self._file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


def _packed(tree: Any, place: str, arrays: dict[str, np.ndarray]) -> Any:
    """The tree as JSON; its arrays are added to `arrays`."""
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    if isinstance(tree, np.generic):
        return _packed(tree.item(), place, arrays)
    if isinstance(tree, np.ndarray) and (tree.dtype.kind in "biufc" or _is_extended(tree)):
        name = str(len(arrays))
        arrays[name] = tree.view(f"u{tree.itemsize}") if _is_extended(tree) else tree
        return {_ARRAY: name, "dtype": tree.dtype.name}
    if isinstance(tree, list | tuple):
        return [_packed(part, f"{place}[{i}]", arrays) for i, part in enumerate(tree)]
    if isinstance(tree, Mapping) and _ARRAY not in tree and all(isinstance(key, str) for key in tree):
        return {key: _packed(part, f"{place}[{key!r}]", arrays) for key, part in tree.items()}
    raise TypeError(
        f"{place or 'The state'} must be None, a number, a string, an array, or a list or dict (with strings as keys) "
        f"of them; got {tree!r} of type {type(tree).__name__}."
    )


def _unpacked(tree: Any, array: Any) -> Any:
    if isinstance(tree, list):
        return [_unpacked(part, array) for part in tree]
    if isinstance(tree, dict):
        if _ARRAY in tree:
            return array(tree[_ARRAY]).view(_dtype(tree["dtype"]))
        return {key: _unpacked(part, array) for key, part in tree.items()}
    return tree


def _is_extended(array: np.ndarray) -> bool:
    """Whether it is of a type, such as bfloat16, that NumPy does not know by itself and writes without its name."""
    return hasattr(ml_dtypes, array.dtype.name)


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))

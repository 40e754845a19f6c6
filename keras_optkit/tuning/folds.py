"""Cross-validation: the folds of a search, from scikit-learn's splitters or others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.tuning.data import is_dataset, samples, taken
from keras_optkit.tuning.oracle import SPLIT, stream

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Folds:
    """The rows to train with and those to validate with, of each fold.

    Attributes:
        pairs: Indices of rows.
    """

    pairs: list[Pair]

    def __len__(self) -> int:
        return len(self.pairs)

    def of(self, execution: int, fit: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of `fit` of one execution; those given have all rows."""
        seen, unseen = self.pairs[execution % len(self.pairs)]
        names = [name for name in ("x", "y", "sample_weight") if fit.get(name) is not None]
        parts = {name: taken(fit[name], seen) for name in names}
        return {**fit, **parts, "validation_data": tuple(taken(fit[name], unseen) for name in names)}


def check_data(data: Any, validation: Any) -> None:
    """Raises if `data` cannot be split into folds.

    Raises:
        TypeError: If it is a dataset.
        ValueError: If there are validation data, too.
    """
    if validation is not None:
        raise ValueError(f"validation must be None where cv is given, got {type(validation).__name__}.")
    has_parts = isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, tuple) for part in data)
    if isinstance(data, tuple) and (len(data) == 4 or has_parts):
        raise ValueError("data must have no validation part of its own where cv is given, got both.")
    if is_dataset(data) or (isinstance(data, tuple) and any(map(is_dataset, data))):
        found = data if is_dataset(data) else data[0]
        raise TypeError(f"data must be arrays (x, y) where cv is given, got {type(found).__name__}.")


def checked_cv(cv: Any, groups: Any, data: tuple[Any, Any]) -> int | Folds:
    """The argument `cv`: a number of random folds, or the folds themselves.

    Raises:
        TypeError: If it is neither a number, nor a splitter, nor pairs of indices.
        ValueError: If it is too small or too large a number, if folds are empty, overlap or are others each time, or
            if there are groups that nothing would look at.
    """
    count = samples("data", data)
    if isinstance(cv, int | np.integer) and not isinstance(cv, bool):
        if groups is not None:
            raise ValueError(f"groups must be None where cv is a number, got {type(groups).__name__}: pass a splitter.")
        return arguments.integer("cv", cv, 2, count)
    if hasattr(cv, "split") and not isinstance(cv, type | str):
        found = _split(cv, data, groups, count)
        again = _split(cv, data, groups, count)
        if _digest(found) != _digest(again):
            raise ValueError(f"cv must give the same folds each time, got {cv!r}: set its random_state to a number.")
        return _named(found, cv)
    if isinstance(cv, str | bytes | Mapping | type) or not isinstance(cv, Iterable):
        raise TypeError(
            "cv must be a number of folds, a splitter as scikit-learn has them, a list of pairs of indices, or None, "
            f"got {cv!r}."
        )
    if groups is not None:
        raise ValueError(f"groups must be None where cv is a list, got {type(groups).__name__}: pass a splitter.")
    return _named([_pair(number, pair, count) for number, pair in enumerate(cv)], cv)


def _named(pairs: list[Pair], cv: Any) -> Folds:
    if len(pairs) < 2:
        raise ValueError(f"cv must make at least 2 folds, got {len(pairs)} of {cv!r}.")
    return Folds(pairs)


def _split(cv: Any, data: tuple[Any, Any], groups: Any, count: int) -> list[Pair]:
    """The folds of a splitter, which needs an array for each of x and y: of a nest of them it is given the rows."""
    x, y = (_only(part) for part in data)
    if groups is not None and (shape := np.shape(groups)) != (count,):
        got = f"the shape {shape}" if shape else repr(groups)
        raise ValueError(f"groups must have one entry for each of the {count} samples, got {got}.")
    try:
        found = list(cv.split(np.zeros(count) if x is None else x, y, groups))
    except ValueError as error:
        raise ValueError(f"cv must be able to split data and groups, got {cv!r}, which says: {error}") from error
    return [_pair(number, pair, count) for number, pair in enumerate(found)]


def _only(part: Any) -> Any:
    arrays = keras.tree.flatten(part)
    return arrays[0] if len(arrays) == 1 else None


def _pair(number: int, pair: Any, count: int) -> Pair:
    """One fold, checked."""
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise TypeError(f"cv must be pairs of indices to train and to validate with, got {pair!r} as fold {number}.")
    seen, unseen = (np.asarray(indices) for indices in pair)
    for indices in (seen, unseen):
        if indices.ndim != 1 or not indices.size or indices.dtype.kind not in "iu":
            raise ValueError(
                "cv must be pairs of indices, each a list of at least one integer, got one of the shape "
                f"{indices.shape} and the type {indices.dtype} in fold {number}."
            )
        if indices.min() < 0 or indices.max() >= count:
            raise ValueError(
                f"cv must be indices from 0 to {count - 1}, got {indices.min()} to {indices.max()} in fold {number}."
            )
    if both := np.intersect1d(seen, unseen).size:
        raise ValueError(
            f"cv must validate with rows that are not trained with, got {both} that are both in fold {number}."
        )
    return seen, unseen


def random_folds(folds: int, count: int, seed: int) -> Folds:
    """Rows dealt out at random, each to the validation of one fold; sizes differ by at most one."""
    order = np.random.default_rng(stream(seed, SPLIT)).permutation(count)
    parts = np.array_split(order, folds)
    return Folds([(np.concatenate([*parts[:i], *parts[i + 1 :]]), part) for i, part in enumerate(parts)])


def _digest(pairs: Iterable[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        for indices in pair:
            digest.update(f"{len(indices)}:".encode() + indices.astype("<i8").tobytes())
    return digest.hexdigest()


def described(cv: int | Folds | None) -> Any:
    """The folds as JSON holds them, to see whether a search that is continued has the same."""
    return f"{len(cv)} folds, {_digest(cv.pairs)[:16]}" if isinstance(cv, Folds) else cv

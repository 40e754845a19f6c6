"""The data of a search and the other arguments of `fit`: checked before the first trial, split once for all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from keras_optkit import arguments
from keras_optkit.data import EpochDataset
from keras_optkit.meaning import checksum
from keras_optkit.tuning.hypermodel import check_names
from keras_optkit.tuning.oracle import SPLIT, stream

#: Arguments of `fit` that `search` has under a name of its own.
OF_SEARCH = {
    "x": "data",
    "y": "data",
    "validation_data": "validation",
    "validation_split": "validation",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "callbacks": "callbacks",
    "verbose": "verbose",
}

_INTEGERS = {
    "steps_per_epoch": 1,
    "validation_steps": 1,
    "validation_batch_size": 1,
    "initial_epoch": 0,
}


def samples(name: str, arrays: Any) -> int:
    """The number of samples of an array, or of a nest of them."""
    shapes = [tuple(getattr(array, "shape", ())) for array in keras.tree.flatten(arrays)]
    counts = {shape[0] if shape else None for shape in shapes}
    if len(counts) != 1 or None in counts:
        raise ValueError(f"{name} must be arrays with one number of samples, got the shapes {shapes}.")
    return counts.pop()  # type: ignore[return-value]


def pair(name: str, data: Any, *, weighted: bool = False) -> tuple[Any, ...]:
    """Checks (x, y), or (x, y, sample_weight) where `weighted` allows it."""
    allowed = "a pair of arrays (x, y) or a dataset"
    if weighted:
        allowed = "a pair of arrays (x, y), a triple (x, y, sample_weight), a dataset, or a float, the part of arrays"
    hint = (
        " An iterator can be read only once: make a tf.data.Dataset (from_generator) or a keras.utils.PyDataset of it."
        if hasattr(data, "__next__")
        else " Pass sample_weight in fit_arguments."
        if isinstance(data, tuple) and len(data) == 3 and not weighted
        else ""
    )
    if not isinstance(data, list | tuple) or len(data) not in ((2, 3) if weighted else (2,)):
        got = f"{type(data).__name__} of {len(data)}" if isinstance(data, list | tuple) else type(data).__name__
        raise TypeError(f"{name} must be {allowed}, got {got}.{hint}")
    of_x, *others = (
        samples(f"The {part} of {name}", arrays) for part, arrays in zip(("x", "y", "weight"), data, strict=False)
    )
    for part, count in zip(("y", "weights"), others, strict=False):
        if of_x != count or not of_x:
            raise ValueError(f"{name} must have as many x as {part}, and at least one, got {of_x} and {count}.")
    return tuple(data)


def is_dataset(data: Any) -> bool:
    """Whether it is a `PyDataset` or a `tf.data.Dataset`."""
    return isinstance(data, keras.utils.PyDataset) or (hasattr(data, "element_spec") and hasattr(data, "cardinality"))


def checked_data(data: Any, validation: Any, objective: str) -> tuple[Any, Any]:
    """The training data and the validation data, each a tuple or a dataset; or the fraction to split off, or None."""
    if isinstance(data, tuple) and len(data) == 4:
        data = data[:2], data[2:]
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(d, tuple) or is_dataset(d) for d in data):
        if validation is not None:
            raise ValueError("validation must be None where data has a validation part of its own, got both.")
        data, validation = data
    if not is_dataset(data):
        data = pair("data", data)
        if validation is None:
            validation = 0.2
        if isinstance(validation, float):
            if samples("data", data) < 2:
                raise ValueError("data must have at least 2 samples to be split, got 1.")
            return data, arguments.real("validation", validation, 0, 1, closed="neither")
    if validation is None:
        if objective.startswith("val_"):
            raise ValueError(f"validation must be given for the objective {objective!r}, got None.")
        return data, None
    return data, validation if is_dataset(validation) else pair("validation", validation, weighted=True)


def taken(arrays: Any, index: np.ndarray) -> Any:
    """Some rows of an array, or of a nest of them."""
    return keras.tree.map_structure(lambda array: np.asarray(array)[index], arrays)


def fit_data(data: Any, validation: Any, seed: int, sample_weight: Any = None) -> dict[str, Any]:
    """The arguments x, y, validation_data and sample_weight of `fit`.

    Weights are split with the data, as Keras does with `validation_split`.
    """
    parts = data if is_dataset(data) or sample_weight is None else (*data, sample_weight)
    if isinstance(validation, float):
        order = np.random.default_rng(stream(seed, SPLIT)).permutation(samples("data", data))
        held_out = min(max(round(validation * len(order)), 1), len(order) - 1)

        seen, unseen = order[held_out:], order[:held_out]
        parts, validation = (tuple(taken(part, index) for part in parts) for index in (seen, unseen))
    fit = {"x": parts} if is_dataset(data) else dict(zip(("x", "y", "sample_weight"), parts, strict=False))
    if is_dataset(data) and not isinstance(data, keras.utils.PyDataset):
        fit["shuffle"] = False  # Keras's default, True, makes it warn that a tf.data.Dataset has an order of its own
    return fit if validation is None else {**fit, "validation_data": validation}


# The other arguments of fit


def checked_fit_arguments(given: Any, data: Any, epochs: int | None) -> dict[str, Any]:
    """Checks the argument `fit_arguments` of `search`."""
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise TypeError(
            f"fit_arguments must be a mapping from names of arguments of fit to their values, or None, got {given!r}."
        )
    fit = dict(given)
    for name in fit.keys() & OF_SEARCH.keys():
        raise ValueError(f"fit_arguments must not have {name!r}, which search takes as {OF_SEARCH[name]}=.")
    try:
        check_names(fit)
    except TypeError as error:
        raise TypeError(f"fit_arguments must be arguments of fit: {error}") from None
    for name, value in fit.items():
        _check_fit_argument(f"fit_arguments[{name!r}]", name, value, data)
    if fit.get("class_weight") is not None and fit.get("sample_weight") is not None:
        raise ValueError("fit_arguments must have class_weight or sample_weight, got both, which fit does not take.")
    if epochs is not None and fit.get("initial_epoch", 0) >= epochs:
        raise ValueError(
            f"fit_arguments['initial_epoch'] must be less than epochs={epochs}, got {fit['initial_epoch']!r}."
        )
    return fit


def _check_fit_argument(shown: str, name: str, value: Any, data: Any) -> None:
    if name in _INTEGERS:
        arguments.integer(shown, value, _INTEGERS[name], optional=name != "initial_epoch")
    elif name == "shuffle":
        arguments.boolean(shown, value)
    elif name == "validation_freq":
        for epoch in value if isinstance(value, list) and value else [value]:
            arguments.integer(shown, epoch, 1)
    elif name == "class_weight" and not isinstance(value, Mapping | None):
        raise TypeError(f"{shown} must be a mapping from classes to weights or None, got {value!r}.")
    elif name == "sample_weight" and value is not None:
        if is_dataset(data):
            raise ValueError(f"{shown} must be left out where data is a dataset, whose batches have it as third part.")
        count, wanted = samples(shown, value), samples("data", data)
        if count != wanted:
            raise ValueError(f"{shown} must have one weight for each of the {wanted} samples, got {count}.")


def comparable(value: Any) -> Any:
    """A value as JSON holds it, to see whether a search that is continued is given the same."""
    if isinstance(value, Mapping):
        return {str(key): comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


def fingerprint(given: Mapping[str, Any]) -> dict[str, Any]:
    """What data are: type, shape and checksum of arrays; the kind of others, and what an `EpochDataset` says."""

    def of(part: Any) -> Any:
        if isinstance(part, EpochDataset):
            return part.fingerprint()
        return checksum(np.asarray(part)) if hasattr(part, "__array__") else comparable(part)

    parts = {name: value for name, value in given.items() if value is not None}
    return {name: [of(part) for part in keras.tree.flatten(value)] for name, value in parts.items()}


def check_ends(fit: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Raises where an epoch of `fit`, or a validation, would never end.

    Args:
        fit: Arguments of `fit`.
        names: What x and validation_data are called in the message.

    Raises:
        ValueError: If data without an end are given without a number of steps.
    """
    for name, steps in (("x", "steps_per_epoch"), ("validation_data", "validation_steps")):
        if fit.get(steps) is None and (kind := _endless(fit.get(name))):
            raise ValueError(f"{steps} must be given where {names[name]} is {kind}, got None.")


def _endless(data: Any) -> str:
    """What is endless about data, or ""; not everything that never ends is known to."""
    if isinstance(data, keras.utils.PyDataset):
        return "a PyDataset without an end" if data.num_batches in (None, math.inf) else ""
    if is_dataset(data):
        return "a dataset without an end (see repeat())" if int(data.cardinality()) == -1 else ""
    return "an iterator, which can be read only once," if hasattr(data, "__next__") else ""

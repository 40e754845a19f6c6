"""Outputs of a model, their losses and their labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit.advice import OutputReport
from keras_optkit.advice.data import BINARY, CATEGORICAL, SPARSE
from keras_optkit.advice.reading import loss_name
from keras_optkit.inspection.passes import Passed, array

#: How far from 1 probabilities may add up in half precision.
_ROUNDING = 2e-2


def output_reports(
    found: Passed, y: Any, names: Sequence[str] | None, activations: dict[int, Any], losses: Any
) -> tuple[OutputReport, ...]:
    """What is known of the outputs that have a loss.

    Args:
        found: What the passes have found.
        y: Labels, as tensors.
        names: Those of the outputs, if the model has some.
        activations: The activation and the bias of the layer that an output is from, by the id of the tensor.
        losses: What the model was compiled with, or was given, for when the loss could not be computed.
    """
    reports = []
    for path, loss, name in found.losses or _by_place(losses, found.outputs):
        output, labels = _at(path, found.outputs, names), _at(path, y, names)
        if output is not None:
            activation, bias = activations.get(id(output), (None, None))
            reports.append(_report(name if path else "", loss, array(output), labels, activation, bias))
    return tuple(reports)


def _by_place(losses: Any, outputs: Any) -> list[tuple[Any, Any, str]]:
    """The loss of a single output."""
    if tree.is_nested(outputs) or tree.is_nested(losses) or losses is None:
        return []
    return [((), keras.losses.get(losses), "")]


def _at(path: tuple[Any, ...], data: Any, names: Sequence[str] | None) -> Any:
    """The part of outputs or labels, which may be a dict or a list of the same."""
    for part in path:
        if not tree.is_nested(data):
            break
        keys = data if isinstance(data, dict) else range(len(data))
        if part not in keys and names is not None:
            known = list(names)
            part = known[part] if isinstance(part, int) else known.index(part) if part in known else None
        if part not in keys:
            return None
        data = data[part]
    return None if tree.is_nested(data) else data


def _from_logits(loss: Any, name: str | None) -> bool | None:
    if isinstance(loss, keras.losses.Loss):
        config = loss.get_config()
        if "from_logits" in config:
            return bool(config["from_logits"])
    return False if name in (*CATEGORICAL, *SPARSE, *BINARY) else None


def _ignored(loss: Any) -> Any:
    """The class that the loss leaves out."""
    return loss.get_config().get("ignore_class") if isinstance(loss, keras.losses.Loss) else None


def _report(name: str, loss: Any, output: np.ndarray, labels: Any, activation: Any, bias: Any) -> OutputReport:
    kind = loss_name(loss)
    from_logits = _from_logits(loss, kind)
    found: dict[str, Any] = {"name": name, "loss": kind, "from_logits": from_logits, "activation": activation}
    if output.ndim < 2 or not output.size:
        return OutputReport(**found)
    units = output.shape[-1]
    found |= {"units": units, "range": (float(output.min()), float(output.max()))}
    if units > 1:
        adds_up = np.abs(output.sum(-1) - 1) <= _ROUNDING
        found["is_distribution"] = bool(np.all(adds_up) and output.min() >= 0)
    if labels is None:
        return OutputReport(**found)
    y, ignored = array(labels), _ignored(loss)
    if ignored is not None and y.size == output.size // units:  # labels of what does not count
        counts = y.reshape(-1) != ignored
        y, output = y.reshape(-1)[counts], output.reshape(-1, units)[counts]
        if not y.size:
            return OutputReport(**found)
    found["label_range"] = (float(y.min()), float(y.max()))
    found["labels_are_whole"] = bool(np.all(y == np.round(y)))
    if y.shape == output.shape:
        found["labels_add_up"] = bool(np.all(np.abs(y.sum(-1) - 1) <= _ROUNDING))
    return OutputReport(**found, **_frequencies(kind, from_logits, output, y, bias))


def _frequencies(kind: str | None, from_logits: bool | None, output: np.ndarray, y: np.ndarray, bias: Any) -> Any:
    """Of classes in labels and predictions, where the labels fit."""
    units = output.shape[-1]
    flat = output.reshape(-1, units)
    if kind in SPARSE and y.size == len(flat) and y.min() >= 0 and y.max() < units and np.all(y == np.round(y)):
        counts = np.bincount(y.astype(int).ravel(), minlength=units)
    elif (kind in CATEGORICAL or kind in BINARY) and y.size == output.size and y.min() >= 0 and y.max() <= 1:
        counts = y.reshape(-1, units).sum(0)
    else:
        return {}
    if len(flat) > 1 and y.size and np.all(y.reshape(len(flat), -1) == y.reshape(len(flat), -1)[0]):
        return {}  # one class alone, as in a GAN or in data that are not shuffled, says nothing of frequencies
    binary = kind in BINARY
    turned = _sigmoid if binary else _softmax
    # one more of each class, so that the frequencies of a small batch are not taken for those of the data
    frequencies = (counts + 1) / (len(flat) + (2 if binary else units))
    found = {"frequencies": frequencies, "predicted": (turned(flat) if from_logits else flat).mean(0)}
    if bias is not None and bias.size == units:
        found["by_bias"] = turned(bias.reshape(1, units))[0]
    return {name: tuple(float(each) for each in values) for name, values in found.items()}


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))

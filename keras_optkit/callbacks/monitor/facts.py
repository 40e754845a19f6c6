"""What is known of a model when a run begins, for the rules of advice: a file next to the values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.advice import KernelReport, LayerReport, ModelReport, OutputReport, UpdateReport
from keras_optkit.advice.reading import (
    ACTIVATION_LAYERS,
    activation_of,
    has_l2,
    is_normalization,
    loss_name,
    optimizer_names,
    own_weights,
)
from keras_optkit.advice.scales import kernel_reports
from keras_optkit.backend import key
from keras_optkit.files import atomic_write, finite
from keras_optkit.optimizers.layer_paths import LayerTree, Node
from keras_optkit.optimizers.of_model import optimizers_of
from keras_optkit.precision import at_least_float32
from keras_optkit.private import sublayers

#: The name of the file.
MODEL = "model.json"


def facts(model: Any) -> ModelReport:
    """Kernels, activations, losses and optimizers of a built model, without a batch.

    What a layer feeds is read off the order of the layers: the model is not called.
    """
    tree = LayerTree.of(model)
    nodes = [node for node in tree.nodes if node.own or not sublayers(node.layer)]  # of a recurrent layer, the cell
    trained = {key(v) for v in model.trainable_variables}
    last = tree.last_kernel(trained)
    after = [*nodes[1:], None]
    layers = [_layer(node, behind, trained, last) for node, behind in zip(nodes, after, strict=True)]
    names = tuple(dict.fromkeys(name for optimizer in optimizers_of(model) for name in optimizer_names(optimizer)))
    penalized = tuple(next(iter(tree.paths_of(v)), v.path) for v in model.trainable_variables if has_l2(v))
    return ModelReport(
        layers=tuple(layer for layer in layers if layer.kernels or layer.activation not in (None, "linear")),
        outputs=_outputs(model),
        update=UpdateReport(names),
        penalized=penalized,
    )


def _layer(node: Node, behind: Node | None, trained: set[int], last: set[int]) -> LayerReport:
    layer, weights = node.layer, own_weights(node)
    activation = activation_of(layer)
    if activation == "linear" and behind is not None and isinstance(behind.layer, ACTIVATION_LAYERS):
        activation = activation_of(behind.layer)
    keys = {key(v) for v in weights}
    return LayerReport(
        path=node.path,
        kind=type(layer).__name__,
        activation=activation,
        trainable=bool(keys & trained) or not weights,
        is_output=bool(keys & last) or behind is None,
        feeds_norm=behind is not None and is_normalization(behind.layer),
        kernels=kernel_reports(layer, weights, activation, _read),
    )


def _read(variable: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(variable, at_least_float32(variable.dtype))), "float64")


def _outputs(model: Any) -> tuple[OutputReport, ...]:
    """The loss and the units of a single output."""
    loss, shape = getattr(model, "loss", None), getattr(model, "output_shape", None)
    if loss is None or isinstance(loss, dict | list | tuple) or not isinstance(shape, tuple) or len(shape) < 2:
        return ()
    return (OutputReport(loss=loss_name(keras.losses.get(loss)), units=shape[-1]),)


def write(report: ModelReport, directory: str) -> None:
    """Writes what is known to a directory, unless the same layers are there: those of the beginning are kept."""
    known = read(directory)
    if known is not None and _shapes(known) == _shapes(report):
        return
    layers = [
        {name: getattr(layer, name) for name in _OF_LAYER} | {"kernels": [vars(kernel) for kernel in layer.kernels]}
        for layer in report.layers
    ]
    outputs = [{"loss": output.loss, "units": output.units} for output in report.outputs]
    optimizer = () if report.update is None else report.update.optimizer
    content = {"layers": layers, "outputs": outputs, "optimizer": optimizer, "penalized": report.penalized}
    with atomic_write(Path(directory) / MODEL) as file:
        file.write(json.dumps(finite(content), allow_nan=False).encode())


_OF_LAYER = ("path", "kind", "activation", "trainable", "is_output", "feeds_norm")


def read(directory: str) -> ModelReport | None:
    """What `write` has written; None without a file.

    Raises:
        ValueError: If the file is none of ours.
    """
    path = Path(directory) / MODEL
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return ModelReport(
            layers=tuple(
                LayerReport(**{**layer, "kernels": tuple(_kernel(kernel) for kernel in layer["kernels"])})
                for layer in content["layers"]
            ),
            outputs=tuple(OutputReport(**output) for output in content["outputs"]),
            update=UpdateReport(tuple(content["optimizer"])),
            penalized=tuple(content["penalized"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not the file of a TrainingMonitor: {type(error).__name__}: {error}.") from error


def _kernel(values: dict[str, Any]) -> KernelReport:
    floats = {field.name for field in dataclasses.fields(KernelReport) if "float" in str(field.type)}
    numbers = {name: float(value) for name, value in values.items() if name in floats and value is not None}
    return KernelReport(**{**values, **numbers, "shape": tuple(values["shape"])})


def _shapes(report: ModelReport) -> list[tuple[str, list[tuple[int, ...]]]]:
    return [(layer.path, [kernel.shape for kernel in layer.kernels]) for layer in report.layers]

"""One forward and backward pass, whose state is thrown away."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit.backend import tensor
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.inspection.report import LayerReport, ModelReport, Report
from keras_optkit.inspection.rules import findings
from keras_optkit.kernels import KERNEL, role
from keras_optkit.precision import at_least_float32
from keras_optkit.private import global_seed, set_global_seed, sublayers

_FLAT = {"tanh": (-0.99, 0.99), "sigmoid": (0.01, 0.99), "hard_sigmoid": (0.01, 0.99)}
_PREPROCESSING = (keras.layers.Rescaling, keras.layers.Normalization)


def inspect(model: keras.Model, batch: Any, y: Any = None, loss: Any = None) -> Report:
    """Looks at a built model on one batch; weights, optimizer, metrics and random state are afterwards as before.

    Args:
        model: A built model, compiled or not.
        batch: One batch of inputs, as the model is called with.
        y: Its labels; None: only the forward pass.
        loss: A Keras loss or its name, for a model that is not compiled with one.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: The model is not built, or `y` is given and there is no loss.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r} of type {type(model).__name__}.")
    if not model.built:
        raise ValueError(f"model must be built, got {model.name!r}, which is not. Call it on a batch, or build(shape).")
    has_loss = model.compiled and getattr(model, "loss", None) is not None
    if y is not None and loss is None and not has_loss:
        raise ValueError(f"loss must be given for a model that is not compiled with one, got None for {model.name!r}.")
    loss = keras.losses.get(loss)
    seed = global_seed()
    try:
        seen, outputs, value, gradients = _passes(model, batch, y, loss)
        ratios = _update_ratios(model, gradients)
    finally:
        set_global_seed(seed)
    layers = _layer_reports(model, seen, gradients, ratios)
    report = _model_report(model, layers, batch, y, loss or getattr(model, "loss", None), outputs, value, bool(ratios))
    return Report(report, findings(report))


# -- passes -----------------------------------------------------------------------------------------------------------


def _passes(model: Any, x: Any, y: Any, loss: Any) -> tuple[dict[int, Any], Any, Any, dict[int, Any]]:
    """What is seen of each layer, the output, the loss, and the gradients by the identity of their variables."""
    x = tree.map_structure(ops.convert_to_tensor, x)
    y = None if y is None else tree.map_structure(ops.convert_to_tensor, y)
    order: list[tuple[int, bool]] = []  # layers as they are called, and whether a batch normalization follows
    metrics = list(model.metrics_variables)
    others = list({id(v): v for v in [*model.non_trainable_variables, *metrics]}.values())

    def forward(values: Any) -> tuple[Any, Any]:
        order.clear()
        found: list[Any] = []
        mapping = list(zip(model.trainable_variables, values, strict=True))
        mapping += [(v, tensor(v)) for v in others]
        with keras.StatelessScope(state_mapping=mapping), _watched(model, order, found):
            outputs = model(x, training=True)
            total = ops.zeros(())
            if y is not None and loss is not None:
                total = ops.mean(loss(y, outputs)) + sum(ops.cast(each, "float32") for each in model.losses)
            elif y is not None:
                total = model.compute_loss(x=x, y=y, y_pred=outputs, training=True)
        return total, (found, outputs)

    values = [tensor(v) for v in model.trainable_variables]
    gradients: list[Any] = []
    if y is None:
        (_, (found, outputs)), total = forward(values), None
    else:
        total, (found, outputs), gradients = _differentiated(forward, values)
    seen = {key: (numbers, follows) for (key, follows), numbers in zip(order, found, strict=True)}
    by_variable = {id(v): g for v, g in zip(model.trainable_variables, gradients, strict=False)}
    return seen, outputs, total, by_variable


def _differentiated(forward: Callable[[Any], Any], values: list[Any]) -> tuple[Any, Any, list[Any]]:
    if keras.config.backend() == "jax":
        import jax

        (total, found), gradients = jax.value_and_grad(forward, has_aux=True)(values)
        return total, found, gradients
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(values)
        total, found = forward(values)
    gradients = tape.gradient(total, values)
    return total, found, [None if g is None else tf.convert_to_tensor(g) for g in gradients]


@contextlib.contextmanager
def _watched(model: Any, order: list[Any], found: list[Any]) -> Iterator[None]:
    """Has the first call of each layer without layers inside noted, with numbers of its output."""
    layers = [layer for layer in sublayers(model) if not sublayers(layer)]
    before: dict[int, int] = {}
    kept: list[Any] = []  # an identity is that of an output only while the output is there

    def noted(layer: Any, call: Any) -> Any:
        def watching(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if isinstance(layer, keras.layers.BatchNormalization) and args and id(args[0]) in before:
                place = before[id(args[0])]
                order[place] = (order[place][0], True)
            if ops.is_tensor(output) and keras.backend.is_float_dtype(keras.backend.standardize_dtype(output.dtype)):
                kept.append(output)
                if all(key != id(layer) for key, _ in order):
                    before[id(output)] = len(order)
                    order.append((id(layer), False))
                    found.append(_numbers(layer, output))
            return output

        return watching

    try:
        for layer in layers:
            layer.call = noted(layer, layer.call)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("call", None)


def _numbers(layer: Any, output: Any) -> dict[str, Any]:
    """Mean, deviation, dead units and saturation of an output, as tensors."""
    y = ops.cast(output, at_least_float32(output.dtype))
    mean = ops.mean(y)
    numbers = {"mean": mean, "std": ops.sqrt(ops.mean(ops.square(y - mean)))}
    activation = _activation(layer)
    if activation == "relu" and len(y.shape) > 1:
        channels = 1 if getattr(layer, "data_format", None) == "channels_first" else len(y.shape) - 1
        largest = ops.max(y, axis=[axis for axis in range(len(y.shape)) if axis != channels])
        numbers["dead"] = ops.mean(ops.cast(largest <= 0, y.dtype))
    if activation in _FLAT:
        low, high = _FLAT[activation]
        numbers["saturated"] = ops.mean(ops.cast(ops.logical_or(y < low, y > high), y.dtype))
    return numbers


def _activation(layer: Any) -> str | None:
    """The name of a layer's activation."""
    if isinstance(layer, keras.layers.ReLU):
        return "relu"
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    activation = getattr(layer, "activation", None)
    return getattr(activation, "__name__", None) if activation is not None else None


# -- one update -------------------------------------------------------------------------------------------------------


def _update_ratios(model: Any, gradients: dict[int, Any]) -> dict[int, tuple[float, float]]:
    """Squared norms of change and weight after one update, which is undone, by the identity of the variable."""
    optimizer = getattr(model, "optimizer", None)
    pairs = [(gradients.get(id(v)), v) for v in model.trainable_variables]
    if optimizer is None or all(g is None for g, _ in pairs):
        return {}
    if not optimizer.built:  # an equal one, so that this one stays without state
        optimizer = type(optimizer).from_config(optimizer.get_config())
        optimizer.build(model.trainable_variables)
    else:
        build_optimizer(model)
    state = [*model.variables, *optimizer.variables]
    before = [(v, ops.copy(ops.convert_to_tensor(v))) for v in {id(v): v for v in state}.values()]
    weights = {id(v): _array(v) for v in model.trainable_variables}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")  # which a rule reports
            optimizer.apply([None if g is None else optimizer.scale_loss(g) for g, _ in pairs], [v for _, v in pairs])
        after = {id(v): _array(v) for v in model.trainable_variables}
    finally:
        for variable, value in before:
            variable.assign(value)
    return {key: (float(((after[key] - w) ** 2).sum()), float((w**2).sum())) for key, w in weights.items()}


# -- reports ----------------------------------------------------------------------------------------------------------


def _layer_reports(
    model: Any, seen: dict[int, Any], gradients: dict[int, Any], ratios: dict[int, tuple[float, float]]
) -> tuple[LayerReport, ...]:
    layers = {id(layer): layer for layer in sublayers(model) if not sublayers(layer)}
    called = [layers[key] for key in seen] + [layer for key, layer in layers.items() if key not in seen]
    used = [layer for layer in called if layer.weights or _activation(layer)]
    last = max((place for place, layer in enumerate(used) if id(layer) in seen), default=None)
    return tuple(
        _layer_report(layer, place == last, seen.get(id(layer)), gradients, ratios) for place, layer in enumerate(used)
    )


def _layer_report(layer: Any, is_output: bool, seen: Any, gradients: dict[int, Any], ratios: Any) -> LayerReport:
    numbers, follows = seen or ({}, False)
    found: dict[str, Any] = {name: float(_array(value)) for name, value in numbers.items()}
    kernel, axes = next(((v, a) for v in layer.weights for r, a in [role(v, layer)] if r == KERNEL and a), (None, None))
    if kernel is not None and axes is not None:
        value = _array(kernel)
        found["fan_in"], found["fan_out"] = axes.fans(value.shape)
        found["kernel_std"] = float(value.std())
        found["kernel_key"] = hashlib.sha256(repr(value.shape).encode() + value.tobytes()).hexdigest()
    trained = [v for v in layer.trainable_variables if id(v) in gradients]
    if trained:
        each = [gradients[id(v)] for v in trained]
        squares = [np.nan if g is None else float((_array(g) ** 2).sum()) for g in each]
        found["gradient_norm"] = float(np.sqrt(sum(squares)))
    changed = [ratios[id(v)] for v in trained if id(v) in ratios and len(v.shape) > 1]  # biases begin at 0
    if changed and (norm := sum(w for _, w in changed)) > 0:
        found["update_ratio"] = float(np.sqrt(sum(d for d, _ in changed) / norm))
    return LayerReport(
        path=layer.path,
        kind=type(layer).__name__,
        activation=_activation(layer),
        trainable=bool(layer.trainable_variables) or not layer.weights,
        is_output=is_output,
        feeds_batch_norm=follows,
        has_bias=getattr(layer, "bias", None) is not None,
        **found,
    )


def _model_report(
    model: Any, layers: Any, batch: Any, y: Any, loss: Any, outputs: Any, value: Any, has_update: bool
) -> ModelReport:
    output = next((layer for layer in layers if layer.is_output), None)
    found: dict[str, Any] = {}
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    if loss is not None and not isinstance(loss, dict | list):
        found["loss"] = getattr(loss, "name", None) or getattr(loss, "__name__", None)
        given = getattr(loss, "_fn_kwargs", None) or getattr(loss, "fn_kwargs", None) or {}
        found["from_logits"] = bool(getattr(loss, "from_logits", given.get("from_logits", False)))
    if output is not None:
        found["output_activation"] = output.activation or ("linear" if output.kernel_std is not None else None)
    if y is not None and ops.is_tensor(outputs) and not isinstance(y, dict | list | tuple):
        found |= _of_labels(_array(y), _array(outputs), found)
    floats = [np.asarray(part, "float64") for part in tree.flatten(batch) if "float" in str(part.dtype)]
    if floats and not any(isinstance(layer, _PREPROCESSING) for layer in sublayers(model)):
        found["input_scale"] = max(float(np.sqrt(np.mean(part**2))) for part in floats)
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None and has_update:
        found["optimizer"] = type(getattr(optimizer, "inner_optimizer", optimizer)).__name__
    regularized = [getattr(v, "regularizer", None) for v in model.trainable_variables]
    found["has_l2"] = any(
        float(ops.convert_to_numpy(getattr(each, "l2", 0.0))) > 0 for each in regularized if each is not None
    )
    return ModelReport(layers, loss_value=None if value is None else float(_array(value)), **found)


def _of_labels(y: np.ndarray, outputs: np.ndarray, found: dict[str, Any]) -> dict[str, Any]:
    """Range and frequencies of labels, and the mean prediction."""
    name, classes = found.get("loss"), outputs.shape[-1]
    result: dict[str, Any] = {"classes": classes, "label_range": (float(y.min()), float(y.max()))}
    if name not in ("sparse_categorical_crossentropy", "categorical_crossentropy"):
        return result
    if name.startswith("sparse"):
        counts = np.bincount(np.clip(y, 0, classes - 1).astype(int).ravel(), minlength=classes)
    else:
        counts = y.reshape(-1, classes).sum(axis=0)
    if found.get("output_activation") == "linear" and found.get("from_logits"):
        outputs = np.exp(outputs - outputs.max(-1, keepdims=True))
        outputs = outputs / outputs.sum(-1, keepdims=True)
    mean = outputs.reshape(-1, classes).mean(axis=0)
    return result | {
        "frequencies": tuple(float(c) for c in counts / counts.sum()),
        "predicted": tuple(float(p) for p in mean),
    }


def _array(x: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(ops.cast(x, at_least_float32(x.dtype))), "float64")

"""Residual branches that begin as zero, so that a deep network begins as its skip connections."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
from keras import layers, ops

from keras_optkit import arguments
from keras_optkit.private import sublayers

#: What leaves a branch zero, and lets its gradient pass, where it stands behind the last layer with weights.
_PASSED = (
    layers.Dropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
    layers.GaussianDropout,
    layers.AlphaDropout,
    layers.Identity,
    layers.Reshape,
    layers.Flatten,
    layers.Permute,
)
#: Of this package, whose layers may use initializers, which therefore do not import them.
_PASSED_BY_NAME = ("DropPath", "DropBlock", "ScheduledDropout")
#: Operations with a number, where they have one input.
_FACTORS = ("Multiply", "Divide", "TrueDivide", "Negative")
#: Their gamma scales something else than the output, or an activation follows it.
_NOT_ZERO = ("GlobalResponseNormalization", "FilterResponseNormalization")


def zero_residual(model: Any, pattern: str | None = None) -> list[str]:
    """Sets the end of each residual branch to zero, so that a block `x + f(x)` begins as the identity.

    Where a branch ends with a normalization that has a scale, or with LayerScale, it is that `gamma`; otherwise the
    kernel of its last layer, and its bias; of an attention layer that of its output. All other weights stay as they
    are, and gradients reach the branch from the second update on. In ResNets with BatchNormalization this makes large
    rates at the start safer.

    Without a pattern the branches are found in functional models, also nested ones: at each `Add`, the branch is the
    input with the most layers that have weights, back to where all inputs come from the same layer. Where there is no
    such layer, or two inputs have as many, as in a merge of two towers, nothing is taken for a branch. Cells that add
    paths of different lengths, as in NASNet, look like branches: look at what is returned. What stands behind the last
    layer with weights may be dropout, a reshape or a factor; a branch that ends with an activation, or with a
    normalization without a scale, is left alone with a warning, since zero would cut its gradient off, or cannot be.

    When not to use it: on pretrained weights, which it destroys; with post-norm, `norm(x + f(x))`, where it does less;
    together with `fixup_gain`, which has its own zeros.

    Args:
        model: A built model.
        pattern: A regular expression that is looked for in the paths of layers: those to set to zero. Needed for
            subclassed models.

    Returns:
        The paths of the variables that are zero now.

    Raises:
        TypeError: For a value of a wrong type.
        ValueError: If the model is not built, or if there is no such branch, or no such layer; nothing is changed then.

    Warns:
        UserWarning: For branches that are left as they are, where others are found.

    Source: Goyal et al. 2017, arXiv 1706.02677, section 5.1 (gamma of the last BatchNormalization in each block);
    Zhang, Dauphin and Ma 2019, arXiv 1901.09321, section 3 (kernels).

    Example:
    ```python
    import keras
    import keras_optkit as ok

    inputs = x = keras.Input((8,))
    for _ in range(3):
        branch = keras.layers.Dense(8, activation="relu")(x)
        branch = keras.layers.Dense(8)(branch)
        x = keras.layers.Add()([x, branch])
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    print(ok.initializers.zero_residual(model))  # ['dense_1/kernel', 'dense_1/bias', 'dense_3/kernel', ...]
    ```
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"model must be a keras.Model, got {model!r}.")
    unbuilt = [layer.name for layer in [model, *sublayers(model)] if not layer.built]
    if unbuilt:
        raise ValueError(f"model must be built, and {', '.join(unbuilt[:5])} of {model.name!r} is not.")
    pattern = arguments.pattern("pattern", pattern, optional=True)
    ends = _ends(model) if pattern is None else _matching(model, pattern)
    found: dict[str, Any] = {v.path: v for layer in ends for v in _last_of(layer)}
    if not found:
        what = (
            "no residual branch was found: in a subclassed model, or one without Add, pass pattern="
            if pattern is None
            else f"pattern={pattern!r} matches the path of no layer that has a kernel or a gamma"
        )
        raise ValueError(f"Of model {model.name!r} {what}.")
    for variable in found.values():
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    return list(found)


def _matching(model: Any, pattern: str) -> list[Any]:
    return [layer for layer in sublayers(model) if re.search(pattern, layer.path or "") and _last_of(layer)]


def _ends(model: Any) -> list[Any]:
    """The last layers with weights of all residual branches."""
    found, left = [], []
    for each in [model, *sublayers(model)]:
        graph = _graph(each)
        added = [op.name for op in each.operations if type(op).__name__ == "Add"] if graph else []
        for name in added:
            branch = _branch(each, graph, graph.get(name, []))
            end = None if branch is None else _end(each, graph, branch)
            if end is not None and _last_of(end):
                found.append(end)
            elif branch is not None:
                left.append(name)
    if found and left:
        warnings.warn(
            f"The residual branches that {', '.join(left)} of model {model.name!r} adds are left as they are, since no "
            "weights of their ends make them zero.",
            stacklevel=3,
        )
    return found


def _graph(model: Any) -> Mapping[str, list[str]]:
    """For each layer or operation of a functional model those that it gets its inputs from; empty for other models."""
    if not isinstance(model, keras.Model) or isinstance(model, keras.Sequential):
        return {}
    try:
        described = model.get_config().get("layers", ())
    except NotImplementedError:  # a class of one's own
        return {}
    if not all("inbound_nodes" in layer for layer in described):
        return {}
    return {layer["name"]: list(dict.fromkeys(_sources(layer["inbound_nodes"]))) for layer in described}


def _sources(part: Any) -> Iterator[str]:
    if isinstance(part, Mapping):
        if part.get("class_name") == "__keras_tensor__":
            yield part["config"]["keras_history"][0]
        else:
            part = list(part.values())
    if isinstance(part, list | tuple):
        for each in part:
            yield from _sources(each)


def _branch(model: Any, graph: Mapping[str, list[str]], inputs: list[str]) -> str | None:
    """Which of the inputs of a sum is the residual branch; None if it is no sum of a branch and a shortcut."""
    if len(inputs) < 2:
        return None
    known = {layer.name: layer for layer in model.layers}
    behind = {name: _behind(graph, name) for name in inputs}
    shared = set.intersection(*behind.values())
    sizes = {
        name: sum(bool(known[each].weights) for each in before - shared if each in known)
        for name, before in behind.items()
    }
    longest = max(sizes.values())
    branches = [name for name, size in sizes.items() if size == longest]
    return branches[0] if shared and longest and len(branches) == 1 else None


def _end(model: Any, graph: Mapping[str, list[str]], name: str) -> Any:
    """The last layer up to a layer or operation that a branch ends with; None if that is a function of its own."""
    named = {operation.name: operation for operation in model.operations}
    while _passes(named[name]) and len(graph[name]) == 1:
        (name,) = graph[name]
    return named[name] if isinstance(named[name], keras.Layer) else None


def _passes(operation: Any) -> bool:
    """Whether zero stays zero behind it, and its gradient is not cut off."""
    linear = isinstance(operation, layers.Activation) and operation.activation is keras.activations.linear
    kind = type(operation).__name__
    return linear or isinstance(operation, _PASSED) or kind in (*_PASSED_BY_NAME, *_FACTORS)


def _names(part: Any) -> list[str]:
    return [each for each in keras.tree.flatten(part) if isinstance(each, str)]


def _behind(graph: Mapping[str, list[str]], name: str) -> set[str]:
    """A layer, and all that its inputs come from."""
    found, left = set(), [name]
    while left:
        each = left.pop()
        if each not in found:
            found.add(each)
            left += graph[each]
    return found


def _last_of(layer: Any) -> list[Any]:
    """The variables that make the output of a layer zero; none where that is not known."""
    if isinstance(layer, keras.Sequential):
        last = [each for each in layer.layers if not _passes(each)][-1:]
        return _last_of(last[0]) if last else []
    if isinstance(layer, keras.Model):
        graph, outputs = _graph(layer), _names(layer.get_config()["output_layers"]) if _graph(layer) else []
        end = _end(layer, graph, outputs[0]) if len(outputs) == 1 else None
        return [] if end is None else _last_of(end)
    if isinstance(layer, layers.TimeDistributed):
        return _last_of(layer.layer)
    if isinstance(layer, layers.MultiHeadAttention | layers.GroupQueryAttention):
        return [v for v in layer.weights if v.path.split("/")[-2] == "attention_output"]
    activation = getattr(layer, "activation", None)
    if activation not in (None, keras.activations.linear):
        return []
    if type(layer).__name__ in _NOT_ZERO:
        return []
    named = {v.name: v for v in layer.weights}
    scale = named.get("gamma", named.get("scale"))  # the latter of RMSNormalization
    if scale is None and isinstance(getattr(layer, "gamma", None), keras.Variable):
        scale = layer.gamma  # of the LayerScale in keras.applications, whose variable has no name
    if scale is not None:
        return [scale, *([named["beta"]] if "beta" in named else [])]
    kernel = getattr(layer, "pointwise_kernel", getattr(layer, "kernel", None))  # the former of separable convolutions
    return [] if kernel is None else [v for v in (kernel, getattr(layer, "bias", None)) if v is not None]

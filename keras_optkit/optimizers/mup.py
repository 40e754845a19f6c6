"""muP: initial weights and learning rates for which the best learning rate does not depend on the width."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_optkit import arguments, backend
from keras_optkit.kernels import KERNEL, TABLE, KernelAxes, role
from keras_optkit.layers.reparametrization import SpectralNormalization, WeightNormalization
from keras_optkit.optimizers.groups import Group
from keras_optkit.optimizers.layer_paths import LayerTree
from keras_optkit.optimizers.of_model import optimizers_of, update_counter
from keras_optkit.precision import at_least_float32

INPUT, HIDDEN, OUTPUT, FIXED = "input", "hidden", "output", "fixed"

#: Layers that divide by what muP would have to know, and what to take instead.
_OTHERS = {
    keras.layers.Attention: "MultiHeadAttention, and more heads",
    keras.layers.AdditiveAttention: "MultiHeadAttention, and more heads",
    WeightNormalization: "the layer itself: its size does not depend on the kernel's",
    SpectralNormalization: "the layer itself: its size does not depend on the kernel's",
    keras.layers.SpectralNormalization: "the layer itself: its size does not depend on the kernel's",
}
#: Layers of attention, and the argument that is the dimension of their keys.
_KEYS = {keras.layers.MultiHeadAttention: "key_dim", keras.layers.GroupQueryAttention: "head_dim"}


class _Pair(NamedTuple):
    """A weight, the one of the base model in its place, and how much wider it is.

    Attributes:
        path: The path of the weight.
        weight: The weight.
        base: That of the base model.
        kind: `INPUT` (only outputs are more; biases and scales, too), `HIDDEN`, `OUTPUT` (only inputs are more) or
            `FIXED`.
        inputs: How many times as many inputs its units have.
        outputs: How many times as many outputs there are.
        is_kernel: Whether it is a kernel or a table.
    """

    path: str
    weight: Any
    base: Any
    kind: str
    inputs: float
    outputs: float
    is_kernel: bool


def mup(
    model: keras.Model, base: keras.Model, optimizer: str = "adam", weight_decay: float | None = None
) -> list[Group]:
    """Sets the initial weights of a model, and returns the groups for its optimizer, so that rates found at the width
    of `base` are right for it (muP, the maximal update parametrization).

    With r = fan_in / base fan_in and s = fan_out / base fan_out of a weight, relative to the base model:

    | weights | initial size | rate, Adam | rate, SGD |
    |---|---|---|---|
    | input (only fan_out grows), tables, biases, scales | 1 | 1 | s |
    | hidden (both grow) | 1 / sqrt(r) | 1 / r | s / r |
    | output (only fan_in grows) | 1 / r | 1 / r | 1 / r |

    The size of a kernel is its root mean square, relative to that of the kernel of `base` in the same place. A kernel
    that is as wide as there is not changed, neither are biases, scales, and kernels that are all 0. So with `base` as
    wide as `model` nothing is changed.

    Find learning rate, schedule and `weight_decay` with the base model or another narrow one, and use them for the wide
    one. Weight decay is divided by the factor on the rate, so that `η λ` is the same for all widths.

    When not to use it: with optimizers whose steps do not have the size that Adam's or SGD's have, such as Muon or
    LAMB; for weights that are shared by input and output; for models that are trained already. Depth, batch size and
    the number of updates must be the same or be tuned again. Attention must have the same dimension of keys at all
    widths (more heads instead), since Keras divides by its root, where muP asks for the dimension itself.

    Args:
        model: A built model that is not trained yet. Its kernels are assigned.
        base: The same architecture at the width at which the rates were found, built, with its initial weights. It is
            not changed, and not needed afterwards.
        optimizer: `"adam"` for Adam and others whose steps do not depend on the size of the gradient (AdamW, Adagrad,
            RMSprop, Lion, ...), `"sgd"` for steps in proportion to it, with or without momentum.
        weight_decay: The `weight_decay` of the optimizer, >= 0; None for none.

    Returns:
        Groups for the argument `groups` of an optimizer of this package, before those of your own. Empty if no weight
        has another rate.

    Raises:
        TypeError: `model` or `base` is not a Keras model.
        ValueError: One of them is not built or has been trained, the architectures differ in more than the width, the
            dimension of keys differs, a kernel is all 0 in one of them only, there is a layer whose size does not
            follow from its kernel (`Attention`, `AdditiveAttention`, weight or spectral normalization), or another
            argument is out of range.

    Source: Yang et al. 2022, Tensor Programs V, arXiv 2203.03466, table 3; weight decay as in its reference
    implementation.

    Example:
    ```python
    import keras
    import keras_optkit as ok


    def network(width):
        layers = [keras.layers.Dense(width, "relu") for _ in range(2)]
        return keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dense(3)])


    model, base = network(256), network(64)
    groups = ok.mup(model, base, weight_decay=0.01)
    optimizer = ok.optimizers.AdamW(1e-2, weight_decay=0.01, groups=groups)  # the rate that is best at 64
    print(optimizer.explain(model))
    ```
    """
    for name, each in (("model", model), ("base", base)):
        if not isinstance(each, keras.Model):
            raise TypeError(f"{name} must be a keras.Model, got {each!r} of type {type(each).__name__}.")
        if not each.built:
            fix = "Call it on a batch, or build(shape)."
            raise ValueError(f"{name} must be built, got {each.name!r}, which is not. {fix}")
    arguments.choice("optimizer", optimizer, ("adam", "sgd"))
    decay = arguments.real("weight_decay", weight_decay, 0, optional=True)
    _refuse_trained("model", model)
    _refuse_trained("base", base)
    _refuse_other_keys(model, base)
    pairs = _pairs(model, base)
    if any(pair.kind != FIXED for pair in pairs):
        _refuse_others(model)
    for pair in pairs:
        _scale(pair)
    by_rate: dict[float, list[str]] = {}
    for pair in pairs:
        if (rate := rate_of(pair.kind, pair.inputs, pair.outputs, optimizer)) != 1:
            by_rate.setdefault(rate, []).append(re.escape(pair.path))
    return [
        Group(f"^({'|'.join(patterns)})$", lr_scale=rate, weight_decay=None if decay is None else decay / rate)
        for rate, patterns in by_rate.items()
    ]


def size_of(kind: str, inputs: float) -> float:
    """The initial size of a weight, over that at the base width, if its units have so many times as many inputs."""
    return {HIDDEN: 1 / math.sqrt(inputs), OUTPUT: 1 / inputs}.get(kind, 1.0)


def rate_of(kind: str, inputs: float, outputs: float, optimizer: str) -> float:
    """The learning rate of a weight, over that at the base width."""
    if optimizer == "adam":
        return 1 / inputs if kind in (HIDDEN, OUTPUT) else 1.0
    return {INPUT: outputs, HIDDEN: outputs / inputs, OUTPUT: 1 / inputs}.get(kind, 1.0)


def _pairs(model: Any, base: Any) -> list[_Pair]:
    """The trained weights of both models, one by one."""
    tree, of_base = LayerTree.of(model), LayerTree.of(base)
    mine, theirs = model.trainable_variables, base.trainable_variables
    if len(mine) != len(theirs):
        raise ValueError(
            f"base must have the architecture of model, got {len(theirs)} trained weights for {len(mine)} in model."
        )
    return [_pair(weight, other, tree, of_base) for weight, other in zip(mine, theirs, strict=True)]


def _pair(weight: Any, other: Any, tree: LayerTree, of_base: LayerTree) -> _Pair:
    path, node, there = next(iter(tree.paths_of(weight)), weight.path), tree.layer_of(weight), of_base.layer_of(other)
    kind, axes = role(weight, None if node is None else node.layer)
    other_kind, other_axes = role(other, None if there is None else there.layer)
    shape, base_shape = tuple(weight.shape), tuple(other.shape)
    if kind != other_kind or len(shape) != len(base_shape) or weight.name != other.name:
        raise ValueError(
            f"base must have the architecture of model, got {other.path!r} of shape {base_shape} where model has "
            f"{path!r} of shape {shape}."
        )
    if kind == TABLE:
        if shape[0] != base_shape[0]:
            raise ValueError(f"base must have as many rows in {path!r} as model, {shape[0]}, got {base_shape[0]}.")
        inputs, outputs = 1.0, shape[1] / base_shape[1]
    elif kind == KERNEL:
        inputs, outputs = _growth(shape, base_shape, axes, other_axes)
    else:
        inputs, outputs = 1.0, math.prod(shape) / math.prod(base_shape)
    names = {(False, False): FIXED, (False, True): INPUT, (True, True): HIDDEN, (True, False): OUTPUT}
    return _Pair(path, weight, other, names[inputs != 1, outputs != 1], inputs, outputs, kind in (KERNEL, TABLE))


def _growth(
    shape: tuple[int, ...], base: tuple[int, ...], axes: KernelAxes | None, base_axes: KernelAxes | None
) -> tuple[float, float]:
    """How many times as many inputs and outputs a kernel has; separate maps count as outputs."""
    assert axes is not None
    assert base_axes is not None
    inputs = axes.fans(shape)[0] / base_axes.fans(base)[0]
    others = tuple(axis for axis in range(len(shape)) if axis not in axes.inputs)
    outputs = math.prod(shape[axis] for axis in others) / math.prod(base[axis] for axis in others)
    return inputs, outputs


def _scale(pair: _Pair) -> None:
    """Gives a kernel the size that it is to have."""
    if not pair.is_kernel or pair.kind == FIXED:
        return
    size, wanted = _rms(pair.weight), _rms(pair.base) * size_of(pair.kind, pair.inputs)
    if (size == 0) != (wanted == 0):
        which = "model" if size == 0 else "base"
        raise ValueError(f"base must have the initializers of model; {pair.path!r} is all 0 in {which} only.")
    if size:
        wide = ops.cast(backend.tensor(pair.weight), at_least_float32(pair.weight.dtype))
        pair.weight.assign(ops.cast(wide * (wanted / size), pair.weight.dtype))


def _rms(variable: Any) -> float:
    wide = ops.cast(backend.tensor(variable), at_least_float32(variable.dtype))
    return float(ops.convert_to_numpy(ops.sqrt(ops.mean(ops.square(wide)))))


def _refuse_others(model: Any) -> None:
    """Raises for layers whose outputs have another size than their kernels say."""
    for node in LayerTree.of(model).nodes:
        for kind, instead in _OTHERS.items():
            if isinstance(node.layer, kind):
                raise ValueError(f"model must have no {kind.__name__}, got {node.path!r}. Use {instead}.")


def _refuse_trained(name: str, model: Any) -> None:
    counter = update_counter(model) if optimizers_of(model) else None
    count = 0 if counter is None else int(ops.convert_to_numpy(counter))
    if count:
        raise ValueError(f"{name} must not have been trained, got {model.name!r} after {count} updates.")


def _refuse_other_keys(model: Any, base: Any) -> None:
    """Raises if attention has another dimension of keys, by whose root Keras divides."""

    def dimensions(of: Any) -> list[tuple[str, int]]:
        return [
            (node.path, node.layer.get_config()[argument])
            for node in LayerTree.of(of).nodes
            for kind, argument in _KEYS.items()
            if isinstance(node.layer, kind)
        ]

    for (path, mine), (_, theirs) in zip(dimensions(model), dimensions(base), strict=False):
        if mine != theirs:
            raise ValueError(
                f"model must have the dimension of keys of base, {theirs}, in {path!r}, got {mine}: Keras divides by "
                "its square root, and muP asks for the dimension itself. Widen by more heads."
            )

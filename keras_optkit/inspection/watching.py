"""What is measured of each layer's first call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from keras_optkit import backend
from keras_optkit.advice.reading import CAN_DIE, FLAT, NEAR_ZERO, activation_of
from keras_optkit.calls import folded_steps, replaced
from keras_optkit.kernels import KERNEL, is_state, role
from keras_optkit.optimizers.layer_paths import LayerTree, Node
from keras_optkit.precision import at_least_float32
from keras_optkit.private import sublayers


@dataclass
class Seen:
    """What was seen of a layer's first call.

    Attributes:
        output: Measurements of the output.
        input: Root mean square, mean and size of the first input, a mark of its elements, and whether its examples
            differ.
        source: The layer that has made the first input, by its id.
        feeds: The layer that was given the output and nothing in between, by its id; the first such.
        unreadable: Whether the layer was called in a loop or a compiled function, where nothing can be read.
    """

    output: dict[str, float] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    source: int | None = None
    feeds: int | None = None
    unreadable: bool = False


class Watch:
    """The layers of a model that are reported, and what was seen of them.

    A recurrent layer is one layer, with the weights of its cells. Others are layers that have weights of their own or
    an activation, at any depth.

    Attributes:
        nodes: The reported layers, by their id, with their paths.
        seen: What was seen of each layer that was called, by its id, in the order of the calls.
        made: The layer that has made an output, by the id of the tensor.
    """

    def __init__(self, model: Any):
        self.model = model
        inside: set[int] = set()
        self.nodes: dict[int, Node] = {}
        self._all: list[Any] = []
        for node in LayerTree.of(model).nodes:
            if id(node) in inside:
                continue
            if isinstance(node.layer, keras.layers.RNN):
                inside |= {id(below) for below in node.below()}
            if isinstance(node.layer, keras.layers.RNN) or node.own or activation_of(node.layer):
                self.nodes[id(node.layer)] = node
            if id(node.layer) in self.nodes or not sublayers(node.layer):
                self._all.append(node.layer)
        self.seen: dict[int, Seen] = {}
        self.made: dict[int, int] = {}
        self._kept: list[Any] = []  # an id is that of a tensor only while the tensor is there

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Watches the calls in the block."""
        with folded_steps([self.model, *sublayers(self.model)]), replaced(self._all, "call", self._watching):
            yield

    def release(self) -> None:
        """Lets go of the tensors."""
        self._kept.clear()
        self.made.clear()

    def _watching(self, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def watching(*args: Any, **kwargs: Any) -> Any:
            output = call(*args, **kwargs)
            if id(layer) not in self.seen:
                given = next(iter(tree.flatten([args, kwargs])), None)
                self._see(layer, given, output)
            return output

        return watching

    def _see(self, layer: Any, given: Any, output: Any) -> None:
        seen = self.seen[id(layer)] = Seen()
        if id(given) in self.made:
            seen.source = self.made[id(given)]
            before = self.seen[seen.source]
            before.feeds = before.feeds or id(layer)
        first = next(iter(tree.flatten(output)), None)
        if not ops.is_tensor(first):
            return
        self._kept += [given, first]
        if first is not given:  # dropout at a rate of 0 makes nothing
            self.made[id(first)] = id(layer)
        if id(layer) not in self.nodes:
            return
        try:
            y, x = _floats(first), _floats(given)
        except Exception:
            seen.unreadable = True
            return
        if y is not None:
            seen.output = _of_output(layer, y)
        if x is not None and has_kernel(layer):
            seen.input = _of_input(x)


def has_kernel(layer: Any) -> bool:
    """Whether a layer has a kernel, or a layer in it."""
    return any(role(v, layer)[0] == KERNEL and not is_state(v, layer) for v in layer.weights)


def _floats(x: Any) -> np.ndarray | None:
    """A tensor on the host, if it holds numbers."""
    if not hasattr(x, "dtype") or isinstance(x, np.ndarray):
        return None
    dtype = keras.backend.standardize_dtype(x.dtype)
    if "float" not in dtype and "int" not in dtype:
        return None
    if backend.is_sparse(x):
        return None
    return np.asarray(ops.convert_to_numpy(ops.cast(x, at_least_float32(dtype)))).astype("float64")


def _of_output(layer: Any, y: np.ndarray) -> dict[str, float]:
    """Mean, deviation, dead and always active units, and saturation."""
    if not y.size:
        return {}
    found = {"mean": float(y.mean()), "std": float(y.std())}
    activation = activation_of(layer)
    if activation in CAN_DIE and y.ndim > 1:
        channels = 1 if getattr(layer, "data_format", None) == "channels_first" else y.ndim - 1
        others = tuple(axis for axis in range(y.ndim) if axis != channels)
        high, low = y.max(axis=others), y.min(axis=others)
        found["dead"] = float(np.mean((high <= 0) & (low >= -NEAR_ZERO)))
        found["always_active"] = float(np.mean(low > 0))
    if activation in FLAT:
        low, high = FLAT[activation]
        found["saturated"] = float(np.mean((y < low) | (y > high)))
    return found


def _of_input(x: np.ndarray) -> dict[str, Any]:
    if not x.size:
        return {}
    return {
        "rms": float(np.sqrt(np.mean(np.square(x)))),
        "mean": float(x.mean()),
        "size": x.size,
        # a number that differs where the elements do, though a normalization gives them the same mean and size
        "mark": float(x.ravel() @ np.cos(np.arange(x.size))),
        "differs": bool(len(x) < 2 or np.any(x[1:] != x[:1])) if x.ndim else True,
    }

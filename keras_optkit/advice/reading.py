"""What is read off layers and optimizers without running the model."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_optkit import backend
from keras_optkit.kernels import is_state
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.layer_paths import Node
from keras_optkit.optimizers.of_model import innermost
from keras_optkit.optimizers.rule import Wrapper

#: Where activations are flat: outputs below and above.
FLAT = {"tanh": (-0.99, 0.99), "sigmoid": (0.01, 0.99), "hard_sigmoid": (0.01, 0.99)}
#: Activations whose units can be 0 for all inputs, with a gradient of 0.
CAN_DIE = ("relu", "relu6", "gelu", "silu", "swish")
#: Those of GELU and SiLU are a little below 0 there.
NEAR_ZERO = 1e-5
#: Layers that are an activation.
ACTIVATION_LAYERS = (keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.Softmax)


def activation_of(layer: Any) -> str | None:
    """The name of a layer's activation, None where it has none; "linear" is one."""
    if isinstance(layer, keras.layers.ReLU):
        return "relu"
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    if isinstance(layer, keras.layers.LeakyReLU):
        return "leaky_relu"
    activation = getattr(layer, "activation", None)
    if activation is None:
        return "linear" if hasattr(layer, "activation") else None
    return str(getattr(activation, "__name__", type(activation).__name__))


def is_normalization(layer: Any) -> bool:
    """Whether a layer removes the scale of its input, which goes nowhere else.

    What goes into a layer normalization or RMS normalization often goes around it, too.
    """
    others = (keras.layers.Normalization, keras.layers.LayerNormalization, keras.layers.RMSNormalization)
    return "Normalization" in type(layer).__name__ and not isinstance(layer, others)


def own_weights(node: Node) -> list[Any]:
    """The weights of a layer itself, without its state; those of a recurrent one are in its cells."""
    layer = node.layer
    weights = [v for v in layer.weights if not is_state(v, layer)]
    if isinstance(layer, keras.layers.RNN):
        return weights
    return [v for v in weights if backend.key(v) in set(node.own.values())]


def has_l2(variable: Any) -> bool:
    """Whether a weight has an L2 penalty."""
    factor = getattr(getattr(variable, "regularizer", None), "l2", 0.0)
    return float(ops.convert_to_numpy(factor)) > 0


def optimizer_names(optimizer: Any) -> tuple[str, ...]:
    """The names of the classes of an optimizer, of those in it, and of their rules."""
    inner = innermost(optimizer)
    names = [type(each).__name__ for each in [optimizer, *inner]]
    names += [type(rule).__name__ for each in inner if isinstance(each, Optimizer) for rule in _rules(each)]
    return tuple(dict.fromkeys(names))


def _rules(optimizer: Optimizer) -> list[Any]:
    """The rules of an optimizer and those inside them."""
    found: list[Any] = []
    waiting = list(optimizer._rules.values())
    while waiting:
        found.append(waiting.pop(0))
        waiting += [found[-1].inner()] if isinstance(found[-1], Wrapper) else []
    return found


def loss_name(loss: Any) -> str | None:
    """The name of the function of a loss."""
    function = getattr(loss, "fn", loss)
    return getattr(function, "__name__", None) or type(loss).__name__

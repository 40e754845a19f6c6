"""How much larger weights must be in front of an activation."""

from __future__ import annotations

import math
from typing import Any

from keras_optkit import arguments

#: Keras's default of `keras.activations.leaky_relu`; torch's is 0.01.
_NEGATIVE_SLOPE = 0.2

_GAINS = {
    "linear": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 1.0,
}
ACTIVATIONS = (*_GAINS, "leaky_relu")


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The gain for an activation: by how much its layer's weights are to be larger than those of a linear layer.

    ```text
    linear, sigmoid, selu   1
    tanh                    5/3
    relu                    sqrt(2)
    leaky_relu              sqrt(2 / (1 + param²))
    ```

    As `torch.nn.init.calculate_gain`, with two differences. "selu" is 1, which self-normalizing networks need
    (arXiv 1706.02515) and torch's documentation recommends, where its function returns 3/4. The default slope of
    "leaky_relu" is Keras's, 0.2, where torch's is 0.01.

    When not to use it: for other activations, such as GELU and SiLU, which have no standard gain; those of ReLU and
    1 are both common there. Measure it with `lsuv`.

    Args:
        nonlinearity: "linear", "sigmoid", "tanh", "relu", "selu" or "leaky_relu".
        param: The slope of "leaky_relu" below 0; for no other activation.

    Returns:
        The gain, a factor of the standard deviation.

    Raises:
        TypeError: `param` is not a number.
        ValueError: The activation has no gain, or has no `param` and is given one.

    Source: He et al. 2015, arXiv 1502.01852, equations 10 (ReLU) and 15 (PReLU); torch for tanh.

    Example:
    ```python
    import keras_optkit as ok

    assert ok.initializers.calculate_gain("relu") == 2**0.5
    start = ok.initializers.LeCunNormal(gain=ok.initializers.calculate_gain("leaky_relu", 0.1))
    ```
    """
    arguments.choice("nonlinearity", nonlinearity, ACTIVATIONS)
    if nonlinearity == "leaky_relu":
        slope = _NEGATIVE_SLOPE if param is None else arguments.real("param", param)
        return math.sqrt(2 / (1 + slope**2))
    if param is not None:
        raise ValueError(f"param must be None for {nonlinearity!r}, it is the slope of 'leaky_relu', got {param!r}.")
    return _GAINS[nonlinearity]


def checked_gain(gain: Any) -> Any:
    """Returns `gain` if it is a number above 0 or the name of an activation."""
    if isinstance(gain, str):
        return arguments.choice("gain", gain, ACTIVATIONS)
    return arguments.real("gain", gain, 0, closed="neither")


def gain_of(gain: float | str) -> float:
    """The number that `gain` stands for."""
    return calculate_gain(gain) if isinstance(gain, str) else gain

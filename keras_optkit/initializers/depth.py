"""Scales that depend on how deep a network is."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.initializers.base import Axes, OfKernel
from keras_optkit.initializers.distributions import RandomNormal
from keras_optkit.initializers.variance import HeNormal
from keras_optkit.registry import register

_STDDEV = 0.02


@register(
    "initializer",
    paper="Radford et al. 2019, Language models are unsupervised multitask learners (GPT-2), section 2.3",
    parity="scipy.stats.norm",
    tags=("variance", "wraps"),
    cases=(
        {"depth": 3, "initializer": RandomNormal(stddev=0.02)},
        {"depth": 12, "initializer": HeNormal(seed=7), "branches": 1},
    ),
    twin=lambda fan_in, _out, depth, initializer, branches=2: (
        (0.02 if isinstance(initializer, RandomNormal) else (2 / fan_in) ** 0.5) / (branches * depth) ** 0.5
    ),
)
class DepthScaled(OfKernel):
    """Another initializer's values, smaller in deep networks: for the last layer of each residual branch.

    W = W' / sqrt(branches depth), where W' is drawn by `initializer`. A sum of branches depth such branches then has
    the variance of one branch that is not scaled, whatever the depth.

    When not to use it: for layers that are not the last ones of residual branches, and where each branch ends in a
    normalization (post-norm), which undoes it.

    Args:
        depth: The number of blocks, >= 1. The default does for one block only.
        initializer: Draws the values that are scaled. Default: N(0, 0.02²), as in GPT-2.
        branches: Residual branches in a block: 2 in a Transformer, attention and the feed-forward layers.
        input_axes: The kernel's axes that a unit's inputs run over, for `initializer`. Default: as the layer has them.
        output_axes: The kernel's axes that an input's outputs run over. Default: likewise.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: A value is out of range, `initializer` is not one, or only one of `input_axes` and `output_axes` is
            given. When called: as `initializer`, or the shape is a scalar's, or the dtype is not floating point.

    Source: Radford et al. 2019, section 2.3: 1/sqrt(N) for N residual layers, which are two in each block.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    last = ok.initializers.DepthScaled(depth=12, initializer=ok.initializers.RandomNormal(stddev=0.02))
    layer = keras.layers.Dense(64, kernel_initializer=last)
    ```
    """

    def __init__(
        self,
        depth: int = 1,
        initializer: Any = None,
        branches: int = 2,
        *,
        input_axes: Axes = None,
        output_axes: Axes = None,
    ) -> None:
        super().__init__(input_axes=input_axes, output_axes=output_axes)
        self.depth = arguments.integer("depth", depth, 1)
        self.initializer = _initializer(initializer)
        self.branches = arguments.integer("branches", branches, 1)

    @property
    def seed(self) -> Any:
        """The seed of what is scaled."""
        return getattr(self.initializer, "seed", None)

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Builds the object that `get_config` described, with the generator of the one that is copied."""
        made = super().from_config(config, custom_objects)
        if isinstance(config.get("seed"), keras.random.SeedGenerator):
            made.initializer.seed = config["seed"]
        return made

    def _values(self, shape: tuple[int, ...], dtype: str) -> Any:
        inner = RandomNormal(stddev=_STDDEV) if self.initializer is None else self.initializer
        if self.input_axes is not None and isinstance(inner, keras.initializers.VarianceScaling):
            inner = copy.copy(inner)  # not from its config, where a SeedGenerator would begin again
            inner.input_axes, inner.output_axes = self.input_axes, self.output_axes
        return inner(shape, dtype=dtype) / math.sqrt(self.branches * self.depth)


def _initializer(given: Any) -> Any:
    allowed = "an initializer, its name or None"
    if given is None or isinstance(given, keras.initializers.Initializer):
        return given
    if not isinstance(given, str):
        raise TypeError(f"initializer must be {allowed}, got {given!r} of type {type(given).__name__}.")
    try:
        return keras.initializers.get(given)
    except ValueError:
        raise ValueError(f"initializer must be {allowed}, got {given!r}.") from None


def fixup_gain(branches: int, layers: int = 2) -> float:
    """How much Fixup scales the layers of a residual branch, all but the last: L^(-1/(2m - 2)).

    L is the number of residual branches, and m the number of layers in each. The last layer of a branch, and the output
    layer, are zero (`"zeros"`), the others as He's times this gain. The method also has a scalar bias (from 0) in front
    of each layer and activation, and a scalar multiplier (from 1) at the end of each branch, which are layers of the
    model.

    When not to use it: with normalization, which it replaces.

    Args:
        branches: L >= 1, the residual branches of the network.
        layers: m >= 2, the layers in a branch.

    Returns:
        The factor of He's standard deviation.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is out of range.

    Source: Zhang, Dauphin and Ma 2019, arXiv 1901.09321, section 3.

    Example:
    ```python
    import keras_optkit as ok

    gain = 2**0.5 * ok.initializers.fixup_gain(branches=16)
    inner = ok.initializers.LeCunNormal(gain=gain)  # He's times 16^(-1/2)
    ```
    """
    layers = arguments.integer("layers", layers, 2)
    return float(arguments.integer("branches", branches, 1) ** (-1 / (2 * layers - 2)))


def deepnorm(encoder_layers: int = 0, decoder_layers: int = 0) -> Mapping[str, tuple[float, float]]:
    """DeepNorm's scales (alpha, beta) for a Transformer: LayerNorm(alpha x + branch(x)), and beta as a gain of weights.

    ```text
    encoder only, N layers      alpha = (2N)^(1/4)            beta = (8N)^(-1/4)
    decoder only, M layers      alpha = (2M)^(1/4)            beta = (8M)^(-1/4)
    both, encoder               alpha = 0.81 (N^4 M)^(1/16)   beta = 0.87 (N^4 M)^(-1/16)
    both, decoder               alpha = (3M)^(1/4)            beta = (12M)^(-1/4)
    ```

    beta is the gain of Xavier's initialization for the feed-forward layers, the values and the output of attention;
    queries and keys have a gain of 1.

    When not to use it: with normalization in front of the branches (pre-norm), which is stable without it.

    Args:
        encoder_layers: N >= 0.
        decoder_layers: M >= 0.

    Returns:
        `{"encoder": (alpha, beta), "decoder": (alpha, beta)}`, without a part that has no layers.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is below 0, or both are 0.

    Source: Wang et al. 2022, arXiv 2203.00555, figure 2.

    Example:
    ```python
    import keras_optkit as ok

    alpha, beta = ok.initializers.deepnorm(encoder_layers=100)["encoder"]
    start = ok.initializers.XavierNormal(gain=beta)
    ```
    """
    n = arguments.integer("encoder_layers", encoder_layers, 0)
    m = arguments.integer("decoder_layers", decoder_layers, 0)
    if n and m:
        encoder = (0.81 * (n**4 * m) ** (1 / 16), 0.87 * (n**4 * m) ** (-1 / 16))
        return {"encoder": encoder, "decoder": ((3 * m) ** 0.25, (12 * m) ** -0.25)}
    if not n and not m:
        raise ValueError(
            "encoder_layers and decoder_layers must not both be 0, got encoder_layers=0, decoder_layers=0."
        )
    alone = n or m
    return {"encoder" if n else "decoder": ((2 * alone) ** 0.25, (8 * alone) ** -0.25)}


def t_fixup_gain(encoder_layers: int = 0, decoder_layers: int = 0) -> Mapping[str, float]:
    """How much T-Fixup scales the weights of a Transformer without normalization and warm-up.

    ```text
    encoder, N layers    0.67 N^(-1/4)
    decoder, M layers    (9M)^(-1/4)
    ```

    All kernels begin as Xavier's and embeddings as N(0, 1/d) with d their size; then the values and the output of
    attention and the feed-forward layers of a part are scaled by its gain, and with a decoder all embeddings by the
    decoder's.

    When not to use it: with layer normalization, which it replaces.

    Args:
        encoder_layers: N >= 0.
        decoder_layers: M >= 0.

    Returns:
        `{"encoder": gain, "decoder": gain}`, without a part that has no layers.

    Raises:
        TypeError: A value is not an integer.
        ValueError: A value is below 0, or both are 0.

    Source: Huang et al. 2020, Improving Transformer optimization through better initialization, section 3.2.

    Example:
    ```python
    import keras_optkit as ok

    gain = ok.initializers.t_fixup_gain(encoder_layers=6)["encoder"]
    start = ok.initializers.XavierUniform(gain=gain)
    ```
    """
    n = arguments.integer("encoder_layers", encoder_layers, 0)
    m = arguments.integer("decoder_layers", decoder_layers, 0)
    if not n and not m:
        raise ValueError(
            "encoder_layers and decoder_layers must not both be 0, got encoder_layers=0, decoder_layers=0."
        )
    found = {"encoder": 0.67 * n**-0.25 if n else 0.0, "decoder": (9 * m) ** -0.25 if m else 0.0}
    return {name: gain for name, gain in found.items() if gain}

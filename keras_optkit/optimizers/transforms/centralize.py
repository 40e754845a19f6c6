"""Gradient centralization."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.kernels import KERNEL
from keras_optkit.optimizers.rule import Hyper, Tensor
from keras_optkit.optimizers.transforms.transform import Transform, unit_axes
from keras_optkit.registry import register


@register(
    "transform",
    paper="Yong, Huang, Hua and Zhang, arXiv 2004.01461, equation 1",
    parity="optax.centralize",
)
@dataclass(frozen=True)
class Centralize(Transform):
    """Gradient centralization: the gradient of each unit's weights has a mean of 0.

    `g_i ← g_i - mean(g_i)` (Yong et al., 2004.01461, equation 1), where i runs over the outputs of a kernel, each with
    all its inputs and window; biases and embeddings do not change. The layer determines the axes. optax's
    `centralize` takes the first axis for the units, which is right for PyTorch's kernels but not for Keras's.

    When not to use it: where the kernel has to learn to use the mean of its inputs.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.AdamW(1e-3, transforms=[ok.optimizers.transforms.Centralize()])
    ```
    """

    layout: ClassVar[str] = "whole"

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        if h.role != KERNEL:
            return u
        axes = unit_axes(h, len(u.shape))
        # not `ops.mean`, which computes in float32 on JAX
        return u - ops.sum(u, axis=axes, keepdims=True) / max(1, math.prod(u.shape[axis] for axis in axes))

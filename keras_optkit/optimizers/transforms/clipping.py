"""Clipping: scales down gradients that are too large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.optimizers.rule import Hyper, Tensor, Value, number
from keras_optkit.optimizers.transforms.transform import Transform, unit_axes
from keras_optkit.registry import register
from keras_optkit.space import Float


def shrink(sum_of_squares: Tensor, limit: Value) -> Tensor:
    """The factor that scales a tensor with this sum of squares down to the norm `limit`; NaN propagates."""
    return limit / ops.maximum(ops.sqrt(sum_of_squares), limit)


@register(
    "transform",
    paper="Mikolov, Statistical Language Models Based on Neural Networks, 2012, section 3.2.2",
    parity="optax.clip",
    cases=({"limit": 0.3}, {"limit": 1e-3}),
    space={"limit": Float(0.01, 10.0, log=True)},
)
@dataclass(frozen=True)
class ClipByValue(Transform):
    """Clips each element of the gradient to `[-limit, limit]`, like the keyword `clipvalue`.

    When not to use it: it changes the gradient's direction; `ClipByGlobalNorm` does not.

    Args:
        limit: A number > 0, or a schedule or variable.

    Example:
    ```python
    import keras_optkit as ok

    transforms = ok.optimizers.transforms
    optimizer = ok.optimizers.SGD(0.1, transforms=[transforms.Centralize(), transforms.ClipByValue(0.5)])
    ```
    """

    limit: Value = number(1.0, closed="neither")

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        return ops.clip(u, -h(self.limit), h(self.limit))


@register(
    "transform",
    paper="the keyword clipnorm of Keras: each variable separately",
    parity="optax.clip_by_block_rms",
    cases=({"limit": 0.5}, {"limit": 1e-3}),
    space={"limit": Float(0.01, 10.0, log=True)},
)
@dataclass(frozen=True)
class ClipByNorm(Transform):
    """Scales the gradient of each parameter down to an L2 norm of at most `limit`, like the keyword `clipnorm`.

    `g ← g min(1, c / ‖g‖)`, for each parameter separately.

    When not to use it: it scales each parameter differently; `ClipByGlobalNorm` keeps the gradient's direction.

    Args:
        limit: c, a number > 0, or a schedule or variable.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.SGD(0.1, transforms=[ok.optimizers.transforms.ClipByNorm(1.0)])
    ```
    """

    layout: ClassVar[str] = "per_parameter"
    limit: Value = number(1.0, closed="neither")

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        return u * shrink(h.sum(ops.square(u)), h(self.limit))


@register(
    "transform",
    paper="Pascanu, Mikolov and Bengio, arXiv 1211.5063, algorithm 1",
    parity="optax.clip_by_global_norm",
    cases=({"limit": 1.0}, {"limit": 1e-2}),
    space={"limit": Float(0.1, 10.0, log=True)},
)
@dataclass(frozen=True)
class ClipByGlobalNorm(Transform):
    """Scales the gradient of all parameters together down to an L2 norm of at most `limit`, like `global_clipnorm`.

    `g ← g min(1, c / ‖g‖)`, with the norm over all parameters that have a gradient (Pascanu et al., 1211.5063,
    Algorithm 1). Parameters that groups freeze do not count.

    When not to use it: before `Centralize`, which makes the gradient smaller again; put it after.

    Args:
        limit: c, a number > 0, or a schedule or variable.

    Example:
    ```python
    import keras_optkit as ok

    transforms = ok.optimizers.transforms
    optimizer = ok.optimizers.SGD(0.1, transforms=[transforms.Centralize(), transforms.ClipByGlobalNorm(1.0)])
    ```
    """

    limit: Value = number(1.0, closed="neither")

    def contribute(self, u: Tensor, p: Tensor, h: Hyper) -> dict[str, Tensor]:
        return {"squares": ops.square(u)}

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        return u * ops.cast(shrink(h.totals["squares"], h.exact(self.limit)), u.dtype)


@register(
    "transform",
    paper="Brock, De, Smith and Simonyan, arXiv 2102.06171, equation 3",
    parity="optax.adaptive_grad_clip",
    cases=({"clipping": 0.05}, {"clipping": 0.5, "epsilon": 1.0}),
    space={"clipping": Float(1e-3, 0.2, log=True)},
)
@dataclass(frozen=True)
class AdaptiveClip(Transform):
    """Adaptive gradient clipping: limits each unit's gradient to a fraction of the norm of its weights.

    `g_i ← g_i min(1, λ max(‖θ_i‖, ε) / ‖g_i‖)` (Brock et al., 2102.06171, equation 3), where i runs over the units of a
    kernel (each output with all its inputs and window), the rows of an embedding, or a whole bias. The layer determines
    the axes of a kernel: the kernels of attention, grouped and recurrent layers have one unit for each output of each
    map, where optax takes the first axis of any tensor with two or three axes for the inputs.

    When not to use it: for the last layer, which the paper excludes. With plain SGD, weights that start at zero move
    by at most λ ε times the learning rate.

    Args:
        clipping: λ, a number > 0, or a schedule or variable.
        epsilon: ε > 0, the smallest norm used for the weights.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.SGD(0.1, momentum=0.9, transforms=[ok.optimizers.transforms.AdaptiveClip(0.01)])
    ```
    """

    layout: ClassVar[str] = "whole"
    clipping: Value = number(0.01, closed="neither")
    epsilon: Value = number(1e-3, closed="neither")

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        axes = unit_axes(h, len(u.shape))
        norm, size = (ops.sqrt(ops.sum(ops.square(x), axis=axes, keepdims=True)) for x in (u, p))
        limit = h(self.clipping) * ops.maximum(size, h(self.epsilon))
        # gradients below the limit do not change, bitwise
        return ops.where(norm < limit, u, u * (limit / ops.maximum(norm, 1e-6)))

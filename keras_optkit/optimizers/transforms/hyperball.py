"""Hyperball: kernels keep their norms, so that the rate is the size of a step relative to the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.kernels import KERNEL, as_matrices, from_matrices
from keras_optkit.optimizers.rule import Hyper, Tensor
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import register


@register(
    "transform",
    paper="Wen, Dang, Lyu, Ma and Liang, arXiv 2606.16899 (Hyperball)",
)
@dataclass(frozen=True)
class Hyperball(Transform):
    """Keeps the Frobenius norm of each kernel, and takes steps along that sphere whose relative size is the rate.

    ```text
    R = ‖θ‖
    θ ← R (θ - η R u / ‖u‖) / ‖θ - η R u / ‖u‖‖          u: the step of the rule
    ```

    (Wen et al., 2606.16899.) So η means the same for every kernel and at every time, whatever the length of the rule's
    steps: about 0.01 for any rule, decayed to 0 at the end. R is the norm before the step; it is that of the first
    weights but for rounding, and no state is needed. A kernel that is several maps side by side (depthwise, grouped and
    recurrent ones) keeps the norm of each. A kernel of zeros, which has no direction, takes the rule's step.

    Kernels are not decayed: on a sphere that has no effect. All other parameters (embeddings, biases, scales) take the
    rule's step and their decay. It must be the last transform of steps. The paper applies it to the matrices of hidden
    layers; here the kernel of the last layer has a fixed norm as well, which bounds the logits.

    When not to use it: where the size of a kernel matters, because no normalisation follows it and the network is not
    free to scale elsewhere; with a rate that was tuned without it. Rules that subtract the decay themselves, rules that
    average, and Lookahead refuse it.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.Muon(0.01, transforms=[ok.optimizers.transforms.Hyperball()])
    ```
    """

    changes: ClassVar[str] = "step"
    layout: ClassVar[str] = "whole"
    handles_decay: ClassVar[bool] = True

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        if h.role != KERNEL:
            return u + h.learning_rate * h.weight_decay * p if h.decays else u
        weights, steps = as_matrices(p, h.kernel), as_matrices(u, h.kernel)
        radius = _norm(weights)
        move = h.learning_rate * radius * ops.divide_no_nan(steps, _norm(steps))
        ratio = ops.divide_no_nan(radius, _norm(weights - move))  # 1, exactly, where nothing moves
        on_sphere = (1 - ratio) * weights + ratio * move
        return from_matrices(ops.where(radius > 0, on_sphere, steps), p.shape, h.kernel)


def _norm(x: Tensor) -> Tensor:
    return ops.sqrt(ops.sum(x * x, axis=(1, 2), keepdims=True))

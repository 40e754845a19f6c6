"""Decoupled weight decay that falls with the square of the learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.kernels import KERNEL
from keras_optkit.optimizers.rule import Hyper, Tensor, Value, choice, number
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import register


@register(
    "transform",
    paper="Defazio, arXiv 2506.02285, AdamC",
    parity="pytorch_optimizer.AdamC (normalized=True)",
    cases=({"peak": 0.25}, {"peak": 0.15, "parameters": "all"}),
)
@dataclass(frozen=True)
class CorrectedDecay(Transform):
    """AdamC's corrected decay: weights before a normalisation decay with the square of the learning rate.

    ```text
    θ ← θ - u - η (η / η_max) λ θ          u: the step of the rule
    ```

    (Defazio, 2506.02285.) Decay and gradient keep weights that are followed by a normalisation at a norm that depends
    on η λ. If η falls and the decay with it, their gradients grow near the end of training; with the correction they do
    not. λ is the optimizer's `weight_decay`, with its `decay_mask`; at the peak of the schedule the decay is AdamW's.

    **Which parameters.** The paper corrects every linear layer but the output layer, whether or not a normalisation
    follows immediately; all others have the usual decay. Here `parameters="kernels"` corrects all kernels, the last
    layer's included, and leaves embeddings and vectors with the usual decay; `"all"` corrects whatever decays, as the
    argument `corrected_weight_decay` of timm does. To choose layers by their paths, leave the transform out and give
    their group a decay that is a schedule of the same form as the rate, `λ η / η_max`.

    η / η_max is the same in all groups: factors of groups on the rate are not in it. It must be the last transform of
    steps.

    When to use it: long runs with a rate that falls to 0, a decay, and normalisation layers.

    When not to use it: with a constant rate, where it is only another λ; without normalisation layers. Rules that
    subtract the decay themselves, rules that average, and Lookahead refuse it.

    Args:
        peak: η_max > 0, the largest learning rate of the schedule, or a schedule or variable. It must be given.
        parameters: `"kernels"` or `"all"`.

    Example:
    ```python
    import keras_optkit as ok

    rate = ok.schedules.Cosine(1e-3, 10_000)
    corrected = ok.optimizers.transforms.CorrectedDecay(peak=1e-3)
    optimizer = ok.optimizers.AdamW(rate, weight_decay=0.1, transforms=[corrected])
    ```
    """

    changes: ClassVar[str] = "step"
    layout: ClassVar[str] = "whole"
    handles_decay: ClassVar[bool] = True
    peak: Value = number(low=0, closed="neither")
    parameters: str = choice("kernels", ("kernels", "all"))

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        if not h.decays:
            return u
        decay = h.learning_rate * h.weight_decay
        if self.parameters == "all" or h.role == KERNEL:
            decay = decay * ops.cast(h.base_rate / h(self.peak), u.dtype)
        return u + decay * p

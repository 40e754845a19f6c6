"""Cautious transforms: keep only the parts of a step that agree with the gradient, or with the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.optimizers.rule import Hyper, Tensor, Value, number
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import register


@register(
    "transform",
    paper="Liang, Chen, Liu and Liu, arXiv 2411.16085, algorithm 2",
    cases=({}, {"minimum": 0.4}),
)
@dataclass(frozen=True)
class CautiousUpdate(Transform):
    """Keeps only the elements of a step that descend along the current gradient, and scales them up to compensate.

    `u ← u φ / max(mean(φ), ε)`, `φ = 1 where u g > 0, else 0`, with the mean over each parameter (Liang et al.,
    2411.16085, Algorithm 2). The paper divides by `(‖φ‖₀ + 1) / d`; this follows the authors' code and timm. Decoupled
    decay is not part of u.

    When not to use it: with rules whose steps always descend along the gradient, such as plain SGD; with sparse
    embeddings, since the mean needs all rows and `sparse="lazy"` becomes `"dense"`. Rules that average, and Lookahead,
    refuse it.

    Args:
        minimum: ε in (0, 1], the lower bound of the mean.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.AdamW(1e-3, transforms=[ok.optimizers.transforms.CautiousUpdate()])
    ```
    """

    changes: ClassVar[str] = "step"
    layout: ClassVar[str] = "per_parameter"
    minimum: Value = number(1e-3, 0, 1, closed="right")

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        agrees = ops.cast(ops.sign(u) * ops.sign(h.gradient) > 0, u.dtype)  # the product of small values underflows
        return u * agrees / ops.maximum(h.mean(agrees), h(self.minimum))


@register(
    "transform",
    paper="Chen, Li, Liang, Su, Xie, Pierse, Liang, Lao and Liu, arXiv 2510.12402, equation 2",
)
@dataclass(frozen=True)
class CautiousDecay(Transform):
    """Decays only the weights that the step also makes smaller.

    `θ ← θ - u - η λ θ 1[u θ >= 0]` (Chen et al., 2510.12402, equation 2), with the optimizer's `weight_decay` and
    `decay_mask`. Without a decay it changes nothing. It must be the last transform of steps.

    When not to use it: with a decay that was tuned without it, since about half of it remains. Rules that subtract the
    decay themselves (LAMB, Schedule-Free), rules that average, and Lookahead refuse it.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.AdamW(1e-3, weight_decay=0.1, transforms=[ok.optimizers.transforms.CautiousDecay()])
    ```
    """

    changes: ClassVar[str] = "step"
    handles_decay: ClassVar[bool] = True

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        if not h.decays:
            return u
        return u + ops.where(ops.sign(u) * ops.sign(p) >= 0, h.learning_rate * h.weight_decay * p, ops.zeros_like(p))

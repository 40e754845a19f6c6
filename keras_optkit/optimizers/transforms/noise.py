"""Gradient noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from keras import ops

from keras_optkit.optimizers.rule import Hyper, Tensor, Value, count, number
from keras_optkit.optimizers.transforms.transform import Transform
from keras_optkit.registry import register
from keras_optkit.space import Choice


@register(
    "transform",
    paper="Neelakantan, Vilnis, Le, Sutskever, Kaiser, Kurach and Martens, arXiv 1511.06807, equation 1",
    parity="optax.add_noise",
    cases=({}, {"eta": 1.0, "gamma": 0.2, "seed": 7}),
    space={"eta": Choice([0.01, 0.3, 1.0])},
    known_failures={"zero": "the noise moves weights without a gradient", "packing": "it depends on the order"},
)
@dataclass(frozen=True)
class GradientNoise(Transform):
    """Adds normal noise to the gradient, whose variance falls with the number of updates.

    `g ← g + N(0, η / tᵞ)` (Neelakantan et al., 1511.06807, equation 1, where t is 1 + t, counted from 0). All elements
    of all parameters have independent noise. It is a function of the seed, the update count and the place of the
    parameter in the model, so that runs are reproducible, a resumed run equals an uninterrupted one, and all replicas
    have the same. A parameter that joins later starts with t = 1. TensorFlow and JAX draw different numbers.

    When to use it: very deep or otherwise hard to train networks, from a poor initialisation.

    When not to use it: with sparse embeddings, since noise moves all rows and `sparse="lazy"` becomes `"dense"`; with
    `Adam` and the like where gradients are sparse, since they move weights whose gradient is noise alone by full steps.
    Keywords for clipping act before it. Put a clipping transform behind it if the noise is to be clipped, too.

    Args:
        eta: η >= 0, the variance of the first update's noise, or a schedule or variable. The paper tries 0.01, 0.3, 1.
        gamma: γ >= 0, or a schedule or variable.
        seed: An integer >= 0.

    Example:
    ```python
    import keras_optkit as ok

    optimizer = ok.optimizers.SGD(0.1, transforms=[ok.optimizers.transforms.GradientNoise(0.01, seed=1)])
    ```
    """

    rows: ClassVar[bool] = False
    eta: Value = number(0.01)
    gamma: Value = number(0.55)
    seed: int = count(0, low=0)

    def change(self, u: Tensor, p: Tensor, h: Hyper) -> Tensor:
        variance = h.exact(self.eta) / h.step ** h.exact(self.gamma)
        return u + ops.cast(ops.sqrt(variance), u.dtype) * h.normal(self.seed)

"""Penalties on activations, for `activity_regularizer`."""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from keras_optkit import arguments
from keras_optkit.registry import register
from keras_optkit.regularizers.base import as_loss, checked_factor, wide
from keras_optkit.saving import FromSignature
from keras_optkit.space import Float

__all__ = ["ConfidencePenalty", "KLSparsity"]


class _OfActivations(FromSignature, keras.regularizers.Regularizer):
    """A penalty on the outputs of a layer, (batch, ..., units).

    Keras divides what `activity_regularizer` returns by the size of the batch, so that it has to be a sum over it.
    """

    def __call__(self, x: Any) -> Any:
        """The sum of the penalties of the examples of `x`."""
        values = wide(x)
        if len(values.shape) < 2:
            raise ValueError(f"The activations must be of shape (batch, ..., units), got {tuple(values.shape)}.")
        return as_loss(self._penalty(values), x)

    def _penalty(self, x: Any) -> Any:
        """The penalty on activations in float32 or float64, summed over the batch."""
        raise NotImplementedError


@register(
    "regularizer",
    paper="1701.06548",
    parity="the formula is the reference",
    tags=("activity",),
    cases=({"from_logits": True}, {"from_logits": True, "factor": 0.5, "threshold": 1.5}, {}),
    space={"factor": Float(1e-3, 1.0, log=True)},
)
class ConfidencePenalty(_OfActivations):
    """Rewards the entropy of predicted distributions, so that a classifier is less sure of itself.

    Ω = -factor Σ H(p), with the entropy H(p) = -Σ_i p_i log p_i in nats of each predicted distribution, along the last
    axis, and the sum over all of an example; Keras takes the mean over the batch. With a `threshold` Γ it is
    factor Σ max(0, Γ - H(p)), which leaves distributions of a larger entropy alone. Without, it is below 0, and so may
    be the loss. Where p_i = 0, it adds 0 to the entropy and to the gradient. Half precision is computed in float32.

    When not to use it: on activations that are no distributions; together with label smoothing, which does much the
    same; where the layer has a mask, which Keras does not tell regularizers of.

    Args:
        factor: The factor β, 0 or more.
        threshold: The entropy Γ in nats, above 0, below which to penalise; None (default): reward all entropy.
        from_logits: Whether the activations are logits, of which the softmax is taken, and not probabilities.

    Raises:
        TypeError: `factor` or `threshold` is not a number, or `from_logits` is not True or False.
        ValueError: `factor` is negative, infinite or NaN, or `threshold` is not above 0; when called, the activations
            have less than two axes.

    Source: Pereyra et al. 2017, arXiv 1701.06548, section 3.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    penalty = ok.regularizers.ConfidencePenalty(0.1)
    layer = keras.layers.Dense(10, activation="softmax", activity_regularizer=penalty)
    ```
    """

    def __init__(self, factor: float = 0.1, threshold: float | None = None, from_logits: bool = False) -> None:
        self.factor = checked_factor("factor", factor)
        self.threshold = arguments.real("threshold", threshold, 0, closed="neither", optional=True)
        self.from_logits = arguments.boolean("from_logits", from_logits)

    def _penalty(self, x: Any) -> Any:
        if self.from_logits:
            logs = x - ops.logsumexp(x, -1, keepdims=True)
            entropy = -ops.sum(ops.exp(logs) * logs, -1)
        else:
            entropy = -ops.sum(x * ops.log(ops.where(x > 0, x, ops.ones_like(x))), -1)
        if self.threshold is None:
            return -self.factor * ops.sum(entropy)
        return self.factor * ops.sum(ops.relu(self.threshold - entropy))


@register(
    "regularizer",
    paper="Ng 2011, Sparse autoencoder (CS294A lecture notes)",
    parity="the formula is the reference",
    tags=("activity", "nonnegative"),
    cases=({}, {"target": 0.3, "factor": 0.5}),
    space={"factor": Float(1e-3, 10.0, log=True), "target": Float(0.01, 0.3, log=True)},
)
class KLSparsity(_OfActivations):
    """Makes each unit active in a small part of the examples only.

    Ω = factor Σ_j [ρ log(ρ / ρ̂_j) + (1 - ρ) log((1 - ρ) / (1 - ρ̂_j))], the Kullback-Leibler divergence of the mean
    activation ρ̂_j of each unit j, along the last axis, over the batch and all positions, from the `target` ρ. What is
    returned is Ω times the size of the batch, by which Keras divides. ρ̂_j outside of [1e-6, 1 - 1e-6] counts as the
    nearer end, and has the gradient 0. Half precision is computed in float32.

    When not to use it: on activations that are not in [0, 1], as those of sigmoids are; with small batches, whose means
    are noisy.

    Args:
        factor: The factor β, 0 or more.
        target: ρ, above 0 and below 1.

    Raises:
        TypeError: An argument is not a number.
        ValueError: `factor` is negative, infinite or NaN, or `target` is not between 0 and 1; when called, the
            activations have less than two axes.

    Source: Ng 2011, Sparse autoencoder, CS294A lecture notes, section 3.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    sparse = ok.regularizers.KLSparsity(3.0, target=0.05)
    layer = keras.layers.Dense(64, activation="sigmoid", activity_regularizer=sparse)
    ```
    """

    def __init__(self, factor: float = 1.0, target: float = 0.05) -> None:
        self.factor = checked_factor("factor", factor)
        self.target = arguments.real("target", target, 0, 1, closed="neither")

    def _penalty(self, x: Any) -> Any:
        batch = ops.cast(ops.shape(x)[0], x.dtype)
        units = ops.reshape(x, (-1, x.shape[-1]))
        count = ops.cast(ops.maximum(ops.shape(units)[0], 1), x.dtype)
        rho, means = self.target, ops.clip(ops.sum(units, 0) / count, 1e-6, 1 - 1e-6)  # (Keras's mean is in float32)
        constant = rho * math.log(rho) + (1 - rho) * math.log(1 - rho)
        divergence = constant - rho * ops.log(means) - (1 - rho) * ops.log(1 - means)
        # below 0 by rounding only
        return self.factor * batch * ops.sum(ops.relu(divergence))

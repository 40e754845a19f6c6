"""All rules of advice, as pure functions of what was measured of a model; a small severity is near to a cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from keras_optkit.advice import data, layers, updates
from keras_optkit.advice.measured import Finding, ModelReport

RULES: tuple[Callable[[ModelReport], Iterator[Finding]], ...] = (
    data.output_and_loss,
    data.labels,
    data.unscaled_inputs,
    layers.identical_layers,
    layers.frozen,
    layers.kernel_scale,
    updates.update_size,
    layers.dead_units,
    layers.saturation,
    layers.growth,
    layers.vanishing,
    updates.vanishing_gradient,
    data.output_bias,
    data.loss_value,
    updates.missing_gradient,
    updates.l2_and_adaptive,
    updates.decay_on_vectors,
    layers.bias_before_batch_norm,
)


def findings(model: ModelReport) -> list[Finding]:
    """What all rules find, causes first; of one severity, in the order of the layers."""
    return sorted((found for rule in RULES for found in rule(model)), key=lambda found: found.severity)

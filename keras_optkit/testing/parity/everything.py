"""All references."""

from keras_optkit.testing.parity import (
    adam_family,
    basic,
    classic,
    compact,
    distance,
    dual_averaging,
    layerwise,
    low_rank,
    mixed_momentum,
    muon_family,
    projected,
    proximal,
    schedule_free,
    second_moment,
    shampoo,
    sign,
    structured,
    wrappers,
)
from keras_optkit.testing.parity.reference import Reference

REFERENCES: tuple[Reference, ...] = (
    *adam_family.REFERENCES,
    *basic.REFERENCES,
    *classic.REFERENCES,
    *dual_averaging.REFERENCES,
    *layerwise.REFERENCES,
    *mixed_momentum.REFERENCES,
    *projected.REFERENCES,
    *proximal.REFERENCES,
    *second_moment.REFERENCES,
    *sign.REFERENCES,
    *compact.REFERENCES,
    *distance.REFERENCES,
    *low_rank.REFERENCES,
    *schedule_free.REFERENCES,
    *muon_family.REFERENCES,
    *shampoo.REFERENCES,
    *structured.REFERENCES,
    *wrappers.REFERENCES,
)

"""All references."""

from keras_optkit.testing.parity import (
    adam_family,
    basic,
    classic,
    dual_averaging,
    layerwise,
    mixed_momentum,
    projected,
    proximal,
    second_moment,
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
    *structured.REFERENCES,
    *wrappers.REFERENCES,
)

"""All references."""

from keras_optkit.testing.parity import (
    adam_family,
    basic,
    compact,
    distance,
    layerwise,
    low_rank,
    schedule_free,
    structured,
    wrappers,
)
from keras_optkit.testing.parity.reference import Reference

REFERENCES: tuple[Reference, ...] = (
    *adam_family.REFERENCES,
    *basic.REFERENCES,
    *compact.REFERENCES,
    *distance.REFERENCES,
    *layerwise.REFERENCES,
    *low_rank.REFERENCES,
    *schedule_free.REFERENCES,
    *structured.REFERENCES,
    *wrappers.REFERENCES,
)

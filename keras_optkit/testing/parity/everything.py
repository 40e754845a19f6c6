"""All references."""

from keras_optkit.testing.parity import adam_family, basic, layerwise, structured, wrappers
from keras_optkit.testing.parity.reference import Reference

REFERENCES: tuple[Reference, ...] = (
    *adam_family.REFERENCES,
    *basic.REFERENCES,
    *layerwise.REFERENCES,
    *structured.REFERENCES,
    *wrappers.REFERENCES,
)

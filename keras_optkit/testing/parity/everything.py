"""All references."""

from keras_optkit.testing.parity import adam_family, basic, muon_family, shampoo, structured, wrappers
from keras_optkit.testing.parity.reference import Reference

REFERENCES: tuple[Reference, ...] = (
    *adam_family.REFERENCES,
    *basic.REFERENCES,
    *muon_family.REFERENCES,
    *shampoo.REFERENCES,
    *structured.REFERENCES,
    *wrappers.REFERENCES,
)

"""Each optimizer against its reference, step by step: `python -m keras_optkit.testing.parity [NAME...]`."""

from keras_optkit.testing.parity.reference import Reference

__all__ = ["Reference"]

"""The conformance suite, shipped so that third parties can run it on their own classes."""

from keras_optkit.testing.conformance import Check, check, checks_for, conformance, failures, not_on, traits
from keras_optkit.testing.problems import prepare

__all__ = ["Check", "check", "checks_for", "conformance", "failures", "not_on", "prepare", "traits"]

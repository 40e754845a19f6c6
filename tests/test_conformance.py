"""Every registered algorithm passes the shipped conformance suite."""

import keras
import pytest

import keras_optkit as ok

#: Optimizers whose checks of the engine take longest and show what those of others do. They are run with `--all`.
LONG = {"tensorflow": {"SOAP"}, "jax": {"SOAP", "Adafactor", "LAMB"}}[keras.config.backend()]

PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if card.name in LONG and check.engine else [])
    for pair in ok.testing.conformance().args[1]
    for card, check in [pair.values]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

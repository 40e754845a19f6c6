"""Every registered algorithm passes the shipped conformance suite."""

import keras_optkit as ok


@ok.testing.conformance()
def test_conformance(card, check):
    check(card)

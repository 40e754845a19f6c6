"""Every registered algorithm passes the shipped conformance suite."""

import keras
import pytest

import keras_optkit as ok

#: Optimizers whose checks of the engine take longest and show what those of others do. They are run with `--all`.
LONG = {"tensorflow": {"SOAP"}, "jax": {"SOAP", "Adafactor", "LAMB", "Lookahead", "Muon", "Prodigy", "Adan"}}[
    keras.config.backend()
]


def is_long(card, check):
    """Whether a pair is run with `--all` only.

    JAX compiles each operation of SOAP by itself, which takes minutes, unless the step is compiled as a whole. The
    moving average of `use_ema` does not depend on the rule.
    """
    on_jax = keras.config.backend() == "jax" and card.kind == "transform"  # the check `transforms` runs on optimizers
    by_operation = keras.config.backend() == "jax" and card.name == "SOAP" and check.name != "modes_agree"
    same_average = (
        check.name == "evaluation_weights" and "averages" not in ok.testing.traits(card) and card.name != "Adagrad"
    )
    return by_operation or same_average or ((card.name in LONG or on_jax) and check.engine)


PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if is_long(*pair.values) else [])
    for pair in ok.testing.conformance().args[1]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

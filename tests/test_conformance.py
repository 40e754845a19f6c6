"""Every registered algorithm passes the shipped conformance suite."""

import keras
import pytest

import keras_optkit as ok

ON_JAX = keras.config.backend() == "jax"

#: Optimizers whose checks of the engine take longest and show what those of others do. They are run with `--all`.
LONG = {"KLSOAP", "Kron", "SOAP", "Shampoo", "ConditionalGradient"}
if ON_JAX:
    LONG |= {"ADOPT", "Adafactor", "Adan", "LAMB", "LARS", "Lookahead", "MARS", "Muon", "Prodigy"}

#: Optimizers of which JAX runs all checks of the rule; of the others those that compare with the twin and between the
#: ways to run, since compiling takes most of the time there. `--all` runs all.
WHOLE_ON_JAX = {"Adagrad", "AdamW", "Lookahead", "Muon", "Prodigy", "SAM", "SGD", "ScheduleFree", "ScheduleFreeAdamW"}


def is_long(card, check):
    """Whether a pair is run with `--all` only.

    JAX compiles each operation of SOAP by itself, which takes minutes, unless the step is compiled as a whole. The
    moving average of `use_ema` does not depend on the rule.
    """
    decomposes = {"KLSOAP", "Kron", "SOAP", "Shampoo"}
    by_operation = ON_JAX and card.name in decomposes and check.name != "modes_agree"
    same_average = (
        check.name == "evaluation_weights" and "averages" not in ok.testing.traits(card) and card.name != "Adagrad"
    )
    in_part = ON_JAX and card.kind == "optimizer" and card.name not in WHOLE_ON_JAX and not check.engine
    if by_operation or same_average or (in_part and check.name not in ("twin", "modes_agree")):
        return True
    on_jax = ON_JAX and card.kind == "transform"  # the check `transforms` runs on optimizers
    return (card.name in LONG or on_jax) and check.engine


PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if is_long(*pair.values) else [])
    for pair in ok.testing.conformance().args[1]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

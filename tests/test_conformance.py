"""Every registered algorithm passes the shipped conformance suite."""

import keras
import pytest

import keras_optkit as ok

ON_JAX = keras.config.backend() == "jax"

#: Optimizers whose checks of the engine take longest and show what those of others do. They are run with `--all`.
LONG = {"ASAM", "ConditionalGradient", "EMANesterov", "KLSOAP", "Kron", "MARS", "SOAP", "Shampoo"}
#: What only these show.
ALWAYS = {("AdaHessian", "hessian_vector"), ("GSAM", "second_gradient")}
#: Optimizers of which all checks of the rule are run; of the others those in SHARE, and the rest with `--all`.
WHOLE = {"Adagrad", "AdamW", "Lookahead", "Muon", "Prodigy", "SAM", "SGD", "ScheduleFree", "ScheduleFreeAdamW"}
SHARE = {"bad_arguments", "config_round_trip", "twin"}
if ON_JAX:
    LONG |= {"ADOPT", "Adafactor", "Adan", "LAMB", "LARS", "Lookahead", "Muon", "Prodigy"}
else:
    WHOLE |= {"Adafactor", "Adam", "RMSprop"}


def is_long(card, check):
    """Whether a pair is run with `--all` only.

    JAX compiles each operation of rules with decompositions by itself, which takes minutes, unless the step is compiled
    as a whole. The moving average of `use_ema` does not depend on the rule.
    """
    if (card.name, check.name) in ALWAYS:
        return False
    if ON_JAX and card.name in {"KLSOAP", "Kron", "SOAP", "Shampoo"}:
        return check.name not in SHARE - {"twin"} and (card.name, check.name) != ("SOAP", "modes_agree")
    if check.name == "evaluation_weights" and "averages" not in ok.testing.traits(card) and card.name != "Adagrad":
        return True
    if card.kind == "optimizer" and not check.engine:
        return card.name not in WHOLE and check.name not in SHARE
    on_jax = ON_JAX and card.kind == "transform"  # the check `transforms` runs on optimizers
    return check.engine and (card.name in LONG or on_jax)


PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if is_long(*pair.values) else [])
    for pair in ok.testing.conformance().args[1]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

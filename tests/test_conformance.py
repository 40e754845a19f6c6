"""Every registered algorithm passes the shipped conformance suite."""

import keras
import pytest

import keras_optkit as ok

ON_JAX = keras.config.backend() == "jax"

#: Optimizers whose checks of the engine take longest and show what those of others do. They are run with `--all`.
LONG = {
    *("ADOPT", "ASAM", "ConditionalGradient", "EMANesterov", "KLSOAP", "Kron", "LARS", "Lookahead", "MARS", "SOAP"),
    "Shampoo",
}
#: What only these show.
ALWAYS = {("AdaHessian", "hessian_vector"), ("GSAM", "second_gradient")}
#: Optimizers of which all checks of the rule are run; of the others those in SHARE, and the rest with `--all`.
WHOLE = {"AdamW", "Lookahead", "Muon", "Prodigy", "SAM", "ScheduleFree"}
SHARE = {"bad_arguments", "config_round_trip", "twin"}
#: Callbacks whose interruption is tested in their own files, too.
INTERRUPTED = {"Checkpoint", "EarlyStopping", "NonFiniteGuard", "ReduceLROnPlateau"}
#: Of each family those that ask most of the backend. The formulas of the others are those that TensorFlow runs, too.
TWINS_ON_JAX = {
    *("AdEMAMix", "AdaHessian", "Adafactor", "AdamW", "COCOB", "DoG", "Ftrl", "LAMB", "Lion", "Lookahead", "Muon"),
    *("Prodigy", "SAM", "SM3", "ScheduleFree"),
}
if ON_JAX:
    ALWAYS |= {("SOAP", "modes_agree")}
    LONG |= {"Adafactor", "Adan", "LAMB", "Muon", "Prodigy"}
    WHOLE = {"AdamW", "SAM", "ScheduleFree"}


def is_long(card, check):
    """Whether a pair is run with `--all` only.

    JAX compiles each operation of rules with decompositions by itself, which takes minutes, unless the step is compiled
    as a whole. The moving average of `use_ema` does not depend on the rule.
    """
    if (card.name, check.name) in ALWAYS:
        return False
    if card.kind == "callback":
        return _is_long_of_callback(card, check)
    if ON_JAX and card.kind == "transform" and card.name not in {"GradientNoise", "Hyperball"}:
        return check.name != "config_round_trip"
    if ON_JAX and check.name == "twin" and card.kind == "optimizer":
        return card.name not in TWINS_ON_JAX
    if ON_JAX and card.name in {"KLSOAP", "Kron", "SOAP", "Shampoo"}:
        return check.name not in SHARE
    if check.name == "evaluation_weights" and "averages" not in ok.testing.traits(card):
        return True
    if (card.name, check.name) == ("SOAP", "twin"):
        return True  # half a minute; `test_parity.py` runs its formula
    if card.kind == "optimizer" and not check.engine:
        return card.name not in WHOLE and check.name not in SHARE
    on_jax = ON_JAX and card.kind == "transform"  # the check `transforms` runs on optimizers
    return check.engine and (card.name in LONG or on_jax)


def _is_long_of_callback(card, check):
    """Little of what callbacks do depends on the backend."""
    if check.name == "goes_on":
        return card.name in INTERRUPTED or (ON_JAX and card.name not in {"AveragedWeights", "Resume"})
    if check.name in {"fits_twice", "leaves_no_trace", "survives_failure"}:
        return ON_JAX or card.name not in {"Checkpoint", "NonFiniteGuard", "Unfreeze"}
    return False


PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if is_long(*pair.values) else [])
    for pair in ok.testing.conformance().args[1]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

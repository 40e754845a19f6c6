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
#: Checks of the engine that only these show: sums over the whole model, a rule around another one.
ENGINE = {
    "Prodigy": {"replicas"},
    "ScheduleFree": {"evaluation_weights", "modes_agree", "replicas"},
}
#: What only these show.
ALWAYS = {("AdaHessian", "hessian_vector"), ("Lookahead", "modes_agree")}
#: Optimizers of which all checks of the rule are run; of the others those in SHARE, and the rest with `--all`.
WHOLE = {"AdamW", "SAM", "ScheduleFree"}
SHARE = {"bad_arguments", "config_round_trip", "twin"}
#: Twins that take half a minute and show little alone: `test_parity.py` runs SOAP's formula, of which KL-SOAP's differs
#: in what it averages, and `test_averages.py` that these are Schedule-Free around a rule.
DEAR_TWINS = {"KLSOAP", "SOAP", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "ScheduleFreeSGD"}
#: Callbacks whose interruption is tested in their own files, too.
INTERRUPTED = {
    *("Checkpoint", "EarlyStopping", "NonFiniteGuard", "ReduceLROnPlateau", "Resume", "TimeBudget", "Unfreeze"),
    "ValidateEvery",
}
#: Of each family those that ask most of the backend. The formulas of the others are those that TensorFlow runs, too.
TWINS_ON_JAX = {
    *("AdEMAMix", "Adafactor", "AdamW", "COCOB", "DoG", "Ftrl", "LAMB", "Lion", "Lookahead", "Muon", "Prodigy", "SAM"),
    *("SM3", "ScheduleFree"),
}
#: Of the other kinds, the cards that are checked in whole on JAX, and the checks that ask something of the backend.
WHOLE_ON_JAX = {
    *("Cosine", "DropPath", "GhostBatchNormalization", "GroupLasso", "HeNormal", "NuclearNorm", "OneCycle"),
    *("Orthogonal", "SpectralNormalization"),
}
CHECKS_ON_JAX = {
    "schedule": {"compiled_is_eager", "tensor_step_is_int_step"},
    "initializer": {"variance", "orthogonal", "exact", "sparse"},
    "regularizer": {"compiled_is_eager"},
    "layer": {"compiled_is_eager"},
}
if ON_JAX:
    LONG |= {"Adafactor", "Adan", "LAMB", "Muon", "Prodigy"}
    WHOLE = {"AdamW", "SAM"}


def is_long(card, check):
    """Whether a pair is run with `--all` only.

    JAX compiles each operation of rules with decompositions by itself, which takes minutes, unless the step is compiled
    as a whole. The moving average of `use_ema` does not depend on the rule.
    """
    if (card.name, check.name) in ALWAYS:
        return False
    if card.kind == "callback":
        return _is_long_of_callback(card, check)
    if ON_JAX and card.kind == "transform":
        return check.name != "config_round_trip" and (card.name, check.name) != ("Hyperball", "twin")
    if card.kind == "transform" and check.name in {"accumulation", "dtypes", "hyperparameters", "modes_agree", "rows"}:
        return card.name not in {"AdaptiveClip", "Hyperball"}
    if ON_JAX and card.kind in CHECKS_ON_JAX:
        return card.name not in WHOLE_ON_JAX and check.name not in CHECKS_ON_JAX[card.kind]
    if card.kind != "optimizer":
        return False
    if check.name == "twin" and (card.name in DEAR_TWINS or (ON_JAX and card.name not in TWINS_ON_JAX)):
        return True
    if check.name == "evaluation_weights" and "averages" not in ok.testing.traits(card):
        return True
    if not check.engine:
        return card.name not in WHOLE and check.name not in SHARE
    return card.name in LONG or check.name not in ENGINE.get(card.name, {check.name})


def _is_long_of_callback(card, check):
    """Little of what callbacks do depends on the backend."""
    if check.name == "goes_on":
        return card.name in INTERRUPTED or (ON_JAX and card.name != "AveragedWeights")
    if check.name in {"fits_twice", "leaves_no_trace", "survives_failure"}:
        return ON_JAX or card.name != {"fits_twice": "Checkpoint"}.get(check.name, "NonFiniteGuard")
    return False


PAIRS = [
    pytest.param(*pair.values, id=pair.id, marks=[pytest.mark.long] if is_long(*pair.values) else [])
    for pair in ok.testing.conformance().args[1]
]


@pytest.mark.parametrize(("card", "check"), PAIRS)
def test_conformance(card, check):
    check(card)

"""References of Yogi, LaProp, ADOPT and StableAdamW."""

from typing import Any

from keras_optkit.testing.parity.reference import Reference

_ADAM: dict[str, Any] = {"lr": "learning_rate", "betas": ("beta_1", "beta_2"), "eps": "epsilon"}
_DECAYED: dict[str, Any] = _ADAM | {"weight_decay": "weight_decay"}

REFERENCES = (
    Reference(
        "Yogi",
        "pytorch_optimizer:Yogi",
        _DECAYED | {"initial_accumulator": "initial_accumulator_value"},
        theirs={"foreach": False},
        run="yogi_from_zero",
        deviations="its first moment is made to start at 0, as in the paper, not at the initial value of the second",
    ),
    Reference(
        "LaProp",
        "pytorch_optimizer:LaProp",
        _ADAM,
        theirs={"foreach": False},
        run="corrected_laprop",
        deviations="its ε is moved behind the bias correction, as in the paper, and 1e-15 inside of the root left out; "
        "it decays the weights after the step, so there is no decay to compare",
    ),
    Reference(
        "ADOPT",
        "optax.contrib:adopt",
        {
            "learning_rate": "learning_rate",
            "b1": "beta_1",
            "b2": "beta_2",
            "eps": "epsilon",
            "use_clipping": lambda config: config["clip_exponent"] is not None,
        },
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.01, "beta_1": 0.8, "beta_2": 0.99, "epsilon": 1e-3},
            {"learning_rate": 0.01, "clip_exponent": None},
        ),
        deviations="it has no decay, and its clipping no other exponent",
    ),
    Reference(
        "StableAdamW",
        "pytorch_optimizer:StableAdamW",
        _DECAYED,
        theirs={"weight_decouple": True, "foreach": False},
    ),
)

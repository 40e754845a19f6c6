"""References of AdEMAMix and MARS."""

from typing import Any

from keras_optkit.testing.parity.reference import Reference

_ADAM: dict[str, Any] = {
    "lr": "learning_rate",
    "betas": ("beta_1", "beta_2"),
    "eps": "epsilon",
    "weight_decay": "weight_decay",
}

REFERENCES = (
    Reference(
        "AdEMAMix",
        "pytorch_optimizer:AdEMAMix",
        _ADAM
        | {
            "betas": ("beta_1", "beta_2", "beta_3"),
            "alpha": "alpha",
            "t_alpha_beta3": lambda config: config["alpha_warmup_steps"] or None,
        },
        theirs={"weight_decouple": True},
    ),
    Reference(
        "AdEMAMix",
        "optax.contrib:ademamix",
        {
            "learning_rate": "learning_rate",
            "b1": "beta_1",
            "b2": "beta_2",
            "b3": "beta_3",
            "alpha": "alpha",
            "eps": "epsilon",
            "weight_decay": "weight_decay",
        },
        cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "beta_3": 0.99, "alpha": 8.0}),
        deviations="without warm-up",
    ),
    Reference(
        "MARS",
        "pytorch_optimizer:MARS",
        _ADAM | {"gamma": "gamma"},
        theirs={"optimize_1d": True, "foreach": False},
        run="corrected_mars",
        deviations="its first correction is made 0, as in the paper, and its ε is moved behind the bias correction",
    ),
)

"""References of Adadelta, Adamax, FTRL and Rprop."""

from collections.abc import Mapping
from typing import Any

from keras_optkit.testing.parity.reference import TOLERANCE, Reference

_NO_DECAY = "torch's decay is an L2 term in the gradient, so there is no decay to compare"
_ADADELTA: dict[str, Any] = {"lr": "learning_rate", "rho": "rho", "eps": "epsilon"}
_ADAMAX: dict[str, Any] = {"lr": "learning_rate", "betas": ("beta_1", "beta_2"), "eps": "epsilon"}
_DECAY: dict[str, Any] = {"weight_decay": "weight_decay"}
_OF_FTRL = (
    "learning_rate",
    "learning_rate_power",
    "initial_accumulator_value",
    "l1_regularization_strength",
    "l2_regularization_strength",
    "l2_shrinkage_regularization_strength",
    "beta",
    "weight_decay",
)


def limits(config: Mapping[str, Any]) -> tuple[float, float]:
    """The limits of Rprop's steps, which are absolute in torch."""
    return (config["learning_rate"] * config["min_factor"], config["learning_rate"] * config["max_factor"])


REFERENCES = (
    Reference("Adadelta", "torch.optim:Adadelta", _ADADELTA, deviations=_NO_DECAY),
    Reference("Adadelta", "pytorch_optimizer:AdaDelta", _ADADELTA | _DECAY, theirs={"weight_decouple": True}),
    Reference("Adamax", "torch.optim:Adamax", _ADAMAX, deviations=_NO_DECAY),
    Reference("Adamax", "pytorch_optimizer:AdaMax", _ADAMAX | _DECAY, theirs={"weight_decouple": True}),
    Reference(
        "Ftrl",
        "keras.optimizers:Ftrl",
        {name: name for name in _OF_FTRL},
        cases=(
            {"learning_rate": 0.125, "initial_accumulator_value": 0.125},
            {
                "learning_rate": 0.1,
                "learning_rate_power": -0.7,
                "initial_accumulator_value": 0.5,
                "l1_regularization_strength": 0.02,
                "l2_regularization_strength": 0.1,
                "l2_shrinkage_regularization_strength": 0.01,
                "beta": 0.5,
            },
        ),
        run="of_keras",
        tolerance={"float32": 1e-4, "float64": TOLERANCE["float64"]},
        deviations="Keras rounds the initial value of n to float32, so powers of 2 are compared; in float32, both "
        "lose digits in n'ᵖ - nᵖ in the first updates",
    ),
    Reference(
        "Rprop",
        "torch.optim:Rprop",
        {"lr": "learning_rate", "etas": ("eta_minus", "eta_plus"), "step_sizes": limits},
        deviations="it has no decay",
    ),
)

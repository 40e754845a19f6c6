"""References of the optimizers that look at whole parameters, and of Prodigy."""

from typing import Any

from keras_optkit.testing.parity.reference import TOLERANCE, Reference

_RATE = {"lr": "learning_rate", "weight_decay": "weight_decay"}


def first_bases(variables: list[Any], bases: Any) -> dict[str, Any]:
    """The bases that SOAP begins with, by their names in files."""
    return {
        f"slot.basis_{axis}.{i}": basis
        for i, sides in enumerate(bases)
        if len(variables[i].shape) > 1 and "bias" not in variables[i].name
        for axis, basis in enumerate(sides)
        if basis is not None
    }


def _prodigy(first_distance: float, dtype: str) -> Reference:
    return Reference(
        "Prodigy",
        "prodigyopt:Prodigy",
        _RATE
        | {
            "betas": ("beta_1", "beta_2"),
            "beta3": "beta_3",
            "eps": "epsilon",
            "d0": "initial_d",
            "d_coef": "d_coef",
            "growth_rate": lambda config: config["growth_rate"] or float("inf"),
            "use_bias_correction": "bias_correction",
            "safeguard_warmup": "safeguard_warmup",
        },
        ours={"initial_d": first_distance},
        cases=(
            {},
            {"bias_correction": True, "safeguard_warmup": True},
            {"growth_rate": 1.02, "d_coef": 0.5, "beta_1": 0.8, "beta_3": 0.9},
        ),
        tolerance={dtype: TOLERANCE[dtype]},
        deviations="in float32 from a larger d₀: steps of 1e-6 are below the resolution of the weights"
        if dtype == "float32"
        else "",
    )


REFERENCES = (
    Reference(
        "LAMB",
        "optax:lamb",
        {
            "learning_rate": "learning_rate",
            "b1": "beta_1",
            "b2": "beta_2",
            "eps": "epsilon",
            "weight_decay": "weight_decay",
        },
    ),
    Reference(
        "Adafactor",
        "torch.optim:Adafactor",
        _RATE | {"beta2_decay": "beta_2_decay", "d": "clip_threshold", "eps": lambda _: (1e-15, 1e-3)},
        cases=(  # below 1/√t for long, and above it from the fifth step on
            {"learning_rate": 0.01},
            {"learning_rate": 0.5, "clip_threshold": 1.5, "beta_2_decay": -0.5},
        ),
        view="matrices",
        deviations="torch's ε₁ is compared with a root and ours with its square, so that 1e-15 there is 1e-30 here",
    ),
    _prodigy(1e-2, "float32"),
    _prodigy(1e-6, "float64"),
    Reference(
        "Muon",
        "torch.optim:Muon",
        _RATE
        | {
            "momentum": "momentum",
            "nesterov": "nesterov",
            "ns_steps": "ns_steps",
            "adjust_lr_fn": lambda config: {"moonlight": "match_rms_adamw", "keller_jordan": "original"}[
                config["scaling"]
            ],
        },
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.01, "scaling": "keller_jordan", "nesterov": False},
            {"learning_rate": 0.01, "momentum": 0.8, "ns_steps": 3},
        ),
        view="matrices",
        only="MuonRule",
        run="exact_muon",
        deviations="without its rounding to bfloat16",
    ),
    Reference(
        "Muon",
        "torch.optim:AdamW",
        _RATE | {"betas": lambda _: (0.9, 0.95)},
        cases=({"learning_rate": 0.01},),
        view="flat vectors",
        only="AdamRule",
        deviations="the parameters that are left to AdamW",
    ),
    Reference(
        "SOAP",
        "pytorch_optimizer:SOAP",
        _RATE
        | {
            "betas": ("beta_1", "beta_2"),
            "shampoo_beta": "shampoo_beta",
            "eps": "epsilon",
            "precondition_frequency": "precondition_frequency",
            "max_precondition_dim": "max_precondition_dim",
        },
        cases=(
            {"learning_rate": 0.01, "precondition_frequency": 3, "max_precondition_dim": 7},
            {"learning_rate": 0.01, "beta_1": 0.9, "beta_2": 0.9, "shampoo_beta": 0.8, "precondition_frequency": 2},
        ),
        view="flat vectors",
        run="exact_soap",
        inject=first_bases,
        deviations="from the same first bases, since eigenvectors are not unique; QR in the dtype of the rest",
    ),
)

"""References of Muon's relatives."""

from __future__ import annotations

from typing import Any

from keras_optkit.testing.parity.reference import Reference

_RATE = {"lr": "learning_rate", "weight_decay": "weight_decay"}
_EXACT = "without its rounding to bfloat16"


def _scion(rule: str, norm: int, constrained: bool, deviations: str = "", **options: Any) -> Reference:
    """One of Scion's norms; the reference does not decay with the constraint."""
    radius = "output_radius" if rule == "ScionSignRule" else "radius"
    arguments: dict[str, Any] = {
        "lr": "learning_rate",
        "momentum": lambda config: 1 - config["momentum"],
        "constraint": "constrained",
        "scale": radius,
        "ns_steps": "ns_steps",
        "rms_epsilon": "epsilon",
    }
    return Reference(
        "Scion",
        "pytorch_optimizer:SCION",
        arguments | ({} if constrained else {"weight_decay": "weight_decay"}),
        theirs={"norm_type": norm, **options},
        ours={"constrained": constrained},
        cases=(
            {"learning_rate": 0.01, "output_radius": 4.0},
            {"learning_rate": 0.02, "momentum": 0.5, "radius": 3.0, "ns_steps": 3, "epsilon": 1e-4},
        ),
        view="matrices",
        only=rule,
        run="exact_orthogonal",
        deviations=deviations,
    )


#: By how much the radius of the convolution's kernel, four outputs of two inputs in a window of nine, is to be larger
#: for the matrix that it is seen as.
_FACTORS = {(4, 18): (4 / 2) ** 0.5 / 9 / (4 / 18) ** 0.5}

#: The same for the embedding, of whose seven rows one is the input.
_ONE_HOT = {(3, 7): 7.0}

REFERENCES = (
    Reference(
        "NorMuon",
        "pytorch_optimizer:NorMuon",
        _RATE
        | {
            "momentum": "momentum",
            "beta2": "beta_2",
            "nesterov": "nesterov",
            "ns_steps": "ns_steps",
            "eps": "epsilon_2",
            "update_scale": lambda config: {"moonlight": "match_rms", "keller_jordan": "preserve_norm"}[
                config["scaling"]
            ],
        },
        view="matrices",
        only="NorMuonRule",
        run="exact_orthogonal",
        deviations=_EXACT,
    ),
    Reference(
        "AdaMuon",
        "pytorch_optimizer:AdaMuon",
        _RATE
        | {
            "betas": ("momentum", "beta_2"),
            "ns_steps": "ns_steps",
            "eps": "epsilon_2",
            "sign": "sign_momentum",
        },
        ours={"epsilon_2": 0.0},
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.02, "momentum": 0.9, "beta_2": 0.8, "sign_momentum": False, "ns_steps": 3},
        ),
        view="matrices",
        only="AdaMuonRule",
        run="exact_orthogonal",
        deviations=f"{_EXACT}; with the signs of the paper, which it leaves out; ε₂ = 0, since it adds ε₂ to a second "
        "moment without bias",
    ),
    _scion("ScionVectorRule", 5, constrained=False),
    _scion("ScionVectorRule", 5, constrained=True),
    _scion("ScionSignRule", 4, constrained=False, factors=_ONE_HOT),
    _scion("ScionRule", 2, constrained=False, factors=_FACTORS, deviations=_EXACT),
    _scion("ScionRule", 2, constrained=True, factors=_FACTORS, deviations=f"{_EXACT}; no decay beside the constraint"),
)

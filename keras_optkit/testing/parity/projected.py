"""References of AdamP and SGDP."""

from typing import Any

from keras_optkit.testing.parity.reference import Reference

_COMMON: dict[str, Any] = {
    "lr": "learning_rate",
    "eps": "epsilon",
    "delta": "delta",
    "wd_ratio": "decay_ratio",
    "nesterov": "nesterov",
    "weight_decay": "weight_decay",
}
_THEIRS: dict[str, Any] = {"weight_decouple": True, "foreach": False}

REFERENCES = (
    Reference(
        "AdamP",
        "pytorch_optimizer:AdamP",
        _COMMON | {"betas": ("beta_1", "beta_2")},
        _THEIRS,
        view="units",
        run="corrected_adamp",
        deviations="its ε is moved behind the bias correction, as in the authors' code",
    ),
    Reference("SGDP", "pytorch_optimizer:SGDP", _COMMON | {"momentum": "momentum"}, _THEIRS, view="units"),
)

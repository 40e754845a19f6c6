"""References of Adam's relatives."""

from keras_optkit.testing.parity.reference import Reference

_ADAM = {"lr": "learning_rate", "betas": ("beta_1", "beta_2"), "eps": "epsilon"}
_DECAYED = _ADAM | {"weight_decay": "weight_decay"}
_OPTAX = {"learning_rate": "learning_rate", "b1": "beta_1", "b2": "beta_2"}

REFERENCES = (
    Reference(
        "Adam",
        "torch.optim:Adam",
        _ADAM | {"amsgrad": "amsgrad"},
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.01, "beta_1": 0.5, "beta_2": 0.9, "epsilon": 1e-3},
            {"learning_rate": 0.01, "amsgrad": True},
        ),
    ),
    Reference(
        "AdamW",
        "torch.optim:AdamW",
        _DECAYED | {"amsgrad": "amsgrad"},
        cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "beta_1": 0.8, "amsgrad": True}),
    ),
    Reference(
        "NAdam",
        "torch.optim:NAdam",
        _DECAYED | {"momentum_decay": "momentum_decay"},
        {"decoupled_weight_decay": True},
    ),
    Reference("RAdam", "torch.optim:RAdam", _DECAYED, {"decoupled_weight_decay": True}),
    Reference(
        "AdaBelief",
        "optax:adabelief",
        _OPTAX | {"eps": "epsilon", "eps_root": "epsilon"},
    ),
    Reference(
        "Adan",
        "pytorch_optimizer:Adan",
        _DECAYED | {"betas": ("beta_1", "beta_2", "beta_3")},
    ),
    Reference("Lion", "optax:lion", _OPTAX | {"weight_decay": "weight_decay"}),
)

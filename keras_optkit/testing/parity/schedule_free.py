"""The reference of Schedule-Free RAdam."""

from keras_optkit.testing.parity.reference import Reference

REFERENCES = (
    Reference(
        "ScheduleFreeRAdam",
        "schedulefree:RAdamScheduleFree",
        {name: name for name in ("r", "weight_lr_power", "weight_decay", "silent_sgd_phase")}
        | {"lr": "learning_rate", "betas": ("beta_1", "beta_2"), "eps": "epsilon"},
        cases=(
            {"learning_rate": 0.05},
            {"learning_rate": 0.05, "beta_1": 0.85, "beta_2": 0.99, "silent_sgd_phase": False},
            {"learning_rate": 0.05, "beta_2": 0.9, "epsilon": 1e-3, "r": 1.5, "weight_lr_power": 1.0},
        ),
        evaluated="x",
        run="evaluated_radam",
    ),
)

"""References of SGD, Adagrad and RMSprop."""

from keras_optkit.testing.parity.reference import Reference

_NO_DECAY = "torch's decay is an L2 term in the gradient, so there is no decay to compare"

REFERENCES = (
    Reference(
        "SGD",
        "torch.optim:SGD",
        {"lr": "learning_rate", "momentum": "momentum", "nesterov": "nesterov"},
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.01, "momentum": 0.9},
            {"learning_rate": 0.01, "momentum": 0.9, "rate_in_velocity": False},
            {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True, "rate_in_velocity": False},
        ),
        deviations=_NO_DECAY,
    ),
    Reference(
        "Adagrad",
        "torch.optim:Adagrad",
        {
            "lr": "learning_rate",
            "initial_accumulator_value": "initial_accumulator_value",
            "eps": "epsilon",
        },
        ours={"epsilon_inside": False},
        cases=({"learning_rate": 0.01}, {"learning_rate": 0.1, "initial_accumulator_value": 0.1, "epsilon": 1e-3}),
        deviations=f"ε outside of the root; {_NO_DECAY}",
    ),
    Reference(
        "RMSprop",
        "torch.optim:RMSprop",
        {"lr": "learning_rate", "alpha": "rho", "eps": "epsilon", "momentum": "momentum", "centered": "centered"},
        ours={"epsilon_inside": False, "rate_in_velocity": False},
        cases=(
            {"learning_rate": 0.01},
            {"learning_rate": 0.01, "rho": 0.99, "momentum": 0.9, "epsilon": 1e-3, "centered": True},
        ),
        deviations=f"ε outside of the root; {_NO_DECAY}",
    ),
)

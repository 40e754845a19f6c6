"""Reference of Signum."""

from keras_optkit.testing.parity.reference import Reference

REFERENCES = (
    Reference(
        "Signum",
        "pytorch_optimizer:SignSGD",
        {"lr": "learning_rate", "momentum": "momentum", "weight_decay": "weight_decay"},
        theirs={"weight_decouple": True},
    ),
)

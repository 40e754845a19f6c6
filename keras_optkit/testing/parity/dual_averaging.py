"""Reference of MADGRAD."""

from keras_optkit.testing.parity.reference import Reference

REFERENCES = (
    Reference(
        "MADGRAD",
        "pytorch_optimizer:MADGRAD",
        {
            "lr": lambda config: config["learning_rate"] - config["epsilon"],
            "momentum": "momentum",
            "eps": "epsilon",
            "weight_decay": "weight_decay",
        },
        theirs={"weight_decouple": False},
        deviations="it adds ε to the rate, which is subtracted before",
    ),
)

"""Reference of ProximalAdagrad."""

from keras_optkit.testing.parity.reference import Reference

REFERENCES = (
    Reference(
        "ProximalAdagrad",
        "tensorflow.raw_ops:ResourceApplyProximalAdagrad",
        {
            "lr": "learning_rate",
            "initial_accumulator_value": "initial_accumulator_value",
            "l1": "l1_regularization_strength",
            "l2": "l2_regularization_strength",
            "weight_decay": "weight_decay",
        },
        cases=(
            {"learning_rate": 0.1},
            {
                "learning_rate": 0.1,
                "initial_accumulator_value": 0.5,
                "l1_regularization_strength": 0.01,
                "l2_regularization_strength": 0.02,
            },
            {"learning_rate": 0.1, "initial_accumulator_value": 0.0, "l1_regularization_strength": 0.01},
        ),
        run="proximal_adagrad",
        deviations="it has no decay, which is subtracted from the weights before",
    ),
)

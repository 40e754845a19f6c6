"""References of the optimizers whose second moments are smaller than the weights."""

from keras_optkit.testing.parity.reference import Reference

_RATE = {"lr": "learning_rate", "weight_decay": "weight_decay"}

#: The variables of `keras_optkit.testing.parity.problem.Parts`, by names that the reference of Adam-mini knows.
_NAMES = ("mlp", "bias", "mlp", "mlp", "bias", "query", "bias", "wo", "embed", "output")

REFERENCES = (
    Reference(
        "CAME",
        "pytorch_optimizer:CAME",
        _RATE
        | {
            "betas": ("beta_1", "beta_2", "beta_3"),
            "eps1": "epsilon_1",
            "eps2": "epsilon_2",
            "clip_threshold": "clip_threshold",
        },
        view="matrices",
    ),
    Reference(
        "SM3",
        "pytorch_optimizer:SM3",
        {"lr": "learning_rate", "momentum": "momentum", "eps": "epsilon"},
        deviations="it has no weight decay",
    ),
    Reference(
        "AdamMini",
        "adam_mini:Adam_mini",
        _RATE | {"betas": ("beta_1", "beta_2"), "eps": "epsilon"},
        {"names": _NAMES, "dim": 12, "n_heads": 6, "verbose": False},  # 12 · 12 / 6 elements in a head
        {"decay_mask": "auto", "head_layers": [r"einsum_dense(_\d+)?/kernel$"]},
        view="matrices",
        run="named",
        deviations="its blocks are by the names of layers, which are given; embeddings have one for each row; biases "
        "are not decayed, as with our default mask",
    ),
)

"""References of optimizers with a matrix for each axis: KLSOAP and Kron.

Shampoo has been compared with its authors' `distributed_shampoo`, which is not in a package registry.
"""

from keras_optkit.testing.parity.reference import Reference

_RATE = {"lr": "learning_rate", "weight_decay": "weight_decay"}

REFERENCES = (
    Reference(
        "KLSOAP",
        "heavyball:KLSOAP",
        _RATE
        | {
            "betas": ("beta_1", "beta_2"),
            "shampoo_beta": lambda config: config["shampoo_beta"] or config["beta_2"],
            "eps": "epsilon",
            "precondition_frequency": "precondition_frequency",
            "max_precond_dim": "max_precondition_dim",
        },
        theirs={"merge_dims": False, "use_precond_schedule": False, "compile_step": False},
        ours={"initial_basis": "identity", "epsilon": 1e-15},
        cases=(  # it holds these numbers in float32
            {"learning_rate": 2.0**-7, "precondition_frequency": 3, "max_precondition_dim": 7},
            {
                "learning_rate": 2.0**-7,
                "beta_1": 0.875,
                "beta_2": 0.75,
                "shampoo_beta": 0.875,
                "precondition_frequency": 2,
            },
        ),
        view="flat vectors",
        run="kl_soap",
        deviations="its bias-corrected β are rounded to float32, which is patched; from the axes as first bases; "
        "without the shift of its QR; with the paper's means for kernels of more than two axes, where it has those of "
        "SOAP; decay after the step; √v or ε, the larger, not their sum",
    ),
    Reference(
        "Kron",
        "timm.optim:Kron",
        _RATE
        | {
            "momentum": "momentum",
            "preconditioner_update_probability": "update_probability",
            "precond_lr": "preconditioner_learning_rate",
            "precond_init_scale": "initial_scale",
            "max_size_triangular": "max_precondition_dim",
        },
        view="flat vectors",
        run="kron",
        deviations="with the mean over its noise; it balances its factors at random, here in updates 100, 200, ..., "
        "which leaves the weights as they are",
    ),
)

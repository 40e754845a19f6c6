"""References of the optimizers whose steps are scaled to the size of each parameter."""

from keras_optkit.testing.parity.reference import Reference

_RATE = {"lr": "learning_rate", "weight_decay": "weight_decay"}

REFERENCES = (
    Reference(
        "LARS",
        "pytorch_optimizer:LARS",
        _RATE | {"momentum": "momentum", "trust_coefficient": "trust_coefficient", "nesterov": "nesterov"},
        ours={"decay_mask": "auto"},
        view="flat vectors",
        deviations="vectors are neither scaled nor decayed, as with our default mask",
    ),
    Reference(
        "NovoGrad",
        "pytorch_optimizer:NovoGrad",
        _RATE | {"betas": ("beta_1", "beta_2"), "eps": "epsilon", "grad_averaging": "grad_averaging"},
    ),
)

"""References of DoG, DoWG and COCOB, which measure from the initial weights."""

from keras_optkit.testing.parity.reference import TOLERANCE, Reference

_RATE = {"learning_rate": "learning_rate", "weight_decay": "weight_decay", "eps": "epsilon"}

REFERENCES = (
    Reference(
        "DoG",
        "optax.contrib:dog",
        _RATE | {"init_step": lambda config: ("heuristic", config["initial_distance"])},
    ),
    Reference("DoWG", "optax.contrib:dowg", _RATE | {"init_estim_sq_dist": lambda c: c["initial_distance"] ** 2}),
    Reference(
        "COCOB",
        "optax.contrib:cocob",
        _RATE | {"alpha": "alpha"},
        cases=({"learning_rate": 1.0}, {"learning_rate": 1.0, "alpha": 10.0, "epsilon": 1e-3}),
        tolerance=TOLERANCE | {"float32": 2e-5},
        deviations="its learning rate scales the gradients, so that rates other than 1 are not compared; rounding adds "
        "up in the reward, so that in float32 the reference is 1.2e-5 off its float64 values, and ours 9.0e-6",
    ),
)

"""References of Schedule-Free, Lookahead, and of what needs a second gradient or the Hessian."""

from collections.abc import Mapping
from typing import Any

from keras_optkit.testing.parity.reference import Reference

_SCHEDULE_FREE = {name: name for name in ("warmup_steps", "r", "weight_lr_power", "weight_decay")}
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"learning_rate": 0.05},
    {"learning_rate": 0.05, "warmup_steps": 20},
    {"learning_rate": 0.05, "warmup_steps": 20, "r": 1.5, "weight_lr_power": 1.0},
)
_SGD = {"class_name": "SGD", "config": {"momentum": 0.9, "rate_in_velocity": False}}
_ADAMW = {"class_name": "AdamW", "config": {"weight_decay": 0.1, "decay_mask": "all"}}


def inner(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The inner optimizer in torch."""
    name, ours = config["inner"]["class_name"].rpartition(">")[2], config["inner"]["config"]
    arguments: dict[str, Any] = {"lr": config["learning_rate"]}
    if name == "SGD":
        arguments |= {"momentum": ours["momentum"], "nesterov": ours["nesterov"]}
    elif name == "RMSprop":
        arguments |= {"alpha": ours["rho"]}
    else:
        arguments |= {"betas": (ours["beta_1"], ours["beta_2"]), "weight_decay": config["weight_decay"]}
    return f"torch.optim:{name}", arguments


def tied_radius(config: Mapping[str, Any]) -> float:
    """GSAM's radius at a constant learning rate."""
    high, low = config["max_learning_rate"], config["min_learning_rate"]
    if high is None:
        return float(config["rho"])
    share = (config["learning_rate"] - low) / (high - low)
    return float(config["rho_min"] + (config["rho"] - config["rho_min"]) * share)


#: Arguments of the optimizers that need the Hessian.
_CURVED = {
    "lr": "learning_rate",
    "betas": ("beta_1", "beta_2"),
    "eps": "epsilon",
    "update_period": "update_period",
    "weight_decay": "weight_decay",
}

REFERENCES = (
    Reference(
        "ScheduleFreeSGD",
        "schedulefree:SGDScheduleFreeReference",
        _SCHEDULE_FREE | {"lr": "learning_rate", "momentum": "momentum"},
        ours={"momentum": 0.8},
        cases=_SETTINGS,
        evaluated="x",
    ),
    Reference(
        "ScheduleFreeAdamW",
        "schedulefree:AdamWScheduleFreeReference",
        _SCHEDULE_FREE | {"lr": "learning_rate", "betas": ("beta_1", "beta_2"), "eps": "epsilon"},
        ours={"beta_1": 0.85, "beta_2": 0.99},
        cases=_SETTINGS,
        evaluated="x",
    ),
    Reference(
        "ScheduleFree",
        "schedulefree:ScheduleFreeWrapperReference",
        {"inner": inner, "momentum": "momentum", "r": "r", "weight_decay_at_y": "weight_decay"},
        cases=(
            {
                "inner": {"class_name": "RMSprop", "config": {"rho": 0.99, "epsilon_inside": False}},
                "learning_rate": 0.01,
                "momentum": 0.8,
                "r": 1.0,
            },
            {"inner": _SGD, "learning_rate": 0.01, "momentum": 0.8},
        ),
        run="around",
        evaluated="x",
    ),
    Reference(
        "Lookahead",
        "pytorch_optimizer:Lookahead",
        {"inner": inner, "k": "sync_period", "alpha": "slow_step_size"},
        {"pullback_momentum": "none"},
        ours={"weight_decay": None},
        cases=(
            {"inner": _SGD, "learning_rate": 0.01},
            {"inner": _ADAMW, "learning_rate": 0.01, "sync_period": 3, "slow_step_size": 0.8, "weight_decay": 0.1},
            {"inner": _SGD, "learning_rate": 0.01, "sync_period": 1, "slow_step_size": 0.3},
        ),
        run="around",
        evaluated="slow_params",
        deviations="the decay is that of the inner AdamW",
    ),
    Reference(
        "SAM",
        "pytorch_optimizer:SAM",
        {"inner": inner, "rho": "rho", "adaptive": "adaptive"},
        ours={"weight_decay": None},
        cases=(
            {"inner": _SGD, "learning_rate": 0.02, "rho": 0.3},
            {"inner": _ADAMW, "learning_rate": 0.02, "rho": 0.3, "adaptive": True, "weight_decay": 0.1},
            {"inner": _ADAMW, "learning_rate": 0.02, "rho": 0.3, "weight_decay": 0.1},
            {"inner": _SGD, "learning_rate": 0.02, "rho": 0.3, "adaptive": True},
        ),
        run="two_gradients",
        needs="second_gradient",
        deviations="its norm is rounded to float32, which is patched for float64; the decay is that of the inner AdamW",
    ),
    Reference(
        "ASAM",
        "pytorch_optimizer:SAM",
        {"inner": inner, "rho": "rho"},
        {"adaptive": True, "vectors_plain": True},
        ours={"weight_decay": None, "eta": 0.0},
        cases=(
            {"inner": _SGD, "learning_rate": 0.02, "rho": 0.3},
            {"inner": _ADAMW, "learning_rate": 0.02, "rho": 0.3, "weight_decay": 0.1},
        ),
        view="flat vectors",
        run="two_gradients",
        needs="second_gradient",
        deviations="has no eta; as of SAM; its groups make it plain for vectors",
    ),
    Reference(
        "GSAM",
        "pytorch_optimizer:GSAM",
        {"inner": inner, "rho": tied_radius, "alpha": "alpha", "adaptive": "adaptive"},
        ours={"weight_decay": None},
        cases=(
            {"inner": _SGD, "learning_rate": 0.02, "rho": 0.3},
            {
                "inner": _ADAMW,
                "learning_rate": 0.02,
                "rho": 0.5,
                "rho_min": 0.1,
                "max_learning_rate": 0.04,
                "alpha": 0.2,
                "weight_decay": 0.1,
            },
            {"inner": _SGD, "learning_rate": 0.02, "rho": 0.3, "adaptive": True},
        ),
        run="two_gradients",
        needs="second_gradient",
        deviations="as of SAM; its schedule of rho is given our value",
    ),
    Reference(
        "SophiaH",
        "pytorch_optimizer:SophiaH",
        _CURVED | {"p": "rho"},
        {"hessian_distribution": "gaussian"},
        cases=(
            {"learning_rate": 0.1, "rho": 0.1, "update_period": 3},
            {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.9, "rho": 1.0, "epsilon": 0.1, "update_period": 1},
        ),
        run="curved",
        needs="hessian_vector",
        deviations="is given our random vectors",
    ),
    Reference(
        "AdaHessian",
        "pytorch_optimizer:AdaHessian",
        _CURVED | {"hessian_power": "hessian_power"},
        ours={"spatial_averaging": False},
        cases=(
            {"learning_rate": 0.01, "epsilon": 0.1},
            {"learning_rate": 0.02, "beta_1": 0.8, "beta_2": 0.9, "hessian_power": 0.5, "epsilon": 0.1},
        ),
        run="curved",
        needs="hessian_vector",
        deviations="is given our random vectors; has no spatial averaging; with update_period > 1, where its bias "
        "correction counts updates and not products, it is not compared",
    ),
)

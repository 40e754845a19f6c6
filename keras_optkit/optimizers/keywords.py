"""The keywords that all optimizers have: how they are checked, and what is said where another name was meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras

from keras_optkit import arguments
from keras_optkit.optimizers.engine.files import is_opening
from keras_optkit.optimizers.rule import Value, is_dynamic
from keras_optkit.registry import cards
from keras_optkit.saving import constructor_parameters


def _checked_decay(name: str, value: Value | None) -> Value | None:
    return value if is_dynamic(value) else arguments.real(name, value, 0, optional=True)


def _positive(name: str, value: Any) -> Any:
    return arguments.real(name, value, 0, closed="neither", optional=True)


def checked_patterns(name: str, value: Any) -> list[str] | None:
    """Returns the argument if it is a list of regular expressions or None."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of regular expressions or None, got {value!r}.")
    return [arguments.pattern(name, pattern) for pattern in value]


def _checked_slot_dtype(name: str, value: Any) -> str | None:
    return arguments.choice(name, value, (None, "float32", "bfloat16", "bfloat16+8", "int8"))


def given_slot_dtype(slot_dtype: Any, state_dtype: Any) -> str | None:
    """The `slot_dtype` that an optimizer was given, which has a second name."""
    if _checked_slot_dtype("state_dtype", state_dtype) is None:
        return slot_dtype
    if slot_dtype not in (None, state_dtype):
        raise ValueError(f"state_dtype is another name for slot_dtype, got {slot_dtype=} and {state_dtype=}. Give one.")
    return state_dtype


def _checked_shard_state(name: str, value: Any) -> bool:
    # a model's file opens everywhere; what is left then is said once it trains
    if arguments.boolean(name, value) and keras.config.backend() != "jax" and not is_opening():
        raise ValueError(
            f"{name} must be False on the {keras.config.backend()} backend, got {value!r}: it needs a "
            "keras.distribution, which optimizers have on JAX alone."
        )
    return bool(value)


def _refused(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None, got {value!r}: the average is put into the model by swap_weights.")


#: How each common keyword is checked, whether it is given to the constructor or set as an attribute.
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "weight_decay": _checked_decay,
    "clipnorm": _positive,
    "clipvalue": _positive,
    "global_clipnorm": _positive,
    "gradient_accumulation_steps": lambda name, value: arguments.integer(name, value, 2, optional=True),
    "use_ema": arguments.boolean,
    "ema_momentum": lambda name, value: arguments.real(name, value, 0, 1, closed="left"),
    "ema_overwrite_frequency": _refused,
    "skip_nonfinite": lambda name, value: arguments.integer(name, value, 1, optional=True),
    "decay_mask": lambda name, value: arguments.choice(name, value, ("auto", "all")),
    "decay_exclude": checked_patterns,
    "layer_decay": lambda name, value: arguments.real(name, value, 0, 1, closed="right", optional=True),
    "sparse": lambda name, value: arguments.choice(name, value, ("lazy", "dense")),
    "fuse": lambda name, value: arguments.choice(name, value, ("auto", True, False)),
    "master_weights": arguments.boolean,
    "stochastic_rounding": arguments.boolean,
    "slot_dtype": _checked_slot_dtype,
    "state_dtype": _checked_slot_dtype,
    "loss_scale_factor": _positive,
    "shard_state": _checked_shard_state,
}

#: Attributes that have no setter, and what to do instead.
READ_ONLY = {
    "transforms": "they decide about the packing and are given to the constructor. Make a new optimizer.",
    "groups": "they decide about the state and are given to the constructor. Make a new optimizer.",
    "iterations": "it is a variable, which counts the updates. Use optimizer.iterations.assign(n).",
    "evaluating": "it says which weights the model holds. Use optimizer.swap_weights(evaluating).",
}

#: What other libraries and older versions of Keras call hyperparameters that have other names here.
ELSEWHERE = {
    "lr": ("learning_rate",),
    "lr_schedule": ("learning_rate",),
    "learning_rate_schedule": ("learning_rate",),
    "decay": ("weight_decay", "learning_rate"),  # in old versions of Keras that of the rate, by a schedule here
    "wd": ("weight_decay",),
    "l2": ("weight_decay",),
    "betas": ("beta_1", "beta_2"),
    "b1": ("beta_1",),
    "b2": ("beta_2",),
    "eps": ("epsilon",),
    "use_nesterov": ("nesterov",),
    "grad_clip": ("clipvalue", "global_clipnorm"),
    "gradient_clip": ("clipvalue", "global_clipnorm"),
    "grad_norm": ("global_clipnorm",),
    "max_norm": ("global_clipnorm",),
    "max_grad_norm": ("global_clipnorm",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "ema": ("use_ema",),
    "ema_decay": ("ema_momentum",),
}

#: Keywords of which at most one can be given.
EXCLUSIVE = (("clipnorm", "clipvalue", "global_clipnorm"), ("master_weights", "stochastic_rounding"))

#: Keywords that decide about the state there is and the packing.
COUNTS = ("gradient_accumulation_steps", "skip_nonfinite")
BEFORE_BUILD = {
    *COUNTS,
    "use_ema",
    "decay_mask",
    "decay_exclude",
    "layer_blocks",
    "layer_decay",
    "master_weights",
    "stochastic_rounding",
    "slot_dtype",
    "state_dtype",
    "shard_state",
}


def refuse_misspelt(name: str, value: Any, optimizer: type, hyperparameters: Iterable[str]) -> None:
    """Raises for an attribute that would do nothing, but is named like a keyword of this or of another optimizer.

    Those of other libraries count, too. Attributes of other names may be set, as with Keras's optimizers.
    """
    own = {*constructor_parameters(optimizer), *hyperparameters}
    if name in own:  # a subclass stores its argument
        return
    others = {
        card.make.__name__: constructor_parameters(card.make)
        for card in cards("optimizer", package=None)
        if isinstance(card.make, type)
    }
    theirs = [other for other, known in others.items() if name in known]
    if theirs:
        hint = f" It is a hyperparameter of {', '.join(sorted(theirs)[:4])}."
    elif name in ELSEWHERE:
        meant = [keyword for keyword in ELSEWHERE[name] if keyword in own]
        hint = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
    else:
        elsewhere = {key for known in others.values() for key in known}
        hint = arguments.near(name, own, cutoff=0.8) or arguments.near(name, elsewhere, cutoff=0.9)
    if hint or name in ELSEWHERE:
        raise AttributeError(
            f"{optimizer.__name__} has no hyperparameter {name!r} (got {name}={value!r}).{hint} "
            f"Allowed: {', '.join(sorted(own))}."
        )

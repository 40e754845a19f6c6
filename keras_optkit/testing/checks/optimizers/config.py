"""Arguments and configs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import keras

from keras_optkit.registry import Card
from keras_optkit.testing.checks.optimizers.common import made, with_ema
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import refuses


def _holds(config: Any, given: Any) -> bool:
    """Whether a config says what was given; that of an object in it may say more."""
    if isinstance(given, Mapping):
        return all(name in config and _holds(config[name], value) for name, value in given.items())
    return config == given


@check("optimizer")
def check_config_round_trip(card: Card) -> None:
    """The config holds every argument, survives JSON, and rebuilds the same optimizer, also by registered name."""
    for case in card.cases:
        common = {"clipnorm": 1.5, **with_ema(card)}
        optimizer = made(card, case, **common)
        written = json.dumps(keras.optimizers.serialize(optimizer))
        again = keras.optimizers.deserialize(json.loads(written))
        assert type(again) is type(optimizer)
        config = again.get_config()
        assert config == optimizer.get_config()
        for name, value in {**case, **common}.items():
            assert name in config, f"the config has lost {name!r}"
            assert _holds(config[name], value), f"{name}: given {value!r}, config has {config[name]!r}"
            assert _holds(getattr(again, name), value) or float(getattr(again, name)) == value
    by_name = keras.optimizers.get(keras.saving.get_registered_name(type(optimizer)))
    assert type(by_name) is type(optimizer)


@check("optimizer")
def check_bad_arguments(card: Card) -> None:
    """A bad value or an unknown keyword fails at once, and the message names argument, value and what is allowed."""
    refuses(card.make, "learning_rate", -0.1, "[0")
    refuses(card.make, "learning_rate", float("nan"), "[0")
    refuses(card.make, "learning_rate", "fast", ">= 0")
    refuses(card.make, "weight_decay", -1.0, "[0")
    refuses(card.make, "clipnorm", 0.0, "(0")
    refuses(card.make, "ema_momentum", 1.0, "[0, 1)")
    refuses(card.make, "gradient_accumulation_steps", 1, "at least 2")
    refuses(card.make, "use_ema", "yes", "True or False")
    refuses(card.make, "decay_mask", "some", "'auto', 'all'")
    refuses(card.make, "learning_rats", 0.1, "learning_rate")
    optimizer = card.make(learning_rate=1)  # integer rates are rates
    assert float(optimizer.learning_rate) == 1.0
    try:
        card.make(clipnorm=1.0, clipvalue=1.0)
    except ValueError as error:
        assert "clipvalue" in str(error)
    else:
        raise AssertionError("two forms of clipping at once were accepted")

"""Ready spaces from the cards: which optimizer, schedule, regularizer or initializer, and with which arguments.

Each is a `Space` whose `make` builds the object that a point stands for. Several are joined with `|`.

Example:
```python
import keras
import keras_optkit as ok

optimizer, regularizer = ok.tuning.spaces.optimizer(), ok.tuning.spaces.regularization()
space = optimizer | regularizer | {"units": ok.tuning.Int(8, 32)}


def build(hp):
    hidden = keras.layers.Dense(hp.units, "relu", kernel_regularizer=regularizer.make(hp))
    model = keras.Sequential([keras.Input((4,)), hidden, keras.layers.Dense(1)])
    model.compile(optimizer.make(hp), "mse")
    return model


assert build(space.sample(0)).compiled
```
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments
from keras_optkit.registry import Card, cards
from keras_optkit.schedules import Cosine, Linear, OneCycle, Warmup
from keras_optkit.space import Choice, Float, Parameter, Space

OPTIMIZERS = ("AdamW", "Lion", "Muon", "SGD")
INITIALIZERS = ("HeNormal", "HeUniform", "Orthogonal", "XavierNormal", "XavierUniform")
REGULARIZERS = ("none", "L1", "L2", "L1L2")
SCHEDULES = ("constant", "Linear", "Cosine", "OneCycle")

__all__ = ["ReadySpace", "initializer", "optimizer", "regularization", "schedule"]


class ReadySpace(Space):
    """A space whose points stand for objects; made by the functions of this module.

    Args:
        parameters: The parameters; the first says which class it is.
        make: Builds the object from the values of a point and more arguments.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.spaces.initializer()
    assert list(space) == ["initializer"]
    print(space.make(space.sample(0)))
    ```
    """

    def __init__(self, parameters: Mapping[str, Parameter], make: Callable[..., Any]) -> None:
        super().__init__(parameters)
        self._make = make

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Space:
        """The parameters alone, as a `Space`."""
        return Space.from_config(config)

    def make(self, values: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The object that a point stands for.

        Args:
            values: The values of a trial, which may have others, too.
            *args: What the function that made this space says.
            **kwargs: Likewise.

        Raises:
            ValueError: If `values` are not of this space.
        """
        for name in self.parents_first():
            if self.active(name, values) and name not in values:
                raise ValueError(f"values must have {name!r}, which is active, got {dict(values)!r}.")
        return self._make(values, *args, **kwargs)


def _chosen(names: Any, default: tuple[str, ...], known: Sequence[str]) -> tuple[str, ...]:
    """Checks the argument `names`."""
    if names is None:
        return default
    if names == "all":
        return tuple(known)
    if not isinstance(names, list | tuple) or not names:
        raise TypeError(f'names must be a list of names, "all" or None, got {names!r}.')
    for i, name in enumerate(names):
        arguments.choice(f"names[{i}]", name, known)
    return tuple(names)


def _of_cards(kind: str, names: Any, default: tuple[str, ...], name: str, none: bool = False) -> ReadySpace:
    found: dict[str, Card] = {card.name: card for card in cards(kind)}
    every = [*(["none"] if none else []), *found]
    if names == "all":  # the space is for kernels: what is for biases, activations or pretrained weights must be named
        names = [each for each in every if each == "none" or not {"bias", "activity", "anchored"} & found[each].tags]
    chosen = _chosen(names, default, every)
    parameters: dict[str, Parameter] = {name: Choice(list(chosen))}
    for which in chosen:
        if which == "none":
            continue
        for field, parameter in found[which].space.items():
            above = {f"{name}/{which}/{parent}": values for parent, values in (parameter.when or {}).items()}
            parameters[f"{name}/{which}/{field}"] = replace(parameter, when={name: which, **above})

    def make(values: Mapping[str, Any], **more: Any) -> Any:
        which = values[name]
        if which == "none":
            return None
        start = f"{name}/{which}/"
        given = {full.removeprefix(start): value for full, value in values.items() if full.startswith(start)}
        rate = more.get("learning_rate")
        if callable(rate) and not isinstance(rate, LearningRateSchedule):
            if "learning_rate" not in given:
                raise ValueError(f"learning_rate must not be a function where {which} has none in the space.")
            more["learning_rate"] = rate(given["learning_rate"])
        return found[which].make(**given | more)

    return ReadySpace(parameters, make)


def optimizer(names: Sequence[str] | str | None = None, *, name: str = "optimizer") -> ReadySpace:
    """Which optimizer, and the hyperparameters of each, in the ranges of its card.

    `make(values, **arguments)` builds it. The arguments are those of the optimizer, and come before the values;
    `learning_rate` may be a function of the value, e.g. to put it into a schedule.

    Args:
        names: Optimizers of this package, or `"all"`. None: AdamW, Lion, Muon and SGD, which differ much.
        name: Name of the choice; the others are `name/Class/argument`.

    Raises:
        TypeError: If `names` is not a list.
        ValueError: If a name is unknown.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.spaces.optimizer(["AdamW", "SGD"])
    hp = space.sample(0)
    assert type(space.make(hp, weight_decay=0.01)).__name__ == hp["optimizer"]
    assert "optimizer/SGD/momentum" in space
    ```
    """
    return _of_cards("optimizer", names, OPTIMIZERS, name)


def initializer(names: Sequence[str] | str | None = None, *, name: str = "initializer") -> ReadySpace:
    """Which initializer. `make(values, **arguments)` builds it, e.g. with `seed=`.

    Args:
        names: Initializers of this package, or `"all"`, which leaves out those of biases. None: those whose scale
            follows from the layer.
        name: Name of the choice.

    Raises:
        TypeError: If `names` is not a list.
        ValueError: If a name is unknown.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.spaces.initializer()
    print(space.make(space.sample(0), seed=1))
    ```
    """
    return _of_cards("initializer", names, INITIALIZERS, name)


def regularization(names: Sequence[str] | str | None = None, *, name: str = "regularizer") -> ReadySpace:
    """Which penalty on the weights, and how strong. `make(values)` builds it; None for `"none"`.

    Args:
        names: Regularizers of this package and `"none"`, or `"all"`, which are those for kernels. None: none, L1,
            L2 and L1L2.
        name: Name of the choice; the others are `name/Class/argument`.

    Raises:
        TypeError: If `names` is not a list.
        ValueError: If a name is unknown.

    Example:
    ```python
    import keras_optkit as ok

    space = ok.tuning.spaces.regularization(["none", "L2"])
    assert space.make({"regularizer": "none"}) is None
    assert space.make({"regularizer": "L2", "regularizer/L2/l2": 0.01}).l2 == 0.01
    ```
    """
    return _of_cards("regularizer", names, REGULARIZERS, name, none=True)


def schedule(names: Sequence[str] | str | None = None, *, name: str = "schedule") -> ReadySpace:
    """How the learning rate changes, in shares of the run and of the highest rate.

    `make(values, learning_rate, steps)` builds the schedule for this highest rate and number of updates; it is a number
    where the rate is constant.

    Args:
        names: Of `"constant"`, `"Linear"`, `"Cosine"` and `"OneCycle"`, or `"all"`. None: all.
        name: Name of the choice. `name/warmup` is the share of the updates in which the rate rises, `name/final` the
            rate at the end as a share of the highest, `name/OneCycle/pct_start` the share before its peak.

    Raises:
        TypeError: If `names` is not a list.
        ValueError: If a name is unknown.

    Example:
    ```python
    import keras_optkit as ok

    schedule, optimizer = ok.tuning.spaces.schedule(), ok.tuning.spaces.optimizer()
    hp = (schedule | optimizer).sample(0)
    made = optimizer.make(hp, learning_rate=lambda rate: schedule.make(hp, rate, steps=1000))
    ```
    """
    chosen = _chosen(names, SCHEDULES, SCHEDULES)
    parameters: dict[str, Parameter] = {name: Choice(list(chosen))}
    if warm := [which for which in chosen if which != "OneCycle"]:
        parameters[f"{name}/warmup"] = Choice([0.0, 0.03, 0.1], when={name: warm})
    if falling := [which for which in chosen if which in ("Linear", "Cosine")]:
        parameters[f"{name}/final"] = Choice([0.0, 0.01, 0.1], when={name: falling})
    if "OneCycle" in chosen:
        parameters[f"{name}/OneCycle/pct_start"] = Float(0.1, 0.5, default=0.3, when={name: "OneCycle"})

    def make(values: Mapping[str, Any], learning_rate: float, steps: int) -> Any:
        peak = arguments.real("learning_rate", learning_rate, 0)
        arguments.integer("steps", steps, 2)
        which = values[name]
        if which == "OneCycle":
            rise = max(values[f"{name}/OneCycle/pct_start"], 1.5 / steps)  # in a short run it would be empty
            return OneCycle(peak, steps, pct_start=rise)
        rising = round(values[f"{name}/warmup"] * steps)
        after: Any = peak
        if which != "constant":
            kind = {"Linear": Linear, "Cosine": Cosine}[which]
            after = kind(peak, steps - rising, final=peak * values[f"{name}/final"])
        return Warmup(after, rising) if rising else after

    return ReadySpace(parameters, make)

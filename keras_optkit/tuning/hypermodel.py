"""From a space and a build function to what KerasTuner knows: `HyperParameters` and `HyperModel`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import keras
import keras_tuner

from keras_optkit import arguments
from keras_optkit.space import Bool, Choice, Float, Int, Parameter, Space, Values
from keras_optkit.tuning.found import found_space

FIT_ARGUMENTS = ("batch_size", "epochs")


def _entry(name: str, parameter: Parameter) -> dict[str, Any]:
    """One parameter in the form in which KerasTuner stores its own."""
    match parameter:
        case Float() | Int():
            kind = type(parameter).__name__
            config = {
                "min_value": parameter.low,
                "max_value": parameter.high,
                "step": parameter.step,
                "sampling": {False: "linear", True: "log", "reverse": "reverse_log"}[parameter.log],
                "default": parameter.default,
            }
        case Bool():
            kind, config = "Boolean", {"default": bool(parameter.default)}
        case Choice(values=(True, False) | (False, True)):  # KerasTuner's own Choice turns bools into 0 and 1
            first = parameter.values[0]
            kind, config = "Boolean", {"default": first if parameter.default is None else parameter.default}
        case Choice(values=(bool() as only,)):
            kind, config = "Fixed", {"value": only}
        case Choice():
            kind, config = "Choice", {"values": list(parameter.values), "default": parameter.default}
        case _:
            raise TypeError(f"{name} must be a Float, Int, Bool or Choice, got {parameter!r}.")
    conditions = [
        {"class_name": "Parent", "config": {"name": parent, "values": list(values)}}
        for parent, values in (parameter.when or {}).items()
    ]
    return {"class_name": kind, "config": {"name": name, "conditions": conditions, **config}}


def hyperparameters(space: Space) -> keras_tuner.HyperParameters:
    """The space as KerasTuner's `HyperParameters`, with its conditions and defaults."""
    entries = [_entry(name, space[name]) for name in space.parents_first()]
    return keras_tuner.HyperParameters.from_config({"space": entries, "values": space.defaults()})


def check_names(names: Iterable[str], fit: Callable[..., Any] = keras.Model.fit) -> None:
    """Raises unless all are names of arguments of `fit`.

    Raises:
        TypeError: With the nearest name that there is.
    """
    known = inspect.signature(fit).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
        return
    allowed = [parameter.name for parameter in known if parameter.name != "self"]
    for name in names:
        if name not in allowed:
            raise TypeError(
                f"fit has no argument {name!r}; it has {', '.join(allowed)}.{arguments.near(name, allowed)}"
            )


def _check_build(build: Any) -> None:
    """Raises unless `build` can be called with the values of a trial, before an hour of trials shows it."""
    if not callable(build) or isinstance(build, keras.Model):
        raise TypeError(f"build must be a function from a trial's values to a compiled model, got {build!r}.")
    try:
        signature = inspect.signature(build)
    except ValueError:  # some functions of C have none
        return
    try:
        signature.bind(None)
    except TypeError:
        name = getattr(build, "__name__", type(build).__name__)
        raise TypeError(
            f"build must be a function of one argument, the values of a trial, got {name}{signature}."
        ) from None


class HyperModel(keras_tuner.HyperModel):
    """A build function with its space, as a KerasTuner hypermodel that any KerasTuner tuner accepts.

    The parameters `batch_size` and `epochs` of the space are handed to `fit`; the build function sees them too.

    Args:
        build: Takes the `Values` of a trial and returns a compiled model. Where `space` is None, a function as
            KerasTuner has it, which asks its argument for hyperparameters (`hp.Int("units", 8, 32)`), or a
            `keras_tuner.HyperModel`, whose `fit` trains the model then.
        space: What to search. None: what `build` asks for. It is called at several points to find that out; see
            [Tuning](../guide/tuning.md#from-a-kerastuner-script).
        name: Name of the hypermodel.

    Raises:
        TypeError: If `build` is not a function of one argument or `space` is not a mapping of parameters.
        ValueError: If `space` is None and `build` asks for nothing, or for one name in two ways.

    Example:
    ```python
    import keras
    import keras_optkit as ok


    def build(hp):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(hp.units), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        return model


    hypermodel = ok.tuning.HyperModel(build, ok.tuning.Space(units=ok.tuning.Int(2, 8)))
    assert hypermodel.build(hypermodel.hyperparameters()).count_params() == (4 + 1) * 2 + (2 + 1)
    ```
    """

    def __init__(
        self,
        build: Callable[..., keras.Model] | keras_tuner.HyperModel,
        space: Space | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        self.inner = build if isinstance(build, keras_tuner.HyperModel) else None
        if self.inner is not None and space is not None:
            raise TypeError(f"space must be None where build is a keras_tuner.HyperModel, got {space!r}.")
        if self.inner is None:
            _check_build(build)
        super().__init__(name=name)
        self.builder: Callable[..., Any] = build if self.inner is None else self.inner.build
        self.asks = space is None
        self._asked: set[str] = set()
        if space is None:
            self.space = found_space(self.builder)
            return
        try:
            self.space = space if isinstance(space, Space) else Space(space)
        except (TypeError, ValueError) as error:
            raise type(error)(f"space must be a Space, or a mapping that makes one. {error}") from None

    def hyperparameters(self) -> keras_tuner.HyperParameters:
        """The space as KerasTuner's `HyperParameters`, at the space's defaults."""
        return hyperparameters(self.space)

    def give_space_to(self, oracle: keras_tuner.Oracle) -> None:
        """Has an oracle that was given no hyperparameters search this space, an `OptunaOracle` with its constraints."""
        own = self.hyperparameters()
        if not oracle.hyperparameters.space:
            oracle.update_space(own)
        same = oracle.hyperparameters.get_config()["space"] == own.get_config()["space"]  # no narrower ranges
        if same and getattr(oracle, "space", self.space) is None:
            oracle.take_space(self.space)

    def declare_hyperparameters(self, hp: keras_tuner.HyperParameters) -> None:
        """Registers the whole space, so that no build is needed to find it out."""
        hp.merge(self.hyperparameters(), overwrite=False)

    def point(self, hp: keras_tuner.HyperParameters) -> Values:
        """The active values, in the order of the space."""
        return Values({name: hp.values[name] for name in self.space if name in hp.values})

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """Builds the model of one trial.

        Raises:
            keras_tuner.errors.FatalTypeError: (a TypeError that ends the search) If what the build function returned is
                not a compiled model.
            keras_tuner.errors.FailedTrialError: If the values violate a constraint of the space, which oracles of
                KerasTuner do not know of.
        """
        values = self.point(hp)
        if not self.space.allows(values):
            raise keras_tuner.errors.FailedTrialError(f"The constraints {list(self.space.constraints)!r} do not hold.")
        model = self._asking(self.builder, values) if self.asks else self.builder(values)
        if not isinstance(model, keras.Model) or not model.compiled:
            got = "a model that is not compiled" if isinstance(model, keras.Model) else repr(model)
            raise keras_tuner.errors.FatalTypeError(f"build must return a compiled keras.Model, got {got}.")
        return model

    def _asking(self, function: Callable[..., Any], values: Values, *args: Any, **kwargs: Any) -> Any:
        """Calls what asks for hyperparameters, with KerasTuner's object for that."""
        hp = keras_tuner.HyperParameters()
        hp.values = dict(values)
        returned = function(hp, *args, **kwargs)
        unknown = {entry.name for entry in hp.space} - set(self.space) - self._asked
        if unknown:
            self._asked |= unknown
            warnings.warn(
                f"{', '.join(map(repr, sorted(unknown)))} of hp is asked for at {dict(values)}, and was not when the "
                "space was looked for: it is not searched and has its default. Ask for it in build, at more points.",
                stacklevel=2,
            )
        return returned

    def fit(self, hp: keras_tuner.HyperParameters, model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        """Calls `model.fit`; `batch_size` and `epochs` come from the trial where the space has them.

        Raises:
            keras_tuner.errors.FatalTypeError: (a TypeError that ends the search) If `fit` has no argument of a name.
        """
        values = self.point(hp)
        if self.inner is not None and type(self.inner).fit is not keras_tuner.HyperModel.fit:
            return self._asking(self.inner.fit, values, model, *args, **kwargs)
        try:
            check_names(kwargs, model.fit)
        except TypeError as error:
            raise keras_tuner.errors.FatalTypeError(str(error)) from None
        return model.fit(*args, **kwargs | {name: values[name] for name in FIT_ARGUMENTS if name in values})

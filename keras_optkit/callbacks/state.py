"""What a run is at one moment: everything that the next training step depends on, as arrays on the host.

`TrainingState.of(model)` takes a copy and `state.into(model)` puts it back, bitwise: weights, moving statistics, the
states of the seed generators in layers and metrics, variables that Keras does not track (a `tf.Variable` or a
`tf.random.Generator` in an attribute), vocabularies and other values that layers have adapted, every optimizer that the
model holds, and the global generators of Python, NumPy and Keras. What it does not see are the generators of
TensorFlow's own random operations, which have no readable state (your own layers should draw from a
`keras.random.SeedGenerator`), and optimizers and variables that no attribute of the model or of a layer leads to.

A callback that is not in there has state of its own. If it is to survive, it has two methods:

- `state_dict()` returns it: None, numbers, strings and arrays, in lists and dicts with strings as keys;
- `load_state_dict(state)` takes it, in another process, after `on_train_begin` (and, inside an epoch, after
  `on_epoch_begin`) of all callbacks, and before the variables of the model and the optimizers are set.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from keras_optkit.backend import on_host
from keras_optkit.callbacks.adapted import adapted, adapting, derived, forget_compiled, set_adapted
from keras_optkit.callbacks.owned import own_variables
from keras_optkit.fit.optimizers import build_optimizer
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import directly_inside, optimizers_of, ours_of
from keras_optkit.private import global_seed, known_variables, set_global_seed, sublayers

Copy = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TrainingState:
    """A copy of all that the next training step of a model depends on.

    Attributes:
        variables: For each variable of the model its value; with several replicas that differ, one value for each.
        metrics: The same for the metrics that the model was compiled with.
        optimizer: For each optimizer of the model its state, and which of the variables it was built for.
        generators: The states of the global generators of random numbers.
        layers: What layers have adapted besides variables, such as the vocabulary of a `StringLookup`, by the place of
            the layer.
    """

    variables: list[list[np.ndarray]]
    metrics: list[list[np.ndarray]]
    optimizer: list[dict[str, Any]]
    generators: dict[str, Any]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, copy: Copy | None = None) -> TrainingState:
        """Copies the present state; on JAX, inside an epoch, take the model from `callback.model`, which syncs it.

        Args:
            model: A built model. The optimizer that it was compiled with is built, if the first step is sure to do so.
            copy: How an array is copied; None: into new memory.

        Raises:
            ValueError: If an optimizer updates variables that are not the model's.
        """
        copy = copy or np.array
        if is_built(model) and type(model).train_step is keras.Model.train_step and model.optimizer is not None:
            build_optimizer(model)
        own = own_variables(model)
        places = {id(variable): i for i, variable in enumerate(own)}
        return cls(
            [values_of(model, v, copy) for v in own],
            [values_of(model, v, copy) for v in model.metrics_variables],
            [_optimizer_state(model, optimizer, places, copy) for optimizer in optimizers_of(model)],
            generators_now(),
            adapted(model),
        )

    def adapt(self, model: Any) -> None:
        """Sets what layers have adapted, also in a model that has not been built."""
        for place, layer in adapting(model):
            if place in self.layers:
                set_adapted(layer, self.layers[place])

    def fits(self, model: Any, *, metrics: bool = True) -> bool:
        """Whether all that the state is of has been built in `model`; optimizers need not be.

        Args:
            model: A model that was made and compiled like the one that the state was taken of.
            metrics: Whether metrics count.
        """
        return len(own_variables(model)) == len(self.variables) and (
            not metrics or len(model.metrics_variables) == len(self.metrics)
        )

    def forget_steps(self, model: Any) -> None:
        """Has compiled steps of `model` made again, where an optimizer's state cannot be set with those that it has.

        That is after a step, if variables have joined at other updates than in the state.
        """
        if any(map(_joined_in_stages, self.optimizer)):
            forget_compiled(model)
            for optimizer in ours_of(model):
                optimizer.forget_steps()

    def into(self, model: Any, *, metrics: bool = True) -> None:
        """Sets the state of `model`, which must be built, to this one.

        An optimizer that is not built, and was when the state was taken, is built for the same variables.

        Args:
            model: The model that it was taken of, or one that was made and compiled alike.
            metrics: Whether those of the metrics are set, too; they must have been built then.

        Raises:
            ValueError: If the model or an optimizer is another one; no variable of the model has been changed then.
        """
        own, theirs = own_variables(model), model.metrics_variables if metrics else []
        optimizers = optimizers_of(model)
        _refuse_unless_alike(model, "model", own, self.variables)
        if metrics:
            _refuse_unless_alike(model, "metrics", theirs, self.metrics)
        if len(optimizers) != len(self.optimizer):
            raise ValueError(
                f"The state holds {len(self.optimizer)} optimizers, and model {model.name!r} has {len(optimizers)}."
            )
        for optimizer, state in zip(optimizers, self.optimizer, strict=True):
            _build_as(model, optimizer, state, own)
        for optimizer, state in zip(optimizers, self.optimizer, strict=True):
            if _was_built(optimizer, state):
                _set_optimizer_state(model, optimizer, state)
        with derived(model, self.layers):
            for variable, values in zip(
                [*own, *theirs], [*self.variables, *(self.metrics if metrics else [])], strict=True
            ):
                assign(model, variable, values)
        for optimizer, state in zip(optimizers, self.optimizer, strict=True):
            if not _was_built(optimizer, state):  # its state may begin as the weights, which have to be set before
                _reset(model, optimizer)
                _set_optimizer_state(model, optimizer, state)
        set_generators(self.generators)


class Copies:
    """Copies arrays into the memory of the copies that it made before, which is much faster than into new memory.

    For copies of the same things in the same order, whose predecessors nobody needs any more: `restart` comes first.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._next = 0

    def restart(self) -> None:
        """The copies that were made so far may be overwritten from now on."""
        self._next = 0

    def __call__(self, array: np.ndarray) -> np.ndarray:
        """The next copy."""
        kept = self._kept[self._next] if self._next < len(self._kept) else None
        if kept is None or (kept.dtype, kept.shape) != (array.dtype, array.shape):
            kept = np.empty_like(array, subok=False)
            self._kept[self._next :] = [kept]
        np.copyto(kept, array)
        self._next += 1
        return kept


def is_built(model: Any) -> bool:
    """Whether a model and all layers in it have their variables."""
    return all(layer.built for layer in [model, *sublayers(model)])


def values_of(model: Any, variable: Any, copy: Copy) -> list[np.ndarray]:
    """Copies of what a variable holds: one, or one for each replica if they differ."""
    values = [on_host(part) for part in _parts(model, variable)]
    same = all(values[0].tobytes() == value.tobytes() for value in values[1:])
    return [copy(value) for value in (values[:1] if same else values)]


def assign(model: Any, variable: Any, values: Sequence[np.ndarray]) -> None:
    """Sets what `values_of` returned."""
    parts = _parts(model, variable)
    if len(parts) == 1:
        variable.assign(values[0])
        return
    for part, value in zip(parts, values if len(values) > 1 else itertools.repeat(values[0], len(parts)), strict=True):
        part.assign(value)


def _parts(model: Any, variable: Any) -> Sequence[Any]:
    """The variable itself, or on TensorFlow with several replicas the variable of each of them.

    Read from outside, one whose replicas differ, such as a metric's, gives their sum or mean.
    """
    strategy = getattr(model, "distribute_strategy", None)
    if strategy is None or strategy.num_replicas_in_sync == 1:
        return [variable]
    return strategy.experimental_local_results(variable.value if isinstance(variable, keras.Variable) else variable)


def _refuse_unless_alike(
    model: Any, what: str, variables: Sequence[Any], saved: Sequence[Sequence[np.ndarray]]
) -> None:
    lines = []
    for i, (variable, values) in enumerate(itertools.zip_longest(variables, saved)):
        here = None if variable is None else (_dtype(variable), tuple(variable.shape))
        there = None if values is None else (str(values[0].dtype), values[0].shape)
        if here is None or there is None or here[0] != there[0] or not _fits(here[1], there[1]):
            name = "" if variable is None else f" ({_name(variable)})"
            lines.append(f"variable {i}{name}: {_described(there)} in the state, {_described(here)} here")
        elif len(values) not in (1, len(_parts(model, variable))):
            lines.append(f"variable {i} ({_name(variable)}): one value for each of {len(values)} replicas")
    if lines:
        shown = lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]
        raise ValueError(f"The state is not one of this {what}:\n  " + "\n  ".join(shown))


def _described(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if kind is None else f"{kind[0]} {kind[1]}"


def _dtype(variable: Any) -> str:
    return keras.backend.standardize_dtype(variable.dtype)


def _name(variable: Any) -> str:
    return getattr(variable, "path", None) or variable.name


def _fits(here: tuple[int | None, ...], there: tuple[int, ...]) -> bool:
    """Whether a variable of one shape can hold a value of another; a `tf.Variable` may leave dimensions open."""
    return len(here) == len(there) and all(a in (None, b) for a, b in zip(here, there, strict=True))


def _optimizer_state(model: Any, optimizer: Any, places: Mapping[int, int], copy: Copy) -> dict[str, Any]:
    """Ours writes it parameter by parameter with a description; of others it is their variables, in order."""
    inside = directly_inside(optimizer)
    state: dict[str, Any] = {
        "class": keras.saving.get_registered_name(type(optimizer)),
        "for": _places_of_variables(model, optimizer, places) if optimizer.built else None,
    }
    if isinstance(optimizer, Optimizer):
        store: dict[str, Any] = {}
        optimizer.save_own_variables(store)
        return state | {"ours": {name: copy(value) for name, value in store.items()}}
    return state | {
        "variables": [values_of(model, v, copy) for v in _without(optimizer.variables, inside)],
        "inside": [_optimizer_state(model, inner, places, copy) for inner in inside],
    }


def _joined_in_stages(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer of ours, or one inside another, has variables that joined after others."""
    schema = state.get("ours", {}).get("schema")
    here = schema is not None and len(set(json.loads(schema.tobytes())["since"])) > 1
    return here or any(_joined_in_stages(inner) for inner in state.get("inside", []))


def _places_of_variables(model: Any, optimizer: Any, places: Mapping[int, int]) -> list[int]:
    known = known_variables(optimizer)
    if known is None:
        known = model.trainable_variables
    unknown = [_name(v) for v in known if id(v) not in places]
    if unknown:
        raise ValueError(
            f"The optimizer {optimizer.name!r} updates {len(unknown)} variables that are not of model {model.name!r}, "
            f"so that their values cannot be kept, among them {unknown[0]}. Make the layers that they belong to "
            "attributes of the model."
        )
    return [places[id(v)] for v in known]


def _was_built(optimizer: Any, state: Mapping[str, Any]) -> bool:
    """False where an optimizer is built now and was not when the state was taken, itself or one inside it."""
    if optimizer.built and state["for"] is None:
        return False
    return all(
        _was_built(inner, of) for inner, of in zip(directly_inside(optimizer), state.get("inside", []), strict=True)
    )


def _build_as(model: Any, optimizer: Any, state: Mapping[str, Any], own: Sequence[Any]) -> None:
    """Builds an optimizer for the variables that the one in the state was built for; refuses another kind."""
    name = keras.saving.get_registered_name(type(optimizer))
    if name != state["class"]:
        raise ValueError(
            f"The state is not one of the optimizer {optimizer.name!r}, {name}: it is of {state['class']}."
        )
    if state["for"] is not None:
        variables = [own[i] for i in state["for"]]
        known = {id(v) for v in known_variables(optimizer) or ()} if optimizer.built else set()
        joining = isinstance(optimizer, Optimizer) and known < {id(v) for v in variables}
        if not optimizer.built or joining:
            with _scope(model):
                optimizer.build(variables)
        elif not isinstance(optimizer, Optimizer) and known and known != {id(v) for v in variables}:
            raise ValueError(
                f"The optimizer {optimizer.name!r} is built for {len(known)} variables, and not for the "
                f"{len(variables)} that the state is of."
            )
    inside = directly_inside(optimizer)
    for inner, of in zip(inside, state.get("inside", []), strict=state["for"] is not None):
        _build_as(model, inner, of, own)
    if _was_built(optimizer, state) and "variables" in state:
        _refuse_unless_alike(
            model, f"optimizer, {type(optimizer).__name__}", _without(optimizer.variables, inside), state["variables"]
        )


def _set_optimizer_state(model: Any, optimizer: Any, state: Mapping[str, Any]) -> None:
    if isinstance(optimizer, Optimizer):
        optimizer.load_own_variables(state["ours"])
        return
    inside = directly_inside(optimizer)
    # of one that was not built when the state was taken, those that it has had since it was made
    for variable, values in zip(_without(optimizer.variables, inside), state["variables"], strict=False):
        assign(model, variable, values)
    for inner, of in zip(inside, state["inside"], strict=False):  # a MultiOptimizer may get its own when it is built
        _set_optimizer_state(model, inner, of)


def _reset(model: Any, optimizer: Any) -> None:
    """Gives an optimizer that is built the state with which it was built: that of a new one of the same config."""
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):  # whose choice of optimizers may be a function
        for inner in optimizer.optimizers:
            if inner.built:
                _reset(model, inner)
        return
    with _scope(model):
        try:
            fresh = type(optimizer).from_config(optimizer.get_config())
        except Exception as error:
            raise ValueError(
                f"The optimizer {optimizer.name!r} was not built when the state was taken. To be set back, it must "
                f"have a get_config from which {type(optimizer).__name__}.from_config makes it again: {error!r}."
            ) from error
        own = known_variables(optimizer) or model.trainable_variables
        fresh.build(own)
    _set_optimizer_state(
        model, optimizer, _optimizer_state(model, fresh, {id(v): i for i, v in enumerate(own)}, np.array)
    )


def _scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    strategy = getattr(model, "distribute_strategy", None)  # on TensorFlow
    return strategy.scope() if strategy else contextlib.nullcontext()


def _without(variables: Sequence[Any], inside: Sequence[Any]) -> list[Any]:
    others = {id(v) for inner in inside for v in inner.variables}
    return [v for v in variables if id(v) not in others]


def generators_now() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and Keras."""
    version, numbers, gauss = random.getstate()
    drawn, seed = np.random.get_state(legacy=False), global_seed()
    return {
        "python": {"version": version, "numbers": np.array(numbers, "uint32"), "gauss": gauss},
        "numpy": {**drawn, "state": {name: np.copy(part) for name, part in drawn["state"].items()}},
        "keras": None if seed is None else np.array(seed),
    }


def set_generators(states: Mapping[str, Any]) -> None:
    """Sets what `generators_now` returned, or those of it that are given."""
    if "keras" in states:
        set_global_seed(states["keras"])
    if "numpy" in states:
        np.random.set_state(states["numpy"])
    if "python" in states:
        python = states["python"]
        random.setstate((python["version"], tuple(int(n) for n in python["numbers"]), python["gauss"]))

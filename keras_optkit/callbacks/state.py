"""What a training is at one moment: everything that the next step depends on, as arrays on the host.

`TrainingState.of(model)` takes a copy and `state.into(model)` puts it back, bitwise: weights, moving statistics, the
states of the seed generators in layers and metrics, the optimizer's state, and the global generators of Python, NumPy
and Keras. What it does not see are the generators of TensorFlow's own random operations, which have no readable state:
layers of one's own should draw from a `keras.random.SeedGenerator`.

A callback that is not in there has state of its own. If it is to survive, it has two methods:

- `state_dict()` returns it: None, numbers, strings and arrays, in lists and dicts with strings as keys;
- `load_state_dict(state)` takes it, in another process, after `on_train_begin` (and, inside of an epoch, after
  `on_epoch_begin`) of all callbacks, and before the variables of the model and the optimizer are set.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.distribute import on_host
from keras_optkit.optimizers.fitting import build_optimizer
from keras_optkit.private import global_seed, set_global_seed

Copy = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class TrainingState:
    """A copy of all that the next training step of a model depends on.

    Attributes:
        variables: For each variable of the model its value; with several replicas that differ, one value for each.
        metrics: The same for the metrics that the model was compiled with.
        optimizer: The optimizer's state by name; empty without an optimizer.
        generators: The states of the global generators of random numbers.
    """

    variables: list[list[np.ndarray]]
    metrics: list[list[np.ndarray]]
    optimizer: dict[str, Any]
    generators: dict[str, Any]

    @classmethod
    def of(cls, model: Any, copy: Copy | None = None) -> TrainingState:
        """Copies the present state; on JAX, inside of an epoch, take the model from `callback.model`, which syncs it.

        Args:
            model: A built model. Its optimizer is built, if it has one that is not.
            copy: How an array is copied; None: into new memory.
        """
        copy = copy or np.array
        if getattr(model, "optimizer", None) is not None:
            build_optimizer(model)
        return cls(
            [_values(model, v, copy) for v in _own_variables(model)],
            [_values(model, v, copy) for v in _metrics_variables(model)],
            _optimizer_state(model, model.optimizer, copy),
            _generators(),
        )

    def into(self, model: Any, *, metrics: bool = True) -> None:
        """Sets the state of `model`, which must be built, to this one.

        Args:
            model: The model that it was taken of, or one that was made and compiled alike.
            metrics: Whether those of the metrics are set, too; they must have been built then.

        Raises:
            ValueError: If the model or its optimizer is another one; nothing has been changed then.
        """
        build_optimizer(model)
        own, theirs = _own_variables(model), _metrics_variables(model) if metrics else []
        _refuse_unless_alike(model, "model", own, self.variables)
        if metrics:
            _refuse_unless_alike(model, "metrics", theirs, self.metrics)
        _set_optimizer_state(model, model.optimizer, self.optimizer)
        for variable, values in zip(
            [*own, *theirs], [*self.variables, *(self.metrics if metrics else [])], strict=True
        ):
            _assign(model, variable, values)
        _set_generators(self.generators)


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


def _own_variables(model: Any) -> list[Any]:
    """Those of the model besides its metrics', the states of its seed generators included."""
    metrics = {id(v) for v in model.metrics_variables}
    return [v for v in model.variables if id(v) not in metrics]


def _metrics_variables(model: Any) -> list[Any]:
    return list(model.metrics_variables)


# -- one variable -----------------------------------------------------------------------------------------------------


def _values(model: Any, variable: Any, copy: Copy) -> list[np.ndarray]:
    """Copies of what a variable holds: one, or one for each replica if they differ."""
    values = [on_host(part) for part in _parts(model, variable)]
    same = all(values[0].tobytes() == value.tobytes() for value in values[1:])
    return [copy(value) for value in (values[:1] if same else values)]


def _assign(model: Any, variable: Any, values: Sequence[np.ndarray]) -> None:
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
    return strategy.experimental_local_results(variable.value)


def _refuse_unless_alike(
    model: Any, what: str, variables: Sequence[Any], saved: Sequence[Sequence[np.ndarray]]
) -> None:
    lines = []
    for i, (variable, values) in enumerate(itertools.zip_longest(variables, saved)):
        here = None if variable is None else (keras.backend.standardize_dtype(variable.dtype), tuple(variable.shape))
        there = None if values is None else (str(values[0].dtype), values[0].shape)
        if here != there:
            name = "" if variable is None else f" ({variable.path})"
            lines.append(f"variable {i}{name}: {_described(there)} in the state, {_described(here)} here")
        elif len(values) not in (1, len(_parts(model, variable))):
            lines.append(f"variable {i} ({variable.path}): one value for each of {len(values)} replicas")
    if lines:
        shown = lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]
        raise ValueError(f"The state is not one of this {what}:\n  " + "\n  ".join(shown))


def _described(kind: tuple[str, tuple[int, ...]] | None) -> str:
    return "none" if kind is None else f"{kind[0]} {kind[1]}"


# -- the optimizer ----------------------------------------------------------------------------------------------------


def _optimizer_state(model: Any, optimizer: Any, copy: Copy) -> dict[str, Any]:
    """Ours writes it parameter by parameter with a description; of others it is their variables, in order."""
    if optimizer is None:
        return {}
    if isinstance(optimizer, Optimizer):
        store: dict[str, Any] = {}
        optimizer.save_own_variables(store)
        return {"ours": {name: copy(value) for name, value in store.items()}}
    inner = getattr(optimizer, "inner_optimizer", None)
    state: dict[str, Any] = {"variables": [_values(model, v, copy) for v in _without(optimizer.variables, inner)]}
    return state if inner is None else state | {"inner": _optimizer_state(model, inner, copy)}


def _set_optimizer_state(model: Any, optimizer: Any, state: Mapping[str, Any]) -> None:
    kind = "ours" if isinstance(optimizer, Optimizer) else None if optimizer is None else "variables"
    if (kind is None and state) or (kind is not None and kind not in state):
        raise ValueError(f"The state is not one of this optimizer, {optimizer!r}: it holds {sorted(state) or 'none'}.")
    if kind == "ours":
        optimizer.load_own_variables(state["ours"])
    elif kind == "variables":
        inner = getattr(optimizer, "inner_optimizer", None)
        variables = _without(optimizer.variables, inner)
        _refuse_unless_alike(model, f"optimizer, {type(optimizer).__name__}", variables, state["variables"])
        if inner is not None:
            _set_optimizer_state(model, inner, state.get("inner", {}))
        for variable, values in zip(variables, state["variables"], strict=True):
            _assign(model, variable, values)


def _without(variables: Sequence[Any], inner: Any) -> list[Any]:
    own = {id(v) for v in inner.variables} if inner is not None else set()
    return [v for v in variables if id(v) not in own]


# -- random numbers ---------------------------------------------------------------------------------------------------


def _generators() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    drawn, seed = np.random.get_state(legacy=False), global_seed()
    return {
        "python": {"version": version, "numbers": np.array(numbers, "uint32"), "gauss": gauss},
        "numpy": {**drawn, "state": {name: np.copy(part) for name, part in drawn["state"].items()}},
        "keras": None if seed is None else np.array(seed),
    }


def _set_generators(states: Mapping[str, Any]) -> None:
    set_global_seed(states["keras"])
    np.random.set_state(states["numpy"])
    python = states["python"]
    random.setstate((python["version"], tuple(int(n) for n in python["numbers"]), python["gauss"]))

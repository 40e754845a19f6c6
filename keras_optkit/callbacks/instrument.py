"""Reaching into the compiled training step, for as long as a training lasts.

`around` runs something around a method that the step calls, and `shared` lets step and host exchange numbers. Both take
effect, and end, when the step is compiled anew, which is what `compile_anew` is for.

What is not wanted in every step is `on_demand`: the step is then compiled twice, with and without it, and the host
chooses before every step. A condition inside of one compiled step would cost something in each, would have to hold a
copy of all weights, and could not sum over the replicas of a strategy, which TensorFlow refuses inside of a condition.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from keras_optkit.private import forget_trace

Tensor = Any
State = Any

#: Called with the method's arguments; the method runs inside the context manager that it returns, and if that yields a
#: function, the function is called with the method's result.
Hook = Callable[..., contextlib.AbstractContextManager[Any]]


def around(owner: Any, method: str, hook: Hook, *, first: bool = False) -> Callable[[], None]:
    """Runs `hook` around `owner.method` from now on, on this one object, and returns a function that takes it away.

    Several hooks may be on one method and be taken away in any order; those that come `first` are entered before the
    others. What Keras compiles calls the method while it is traced, so `compile_anew` has to be called after either.
    """
    own = vars(owner)  # not setattr, where Keras and TensorFlow would begin to track what is set
    wrapper = own.get(method)
    if not hasattr(wrapper, "hooks"):
        wrapper = own[method] = _wrap(getattr(owner, method), replaced=wrapper)
    hooks = wrapper.hooks
    hooks.insert(0 if first else len(hooks), hook)

    def remove() -> None:
        if hook in hooks:
            hooks.remove(hook)
        if not hooks and own.get(method) is wrapper:
            del own[method]
            if wrapper.replaced is not None:
                own[method] = wrapper.replaced

    return remove


def _wrap(function: Callable[..., Any], replaced: Any) -> Any:
    hooks: list[Hook] = []

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            see_result = [stack.enter_context(hook(*args, **kwargs)) for hook in hooks]
            result = function(*args, **kwargs)
            for see in see_result:
                if see is not None:
                    see(result)
            return result

    wrapper.hooks = hooks  # type: ignore[attr-defined]
    wrapper.replaced = replaced  # type: ignore[attr-defined]
    return wrapper


def compile_anew(model: Any) -> None:
    """Has the training step of `model` traced anew, with what is around it by then, the next time it runs."""
    model.make_train_function(force=True)
    if keras.config.backend() == "jax":
        forget_trace(model.train_step)


class Shared(Protocol):
    """Arrays, by name, that the host and the training step of one model share.

    Attributes:
        wanted: With `on_demand`, whether the steps that begin from now on take part.
    """

    wanted: bool

    @property
    def in_step(self) -> bool:
        """Whether this is inside a training step that takes part: while it is traced or, without compilation, runs."""

    def __getitem__(self, name: str) -> Tensor:
        """In the step, what the host has set last; on the host, what the last step has set, if it has, or the host."""

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets what the other side will read."""

    def close(self) -> None:
        """Ends the sharing."""


def shared(
    model: Any,
    aggregations: Mapping[str, str],
    dtype: str,
    *,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    on_demand: bool = False,
) -> Shared:
    """Lets host and training step of `model` share numbers, from the next `compile_anew` on.

    On TensorFlow they are variables. On JAX a step is a pure function: what the host has set goes in beside the data,
    and what the step has set comes out beside the logs. A host that sets does not wait for a step; one that reads does.

    Args:
        model: The model.
        aggregations: Name to aggregation (see `keras.Variable`), by which replicas of a TensorFlow strategy make one
            number.
        dtype: The dtype of all.
        shapes: Name to shape, for those that are not scalars.
        on_demand: Whether only those steps take part before which the host has set `wanted`.

    Raises:
        RuntimeError: If the training step is not Keras's own on TensorFlow or JAX.
    """
    backend = keras.config.backend()
    if backend not in ("tensorflow", "jax"):
        raise RuntimeError(f"This needs the TensorFlow or the JAX backend, and this is {backend}.")
    if backend == "jax" and keras.config.is_nnx_enabled():
        raise RuntimeError(
            "This does not work with Flax's NNX (KERAS_NNX_ENABLED), whose train_step is the class's own."
        )
    values = {name: np.zeros((shapes or {}).get(name, ()), dtype) for name in aggregations}
    if backend == "jax":
        return _ThroughTheStep(model, values, on_demand)
    return _InVariables(model, values, aggregations, on_demand)


class _InVariables:
    def __init__(self, model: Any, values: Mapping[str, Any], aggregations: Mapping[str, str], on_demand: bool):
        with model.distribute_strategy.scope():
            self._variables = {
                name: keras.Variable(value, dtype=value.dtype.name, trainable=False, aggregation=aggregations[name])
                for name, value in values.items()
            }
        self.wanted = not on_demand
        self._thread = threading.local()  # the replicas of a strategy are traced in threads of their own
        self._detach = [around(model, "train_step", self._stepping)]
        if on_demand:
            self._choice = _Choice.of(model)
            self._choice.members.append(self)

    @contextlib.contextmanager
    def _stepping(self, *_: Any, **__: Any) -> Iterator[None]:
        self._thread.stepping = self.wanted
        try:
            yield
        finally:
            self._thread.stepping = False

    @property
    def in_step(self) -> bool:
        return getattr(self._thread, "stepping", False)

    def __getitem__(self, name: str) -> Tensor:
        return ops.copy(self._variables[name])

    def __setitem__(self, name: str, value: Any) -> None:
        variable = self._variables[name]
        # ops.cast would take a Python float through float32
        variable.assign(value if isinstance(value, Real) else ops.cast(value, variable.dtype))

    def close(self) -> None:
        for detach in self._detach:
            detach()
        if hasattr(self, "_choice"):
            self._choice.leave(self)


class _Choice:
    """Stands in for a TensorFlow model's `make_train_function`: one compiled step for each choice of who takes part."""

    def __init__(self, model: Any):
        self.members: list[_InVariables] = []
        self._model = model
        self._replaced = vars(model).get("make_train_function")
        self._make = model.make_train_function
        vars(model)["make_train_function"] = self.make_train_function

    @staticmethod
    def of(model: Any) -> _Choice:
        """The choice that is on the model already, or a new one."""
        found = getattr(vars(model).get("make_train_function"), "__self__", None)
        return found if isinstance(found, _Choice) else _Choice(model)

    def leave(self, member: _InVariables) -> None:
        """Takes one out, and with the last one puts the model's own method back."""
        self.members.remove(member)
        if not self.members and _Choice.of(self._model) is self:
            if self._replaced is None:
                del vars(self._model)["make_train_function"]
            else:
                vars(self._model)["make_train_function"] = self._replaced

    def make_train_function(self, force: bool = False) -> None:
        """Has the steps compiled, each when it is first chosen."""
        model = self._model
        if model.train_function is not None and not force:
            return
        compiled: dict[tuple[bool, ...], Any] = {}

        def train_function(iterator: Iterator[Any]) -> Any:
            chosen = tuple(member.wanted for member in self.members)
            if chosen not in compiled:
                self._make(force=True)
                compiled[chosen], model.train_function = model.train_function, train_function
            return compiled[chosen](iterator)

        model.train_function = train_function


class _ThroughTheStep:
    def __init__(self, model: Any, values: Mapping[str, Any], on_demand: bool):
        self.outside: dict[str, Any] = dict(values)
        self.inside: dict[str, Tensor] | None = None
        self.wanted = not on_demand
        self._carrier = _Carrier.of(model)
        self._carrier.riders.append(self)

    @property
    def in_step(self) -> bool:
        return bool(self.inside)

    def given(self) -> dict[str, Any]:
        """What goes into a step; with nothing in it JAX compiles another one, in which this takes no part."""
        return dict(self.outside) if self.wanted else {}

    def __getitem__(self, name: str) -> Tensor:
        return (self.outside if self.inside is None else self.inside)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        dtype = self.outside[name].dtype
        if self.inside is None:
            self.outside[name] = np.asarray(ops.convert_to_numpy(value), dtype)
        else:
            self.inside[name] = ops.cast(value, dtype)

    def close(self) -> None:
        self._carrier.riders.remove(self)
        self._carrier.leave_if_empty()


class _Carrier:
    """Stands in for a JAX model's `train_step`, and around its `train_function`, and takes shared scalars through.

    They travel with data and logs, since the state has the structure, and with `keras.distribution` the sharding, that
    Keras knows; and its arrays are donated, so that they would be lost with a step that fails.
    """

    def __init__(self, model: Any):
        self.riders: list[_ThroughTheStep] = []
        self._model = model
        self._replaced = {name: vars(model).get(name) for name in ("train_step", "make_train_function")}
        self._train_step, self._make = model.train_step, model.make_train_function
        vars(model).update(train_step=self.train_step, make_train_function=self.make_train_function)

    @staticmethod
    def of(model: Any) -> _Carrier:
        """The carrier that is on the model already, or a new one."""
        found = getattr(vars(model).get("train_step"), "__self__", None)
        return found if isinstance(found, _Carrier) else _Carrier(model)

    def leave_if_empty(self) -> None:
        """Puts the model's own methods back."""
        if not self.riders and _Carrier.of(self._model) is self:
            for name, own in self._replaced.items():
                if own is None:
                    del vars(self._model)[name]
                else:
                    vars(self._model)[name] = own

    def train_step(self, state: State, data: tuple[Any, list[dict[str, Tensor]]]) -> tuple[Any, State]:
        """The model's step, traced, with the scalars of the riders set to what came with the data."""
        data, given = data
        for rider, values in zip(self.riders, given, strict=True):
            rider.inside = dict(values)
        try:
            logs, state = self._train_step(state, data)
            return (logs, [rider.inside for rider in self.riders]), state
        finally:
            for rider in self.riders:
                rider.inside = None

    def make_train_function(self, force: bool = False) -> None:
        """The model's, whose result hands the scalars in and takes them out."""
        before = self._model.train_function
        self._make(force)
        compiled = self._model.train_function
        if compiled is before:
            return

        def train_function(state: State, iterator: Iterator[Any]) -> tuple[Any, State]:
            given = [rider.given() for rider in self.riders]
            (logs, taken), state = compiled(state, _With(given, iterator))
            for rider, values in zip(self.riders, taken, strict=True):
                rider.outside.update(values)
            return logs, state

        self._model.train_function = train_function


class _With:
    """An iterator over pairs of data and what is given with them."""

    def __init__(self, given: Any, iterator: Iterator[Any]):
        self._given, self._iterator = given, iterator

    def __next__(self) -> tuple[Any, Any]:
        return next(self._iterator), self._given

"""Reaching into the compiled training step, for as long as a `fit` lasts.

What a callback does inside of the step is an `Instrument`: hooks around the methods that the step calls, and values
that step and host exchange. `attach` puts one to work and `detach` takes it out. The hooks are in place only while the
step is traced or, without compilation, runs, so that what they are put around is looked up at that moment: a model may
be built by its first step, and trained layers may have changed.

Compiled steps are kept, with their instruments, by the model. The next `fit` with instruments of the same keys takes
them again, unless something that the trace depends on has changed since: the model was compiled, other weights are
trained, an optimizer has other hyperparameters. A callback is no part of what is kept.

An instrument that is not `wanted` in every step costs nothing in the others: the step is then compiled twice, with and
without it, and the host chooses before every step. A condition inside of one compiled step would cost something in
each, would have to hold a copy of all weights, and could not sum over the replicas of a strategy, which TensorFlow
refuses inside of a condition.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any, TypeVar

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit.backend import NO_MORE_DATA, outside_graph
from keras_optkit.optimizers.of_model import directly_inside, optimizers_of
from keras_optkit.private import forget_trace, sublayers

Tensor = Any
State = Any

#: Called with the method's arguments; the method runs inside the context manager that it returns, and if that yields a
#: function, the function is called with the method's result.
Hook = Callable[..., contextlib.AbstractContextManager[Any]]

#: How many compiled steps a model keeps.
KEPT = 8


def around(owner: Any, method: str, hook: Hook, *, first: bool = False) -> Callable[[], None]:
    """Runs `hook` around `owner.method` from now on, on this one object, and returns a function that takes it away.

    Several hooks may be on one method and be taken away in any order; those that come `first` are entered before the
    others. What Keras compiles calls the method only while it is traced.
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
    """Has the training step of `model` traced again the next time it runs, whatever is kept."""
    model.make_train_function(force=True)
    if keras.config.backend() == "jax":
        forget_trace(model.train_step)


def is_built(model: Any) -> bool:
    """Whether a model has all its weights; that of its own layers, since one without `call` is never built itself."""
    return bool(model.weights) and all(layer.built for layer in sublayers(model))


def build_as_the_first_step(model: Any, iterator: Any) -> None:
    """Has a TensorFlow model and its optimizers make all variables that its step makes, by tracing that for nothing."""
    import tensorflow as tf

    def without_optional(spec: Any) -> Any:
        return None if isinstance(spec, tf.OptionalSpec) else spec

    if isinstance(iterator, tf.data.Iterator):
        spec = keras.tree.map_structure(without_optional, iterator.element_spec)
        tf.function(model.train_step, autograph=False).get_concrete_function(spec)


# -- instruments ------------------------------------------------------------------------------------------------------


class Instrument:
    """What is to happen inside of the training step of a model, and the values that step and host exchange by it.

    A subclass says which `hooks` there are. On TensorFlow the values are variables. On JAX a step is a pure function:
    what the host has set goes in beside the data, and what the step has set comes out beside the logs. A host that sets
    does not wait for a step; one that reads does.

    Args:
        model: The model.
        given: Scalars that the host sets, or that the step keeps for the next one, 0 to begin with: name to aggregation
            (see `keras.Variable`), by which replicas of a TensorFlow strategy make one value.
        dtype: The dtype of all values.

    Attributes:
        model: The model.
        wanted: Whether the steps that begin from now on take part.

    Raises:
        RuntimeError: If the training step is not Keras's own on TensorFlow or JAX.
    """

    def __init__(self, model: Any, given: Mapping[str, str] | None = None, dtype: str = "float32"):
        backend = keras.config.backend()
        if backend not in ("tensorflow", "jax"):
            raise RuntimeError(f"This needs the TensorFlow or the JAX backend, and this is {backend}.")
        if backend == "jax" and keras.config.is_nnx_enabled():
            raise RuntimeError(
                "This does not work with Flax's NNX (KERAS_NNX_ENABLED), whose train_step is the class's own."
            )
        self.model, self.wanted = model, True
        self._values: Any = (_Carried if backend == "jax" else _Variables)(model, given or {}, dtype)
        self._thread = threading.local()  # the replicas of a strategy are traced in threads of their own
        self._inside = 0  # in how many steps this is: replicas are traced in turns, and enter before others have left
        self._detach: list[Callable[[], None]] = []

    # -- what a subclass may say --------------------------------------------------------------------------------------

    def hooks(self) -> Iterable[Callable[[], None]]:
        """Puts hooks around what the step is about to call, and gives what takes them away."""
        return ()

    def prepare(self) -> None:
        """Called before a step with this one is compiled, where variables can still be made on replicas."""

    def begin(self, *args: Any) -> None:
        """Called in the step, before everything else, with the arguments of `train_step`."""

    def end(self) -> None:
        """Called in the step, after everything else."""

    def feed(self, iterator: Any) -> Any:
        """Called by the host with the iterator that the next step takes its batches from; returns that or another."""
        return iterator

    def data_ended(self) -> None:
        """Called by the host instead of a step that was begun, where data of unknown length turn out to have ended."""

    def driven(self) -> Mapping[Any, set[str]]:
        """Optimizer to the hyperparameters that a step with this one does not depend on."""
        return {}

    def release(self) -> None:
        """Called when a `fit` is over: lets go of what belongs to it."""

    # -- values -------------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        """In the step, what the host has set last; on the host, what the last step has set, if it has, or the host."""
        return self._values.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        """Sets what the other side will read."""
        self._values.set(name, value, "only_first_replica")

    def set(self, name: str, value: Any, aggregation: str = "only_first_replica") -> None:
        """Sets a value from inside the step; one that was not given is made, with its shape, when it is first set."""
        self._values.set(name, value, aggregation)

    @property
    def in_step(self) -> bool:
        """Whether this is inside a training step that takes part: while it is traced or, without compilation, runs."""
        return getattr(self._thread, "stepping", False)

    # -- for the steps ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def stepping(self, *args: Any) -> Iterator[None]:
        """Around a step that takes part, which has these arguments."""
        if not self._inside:
            self._detach = list(self.hooks())
        self._inside += 1
        self._thread.stepping = True
        try:
            self.begin(*args)
            yield
            self.end()
        finally:
            self._thread.stepping = False
            self._inside -= 1
            if not self._inside:
                self._take_away()

    def _take_away(self) -> None:
        for detach in self._detach:
            detach()
        self._detach, self._inside = [], 0

    def close(self) -> None:
        """Leaves everything as it was; an exception in one replica leaves the others where they were."""
        self._take_away()
        self.release()


class _Variables:
    """The values of an instrument on TensorFlow."""

    def __init__(self, model: Any, given: Mapping[str, str], dtype: str):
        self._model, self._dtype = model, dtype
        self._held: dict[str, Any] = {}
        for name, aggregation in given.items():
            self._make(name, (), aggregation)

    def _make(self, name: str, shape: Sequence[int], aggregation: str) -> Any:
        value = np.zeros(shape, self._dtype)
        with outside_graph(), self._model.distribute_strategy.scope():
            variable = keras.Variable(value, dtype=self._dtype, trainable=False, aggregation=aggregation)
        self._held[name] = variable
        return variable

    def get(self, name: str) -> Tensor:
        return ops.copy(self._held[name])

    def set(self, name: str, value: Any, aggregation: str) -> None:
        variable = self._held.get(name)
        if variable is None or (not isinstance(value, Real) and tuple(variable.shape) != tuple(value.shape)):
            variable = self._make(name, () if isinstance(value, Real) else value.shape, aggregation)
        # ops.cast would take a Python float through float32
        variable.assign(value if isinstance(value, Real) else ops.cast(value, variable.dtype))


class _Carried:
    """The values of an instrument on JAX, which travel with data and logs.

    The state has the structure, and with `keras.distribution` the sharding, that Keras knows; and its arrays are
    donated, so that they would be lost with a step that fails.
    """

    def __init__(self, model: Any, given: Mapping[str, str], dtype: str):  # noqa: ARG002
        self._dtype = dtype
        self._given = list(given)
        self._outside: dict[str, Any] = {name: np.zeros((), dtype) for name in given}
        self._inside: dict[str, Tensor] | None = None

    def get(self, name: str) -> Tensor:
        return (self._outside if self._inside is None else self._inside)[name]

    def set(self, name: str, value: Any, aggregation: str) -> None:  # noqa: ARG002
        if self._inside is None:
            self._outside[name] = np.asarray(ops.convert_to_numpy(value), self._dtype)
        else:
            self._inside[name] = ops.cast(value, self._dtype)

    def to_step(self) -> dict[str, Any]:
        return {name: self._outside[name] for name in self._given}

    def from_step(self, values: Mapping[str, Tensor]) -> None:
        self._outside.update(values)

    @contextlib.contextmanager
    def inside(self, values: Mapping[str, Tensor]) -> Iterator[Callable[[], dict[str, Tensor]]]:
        self._inside = dict(values)
        try:
            yield lambda: dict(self._inside or {})
        finally:
            self._inside = None


# -- steps ------------------------------------------------------------------------------------------------------------

_Some = TypeVar("_Some", bound=Instrument)

#: Where a model holds its steps, past Keras's and TensorFlow's tracking of attributes.
_HELD_AS = "_keras_optkit_steps"


def attach(model: Any, key: Hashable | None, make: Callable[[], _Some]) -> _Some:
    """Puts an instrument to work in the training steps of a model, until it is detached.

    Args:
        model: The model.
        key: What it traces: instruments of equal keys are one as good as the other. None: no other one is.
        make: Makes one, if none of this key is kept.
    """
    steps = vars(model).get(_HELD_AS)
    if steps is None:
        steps = vars(model)[_HELD_AS] = _Steps(model)
    return steps.attach(key, make)


def detach(instrument: Instrument) -> None:
    """Takes an instrument out; with the last one, the model has the training step that it had."""
    vars(instrument.model)[_HELD_AS].detach(instrument)


def renew(model: Any) -> None:
    """Has the step without instruments traced again, which an optimizer that was changed calls for.

    Steps with instruments are kept, since those are compared with the optimizer before they are used again.
    """
    steps = vars(model).get(_HELD_AS)
    if steps is None:
        compile_anew(model)
    else:
        steps.renew()


@dataclasses.dataclass(eq=False)
class _Compiled:
    """A compiled step, and what it was compiled for."""

    instruments: tuple[Instrument, ...]
    settings: tuple[Any, ...]
    function: Any = None
    basis: Any = None  # of the traces
    usable: bool = True

    def is_for(self, instruments: tuple[Instrument, ...], model: Any) -> bool:
        return (
            self.usable
            and self.instruments == instruments
            and self.settings == _settings(model)
            and (self.basis is None or self.basis == _basis(model, instruments))
        )


class _Steps:
    """The compiled training steps of one model that were made for instruments, and the instruments."""

    def __init__(self, model: Any):
        self._model = model
        self._active: list[Instrument] = []
        self._idle: list[Instrument] = []
        self._keys: dict[Instrument, Hashable | None] = {}
        self._kept: list[_Compiled] = []
        self._chosen: dict[tuple[Instrument, ...], _Compiled] = {}  # in this `fit`
        self._plain: Any = None  # the step without instruments
        self._kept_beside: Any = None  # the one that what is kept was made beside

    def attach(self, key: Hashable | None, make: Callable[[], _Some]) -> _Some:
        first = not self._active
        if first and self._model.train_function is not self._kept_beside:  # compiled since, or made by somebody
            self._forget()
        found = next((i for i in self._idle if key is not None and self._keys[i] == key), None)
        instrument: Any = make() if found is None else found
        if found is None:
            self._keys[instrument] = key
        else:
            self._idle.remove(found)
        self._active.append(instrument)
        self._chosen = {}
        if first:
            self._take_over()
        return instrument

    def _take_over(self) -> None:
        model = self._model
        self._replaced, self._make = vars(model).get("make_train_function"), model.make_train_function
        vars(model)["make_train_function"] = self.make_train_function
        if model.train_function is None:
            self._make()
        self._put_before()

    def _put_before(self) -> None:
        self._plain = self._kept_beside = self._model.train_function
        # a new one each time, by which others see that the step was made again
        self._dispatch = self._model.train_function = lambda *given: self._run(*given)

    def detach(self, instrument: Instrument) -> None:
        if instrument not in self._active:
            return
        self._active.remove(instrument)
        self._idle.append(instrument)
        instrument.close()
        self._chosen = {}
        if self._active:
            return
        model = self._model
        if self._replaced is None:
            del vars(model)["make_train_function"]
        else:
            vars(model)["make_train_function"] = self._replaced
        if model.train_function is self._dispatch:
            model.train_function = self._plain
        del self._make, self._replaced, self._dispatch
        self._plain = None
        self._prune()

    def _prune(self) -> None:
        """Keeps what another `fit` can use."""
        self._kept = [c for c in self._kept if c.usable and all(self._keys[i] is not None for i in c.instruments)]
        self._kept = self._kept[-KEPT:]
        used = {i for compiled in self._kept for i in compiled.instruments}
        self._idle = [i for i in self._idle if i in used]
        self._keys = {i: key for i, key in self._keys.items() if i in used or i in self._active}

    def _forget(self) -> None:
        self._kept, self._chosen = [], {}
        self._idle, self._keys = [], {i: self._keys[i] for i in self._active}

    def renew(self) -> None:
        """Has the step without instruments made again; it is not what the others were traced from."""
        model = self._model
        put, plain = model.train_function, self._plain if self._active else model.train_function
        (self._make if self._active else model.make_train_function)(force=True)
        if plain is self._kept_beside:
            self._kept_beside = model.train_function
        if self._active:
            self._plain, model.train_function = model.train_function, put
        if _on_jax():
            forget_trace(model.train_step)

    def make_train_function(self, force: bool = False) -> None:
        """Stands in for the model's while there are instruments."""
        if self._model.train_function is not None and not force:
            return
        self._make(force)
        self._forget()
        self._put_before()

    def _run(self, *given: Any) -> Any:
        *state, iterator = given
        for instrument in self._active:
            iterator = instrument.feed(iterator)
        taking_part = tuple(instrument for instrument in self._active if instrument.wanted)
        if taking_part not in self._chosen:
            self._chosen[taking_part] = self._compiled(taking_part)
        try:
            return self._chosen[taking_part].function(*state, iterator)
        except NO_MORE_DATA:
            for instrument in self._active:
                instrument.data_ended()
            raise

    def _compiled(self, instruments: tuple[Instrument, ...]) -> _Compiled:
        found = next((c for c in self._kept if c.is_for(instruments, self._model)), None)
        if found is None:
            self._kept = [c for c in self._kept if c.instruments != instruments]  # not any more
            found = self._compile(instruments)
        self._kept = [*(c for c in self._kept if c is not found), found]  # the last one used is the last one dropped
        return found

    def _compile(self, instruments: tuple[Instrument, ...]) -> _Compiled:
        model = self._model
        for instrument in instruments:
            instrument.prepare()
        compiled = _Compiled(instruments, _settings(model))
        own, dispatch = vars(model).get("train_step"), model.train_function
        vars(model)["train_step"] = _step_on_jax(model, compiled) if _on_jax() else _step(model, compiled)
        try:
            self._make(force=True)
            compiled.function = _through(model.train_function, instruments) if _on_jax() else model.train_function
        finally:
            model.train_function = dispatch
            if own is None:
                del vars(model)["train_step"]
            else:
                vars(model)["train_step"] = own
        return compiled


def _on_jax() -> bool:
    return bool(keras.config.backend() == "jax")


def _step(model: Any, compiled: _Compiled) -> Callable[..., Any]:
    """The model's step, with the instruments."""
    own = model.train_step

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for instrument in compiled.instruments:
                stack.enter_context(instrument.stepping(*args, *kwargs.values()))
            result = own(*args, **kwargs)
        _note(model, compiled)
        return result

    return train_step


def _step_on_jax(model: Any, compiled: _Compiled) -> Callable[..., Any]:
    """The same, where values come with the data and leave with the logs."""
    step = _step(model, compiled)

    def train_step(state: State, data: tuple[Any, list[dict[str, Tensor]]]) -> tuple[Any, State]:
        data, given = data
        with contextlib.ExitStack() as stack:
            taken = [
                stack.enter_context(instrument._values.inside(values))
                for instrument, values in zip(compiled.instruments, given, strict=True)
            ]
            logs, state = step(state, data)
            return (logs, [values() for values in taken]), state

    return train_step


def _through(function: Callable[..., Any], instruments: tuple[Instrument, ...]) -> Callable[..., Any]:
    """A compiled step on JAX, handed the values that it takes, and with those that it returns taken out."""

    def train_function(state: State, iterator: Iterator[Any]) -> tuple[Any, State]:
        given = [instrument._values.to_step() for instrument in instruments]
        (logs, taken), state = function(state, _With(given, iterator))
        for instrument, values in zip(instruments, taken, strict=True):
            instrument._values.from_step(values)
        return logs, state

    return train_function


class _With:
    """An iterator over pairs of data and what is given with them."""

    def __init__(self, given: Any, iterator: Iterator[Any]):
        self._given, self._iterator = given, iterator

    def __next__(self) -> tuple[Any, Any]:
        return next(self._iterator), self._given


# -- what a trace depends on ------------------------------------------------------------------------------------------


def _settings(model: Any) -> tuple[Any, ...]:
    return model.run_eagerly, model.jit_compile, model.steps_per_execution


def _note(model: Any, compiled: _Compiled) -> None:
    """At the end of a trace, when everything is built: what it has depended on."""
    if model.run_eagerly:
        return  # depends on nothing that was
    basis = _basis(model, compiled.instruments)
    compiled.usable = compiled.usable and compiled.basis in (None, basis)
    compiled.basis = basis


def _basis(model: Any, instruments: Iterable[Instrument]) -> Any:
    """What is compiled into a step besides the model's own code: which weights are trained, and hyperparameters."""
    driven: dict[int, set[str]] = {}
    for instrument in instruments:
        for optimizer, names in instrument.driven().items():
            driven.setdefault(id(optimizer), set()).update(names)
    found, seen = optimizers_of(model), []
    while found:
        optimizer = found.pop(0)
        seen.append((_Same(optimizer), _attributes(optimizer, driven.get(id(optimizer), set()))))
        found = [*directly_inside(optimizer), *found]
    return [_Same(v) for v in model.trainable_variables], seen


class _Same:
    """Equal to itself of the same object only, which it holds, so that no other one gets its id."""

    def __init__(self, held: Any):
        self._held = held

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)


def _attributes(owner: Any, without: Iterable[str] = ()) -> tuple[Any, ...]:
    return tuple(
        (name, frozen(value, without))
        for name, value in sorted(vars(owner).items())
        if name not in set(without) and not hasattr(value, "hooks")  # of another replica, say
    )


def frozen(value: Any, without: Iterable[str] = ()) -> Hashable:
    """What is equal as long as `value` means the same to a trace.

    Numbers and strings, also in containers, in dataclasses (the rule of an optimizer) and in schedules, go by their
    values; everything else by what it is.
    """
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return type(value), value
    if isinstance(value, np.ndarray):
        return value.shape, value.dtype.str, value.tobytes()
    if isinstance(value, Mapping):
        return dict, tuple((frozen(k), frozen(v, without)) for k, v in value.items())
    if isinstance(value, list | tuple):
        return type(value), tuple(frozen(v, without) for v in value)
    if isinstance(value, set | frozenset):
        return frozenset, frozenset(frozen(v) for v in value)
    if isinstance(value, LearningRateSchedule) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        return type(value), _attributes(value, without)
    return _Same(value)

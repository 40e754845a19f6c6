"""Compiled training steps with instruments in them, for as long as a `fit` lasts.

`attach` adds an instrument to the steps and `detach` removes it.

The model keeps compiled steps with their instruments. The next `fit` with instruments of the same keys uses them again,
unless something that the trace depends on has changed since: the model was compiled, other weights are trained, or an
optimizer has other hyperparameters. Callbacks are not kept.

An instrument that is not `wanted` in every step costs nothing in the others: the step is then compiled twice, with and
without it, and the host chooses before every step. A condition inside of one compiled step would cost something in
each, would have to hold a copy of all weights, and could not sum over the replicas of a strategy, which TensorFlow
refuses inside of a condition.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import keras

from keras_optkit.backend import NO_MORE_DATA
from keras_optkit.fit.basis import basis
from keras_optkit.fit.instrument import Instrument
from keras_optkit.fit.needs import with_needs
from keras_optkit.private import forget_trace, sublayers

Tensor = Any
State = Any

#: How many compiled steps a model keeps.
KEPT = 8


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
        tf.function(with_needs(model, model.train_step), autograph=False).get_concrete_function(spec)


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
            and (self.basis is None or self.basis == basis(model, instruments))
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
            if _on_jax() and keras.distribution.distribution() is not None:
                _fill_variables(self._model, state)
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


def _fill_variables(model: Any, state: Sequence[Any]) -> None:
    """Has the variables hold a step's state: Keras asks them for their layouts, and during an epoch they are empty."""
    held = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    for variables, values in zip(held, *state, strict=True):
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)


def _on_jax() -> bool:
    return bool(keras.config.backend() == "jax")


def _step(model: Any, compiled: _Compiled) -> Callable[..., Any]:
    """The model's step, with the instruments."""
    own = with_needs(model, model.train_step)

    def train_step(*args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for instrument in compiled.instruments:
                stack.enter_context(instrument.stepping(*args, *kwargs.values()))
            result = own(*args, **kwargs)
        _note(model, compiled)
        return result

    train_step.provides = True  # type: ignore[attr-defined]  # if that is needed
    train_step.drives = any(i.driven() for i in compiled.instruments)  # type: ignore[attr-defined]
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

    train_step.provides = True  # type: ignore[attr-defined]
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


def _settings(model: Any) -> tuple[Any, ...]:
    return model.run_eagerly, model.jit_compile, model.steps_per_execution


def _note(model: Any, compiled: _Compiled) -> None:
    """At the end of a trace, when everything is built: what it has depended on."""
    if model.run_eagerly:
        return  # depends on nothing that was
    found = basis(model, compiled.instruments)
    compiled.usable = compiled.usable and compiled.basis in (None, found)
    compiled.basis = found

"""Values that a callback and the compiled training step exchange, and the hooks by which it takes part in one.

What a callback does inside of the step is an `Instrument`: hooks around the methods that the step calls, and values
that step and host exchange. The hooks are in place only while the step is traced or, without compilation, runs, so that
what they are put around is looked up at that moment: a model may be built by its first step, and trained layers may
have changed. See `keras_optkit.fit.steps` for how one is put to work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.backend import traced_once

Tensor = Any


class Instrument:
    """What happens inside the training step of a model, and the values that step and host exchange.

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
        """Puts hooks around what the step is about to call, and returns functions that remove them."""
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
        with traced_once(), self._model.distribute_strategy.scope():
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

"""Variables, and when and where they are made, read and assigned."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_optkit.backend.which import TENSORFLOW

if TENSORFLOW:
    import tensorflow as tf

Tensor = Any


#: What a training step raises where the data end before it.
NO_MORE_DATA = (StopIteration, tf.errors.OutOfRangeError) if TENSORFLOW else (StopIteration,)


def handle(variable: Any) -> Any:
    """The backend's own variable inside one of Keras's."""
    return variable.value if isinstance(variable, keras.Variable) else variable


def tensor(variable: Any) -> Tensor:
    """The current value as a tensor; on TensorFlow `.value` of a Keras variable is still the variable."""
    value = handle(variable)
    return tf.convert_to_tensor(value) if TENSORFLOW else value


def assign(variables: Sequence[Any], values: Sequence[Tensor]) -> None:
    """Assigns a tensor to each variable; inside of a replica to the copy on its device, where each has its own tensor.

    Assigning to a variable of a strategy itself would take the mean over the replicas.
    """
    if not variables:
        return
    context = tf.distribute.get_replica_context() if TENSORFLOW and tf.distribute.has_strategy() else None
    if context is None or context.strategy.num_replicas_in_sync == 1:
        for variable, value in zip(variables, values, strict=True):
            handle(variable).assign(value) if TENSORFLOW else variable.assign(value)
        return
    handles = [handle(v) for v in variables]

    def on_device(_: Any, handles: list[Any], values: list[Tensor]) -> None:
        for variable, value in zip(handles, values, strict=True):
            variable.assign(value)

    def across_replicas(strategy: Any, values: list[Tensor]) -> None:
        strategy.extended.update(handles[0], on_device, args=(handles, values), group=False)

    context.merge_call(across_replicas, args=(list(values),))


def on_host(variable: Any) -> np.ndarray:
    """What a variable holds, to be read only; later updates leave it as it is.

    On CPUs it is the memory of the tensor itself, where `ops.convert_to_numpy` on TensorFlow makes two copies.
    """
    value = np.asarray(tensor(variable))
    value.setflags(write=False)
    return value


def key(variable: Any) -> int:
    """What identifies a variable, whether it comes as a Keras variable or as the tf.Variable inside one."""
    return id(handle(variable) if TENSORFLOW else variable)


def is_lost(variable: Any) -> bool:
    """Whether a variable has lost its value, as all of a model on JAX have once the first step of a `fit` failed."""
    if TENSORFLOW:
        return False
    try:
        return variable.value is None
    except TypeError:
        return True


def on_cpu(variable: Any) -> bool:
    """Whether a variable lives on a CPU, or its first copy does."""
    return TENSORFLOW and "CPU" in (handle(variable).device or "CPU")


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps AutoGraph from rewriting `function` and what it calls inside a user's `tf.function`."""
    return tf.autograph.experimental.do_not_convert(function) if TENSORFLOW else function


def functions_inlined(inlined: bool) -> bool:
    """Says whether what a `tf.function` holds becomes part of the computation that calls it; returns how it was."""
    if not TENSORFLOW:
        return False
    before = tf.config.functions_run_eagerly()
    if before != inlined:
        tf.config.run_functions_eagerly(inlined)
    return bool(before)


def scope_of(variable: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope of the strategy that a variable was made under."""
    strategy = getattr(handle(variable), "distribute_strategy", None) if TENSORFLOW else None
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def outside_graph() -> contextlib.AbstractContextManager[None]:
    """A scope in which variables can be made and read, also from inside a user's `tf.function`."""
    return tf.init_scope() if TENSORFLOW else contextlib.nullcontext()


def traced_once() -> contextlib.AbstractContextManager[None]:
    """A scope outside of the graph in which making a variable does not have the function around it traced again.

    For variables whose existence makes no difference to a trace.
    """
    return _unlifted() if TENSORFLOW and not tf.distribute.has_strategy() else outside_graph()


@contextlib.contextmanager
def _unlifted() -> Iterator[None]:
    def make(next_creator: Callable[..., Any], **settings: Any) -> Any:
        return next_creator(**{**settings, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(make):
        yield


def is_here(tensor: Tensor) -> bool:
    """Whether a tensor belongs to the computation that is traced or runs at present, and not to one inside it."""
    return not TENSORFLOW or tf.executing_eagerly() or tensor.graph is tf.compat.v1.get_default_graph()


def after(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A scope in which variables are assigned only once the tensor is there.

    Where data end, TensorFlow runs a step up to what needs the batch that is missing.
    """
    return tf.control_dependencies([tensor]) if TENSORFLOW else contextlib.nullcontext()


def in_checkpoints(optimizer: Any) -> Any:
    """What `tf.train.Checkpoint` finds in an optimizer's attributes: its state as in any other file. Elsewhere None."""
    if not TENSORFLOW:
        return None

    class State(tf.train.experimental.PythonState):
        def serialize(self) -> bytes:
            store: dict[str, np.ndarray] = {}
            optimizer.save_own_variables(store)
            file = io.BytesIO()
            np.savez(file, allow_pickle=False, **store)
            return file.getvalue()

        def deserialize(self, string_value: bytes) -> None:
            with np.load(io.BytesIO(string_value), allow_pickle=False) as file, scope_of(optimizer.iterations):
                optimizer.load_own_variables(dict(file))

    return State()

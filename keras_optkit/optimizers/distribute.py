"""How a pure step is run on the backend: reading variables, reducing over replicas, assigning the results.

This is the only file that knows about TensorFlow's variables and distribution strategies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops, tree

Tensor = Any
#: A pure step: (state, gradients) -> new state, with the structure of the state.
Step = Callable[[Any, list[Tensor | None]], Any]

TENSORFLOW = keras.config.backend() == "tensorflow"

if TENSORFLOW:
    import tensorflow as tf


def run(step: Step, state: Any, grads: Sequence[Tensor | None]) -> None:
    """Computes `step` on the values of the variables in `state` and assigns what has changed.

    In a replica of a distribution strategy the gradients are first summed over the replicas, so that `step` sees the
    gradients of the global batch, and every device then updates its own copies of the variables alike.
    """
    dense = [None if g is None else _dense(g) for g in grads]
    if not TENSORFLOW:
        _assign(step, state, dense)
        return
    strategy = tf.distribute.get_strategy()
    if strategy.num_replicas_in_sync == 1:
        _assign(step, state, dense)
        return
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "Optimizer.apply was called in the cross-replica context of a strategy with "
            f"{strategy.num_replicas_in_sync} replicas; call it inside strategy.run(...)."
        )
    present = [i for i, g in enumerate(dense) if g is not None]
    for i, total in zip(
        present, context.all_reduce(tf.distribute.ReduceOp.SUM, [dense[i] for i in present]), strict=True
    ):
        dense[i] = total
    handles = [_handle(v) for v in tree.flatten(state)]

    def on_device(_: Any, grads: list[Tensor | None], handles: list[Any]) -> None:
        _assign(step, tree.pack_sequence_as(state, handles), grads)

    def across_replicas(strategy: Any, grads: list[Tensor | None]) -> None:
        strategy.extended.update(handles[0], on_device, args=(grads, handles), group=False)

    context.merge_call(across_replicas, args=(dense,))


def _dense(gradient: Any) -> Tensor:
    """A gradient as one tensor; rows that occur twice in a sparse one are summed, which Keras's conversion leaves."""
    return tf.convert_to_tensor(gradient) if TENSORFLOW else ops.convert_to_tensor(gradient)


def _assign(step: Step, state: Any, grads: list[Tensor | None]) -> None:
    before = tree.map_structure(_read, state)
    after = step(before, grads)
    for variable, old, new in zip(tree.flatten(state), tree.flatten(before), tree.flatten(after), strict=True):
        if new is not old:
            variable.assign(new)


def _handle(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _read(variable: Any) -> Tensor:
    """The present value as a tensor; on TensorFlow `.value` of a Keras variable is still the variable."""
    value = _handle(variable)
    return tf.convert_to_tensor(value) if TENSORFLOW else value


def key(variable: Any) -> int:
    """What identifies a variable, whether it comes as a Keras variable or as the tf.Variable inside of one."""
    return id(_handle(variable) if TENSORFLOW else variable)


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps AutoGraph from rewriting `function` and what it calls inside a user's `tf.function`."""
    return tf.autograph.experimental.do_not_convert(function) if TENSORFLOW else function


def outside_graph() -> contextlib.AbstractContextManager[None]:
    """A scope in which variables can be made and read, also from inside a user's `tf.function`."""
    return tf.init_scope() if TENSORFLOW else contextlib.nullcontext()

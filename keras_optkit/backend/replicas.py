"""Distribution strategies of TensorFlow."""

from __future__ import annotations

from typing import Any

from keras_optkit.backend.variables import handle
from keras_optkit.backend.which import TENSORFLOW

if TENSORFLOW:
    import tensorflow as tf

Tensor = Any


def sum_over_replicas(tensors: list[Any]) -> list[Any]:
    """The sum over the replicas of a strategy for each tensor; None stays None."""
    if not TENSORFLOW or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return tensors
    context = tf.distribute.get_replica_context()
    if context is None:
        raise RuntimeError(
            "Optimizer.apply was called in the cross-replica context of a strategy with "
            f"{tf.distribute.get_strategy().num_replicas_in_sync} replicas; call it inside strategy.run(...)."
        )
    present = [i for i, t in enumerate(tensors) if t is not None]
    total = context.all_reduce(tf.distribute.ReduceOp.SUM, [tensors[i] for i in present])
    result = list(tensors)
    for i, value in zip(present, total, strict=True):
        result[i] = value
    return result


def is_one_of_several_replicas() -> bool:
    """Whether this runs inside one of several replicas."""
    return TENSORFLOW and tf.distribute.get_strategy().num_replicas_in_sync > 1


def in_all_replicas(flag: Tensor) -> Tensor:
    """Whether a flag is True in every replica of a strategy."""
    if not TENSORFLOW or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return flag
    failed = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~flag, "int32"))
    return tf.equal(failed, 0)


def refuse_unsupported_strategy() -> None:
    """Raises under a distribution strategy that is not supported."""
    if not (TENSORFLOW and tf.distribute.has_strategy()):
        return
    strategy = tf.distribute.get_strategy()
    known = ("MirroredStrategy", "MultiWorkerMirroredStrategy", "OneDeviceStrategy")
    if not isinstance(strategy, tuple(getattr(tf.distribute, name) for name in known)):
        raise ValueError(
            f"{type(strategy).__name__} is not supported: the optimizers of keras_optkit train under "
            f"{', '.join(known)}, or without a strategy."
        )


def refuse_foreign(variables: list[Any]) -> None:
    """Raises if a variable was made outside the current strategy's scope, so that not every device has a copy."""
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):  # any variable will do
        return
    foreign = [v for v in variables if not strategy.extended.variable_created_in_scope(handle(v))]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the {len(variables)} variables of the optimizer and the model, such as "
            f"{getattr(foreign[0], 'path', foreign[0].name)}, were not made under the {type(strategy).__name__} that "
            "trains them. Make and build the model and the optimizer, including `iterations`, in `strategy.scope()`."
        )

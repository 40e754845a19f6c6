"""How a pure step is run on the backend: reading variables, reducing over replicas, fusing, assigning the results.

This is the only file that knows about TensorFlow's variables, its XLA and its distribution strategies.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree

if TYPE_CHECKING:
    from keras_optkit.optimizers.packing import Bucket

Tensor = Any
State = dict[str, Any]

TENSORFLOW = keras.config.backend() == "tensorflow"

#: How many small parameters of one shape are packed by themselves. XLA compiles each part of a tensor that it is split
#: into, but equal ones once; so where the whole step is always compiled, buckets are made that equal each other.
REPEATED = None if TENSORFLOW else 8

if TENSORFLOW:
    import tensorflow as tf

#: What a training step raises where the data end before it.
NO_MORE_DATA = (StopIteration, tf.errors.OutOfRangeError) if TENSORFLOW else (StopIteration,)


class Rows(NamedTuple):
    """Some rows of a tensor, or what to write into them.

    Attributes:
        indices: `(n,)`; a row may occur several times, each time with the same values.
        values: `(n, *row)`.
        first: `(n, 1, ...)`, True where a row occurs for the first time.
    """

    indices: Tensor
    values: Tensor
    first: Tensor


@dataclass(frozen=True)
class Step:
    """What one call of `Optimizer.apply` does, as pure functions of the state.

    In the state that these functions see, "weights" is a list with one tensor for each bucket; None stands for a
    tensor that they may not look at as a whole, because it is to be updated by rows.

    Attributes:
        join: (bucket, gradients of its parameters) -> the gradient of the bucket.
        collect: (state, grads) -> state, in every call; None: there is nothing to collect.
        due: (scalars of the state) -> whether there is an update in this call; None: always.
        outdated: (scalars of the state) -> whether the weights are not those that training goes on from; None: never.
        renew: (state) -> state, before an update if they are not.
        read: (scalars of the state) -> present values of schedules, a flat list. Never compiled. None: there are none.
        prepare: (scalars of the state, grads, read) -> what the updates of all buckets need.
        update: (state, grads, prepared) -> state.
        update_rows: (bucket, take, rows, prepared) -> new rows, by state name; `take(name)` gives the present ones.
        healthy: (scalars of the new state) -> whether all is well; if not, the call fails with `failure`.
    """

    join: Callable[[int, list[Any]], Any]
    collect: Callable[[State, list[Any]], State] | None
    due: Callable[[State], Tensor] | None
    outdated: Callable[[State], Tensor] | None
    renew: Callable[[State], State]
    read: Callable[[State], list[Tensor]] | None
    prepare: Callable[[State, list[Any], list[Tensor]], Any]
    update: Callable[[State, list[Any], Any], State]
    update_rows: Callable[[int, Callable[[str], Tensor], Rows, Any], dict[str, Tensor]]
    healthy: Callable[[State], Tensor] | None = None
    failure: str = ""


def run(step: Step, buckets: Sequence[Bucket], state: State, grads: list[Any], *, fuse: bool = False) -> None:
    """Runs `step` on the values of the variables in `state` and assigns what has changed.

    Args:
        step: What to do.
        buckets: How the variables in `state["weights"]`, a list for each bucket, become one tensor each.
        state: Nested dicts and lists of variables.
        grads: For each bucket `Rows`, or a list of the gradients of its parameters, summed over replicas; None where
            there is none.
        fuse: Whether to compile the step with XLA where the function that it is part of is not compiled. Inside a
            replica every device updates its own copies of the variables alike.
    """
    if not TENSORFLOW:
        _run_pure(step, buckets, state, grads)
        return
    if not tf.distribute.has_strategy():
        _run(step, buckets, state, grads, fuse)
        return
    handles = [_handle(v) for v in tree.flatten(state)]
    _refuse_foreign(tree.flatten(state))

    def on_device(_: Any, grads: list[Any], handles: list[Any]) -> None:
        _run(step, buckets, tree.pack_sequence_as(state, handles), grads, fuse)

    def across_replicas(strategy: Any, grads: list[Any]) -> None:
        strategy.extended.update(handles[0], on_device, args=(grads, handles), group=False)

    context = tf.distribute.get_replica_context()
    if context is None:  # flushing, or a strategy with one replica; the others have been refused by now
        across_replicas(tf.distribute.get_strategy(), grads)
    else:
        context.merge_call(across_replicas, args=(grads,))


def _run_pure(step: Step, buckets: Sequence[Bucket], state: State, grads: list[Any]) -> None:
    grads = [step.join(b, parts) if isinstance(parts, list) else parts for b, parts in enumerate(grads)]
    before = _read(buckets, state)
    after = before if step.collect is None else step.collect(before, grads)

    def update() -> State:
        ready = after
        if step.outdated is not None:
            ready = ops.cond(step.outdated(after), lambda: step.renew(after), lambda: after)
        read = [] if step.read is None else step.read(ready)
        return step.update(ready, grads, step.prepare(ready, grads, read))

    new = update() if step.due is None else ops.cond(step.due(after), update, lambda: after)
    _write(buckets, state, before, new)


def _run(step: Step, buckets: Sequence[Bucket], state: State, grads: list[Any], fuse: bool) -> None:
    fuse = fuse and not tf.executing_eagerly()
    rows = {b: grad for b, grad in enumerate(grads) if isinstance(grad, Rows)}
    # XLA compiles each part of a tensor by itself, so that parameters are joined and split outside of it
    inside = {b for b, bucket in enumerate(buckets) if bucket.alone}

    def together(grads: list[Any], *, here: bool = True) -> list[Any]:
        """The gradients of the buckets, joined unless they are to be joined elsewhere."""
        return [
            step.join(b, grad) if isinstance(grad, list) and (here or b not in inside) else grad
            for b, grad in enumerate(grads)
        ]

    given = [] if tf.executing_eagerly() else [g.values if is_sparse(g) else g for g in _tensors_in(grads)]
    # where data end, TensorFlow runs a step up to what needs the batch that is missing; without this it would count
    computed = tf.group(*given) if given else None

    if step.collect is not None:
        grads = together(grads)
        before = _read(buckets, state, only=("accumulated", "given", "micro"))
        _write(buckets, state, before, step.collect(before, grads), once=computed)

    def update() -> None:
        if step.outdated is not None:
            _if(step.outdated(_scalars(state)), lambda: change(step.renew, buckets, state))
        read = [] if step.read is None else step.read(_scalars(state))
        outer = together(grads, here=not fuse or bool(rows))
        prepared = step.prepare(_scalars(state), outer, read) if rows else None
        awaited = computed if step.due is None else None  # or else `due` has waited

        def compute(joined: list[Any], grads: list[Any], read: list[Tensor], prepared: Any) -> list[Any]:
            before = _read(buckets, state, joined=joined, without=rows)
            grads = together(grads)
            ready = prepared if rows else step.prepare(before, grads, read)
            new = step.update(before, grads, ready)
            return _write(buckets, state, before, new, keep=inside if fuse else None, once=None if fuse else awaited)

        if fuse:
            compute = tf.function(compute, jit_compile=True, autograph=False)
        joined = [
            None if b in inside or b in rows else bucket.join([_tensor(v) for v in state["weights"][b]])
            for b, bucket in enumerate(buckets)
        ]
        dense = [None if b in rows else grad for b, grad in enumerate(outer)]
        with _once_there(awaited if fuse else None):
            kept = compute(joined, dense, read, prepared)
        for b, new in enumerate(kept):
            if new is not None:
                _assign_all(state["weights"][b], buckets[b].split(new))
        for b, grad in rows.items():
            _write_rows(step, state, b, grad, prepared)

    if step.due is None:
        update()
    else:
        _if(step.due(_scalars(state)), update)
    if step.healthy is not None:
        tf.debugging.Assert(step.healthy(_scalars(state)), [step.failure])


def change(function: Callable[[State], State], buckets: Sequence[Bucket], state: State) -> None:
    """Runs a pure function of the state on the values of the variables in it and assigns what has changed."""
    before = _read(buckets, state)
    _write(buckets, state, before, function(before))


def _if(condition: Tensor, action: Callable[[], None]) -> None:
    def act() -> bool:
        action()
        return True

    tf.cond(condition, act, lambda: False)


def _read(
    buckets: Sequence[Bucket],
    state: State,
    *,
    joined: Sequence[Tensor | None] | None = None,
    without: Collection[int] = (),
    only: Collection[str] | None = None,
) -> State:
    """The state as tensors; None for the weights and slots of the buckets in `without`."""
    view: State = {}
    for name, part in state.items():
        if only is not None and name not in only:
            continue
        if name == "weights":
            view[name] = [
                None
                if b in without
                else bucket.join([_tensor(v) for v in part[b]])
                if joined is None or joined[b] is None
                else joined[b]
                for b, bucket in enumerate(buckets)
            ]
        elif name == "slots":
            view[name] = [
                {slot: None if b in without else _tensor(v) for slot, v in slots.items()}
                for b, slots in enumerate(part)
            ]
        else:
            view[name] = tree.map_structure(_tensor, part)
    return view


def _write(
    buckets: Sequence[Bucket],
    state: State,
    before: State,
    after: State,
    *,
    keep: Collection[int] | None = None,
    once: Any = None,
) -> list[Any]:
    """Assigns what has changed.

    Args:
        buckets: The buckets.
        state: The variables.
        before: Their values.
        after: Their new values.
        keep: If given, the weights of the buckets not in it are returned and not assigned.
        once: On TensorFlow the operation that what does not depend on gradients, such as a counter, waits for.
    """
    kept: list[Any] = [None] * len(buckets)
    for name, old in before.items():
        if name == "weights":
            for b, bucket in enumerate(buckets):
                new = after[name][b]
                if new is old[b]:
                    continue
                if keep is not None and b not in keep:
                    kept[b] = new
                else:
                    _assign_all(state[name][b], bucket.split(new))
        else:
            for variable, a, b in zip(*map(tree.flatten, (state[name], old, after[name])), strict=True):
                if a is not b:
                    with _once_there(once):
                        variable.assign(b)
    return kept


def _once_there(operation: Any) -> contextlib.AbstractContextManager[Any]:
    """A scope in which everything waits for an operation, if there is one."""
    return contextlib.nullcontext() if operation is None else tf.control_dependencies([operation])


def _tensors_in(grads: Sequence[Any]) -> list[Any]:
    """All gradients in those of the buckets."""
    lists = [[grad.values] if isinstance(grad, Rows) else grad for grad in grads if grad is not None]
    return [grad for parts in lists for grad in parts if grad is not None]


def _write_rows(step: Step, state: State, b: int, grad: Rows, prepared: Any) -> None:
    variables = {"weights": state["weights"][b][0], **state["slots"][b]}

    def take(name: str) -> Tensor:
        return tf.gather(_handle(variables[name]), grad.indices)

    for name, values in step.update_rows(b, take, grad, prepared).items():
        _handle(variables[name]).scatter_update(tf.IndexedSlices(values, grad.indices))


def _assign_all(variables: Sequence[Any], values: Sequence[Tensor]) -> None:
    for variable, value in zip(variables, values, strict=True):
        _handle(variable).assign(value) if TENSORFLOW else variable.assign(value)


def _scalars(state: State) -> State:
    """What is neither a list nor in one: counters and the like."""
    return {name: tree.map_structure(_tensor, part) for name, part in state.items() if not isinstance(part, list)}


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


def in_all_replicas(flag: Tensor) -> Tensor:
    """Whether a flag is True in every replica of a strategy."""
    if not TENSORFLOW or tf.distribute.get_strategy().num_replicas_in_sync == 1:
        return flag
    failed = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.cast(~flag, "int32"))
    return tf.equal(failed, 0)


def refuse_unsupported_strategy() -> None:
    """Raises under a distribution strategy that the steps have not been made for."""
    if not (TENSORFLOW and tf.distribute.has_strategy()):
        return
    strategy = tf.distribute.get_strategy()
    known = ("MirroredStrategy", "MultiWorkerMirroredStrategy", "OneDeviceStrategy")
    if not isinstance(strategy, tuple(getattr(tf.distribute, name) for name in known)):
        raise ValueError(
            f"{type(strategy).__name__} is not supported: the optimizers of keras_optkit train under "
            f"{', '.join(known)}, or without a strategy."
        )


def _refuse_foreign(variables: list[Any]) -> None:
    """Raises if a variable was made outside of the present strategy's scope, and so has no copy on each device."""
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):  # any variable will do
        return
    foreign = [v for v in variables if not strategy.extended.variable_created_in_scope(_handle(v))]
    if foreign:
        raise ValueError(
            f"{len(foreign)} of the {len(variables)} variables of the optimizer and the model, such as "
            f"{getattr(foreign[0], 'path', foreign[0].name)}, were not made under the {type(strategy).__name__} that "
            "trains them. Make and build the model and the optimizer, `iterations` and all, in `strategy.scope()`."
        )


def is_sparse(gradient: Any) -> bool:
    """Whether a gradient holds some rows only."""
    return TENSORFLOW and isinstance(gradient, tf.IndexedSlices)


def as_gradient(gradient: Any) -> Any:
    """A gradient as a tensor, or as the rows that it is."""
    if is_sparse(gradient):
        return gradient
    return tf.convert_to_tensor(gradient) if TENSORFLOW else ops.convert_to_tensor(gradient)


def may_have_shape(gradient: Any, shape: Sequence[int]) -> bool:
    """Whether a gradient has a shape, as far as that is known; in a graph it may be known in the step alone."""
    if not TENSORFLOW:
        return tuple(gradient.shape) == tuple(shape)
    if not is_sparse(gradient):
        return gradient.shape.is_compatible_with(shape)
    rows = gradient.values.shape[:1]
    return (
        _shape_of_rows(gradient).is_compatible_with(shape)
        and gradient.indices.shape.is_compatible_with(rows)
        and gradient.values.shape.is_compatible_with(rows.concatenate(shape[1:]))
    )


def _shape_of_rows(gradient: Any) -> Any:
    """The shape that a gradient of some rows is said to be part of."""
    return gradient.shape if tf.is_tensor(gradient.dense_shape) else tf.TensorShape(gradient.dense_shape)


def described_shape(gradient: Any) -> str:
    """The shape of a gradient, for messages."""
    if is_sparse(gradient):
        return f"{_shape_of_rows(gradient)} with rows {gradient.values.shape} at indices {gradient.indices.shape}"
    return str(tuple(gradient.shape))


def add(a: Any, b: Any, shape: Sequence[int]) -> Any:
    """The sum of two gradients of one variable, either of which may be None."""
    if a is None or b is None:
        return a if b is None else b
    if is_sparse(a) and is_sparse(b):
        values, indices = (
            tf.concat([a.values, b.values], 0),
            tf.concat([a.indices, tf.cast(b.indices, a.indices.dtype)], 0),
        )
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return dense(a, shape) + dense(b, shape)


def dense(gradient: Any, shape: Sequence[int]) -> Tensor:
    """A gradient as one tensor; rows that occur twice in a sparse one are summed, which Keras's conversion leaves."""
    if is_sparse(gradient):  # the conversion does not know the shape where `dense_shape` is computed in the graph
        return tf.ensure_shape(tf.math.unsorted_segment_sum(gradient.values, gradient.indices, shape[0]), shape)
    return tf.ensure_shape(gradient, shape) if TENSORFLOW else ops.convert_to_tensor(gradient)


def cast(gradient: Any, dtype: str) -> Any:
    """A gradient, sparse or not, in another dtype."""
    if is_sparse(gradient):
        return tf.IndexedSlices(tf.cast(gradient.values, dtype), gradient.indices, gradient.dense_shape)
    return gradient if keras.backend.standardize_dtype(gradient.dtype) == dtype else ops.cast(gradient, dtype)


def touched(gradient: Any, shape: Sequence[int]) -> Tensor:
    """For a sparse gradient, True for all numbers of the rows that it holds, in the shape of the parameter."""
    hits = tf.math.unsorted_segment_sum(tf.ones_like(gradient.indices), gradient.indices, shape[0])
    return tf.broadcast_to(tf.reshape(hits > 0, (-1, *[1] * (len(shape) - 1))), shape)


def nonzero_rows(tensor: Tensor) -> Tensor:
    """True for all numbers of the rows, along the first axis, that hold a number other than 0."""
    nonzero = ops.not_equal(tensor, 0)
    other_axes = list(range(1, len(tensor.shape)))
    return ops.broadcast_to(ops.any(nonzero, axis=other_axes, keepdims=True), tensor.shape) if other_axes else nonzero


def rows(gradient: Any, row: Sequence[int]) -> Rows:
    """The rows of a sparse gradient, where each occurrence of a row has the sum of all its occurrences.

    Nothing here has a shape that depends on how many rows differ, so it can be compiled.
    """
    order = tf.argsort(gradient.indices, stable=True)
    indices = tf.gather(gradient.indices, order)
    first = tf.concat([tf.ones_like(indices[:1], "bool"), indices[1:] != indices[:-1]], 0)
    segments = tf.cumsum(tf.cast(first, "int32")) - 1
    values = tf.gather(tf.ensure_shape(gradient.values, (None, *row)), order)
    sums = tf.math.unsorted_segment_sum(values, segments, tf.size(segments))
    return Rows(indices, tf.gather(sums, segments), tf.reshape(first, (-1, *[1] * (len(values.shape) - 1))))


def random_bits(shape: Sequence[int], seed: tuple[Any, Any]) -> Tensor:
    """Random int32 numbers, all bits of them, as a function of the seed alone, a pair of integers."""
    if TENSORFLOW:
        pair = tf.stack([tf.cast(part, "int32") for part in seed])
        return tf.random.stateless_uniform(shape, pair, None, None, "int32", alg="philox")
    if keras.config.backend() == "jax":
        import jax

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed[0]), seed[1])
        return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, "uint32"), "int32")
    raise ValueError(f"stochastic_rounding is for the backends tensorflow and jax, not {keras.config.backend()}.")


def on_cpu(variable: Any) -> bool:
    """Whether a variable lives on a CPU, or its first copy does."""
    return TENSORFLOW and "CPU" in (_handle(variable).device or "CPU")


def concatenate(vectors: Sequence[Tensor]) -> Tensor:
    """Vectors end to end, without the work of `keras.ops` for each of a thousand."""
    if len(vectors) == 1:
        return vectors[0]
    return tf.concat(vectors, 0) if TENSORFLOW else ops.concatenate(vectors)


def split(vector: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The inverse of `concatenate`. (`ops.split` loses the static sizes on TensorFlow.)"""
    if len(sizes) == 1:
        return [vector]
    return tf.split(vector, sizes) if TENSORFLOW else ops.split(vector, np.cumsum(sizes)[:-1].tolist())


def _handle(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable


def _tensor(variable: Any) -> Tensor:
    """The present value as a tensor; on TensorFlow `.value` of a Keras variable is still the variable."""
    value = _handle(variable)
    return tf.convert_to_tensor(value) if TENSORFLOW else value


def on_host(variable: Any) -> np.ndarray:
    """What a variable holds, to be read only; later updates leave it as it is.

    On CPUs it is the memory of the tensor itself, where `ops.convert_to_numpy` on TensorFlow makes two copies.
    """
    value = np.asarray(_tensor(variable))
    value.setflags(write=False)
    return value


def key(variable: Any) -> int:
    """What identifies a variable, whether it comes as a Keras variable or as the tf.Variable inside of one."""
    return id(_handle(variable) if TENSORFLOW else variable)


def is_lost(variable: Any) -> bool:
    """Whether a variable has lost its value, as all of a model on JAX have once the first step of a `fit` failed."""
    if TENSORFLOW:
        return False
    try:
        return variable.value is None
    except TypeError:
        return True


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps AutoGraph from rewriting `function` and what it calls inside a user's `tf.function`."""
    return tf.autograph.experimental.do_not_convert(function) if TENSORFLOW else function


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


def scope_of(variable: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope of the strategy that a variable was made under."""
    strategy = getattr(_handle(variable), "distribute_strategy", None) if TENSORFLOW else None
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def outside_graph() -> contextlib.AbstractContextManager[None]:
    """A scope in which variables can be made and read, also from inside a user's `tf.function`."""
    return tf.init_scope() if TENSORFLOW else contextlib.nullcontext()


def is_here(tensor: Tensor) -> bool:
    """Whether a tensor belongs to the computation that is traced or runs at present, and not to one inside of it."""
    return not TENSORFLOW or tf.executing_eagerly() or tensor.graph is tf.compat.v1.get_default_graph()


def after(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A scope in which variables are assigned only once the tensor is there.

    Where data end, TensorFlow runs a step up to what needs the batch that is missing.
    """
    return tf.control_dependencies([tensor]) if TENSORFLOW else contextlib.nullcontext()

"""The state that a step reads and writes, and how it begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_optkit.kernels import TABLE
from keras_optkit.optimizers.engine.codecs import QUANTISED_FROM, Codec, Corrected, Signed, Unsigned
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.engine.plan import Keywords, RuleId, Rules
from keras_optkit.optimizers.rule import Rule, Slots, Tensor, Weight, slots_of
from keras_optkit.optimizers.slots import Fill, FromWeights
from keras_optkit.precision import HALF, at_least_float32, scalar_dtype


class State(NamedTuple):
    """Everything that a step depends on except the gradients: variables outside a step, and their values inside.

    What an optimizer does not have is empty. Lists have one item for each bucket. (The order of the fields is that of
    `Optimizer.variables`, which `.h5` files depend on.)

    Attributes:
        accumulated: Sums of the gradients of the micro-batches since the last update.
        average: The moving averages of the weights.
        evaluating: 1 while the model holds the evaluation weights.
        given: For each parameter, what there was of its gradients in these micro-batches; see `gradients.NONE`.
        iterations: How many updates there have been.
        master: Copies in float32 of weights in half precision.
        micro: How many micro-batches there have been since the last update.
        multiplier: The learning rate, or the factor on its schedule.
        nonfinite: What `skip_nonfinite` has met, by name.
        product: Sums of the products with the Hessian over these micro-batches, for rules that need them.
        scalars: The state of rules for the whole model, by name.
        slots: The state of rules for their parameters, by name.
        updates: For each parameter of a rule that asks `h.first`, how many updates it has had.
        weights: The weights: outside of a step a list of variables, inside of it one tensor, or None for one that must
            not be looked at as a whole, since it is updated by rows.
    """

    accumulated: Sequence[Any] = ()
    average: Sequence[Any] = ()
    evaluating: Any = ()
    given: Sequence[Any] = ()
    iterations: Any = ()
    master: Sequence[Any] = ()
    micro: Any = ()
    multiplier: Any = ()
    nonfinite: Any = ()
    product: Sequence[Any] = ()
    scalars: Any = ()
    slots: Sequence[Slots] = ()
    updates: Sequence[Any] = ()
    weights: Sequence[Any] = ()

    def has(self, name: str) -> bool:
        """Whether there is this part."""
        part = getattr(self, name)
        return not (isinstance(part, tuple) and not part)


#: The parts with something for each bucket.
PER_BUCKET = ("accumulated", "average", "given", "master", "product", "slots", "updates", "weights")


def filled(value: float) -> Callable[..., Tensor]:
    """An initializer with a constant in full precision; Keras's goes through float32."""
    return lambda shape, dtype: ops.full(shape, value, dtype)


def of_rule(rule: RuleId, name: str) -> str:
    """The name in the state of a scalar of one of an optimizer's rules."""
    number, route = rule
    return ".".join([*([str(number)] if number else []), *([route] if route else []), name])


#: Makes a variable from a shape, an initializer, a dtype and a name; see `Optimizer.add_variable`.
Make = Callable[..., keras.Variable]


def for_buckets(
    make: Make, keywords: Keywords, rules: Rules, buckets: Sequence[Bucket], variables: Sequence[Any], *, joining: bool
) -> State:
    """The state for buckets of `variables`.

    State initialised from the weights is zeros until the first update: the weights of a model that is built by its
    first step have no values while that step is traced. Variables that join after others have names that say so, since
    some kinds of files identify state by its variable's name.
    """

    def named(name: str, bucket: Bucket) -> str:
        return f"{name}_joined_{bucket.since}" if joining or bucket.since else name

    def like_weights(name: str, bucket: Bucket) -> keras.Variable:
        shape, dtype = bucket.stored_shape, at_least_float32(bucket.dtype)
        return make(shape, dtype=dtype, layout=bucket.layout(shape), name=named(name, bucket))

    def counts(name: str, bucket: Bucket) -> keras.Variable:
        layout = bucket.placement and bucket.placement.whole
        return make((len(bucket.indices),), dtype="int32", layout=layout, name=named(name, bucket))

    def encoded(name: str, value: float, bucket: Bucket, codec: type[Codec]) -> Codec:
        first = codec.encode(bucket, ops.full(bucket.joined_shape, value, "float32"))
        return codec(
            *(
                make(
                    tuple(part.shape),
                    (lambda *_, part=part, **__: part),
                    dtype,
                    layout=bucket.layout(tuple(part.shape)),
                    name=named(f"{name}_{own}", bucket),
                )
                for part, own, dtype in zip(first, codec._fields, codec.dtypes(), strict=True)
            )
        )

    def slot(name: str, initial: Fill | FromWeights, bucket: Bucket) -> keras.Variable | Codec:
        dtype = form_of_slot(bucket.weight, initial, keywords)
        if not isinstance(dtype, str):
            return encoded(name, initial.value, bucket, dtype)  # type: ignore[union-attr]
        if isinstance(initial, FromWeights):  # the first update sets it; see `begun`
            zeros = ops.zeros(bucket.stored_shape, dtype)
            shape = tuple(bucket.stored(initial.function(bucket.view(zeros))).shape)
            return make(shape, dtype=dtype, layout=bucket.layout(shape), name=named(name, bucket))
        shape = bucket.stored_shape if initial.shape is None else bucket.stacked_shape(initial.shape)
        return make(shape, filled(initial.value), dtype, layout=bucket.layout(shape), name=named(name, bucket))

    def slots(bucket: Bucket) -> dict[str, keras.Variable]:
        initial = slots_of(rules[bucket.rule].rule, bucket.weight)
        return {name: slot(name, value, bucket) for name, value in initial.items()}

    def updates(bucket: Bucket) -> dict[str, keras.Variable]:
        if not rules[bucket.rule].rule.uses_first:
            return {}
        return {"updates": counts("updates", bucket)}

    def master(bucket: Bucket) -> dict[str, keras.Variable]:
        return {"master": like_weights("master", bucket)} if bucket.dtype in HALF else {}

    def product(bucket: Bucket) -> dict[str, keras.Variable]:
        return {"product": like_weights("product", bucket)} if _needs_product(rules[bucket.rule].rule) else {}

    state = State(weights=[[variables[i] for i in b.indices] for b in buckets], slots=[slots(b) for b in buckets])
    if keywords.gradient_accumulation_steps:
        state = state._replace(
            accumulated=[like_weights("accumulated", b) for b in buckets],
            given=[counts("given", b) for b in buckets],
        )
        if any(_needs_product(routed.rule) for routed in rules.values()):
            state = state._replace(product=[product(b) for b in buckets])
    if keywords.use_ema:
        state = state._replace(average=[like_weights("average", b) for b in buckets])
    if keywords.master_weights:
        state = state._replace(master=[master(b) for b in buckets])
    if any(routed.rule.uses_first for routed in rules.values()):
        state = state._replace(updates=[updates(b) for b in buckets])
    return state


def _needs_product(rule: Rule) -> bool:
    return "hessian_vector" in rule.needs


def once(make: Make, keywords: Keywords, rules: Rules, iterations: Any, multiplier: Any) -> State:
    """The state that exists once."""

    def counter(name: str) -> keras.Variable:
        return make((), dtype="int", name=name)

    state = State(iterations=iterations, multiplier=multiplier)
    scalars = {
        of_rule(r, name): make((), filled(value), scalar_dtype(), name=name)
        for r, routed in rules.items()
        for name, value in routed.rule.scalars().items()
    }
    if scalars:
        state = state._replace(scalars=scalars)
    if keywords.gradient_accumulation_steps:
        state = state._replace(micro=counter("micro"))
    if keywords.use_ema or rules[0, ""].rule.averages:
        state = state._replace(evaluating=counter("evaluating"))
    if keywords.skip_nonfinite:
        names = ("skipped", "in_a_row", "bucket", "place")
        state = state._replace(nonfinite={name: counter(f"nonfinite_{name}") for name in names})
    return state


def joined(state: State, more: State) -> State:
    """The state with that of more buckets."""
    return state._replace(**{n: [*getattr(state, n), *getattr(more, n)] for n in PER_BUCKET if more.has(n)})


def begun(rule: Rule, slots: Slots, p: Tensor, bucket: Bucket, iterations: Tensor) -> Slots:
    """Slots before an update; in the first one, those that begin as a function of the weights are set to it."""
    functions = functions_of_weights(rule, bucket)
    first = ops.equal(iterations, bucket.since) if functions else None
    return {**slots, **{name: ops.where(first, function(p), slots[name]) for name, function in functions.items()}}


def functions_of_weights(rule: Rule, bucket: Bucket) -> dict[str, Callable[[Tensor], Tensor]]:
    """The slots of a bucket that begin as a function of the weights."""
    initial = slots_of(rule, bucket.weight)
    return {name: value.function for name, value in initial.items() if isinstance(value, FromWeights)}


def form_of_slot(weight: Weight, initial: Fill | FromWeights, keywords: Keywords) -> str | type[Codec]:
    """The dtype of a slot, or its codec.

    Slots initialised from the weights, and those in a shape of their own, have the precision of the computation: the
    former are weights, and the latter are small or, like the basis of a space, useless if they are rounded. Only
    moments are in 8 bits, and, as in the paper, neither those of small parameters nor those of embeddings.
    """
    wide, given = at_least_float32(weight.dtype), keywords.slot_dtype
    if given is None or isinstance(initial, FromWeights) or initial.shape is not None:
        return wide
    if given == "bfloat16+8":
        return Corrected
    if given != "int8":
        return given
    quantised = initial.is_moment and weight.role != TABLE and math.prod(weight.shape) >= QUANTISED_FROM
    return (Signed if initial.signed else Unsigned) if quantised else wide


def refuse_unless_quantised(name: str, keywords: Keywords, rules: Rules, buckets: Sequence[Bucket]) -> None:
    """Raises if `slot_dtype="int8"` would do nothing, whatever the sizes of the parameters are.

    Raises:
        ValueError: If none of the rules has a moment, and there is state.
    """
    known = {bucket.rule: slots_of(rules[bucket.rule].rule, bucket.weight) for bucket in buckets}
    slots = [slot for of_rule in known.values() for slot in of_rule.values()]
    if keywords.slot_dtype == "int8" and slots and not any(isinstance(s, Fill) and s.is_moment for s in slots):
        held = ", ".join(sorted({slot for of_rule in known.values() for slot in of_rule}))
        raise ValueError(
            f"slot_dtype must be None, 'float32', 'bfloat16' or 'bfloat16+8' for {name}, got 'int8': its state "
            f"({held}) has no running mean, which alone may be kept in 8 bits; see keras_optkit.optimizers.moment."
        )


def state_bytes(rule: Rule, weight: Weight, keywords: Keywords) -> int:
    """The bytes of state of a parameter."""
    size = math.prod(weight.shape)

    def bytes_of(initial: Fill | FromWeights) -> int:
        own = isinstance(initial, Fill) and initial.shape is not None
        count = math.prod(initial.shape) if own else size  # type: ignore[union-attr,arg-type]
        form = form_of_slot(weight, initial, keywords)
        return count * _item_bytes(form) if isinstance(form, str) else form.bytes_of(count)

    accumulated = 1 + _needs_product(rule) if keywords.gradient_accumulation_steps else 0
    copies = keywords.use_ema + accumulated
    copies += keywords.master_weights and weight.dtype in HALF
    copied = copies * size * _item_bytes(at_least_float32(weight.dtype))
    return sum(map(bytes_of, slots_of(rule, weight).values())) + copied + 4 * rule.uses_first


def _item_bytes(dtype: str) -> int:
    return 2 if dtype in HALF else np.dtype(dtype).itemsize

"""Bugs that are planted into the package, to see that the conformance checks catch them.

    python tests/planted_bugs.py            # all of them; the tables of docs/evidence/planted-bugs.md
    python tests/planted_bugs.py momentum   # those with the word in their description

Each bug is put into the running package, instead of one or two functions; the checks that are named with it must
fail, and pass again without it. (Those of `keras.distribution`, which takes eight devices, are in `tests/meshes.py`.)
"""

# ruff: noqa: ARG001, ARG005 (what is wrong has the arguments of what is right)

import collections
import contextlib
import copy
import dataclasses
import functools
import inspect
import json
import os
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import keras
import numpy as np
import tensorflow as tf
from keras import ops

import keras_optkit as ok
from keras_optkit import arguments, backend, callbacks, initializers, layers, regularizers, schedules
from keras_optkit.callbacks import session
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.data import EpochDataset
from keras_optkit.fit import second_gradient
from keras_optkit.initializers import base, depth, exact, orthogonal, sparse, variance
from keras_optkit.optimizers import building, groups, provided, random_numbers
from keras_optkit.optimizers.engine import (
    codecs,
    gradients,
    noise,
    nonfinite,
    packing,
    plan,
    rounding,
    run,
    state,
    update,
)
from keras_optkit.optimizers.engine.plan import Plan
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, is_dynamic
from keras_optkit.optimizers.rules import adaptive, lookahead, muon, sam, schedule_free, sgd
from keras_optkit.optimizers.rules.adam import AdamRule
from keras_optkit.optimizers.transforms import (
    AdaptiveClip,
    CautiousUpdate,
    ClipByGlobalNorm,
    ClipByValue,
    CorrectedDecay,
    centralize,
    unit_axes,
)
from keras_optkit.registry import KINDS
from keras_optkit.saving import FromSignature
from keras_optkit.schedules import curves
from keras_optkit.testing.conformance import Check, checks_for

#: Where the bug is planted, and the wrong function as a function of the right one.
Patch = tuple[Any, str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Bug:
    """A bug, the card that it is planted for, and the checks that have to catch it."""

    what: str
    card: str
    checks: tuple[str, ...]
    patches: tuple[Patch, ...]
    kind: str = "optimizer"

    @contextlib.contextmanager
    def planted(self):
        with contextlib.ExitStack() as undo:
            for owner, name, make in self.patches:
                inherited = name not in vars(owner)
                right = getattr(owner, name) if inherited else vars(owner)[name]
                _put(owner, name, make(right))
                undo.callback(*((delattr, owner, name) if inherited else (_put, owner, name, right)))
            yield

    def found(self) -> list[tuple[ok.Card, Check]]:
        (card,) = [c for c in ok.cards(self.kind) if c.name == self.card]
        known = {check.name: check for check in checks_for(card)}
        return [(card, known[name]) for name in self.checks]


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):
        setattr(owner, name, value)
    else:  # a module, or a card, which is frozen
        vars(owner)[name] = value


BUGS: list[Bug] = []


def bug(what: str, card: str, checks: str, *places: Any, kind: str = "optimizer") -> Callable[[Any], Any]:
    """Decorator of a function from the right function to the wrong one, for `places`: owner, name, owner, name, ..."""

    def add(make: Any) -> Any:
        makes = make if isinstance(make, list) else [make] * (len(places) // 2)
        patches = tuple(zip(places[::2], places[1::2], makes, strict=True))
        BUGS.append(Bug(what, card, tuple(checks.split()), patches, kind))
        return make

    return add


# -- decay, bias correction, epsilon ----------------------------------------------------------------------------------


@bug("bias correction with t - 1", "AdamW", "twin", Hyper, "bias_correction")
def _(right):
    def bias_correction(self, beta, *, skipped=0):
        late = copy.copy(self)
        late.step = ops.maximum(self.step - 1, 1)
        return right(late, beta, skipped=skipped)

    return bias_correction


@bug("no bias correction", "Adam", "twin", Hyper, "bias_correction")
def _(right):
    return lambda self, beta, **more: ops.ones_like(right(self, beta, **more))


@bug(
    "a hyperparameter is read as it was given, also where that is a schedule",
    "AdamW",
    "hyperparameters",
    AdamRule,
    "update",
)
def _(right):
    class AsGiven(Hyper):
        def __call__(self, value):
            return value

    def update(self, u, slots, p, h):
        raw = copy.copy(h)
        raw.__class__ = AsGiven
        return right(self, u, slots, p, raw)

    return update


@bug("a schedule of momentum is read at 0", "SGD", "hyperparameters", Hyper, "exact")
def _(right):
    def exact(self, value):
        return value if not is_dynamic(value) else ops.cast(value(0), "float64")

    return exact


@bug("epsilon outside of the root where it belongs inside", "RMSprop", "twin", adaptive, "_root")
def _(right):
    return lambda x, epsilon, inside: right(x, epsilon, False)


@bug("epsilon left out", "AdamW", "zero_and_rate_zero", AdamRule, "update")
def _(right):
    return lambda self, *rest: right(dataclasses.replace(self, epsilon=0.0), *rest)


@bug("decay multiplied by the learning rate twice", "AdamW", "twin decay_mask", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        h = copy.copy(h)
        h.weight_decay = h.learning_rate * h.weight_decay
        return right(plan, bucket, u, slots, p, h, mask)

    return apply_rule


@bug("decay not multiplied by the learning rate", "AdamW", "zero_and_rate_zero twin", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        without = copy.copy(h)
        without.decays = False
        new, slots = right(plan, bucket, u, slots, p, without, mask)
        return new - h.weight_decay * p, slots

    return apply_rule


@bug("decay added to the gradient, as an L2 penalty", "AdamW", "twin decay_mask", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        if h.decays:
            u, h = u + h.weight_decay * p, copy.copy(h)
            h.decays = False
        return right(plan, bucket, u, slots, p, h, mask)

    return apply_rule


@bug("decay of the weights after the step", "SGD", "twin decay_mask", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        without = copy.copy(h)
        without.decays = False
        p, slots = right(plan, bucket, u, slots, p, without, mask)
        return p - h.learning_rate * h.weight_decay * p, slots

    return apply_rule


@bug("vectors are decayed, too", "AdamW", "decay_mask", building, "treatments")
def _(right):
    return lambda places, weights, *rest: right(places, [w._replace(role="kernel") for w in weights], *rest)


@bug("weights move up the gradient", "SGD", "learns twin", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        return right(plan, bucket, -u, slots, p, h, mask)

    return apply_rule


# -- rules that look at parameters, or at the model, as a whole -------------------------------------------------------


@bug("nothing is routed to another rule", "Muon", "twin", groups, "_route")
def _(right):
    return lambda rule, weight: ""


@bug("a route has the rate of the others", "Muon", "twin", plan, "as_routed")
def _(right):
    return lambda route: dataclasses.replace(right(route), lr_scale=1.0)


@bug("missing gradients count in the sums over the model", "Prodigy", "some_updates", update, "_contributions")
def _(right):
    def contributions(plan, prepared, ready, remembered):
        unmasked = [theirs and theirs._replace(mask=None) for theirs in ready]
        return right(plan, prepared, unmasked, remembered)

    return contributions


@bug("the scalars before `measure` are those after it", "Prodigy", "some_updates", update, "Hyper")
def _(right):
    def hyper(*args, before=None, **more):
        return right(*args, before=None, **more)

    return hyper


@bug(
    "sums over parameters that are laid end to end are those over all",
    "LAMB",
    "twin packing",
    packing.Bucket,
    "_blocks",
)
def _(right):
    return lambda self: [(1, sum(count * size for count, size in right(self)))]


@bug("the first update is that of the bucket, not of the parameter", "SOAP", "some_updates", update, "_had_gradients")
def _(right):
    return lambda bucket, mask: right(bucket, None)


@bug("every n updates, but one update too late", "SOAP", "twin", Hyper, "every")
def _(right):
    return lambda self, n, compute, keep, *, at=0: right(self, n, compute, keep, at=at + 1)


@bug("state in a shape of its own changes without a gradient", "Adafactor", "missing_gradient", update, "_mask_of_slot")
def _(right):
    return lambda mask, p, slot: right(mask, p, slot) if slot.shape == p.shape else np.True_


@bug("rows and columns are swapped", "Muon", "twin", muon, "as_matrices")
def _(right):
    return lambda x, axes: ops.transpose(right(x, axes), (0, 2, 1))


# -- clipping, accumulation, replicas ---------------------------------------------------------------------------------


@bug(
    "clipnorm takes the norm of all variables that share a bucket",
    "AdamW",
    "clipping",
    packing.Bucket,
    "over_parameters",
)
def _(right):
    return lambda self, x, *, mean=False: ops.sum(x, keepdims=True)


@bug("global norm as the sum of the norms", "SGD", "clipping", gradients, "total")
def _(right):
    return lambda grad, x: ops.sqrt(right(grad, x))


@bug("weights are moved against the first gradient", "SAM", "second_gradient", sam.Ascent, "change")
def _(right):
    return lambda self, u, p, h: -right(self, u, p, h)


@bug("half of the parameters do not count in the radius", "SAM", "second_gradient", gradients, "total")
def _(right):
    return lambda grad, x: right(grad, x) / 2


def _restoring(wanted):
    def wrong(right):
        def restore(self, variables, values):
            pairs = [(v, value) for v, value in zip(variables, values, strict=True) if v.trainable == wanted]
            right(self, [v for v, _ in pairs], [value for _, value in pairs])

        return restore

    return wrong


bug(
    "the update is made at the perturbed weights",
    "SAM",
    "second_gradient",
    second_gradient.TwoOnTensorFlow,
    "_restore",
)(_restoring(wanted=False))

bug(
    "statistics of batches are those of the second run",
    "SAM",
    "second_gradient",
    second_gradient.TwoOnTensorFlow,
    "_restore",
)(_restoring(wanted=True))


@bug("the gradients are combined with the wrong sign", "GSAM", "second_gradient", sam.SurrogateGap, "change")
def _(right):
    return lambda self, u, p, h: 2 * u - right(self, u, p, h)


@bug("the radius is that of the largest rate", "GSAM", "second_gradient", sam.TiedAscent, "radius")
def _(right):
    return lambda self, h: h(self.rho)


@bug("the Hessian is multiplied by another vector", "SophiaH", "hessian_vector", provided.Provided, "products_of")
def _(right):
    return lambda self, recording, grads, variables: [-x for x in right(self, recording, grads, variables)]


@bug("products are computed one step too late", "SophiaH", "twin", random_numbers.RandomVector, "is_due")
def _(right):
    return lambda self, iterations: right(self, iterations + 1)


@bug("products of micro-batches are added up", "SophiaH", "accumulation", gradients, "means")
def _(right):
    def means(plan, state, grads):
        found = right(plan, state, grads)
        return [g._replace(extras={n: x * ops.cast(state.micro, x.dtype) for n, x in g.extras.items()}) for g in found]

    return means


@bug("transforms are applied from the last to the first", "AdamW", "transforms", Plan, "of")
def _(right):
    return lambda self, changes: right(self, changes)[::-1]


@bug("transforms of steps also change the decay", "AdamW", "transforms", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        p_new, new = right(dataclasses.replace(plan, transforms=()), bucket, u, slots, p, h, mask)
        step = p - p_new
        for transform in plan.of("step"):
            step = transform.change(step, p, h)
        return p - step, new

    return apply_rule


def _clipped_at_once(right):
    def of_buckets(plan, state, grads, *rest, **more):
        present = [g for g in grads if g is not None]
        for transform in plan.transforms:
            if isinstance(transform, ClipByGlobalNorm):
                present, _ = tf.clip_by_global_norm(present, transform.limit)
            elif isinstance(transform, ClipByValue):
                present = [tf.clip_by_value(g, -transform.limit, transform.limit) for g in present]
        left = iter(present)
        return right(plan, state, [None if g is None else next(left) for g in grads], *rest, **more)

    return of_buckets


bug("clipping before the sum over replicas", "AdamW", "replicas", gradients, "of_buckets")(_clipped_at_once)
bug("clipping before the mean over micro-batches", "AdamW", "accumulation", gradients, "of_buckets")(_clipped_at_once)


@bug("mean over replicas instead of the sum", "SGD", "replicas", backend, "sum_over_replicas")
def _(right):
    def mean(tensors):
        count = tf.distribute.get_strategy().num_replicas_in_sync
        return [None if t is None else t / count for t in right(tensors)]

    return mean


@bug("every replica updates with its own gradient", "AdamW", "replicas", backend, "sum_over_replicas")
def _(right):
    return lambda tensors: tensors


@bug("sum over micro-batches instead of the mean", "SGD", "accumulation", gradients, "means")
def _(right):
    def sums(plan, state, grads):
        k = plan.keywords.gradient_accumulation_steps
        return [None if g is None else g._replace(value=g.value * k) for g in right(plan, state, grads)]

    return sums


@bug("the last micro-batch instead of the mean", "AdamW", "accumulation", gradients, "collect")
def _(right):
    def collect(plan, state, grads):
        return right(plan, state._replace(accumulated=[0 * a for a in state.accumulated]), grads)

    return collect


@bug("the remainder at the end is divided by k", "SGD", "accumulation", gradients, "means")
def _(right):
    def of_k(plan, state, grads):
        k = plan.keywords.gradient_accumulation_steps
        return right(plan, state._replace(micro=ops.full_like(state.micro, k)), grads)

    return of_k


@bug("the remainder at the end is dropped", "AdamW", "accumulation", Optimizer, "flush")
def _(right):
    return lambda self: None


NOTED: dict[str, Any] = {}


def _note_the_micro_batches(right):
    def plan(self):
        NOTED["k"] = self.gradient_accumulation_steps or 1
        return right(self)

    return plan


def _read_late(right):
    return lambda dynamic, iterations, *rest: right(dynamic, iterations * NOTED["k"] + NOTED["k"] - 1, *rest)


bug("a schedule counts micro-batches", "AdamW", "accumulation", Optimizer, "_plan", run, "present")(
    [_note_the_micro_batches, _read_late]
)


@bug("micro-batches are counted as updates", "SGD", "accumulation", Optimizer, "apply")
def _(right):
    def apply(self, grads, trainable_variables=None):
        right(self, grads, trainable_variables)
        if self.gradient_accumulation_steps:
            waits = self._held.state.micro > 0
            self.iterations.assign(self.iterations + ops.cast(waits, self.iterations.dtype))

    return apply


@bug("the moving average counts micro-batches", "AdamW", "accumulation", Optimizer, "apply")
def _(right):
    def apply(self, grads, trainable_variables=None):
        right(self, grads, trainable_variables)
        held, share = self._held, 1 - self.ema_momentum
        for bucket, weights, average in zip(held.buckets, held.state.weights, held.state.average or (), strict=False):
            p = bucket.stored(bucket.join([ops.convert_to_tensor(w) for w in weights]))
            average.assign(self.ema_momentum * average + share * p)

    return apply


@bug("accumulators are not reset", "AdamW", "accumulation", gradients, "cleared")
def _(right):
    return lambda state: right(state)._replace(accumulated=state.accumulated)


# -- modes, packing ---------------------------------------------------------------------------------------------------


@bug("steps are counted in Python", "AdamW", "modes_agree fit", update, "update")
def _(right):
    calls = collections.Counter()

    def counted(plan, state, grads, dynamic, prepared):
        count = tf.constant(calls[plan.name])
        calls[plan.name] += 1
        return right(plan, state, grads, dynamic, prepared._replace(iterations=count))

    return counted


@bug("a variable is made in the first step, which is traced again", "SGD", "modes_agree", Optimizer, "apply")
def _(right):
    def apply(self, grads, trainable_variables=None):
        if not hasattr(self._held, "largest"):
            self._held.largest = tf.Variable(0.0)
        right(self, grads, trainable_variables)

    return apply


@bug("constraints hold in eager steps only", "AdamW", "fit", Optimizer, "_plan")
def _(right):
    def plan(self):
        found = right(self)
        none = [None] * len(found.buckets)
        return found if tf.executing_eagerly() else dataclasses.replace(found, constraints=none)

    return plan


@bug("variables are joined in another order than they are split in", "SGD", "packing", packing.Bucket, "join")
def _(right):
    return lambda self, tensors: right(self, tensors[::-1] if self.form == "flat" else tensors)


@bug("packed by dtype alone, so all get the decay of the first one", "AdamW", "packing", building, "pack")
def _(right):
    def by_dtype(weights, treatments, *, below, **rest):
        known = treatments[:1] * len(treatments) if below else treatments
        return right(weights, known, below=below, **rest)

    return by_dtype


@bug("the results of the fused step are not assigned", "SGD", "fused", run, "_write")
def _(right):
    def write(buckets, *rest, keep=None, **more):
        result = right(buckets, *rest, keep=keep, **more)
        return result if keep is None else [None] * len(buckets)

    return write


def _note_whether_it_is_fused(right):
    def fused(plan, state, grads, fuse, awaited):
        NOTED["fuse"] = fuse
        right(plan, state, grads, fuse, awaited)

    return fused


def _without_mask_if_fused(right):
    return lambda *rest: right(*rest[:-1], None if NOTED["fuse"] else rest[-1])


bug("the fused step takes missing gradients for zeros", "AdamW", "fused", run, "_update", update, "apply_rule")(
    [_note_whether_it_is_fused, _without_mask_if_fused]
)


# -- odd gradients and dtypes -----------------------------------------------------------------------------------------


@bug("missing gradients are zeros", "AdamW", "missing_gradient", update, "apply_rule")
def _(right):
    return lambda plan, bucket, u, slots, p, h, mask: right(plan, bucket, u, slots, p, h, None)


@bug("the momentum of a variable without a gradient fades", "SGD", "missing_gradient", update, "apply_rule")
def _(right):
    def apply_rule(plan, bucket, u, slots, p, h, mask):
        new, _ = right(plan, bucket, u, slots, p, h, mask)
        return new, right(plan, bucket, u, slots, p, h, None)[1]

    return apply_rule


@bug("slots in the dtype of half-precision weights", "AdamW", "dtypes", state, "at_least_float32")
def _(right):
    return keras.backend.standardize_dtype


@bug("the rule's state drifts to float64", "AdamW", "dtypes", AdamRule, "update")
def _(right):
    def update(self, *rest):
        step, new = right(self, *rest)
        return step, {name: ops.cast(slot, "float64") for name, slot in new.items()}

    return update


@bug("steps start at the rounded weights, not at their masters", "AdamW", "master_weights", rounding, "widened")
def _(right):
    def widened(plan, state, b):
        if not plan.keywords.master_weights:
            return right(plan, state, b)
        return ops.cast(state.weights[b], rounding.at_least_float32(state.weights[b].dtype))

    return widened


@bug("the masters are not saved", "SGD", "master_weights", Optimizer, "_entries")
def _(right):
    return lambda self: {name: entry for name, entry in right(self).items() if not name.startswith("master")}


@bug("the blocks of state in 8 bits have the scale of the whole parameter", "AdamW", "slot_dtype", codecs, "_in_blocks")
def _(right):
    def in_blocks(x, count):
        blocks = right(x, count)
        return blocks if x.dtype.name != "float32" else ops.sign(blocks) * ops.max(ops.abs(blocks), initial=0.0)

    return in_blocks


@bug("the correction of bfloat16 is dropped", "AdamW", "slot_dtype", codecs.Corrected, "decode")
def _(right):
    return lambda self, bucket: right(self._replace(lower=ops.zeros_like(self.lower)), bucket)


@bug("a momentum is declared as never negative", "SGD", "signs", sgd, "moment")
def _(right):
    return lambda: right(signed=False)


def with_keywords(plan, **other):
    return dataclasses.replace(plan, keywords=dataclasses.replace(plan.keywords, **other))


@bug("the loss scale is not divided out", "SGD", "loss_scaling", gradients, "join")
def _(right):
    return lambda plan, *rest: right(with_keywords(plan, loss_scale_factor=None), *rest)


@bug("a skipped update is counted", "AdamW", "skip_nonfinite", nonfinite, "unless_nonfinite")
def _(right):
    return lambda state, new, *rest: right(state, new, *rest)._replace(iterations=new.iterations)


@bug("only NaN is looked for, not infinity", "SGD", "skip_nonfinite", ops, "isfinite")
def _(right):
    return lambda x: ops.logical_not(ops.isnan(x))


@bug("non-finite gradients in a row are counted from the start", "SGD", "skip_nonfinite", nonfinite, "unless_nonfinite")
def _(right):
    def unless_nonfinite(*rest):
        result = right(*rest)
        return result._replace(nonfinite=result.nonfinite | {"in_a_row": result.nonfinite["skipped"]})

    return unless_nonfinite


@bug(
    "only one gradient counts for a row that occurs twice in a batch", "SGD", "rows", backend, "dense", backend, "rows"
)
def _(right):
    def without_duplicates(gradient, *rest):
        if backend.is_sparse(gradient):
            later = tf.linalg.band_part(tf.equal(gradient.indices[:, None], gradient.indices[None]), 0, -1)
            last = tf.reduce_sum(tf.cast(later, "int32"), 1) == 1
            values = tf.where(tf.reshape(last, (-1, *[1] * (len(gradient.values.shape) - 1))), gradient.values, 0)
            gradient = tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
        return right(gradient, *rest)

    return without_duplicates


@bug("momentum and decay move the rows that are not in the batch", "AdamW", "rows", gradients, "of_buckets")
def _(right):
    return lambda plan, *rest: right(with_keywords(plan, sparse="dense"), *rest)


# -- groups, learning rate, averages ----------------------------------------------------------------------------------


@bug("the factor of a group does not apply to its decay", "AdamW", "groups", update, "hyper")
def _(right):
    def hyper(plan, prepared, memo, bucket=None, **more):
        h = right(plan, prepared, memo, bucket, **more)
        if bucket is not None and bucket.treatment.lr_scale:
            h.weight_decay = h.weight_decay / bucket.treatment.lr_scale
        return h

    return hyper


@bug("the last matching group applies, not the first", "AdamW", "groups", building, "treatments")
def _(right):
    return lambda places, weights, rules, given, *rest: right(places, weights, rules, (given or [])[::-1], *rest)


@bug("the rule of a group is ignored", "AdamW", "group_rules", building, "treatments")
def _(right):
    def all_alike(*rest):
        found, groups = right(*rest)
        return [how and dataclasses.replace(how, rule=0) for how in found], groups

    return all_alike


def _count_frozen(right):
    def of_buckets(plan, state, grads, *rest, **more):
        trained = {i for bucket in plan.buckets for i in bucket.indices}
        FROZEN[:] = [g for i, g in enumerate(grads) if i not in trained and g is not None]
        return right(plan, state, grads, *rest, **more)

    return of_buckets


FROZEN: list[Any] = []


def _clip_with_frozen(right):
    def change(self, u, p, h):
        h.totals = {"squares": h.totals["squares"] + sum(ops.sum(ops.square(g)) for g in FROZEN)}
        return right(self, u, p, h)

    return change


bug(
    "the gradients of frozen variables count when clipping",
    "AdamW",
    "groups",
    gradients,
    "of_buckets",
    ClipByGlobalNorm,
    "change",
)([_count_frozen, _clip_with_frozen])


@bug("a rate set on top of a schedule is ignored", "AdamW", "learning_rate", update, "prepare")
def _(right):
    def prepare(plan, state, *rest):
        one = ops.ones_like(state.multiplier)
        return right(plan, state if plan.schedule is None else state._replace(multiplier=one), *rest)

    return prepare


@bug("a schedule is read one update too late", "SGD", "learning_rate", Hyper, "exact")
def _(right):
    def exact(self, value):
        early = copy.copy(self)
        early._iterations = ops.maximum(self._iterations - 1, 0)
        return right(early, value)

    return exact


@bug("momentum and 1 - momentum of the average are swapped", "AdamW", "average", update, "update")
def _(right):
    return lambda plan, *rest: right(with_keywords(plan, ema_momentum=1 - plan.keywords.ema_momentum), *rest)


@bug("the average starts at zero", "SGD", "average", update, "update")
def _(right):
    def from_zero(plan, state, *rest):
        new, share = right(plan, state, *rest), 1 - plan.keywords.ema_momentum
        first = ops.equal(state.iterations, 0)
        return new._replace(average=[ops.where(first, share * a, a) for a in new.average] or ())

    return from_zero


@bug(
    "the average is kept in float32 while the model holds it", "AdamW", "evaluation_weights", Optimizer, "swap_weights"
)
def _(right):
    def swap_weights(self, evaluating):
        right(self, evaluating)
        for average in self._held.state.average:
            average.assign(ops.cast(ops.cast(average, "float32"), average.dtype))

    return swap_weights


@bug(
    "`fit` continues from the average that the last `fit` ended with",
    "AdamW",
    "evaluation_weights",
    keras.Model,
    "fit",
)
def _(right):
    return inspect.unwrap(right)


@bug(
    "going to the slow weights and back loses the fast ones",
    "Lookahead",
    "evaluation_weights",
    lookahead.LookaheadRule,
    "eval_value",
)
def _(right):
    return lambda self, p, slots, h: (slots["slow"], slots)


@bug(
    "evaluated at z, the last iterate",
    "ScheduleFreeSGD",
    "evaluation_weights",
    schedule_free.ScheduleFreeBaseRule,
    "eval_value",
)
def _(right):
    return lambda self, p, slots, h: (slots["anchor"], slots)


@bug("synchronised after the first step of each period", "Lookahead", "twin", lookahead.LookaheadRule, "update")
def _(right):
    def update(self, u, slots, p, h):
        early = copy.copy(h)
        early.step = h.step - 1
        return right(self, u, slots, p, early)

    return update


@bug(
    "iterates are averaged with equal weights during warm-up",
    "ScheduleFreeSGD",
    "twin",
    schedule_free.ScheduleFreeBaseRule,
    "measure",
)
def _(right):
    return lambda self, h, sums: right(self, h, sums) | {"share": 1 / h.step}


@bug("the learning rate does not warm up", "ScheduleFreeAdamW", "twin", schedule_free._LinearWarmup, "warmed_up")
def _(right):
    return lambda self, h: h


# -- configuration and state ------------------------------------------------------------------------------------------


@bug("the config loses an argument that the class passes on", "AdamW", "config_round_trip", FromSignature, "get_config")
def _(right):
    return lambda self: {name: value for name, value in right(self).items() if name != "clipnorm"}


@bug("numbers are not checked against their range", "AdamW", "bad_arguments", arguments, "real")
def _(right):
    return lambda name, value, *_, **__: value


@bug("unknown keywords are left to Python", "SGD", "bad_arguments", Optimizer, "__new__")
def _(right):
    return staticmethod(lambda cls, *_, **__: object.__new__(cls))


@bug("a slot is not saved", "AdamW", "save_load_continue", Optimizer, "_entries")
def _(right):
    return lambda self: {name: entry for name, entry in right(self).items() if not name.startswith("slot.v.")}


@bug("a learning rate that was set is not restored", "SGD", "save_load_continue", Optimizer, "load_own_variables")
def _(right):
    def load_own_variables(self, store):
        rate = ops.copy(self._multiplier)
        right(self, store)
        self._multiplier.assign(rate)

    return load_own_variables


@bug("accumulated gradients are not saved", "SGD", "save_load_continue", Optimizer, "_entries")
def _(right):
    return lambda self: {name: entry for name, entry in right(self).items() if not name.startswith("accumulated")}


@bug("variables of several buckets share their names", "AdamW", "paths", Optimizer, "add_variable")
def _(right):
    def add_variable(self, *args, **kwargs):
        self._held.names.clear()
        return right(self, *args, **kwargs)

    return add_variable


def _save_packed(right):
    def save_own_variables(self, store):
        store["schema"] = np.frombuffer(json.dumps(self._schema()).encode(), np.uint8)
        for name, (variable, _) in self._entries().items():
            store[name] = ops.convert_to_numpy(variable)

    return save_own_variables


def _restore_packed(right):
    def restore(self, saved, **_):
        for name, (variable, _) in self._entries().items():
            variable.assign(saved[name])

    return restore


bug(
    "state is saved as it is packed",
    "AdamW",
    "save_load_continue",
    Optimizer,
    "save_own_variables",
    Optimizer,
    "_restore",
)([_save_packed, _restore_packed])


@bug(
    "state of another optimizer is accepted if the arrays fit",
    "AdamW",
    "foreign_state",
    Optimizer,
    "_refuse_unless_same",
)
def _(right):
    return lambda self, saved, keys: right(self, saved, [key for key in keys if key != "optimizer"])


@bug("state of another model is accepted", "AdamW", "foreign_state", Optimizer, "_refuse_unless_same")
def _(right):
    return lambda self, saved, keys: right(self, saved, [key for key in keys if key not in ("variables", "in_model")])


@bug("state is filed in the order in which variables arrived", "AdamW", "more_variables", Optimizer, "_add")
def _(right):
    def add(self, new, variables):
        right(self, new, variables)
        self._held.places = list(range(len(self._held.variables)))

    return add


@bug("a variable that joins late has the update count of the others", "AdamW", "more_variables", Optimizer, "_pack")
def _(right):
    return lambda self, new, variables, since: right(self, new, variables, [0] * len(since))


@bug("a variable that joins resets the state of the others", "AdamW", "more_variables", Optimizer, "_extend")
def _(right):
    def extend(self, variables):
        right(self, variables)
        for slots in self._held.state.slots if len(variables) == 7 else []:
            for variable in slots.values():
                variable.assign(ops.zeros_like(variable))

    return extend


# -- transforms -------------------------------------------------------------------------------------------------------

in_transforms = functools.partial(bug, kind="transform")


@in_transforms("the units of a kernel are its inputs", "Centralize", "twin", centralize, "unit_axes")
def _(right):
    return lambda h, rank: tuple(axis + 1 for axis in h.kernel.outputs)


@in_transforms("elements that ascend are kept", "CautiousUpdate", "twin", CautiousUpdate, "change")
def _(right):
    return lambda self, u, p, h: u - right(self, u, p, h)


@in_transforms("a limit is not in the config", "ClipByNorm", "config_round_trip", FromSignature, "get_config")
def _(right):
    return lambda self: {name: value for name, value in right(self).items() if name != "limit"}


@in_transforms("a schedule keeps its first value", "ClipByValue", "hyperparameters", Hyper, "exact")
def _(right):
    def exact(self, value):
        early = copy.copy(self)
        early._memo, early._iterations = {}, ops.zeros_like(self._iterations)
        return right(early, value)

    return exact


@in_transforms("gradients drift to float64", "ClipByValue", "dtypes", ClipByValue, "change")
def _(right):
    return lambda self, u, p, h: ops.cast(right(self, u, p, h), "float64")


@in_transforms("parameters without a gradient keep moving", "ClipByNorm", "missing_gradient", update, "apply_rule")
def _(right):
    return lambda plan, bucket, u, slots, p, h, mask: right(plan, bucket, u, slots, p, h, None)


@in_transforms("a unit without a gradient is divided by its norm", "AdaptiveClip", "zero", AdaptiveClip, "change")
def _(right):
    return lambda self, u, p, h: u / ops.sqrt(ops.sum(ops.square(u), axis=unit_axes(h, len(u.shape)), keepdims=True))


@in_transforms("the limit differs in graphs", "ClipByValue", "modes_agree", ClipByValue, "change")
def _(right):
    return lambda self, u, p, h: right(self, u, p, h) * (1.0 if tf.executing_eagerly() else 0.5)


@in_transforms("small parameters share one norm", "ClipByNorm", "packing", packing.Bucket, "over_parameters")
def _(right):
    return lambda self, x, mean=False: ops.sum(x, keepdims=True) if self.form == "flat" else right(self, x, mean=mean)


@in_transforms(
    "the sum of the micro-batches is clipped, not the mean", "ClipByValue", "accumulation", gradients, "means"
)
def _(right):
    def means(plan, state, grads):
        return [g._replace(value=3 * g.value) for g in right(plan, state, grads)]

    return means


@in_transforms("rows without a gradient count", "ClipByNorm", "rows", gradients, "sum_of_rows")
def _(right):
    return lambda rows, x, mean: right(rows, x, mean=mean) + 1.0


@in_transforms("the correction is that of the square", "CorrectedDecay", "twin", CorrectedDecay, "change")
def _(right):
    return lambda self, u, p, h: u + h.learning_rate * (h.base_rate / self.peak) ** 2 * h.weight_decay * p


@in_transforms("all parameters have the same noise", "GradientNoise", "twin", noise, "normal")
def _(right):
    return lambda shape, dtype, seed, place, update: right(shape, dtype, seed, 0, update)


# -- schedules --------------------------------------------------------------------------------------------------------


LINEAR = next(card for card in ok.cards("schedule") if card.name == "Linear")


@bug("a function instead of a Keras schedule", "Linear", "is_keras_schedule", LINEAR, "make", kind="schedule")
def _(right):
    return lambda **_: lambda step: 0.1


@bug("1 / step, and steps are counted from 0", "Linear", "finite", schedules.Linear, "value", kind="schedule")
def _(right):
    return lambda self, step: self.initial / self.real(step)


@bug(
    "Python's integers are divided as integers",
    "Linear",
    "tensor_step_is_int_step",
    curves,
    "share",
    kind="schedule",
)
def _(right):
    return lambda step, steps: right(step // steps * steps if isinstance(step, int) else step, steps)


@bug(
    "the step is a Python number when it is traced",
    "Cosine",
    "compiled_is_eager",
    schedules.Cosine,
    "value",
    kind="schedule",
)
def _(right):
    return lambda self, step: right(self, step if tf.executing_eagerly() else 0)


@bug("the config loses an argument", "Cosine", "config_round_trip", FromSignature, "get_config", kind="schedule")
def _(right):
    return lambda self: {name: value for name, value in right(self).items() if name != "final"}


@bug("calls are counted, not steps", "Cosine", "drives_stock_sgd", schedules.Cosine, "value", kind="schedule")
def _(right):
    def value(self, step):
        self.calls = getattr(self, "calls", -1) + 1
        return right(self, self.calls)

    return value


@bug("the curve continues after its end", "Cosine", "settles twin", curves, "share", kind="schedule")
def _(right):
    return lambda step, steps: curves.real(step) / steps


@bug(
    "a whole period of the cosine instead of half of one",
    "Cosine",
    "twin ends monotone",
    curves,
    "half_cosine",
    kind="schedule",
)
def _(right):
    return lambda share, first, last: right(2 * share, first, last)


@bug("the end is one update late", "Linear", "ends twin", curves, "share", kind="schedule")
def _(right):
    return lambda step, steps: right(step, steps + 1)


@bug(
    "after a warm-up the schedule has counted one update too many",
    "Warmup",
    "twin composes",
    curves,
    "since",
    kind="schedule",
)
def _(right):
    return lambda step, begin: right(step, begin - 1 if begin else 0)


@bug("the part at a boundary is the one before it", "Sequence", "twin", curves, "since", kind="schedule")
def _(right):
    return lambda step, begin: right(step, begin + 1 if begin else 0)


@bug("epochs are taken for updates", "Cosine", "epochs", schedules.Schedule, "_updates", kind="schedule")
def _(right):
    return lambda self, length: length


@bug("a negative step is not the first", "Exponential", "before_the_first_step", curves, "since", kind="schedule")
def _(right):
    return lambda step, begin: right(step, begin) if begin else step


# -- initializers -----------------------------------------------------------------------------------------------------


@bug("float32 for every dtype", "HeNormal", "dtype", base.Shaped, "__call__", kind="initializer")
def _(right):
    return lambda self, shape, dtype=None: right(self, shape, "float32")


@bug("the seed is ignored", "XavierNormal", "seed", variance._Normal, "_draw", kind="initializer")
def _(right):
    return lambda self, shape, dtype, seed: right(self, shape, dtype, random.randint(1, 10**9))


@bug(
    "without a seed, one is drawn once and kept",
    "HeUniform",
    "fresh_without_seed",
    base.Seeded,
    "_values",
    kind="initializer",
)
def _(right):
    def call(self, shape, dtype):
        self.seed = random.randint(1, 10**9) if self.seed is None else self.seed
        return right(self, shape, dtype)

    return call


@bug(
    "a config is not read",
    "RandomNormal",
    "config_round_trip saving",
    initializers.RandomNormal,
    "from_config",
    kind="initializer",
)
def _(right):
    return classmethod(lambda cls, config: cls())


@bug(
    "a scalar is accepted",
    "RandomUniform",
    "scalar_is_refused",
    base.Shaped,
    "__call__",
    kind="initializer",
)
def _(right):
    return lambda self, shape, dtype=None: right(self, shape, dtype) if len(shape) else ops.zeros((), dtype)


@bug("fan-out instead of fan-in", "HeNormal", "variance", base.KernelAxes, "fans", kind="initializer")
def _(right):
    return lambda self, shape: right(self, shape)[::-1]


@bug(
    "kernels of depthwise and transposed convolutions are treated like others",
    "XavierUniform",
    "variance",
    base,
    "in_layer",
    kind="initializer",
)
def _(right):
    return lambda layer, shape: None


@bug("truncation reduces the variance", "XavierNormal", "variance", variance, "TRUNCATED_STD", kind="initializer")
def _(right):
    return 1.0


@bug(
    "the depthwise kernels of a layer are one matrix",
    "Orthogonal",
    "orthogonal",
    base,
    "in_layer",
    kind="initializer",
)
def _(right):
    return lambda layer, shape: None


@bug("a number is drawn for it", "BiasPrior", "deterministic", base.Shaped, "__call__", kind="initializer")
def _(right):
    return lambda self, shape, dtype=None: right(self, shape, dtype) + random.random()


@bug(
    "values outside of the middle of a window",
    "DeltaOrthogonal",
    "centered",
    orthogonal,
    "centered",
    kind="initializer",
)
def _(right):
    return lambda matrices, shape, axes: ops.ones(shape) + right(matrices, shape, axes)


@bug("an identity where a layer widens", "ZerO", "exact", exact.ZerO, "_matrix", kind="initializer")
def _(right):
    return lambda self, inputs, outputs: np.eye(inputs, outputs)


@bug("groups are one map", "Dirac", "centered exact", base, "in_layer", kind="initializer")
def _(right):
    return lambda layer, shape: None


@bug("the share of zeros is rounded down", "Sparse", "sparse", sparse.Sparse, "_connected", kind="initializer")
def _(right):
    return lambda self, inputs: right(self, inputs) + (self.sparsity is not None)


@bug("the first inputs are connected to all units", "Sparse", "sparse", sparse.ops, "argsort", kind="initializer")
def _(right):
    return lambda x, axis: ops.broadcast_to(ops.arange(x.shape[1])[None, :, None], x.shape)


@bug("the depth does not matter", "DepthScaled", "variance", depth.DepthScaled, "_values", kind="initializer")
def _(right):
    return lambda self, shape, dtype: right(self, shape, dtype) * self.depth**0.5


# -- regularizers -----------------------------------------------------------------------------------------------------


@bug("not summed", "L2", "scalar", regularizers.L2, "__call__", kind="regularizer")
def _(right):
    return lambda self, x: self.l2 * ops.square(x)


@bug("summed in half precision", "L2", "half_precision", regularizers, "at_least_float32", kind="regularizer")
def _(right):
    return keras.backend.standardize_dtype


@bug("no gradient comes through", "L1", "gradient", regularizers.L1, "__call__", kind="regularizer")
def _(right):
    return lambda self, x: ops.stop_gradient(right(self, x))


@bug("signs are kept", "L1", "nonnegative", regularizers.L1, "__call__", kind="regularizer")
def _(right):
    return lambda self, x: self.l1 * ops.sum(x)


@bug("an epsilon under the root remains at zero", "L2", "zero_at_zero", regularizers.L2, "__call__", kind="regularizer")
def _(right):
    return lambda self, x: self.l2 * ops.sqrt(ops.sum(ops.square(x)) + 1e-7)


@bug("a config is not read", "L2", "config_round_trip saving", regularizers.L2, "from_config", kind="regularizer")
def _(right):
    return classmethod(lambda cls, config: cls())


# -- layers -----------------------------------------------------------------------------------------------------------

Ghost, Dropout = layers.GhostBatchNormalization, layers.ScheduledDropout


@bug(
    "the config loses an argument",
    "GhostBatchNormalization",
    "config_round_trip",
    FromSignature,
    "get_config",
    kind="layer",
)
def _(right):
    return lambda self: {name: value for name, value in right(self).items() if name != "ghost_batch_size"}


@bug(
    "the state of the random generator is not saved",
    "ScheduledDropout",
    "saving",
    Dropout,
    "save_own_variables",
    kind="layer",
)
def _(right):
    return keras.layers.Dropout.save_own_variables


@bug("training mode at inference", "ScheduledDropout", "inference", Dropout, "call", kind="layer")
def _(right):
    return lambda self, inputs, training=False: right(self, inputs, training=True)


@bug("no gradient comes through", "GhostBatchNormalization", "trains", Ghost, "call", kind="layer")
def _(right):
    return lambda self, inputs, training=None, mask=None: ops.stop_gradient(right(self, inputs, training, mask))


@bug("half precision comes out as float32", "GhostBatchNormalization", "precision", Ghost, "call", kind="layer")
def _(right):
    return lambda self, inputs, training=None, mask=None: ops.cast(right(self, inputs, training, mask), "float32")


@bug("masked positions enter the statistics", "GhostBatchNormalization", "mask", Ghost, "call", kind="layer")
def _(right):
    return lambda self, inputs, training=None, mask=None: right(self, inputs, training)


@bug(
    "the batch size at build time is used for every batch",
    "GhostBatchNormalization",
    "symbolic_shape",
    Ghost,
    "compute_output_shape",
    kind="layer",
)
def _(right):
    return lambda self, shape: (8, *shape[1:])


@bug(
    "moving statistics do not move in graphs",
    "GhostBatchNormalization",
    "compiled_is_eager",
    Ghost,
    "call",
    kind="layer",
)
def _(right):
    def call(self, inputs, training=None, mask=None):
        before = [ops.copy(v) for v in self.non_trainable_variables]
        outputs = right(self, inputs, training, mask)
        for variable, value in zip(self.non_trainable_variables, before, strict=True):
            if not tf.executing_eagerly():
                variable.assign(value)
        return outputs

    return call


# -- callbacks --------------------------------------------------------------------------------------------------------

Monitor, Drive = callbacks.TrainingMonitor, callbacks.ScheduleHyperparameters


@bug(
    "set up once, taken down after every `fit`",
    "TrainingMonitor",
    "fits_twice",
    Monitor,
    "on_train_begin",
    kind="callback",
)
def _(right):
    return lambda self, logs=None: right(self, logs) if self._step < 0 else None


@bug(
    "the config loses an argument", "TrainingMonitor", "config_round_trip", FromSignature, "get_config", kind="callback"
)
def _(right):
    return lambda self: {name: value for name, value in right(self).items() if name != "every"}


@bug(
    "the schedules stay in the optimizer", "ScheduleHyperparameters", "leaves_no_trace", Drive, "_end", kind="callback"
)
def _(right):
    return lambda self: None


@bug("an exception in `fit` is swallowed", "EarlyStopping", "survives_failure", keras.Model, "fit", kind="callback")
def _(right):
    def fit(self, *args, **kwargs):
        with contextlib.suppress(RuntimeError):
            return right(self, *args, **kwargs)

    return fit


@bug(
    "after a validation the average stays in the model",
    "AveragedWeights",
    "is_passive",
    callbacks.AveragedWeights,
    "_leave",
    kind="callback",
)
def _(right):
    return lambda self: setattr(self, "_exchange", None)


@bug(
    "the learning rate is written back as it was read",
    "TrainingMonitor",
    "is_passive",
    Monitor,
    "_write_if_due",
    kind="callback",
)
def _(right):
    def write_if_due(self):
        right(self)
        rate = self.model.optimizer.learning_rate
        rate.assign(ops.cast(ops.cast(rate, "float16"), "float32"))

    return write_if_due


@bug(
    "the best weights are not part of the state",
    "EarlyStopping",
    "goes_on",
    callbacks.EarlyStopping,
    "state_dict",
    kind="callback",
)
def _(right):
    return lambda self: right(self) | {"best_weights": None}


@bug(
    "a validation resets the metrics of the epoch",
    "ValidateEvery",
    "is_passive",
    callbacks.ValidateEvery,
    "_metrics_kept",
    kind="callback",
)
def _(right):
    return lambda self, *args, **kwargs: contextlib.nullcontext()


@bug(
    "when the next validation is due is not part of the state",
    "ValidateEvery",
    "goes_on",
    callbacks.ValidateEvery,
    "load_state_dict",
    kind="callback",
)
def _(right):
    def load(self, state):
        due = self._due.state_dict()
        right(self, state)
        self._due.load_state_dict(due)

    return load


@bug("the generators of dropout restart", "Resume", "goes_on", TrainingState, "into", kind="callback")
def _(right):
    def into(self, model, *, metrics=True):
        right(self, model, metrics=metrics)
        for variable in model.variables:
            if "seed" in variable.path:
                variable.assign([1, 0])

    return into


@bug("a batch is trained on twice", "Resume", "goes_on", EpochDataset, "begin_epoch_at", kind="callback")
def _(right):
    return lambda self, batch: right(self, batch - 1)


@bug("metrics restart inside the epoch", "Resume", "goes_on", TrainingState, "into", kind="callback")
def _(right):
    return lambda self, model, *, metrics=True: right(self, model, metrics=False)


@bug("the history is forgotten", "Resume", "goes_on", session, "set_state_of", kind="callback")
def _(right):
    return lambda callback, state: None if isinstance(callback, keras.callbacks.History) else right(callback, state)


# -- the command ------------------------------------------------------------------------------------------------------


def failure(card: ok.Card, check: Check) -> str | None:
    """What a check fails with, in one line, or None if it passes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a bug warns of is not what is looked for
            check(card)
    except Exception as error:  # a check may fail in any way
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = [line for line in lines if not line.startswith(("Not equal to tolerance", "Arrays are not equal"))]
        name = "" if told and isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return name + "".join(told[:1])
    return None


def uncovered(kind: str) -> set[str]:
    """The checks of a kind that no bug is planted for."""
    names = {check.name for card in ok.cards(kind) for check in checks_for(card)}
    return names - {name for each in BUGS if each.kind == kind for name in each.checks}


def row(each: Bug, messages: list[str]) -> str:
    """The bug's line in the table, cut off at 120 characters."""
    caught = ", ".join(f"`{name}`" for name in each.checks)
    start = f"| {each.what} | {each.card} | {caught} | "
    return start + " ".join(messages[0].replace("|", "\\|")[: 118 - len(start)].split()) + " |"


def main(word: str = "") -> int:
    """Prints a table of the bugs and what caught them; 1 if one was not caught, or a check has none."""
    ok.testing.prepare()
    sound: dict[tuple[str, str, str], str | None] = {}
    wrong = []
    for kind in KINDS:
        chosen = [each for each in BUGS if each.kind == kind and (word in each.what or word in (kind, *each.checks))]
        if chosen:
            print(f"\n| planted in {kind}s | seen with | caught by | which says |\n|---|---|---|---|")
        for each in chosen:
            messages = []
            for card, check in each.found():
                key = (kind, card.name, check.name)
                if key not in sound:
                    sound[key] = failure(card, check)
                    if sound[key] is not None:
                        wrong.append(f"{check.name} of {card.name} fails without a bug: {sound[key]}")
                with each.planted():
                    message = failure(card, check)
                if message is None:
                    wrong.append(f"{each.what}: {check.name} of {card.name} passes")
                elif message.startswith("TypeError"):  # what the bug is planted into has changed
                    wrong.append(f"{each.what}: is no longer planted well, {message}")
                messages.append(message or "NOT CAUGHT")
            print(row(each, messages), flush=True)
        if not word:
            wrong += [f"no bug is planted for {name}, a check of {kind}s" for name in sorted(uncovered(kind))]
    print("\n".join(["", *(f"! {line}" for line in wrong)]))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

"""Drawn settings: optimizer, keywords, variables and gradients; all ways to run them agree with each other and NumPy.

CI runs a share that is the same every time. All of it, with new draws:

    python -m pytest tests/test_properties.py --hypothesis-profile=thorough
"""

import itertools
import warnings
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_optkit as ok
from keras_optkit.optimizers.engine.packing import PACK_BELOW
from keras_optkit.optimizers.provided import fixed_gradients
from keras_optkit.optimizers.rule import contributes, layout_of
from keras_optkit.testing import problems
from keras_optkit.testing.twins.optimizers import TWINS


def each_element_alone(card):
    """Whether the twin may be run on any part of a parameter; other rules are left to the conformance suite."""
    rule = card.make(**card.cases[0]).rule
    return layout_of(rule) == "elementwise" and not contributes(rule)


CARDS = {card.name: card for card in ok.cards("optimizer") if each_element_alone(card)}
HALF = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
#: Their twins have no step count of their own, so what a row or a parameter misses does not shift anything.
TIMELESS = ("SGD", "Adagrad", "RMSprop")
RATES = [0.1, 0.05, 0.02]
SCHEDULE = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], RATES)


@dataclass(frozen=True)
class Run:
    """A way to run an optimizer; the defaults are what the others are compared with."""

    mode: str = "eager"
    fuse: Any = "auto"
    below: int = PACK_BELOW
    reload: bool = False


@dataclass(frozen=True)
class Setting:
    """What to optimize, and with what. A gradient is "dense", None or, if it is sparse, a tuple of rows."""

    optimizer: str
    arguments: dict
    shapes: tuple
    dtypes: tuple
    calls: tuple
    common: dict = field(default_factory=dict)
    groups: tuple = ()
    constrained: tuple = ()
    bad: tuple | None = None
    scheduled: str | None = None
    evaluate_after: int | None = None
    scale: float = 1.0
    seed: int = 0
    runs: tuple = ()

    @property
    def names(self):
        return [f"layer_{i // 2}/weight_{i}" for i in range(len(self.shapes))]

    @property
    def k(self):
        return self.common.get("gradient_accumulation_steps", 1)


def rounded(value, dtype):
    return np.asarray(ops.convert_to_numpy(ops.cast(ops.cast(value, dtype), "float64")))


# -- what to draw -----------------------------------------------------------------------------------------------------


def once_in(n):
    return st.sampled_from([False] * (n - 1) + [True])  # integers would prefer the ends


def now_and_then(strategy, otherwise, n=4):
    return once_in(n).flatmap(lambda yes: strategy if yes else st.just(otherwise))


SHAPES = st.one_of(
    st.lists(st.integers(1, 3), max_size=5).map(tuple),
    st.sampled_from([(), (4,), (3, 2), (8, 3), (2, 2, 3), (3, 1, 2, 2), (1, 2, 1, 2, 2)]),
    st.sampled_from([(), (4,), (3, 2), (0,), (0, 3), (2, 0), (2, 1, 0, 3)]),
)

#: What is wrong in float64 can be seen best.
DTYPES = st.sampled_from(["float64", "float64", "float64", "float32", "float32", "bfloat16", "float16"])

RUNS = [
    Run(below=0),
    Run(below=5),
    Run(reload=True),
    Run(below=0, reload=True),
    *(Run("graph", fuse, below) for fuse, below in itertools.product((True, False, "auto"), (PACK_BELOW, 5, 0))),
    *(Run("xla", below=below) for below in (PACK_BELOW, 5, 0)),
]


@st.composite
def settings_to_try(draw):
    name = draw(st.sampled_from(sorted(CARDS)))
    card = CARDS[name]
    arguments = dict(draw(st.sampled_from(card.cases)))
    many = draw(once_in(60))
    count = 1000 if many else draw(st.integers(1, 5))
    shapes = tuple((i % 3,) if i % 2 else () for i in range(count)) if many else draw_each(draw, SHAPES, count)
    mixed = not many and draw(once_in(5))
    dtypes = draw_each(draw, DTYPES, count) if mixed else (draw(DTYPES),) * count
    common = draw_common(draw, card, dtypes)
    k = common.get("gradient_accumulation_steps", 1)
    calls = draw_calls(draw, shapes, draw(st.sampled_from([1, 2, 2, 3, 3, 4])) * k, k, many)
    bad = None
    if common.get("skip_nonfinite"):
        whole = [
            (t, i) for t, call in enumerate(calls) for i, g in enumerate(call) if g == "dense" and np.prod(shapes[i])
        ]
        bad = draw(st.sampled_from(whole)) if whole and draw(once_in(2)) else None
    averages = common.get("use_ema") or "averages" in ok.testing.traits(card)
    runs = draw(st.lists(st.sampled_from(RUNS[4:6] if many else RUNS), min_size=1, max_size=2, unique=True))
    return Setting(
        name,
        arguments,
        shapes,
        dtypes,
        calls,
        common,
        () if many else draw_groups(draw, count),
        draw(now_and_then(st.integers(0, count - 1).map(lambda i: (i,)), ())),
        bad,
        draw(now_and_then(st.sampled_from(["learning_rate", "weight_decay"]), None, 8)),
        draw(now_and_then(st.integers(0, len(calls) - 1), -1)) if averages else None,
        draw(st.sampled_from([0.01, 0.1, 1.0])),
        draw(st.integers(0, 2**16)),
        tuple(runs),
    )


def draw_each(draw, strategy, count):
    return tuple(draw(strategy) for _ in range(count))


def draw_common(draw, card, dtypes):
    common = {}
    if draw(once_in(2)):
        common["weight_decay"] = draw(st.sampled_from([2.0, 2.0, 2.0, 0.1, 0.0, None]))
        common["decay_mask"] = draw(st.sampled_from(["all", "auto", "auto"]))
    possible = {
        "gradient_accumulation_steps": st.sampled_from([2, 3]),
        "use_ema": st.just(True),
        "skip_nonfinite": st.sampled_from([2, 3]),
        "sparse": st.just("dense"),
        "layer_decay": st.sampled_from([0.5, 1.0]),
    }
    if "averages" in ok.testing.traits(card):
        del possible["use_ema"]
    for name in draw(st.lists(st.sampled_from(sorted(possible)), max_size=3, unique=True)):
        common[name] = draw(possible[name])
    if common.get("use_ema"):
        common["ema_momentum"] = draw(st.sampled_from([0.0, 0.9]))
    clip = draw(now_and_then(st.sampled_from(["clipnorm", "clipvalue", "global_clipnorm"]), "", 2))
    if clip:
        common[clip] = draw(st.sampled_from([0.01, 0.05, 0.5, 100.0]))
    ways = ["master_weights"] + ["stochastic_rounding"] * ("float16" not in dtypes)
    way = draw(now_and_then(st.sampled_from(ways), ""))
    return common | ({way: True} if way else {})


def draw_calls(draw, shapes, steps, k, many):
    """The kinds of gradients; not all None, and the same for all micro-batches of an update."""
    if many:
        return (tuple(None if i == 7 else "dense" for i in range(len(shapes))),) * steps
    sparse = draw(once_in(3))
    whole = st.sampled_from(["dense"] * 5 + [None])
    kinds = [
        now_and_then(st.lists(st.integers(0, shape[0] - 1), max_size=4).map(tuple), "dense", 2)
        if sparse and shape and shape[0]
        else whole
        for shape in shapes
    ]
    patterns = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=2))
    patterns = [p if any(g is not None for g in p) else ("dense",) * len(shapes) for p in patterns]
    return tuple(itertools.chain(*([draw(st.sampled_from(patterns))] * k for _ in range(steps // k))))


def draw_groups(draw, count):
    """(variables, lr_scale, weight_decay, trainable), disjoint, and not all of them frozen."""
    if count < 2 or not draw(once_in(3)):
        return ()
    order = draw(st.permutations(range(count)))
    ends = sorted(draw(st.lists(st.integers(1, count - 1), min_size=1, max_size=2, unique=True)))
    return tuple(
        (
            tuple(order[a:b]),
            draw(st.sampled_from([0.0, 0.1, 2.0])),
            draw(st.sampled_from([None, 0.0, 0.2])),
            draw(st.booleans()),
        )
        for a, b in itertools.pairwise([0, *ends])
    )


# -- running it -------------------------------------------------------------------------------------------------------


def data(setting):
    """Start values and the gradients of every call, dense, as their dtypes hold them."""
    rng = np.random.default_rng(setting.seed)
    values = [rounded(rng.normal(size=s), d) for s, d in zip(setting.shapes, setting.dtypes, strict=True)]
    grads: list = []
    for t, call in enumerate(setting.calls):
        grads.append([])
        for i, (kind, shape) in enumerate(zip(call, setting.shapes, strict=True)):
            size = (len(kind), *shape[1:]) if isinstance(kind, tuple) else shape
            g = None if kind is None else np.asarray(setting.scale * rng.normal(size=size))
            if setting.bad == (t, i):
                g[tuple(n // 2 for n in shape)] = rng.choice([np.nan, np.inf])
            grads[t].append(None if g is None else rounded(g, setting.dtypes[i]))
    return values, grads


def made(setting):
    more: dict = {setting.scheduled: SCHEDULE} if setting.scheduled else {}
    if setting.groups:
        more["groups"] = [
            ok.Group(rf"weight_({'|'.join(map(str, members))})$", *how) for members, *how in setting.groups
        ]
    return CARDS[setting.optimizer].make(**{**setting.arguments, **setting.common, **more})


def weights_of(setting, values):
    weights = []
    for i, (value, dtype, name) in enumerate(zip(values, setting.dtypes, setting.names, strict=True)):
        layer, own = name.split("/")
        with keras.name_scope(layer):
            weights.append(keras.Variable(value, dtype=dtype, name=own))
        if i in setting.constrained:
            weights[-1].constraint = keras.constraints.NonNeg()
    return weights


def as_gradients(setting, call, arrays):
    """What a call is given, and what decides whether a graph has to be traced for it."""
    grads, signature = [], []
    for kind, array, shape, dtype in zip(call, arrays, setting.shapes, setting.dtypes, strict=True):
        tensor = None if kind is None else tf.cast(tf.constant(array), dtype)
        if isinstance(kind, tuple):
            tensor = tf.IndexedSlices(tensor, tf.constant(kind, "int32"), tf.constant(shape, "int32"))
        grads.append(tensor)
        signature.append(len(kind) if isinstance(kind, tuple) else kind)
    return grads, tuple(signature)


def outcome(setting, run, values, grads):
    """The weights after every call, and the state at the end."""
    optimizer, weights = made(setting), weights_of(setting, values)
    optimizer.fuse, optimizer.pack_below = run.fuse, run.below
    optimizer.build(weights)
    traces, signatures, trajectory = [], set(), []

    def apply(grads):
        traces.append(1)
        optimizer.apply(grads, weights)

    def in_mode():
        return apply if run.mode == "eager" else tf.function(apply, jit_compile=run.mode == "xla", autograph=False)

    step = in_mode()
    for t, (call, arrays) in enumerate(zip(setting.calls, grads, strict=True)):
        given, signature = as_gradients(setting, call, arrays)
        signatures.add(signature)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Gradients do not exist")
            step(given)
        trajectory.append(numbers(weights))
        if t == setting.evaluate_after:
            optimizer.swap_weights(evaluating=True)
        if run.reload and t == len(setting.calls) // 2:
            state, weights = problems.state_of(optimizer), weights_of(setting, numbers(weights))
            optimizer = made(setting)
            optimizer.pack_below = 3
            optimizer.build(weights)
            optimizer.load_own_variables(state)
            step = in_mode()
    if run.mode != "eager":
        assert len(traces) == len(signatures), f"{len(traces)} traces for {len(signatures)} kinds of gradients"
    optimizer.swap_weights(evaluating=False)
    state = {name: np.asarray(v) for name, v in problems.state_of(optimizer).items() if name != "schema"}
    return trajectory, numbers(weights), state


def numbers(weights):
    return [ops.convert_to_numpy(ops.cast(w, "float64")).copy() for w in weights]


# -- the same in NumPy ------------------------------------------------------------------------------------------------


def treated(setting):
    """For each variable its factor on the rate and its decay; None for one that is frozen."""
    optimizer = made(setting)
    factor = setting.common.get("layer_decay", 1.0)
    result: list = []
    for i, shape in enumerate(setting.shapes):
        scale, decay = factor ** ((len(setting.shapes) - 1) // 2 - i // 2), optimizer.weight_decay or 0.0
        mine = [group[1:] for group in setting.groups if i in group[0]]
        if mine:
            ((own_scale, own_decay, trainable),) = mine
            scale, decay = scale * own_scale, decay if own_decay is None else own_decay
            if not trainable:
                result.append(None)
                continue
        result.append((scale, decay if optimizer.decay_mask == "all" or len(shape) > 1 else 0.0))
    return result


def updates(setting, grads, treatments):
    """The gradients of each update, accumulated and clipped: (gradient, which numbers have one) or None.

    None instead of all of them stands for an update that is left out.
    """
    lazy, result = setting.common.get("sparse") != "dense", []
    for first in range(0, len(grads) - setting.k + 1, setting.k):
        update: list = []
        for i, (shape, dtype) in enumerate(zip(setting.shapes, setting.dtypes, strict=True)):
            kind = setting.calls[first + setting.k - 1][i]
            if kind is None or treatments[i] is None:
                update.append(None)
                continue
            # summed in the dtype that it is summed in, since a step of Adagrad may depend on what cancels
            total, hits = np.zeros(shape, "float64" if dtype == "float64" else "float32"), np.ones(shape, "bool")
            for call, arrays in zip(setting.calls[first:][: setting.k], grads[first:], strict=False):
                part = np.zeros_like(total)
                if isinstance(call[i], tuple):
                    np.add.at(part, list(call[i]), arrays[i].astype(total.dtype))
                else:
                    part += arrays[i].astype(total.dtype)
                total = total + part
            if isinstance(kind, tuple) and lazy:
                rows = [
                    np.any(total[r] != 0) if setting.k > 1 else r in kind for r in range(shape[0])
                ]  # with accumulation, rows of zeros count as not there
                hits = np.broadcast_to(np.reshape(rows, (-1, *[1] * (len(shape) - 1))), shape)
            update.append((np.asarray(total, "float64") / setting.k, hits))
        present = [g for g, _ in filter(None, update)]
        if setting.common.get("skip_nonfinite") and not all(np.isfinite(g).all() for g in present):
            result.append(None)
        else:
            result.append(clipped(setting.common, update, present))
    return result


def clipped(common, update, present):
    def shrunk(g, norm, limit):
        return g * (limit / max(norm, limit))

    total = np.sqrt(sum(np.sum(g**2) for g in present))
    result: list = []
    for pair in update:
        if pair is not None:
            g, hits = pair
            if common.get("clipvalue"):
                g = np.clip(g, -common["clipvalue"], common["clipvalue"])
            elif common.get("clipnorm"):
                g = shrunk(g, np.sqrt(np.sum(g**2)), common["clipnorm"])
            elif common.get("global_clipnorm"):
                g = shrunk(g, total, common["global_clipnorm"])
            pair = (g, hits)
        result.append(pair)
    return result


def by_twin(setting, values, wanted, treatments):
    """The weights after every update, NaN where a twin does not say."""
    arguments = {k: v for k, v in setting.arguments.items() if k not in ("weight_decay", "decay_mask")}
    result = [[np.full_like(p, np.nan) for p in values] for _ in wanted]
    if setting.scheduled:
        return result
    for i, p in enumerate(values):
        if i in setting.constrained:
            continue
        if treatments[i] is None or treatments[i][0] == 0:
            for step in result:
                step[i] = p
            continue
        scale, decay = treatments[i]
        given = arguments | {"learning_rate": arguments["learning_rate"] * scale, "weight_decay": decay}
        # numbers that are updated together: all, or rows
        sets = {() if g is None else tuple(np.ravel(g[1])) for g in (step[i] for step in wanted)}
        units = [np.s_[:]] if p.ndim == 0 or not any(False in s for s in sets) else [np.s_[r] for r in range(len(p))]
        if p.ndim == 0:
            units = [()]
        for unit in units:
            there = [step[i] is not None and bool(np.all(step[i][1][unit])) for step in wanted]
            if not (all(there) or setting.optimizer in TIMELESS):
                continue
            mine = [step[i][0][unit] for step, here in zip(wanted, there, strict=True) if here]
            path = iter(list(TWINS[setting.optimizer](p[unit], mine, **given)) if mine else [])
            present = p[unit]
            for step, here in zip(result, there, strict=True):
                present = next(path) if here else present
                step[i][unit] = present
    return result


def averaged(values, trajectory, momentum):
    average = values
    for t, weights in enumerate(trajectory):
        average = (
            weights if t == 0 else [momentum * a + (1 - momentum) * w for a, w in zip(average, weights, strict=True)]
        )
    return average


# -- the comparison ---------------------------------------------------------------------------------------------------


def tolerances(setting, trajectory, values):
    """What may differ in each variable.

    Exact arithmetic differs by some units in the last place, of the largest number that has been in the variable, in
    each step. Weights in half precision are rounded after each step, in either direction if two runs differ at all, and
    at random with stochastic rounding: one unit in the last place each time. A global norm is as exact as the least
    exact gradient in it.
    """
    exact = {"float64": 1e-11, "float32": 1e-5}
    if "global_clipnorm" in setting.common and set(setting.dtypes) != {"float64"}:
        exact["float64"] = exact["float32"]
    result = []
    for i, dtype in enumerate(setting.dtypes):
        largest = max([1.0, *(np.max(np.abs(step[i]), initial=0.0) for step in [values, *trajectory])])
        steps = len(setting.calls) + 2
        result.append(largest * exact.get(dtype, steps * HALF.get(dtype, 0.0)))
    return result


def assert_close(got, expected, allowed, what):
    for i, (a, b, tolerance) in enumerate(zip(got, expected, allowed, strict=True)):
        known = ~np.isnan(b)
        np.testing.assert_allclose(a[known], b[known], rtol=0, atol=tolerance, err_msg=f"{what}, variable {i}")


def assert_same_state(state, expected, allowed, what):
    assert sorted(state) == sorted(expected)
    for name, value in expected.items():
        index = name.rpartition(".")[2]
        tolerance = allowed[int(index)] if index.isdecimal() else 1e-11
        if not name.startswith("nonfinite."):  # buckets and places in them depend on the packing
            scale = max(1.0, float(np.max(np.abs(value), initial=0.0)))
            np.testing.assert_allclose(state[name], value, rtol=0, atol=tolerance * scale, err_msg=f"{what} {name}")
    for name in ("nonfinite.skipped", "nonfinite.in_a_row"):
        assert state.get(name) == expected.get(name), f"{what} {name}"


def assert_untouched(setting, values, trajectory, treatments, exact):
    """What is frozen or has no gradient keeps its numbers bitwise."""
    before = values
    for call, after in zip(setting.calls, trajectory, strict=True):
        for i, kind in enumerate(call):
            if treatments[i] is None or (exact and kind is None):
                np.testing.assert_array_equal(after[i], before[i], err_msg=f"variable {i} without a gradient")
        before = after


def check(setting):
    values, grads = data(setting)
    treatments = treated(setting)
    trajectory, last, state = outcome(setting, Run(), values, grads)
    allowed = tolerances(setting, trajectory, values)
    evaluated = setting.evaluate_after is not None and setting.evaluate_after >= 0

    wanted = updates(setting, grads, treatments)
    done = [u for u in wanted if u is not None]
    assert state["iterations"] == len(done)
    if "nonfinite.skipped" in state:
        assert state["nonfinite.skipped"] == len(wanted) - len(done)
    if not evaluated or not set(setting.dtypes) & set(HALF):  # half precision rounds what it is evaluated at
        expected = by_twin(setting, values, done, treatments)
        happened = [t for t, update in enumerate(wanted, 1) if update is not None]
        for t, step in zip(happened, expected, strict=True):
            assert_close(trajectory[t * setting.k - 1], step, allowed, f"NumPy, update {t}")
        if setting.common.get("use_ema") and done:
            average = averaged(values, expected, setting.common["ema_momentum"])
            for i, a in enumerate(average):
                if treatments[i] is not None:
                    assert_close([state[f"average.{i}"]], [a], [allowed[i]], f"average of variable {i}")
    # going to the weights to evaluate at and back is exact unless one set is computed from the other
    exact = not evaluated or ("recovers" not in CARDS[setting.optimizer].tags and not set(setting.dtypes) & set(HALF))
    assert_untouched(setting, values, trajectory, treatments, exact)

    for run in setting.runs:
        other, other_last, other_state = outcome(setting, run, values, grads)
        for t, (a, b) in enumerate(zip(other, trajectory, strict=True)):
            assert_close(a, b, allowed, f"{run}, call {t}")
        assert_close(other_last, last, allowed, f"{run}, last")
        assert_same_state(other_state, state, allowed, str(run))
        assert_untouched(setting, values, other, treatments, exact)


@given(setting=settings_to_try())
def test_all_ways_to_run_agree(setting):
    with fixed_gradients():
        check(setting)


def test_many_tiny_variables():
    """Packed, in one step; tracing a graph of ten thousand takes minutes, so that is part of the thorough run only."""
    thorough = settings.get_current_profile_name() == "thorough"
    count = 10_000 if thorough else 1_500
    shapes = [(i % 3,) if i % 2 else () for i in range(count)]
    rng = np.random.default_rng(0)
    values = [np.asarray(rng.normal(size=s)) for s in shapes]
    grads = [np.asarray(rng.normal(size=s)) for s in shapes]
    expected = [list(TWINS["AdamW"](p, [g, g], learning_rate=0.01))[-1] for p, g in zip(values, grads, strict=True)]
    for mode in ("eager", "graph")[: 1 + thorough]:
        weights = [tf.Variable(v) for v in values]
        optimizer = ok.optimizers.AdamW(0.01, decay_mask="all")
        step = problems.stepper(optimizer, weights, mode)
        for _ in range(2):
            step([tf.constant(g) for g in grads])
        for i, (w, e) in enumerate(zip(weights, expected, strict=True)):
            np.testing.assert_allclose(w.numpy(), e, rtol=1e-12, atol=1e-12, err_msg=f"{mode} {i}")

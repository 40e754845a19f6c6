"""Checks for optimizers.

The twin of an optimizer's card is a generator; see `keras_optkit.testing.twins.optimizers` for its form.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.kernels import KERNEL, VECTOR, by_shape
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.groups import Group, Places, Treatment
from keras_optkit.optimizers.inner import shared
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Weight, Wrapper, contributes, number, rule_for, slots_of
from keras_optkit.optimizers.rules.sgd import SGD
from keras_optkit.optimizers.slots import FromWeights
from keras_optkit.optimizers.transforms import ClipByValue, Transform
from keras_optkit.private import op_determinism
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.conformance import check
from keras_optkit.testing.tools import float64, numbers, refuses
from keras_optkit.testing.twins.optimizers import TWINS

_COMMON = ("clipnorm", "clipvalue", "global_clipnorm", "gradient_accumulation_steps", "use_ema", "ema_momentum")


def _close(got: Any, expected: Any, rtol: float = 1e-10, what: str = "") -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol, err_msg=f"{what} variable {i}")


def _equal(got: Any, expected: Any, what: str = "") -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{what} variable {i}")


def _make(card: Card, case: Mapping[str, Any] | None = None, /, **more: Any) -> Optimizer:
    return card.make(**{**(card.cases[0] if case is None else case), **more})


def _ema(card: Card, **more: Any) -> dict[str, Any]:
    """`use_ema=True` and more, or nothing for optimizers that refuse it, since they average by themselves."""
    return {} if "averages" in card.tags else {"use_ema": True, **more}


def _holds(config: Any, given: Any) -> bool:
    """Whether a config says what was given; that of an object in it may say more."""
    if isinstance(given, Mapping):
        return all(name in config and _holds(config[name], value) for name, value in given.items())
    return config == given


def _decayed(optimizer: Optimizer, shape: tuple[int, ...]) -> bool:
    return optimizer.decay_mask == "all" or len(shape) > 1


# -- configuration ----------------------------------------------------------------------------------------------------


@check("optimizer")
def check_config_round_trip(card: Card) -> None:
    """The config holds every argument, survives JSON, and rebuilds the same optimizer, also by registered name."""
    for case in card.cases:
        common = {"clipnorm": 1.5, **_ema(card)}
        optimizer = _make(card, case, **common)
        written = json.dumps(keras.optimizers.serialize(optimizer))
        again = keras.optimizers.deserialize(json.loads(written))
        assert type(again) is type(optimizer)
        config = again.get_config()
        assert config == optimizer.get_config()
        for name, value in {**case, **common}.items():
            assert name in config, f"the config has lost {name!r}"
            assert _holds(config[name], value), f"{name}: given {value!r}, config has {config[name]!r}"
            assert _holds(getattr(again, name), value) or float(getattr(again, name)) == value
    by_name = keras.optimizers.get(keras.saving.get_registered_name(type(optimizer)))
    assert type(by_name) is type(optimizer)


@check("optimizer")
def check_bad_arguments(card: Card) -> None:
    """A bad value or an unknown keyword fails at once, and the message names argument, value and what is allowed."""
    refuses(card.make, "learning_rate", -0.1, "[0")
    refuses(card.make, "learning_rate", float("nan"), "[0")
    refuses(card.make, "learning_rate", "fast", ">= 0")
    refuses(card.make, "weight_decay", -1.0, "[0")
    refuses(card.make, "clipnorm", 0.0, "(0")
    refuses(card.make, "ema_momentum", 1.0, "[0, 1)")
    refuses(card.make, "gradient_accumulation_steps", 1, "at least 2")
    refuses(card.make, "use_ema", "yes", "True or False")
    refuses(card.make, "decay_mask", "some", "'auto', 'all'")
    refuses(card.make, "learning_rats", 0.1, "learning_rate")
    optimizer = card.make(learning_rate=1)  # integer rates are rates
    assert float(optimizer.learning_rate) == 1.0
    try:
        card.make(clipnorm=1.0, clipvalue=1.0)
    except ValueError as error:
        assert "clipvalue" in str(error)
    else:
        raise AssertionError("two forms of clipping at once were accepted")


# -- the formula ------------------------------------------------------------------------------------------------------


@check("optimizer")
@float64()
def check_twin(card: Card) -> None:
    """Equals its NumPy twin for 20 steps in float64, several shapes, every case, weight decay on and off.

    Decay that the rule leaves to the optimizer is that of the last case.
    """
    grads = problems.gradients(20)
    for case, decay in itertools.product(card.cases, (None, 0.1)):
        optimizer = _make(card, case, weight_decay=decay)
        if decay and case is not card.cases[-1] and not optimizer.rule.handles_decay:
            continue
        trajectory = problems.train(optimizer, grads)
        expected = _by_twin(card, case, optimizer, grads)
        for i, path in enumerate(zip(*expected, strict=True)):
            _close([step[i] for step in trajectory], path, what=f"{case} decay {decay}, parameter {i}, at")


def _by_twin(card: Card, case: Mapping[str, Any], optimizer: Optimizer, grads: list[Any]) -> list[list[np.ndarray]]:
    """The weights after each step by the twin.

    A twin is of one parameter, or, of a rule with sums over the whole model, of all of them at once. If it has an
    argument `weight`, it is told what the rule is told about the parameter.
    """
    twin = card.twin or TWINS[card.name]
    arguments = {k: v for k, v in case.items() if k not in (*_COMMON, "decay_mask", "weight_decay")}
    start = problems.start()
    decays = [optimizer.weight_decay if _decayed(optimizer, p.shape) else 0.0 for p in start]
    decays = [decay or 0.0 for decay in decays]
    weights = Places(problems.variables(start), None).weights(problems.variables(start))
    told = {"weight": weights} if "weight" in inspect.signature(twin).parameters else {}
    if contributes(optimizer.rule):
        return list(twin(start, grads, weight_decay=decays, **told, **arguments))
    paths = [
        list(
            twin(
                p,
                [g[i] for g in grads],
                weight_decay=decays[i],
                **{name: each[i] for name, each in told.items()},
                **arguments,
            )
        )
        for i, p in enumerate(start)
    ]
    return [list(step) for step in zip(*paths, strict=True)]


@check("optimizer")
@float64()
def check_hyperparameters(card: Card) -> None:
    """Every number of the rule, and the weight decay, can be a schedule or a variable: as if it were set in between."""
    done = set()
    for case in card.cases:
        rule = _make(card, case).rule
        given = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
        for name, value in {**given, "weight_decay": 0.5}.items():
            pair = None if name in done else _two_values(rule, name, value)
            if pair is not None:
                done.add(name)
                _drive(card, case, name, pair)


def _two_values(rule: Any, name: str, value: Any) -> tuple[float, float] | None:
    """The number of a field and another one that it may be, in digits that float32 has; None if there are none.

    A number of 0 may switch state off, and then cannot be driven.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return None
    pair = float(np.float32(value)), float(np.float32(0.75 * value))
    if name == "weight_decay":
        return pair
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], list(pair))
    try:
        rules = [dataclasses.replace(rule, **{name: each}) for each in (*pair, schedule)]
    except (TypeError, ValueError):  # it is declared to be no schedule, or to be a whole number
        return None
    known = [
        Weight(shape, role=KERNEL, axes=by_shape(len(shape))) if len(shape) > 1 else Weight(shape, role=VECTOR)
        for shape in problems.SHAPES
    ]
    slots = {str([list(slots_of(rule_for(each, w), w)) for w in known]) for each in rules}
    return pair if len(slots) == 1 else None


def _drive(card: Card, case: Mapping[str, Any], name: str, pair: tuple[float, float]) -> None:
    """Four updates, the first two with the one value, the others with the other."""
    shapes = ((2, 3), (4,))
    grads = problems.gradients(4, shapes)

    def trained(value: Any, change: Callable[[Any], None]) -> list[np.ndarray]:
        optimizer, weights = _make(card, case), problems.variables(problems.start(shapes))
        setattr(optimizer, name, value)
        for place, arrays in enumerate(grads):
            if place == 2:
                change(optimizer)
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        return [numbers(w) for w in weights]

    expected = trained(pair[0], lambda optimizer: setattr(optimizer, name, pair[1]))
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], list(pair))
    _close(trained(schedule, lambda _: None), expected, what=f"{case}: {name} from a schedule,")
    variable = keras.Variable(pair[0], dtype="float64", trainable=False)
    _close(trained(variable, lambda _: variable.assign(pair[1])), expected, what=f"{case}: {name} from a variable,")


@check("optimizer", engine=True)
@float64()
def check_decay_mask(card: Card) -> None:
    """The "auto" mask decays matrices only, "all" decays everything; each by η λ θ more than without decay.

    Of rules with a decay of their own, which `twin` checks, only which parameters are decayed.
    """
    values, rule = problems.start(), _make(card).rule
    grads = problems.gradients(2 if rule.uses_first and rule.handles_decay else 1)  # a first one may move nothing
    plain = problems.train(_make(card, weight_decay=None), grads)[-1]
    rate = float(_make(card).learning_rate)
    for mask in ("auto", "all"):
        decayed = problems.train(_make(card, weight_decay=0.1, decay_mask=mask), grads)[-1]
        if rule.handles_decay and not isinstance(rule, Wrapper):
            for before, w, p in zip(plain, decayed, values, strict=True):
                applies = p.size > 1 and (mask == "all" or p.ndim > 1)  # steps that are scaled to a scalar hide it
                assert p.size == 1 or applies != np.array_equal(before, w), f"{mask}: shape {p.shape}"
            continue
        expected = [
            w - (rate * 0.1 * p if mask == "all" or p.ndim > 1 else 0) for w, p in zip(plain, values, strict=True)
        ]
        _close(decayed, expected, what=mask)


@check("optimizer", engine=True)
@float64()
def check_clipping(card: Card) -> None:
    """Each form of clipping equals clipping the gradients beforehand."""
    grads = problems.gradients(3)

    def clipped(form: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        if form == "clipvalue":
            return [np.clip(g, -0.5, 0.5) for g in arrays]
        norms = [np.linalg.norm(g) for g in arrays]
        if form == "global_clipnorm":
            norms = [np.linalg.norm(norms)] * len(arrays)
        return [g * min(1.0, 0.5 / norm) if norm else g for g, norm in zip(arrays, norms, strict=True)]

    for form in ("clipvalue", "clipnorm", "global_clipnorm"):
        got = problems.train(_make(card, **{form: 0.5}), grads)
        expected = problems.train(_make(card), [clipped(form, arrays) for arrays in grads])
        _close(got[-1], expected[-1], what=form)


# -- execution --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Times(Transform):
    """Multiplies gradients, or steps."""

    factor: float = number(1.0)

    def change(self, u: Any, *_: Any) -> Any:
        return self.factor * u


class _StepTimes(_Times):
    changes = "step"


@check("optimizer", engine=True)
@float64()
def check_transforms(card: Card) -> None:
    """Transforms of gradients act after clipping, in their order; those of steps after the rule, before the decay."""
    grads = problems.gradients(4)
    got = problems.train(_make(card, clipvalue=0.01, transforms=[_Times(3.0), ClipByValue(0.02)]), grads)
    changed = [[np.clip(3 * np.clip(g, -0.01, 0.01), -0.02, 0.02) for g in arrays] for arrays in grads]
    _close(got[-1], problems.train(_make(card), changed)[-1], what="of gradients:")
    if _make(card).rule.averages:  # which refuse those of steps
        return
    optimizer, weights = (
        _make(card, weight_decay=0.1, transforms=[_StepTimes(0.0)]),
        problems.variables(problems.start()),
    )
    told = Places(weights, None).weights(weights)
    got = problems.train(optimizer, grads[:1])
    for p, after, row, w in zip(problems.start(), got[-1], optimizer.explain(weights).rows, told, strict=True):
        decay = 0.0 if rule_for(optimizer.rule, w).handles_decay else row.learning_rate * row.weight_decay
        np.testing.assert_allclose(after, p * (1 - decay), rtol=1e-7, atol=1e-10, err_msg=f"of steps: {row.path}")


@check("optimizer")
@float64()
def check_modes_agree(card: Card) -> None:
    """Eager, graph and (of the last case) XLA give the same weights, and a step is traced once.

    Of rules with decompositions, which take long to trace, it is the last case alone.
    """
    grads = problems.gradients(5)
    for case in card.cases[-1:] if _make(card).rule.decomposes else card.cases:
        eager = problems.train(_make(card, case), grads)
        for mode in ("graph", "xla") if case is card.cases[-1] else ("graph",):
            got = problems.train(_make(card, case), grads, mode=mode)
            _close(got[-1], eager[-1], what=f"{case} {mode}")


@check("optimizer", engine=True)
@float64()
def check_packing(card: Card) -> None:
    """Packed equals unpacked, and the order of the variables does not matter."""
    grads = problems.gradients(4)
    packed = problems.train(_make(card), grads)
    alone = _make(card)
    alone.pack_below = 0
    _close(problems.train(alone, grads)[-1], packed[-1], rtol=1e-14, what="unpacked")
    turned = problems.train(_make(card), [g[::-1] for g in grads], values=problems.start()[::-1])
    _close(turned[-1][::-1], packed[-1], rtol=1e-14, what="reversed")


@check("optimizer", engine=True)
@float64()
def check_accumulation(card: Card) -> None:
    """K micro-batches, or fewer at the end, equal one batch: weights, slots, count, clipping, decay, average, rate."""
    micro = problems.gradients(8)
    large = [[np.mean(parts, axis=0) for parts in zip(*micro[i : i + 3], strict=True)] for i in (0, 3, 6)]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.1, 0.02, 0.005])
    clipped = {"global_clipnorm": 0.5, "weight_decay": 0.1, **_ema(card)}  # which hides a wrong factor
    for common, mode in ((clipped, "graph"), ({"learning_rate": schedule}, "eager")):
        one = _make(card, **common)
        expected = problems.train(one, large)
        many, weights = _make(card, **common, gradient_accumulation_steps=3), problems.variables(problems.start())
        step = problems.stepper(many, weights, mode)
        for i, arrays in enumerate(micro):
            step([ops.convert_to_tensor(g) for g in arrays])
            if i == 1:
                _equal([ops.convert_to_numpy(w) for w in weights], problems.start(), what="before the first update")
        assert int(many.iterations) == 2, f"{int(many.iterations)} updates were counted instead of 2"
        many.flush()  # of the two that are left
        _close([ops.convert_to_numpy(w) for w in weights], expected[-1], what=f"{common} {mode}")
        state, whole = problems.state_of(many), problems.state_of(one)
        for name in whole:
            if name != "schema":
                np.testing.assert_allclose(state[name], whole[name], rtol=1e-10, atol=1e-12, err_msg=name)
        many.flush()  # of nothing
        assert int(many.iterations) == 3


@check(
    "optimizer",
    only_on="tensorflow",
    because="tf.distribute; on JAX one step sees the arrays of all devices whole",
    engine=True,
)
def check_replicas(card: Card) -> None:
    """Two replicas equal one device on the same global batch, with every form of clipping, averaged and accumulated."""
    import tensorflow as tf

    strategy = problems.two_replicas()
    halves = problems.gradients(4, seed=2)
    rest = problems.gradients(4, seed=3)
    for common in (
        {"weight_decay": 0.1},
        {"clipvalue": 0.1},
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2, **_ema(card)},
    ):
        one = _make(card, **common)
        totals = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(halves, rest, strict=True)]
        expected = problems.train(one, totals)[-1]
        with strategy.scope():
            two = _make(card, **common)
            weights = problems.variables(problems.start())
            two.build(weights)

        def step(arrays: Any, two: Any = two, weights: Any = weights) -> None:
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            two.apply([tf.gather(g, replica) for g in arrays], weights)

        for pair in zip(halves, rest, strict=True):
            strategy.run(step, args=([np.stack(arrays) for arrays in zip(*pair, strict=True)],))
        for weight, value in zip(weights, expected, strict=True):
            for copy in strategy.experimental_local_results(weight.value):
                np.testing.assert_allclose(copy.numpy(), value, rtol=1e-10, atol=1e-12, err_msg=str(common))
        for name, value in problems.state_of(one).items():
            if name != "schema":
                np.testing.assert_allclose(problems.state_of(two)[name], value, rtol=1e-10, atol=1e-12, err_msg=name)


def _flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(a) for a in arrays])


@check("optimizer", engine=True)
def check_fit(card: Card) -> None:
    """`fit` eagerly, as a graph and under XLA, and a custom loop over the same batches, give the same weights.

    They are inside of their constraints, unless they are averages.
    """
    x, y = problems.regression()

    def fitted(**how: Any) -> np.ndarray:
        model = _constrained_network()
        model.compile(_make(card), loss="mse", **how)
        model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
        norms = np.linalg.norm(model.get_weights()[0], axis=0)
        assert "averages" in card.tags or np.max(norms) < 0.5 + 1e-6, f"{how}: a constraint is broken by {norms}"
        return _flat(model.get_weights())

    graph = fitted()
    for how in ({"jit_compile": True}, {"run_eagerly": True}):
        np.testing.assert_allclose(fitted(**how), graph, rtol=1e-4, atol=1e-5, err_msg=str(how))
    if keras.config.backend() == "tensorflow":
        for mode in ("eager", "graph", "xla"):
            np.testing.assert_allclose(_custom_loop(card, x, y, mode), graph, rtol=1e-4, atol=1e-5, err_msg=mode)


def _constrained_network() -> keras.Model:
    model = problems.network()
    model.layers[0].kernel.constraint = keras.constraints.MaxNorm(0.5)  # less than what it starts with
    return model


def _custom_loop(card: Card, x: np.ndarray, y: np.ndarray, mode: str) -> np.ndarray:
    import tensorflow as tf

    model, optimizer = _constrained_network(), _make(card)

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        grads = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(grads, model.trainable_variables, strict=True))

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    for _, i in itertools.product(range(2), range(0, 64, 32)):
        step(tf.constant(x[i : i + 32]), tf.constant(y[i : i + 32]))
    optimizer.finalize_variable_values(model.trainable_variables)  # as `fit` does
    return _flat(model.get_weights())


# -- odd gradients and dtypes -----------------------------------------------------------------------------------------


@check("optimizer")
@float64()
def check_missing_gradient(card: Card) -> None:
    """A parameter without a gradient keeps its value and its slots bitwise; the others go on."""
    grads: list[list[Any]] = problems.gradients(4)
    holes = [g.copy() for g in grads]
    for place, step in itertools.product((0, 1), (1, 2)):
        holes[step][place] = None
    for case in card.cases:
        _misses(card, case, grads, holes)


def _misses(card: Card, case: Mapping[str, Any], grads: list[list[Any]], holes: list[list[Any]]) -> None:
    optimizer, whole = _make(card, case), _make(card, case)
    weights = problems.variables(problems.start())
    apply = problems.stepper(optimizer, weights, "eager")
    states = []
    for arrays in holes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
            apply([None if g is None else ops.convert_to_tensor(g) for g in arrays])
        states.append((problems.state_of(optimizer), [ops.convert_to_numpy(w).copy() for w in weights]))
    for (before, w_before), (after, w_after) in itertools.pairwise(states[:3]):
        for place in (0, 1):
            np.testing.assert_array_equal(w_after[place], w_before[place])
            for name in before:
                if name.startswith("slot.") and name.endswith(f".{place}"):
                    np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    if not contributes(optimizer.rule):  # then what is missing changes the others
        _close(states[-1][1][2:], problems.train(whole, grads)[-1][2:], rtol=1e-14)


@check("optimizer")
@float64()
def check_some_updates(card: Card) -> None:
    """Where the rule has sums over the model or asks for first updates, missing gradients are as in its twin.

    They count for nothing in the sums, and the first gradient of a parameter is the first that there is.
    """
    rule = _make(card).rule
    if not (rule.uses_first or contributes(rule)):
        return
    grads: list[list[Any]] = problems.gradients(8)
    grads = [[g + np.sign(grads[0][i]) for i, g in enumerate(arrays)] for arrays in grads]  # they agree for the most
    for place, step in ((0, 0), (0, 1), (0, 5), (1, 0), (3, 2), (3, 3), (3, 6)):
        grads[step][place] = None
    for case in card.cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
            trajectory = problems.train(_make(card, case, weight_decay=None), grads)
        for step, expected in enumerate(_by_twin(card, case, _make(card, case, weight_decay=None), grads)):
            _close(trajectory[step], expected, what=f"{case} step {step}")


@check("optimizer")
@float64()
def check_zero_and_rate_zero(card: Card) -> None:
    """Zero gradients leave finite weights, and a learning rate of zero leaves the weights bitwise as they are."""
    zeros = [[np.zeros_like(g) for g in arrays] for arrays in problems.gradients(3)]
    for case in card.cases:
        for arrays in problems.train(_make(card, case), zeros, dtype="float32")[-1]:
            assert np.isfinite(arrays).all(), f"{case}: zero gradients gave {arrays}"
        still = problems.train(_make(card, {**case, "learning_rate": 0.0}, weight_decay=0.1), problems.gradients(3))
        _equal(still[-1], problems.start(), what=f"{case}: rate 0,")


@check("optimizer")
@float64()
def check_dtypes(card: Card) -> None:
    """Weights keep dtype and shape in every float dtype; half precision is updated through float32 state."""
    grads = problems.gradients(3)
    exact = problems.train(_make(card), grads)[-1]
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)):
        optimizer = _make(card)
        weights = problems.variables(problems.start(), dtype)
        for arrays in grads:
            optimizer.apply([ops.convert_to_tensor(g, dtype=dtype) for g in arrays], weights)
        kept = "float64" if dtype == "float64" else "float32"
        for weight, value, reference in zip(weights, problems.start(), exact, strict=True):
            assert keras.backend.standardize_dtype(weight.dtype) == dtype
            assert tuple(weight.shape) == value.shape
            got = numbers(weight)
            np.testing.assert_allclose(got, reference, rtol=tolerance, atol=tolerance, err_msg=dtype)
        for name, array in problems.state_of(optimizer).items():
            if name.startswith("slot."):
                assert array.dtype == kept, f"{name} of {dtype} weights is {array.dtype}"
        _rule_keeps_dtype(optimizer, kept)


def _rule_keeps_dtype(optimizer: Optimizer, dtype: str) -> None:
    weight = Weight((2, 3), dtype, KERNEL, by_shape(2))
    rule = optimizer.rule
    bucket = Bucket((0,), ((2, 3),), dtype, Treatment(), "stacked", weight=weight)
    p, slots = ops.ones((1, 2, 3), dtype), {}
    for name, initial in slots_of(rule, weight).items():
        if isinstance(initial, FromWeights):
            slots[name] = initial.function(p)
        else:
            slots[name] = ops.full((1, *(initial.shape or (2, 3))), initial.value, dtype)
    scalars = {name: ops.convert_to_tensor(value, dtype) for name, value in rule.scalars().items()}
    h = Hyper(
        ops.convert_to_tensor(3),
        ops.convert_to_tensor(0.1, dtype),
        dtype,
        scalars=scalars,
        kernel=weight.axes,
        sums=bucket.over_parameters,
        first=ops.zeros((1, 1, 1), "bool"),
    )
    step, new = rule.update(0.5 * p, slots, p, h)
    for name, tensor in {"the step": step, **new}.items():
        assert keras.backend.standardize_dtype(tensor.dtype) == dtype, f"{name} drifts to {tensor.dtype} from {dtype}"
        expected = slots[name].shape if name in slots else p.shape
        assert tuple(tensor.shape) == tuple(expected), f"{name} changes its shape to {tensor.shape}"


@check("optimizer", engine=True)
def check_master_weights(card: Card) -> None:
    """With float32 masters, half-precision weights are those of a float32 run, rounded; saved and loaded as well."""

    def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
        return numbers(ops.cast(array, dtype))

    for dtype in ("bfloat16", "float16"):
        values = [rounded(p, dtype) for p in problems.start()]
        grads = [[rounded(g, dtype) for g in arrays] for arrays in problems.gradients(4)]
        exact = problems.train(_make(card), grads, values=values, dtype="float32")
        half = problems.train(_make(card, master_weights=True), grads, values=values, dtype=dtype)
        _equal(half[-1], [rounded(w, dtype) for w in exact[-1]], what=dtype)
        optimizer, weights = _make(card, master_weights=True), problems.variables(values, dtype)
        for step, arrays in enumerate(grads):
            if step == 2:
                state, kept = (
                    problems.state_of(optimizer),
                    [ops.convert_to_numpy(ops.cast(w, "float32")) for w in weights],
                )
                optimizer, weights = _make(card, master_weights=True), problems.variables(kept, dtype)
                optimizer.build(weights)
                optimizer.load_own_variables(state)
            optimizer.apply([ops.convert_to_tensor(g, dtype=dtype) for g in arrays], weights)
        _equal([numbers(w) for w in weights], half[-1], what=f"{dtype}, continued,")


@check("optimizer", engine=True)
def check_loss_scaling(card: Card) -> None:
    """Under loss scaling an infinite gradient leaves weights, slots and step count bitwise untouched.

    A constant `loss_scale_factor`, which Keras multiplies the loss by, is divided out.
    """
    inner = _make(card)
    optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    weights = problems.variables(problems.start(), "float32")
    step = problems.stepper(optimizer, weights, "graph")
    grads = problems.gradients(2)

    def as_tensors(arrays: Any, factor: float) -> list[Any]:
        return [ops.convert_to_tensor(g * factor, dtype="float32") for g in arrays]

    step(as_tensors(grads[0], 8.0))
    before = [ops.convert_to_numpy(w).copy() for w in weights], problems.state_of(inner)
    step(as_tensors(grads[1], np.inf))
    after = [ops.convert_to_numpy(w) for w in weights], problems.state_of(inner)
    _equal(after[0], before[0])
    _equal(after[1].values(), before[1].values())
    expected = problems.train(_make(card), grads[:1], dtype="float32")[0]
    _close(after[0], expected, rtol=1e-6)
    constant = _make(card)
    constant.loss_scale_factor = 8.0
    _close(problems.train(constant, [[8 * g for g in grads[0]]], dtype="float32")[0], expected, rtol=1e-6)


# -- groups, rows, gradients that are not finite -----------------------------------------------------------------------


@check("optimizer", only_on="tensorflow", because="elsewhere a step is compiled as a whole or not at all", engine=True)
def check_fused(card: Card) -> None:
    """The fused step equals the step operation by operation, with a missing gradient and accumulated, too."""
    decay = {"weight_decay": 0.1, "decay_mask": "all"}  # by which a gradient of zeros is told from none
    accumulated = {**decay, "gradient_accumulation_steps": 2, "clipnorm": 0.5}
    settings: list[tuple[Any, dict[str, Any]]] = [(card.cases[0], decay), (card.cases[-1], accumulated)]
    for case, common in settings:
        grads: list[list[Any]] = problems.gradients(4)
        for arrays in grads:
            arrays[1] = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
            plain = problems.train(_make(card, case, fuse=False, **common), grads, mode="graph")
            got = problems.train(_make(card, case, fuse=True, **common), grads, mode="graph")
            _close(got[-1], plain[-1], rtol=1e-12, what=f"{case} {common}")


@check("optimizer", engine=True)
@float64()
def check_groups(card: Card) -> None:
    """Groups equal separate optimizers on the parts; a frozen group keeps its values and has no state.

    With a rule that has sums over the model the parts are not separate, and only the second is checked.
    """
    separate = not contributes(_make(card).rule)
    grads, values = problems.gradients(4), problems.start()
    decay = 0.2 if "weight_decay" in card.make(weight_decay=0.1).get_config() else None
    groups = [
        Group("weight_0", lr_scale=0.5, weight_decay=decay),
        Group("weight_[12]", lr_scale=0.1),
        Group("weight_3", trainable=False),
        Group("weight_[0-3]", lr_scale=7.0),  # the first one that matches counts
    ]
    got = problems.train(_make(card, groups=groups, weight_decay=0.1), grads)
    rate = float(_make(card).learning_rate)
    parts: list[tuple[list[int], float, float | None]] = [
        ([0], 0.5, decay),
        ([1, 2], 0.1, 0.1),
        ([4, 5, 6, 7], 1.0, 0.1),
    ]
    for places, scale, own in parts if separate else []:
        optimizer = _make(card, learning_rate=rate * scale, weight_decay=own)
        alone = problems.train(optimizer, [[g[i] for i in places] for g in grads], values=[values[i] for i in places])
        _close([got[-1][i] for i in places], alone[-1], rtol=1e-12, what=f"group of {places}")
    _equal([got[-1][3]], [values[3]], what="frozen")
    rest = [i for i in range(len(values)) if i != 3]
    clipped = problems.train(_make(card, groups=groups[2:3], global_clipnorm=0.5), grads)
    alone = problems.train(
        _make(card, global_clipnorm=0.5), [[g[i] for i in rest] for g in grads], values=[values[i] for i in rest]
    )
    if separate:
        _close([clipped[-1][i] for i in rest], alone[-1], rtol=1e-12, what="clipped without the frozen one,")
    optimizer = _make(card, groups=groups)
    optimizer.build(problems.variables(values))
    assert not [name for name in problems.state_of(optimizer) if name.startswith("slot.") and name.endswith(".3")]
    rows = optimizer.explain(problems.variables(values)).rows
    assert [row.rule == "frozen" for row in rows] == [i == 3 for i in range(len(values))]


@check("optimizer", engine=True)
@float64()
def check_group_rules(card: Card) -> None:
    """A group with another rule equals a separate optimizer, whichever of the two is the guest, and can be saved."""
    grads, values = problems.gradients(4), problems.start()
    own = {name: value for name, value in card.cases[-1].items() if name not in shared()}

    def mine(**more: Any) -> Optimizer:
        return card.make(**own, **more)

    def other(**more: Any) -> Optimizer:
        return SGD(momentum=0.5, **more)

    common: dict[str, Any] = {"learning_rate": 0.02, "weight_decay": 0.1}
    for host, guest in ((mine, other), (other, mine)):
        if guest is mine and "averages" in card.tags:  # which a guest may not
            continue
        group = Group("weight_[036]", lr_scale=0.5, weight_decay=0.2, rule=guest())
        optimizer, weights = host(groups=[group], **common), problems.variables(values)
        for step, arrays in enumerate(grads):
            if step == 2:
                state = problems.state_of(optimizer)
                optimizer = type(optimizer).from_config(json.loads(json.dumps(optimizer.get_config())))
                optimizer.build(weights)
                optimizer.load_own_variables(state)
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        separate = (
            ([0, 3, 6], guest(learning_rate=0.01, weight_decay=0.2)),
            ([1, 2, 4, 5, 7], host(**common)),
        )
        for places, alone in separate:
            parts = [[g[i] for i in places] for g in grads]
            expected = problems.train(alone, parts, values=[values[i] for i in places])[-1]
            _close([ops.convert_to_numpy(weights[i]) for i in places], expected, rtol=1e-12, what=str(places))
        rows, known = optimizer.explain(weights).rows, Places(weights, None).weights(weights)
        expected_rules = [rule_for(alone.rule, known[i]) for i, (_, alone) in enumerate(separate)]
        assert [rows[i].rule for i in (0, 1)] == [type(rule).__name__ for rule in expected_rules]
        without = host(**common)
        without.build(weights)
        try:
            without.load_own_variables(problems.state_of(optimizer))
        except ValueError as error:
            assert "rules" in str(error), error
        else:
            raise AssertionError("state for a group with a rule of its own was taken by an optimizer without it")


@check("optimizer", engine=True)
@float64()
def check_skip_nonfinite(card: Card) -> None:
    """An update with a non-finite gradient changes nothing bitwise, is counted and named; the k-th in a row raises."""
    finite = problems.gradients(3)
    for mode, bad in (("eager", np.nan), ("eager", np.inf), ("graph", np.nan), ("xla", np.inf)):
        broken = [g.copy() for g in finite[0]]
        broken[3][1, 0, 2] = bad
        optimizer = _make(card, skip_nonfinite=2, global_clipnorm=1.0, use_ema="averages" not in card.tags)
        weights = problems.variables(problems.start())
        step = problems.stepper(optimizer, weights, mode)

        def call(arrays: list[np.ndarray], step: Any = step) -> None:
            step([ops.convert_to_tensor(g) for g in arrays])

        call(finite[0])
        before = [ops.convert_to_numpy(w).copy() for w in weights], problems.state_of(optimizer)
        call(broken)
        after = [ops.convert_to_numpy(w) for w in weights], problems.state_of(optimizer)
        _equal(after[0], before[0], what=f"{mode} {bad}")
        for name, value in before[1].items():
            if not name.startswith("nonfinite."):
                np.testing.assert_array_equal(after[1][name], value, err_msg=f"{mode} {bad} {name}")
        assert optimizer.nonfinite[:2] == (1, 1), optimizer.nonfinite
        assert (optimizer.nonfinite.variable or "").endswith("weight_3"), optimizer.nonfinite
        call(finite[1])
        assert optimizer.nonfinite[:2] == (1, 0), f"after a finite gradient: {optimizer.nonfinite}"
        call(broken)
        try:
            call(broken)
            optimizer.finalize_variable_values(weights)  # where a compiled step cannot raise
        except Exception as error:  # the backend's own, from inside of a graph
            assert "non-finite" in str(error)
        else:
            raise AssertionError(f"{mode}: two non-finite gradients in a row with skip_nonfinite=2 did not raise")


@check(
    "optimizer",
    requires=("elementwise",),
    only_on="tensorflow",
    because="tf.IndexedSlices; elsewhere the gradients of embeddings are dense",
    engine=True,
)
def check_rows(card: Card) -> None:
    """A sparse gradient updates its rows as a dense one would, repeated rows summed, and leaves the others bitwise."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    table, other = rng.normal(size=(7, 3)), rng.normal(size=(4,))
    indices = [[5, 0, 5], [2, 2, 2], [0, 5, 3]]
    values = [rng.normal(size=(3, 3)) for _ in indices]
    seen: set[int] = set()
    decay, clip, clip_all = {"weight_decay": 0.1}, {"clipnorm": 0.5}, {"global_clipnorm": 0.5}
    settings = [*itertools.product((2**16, 0), ("graph", "xla"), (decay,))]
    settings += itertools.product((2**16, 0), ("eager",), (decay, clip, clip_all))
    for below, mode, common in settings:
        optimizer, weights = _make(card, **common), problems.variables([table, other])
        optimizer.pack_below = below
        step = problems.stepper(optimizer, weights, mode)
        seen = set()
        for rows, value in zip(indices, values, strict=True):
            before = ops.convert_to_numpy(weights[0]).copy()
            sparse = tf.IndexedSlices(tf.constant(value), tf.constant(rows, tf.int64), tf.constant([7, 3], tf.int64))
            step([sparse, tf.constant(np.ones(4))])
            seen |= set(rows)
            untouched = [i for i in range(7) if i not in rows]
            np.testing.assert_array_equal(ops.convert_to_numpy(weights[0])[untouched], before[untouched])
        # each row has been through the updates that it was in, with the step count of the whole
        for row in range(7):
            if row not in seen:
                np.testing.assert_array_equal(ops.convert_to_numpy(weights[0])[row], table[row])
        expected = _lazy_by_hand(card, common, table, other, indices, values)
        np.testing.assert_allclose(
            ops.convert_to_numpy(weights[0]), expected, rtol=1e-10, atol=1e-12, err_msg=f"{mode} {below} {common}"
        )


def _lazy_by_hand(
    card: Card, common: Mapping[str, Any], table: Any, other: Any, indices: list[list[int]], values: list[Any]
) -> np.ndarray:
    """Updates of all rows with dense gradients, after each of which the rows without one are set back."""
    optimizer, weights = _make(card, **common), problems.variables([table, other])
    optimizer.pack_below = 0
    for rows, value in zip(indices, values, strict=True):
        dense = np.zeros_like(table)
        np.add.at(dense, rows, value)
        before, state = ops.convert_to_numpy(weights[0]).copy(), {}
        if optimizer.built:
            state = {n: ops.convert_to_numpy(v).copy() for n, v in optimizer._held.state.slots[0].items()}
        optimizer.apply([ops.convert_to_tensor(dense), ops.convert_to_tensor(np.ones(4))], weights)
        untouched = [i for i in range(len(table)) if i not in rows]
        after = ops.convert_to_numpy(weights[0]).copy()
        after[untouched] = before[untouched]
        weights[0].assign(after)
        for name, variable in optimizer._held.state.slots[0].items():
            slot = ops.convert_to_numpy(variable).copy()
            initial = slots_of(optimizer.rule, Weight(table.shape))[name]
            fresh = table if isinstance(initial, FromWeights) else np.full_like(table, initial.value)
            slot[untouched] = state.get(name, fresh)[untouched]
            variable.assign(slot)
    return ops.convert_to_numpy(weights[0])


# -- learning rate, average -------------------------------------------------------------------------------------------


@check("optimizer", engine=True)
@float64()
def check_learning_rate(card: Card) -> None:
    """A schedule equals setting the rate before every update, and assigning on top of a schedule multiplies it."""
    grads = problems.gradients(6)
    rates = [0.1, 0.1, 0.02, 0.02, 0.005, 0.005]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.02, 0.005])

    def by_hand(rates: list[float]) -> list[Any]:
        optimizer = _make(card)
        weights = problems.variables(problems.start())
        for rate, arrays in zip(rates, grads, strict=True):
            optimizer.learning_rate = rate
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        return [ops.convert_to_numpy(w) for w in weights]

    # Keras's schedules compute in float32
    for mode in ("eager", "graph"):
        got = problems.train(_make(card, learning_rate=schedule), grads, mode=mode)
        _close(got[-1], by_hand(rates), rtol=1e-6, what=mode)
    optimizer = _make(card, learning_rate=schedule)
    weights = problems.variables(problems.start())
    for i, arrays in enumerate(grads):
        if i == 3:
            optimizer.learning_rate = 0.01  # half of what the schedule says
            np.testing.assert_allclose(float(optimizer.learning_rate), 0.01, rtol=1e-6)
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    halved = rates[:3] + [rate / 2 for rate in rates[3:]]
    _close([ops.convert_to_numpy(w) for w in weights], by_hand(halved), rtol=1e-6, what="multiplier")


@check("optimizer", unless={"averages"}, engine=True)
@float64()
def check_average(card: Card) -> None:
    """The moving average follows its formula and is what the weights are set to at the end."""
    grads = problems.gradients(5)
    trajectory = problems.train(_make(card), grads)
    expected = trajectory[0]
    for arrays in trajectory[1:]:
        expected = [0.9 * a + 0.1 * w for a, w in zip(expected, arrays, strict=True)]
    optimizer = _make(card, use_ema=True, ema_momentum=0.9)
    weights = problems.variables(problems.start())
    for arrays in grads:
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    _equal([ops.convert_to_numpy(w) for w in weights], trajectory[-1], what="the average must not disturb")
    optimizer.finalize_variable_values(weights)
    _close([ops.convert_to_numpy(w) for w in weights], expected)


@check("optimizer", engine=True)
@float64()
def check_evaluation_weights(card: Card) -> None:
    """Going to the weights to evaluate at and back is exact, training does not notice it, and a file may hold either.

    `fit` ends at them, and a second `fit`, also of a model that was saved and loaded, goes on as if it had not.

    With the tag "recovers", which says that one set of weights is computed from the other, exact is up to rounding.
    """
    rtol, grads = 1e-6 if "recovers" in card.tags else 0.0, problems.gradients(9)

    def same(got: Any, expected: Any, what: str, more: float = 0.0) -> None:
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            np.testing.assert_allclose(a, b, rtol=rtol + more, atol=rtol + more, err_msg=f"{what} variable {i}")

    # that of `use_ema` does not depend on the rule
    cases = card.cases if "averages" in card.tags else card.cases[-1:]
    for case, mode in [*((case, "eager") for case in cases), (cases[-1], "graph")]:
        optimizer, weights = _make(card, case, **_ema(card)), problems.variables(problems.start())
        step, differ = problems.stepper(optimizer, weights, mode), False

        def values(weights: Any = weights) -> list[np.ndarray]:
            return [ops.convert_to_numpy(w).copy() for w in weights]

        expected = problems.train(_make(card, case, **_ema(card)), grads, mode=mode)
        # one that is compiled as a whole may be rounded otherwise where it takes the weights of training back itself
        rounding = 1e-12 if mode == "graph" and keras.config.backend() == "jax" else 0.0
        for i, arrays in enumerate(grads):
            step([ops.convert_to_tensor(g) for g in arrays])
            trained = values()
            same(trained, expected[i], f"{case} step {i}, which follows an evaluation,", rounding)
            optimizer.swap_weights(evaluating=True)
            shown = values()
            differ |= any(np.any(a != b) for a, b in zip(shown, trained, strict=True))
            assert optimizer.evaluating
            optimizer.swap_weights(evaluating=True)
            _equal(values(), shown, what=f"{case} asked for twice,")
            if i % 3 == 0:  # in the other steps the update takes the weights of training back itself
                optimizer.swap_weights(evaluating=False)
                assert not optimizer.evaluating
                same(values(), trained, f"{case} back from the evaluation,")
            elif i == 7:
                other, others = _make(card, case, **_ema(card)), problems.variables(shown)
                other.build(others)
                other.load_own_variables(problems.state_of(optimizer))
                assert other.evaluating
                problems.stepper(other, others, mode)([ops.convert_to_tensor(g) for g in grads[8]])
                same(values(others), expected[8], f"{case} loaded,", rounding)
        assert differ, f"{case}: the weights to evaluate at are those of training"
    _two_fits_are_one(card, 1e-5 if "recovers" in card.tags else 1e-7)


def _two_fits_are_one(card: Card, tolerance: float) -> None:
    case, (x, y) = card.cases[0], problems.regression()

    def fit(model: keras.Model, epochs: int) -> np.ndarray:
        model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        return _flat(model.get_weights())

    with op_determinism(), tempfile.TemporaryDirectory() as folder:
        models = [problems.network() for _ in range(2)]
        for model in models:
            model.compile(_make(card, case, **_ema(card)), loss="mse")
        expected = fit(models[0], 2)
        fit(models[1], 1)
        assert models[1].optimizer.evaluating
        models[1].save(Path(folder) / "model.keras")
        for how, model in (("", models[1]), ("loaded", keras.models.load_model(Path(folder) / "model.keras"))):
            np.testing.assert_allclose(fit(model, 1), expected, rtol=tolerance, atol=tolerance, err_msg=f"{case} {how}")


# -- state ------------------------------------------------------------------------------------------------------------


@check("optimizer", engine=True)
def check_save_load_continue(card: Card) -> None:
    """Training, saving, loading and going on equals the uninterrupted run bitwise: `.keras` and `.weights.h5`."""
    x, y = problems.regression()

    def go_on(model: keras.Model, epochs: int = 2) -> keras.Model:
        model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        model.train_on_batch(x[:16], y[:16])  # one micro-batch waits for others
        return model

    def compiled(**more: Any) -> keras.Model:
        model = problems.network()
        model.compile(_make(card, card.cases[-1], gradient_accumulation_steps=3, **more), loss="mse")
        return model

    with tempfile.TemporaryDirectory() as folder, op_determinism():
        model = go_on(compiled())
        model.optimizer.learning_rate = 0.5 * float(model.optimizer.learning_rate)  # a set rate is state, too
        model.save(Path(folder) / "model.keras")
        model.save_weights(Path(folder) / "model.weights.h5")
        expected = _flat(go_on(model).get_weights())
        loaded = keras.models.load_model(Path(folder) / "model.keras")
        np.testing.assert_array_equal(_flat(go_on(loaded).get_weights()), expected)
        other = compiled()
        other.optimizer.pack_below = 0  # a file does not depend on the packing
        other.load_weights(Path(folder) / "model.weights.h5")  # state that waits for the optimizer to be built
        np.testing.assert_allclose(_flat(go_on(other).get_weights()), expected, rtol=1e-6, atol=1e-7)


@check("optimizer", engine=True)
@float64()
def check_more_variables(card: Card) -> None:
    """Variables that join later begin as in an optimizer of their own, and those before keep their state.

    With a rule that has sums over the model they change each other, and only files are checked.
    """
    grads, values = problems.gradients(5), problems.start()
    separate = not contributes(_make(card).rule)
    for place in (0, 3):  # what joins in the third step
        rest = [i for i in range(len(values)) if i != place]
        optimizer, weights = _make(card, **_ema(card)), problems.variables(values)
        alone = _make(card, **_ema(card))
        expected = problems.train(alone, [[g[i] for i in rest] for g in grads], values=[values[i] for i in rest])[-1]
        for step, arrays in enumerate(grads):
            mine = rest if step < 2 else list(range(len(values)))
            if step == 2:
                optimizer.build(weights)
            optimizer.apply([ops.convert_to_tensor(arrays[i]) for i in mine], [weights[i] for i in mine])
        if separate:
            _close([ops.convert_to_numpy(weights[i]) for i in rest], expected, rtol=1e-12)
        own = _make(card, **_ema(card))
        late = problems.train(own, [[g[place]] for g in grads[2:]], values=[values[place]])[-1]
        if "averages" not in card.tags and separate:  # whose shares are those of the whole model
            _close([ops.convert_to_numpy(weights[place])], late, rtol=1e-12, what="the one that joined,")
        assert np.abs(ops.convert_to_numpy(weights[place]) - values[place]).max() > 0
        assert int(optimizer.iterations) == 5
        state, before = problems.state_of(optimizer), problems.state_of(alone)
        for name in before:
            part, _, index = name.rpartition(".")
            if index.isdecimal() and separate:
                np.testing.assert_allclose(state[f"{part}.{rest[int(index)]}"], before[name], rtol=1e-10, err_msg=name)
        fresh, copies = _make(card, **_ema(card)), problems.variables([ops.convert_to_numpy(w) for w in weights])
        fresh.build(copies)
        fresh.load_own_variables(state)  # a file has the order of the model, whoever came first
        for each, values_of in ((optimizer, weights), (fresh, copies)):
            each.apply([ops.convert_to_tensor(g) for g in grads[0]], values_of)
        _close([ops.convert_to_numpy(w) for w in copies], [ops.convert_to_numpy(w) for w in weights], rtol=1e-12)
    try:
        optimizer.build(problems.variables(values))
    except ValueError as error:
        assert "Unknown variables" in str(error)
    else:
        raise AssertionError("the variables of another model were accepted")


@check("optimizer", engine=True)
@float64()
def check_paths(card: Card) -> None:
    """No two variables have one path, and their values alone, all that an `.h5` file holds, are enough to continue."""
    settings = {"gradient_accumulation_steps": 2, "skip_nonfinite": 2, **_ema(card)}
    grads = [[ops.convert_to_tensor(g) for g in arrays] for arrays in problems.gradients(6)]
    optimizer, weights = _make(card, **settings), problems.variables(problems.start())
    for arrays in grads[:3]:
        optimizer.apply(arrays, weights)
    paths = [variable.path for variable in optimizer.variables]
    assert len(set(paths)) == len(paths), f"some paths occur twice: {sorted(paths)}"
    values = [ops.convert_to_numpy(w) for w in weights]
    other, copies = _make(card, **settings), problems.variables(values)
    other.build([])  # as Keras does, which does not know the weights then
    other.set_weights([ops.convert_to_numpy(variable) for variable in optimizer.variables])
    for arrays in grads[3:]:
        optimizer.apply(arrays, weights)
        other.apply(arrays, copies)
    _equal([ops.convert_to_numpy(w) for w in copies], [ops.convert_to_numpy(w) for w in weights], what="continued")


@check("optimizer", engine=True)
@float64()
def check_foreign_state(card: Card) -> None:
    """State of another optimizer, of another model or of Keras is refused with the difference, and nothing changes."""
    weights = problems.variables(problems.start())
    optimizer = _make(card)
    optimizer.apply([ops.convert_to_tensor(g) for g in problems.gradients(1)[0]], weights)
    mine = problems.state_of(optimizer)

    other_model = _make(card)
    other_model.build(problems.variables([np.ones((2, 2)), np.ones(3)]))
    renamed = dict(mine)
    schema = json.loads(mine["schema"].tobytes())
    renamed["schema"] = np.frombuffer(json.dumps(schema | {"optimizer": "elsewhere>Other"}).encode(), np.uint8)
    stock = keras.optimizers.SGD(0.1, momentum=0.9)
    stock.build(problems.variables(problems.start()))
    stock_state: dict[str, np.ndarray] = {}
    stock.save_own_variables(stock_state)
    for state, hint in (
        (problems.state_of(other_model), "(2, 2)"),
        (renamed, "elsewhere>Other"),
        (stock_state, "keras_optkit"),
    ):
        try:
            optimizer.load_own_variables(state)
        except ValueError as error:
            assert hint in str(error), f"the message does not show the difference: {error}"
        else:
            raise AssertionError(f"foreign state was accepted ({hint})")
        _equal(problems.state_of(optimizer).values(), mine.values())


@check("optimizer")
def check_learns(card: Card) -> None:
    """The loss of a small regression falls; the last and weakest check."""
    x, y = problems.regression()
    model = problems.network()
    model.compile(_make(card, learning_rate=0.05), loss="mse")
    losses = model.fit(x, y, batch_size=16, epochs=15, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0], f"loss went from {losses[0]} to {losses[-1]}"

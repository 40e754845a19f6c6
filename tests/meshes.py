"""Training on eight devices with `keras.distribution`, compared with one device; started by test_keras_distribution.py.

    KERAS_BACKEND=jax python tests/meshes.py [--all] [WORD ...]   # all checks, or those with a word in their names
    KERAS_BACKEND=jax python tests/meshes.py --planted            # bugs, each of which the check it names has to catch

Eight virtual devices of a CPU have to be asked for before JAX starts, hence a process of its own. A line is printed for
each check. Everything is computed in float64, where no weight is off from one device by more than 1e-15.
"""

# ruff: noqa: ARG001, ARG005 (what is wrong has the arguments of what is right)

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

DEVICES = 8
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
sys.modules["tensorflow"] = None  # which takes seconds to import, and nothing here needs it
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "__array__ implementation doesn't accept a copy keyword", DeprecationWarning)

import jax  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from keras.distribution import DataParallel, DeviceMesh, LayoutMap, ModelParallel, set_distribution  # noqa: E402

import keras_optkit as ok  # noqa: E402
from keras_optkit.optimizers import building  # noqa: E402
from keras_optkit.optimizers.engine import packing, placing  # noqa: E402
from keras_optkit.testing import problems  # noqa: E402

jax.config.update("jax_enable_x64", True)
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")

BATCH, BATCHES, INPUTS, OUTPUTS = 8, 4, 8, 3
O = ok.optimizers  # noqa: E741

#: By the path that the engine takes.
CASES = {
    "SGD, momentum": lambda **k: O.SGD(0.1, momentum=0.9, **k),
    "AdamW, all at once": lambda **k: O.AdamW(
        0.02, use_ema=True, gradient_accumulation_steps=2, global_clipnorm=0.1, skip_nonfinite=2, **k
    ),
    "LAMB": lambda **k: O.LAMB(0.02, **k),
    "Muon": lambda **k: O.Muon(0.02, gradient_accumulation_steps=2, **k),
    "SOAP": lambda **k: O.SOAP(0.02, initial_basis="identity", **k),
    "Adafactor": lambda **k: O.Adafactor(0.02, **k),
    "Prodigy": lambda **k: O.Prodigy(initial_d=0.01, **k),
    "ScheduleFree": lambda **k: O.ScheduleFreeAdamW(0.02, **k),
    "Lookahead": lambda **k: O.Lookahead("AdamW", 2, learning_rate=0.02, **k),
    "SAM": lambda **k: O.SAM(O.SGD(0.02, momentum=0.9), rho=0.2, **k),
}
PLAIN, AVERAGED = list(CASES)[:2]


def model_parallel():
    """Kernels that are split by columns and by rows over four devices, two of which groups there are."""
    layouts = LayoutMap(DeviceMesh((2, 4), ("batch", "model"), keras.distribution.list_devices()))
    layouts[".*columns/kernel"] = (None, "model")
    layouts[".*columns/bias"] = ("model",)
    layouts[".*rows/kernel"] = ("model", None)
    return ModelParallel(layout_map=layouts, batch_dim_name="batch")


LAYOUTS = {"one device": lambda: None, "data": DataParallel, "model": model_parallel}


def network():
    """Kernels that are split, equal ones that are stacked, and small variables whose size eight does not divide."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, "softsign", name=name) for name in ("columns", "equal", "equal_too")]
    return keras.Sequential([keras.Input((INPUTS,)), *layers, keras.layers.Dense(OUTPUTS, name="rows")])


def data(*, with_nan=False):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(BATCH * BATCHES, n)) for n in (INPUTS, OUTPUTS))
    if with_nan:
        x[1, 3] = np.nan
    return x, y


def compiled(case, layout, **keywords):
    set_distribution(LAYOUTS[layout]())
    model = network()
    optimizer = CASES[case](**keywords)
    optimizer.pack_below = 40  # so that some are alone
    model.compile(optimizer, loss="mse")
    return model


def fit(model, **how):
    x, y = data(with_nan=getattr(model.optimizer, "skip_nonfinite", None) is not None)
    model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, **how)
    return model


@functools.cache
def trained(case, layout, shard_state=False):
    return fit(compiled(case, layout, shard_state=shard_state))


def state_of(optimizer):
    return {name: value for name, value in problems.state_of(optimizer).items() if name != "schema"}


def assert_equal(model, other, **tolerance):
    """Weights and saved state, but for the place in a bucket of the last gradient that was not finite."""
    tolerance = tolerance or {"rtol": 1e-11, "atol": 1e-13}
    for got, expected in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(got, expected, **tolerance)
    got, expected = state_of(model.optimizer), state_of(other.optimizer)
    assert got.keys() == expected.keys(), got.keys() ^ expected.keys()
    for name in expected.keys() - {"nonfinite.bucket", "nonfinite.place"}:
        np.testing.assert_allclose(got[name], expected[name], err_msg=name, **tolerance)


def stored(optimizer):
    """The variables of state that is not a number, and their buckets."""
    state, buckets = optimizer._held.state, optimizer._held.buckets
    for name in ("slots", "average", "accumulated", "master"):
        for bucket, part in zip(buckets, getattr(state, name), strict=False):
            yield from ((bucket, v) for v in (part.values() if isinstance(part, dict) else [part]))


def share(variable):
    """The share of a variable that the device with the most of it holds."""
    return max(shard.data.size for shard in variable.value.addressable_shards) / variable.value.size


CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


def for_each(few=None, **values):
    """Decorator of a check with a parameter, which is one check for each value, without `--all` for a few of them."""
    ((parameter, names),) = values.items()

    def add(function):
        for name in names:
            if few is None or name in few or "--all" in sys.argv:
                CHECKS[f"{function.__name__}[{name}]"] = functools.partial(function, **{parameter: name})
        return function

    return add


# -- equal to one device ----------------------------------------------------------------------------------------------


@for_each(case=CASES, few=(AVERAGED, "Muon"))
def model_parallel_equals_one_device(case):
    model = trained(case, "model")
    state_lies_where_it_should(model)
    assert_equal(model, trained(case, "one device"))


@for_each(case=CASES, few=("Muon",))
def spread_state_equals_one_device(case):
    model = trained(case, "data", shard_state=True)
    state_lies_where_it_should(model)
    assert_equal(model, trained(case, "one device"))


@for_each(case=CASES, few=(PLAIN,))
def data_parallel_equals_one_device(case):
    model = trained(case, "data")
    state_lies_where_it_should(model)
    assert_equal(model, trained(case, "one device"))


@for_each(case=CASES, few=())
def both_equal_one_device(case):
    model = trained(case, "model", shard_state=True)
    state_lies_where_it_should(model)
    assert_equal(model, trained(case, "one device"))


@check
def a_gradient_that_is_not_finite_is_skipped_and_named():
    for layout in ("one device", "model"):
        found = trained(AVERAGED, layout).optimizer.nonfinite
        assert (found.skipped, found.in_a_row) == (1, 0), found
        assert re.search("kernel|bias", found.variable), found


def narrow_state(optimizer, layout):
    """A wide model after three given gradients, compiled, with the values of all variables."""
    set_distribution(LAYOUTS[layout]())
    keras.utils.set_random_seed(0)
    names = ("columns", "equal", "equal_too", "rows") if "--all" in sys.argv else ("columns", "rows")
    model = keras.Sequential([keras.Input((64,)), *[keras.layers.Dense(80, name=name) for name in names]])
    optimizer.build(model)
    return stepped(model, optimizer, 3)


@for_each(dtype=("bfloat16+8", "int8"), few=("bfloat16+8",))
def narrow_state_equals_one_device(dtype):
    for make in (O.AdamW, O.Muon)[: 1 + ("--all" in sys.argv)]:
        one = narrow_state(make(0.02, slot_dtype=dtype), "one device")
        layouts = (("model", {"shard_state": True}), ("data", {"shard_state": True}), ("model", {}))
        for layout, keywords in layouts[: 1 + 2 * ("--all" in sys.argv)]:
            model = narrow_state(make(0.02, slot_dtype=dtype, **keywords), layout)
            assert_equal(model, one, rtol=1e-6, atol=1e-9)
            parts = [v for slots in model.optimizer._held.state.slots for v in keras.tree.flatten(slots)]
            split = [v for v in parts if share(v) < 1 and v.dtype in ("uint8", "int8")]
            assert len(split) >= 2, f"{make.__name__}, {layout}: {[(v.path, share(v)) for v in parts]}"


def half_precision(case, layout, **keywords):
    """Bfloat16 weights after three given gradients, since other gradients would differ by their own rounding."""
    set_distribution(LAYOUTS[layout]())
    keras.config.set_dtype_policy("bfloat16")
    try:
        model, optimizer = network(), CASES[case](master_weights=True, **keywords)
    finally:
        keras.config.set_dtype_policy("float64")
    optimizer.build(model)
    return stepped(model, optimizer, 3)


def stepped(model, optimizer, steps):
    """The model after compiled updates with given gradients."""
    rng = np.random.default_rng(0)
    step = jax.jit(optimizer.stateless_apply)
    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in optimizer.variables]
    for _ in range(steps):
        weights, state = step(state, [rng.normal(size=v.shape).astype("float32") for v in weights], weights)
    for variable, value in zip([*model.trainable_variables, *optimizer.variables], [*weights, *state], strict=True):
        variable.assign(value)
    model.optimizer = optimizer
    return model


@for_each(case=[PLAIN, "Muon"], few=(PLAIN,))
def masters_equal_those_of_one_device(case):
    one, exact = half_precision(case, "one device"), {"rtol": 1e-5, "atol": 1e-6}  # of float32
    for layout, keywords in (("data", {"shard_state": True}), ("model", {}))[: 1 + ("--all" in sys.argv)]:
        model = half_precision(case, layout, **keywords)
        expected, got = (state_of(m.optimizer) for m in (one, model))
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], err_msg=f"{layout}: {name}", **exact)
        state_lies_where_it_should(model)


@check
def mixed_precision_trains_as_on_one_device():
    """With a loss that is scaled; half precision rounds otherwise where batches are split."""
    keras.config.set_dtype_policy("mixed_float16")
    try:
        models = [fit(compiled(PLAIN, "one device")), fit(compiled(PLAIN, "data", shard_state=True))]
    finally:
        keras.config.set_dtype_policy("float64")
    for model in models:
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    for got, expected in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-3)


# -- where state is ---------------------------------------------------------------------------------------------------


def state_lies_where_it_should(model):
    """State in the shape of a weight as the weight does, what is packed on every device or in equal parts."""
    optimizer, seen = model.optimizer, 0
    variables, spread = optimizer._held.variables, optimizer.shard_state
    for bucket, variable in stored(optimizer):
        weights = [variables[i].value.sharding for i in bucket.indices]
        split = [not sharding.is_fully_replicated for sharding in weights]
        assert not any(split) or len(split) == 1, f"{variable.path} is of weights that are split, and others"
        where, size = variable.value.sharding, variable.value.size
        as_weight = tuple(variable.shape) == tuple(variables[bucket.indices[0]].shape)
        if not spread:
            expected = weights[0] if as_weight and split[0] else None
            right = where.is_fully_replicated if expected is None else where.is_equivalent_to(expected, variable.ndim)
            assert right, f"{variable.path} {variable.shape}: {where.spec} and not {expected and expected.spec}"
        else:
            parts = where.mesh.shape["batch"] * (where.mesh.shape["model"] if split[0] and as_weight else 1)
            can = any(n % where.mesh.shape["batch"] == 0 for n in variable.shape)
            assert not can or share(variable) == 1 / parts, f"{variable.path} {variable.shape}: {where.spec}"
            assert can or size < 40, f"{variable.path} {variable.shape} is not spread"
        seen += 1
    assert seen


@check
def bytes_on_a_device():
    """Of two moments, an average and accumulated gradients in float64, but for padding each number is on one device."""
    model = trained(AVERAGED, "data", shard_state=True)
    held = sum(shard.data.nbytes for _, v in stored(model.optimizer) for shard in v.value.addressable_shards)
    exact = 4 * 8 * sum(w.size for w in model.get_weights())
    assert exact <= held <= exact + 4 * 8 * DEVICES * len(model.optimizer._held.buckets), (held, exact)


@check
def weights_that_join_are_placed_as_well():
    models = {}
    for layout in ("one device", "model"):
        model = models[layout] = compiled(PLAIN, layout, shard_state=layout == "model")
        for name in ("equal", "rows"):
            model.get_layer(name).trainable = False
        model.compile(model.optimizer, loss="mse")
        fit(model)
        for name in ("equal", "rows"):
            model.get_layer(name).trainable = True
        model.compile(model.optimizer, loss="mse")
        fit(model)
    state_lies_where_it_should(models["model"])
    set_distribution(None)
    assert_equal(models["model"], models["one device"])


# -- steps ------------------------------------------------------------------------------------------------------------


def step_in_hlo(case, layout, **keywords):
    model = trained(case, layout, **keywords)
    set_distribution(LAYOUTS[layout]())
    held = [
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    ]
    state = tuple([v.value for v in variables] for variables in held)
    where = tuple([value.sharding for value in values] for values in state)
    distribution = keras.distribution.distribution()
    batch = [a[:BATCH] for a in data()]
    batch = [jax.device_put(a, distribution.get_data_layout(a.shape).backend_layout) for a in batch]
    step = jax.jit(model.train_step, donate_argnums=0, out_shardings=(None, where)).lower(state, batch).compile()
    moved = re.compile(r"= \S+ (all-gather|collective-permute|all-to-all)(?:-start)?\(")
    lines = [line for line in step.as_text().splitlines() if moved.search(line) and "jvp(" not in line]
    return lines, step.memory_analysis(), state, model


@for_each(layout=["data", "model"])
def an_update_moves_no_state(layout):
    """Only gradients, to where they are laid end to end. Nor is state copied: every byte is given away to the step."""
    moved, memory, state, _ = step_in_hlo(PLAIN, layout)
    assert all("/concatenate" in line and "all-gather" in line for line in moved), moved
    assert memory.alias_size_in_bytes >= sum(v.addressable_shards[0].data.nbytes for part in state for v in part)


@check
def an_update_with_spread_state_moves_the_new_weights_alone():
    moved, memory, state, model = step_in_hlo(PLAIN, "data", shard_state=True)
    assert len(moved) <= len(model.optimizer._held.buckets), moved
    assert all("all-gather" in line for line in moved), moved
    assert memory.alias_size_in_bytes >= sum(v.addressable_shards[0].data.nbytes for part in state for v in part)


@for_each(layout=["data", "model"], few=("data",))
def a_loop_of_ones_own_keeps_the_layouts(layout):
    """`jax.jit` is told of none."""
    model = compiled(PLAIN, layout, shard_state=True)
    optimizer, weights = model.optimizer, model.trainable_variables
    optimizer.build(weights)
    before = [v.value.sharding for v in [*weights, *optimizer.variables]]
    rng = np.random.default_rng(0)
    values, held = [v.value for v in weights], [v.value for v in optimizer.variables]
    step = jax.jit(optimizer.stateless_apply)
    for _ in range(2):
        values, held = step(held, [rng.normal(size=v.shape) for v in weights], values)
    for variable, old, new in zip([*weights, *optimizer.variables], before, [*values, *held], strict=True):
        assert variable.ndim == 0 or new.sharding.is_equivalent_to(old, new.ndim), (variable.path, old, new.sharding)


@for_each(layout=["data", "model"], few=("model",))
def callbacks_are_in_the_step(layout):
    """Keras asks for layouts where a callback has the step made again, in the middle of an epoch."""
    model = fit(compiled(PLAIN, layout), callbacks=[ok.callbacks.NonFiniteGuard()])
    state_lies_where_it_should(model)
    assert_equal(model, trained(PLAIN, "one device"))


@for_each(case=CASES, few=())
def eager_steps_equal_compiled_ones(case):
    model = compiled(case, "data", shard_state=True)
    model.run_eagerly = True
    fit(model)
    state_lies_where_it_should(model)
    assert_equal(model, trained(case, "one device"))


# -- files ------------------------------------------------------------------------------------------------------------


@check
def files_do_not_depend_on_the_layout():
    with tempfile.TemporaryDirectory() as directory, packing_below(40):
        file = Path(directory) / "model.keras"
        split = trained(AVERAGED, "model")
        split.save(file)
        set_distribution(None)
        one = keras.models.load_model(file)
        assert_equal(one, split, rtol=0, atol=0)
        fit(one)
        assert_equal(one, fit(compiled(AVERAGED, "one device"), epochs=2))
        one.save(file)
        set_distribution(model_parallel())
        split = keras.models.load_model(file)
        assert_equal(split, one, rtol=0, atol=0)
        state_lies_where_it_should(split)


@contextlib.contextmanager
def packing_below(size):
    old, O.Optimizer.pack_below = O.Optimizer.pack_below, size
    try:
        yield
    finally:
        O.Optimizer.pack_below = old


@check
def a_file_of_spread_state_opens_on_one_device():
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "model.keras"
        model = trained(AVERAGED, "data", shard_state=True)
        model.save(file)
        set_distribution(None)
        with told("left without state for now: shard_state must be False without a distribution, got True"):
            loaded = keras.models.load_model(file)
        assert loaded.optimizer.shard_state
        with raised("shard_state must be False without a distribution, got True.*shard_state = False.* None"):
            fit(loaded)
        loaded.optimizer.shard_state = False
        loaded.optimizer.build(loaded.trainable_variables)
        assert_equal(loaded, model, rtol=0, atol=0)


@check
def a_run_resumes_on_another_layout():
    """From where an epoch has ended."""

    class Stop(Exception):
        pass

    class Stops(keras.callbacks.Callback):
        stateless = True

        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise Stop

    with tempfile.TemporaryDirectory() as directory:
        with contextlib.suppress(Stop):
            fit(compiled(PLAIN, "model"), epochs=2, callbacks=[ok.callbacks.Resume(directory), Stops()])
        model = compiled(PLAIN, "data")
        fit(model, epochs=2, callbacks=[ok.callbacks.Resume(directory)])
    assert_equal(model, fit(compiled(PLAIN, "one device"), epochs=2))


# -- what is refused --------------------------------------------------------------------------------------------------


def raised(pattern):
    return pytest.raises(ValueError, match=re.compile(pattern, re.DOTALL))


@contextlib.contextmanager
def told(pattern):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert any(re.search(pattern, str(each.message)) for each in found), [str(each.message) for each in found]


@check
def shard_state_needs_a_distribution():
    with raised("shard_state must be False without a distribution, got True.*jax, the distribution None"):
        fit(compiled(PLAIN, "one device", shard_state=True))


@check
def shard_state_needs_weights_on_the_mesh():
    set_distribution(None)
    weights = network().trainable_variables
    set_distribution(DataParallel())
    with raised("shard_state must be False for weights .*got True.*columns/kernel is not on one with the axis 'batch'"):
        O.AdamW(shard_state=True).build(weights)


@check
def state_that_cannot_be_spread_is_told():
    set_distribution(DataParallel())
    weights = keras.Variable(np.zeros((259, 255)), name="odd")
    with told(r"shard_state=True of muon\S* leaves state as it is .*\(259, 255\) of .*odd \(8 parts\)"):
        O.Muon(shard_state=True, exclude_output=False).build([weights])
    O.Adafactor(shard_state=True).build([weights])  # has no state that is large
    optimizer = O.AdamW(shard_state=True)  # of which an element-wise rule can have it as one row
    optimizer.build([weights])
    assert [v.shape for _, v in stored(optimizer)] == [(1, 259 * 255 + 3)] * 2


# -- bugs that are planted --------------------------------------------------------------------------------------------


def replicated(right):
    """State of a split weight on every device."""
    return lambda self, shape: self.placement and self.placement.whole


def packed(right):
    return lambda self, i: False


def as_the_weight(right):
    """State that is to be spread lies as its weight does."""
    return lambda variables, shard_state: right(variables, shard_state=False)


def with_padding(right):
    def separate(self, values):
        padded = dataclasses.replace(self, placement=None)
        parts = right(padded, values)
        if self.form == "flat" and self._padding:
            parts[0] = np.roll(parts[0], 1)
        return parts

    return separate


def left_there(right):
    return lambda plan, state: state


#: What is wrong, where, the function that makes it so, and the check that has to fail.
BUGS = {
    "state of a split weight is on every device": (
        packing.Bucket,
        "layout",
        replicated,
        f"model_parallel_equals_one_device[{PLAIN}]",
    ),
    "split weights are packed with others": (
        placing.Places,
        "alone",
        packed,
        f"model_parallel_equals_one_device[{PLAIN}]",
    ),
    "split weights are stacked with others": (
        placing.Places,
        "alone",
        packed,
        "model_parallel_equals_one_device[Muon]",
    ),
    "spread state is where its weight is": (
        building,
        "places_of",
        as_the_weight,
        f"spread_state_equals_one_device[{PLAIN}]",
    ),
    "the zeros behind packed state are in files": (
        packing.Bucket,
        "separate",
        with_padding,
        f"spread_state_equals_one_device[{PLAIN}]",
    ),
    "a step leaves its results where XLA has put them": (
        placing,
        "joined",
        left_there,
        "a_loop_of_ones_own_keeps_the_layouts[data]",
    ),
}


def main(words):
    """Runs checks, and prints a line for each; 1 if one fails, or a planted bug is not caught."""
    if words == ["--planted"]:
        failed = 0
        for what, (owner, name, make, caught_by) in BUGS.items():
            trained.cache_clear()
            right = getattr(owner, name)
            setattr(owner, name, make(right))
            try:
                message = failure(caught_by)
            finally:
                setattr(owner, name, right)
            failed += message is None
            print(f"{'NOT CAUGHT' if message is None else 'caught'} {what} | {caught_by} | {message}", flush=True)
        return int(failed > 0)
    failed, words = 0, [word for word in words if word != "--all"]
    for name in CHECKS:
        if not words or any(word in name for word in words):
            start = time.process_time()
            message = failure(name)
            failed += message is not None
            took = f"({time.process_time() - start:.1f} s)"
            print(f"{'FAILED' if message else 'passed'} {name} {took} {message or ''}".strip(), flush=True)
    return int(failed > 0)


def failure(name):
    """What a check fails with, in one line, or None if it passes."""
    try:
        CHECKS[name]()
    except Exception as error:  # in whatever way
        if "MESHES_TRACEBACK" in os.environ:
            traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    finally:
        set_distribution(None)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

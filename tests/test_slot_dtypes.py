"""State in fewer bits in everything that an optimizer does with state."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_optkit as ok
from keras_optkit.callbacks.state import TrainingState
from keras_optkit.optimizers.rule import Rule
from keras_optkit.private import op_determinism
from keras_optkit.testing import problems
from keras_optkit.testing.memory import bytes_per_parameter, main, network
from keras_optkit.testing.tools import float64

NARROW = ("int8", "bfloat16+8")
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 64)).astype("float32"), RNG.normal(size=(64, 3)).astype("float32")


def compiled(slot_dtype, pack_below=None, **how):
    """A model with kernels that are quantised and stacked or alone, all keywords at once."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, "tanh", name=name) for name in ("one", "two")]
    model = keras.Sequential([keras.Input((64,)), *layers, keras.layers.Dense(3, name="three")], name="model")
    optimizer = ok.optimizers.AdamW(
        1e-2, slot_dtype=slot_dtype, use_ema=True, gradient_accumulation_steps=3, skip_nonfinite=2, name="narrow"
    )
    if pack_below is not None:
        optimizer.pack_below = pack_below
    model.compile(optimizer, loss="mse", **how)
    return model


def fit(model):
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    model.train_on_batch(X[:16], Y[:16])  # a micro-batch waits
    return model


def flat(model):
    return np.concatenate([np.ravel(w) for w in model.get_weights()])


def parts(optimizer):
    return keras.tree.flatten(optimizer._held.state.slots)


@pytest.mark.long
@pytest.mark.parametrize("slot_dtype", NARROW)
def test_every_way_to_save_continues_bitwise(slot_dtype, tmp_path):
    with op_determinism():
        model = fit(compiled(slot_dtype))
        model.save(tmp_path / "model.keras")
        model.save_weights(tmp_path / "model.weights.h5")
        tree, bundle = model.get_state_tree("numpy_array"), TrainingState.of(model)
        others = {"keras": keras.models.load_model(tmp_path / "model.keras")}
        for name, below in (("weights", 0), ("tree", None), ("tree, unpacked", 0), ("bundle", 0)):
            others[name] = compiled(slot_dtype, below)
            others[name].optimizer.build(others[name].trainable_variables)
        others["weights"].load_weights(tmp_path / "model.weights.h5")
        for name in ("tree", "tree, unpacked"):
            others[name].set_state_tree(tree)
        bundle.into(others["bundle"])
        state = problems.state_of(model.optimizer)
        for name, other in others.items():
            for entry, value in problems.state_of(other.optimizer).items():
                if entry not in ("schema", "nonfinite.bucket", "nonfinite.place"):
                    np.testing.assert_array_equal(value, state[entry], err_msg=f"{name}: {entry}")
        expected = flat(fit(model))
        for name in ("keras", "tree"):  # of the same packing
            np.testing.assert_array_equal(flat(fit(others[name])), expected, err_msg=name)
        np.testing.assert_allclose(flat(fit(others["bundle"])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("slot_dtype", NARROW)
def test_fit_in_all_modes_trains_like_float32(slot_dtype):
    modes = {"graph": {"jit_compile": False}, "xla": {"jit_compile": True}, "eager": {"run_eagerly": True}}
    found = {name: flat(fit(compiled(slot_dtype, **how))) for name, how in modes.items()}
    exact = flat(fit(compiled(None)))
    moved = np.abs(exact - flat(compiled(None))).mean()
    for name, weights in found.items():
        assert np.abs(weights - exact).mean() < 0.03 * moved, name
        assert np.abs(weights - found["graph"]).mean() < 1e-3 * moved, name


def test_state_of_another_dtype_is_rounded_to_the_own_one():
    wide, narrow = fit(compiled(None)), compiled("int8")
    narrow.optimizer.build(narrow.trainable_variables)
    narrow.optimizer.load_own_variables(problems.state_of(wide.optimizer))
    state, exact = problems.state_of(narrow.optimizer), problems.state_of(wide.optimizer)
    assert 0 < np.abs(state["slot.m.0"] - exact["slot.m.0"]).max() <= 0.008 * np.abs(exact["slot.m.0"]).max()
    np.testing.assert_array_equal(state["slot.m.1"], exact["slot.m.1"])  # of a bias, in float32
    back = compiled(None)
    back.optimizer.build(back.trainable_variables)
    back.optimizer.load_own_variables(state)
    np.testing.assert_array_equal(problems.state_of(back.optimizer)["slot.m.0"], state["slot.m.0"])


@pytest.mark.parametrize("slot_dtype", NARROW)
def test_what_has_no_gradient_and_what_is_skipped_keeps_its_state_bitwise(slot_dtype):
    shapes = [(64, 80), (64, 80), (3,)]
    weights = problems.variables(problems.start(shapes), "float32")
    optimizer = ok.optimizers.Muon(0.01, slot_dtype=slot_dtype, skip_nonfinite=3, exclude_output=False)
    grads = [[ops.convert_to_tensor(g, dtype="float32") for g in step] for step in problems.gradients(4, shapes)]
    optimizer.apply(grads[0], weights)
    assert any(b.form == "stacked" and len(b.indices) == 2 for b in optimizer._held.buckets)
    before = problems.state_of(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        optimizer.apply([None, *grads[1][1:]], weights)
    middle = problems.state_of(optimizer)
    np.testing.assert_array_equal(middle["slot.m.0"], before["slot.m.0"])
    assert np.any(middle["slot.m.1"] != before["slot.m.1"])
    held = [np.array(ops.convert_to_numpy(ops.cast(v, "float32"))) for v in parts(optimizer)]
    optimizer.apply([grads[2][0] * np.inf, *grads[2][1:]], weights)
    assert optimizer.nonfinite.skipped == 1
    for variable, value in zip(parts(optimizer), held, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(variable, "float32")), value)


def test_small_parameters_and_embeddings_stay_in_float32():
    words = keras.Input((4,), dtype="int32")
    x = keras.layers.Dense(64)(keras.layers.Flatten()(keras.layers.Embedding(200, 32)(words)))
    model = keras.Model(words, keras.layers.Dense(63)(x))  # with kernels of 8192 and 4032 elements
    optimizer = ok.optimizers.Lion(1e-3, slot_dtype="int8")
    rows = optimizer.explain(model).rows
    sizes = {row.path: (row.state_bytes, int(np.prod(row.shape))) for row in rows}
    quantised = [path for path, (held, size) in sizes.items() if held < 4 * size]
    assert [sizes[path] for path in quantised] == [(8192 + 4 * 32, 8192)]
    assert all(held == 4 * size for path, (held, size) in sizes.items() if path not in quantised)
    size = sum(int(np.prod(w.shape)) for w in model.trainable_variables)
    assert bytes_per_parameter(optimizer, model) == pytest.approx(sum(row.state_bytes for row in rows) / size)


@pytest.mark.only_on("tensorflow", because="gradients of rows are those of TensorFlow")
@pytest.mark.parametrize("slot_dtype", NARROW)
def test_rows_of_an_embedding(slot_dtype):
    """Of a layer's table single rows are updated; other variables whose state is quantised are updated as a whole."""
    import tensorflow as tf

    results = {}
    for dtype in (None, slot_dtype):
        for layer in (True, False):
            keras.utils.set_random_seed(0)
            table = keras.layers.Embedding(1400, 50)
            model = keras.Sequential([keras.Input((3,), dtype="int32"), table])
            weight = table.embeddings if layer else keras.Variable(np.ones((1400, 50)), dtype="float32")
            optimizer = ok.optimizers.Adam(0.1, slot_dtype=dtype)
            optimizer.build(model if layer else [weight])
            for rows in ([1, 3, 1], [3, 7, 9]):
                values = tf.constant(np.random.default_rng(rows[1]).normal(size=(3, 50)), "float32")
                optimizer.apply([tf.IndexedSlices(values, tf.constant(rows), tf.constant([1400, 50]))], [weight])
            results[dtype, layer] = ops.convert_to_numpy(weight)
            if dtype == "int8":
                assert {v.dtype for v in parts(optimizer)} == ({"float32"} if layer else {"uint8", "float32"})
    for layer in (True, False):
        exact, got = results[None, layer], results[slot_dtype, layer]
        untouched = [row for row in range(20) if row not in (1, 3, 7, 9)]
        np.testing.assert_array_equal(got[untouched], exact[untouched])
        assert np.abs(got - exact).max() < 0.05 * 0.1


@pytest.mark.long
@pytest.mark.only_on("tensorflow", because="tf.distribute")
@pytest.mark.parametrize("slot_dtype", NARROW)
def test_two_replicas_hold_the_same_and_their_file_opens_on_one(slot_dtype, tmp_path):
    with problems.two_replicas().scope():
        pair = compiled(slot_dtype)
    fit(pair)
    for variable in parts(pair.optimizer):
        one, two = variable.value.values
        assert one.numpy().tobytes() == two.numpy().tobytes()
    pair.save(tmp_path / "model.keras")
    single = keras.models.load_model(tmp_path / "model.keras")
    expected = problems.state_of(pair.optimizer)
    for name, value in problems.state_of(single.optimizer).items():
        if name != "schema":
            np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_rounding_at_random_lets_a_mean_in_8_bits_follow():
    """With β₂ = 0.999 a mean below the largest of its block stands still without."""
    means = {}
    for at_random in (False, True):
        optimizer = ok.optimizers.Adam(1e-4, slot_dtype="int8", stochastic_rounding=at_random)
        g = np.full(8192, 0.7)
        g[::256] = 1.0
        first = [[np.where(g == 1, 1.0, 0.1)]] * 5
        problems.train(optimizer, [*first, *[[g]] * 400], values=[np.zeros(8192)], dtype="float32", mode="graph")
        v = problems.state_of(optimizer)["slot.v.0"]
        means[at_random] = v[g < 1].mean() / v[g == 1].mean()
    exact = 0.49 * (1 - 0.999**400) / (1 - 0.999**405)
    assert means[True] == pytest.approx(exact, rel=0.01)
    assert abs(means[False] - exact) > 0.02 * exact


def test_names_and_configs():
    optimizer = ok.optimizers.AdamW(state_dtype="int8")
    assert optimizer.slot_dtype == optimizer.state_dtype == "int8"
    config = optimizer.get_config()
    assert (config["slot_dtype"], config.pop("state_dtype")) == ("int8", None)
    assert ok.optimizers.AdamW.from_config(config).state_dtype == "int8"  # as saved before there were two names
    optimizer.state_dtype = "bfloat16+8"
    assert optimizer.slot_dtype == "bfloat16+8"
    assert ok.optimizers.AdamW(slot_dtype="int8", state_dtype="int8").slot_dtype == "int8"
    with pytest.raises(
        ValueError, match="another name for slot_dtype, got slot_dtype='int8' and state_dtype='bfloat16'"
    ):
        ok.optimizers.AdamW(slot_dtype="int8", state_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"state_dtype must be one of None, .*, got 'int4'"):
        ok.optimizers.AdamW(state_dtype="int4")
    around = ok.optimizers.Lookahead(ok.optimizers.AdamW(state_dtype="int8"))
    assert around.slot_dtype == "int8"


@pytest.mark.parametrize(
    ("optimizer", "slot"),
    [(ok.optimizers.Adagrad, "G"), (ok.optimizers.DoG, "start"), (ok.optimizers.Rprop, "factor, sign")],
)
def test_state_that_cannot_be_rounded_so_coarsely_is_refused(optimizer, slot):
    with pytest.raises(
        ValueError, match=rf"slot_dtype must be .*, got 'int8': its state \({slot}\) has no running mean"
    ):
        optimizer(slot_dtype="int8").build(problems.variables([np.ones(3)], "float32"))


def test_a_rule_of_ones_own_declares_its_moments():
    class Momentum(Rule):
        layout = "elementwise"

        def slots(self, w=None):
            return {"m": ok.optimizers.moment(), "sum": 0.0}

        def update(self, u, slots, p, h):
            m = 0.9 * slots["m"] + u
            return h.learning_rate * m, {"m": m, "sum": slots["sum"] + u}

    optimizer = ok.optimizers.Optimizer(0.1, Momentum(), slot_dtype="int8")
    with float64():
        problems.train(optimizer, problems.gradients(2, [(64, 80)]), values=problems.start([(64, 80)]))
    assert [v.dtype for v in parts(optimizer)] == ["uint8", "float32", "float64"]


def test_bytes_are_printed_for_optimizers(capsys):
    assert main(["AdamW", "Adagrad"]) == 0
    head, _, adagrad, adamw = capsys.readouterr().out.splitlines()
    assert head == "| bytes per parameter | float32 | `bfloat16` | `bfloat16+8` | `int8` |"
    assert adagrad == "| Adagrad | 4.00 | 2.00 | 3.00 | - |"
    assert adamw.startswith("| AdamW | 8.00 | 4.00 | 6.00 | ")
    assert bytes_per_parameter(ok.optimizers.SGD(), network()) == 0

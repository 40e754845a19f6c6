"""Transforms of gradients and of steps: parity, their place in a step, and what refuses them."""

import contextlib
import itertools
from dataclasses import dataclass

import keras
import numpy as np
import pytest
from keras import layers, ops
from torch_references import corrected_decay_run, in_torch, optax_chain_run

import keras_optkit as ok
from keras_optkit.testing import problems
from keras_optkit.testing.tools import float64
from keras_optkit.testing.twins import transforms as twins
from keras_optkit.testing.twins.optimizers import TWINS

AdaptiveClip, Centralize = ok.optimizers.transforms.AdaptiveClip, ok.optimizers.transforms.Centralize
CautiousDecay, CautiousUpdate = ok.optimizers.transforms.CautiousDecay, ok.optimizers.transforms.CautiousUpdate
ClipByGlobalNorm, ClipByNorm = ok.optimizers.transforms.ClipByGlobalNorm, ok.optimizers.transforms.ClipByNorm
ClipByValue = ok.optimizers.transforms.ClipByValue
CorrectedDecay, GradientNoise = ok.optimizers.transforms.CorrectedDecay, ok.optimizers.transforms.GradientNoise

#: Layers whose kernels optax sees as we do once their axes are in its order, with the shapes of their inputs.
LAYERS = {
    "dense": (lambda: layers.Dense(6), (None, 4)),
    "convolution": (lambda: layers.Conv2D(4, 3), (None, 8, 8, 2)),
    "query": (lambda: layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (None, 5, 8)),
    "merged": (lambda: layers.EinsumDense("abcd,cde->abe", (None, 5)), (None, 5, 2, 3)),
    "table": (lambda: layers.Embedding(7, 3), (None, 2)),
}


class Parts(keras.Model):
    def __init__(self, dtype):
        super().__init__(dtype=dtype)
        self.parts = []
        for make, shape in LAYERS.values():
            layer = make()
            layer = type(layer).from_config({**layer.get_config(), "dtype": dtype})
            layer.build(shape)
            self.parts.append(layer)
        self.built = True


def as_optax_has_it(path, x):
    """A kernel as a matrix from inputs to outputs, an embedding as one from dimensions to rows."""
    if x.ndim == 1 or "bias" in path:
        return x.reshape(-1)
    if "embedding" in path:
        return x.T
    return x.reshape(x.shape[0], -1) if x.shape == (8, 2, 3) else x.reshape(-1, x.shape[-1])


@pytest.mark.few(2)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.long), "float64"])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ([AdaptiveClip(0.05)], [("adaptive_grad_clip", {"clipping": 0.05})]),
        ([ClipByNorm(0.3)], [("clip_by_block_rms", {"threshold": 0.3})]),  # which divides by the root of the size
        (
            [ClipByValue(0.2), ClipByGlobalNorm(0.5)],
            [("clip", {"max_delta": 0.2}), ("clip_by_global_norm", {"max_norm": 0.5})],
        ),
        (
            [AdaptiveClip(0.05, epsilon=1.0), ClipByGlobalNorm(0.1)],  # some units are smaller than that, some larger
            [("adaptive_grad_clip", {"clipping": 0.05, "eps": 1.0}), ("clip_by_global_norm", {"max_norm": 0.1})],
        ),
    ],
    ids=["adaptive", "norm", "value, global norm", "adaptive, global norm"],
)
def test_transforms_are_optaxs(ours, theirs, dtype):
    with float64():
        model = Parts(dtype)
        names = [v.path for v in model.trainable_variables]
        rng = np.random.default_rng(0)
        start = [np.asarray(0.5 * rng.normal(size=v.shape)) for v in model.trainable_variables]
        grads = [[np.asarray(rng.normal(size=v.shape)) for v in model.trainable_variables] for _ in range(100)]
        if isinstance(ours[0], ClipByNorm):  # all of one size, so that the root mean square has one threshold
            theirs = [(name, {"threshold": 0.3 / np.sqrt(24)}) for name, _ in theirs]
            kept = [i for i, x in enumerate(start) if x.size == 24]
        else:
            kept = list(range(len(start)))
        for variable, value in zip(model.trainable_variables, start, strict=True):
            variable.assign(value)
        optimizer = ok.optimizers.SGD(0.1, momentum=0.9, transforms=ours)
        optimizer.build(model)
        for arrays in grads:
            optimizer.apply([ops.convert_to_tensor(g, dtype) for g in arrays])
        got = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    reference = in_torch(
        optax_chain_run,
        [*theirs, ("sgd", {"learning_rate": 0.1, "momentum": 0.9})],
        [as_optax_has_it(names[i], start[i]) for i in kept],
        [[as_optax_has_it(names[i], g[i]) for i in kept] for g in grads],
        dtype,
    )[-1]
    tolerance = 1e-5 if dtype == "float32" else 1e-9
    for i, theirs in zip(kept, reference, strict=True):
        np.testing.assert_allclose(
            as_optax_has_it(names[i], got[i]), theirs, rtol=tolerance, atol=tolerance, err_msg=names[i]
        )


def test_centralize_is_optaxs_with_the_units_first():
    with float64():
        model = Parts("float64")
        names = [v.path for v in model.trainable_variables]
        rng = np.random.default_rng(0)
        grads = [np.asarray(rng.normal(size=v.shape)) for v in model.trainable_variables]
        start = [ops.convert_to_numpy(v) for v in model.trainable_variables]
        optimizer = ok.optimizers.SGD(1.0, transforms=[Centralize()])
        optimizer.build(model)
        optimizer.apply([ops.convert_to_tensor(g) for g in grads])
        steps = [a - ops.convert_to_numpy(v) for a, v in zip(start, model.trainable_variables, strict=True)]
    kernels = [i for i, name in enumerate(names) if "kernel" in name]
    assert len(kernels) == 4
    units = [as_optax_has_it(names[i], grads[i]).T for i in kernels]
    reference = in_torch(
        optax_chain_run, [("centralize", {}), ("sgd", {"learning_rate": 1.0})], units, [units], "float64"
    )[-1]
    for i, unit, moved in zip(kernels, units, reference, strict=True):
        np.testing.assert_allclose(as_optax_has_it(names[i], steps[i]).T, unit - moved, rtol=1e-12, atol=1e-12)
    for i in set(range(len(names))) - set(kernels):
        np.testing.assert_allclose(steps[i], grads[i], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape", "units"),
    [
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), (None, 8, 8, 3), (0, 1)),
        (lambda: layers.Conv2DTranspose(4, 3), (None, 8, 8, 2), (0, 1, 3)),
        (lambda: layers.Conv2D(4, 3, groups=2), (None, 8, 8, 4), (0, 1, 2)),
        (lambda: layers.Embedding(7, 3), (None, 2), (1,)),
    ],
    ids=["depthwise", "transposed", "grouped", "embedding"],
)
def test_a_unit_is_what_its_layer_makes_of_it(make, shape, units):
    layer = make()
    layer.build(shape)
    kernel = layer.trainable_variables[0]
    model = keras.Sequential([layer])
    start = ops.convert_to_numpy(kernel)
    grad = np.random.default_rng(0).normal(size=start.shape).astype("float32")
    optimizer = ok.optimizers.SGD(1.0, transforms=[AdaptiveClip(1e-3)])
    optimizer.build(model)
    rest = [ops.zeros(v.shape) for v in model.trainable_variables[1:]]
    optimizer.apply([ops.convert_to_tensor(grad), *rest])
    step = start - ops.convert_to_numpy(kernel)
    norms = [np.sqrt(np.sum(x.astype("float64") ** 2, axis=units)) for x in (step, start)]
    np.testing.assert_allclose(norms[0], 1e-3 * np.maximum(norms[1], 1e-3), rtol=1e-3)


@pytest.mark.parametrize(
    ("keyword", "transform"),
    [("clipvalue", ClipByValue), ("clipnorm", ClipByNorm), ("global_clipnorm", ClipByGlobalNorm)],
)
def test_keywords_for_clipping_are_transforms(keyword, transform):
    grads = problems.gradients(5)
    with float64():
        by_keyword, by_transform = ({keyword: 0.05}, {"transforms": [transform(0.05)]})
        ends = [problems.train(ok.optimizers.Adam(0.01, **how), grads)[-1] for how in (by_keyword, by_transform, {})]
    for a, b in zip(ends[0], ends[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != c) for a, c in zip(ends[0], ends[2], strict=True))


def cautious_adamw(p, grads, weight, learning_rate=0.01, weight_decay=0.0, clipping=0.05, minimum=None):
    """AdamW between the transforms of `CASES`; a step of it from zero weights is the same as from others."""
    moving = np.zeros_like(p)
    before = []
    for g in grads:
        told = twins.Told([weight], [], [])
        (g,) = twins.adaptive_clip(twins.centralize([g], [p], told), [p], told, clipping)
        before.append(g)
        path = [moving, *TWINS["AdamW"](moving, before, learning_rate=learning_rate, weight_decay=0.0)]
        steps = [path[-2] - path[-1]]
        told = twins.Told([weight], [g], [learning_rate * weight_decay])
        if minimum is not None:
            steps = twins.cautious_update(steps, [p], told, minimum)
        p = p - twins.cautious_decay(steps, [p], told)[0]
        yield p


def adamw(minimum=None, clipping=0.05, learning_rate=0.01, **common):
    update = [] if minimum is None else [CautiousUpdate(minimum)]
    return ok.optimizers.AdamW(
        learning_rate, transforms=[Centralize(), AdaptiveClip(clipping), *update, CautiousDecay()], **common
    )


CARD = ok.Card(
    name="AdamW with transforms",
    kind="optimizer",
    make=adamw,
    twin=cautious_adamw,
    cases=({"learning_rate": 0.01}, {"learning_rate": 0.01, "minimum": 0.4}),
)
#: What is about the class, which `adamw` is not, a rule without transforms, or the whole decay; and rows of what no
#: layer says is an embedding.
NOT_HERE = {"config_round_trip", "bad_arguments", "hyperparameters", "rows", "transforms", "group_rules", "decay_mask"}
SHORT = {"twin", "groups"}  # each transform by itself has a card


@pytest.mark.parametrize(
    "check",
    [
        pytest.param(check, id=check.name, marks=[] if check.name in SHORT else pytest.mark.long)
        for check in ok.testing.checks_for(CARD)
        if check.name not in NOT_HERE
    ],
)
def test_an_optimizer_with_transforms_passes_the_suite(check):
    check(CARD)


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="elsewhere the gradients of embeddings are dense")
@pytest.mark.parametrize(
    "transforms",
    [
        [AdaptiveClip(0.01)],
        [ClipByNorm(0.1)],
        [AdaptiveClip(0.1), ClipByGlobalNorm(0.05)],
        [ClipByValue(0.01), Centralize()],
    ],
    ids=str,
)
def test_rows_alone_are_what_all_rows_are(transforms):
    ends = []
    for sparse in ("lazy", "dense"):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.Input((3,), dtype="int32"), layers.Embedding(20, 4), layers.Flatten(), layers.Dense(1)]
        )
        model.compile(ok.optimizers.SGD(0.5, sparse=sparse, transforms=transforms), "mse")
        x = np.random.default_rng(0).integers(0, 12, (32, 3))
        model.fit(x, x[:, :1].astype("float32"), batch_size=8, epochs=2, shuffle=False, verbose=0)
        ends.append(model.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.only_on("tensorflow", because="elsewhere the gradients of embeddings are dense")
def test_rows_of_a_kernel_are_updated_as_a_whole():
    ends = []
    import tensorflow as tf

    for sparse in (True, False):
        weight, values = tf.Variable(np.arange(12.0).reshape(4, 3)), tf.constant(np.arange(9.0).reshape(3, 3))
        grad = tf.IndexedSlices(values, tf.constant([0, 2, 0]), tf.constant([4, 3]))
        ok.optimizers.SGD(0.1, transforms=[Centralize()]).apply(
            [grad if sparse else tf.convert_to_tensor(grad)], [weight]
        )
        ends.append(weight.numpy())
    np.testing.assert_allclose(*ends, rtol=1e-12)
    assert np.any(ends[0][1] != np.arange(3.0, 6.0))


@dataclass(frozen=True)
class UnitStep(ok.optimizers.transforms.Transform):
    changes = "step"
    layout = "per_parameter"

    def change(self, u, p, h):
        return u / ops.sqrt(h.sum(ops.square(u)))


@pytest.mark.only_on("tensorflow", because="elsewhere the gradients of embeddings are dense")
@pytest.mark.parametrize("transform", [UnitStep(), CautiousUpdate()], ids=str)
def test_steps_that_are_not_element_wise_are_seen_whole(transform):
    import tensorflow as tf

    ends = []
    for sparse in (True, False):
        weight = tf.Variable(np.arange(12.0).reshape(4, 3))
        optimizer = ok.optimizers.SGD(0.1, momentum=0.9, transforms=[transform])
        for rows in ([0, 2, 0], [1, 1, 3]):
            grad = tf.IndexedSlices(
                tf.constant(np.arange(1.0, 10.0).reshape(3, 3)), tf.constant(rows), tf.constant([4, 3])
            )
            optimizer.apply([grad if sparse else tf.convert_to_tensor(grad)], [weight])
        ends.append(weight.numpy())
    np.testing.assert_allclose(*ends, rtol=1e-12)


def test_a_schedule_in_a_transform_counts_updates():
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 2], [0.3, 0.1, 0.05])
    weight = keras.Variable(np.zeros(2, "float32"))
    optimizer = ok.optimizers.SGD(1.0, transforms=[ClipByValue(schedule)])
    moved = []
    for _ in range(4):
        before = ops.convert_to_numpy(weight).copy()
        optimizer.apply([ops.ones(2)], [weight])
        moved.append(float((before - ops.convert_to_numpy(weight))[0]))
    np.testing.assert_allclose(moved, [0.3, 0.3, 0.1, 0.05], rtol=1e-6)


@dataclass(frozen=True)
class HandlesDecay(ok.optimizers.transforms.Transform):
    handles_decay = True


def test_a_weight_without_a_step_decays_cautiously():
    """The paper's indicator is 1 where step times weight is 0."""
    weight = keras.Variable(np.array([[1.0, -2.0]], "float32"), name="kernel")
    optimizer = ok.optimizers.SGD(0.5, weight_decay=0.1, decay_mask="all", transforms=[CautiousDecay()])
    optimizer.apply([ops.zeros((1, 2))], [weight])
    np.testing.assert_allclose(ops.convert_to_numpy(weight), [[0.95, -1.9]], rtol=1e-6)
    optimizer.apply([ops.ones((1, 2))], [weight])  # makes the first smaller, and the second larger
    np.testing.assert_allclose(ops.convert_to_numpy(weight), [[0.95 - 0.5 - 0.0475, -2.4]], rtol=1e-6)


# -- corrected decay --------------------------------------------------------------------------------------------------


def test_corrected_decay_is_pytorch_optimizers():
    start, rates = problems.start(((4, 3), (5,))), (0.02 * np.cos(np.linspace(0, 1.5, 100))).tolist()
    # so large that 1e-15, which it adds to v, does not matter
    grads = [[1e4 * g for g in arrays] for arrays in problems.gradients(100, ((4, 3), (5,)))]
    theirs = in_torch(corrected_decay_run, start, grads, rates, 0.3)
    with float64():
        corrected = CorrectedDecay(0.02, parameters="all")
        optimizer = ok.optimizers.AdamW(epsilon=1e-16, weight_decay=0.3, decay_mask="all", transforms=[corrected])
        weights = problems.variables(start)
        for rate, arrays, expected in zip(rates, grads, theirs, strict=True):
            optimizer.learning_rate = rate
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
            for a, b in zip(weights, expected, strict=True):
                np.testing.assert_allclose(ops.convert_to_numpy(a), b, rtol=1e-9, atol=1e-12)


def test_corrected_decay_of_a_group_is_a_schedule_of_its_decay():
    """Factors on the rate of a group are not in the correction; tables and vectors have the usual decay."""
    schedule, decay = ok.schedules.Cosine(0.1, 8), ok.schedules.Cosine(0.5, 8)  # λ η / η_max
    grads = problems.gradients(6, ((3, 2), (2, 2), (4,)))

    def trained(weight_decay, transforms):
        variables = [
            keras.Variable(p, dtype="float64", name=name)
            for name, p in zip(("kernel", "slow_kernel", "bias"), problems.start(((3, 2), (2, 2), (4,))), strict=True)
        ]
        groups = [ok.Group("slow", lr_scale=0.25), ok.Group("bias", weight_decay=0.5)]
        optimizer = ok.optimizers.SGD(
            schedule, weight_decay=weight_decay, decay_mask="all", groups=groups, transforms=transforms
        )
        for arrays in grads:
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], variables)
        return [ops.convert_to_numpy(v) for v in variables]

    with float64():
        for a, b in zip(trained(0.5, [CorrectedDecay(0.1)]), trained(decay, []), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7)  # JAX rounds schedules


# -- gradient noise ---------------------------------------------------------------------------------------------------

SHAPES = ((300, 200), (64,), (8, 8), (64,))


def noise_of(steps, seed=0, pack_below=None, **arguments):
    """What `GradientNoise` adds to gradients of zero, for each step and parameter."""
    optimizer = ok.optimizers.SGD(1.0, transforms=[GradientNoise(seed=seed, **arguments)])
    if pack_below is not None:
        optimizer.pack_below = pack_below
    zeros = [[np.zeros(shape) for shape in SHAPES] for _ in range(steps)]
    weights = [zeros[0], *problems.train(optimizer, zeros, values=zeros[0])]
    return [[b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(weights)]


def test_gradient_noise_has_the_variance_of_optax():
    import jax
    import optax

    with float64():
        found = noise_of(3, eta=0.5, gamma=0.7)
    theirs = optax.add_noise(0.5, 0.7, key=0)
    zeros = jax.numpy.zeros(SHAPES[0])
    state = theirs.init(zeros)
    for ours in found:
        noise, state = theirs.update(zeros, state)
        assert np.std(ours[0]) == pytest.approx(float(np.std(noise)), rel=0.02)
    large = found[0][0].ravel() / np.sqrt(0.5)
    for n, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):  # of a normal number's power
        assert np.mean(large**n) == pytest.approx(moment, abs=4 * np.sqrt(variance / large.size))
    assert np.mean(np.abs(large) > 1.96) == pytest.approx(0.05, abs=0.005)


def test_gradient_noise_is_independent_but_a_function_of_seed_update_and_place():
    with float64():
        found, again, alone = noise_of(2), noise_of(2), noise_of(2, pack_below=0)
        other = noise_of(2, seed=1)
    for a, b, c in zip(found, again, alone, strict=True):
        for x, y, z in zip(a, b, c, strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_allclose(x, z, rtol=1e-12)
    large = [found[0][0], found[1][0], other[0][0], found[0][0].T.reshape(300, 200)]
    correlations = np.corrcoef([x.ravel() for x in large])
    np.testing.assert_allclose(correlations, np.eye(4), atol=0.02)
    small = [found[0][1], found[0][2], found[0][3], other[0][1]]  # of one size, in one bucket
    np.testing.assert_allclose(np.corrcoef([x.ravel() for x in small]), np.eye(4), atol=0.5)


def test_gradient_noise_continues_where_it_was_saved():
    grads = problems.gradients(6)
    make = lambda: ok.optimizers.AdamW(0.01, transforms=[GradientNoise(0.3, seed=3)])  # noqa: E731
    with float64():
        whole = problems.train(make(), grads)
        first, weights = make(), problems.variables(problems.start())
        for step, arrays in enumerate(grads):
            if step == 3:
                state, first = problems.state_of(first), make()
                first.build(weights)
                first.load_own_variables(state)
            first.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    for a, b in zip(whole[-1], weights, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(b))


@pytest.mark.few(1)
@pytest.mark.only_on("tensorflow", because="tf.distribute; JAX shards the arrays of one step")
@pytest.mark.parametrize("wrapped", [lambda o: o, ok.optimizers.ScheduleFree], ids=["plain", "Schedule-Free"])
def test_gradient_noise_is_the_same_in_all_replicas(wrapped):
    x, y = problems.regression()
    ends = []
    for scope in (contextlib.nullcontext, problems.two_replicas().scope):
        keras.utils.set_random_seed(0)
        with scope():
            model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1)])
            model.compile(wrapped(ok.optimizers.SGD(0.05, transforms=[GradientNoise(0.1)])), "mse")
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0)
        ends.append(model.get_weights())
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


# -- all of them ------------------------------------------------------------------------------------------------------


def test_they_are_saved_with_the_model(tmp_path):
    given = [ClipByValue(0.5), Centralize(), GradientNoise(0.1, seed=2), CautiousUpdate(0.1), CorrectedDecay(0.01)]
    model = problems.network()
    model.compile(ok.optimizers.AdamW(0.01, transforms=given), "mse")
    x, y = problems.regression()
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.transforms == tuple(given)
    for each in (model, loaded):
        each.fit(x, y, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ok.optimizers.SGD(transforms=ClipByValue(1.0)), TypeError, "transforms must be a list"),
        (lambda: ok.optimizers.SGD(transforms=["clip"]), TypeError, r"got \['clip'\]"),
        (lambda: ClipByValue(0.0), ValueError, r"limit must .* got 0.0"),
        (lambda: CautiousUpdate(0.0), ValueError, r"minimum must .* \(0, 1\]"),
        (
            lambda: ok.optimizers.AdamW(transforms=[CautiousDecay(), CautiousUpdate()]),
            ValueError,
            "must be the last transform of steps",
        ),
        (lambda: ok.optimizers.SGD(transforms=[HandlesDecay()]), ValueError, "sets handles_decay"),
        (
            lambda: ok.optimizers.SGD(transforms=[StepsContribute()]),
            ValueError,
            "`contribute` is for transforms of gradients",
        ),
        (lambda: ok.optimizers.SGD(transforms=[ClipByValue]), TypeError, "list of instances"),
        (lambda: ok.optimizers.LAMB(transforms=[CautiousDecay()]), ValueError, "LAMBRule does so itself"),
        (lambda: CorrectedDecay(0.0), ValueError, "peak must be"),
        (lambda: CorrectedDecay(), TypeError, "peak"),
        (lambda: GradientNoise(-1.0), ValueError, "eta must be"),
        (lambda: GradientNoise(seed=0.5), TypeError, "seed must be an integer"),
        (lambda: ok.optimizers.ScheduleFreeAdamW(transforms=[CautiousUpdate()]), ValueError, "averages weights"),
        (lambda: ok.optimizers.Lookahead("AdamW", transforms=[CautiousUpdate()]), ValueError, "averages weights"),
        (
            lambda: ok.optimizers.SGD(groups=[ok.Group("x", rule=ok.optimizers.LAMB())], transforms=[CautiousDecay()]),
            ValueError,
            "LAMBRule does so itself",
        ),
        (
            lambda: ok.Group("x", rule=ok.optimizers.SGD(transforms=[ClipByValue(1.0)])),
            ValueError,
            "rule must leave transforms",
        ),
    ],
    ids=range(17),
)
def test_what_makes_no_sense_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_variable_is_saved_as_the_number_that_it_holds(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1)])
    model.compile(ok.optimizers.SGD(0.1, transforms=[ClipByValue(keras.Variable(0.1)), AdaptiveClip(0.5)]), "mse")
    model.fit(*problems.regression(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.transforms == (ClipByValue(0.1), AdaptiveClip(0.5))


class Odd(ok.optimizers.transforms.Transform):
    """What people write by mistake."""


class Forgets(Odd):
    def change(self, u, p, h):
        ops.clip(u, -1, 1)


class Sums(Odd):
    layout = "whole"

    def change(self, u, p, h):
        return ops.sum(u)


class AsksForMeans(Odd):
    def change(self, u, p, h):
        return u - h.mean(u)


class StepsContribute(Odd):
    changes = "step"

    def contribute(self, u, p, h):
        return {"u": u}


@pytest.mark.parametrize("changes", ["gradient", "step"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Forgets, r"Forgets.change must return the shape \(1, 2, 3\) of u, got None|\(1, 6\) of u, got None"),
        (Sums, r"Sums.change must return the shape \(1, 2, 3\) of u, got the shape \(\)"),
        (AsksForMeans, "rules and transforms with layout"),
    ],
    ids=["forgets", "sums", "means"],
)
def test_mistakes_in_ones_own_are_named(kind, message, changes):
    transform = type(kind.__name__, (kind,), {"changes": changes})()
    optimizer = ok.optimizers.SGD(0.1, transforms=[transform])
    with pytest.raises(ValueError, match=message):
        optimizer.apply([ops.ones((2, 3))], [keras.Variable(np.ones((2, 3), "float32"))])


def test_they_are_fixed_when_the_optimizer_is_made():
    optimizer = ok.optimizers.SGD(transforms=[ClipByValue(1.0)])
    with pytest.raises(AttributeError, match="transforms cannot be set"):
        optimizer.transforms = []


def test_the_groups_that_are_frozen_do_not_count():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, name="body"), layers.Dense(1, name="head")])
    optimizer = ok.optimizers.SGD(1.0, transforms=[ClipByGlobalNorm(1.0)], groups=[ok.Group("^head/", trainable=False)])
    optimizer.build(model)
    before = [v.copy() for v in model.get_weights()]
    optimizer.apply([ops.full(v.shape, 3.0) for v in model.trainable_variables])
    steps = [a - b for a, b in zip(before, model.get_weights(), strict=True)]
    assert np.sqrt(sum(np.sum(np.square(s)) for s in steps)) == pytest.approx(1.0, rel=1e-5)
    assert not np.any(steps[2])
    assert not np.any(steps[3])

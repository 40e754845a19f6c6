"""How a step is run: transforms, modes, packing, accumulation, replicas, `fit`."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.optimizers.groups import Places
from keras_optkit.optimizers.rule import number, rule_for
from keras_optkit.optimizers.transforms import ClipByValue, Transform
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, assert_equal, flat, made, with_ema
from keras_optkit.testing.conformance import check, traits
from keras_optkit.testing.tools import float64


@dataclass(frozen=True)
class _Times(Transform):
    """Multiplies gradients, or steps."""

    factor: float = number(1.0)

    def change(self, u: Any, *_: Any) -> Any:
        return self.factor * u


class _StepTimes(_Times):
    changes = "step"


@check("optimizer", unless={"hessian_vector"}, engine=True)  # products are not transformed
@float64()
def check_transforms(card: Card) -> None:
    """Transforms of gradients act after clipping, in their order; those of steps after the rule, before the decay."""
    grads = problems.gradients(4)
    got = problems.train(made(card, clipvalue=0.01, transforms=[_Times(3.0), ClipByValue(0.02)]), grads)
    changed = [[np.clip(3 * np.clip(g, -0.01, 0.01), -0.02, 0.02) for g in arrays] for arrays in grads]
    assert_close(got[-1], problems.train(made(card), changed)[-1], what="of gradients:")
    if made(card).rule.averages:  # which refuse those of steps
        return
    optimizer, weights = (
        made(card, weight_decay=0.1, transforms=[_StepTimes(0.0)]),
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
    for case in card.cases[-1:] if made(card).rule.decomposes else card.cases:
        eager = problems.train(made(card, case), grads)
        for mode in ("graph", "xla") if case is card.cases[-1] else ("graph",):
            got = problems.train(made(card, case), grads, mode=mode)
            assert_close(got[-1], eager[-1], what=f"{case} {mode}")


@check("optimizer", engine=True)
@float64()
def check_packing(card: Card) -> None:
    """Packed equals unpacked, and the order of the variables does not matter."""
    grads = problems.gradients(4)
    packed = problems.train(made(card), grads)
    alone = made(card)
    alone.pack_below = 0
    assert_close(problems.train(alone, grads)[-1], packed[-1], rtol=1e-14, what="unpacked")
    turned = problems.train(made(card), [g[::-1] for g in grads], values=problems.start()[::-1])
    assert_close(turned[-1][::-1], packed[-1], rtol=1e-14, what="reversed")


@check("optimizer", engine=True)
@float64()
def check_accumulation(card: Card) -> None:
    """K micro-batches, or fewer at the end, equal one batch: weights, slots, count, clipping, decay, average, rate."""
    micro = problems.gradients(8)
    large = [[np.mean(parts, axis=0) for parts in zip(*micro[i : i + 3], strict=True)] for i in (0, 3, 6)]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0, 1], [0.1, 0.02, 0.005])
    clipped = {"global_clipnorm": 0.5, "weight_decay": 0.1, **with_ema(card)}  # which hides a wrong factor
    for common, mode in ((clipped, "graph"), ({"learning_rate": schedule}, "eager")):
        one = made(card, **common)
        expected = problems.train(one, large)
        many, weights = made(card, **common, gradient_accumulation_steps=3), problems.variables(problems.start())
        step = problems.stepper(many, weights, mode)
        for i, arrays in enumerate(micro):
            step([ops.convert_to_tensor(g) for g in arrays])
            if i == 1:
                assert_equal(
                    [ops.convert_to_numpy(w) for w in weights], problems.start(), what="before the first update"
                )
        assert int(many.iterations) == 2, f"{int(many.iterations)} updates were counted instead of 2"
        many.flush()  # of the two that are left
        assert_close([ops.convert_to_numpy(w) for w in weights], expected[-1], what=f"{common} {mode}")
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
        {"global_clipnorm": 0.1, "gradient_accumulation_steps": 2, **with_ema(card)},
    ):
        one = made(card, **common)
        totals = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(halves, rest, strict=True)]
        expected = problems.train(one, totals)[-1]
        with strategy.scope():
            two = made(card, **common)
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


@check("optimizer", engine=True)
def check_fit(card: Card) -> None:
    """`fit` eagerly, as a graph and under XLA, and a custom loop over the same batches, give the same weights.

    They are inside their constraints, unless they are averages.
    """
    x, y = problems.regression()

    def fitted(**how: Any) -> np.ndarray:
        model = _constrained_network()
        model.compile(made(card), loss="mse", **how)
        model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0)
        norms = np.linalg.norm(model.get_weights()[0], axis=0)
        assert "averages" in traits(card) or np.max(norms) < 0.5 + 1e-6, f"{how}: a constraint is broken by {norms}"
        return flat(model.get_weights())

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

    model, optimizer = _constrained_network(), made(card)
    weights = model.trainable_variables

    def gradient(x: Any, y: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x, training=True) - y))
        return tape.gradient(loss, weights)

    def step(x: Any, y: Any) -> None:
        if optimizer.needs_hessian_vector:
            grads = optimizer.with_products(lambda: gradient(x, y), weights)
        else:
            grads = gradient(x, y)
        if optimizer.needs_second_gradient:
            others = [tf.identity(v.value) for v in model.non_trainable_variables]
            with optimizer.perturbed(grads, weights):
                grads = gradient(x, y)
            for variable, value in zip(model.non_trainable_variables, others, strict=True):
                variable.assign(value)  # statistics of the batch are those at the weights themselves
        optimizer.apply_gradients(zip(grads, weights, strict=True))

    if mode != "eager":
        step = tf.function(step, jit_compile=mode == "xla")
    for _, i in itertools.product(range(2), range(0, 64, 32)):
        step(tf.constant(x[i : i + 32]), tf.constant(y[i : i + 32]))
    optimizer.finalize_variable_values(model.trainable_variables)  # as `fit` does
    return flat(model.get_weights())


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
            plain = problems.train(made(card, case, fuse=False, **common), grads, mode="graph")
            got = problems.train(made(card, case, fuse=True, **common), grads, mode="graph")
            assert_close(got[-1], plain[-1], rtol=1e-12, what=f"{case} {common}")

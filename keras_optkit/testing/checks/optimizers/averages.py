"""The learning rate, and the weights to evaluate at."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.private import op_determinism
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, assert_equal, flat, made, with_ema
from keras_optkit.testing.conformance import check, traits
from keras_optkit.testing.tools import float64


@check("optimizer", engine=True)
@float64()
def check_learning_rate(card: Card) -> None:
    """A schedule equals setting the rate before every update, and assigning on top of a schedule multiplies it."""
    grads = problems.gradients(6)
    rates = [0.1, 0.1, 0.02, 0.02, 0.005, 0.005]
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1, 3], [0.1, 0.02, 0.005])

    def by_hand(rates: list[float]) -> list[Any]:
        optimizer = made(card)
        weights = problems.variables(problems.start())
        for rate, arrays in zip(rates, grads, strict=True):
            optimizer.learning_rate = rate
            optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
        return [ops.convert_to_numpy(w) for w in weights]

    # Keras's schedules compute in float32
    for mode in ("eager", "graph"):
        got = problems.train(made(card, learning_rate=schedule), grads, mode=mode)
        assert_close(got[-1], by_hand(rates), rtol=1e-6, what=mode)
    optimizer = made(card, learning_rate=schedule)
    weights = problems.variables(problems.start())
    for i, arrays in enumerate(grads):
        if i == 3:
            optimizer.learning_rate = 0.01  # half of what the schedule says
            np.testing.assert_allclose(float(optimizer.learning_rate), 0.01, rtol=1e-6)
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    halved = rates[:3] + [rate / 2 for rate in rates[3:]]
    assert_close([ops.convert_to_numpy(w) for w in weights], by_hand(halved), rtol=1e-6, what="multiplier")


@check("optimizer", unless={"averages"}, engine=True)
@float64()
def check_average(card: Card) -> None:
    """The moving average follows its formula and is what the weights are set to at the end."""
    grads = problems.gradients(5)
    trajectory = problems.train(made(card), grads)
    expected = trajectory[0]
    for arrays in trajectory[1:]:
        expected = [0.9 * a + 0.1 * w for a, w in zip(expected, arrays, strict=True)]
    optimizer = made(card, use_ema=True, ema_momentum=0.9)
    weights = problems.variables(problems.start())
    for arrays in grads:
        optimizer.apply([ops.convert_to_tensor(g) for g in arrays], weights)
    assert_equal([ops.convert_to_numpy(w) for w in weights], trajectory[-1], what="the average must not disturb")
    optimizer.finalize_variable_values(weights)
    assert_close([ops.convert_to_numpy(w) for w in weights], expected)


@check("optimizer", engine=True)
@float64()
def check_evaluation_weights(card: Card) -> None:
    """Going to the weights to evaluate at and back is exact, training does not notice it, and a file may hold either.

    `fit` ends at them, and a second `fit`, also of a model that was saved and loaded, continues from those of training.

    With the tag "recovers", which says that one set of weights is computed from the other, exact is up to rounding.
    """
    rtol, grads = 1e-6 if "recovers" in traits(card) else 0.0, problems.gradients(9)

    def same(got: Any, expected: Any, what: str, more: float = 0.0) -> None:
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            np.testing.assert_allclose(a, b, rtol=rtol + more, atol=rtol + more, err_msg=f"{what} variable {i}")

    # that of `use_ema` does not depend on the rule
    cases = card.cases if "averages" in traits(card) else card.cases[-1:]
    for case, mode in [*((case, "eager") for case in cases), (cases[-1], "graph")]:
        optimizer, weights = made(card, case, **with_ema(card)), problems.variables(problems.start())
        step, differ = problems.stepper(optimizer, weights, mode), False

        def values(weights: Any = weights) -> list[np.ndarray]:
            return [ops.convert_to_numpy(w).copy() for w in weights]

        expected = problems.train(made(card, case, **with_ema(card)), grads, mode=mode)
        # one that is compiled as a whole may be rounded otherwise where it restores the training weights itself
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
            assert_equal(values(), shown, what=f"{case} asked for twice,")
            if i % 3 == 0:  # in the other steps the update restores the training weights itself
                optimizer.swap_weights(evaluating=False)
                assert not optimizer.evaluating
                same(values(), trained, f"{case} back from the evaluation,")
            elif i == 7:
                other, others = made(card, case, **with_ema(card)), problems.variables(shown)
                other.build(others)
                other.load_own_variables(problems.state_of(optimizer))
                assert other.evaluating
                problems.stepper(other, others, mode)([ops.convert_to_tensor(g) for g in grads[8]])
                same(values(others), expected[8], f"{case} loaded,", rounding)
        assert differ, f"{case}: the weights to evaluate at are those of training"
    _two_fits_are_one(card, 1e-5 if "recovers" in traits(card) else 1e-7)


def _two_fits_are_one(card: Card, tolerance: float) -> None:
    case, (x, y) = card.cases[0], problems.regression()

    def fit(model: keras.Model, epochs: int) -> np.ndarray:
        model.fit(x, y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
        return flat(model.get_weights())

    with op_determinism(), tempfile.TemporaryDirectory() as folder:
        models = [problems.network() for _ in range(2)]
        for model in models:
            model.compile(made(card, case, **with_ema(card)), loss="mse")
        expected = fit(models[0], 2)
        fit(models[1], 1)
        assert models[1].optimizer.evaluating
        models[1].save(Path(folder) / "model.keras")
        for how, model in (("", models[1]), ("loaded", keras.models.load_model(Path(folder) / "model.keras"))):
            np.testing.assert_allclose(fit(model, 1), expected, rtol=tolerance, atol=tolerance, err_msg=f"{case} {how}")

"""Odd gradients and dtypes."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.kernels import KERNEL, by_shape
from keras_optkit.optimizers.engine.packing import Bucket
from keras_optkit.optimizers.groups import Treatment
from keras_optkit.optimizers.hyper import Product
from keras_optkit.optimizers.optimizer import Optimizer
from keras_optkit.optimizers.rule import Hyper, Weight, contributes, slots_of
from keras_optkit.optimizers.slots import FromWeights
from keras_optkit.registry import Card
from keras_optkit.testing import problems
from keras_optkit.testing.checks.optimizers.common import assert_close, assert_equal, by_twin, made
from keras_optkit.testing.conformance import check, twin_of
from keras_optkit.testing.tools import float64, numbers
from keras_optkit.testing.twins.optimizers import TWINS


@check("optimizer")
@float64()
def check_missing_gradient(card: Card) -> None:
    """A parameter without a gradient keeps its value and its slots bitwise; the others are updated."""
    grads: list[list[Any]] = problems.gradients(4)
    holes = [g.copy() for g in grads]
    for place, step in itertools.product((0, 1), (1, 2)):
        holes[step][place] = None
    for case in card.cases:
        _misses(card, case, grads, holes)


def _misses(card: Card, case: Mapping[str, Any], grads: list[list[Any]], holes: list[list[Any]]) -> None:
    optimizer, whole = made(card, case), made(card, case)
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
        assert_close(states[-1][1][2:], problems.train(whole, grads)[-1][2:], rtol=1e-14)


@check("optimizer")
@float64()
def check_some_updates(card: Card) -> None:
    """Where the rule has sums over the model or asks for first updates, missing gradients are as in its twin.

    They count for nothing in the sums, and the first gradient of a parameter is the first that there is.
    """
    rule = made(card).rule
    if not (rule.uses_first or contributes(rule)):
        return
    grads: list[list[Any]] = problems.gradients(8)
    grads = [[g + np.sign(grads[0][i]) for i, g in enumerate(arrays)] for arrays in grads]  # they agree for the most
    for place, step in ((0, 0), (0, 1), (0, 5), (1, 0), (3, 2), (3, 3), (3, 6)):
        grads[step][place] = None
    for case in card.cases:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that gradients are missing
            trajectory = problems.train(made(card, case, weight_decay=None), grads)
        for step, expected in enumerate(by_twin(card, case, made(card, case, weight_decay=None), grads)):
            assert_close(trajectory[step], expected, what=f"{case} step {step}")


@check("optimizer")
@float64()
def check_zero_and_rate_zero(card: Card) -> None:
    """Zero gradients leave finite weights, and a learning rate of zero leaves the weights bitwise as they are."""
    zeros = [[np.zeros_like(g) for g in arrays] for arrays in problems.gradients(3)]
    for case in card.cases:
        for arrays in problems.train(made(card, case), zeros, dtype="float32")[-1]:
            assert np.isfinite(arrays).all(), f"{case}: zero gradients gave {arrays}"
        still = problems.train(made(card, {**case, "learning_rate": 0.0}, weight_decay=0.1), problems.gradients(3))
        assert_equal(still[-1], problems.start(), what=f"{case}: rate 0,")


@check("optimizer")
@float64()
def check_dtypes(card: Card) -> None:
    """Weights keep dtype and shape in every float dtype; half precision is updated through float32 state."""
    grads = problems.gradients(3)
    exact = problems.train(made(card), grads)[-1]
    for dtype, tolerance in (("float64", 1e-12), ("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 5e-2)):
        optimizer = made(card)
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
            slots[name] = ops.full((1, *((2, 3) if initial.shape is None else initial.shape)), initial.value, dtype)
    scalars = {name: ops.convert_to_tensor(value, dtype) for name, value in rule.scalars().items()}
    h = Hyper(
        ops.convert_to_tensor(3),
        ops.convert_to_tensor(0.1, dtype),
        dtype,
        scalars=scalars,
        kernel=weight.axes,
        sums=bucket.over_parameters,
        first=ops.zeros((1, 1, 1), "bool"),
        product=Product(rule.random_vector(), 0.5 * p, lambda: p) if "hessian_vector" in rule.needs else None,
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
        exact = problems.train(made(card), grads, values=values, dtype="float32")
        half = problems.train(made(card, master_weights=True), grads, values=values, dtype=dtype)
        assert_equal(half[-1], [rounded(w, dtype) for w in exact[-1]], what=dtype)
        optimizer, weights = made(card, master_weights=True), problems.variables(values, dtype)
        for step, arrays in enumerate(grads):
            if step == 2:
                state, kept = (
                    problems.state_of(optimizer),
                    [ops.convert_to_numpy(ops.cast(w, "float32")) for w in weights],
                )
                optimizer, weights = made(card, master_weights=True), problems.variables(kept, dtype)
                optimizer.build(weights)
                optimizer.load_own_variables(state)
            optimizer.apply([ops.convert_to_tensor(g, dtype=dtype) for g in arrays], weights)
        assert_equal([numbers(w) for w in weights], half[-1], what=f"{dtype}, continued,")


@check("optimizer", engine=True)
def check_loss_scaling(card: Card) -> None:
    """Under loss scaling an infinite gradient leaves weights, slots and step count bitwise untouched.

    A constant `loss_scale_factor`, which Keras multiplies the loss by, is divided out.
    """
    inner = made(card)
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
    assert_equal(after[0], before[0])
    assert_equal(after[1].values(), before[1].values())
    expected = problems.train(made(card), grads[:1], dtype="float32")[0]
    assert_close(after[0], expected, rtol=1e-6)
    constant = made(card)
    constant.loss_scale_factor = 8.0
    assert_close(problems.train(constant, [[8 * g for g in grads[0]]], dtype="float32")[0], expected, rtol=1e-6)


@check("optimizer", requires=("second_gradient",))
def check_second_gradient(card: Card) -> None:
    """`fit` updates with the gradient at weights that the first one has moved, as the twin's `perturbed` says.

    The update itself is of the weights as they were, and all other state is as after the first forward pass.
    """
    x, y = problems.regression()
    for case in card.cases:
        model, third = problems.network(), problems.network()
        model.compile(made(card, case), loss="mse")
        losses = model.fit(x, y, batch_size=32, epochs=2, shuffle=False, verbose=0).history["loss"]
        other, optimizer, alone, first = problems.network(), made(card, case), made(card, case), []
        combined = getattr(twin_of(card, TWINS), "combined", None)
        weights, others = other.trainable_variables, other.non_trainable_variables
        for i in (0, 32, 0, 32):
            origin, before = [numbers(w) for w in weights], [numbers(v) for v in others]
            loss, grads = problems.loss_and_gradients(other, x[i : i + 32], y[i : i + 32])
            first.append(loss)
            after = [numbers(v) for v in others]
            moved = optimizer.perturbed_values([ops.convert_to_tensor(g) for g in grads], weights)
            perturbed = getattr(twin_of(card, TWINS), "perturbed", None)
            if perturbed is not None:
                own = {k: v for k, v in case.items() if k in inspect.signature(perturbed).parameters}
                assert_close(map(numbers, moved), perturbed(origin, grads, **own), rtol=1e-5, what="moved,")
            _assign([*weights, *others], [*map(numbers, moved), *before])
            _, second = problems.loss_and_gradients(other, x[i : i + 32], y[i : i + 32])
            _assign([*weights, *others], [*origin, *after])
            optimizer.apply([ops.convert_to_tensor(g) for g in second], weights)
            if combined is not None:  # without a first gradient the one that is given counts as both
                own = {k: v for k, v in case.items() if k in inspect.signature(combined).parameters}
                alone.apply(
                    [ops.convert_to_tensor(g) for g in combined(grads, second, **own)], third.trainable_variables
                )
                assert_close(
                    map(numbers, weights), map(numbers, third.trainable_variables), rtol=1e-4, what="combined,"
                )
        optimizer.finalize_variable_values(weights)
        assert_close(model.get_weights(), other.get_weights(), rtol=1e-4, what=f"{case},")
        np.testing.assert_allclose(losses, np.mean(np.reshape(first, (2, 2)), axis=1), rtol=1e-4, err_msg=str(case))


@check("optimizer", requires=("hessian_vector",))
def check_hessian_vector(card: Card) -> None:
    """`fit` updates with the product of the Hessian and the random vector, here of a linear regression.

    The Hessian is `2 XᵀX / n`, and the mean of the errors is computed once, at the weights before the update.
    """
    x, y = problems.regression()
    rows = np.concatenate([x, np.ones((len(x), 1))], axis=1)
    for case in card.cases:
        models = []
        for _ in range(2):
            keras.utils.set_random_seed(0)
            models.append(keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)]))
        model, other = models
        model.compile(made(card, case), loss="mse")
        losses = model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0).history["loss"]
        optimizer, weights, expected = made(card, case), other.trainable_variables, []

        def parts(vector: np.ndarray) -> list[Any]:
            return [ops.convert_to_tensor(x.astype("float32")) for x in (vector[:-1], vector[-1])]

        def joined(values: Any) -> np.ndarray:
            return np.concatenate([np.reshape(numbers(value), (-1, 1)) for value in values])

        for i in (0, 16, 32, 48) * 2:
            batch = rows[i : i + 16]
            errors = batch @ joined(weights) - y[i : i + 16]
            expected.append(np.mean(errors**2))
            vectors = joined(optimizer.hessian_vectors(weights))
            with optimizer.given_products(parts(batch.T @ (batch @ vectors) / 8), weights):
                optimizer.apply(parts(batch.T @ errors / 8), weights)
        optimizer.finalize_variable_values(weights)
        assert_close(model.get_weights(), other.get_weights(), rtol=1e-4, what=f"{case},")
        np.testing.assert_allclose(losses, np.mean(np.reshape(expected, (2, 4)), axis=1), rtol=1e-4, err_msg=str(case))


def _assign(variables: list[Any], values: list[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)

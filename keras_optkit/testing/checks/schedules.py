"""Checks for schedules.

A card of kind "schedule" builds a `keras.optimizers.schedules.LearningRateSchedule`. Its `twin`, if it has one, is a
NumPy function `twin(step, **case) -> float` of an int step and the keyword arguments of one of the card's `cases`. The
tag "settles" claims that the value no longer changes once `case["steps"]` updates (or 1,000) are over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.registry import Card
from keras_optkit.testing.conformance import check
from keras_optkit.testing.roundtrip import through_json
from keras_optkit.testing.twins.schedules import TWINS

_FAR = 2**31 - 2  # the last step but one that an int32 holds


def _built(card: Card) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return ((case, card.make(**case)) for case in card.cases)


def _steps(case: Mapping[str, Any]) -> list[int]:
    """Every step of a short schedule or 60 of a long one, the surroundings of its end, and steps far beyond it."""
    end = int(case.get("steps", 1000))
    return sorted({*np.linspace(0, end, 60).astype(int).tolist(), end - 1, end, end + 1, 10 * end, 2**24 + 1, _FAR})


def _number(value: Any) -> float:
    value = np.asarray(ops.convert_to_numpy(value))
    assert value.shape == (), f"A schedule returns a scalar for a scalar step, got shape {value.shape}."
    return float(value)


def _values(schedule: Any, steps: list[int]) -> np.ndarray:
    return np.array([_number(schedule(step)) for step in steps])


def _digits(schedule: Any) -> float:
    """Relative precision of the dtype in which this schedule answers."""
    return 8 * float(np.finfo(np.asarray(ops.convert_to_numpy(schedule(0))).dtype).eps)


def _same(schedule: Any, actual: Any, expected: Any, what: str) -> None:
    eps = _digits(schedule)
    scale = max(1e-30, float(np.max(np.abs(expected))))
    np.testing.assert_allclose(actual, expected, rtol=eps, atol=eps * scale, err_msg=what)


@check("schedule")
def check_is_keras_schedule(card: Card) -> None:
    """Keras accepts it wherever a learning rate can be a schedule."""
    for case, schedule in _built(card):
        assert isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule), f"{card.name}({case})"


@check("schedule")
def check_finite(card: Card) -> None:
    """It is a finite number from step 0 to far beyond its end."""
    for case, schedule in _built(card):
        steps = _steps(case)
        values = _values(schedule, steps)
        bad = [step for step, value in zip(steps, values, strict=True) if not np.isfinite(value)]
        assert not bad, f"{card.name}({case}) is not finite at the steps {bad[:5]}."


@check("schedule")
def check_tensor_step_is_int_step(card: Card) -> None:
    """An int, a NumPy integer, an integer tensor and an integer variable as the step give the same value."""
    for case, schedule in _built(card):
        variable = keras.Variable(0, dtype="int", trainable=False)
        for step in (0, 1, 3, int(case.get("steps", 1000)), 2**24 + 1):
            expected = _number(schedule(step))
            variable.assign(step)
            forms = {
                "np.int64": np.int64(step),
                "int32 tensor": ops.convert_to_tensor(step, dtype="int32"),
                "int tensor": ops.cast(ops.convert_to_tensor(step), "int"),
                "variable": variable,
            }
            for form, value in forms.items():
                _same(schedule, _number(schedule(value)), expected, f"{card.name}({case}) at step {step} as {form}")


@check("schedule", only_on=("tensorflow", "jax"), because="the other backends of Keras do not compile with XLA")
def check_compiled_is_eager(card: Card) -> None:
    """Inside a graph and compiled with XLA it has the values that it has eagerly."""
    for case, schedule in _built(card):
        steps = _steps(case)
        expected = _values(schedule, steps)
        for name, compiled in _compiled(schedule).items():
            actual = np.array([_number(compiled(ops.convert_to_tensor(step, dtype="int32"))) for step in steps])
            _same(schedule, actual, expected, f"{card.name}({case}), {name}")


def _compiled(schedule: Any) -> dict[str, Any]:
    if keras.config.backend() == "jax":
        import jax

        return {"jax.jit": jax.jit(schedule)}
    import tensorflow as tf

    return {f"jit_compile={xla}": tf.function(schedule, jit_compile=xla, autograph=False) for xla in (False, True)}


@check("schedule")
def check_config_round_trip(card: Card) -> None:
    """Its config is JSON, and what is built from it has the same values."""
    for case, schedule in _built(card):
        again = through_json(schedule, case)
        steps = _steps(case)
        np.testing.assert_array_equal(_values(again, steps), _values(schedule, steps), err_msg=f"{card.name}({case})")


@check("schedule")
def check_drives_stock_sgd(card: Card) -> None:
    """Keras's SGD takes step t of it at its t-th update, starting from 0."""
    for case, schedule in _built(card):
        weight = keras.Variable(np.zeros(1), dtype="float32")
        optimizer = keras.optimizers.SGD(learning_rate=schedule)
        moved = []
        for _ in range(4):
            before = float(weight.numpy()[0])
            optimizer.apply([ops.ones(1)], [weight])
            moved.append(before - float(weight.numpy()[0]))
        expected = _values(schedule, [0, 1, 2, 3])
        size = float(np.sum(np.abs(expected)))
        np.testing.assert_allclose(moved, expected, rtol=1e-5, atol=1e-6 * size, err_msg=f"{card.name}({case})")


@check("schedule", requires={"settles"})
def check_settles(card: Card) -> None:
    """Once its steps are over the value stays as it is."""
    for case, schedule in _built(card):
        end = int(case.get("steps", 1000))
        late = [end + k for k in (10, 11, 100)] + [10 * end + 10, 2**24 + 1, _FAR]
        assert len(set(_values(schedule, late))) == 1, f"{card.name}({case}) still changes after step {end + 10}."


@check("schedule")
def check_twin(card: Card) -> None:
    """It has the values of its NumPy twin, to the precision of the dtype it computes in."""
    twin: Any = card.twin or TWINS.get(card.name)
    if twin is None:
        return
    for case, schedule in _built(card):
        steps = _steps(case)
        expected = np.array([twin(step, **case) for step in steps])
        _same(schedule, _values(schedule, steps), expected, f"{card.name}({case})")

"""Checks for schedules.

A card of kind "schedule" builds a `keras.optimizers.schedules.LearningRateSchedule`. Its `twin`, if it has one, is a
NumPy function `twin(step, **case) -> float` of an int step and the keyword arguments of one of the card's `cases`.

Tags are claims. Some are about the end, which is `case["steps"]` updates, those after the last of `case["boundaries"]`,
or 1,000:

- "settles": the value no longer changes once the end is over;
- "ends": it is `initial` at step 0 and `final`, 0 when left out, at the end;
- "monotone": it never rises, or never falls;
- "epochs": it takes `steps_per_epoch`, the unit of the arguments that its class names in `lengths`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_optkit.registry import Card
from keras_optkit.schedules import Scale, Schedule, Sequence, Warmup
from keras_optkit.testing.conformance import check
from keras_optkit.testing.roundtrip import through_json
from keras_optkit.testing.twins.schedules import TWINS

_FAR = 2**31 - 2  # the last step but one that an int32 holds


def _built(card: Card) -> Iterator[tuple[Mapping[str, Any], Any]]:
    return ((case, card.make(**case)) for case in card.cases)


def _end(case: Mapping[str, Any]) -> int:
    """The step at which a schedule ends, if it does."""
    return int(case.get("steps") or case.get("boundaries", [1000])[-1])


def _steps(case: Mapping[str, Any]) -> list[int]:
    """Every step of a short schedule or 24 of a long one, the surroundings of its end, and steps far beyond it."""
    end = _end(case)
    return sorted({*np.linspace(0, end, 24).astype(int).tolist(), end - 1, end, end + 1, 10 * end, 2**24 + 1, _FAR})


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
        for step in (1, _end(case), 2**24 + 1):
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
        steps = _steps(case)[::2]
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
        end = _end(case)
        late = [end + k for k in (10, 11, 100)] + [10 * end + 10, 2**24 + 1, _FAR]
        assert len(set(_values(schedule, late))) == 1, f"{card.name}({case}) still changes after step {end + 10}."


@check("schedule", requires={"ends"})
def check_ends(card: Card) -> None:
    """It begins with `initial`, and has `final` when its steps are over, not one update sooner or later."""
    for case, schedule in _built(card):
        end, first, last = _end(case), float(case["initial"]), float(case.get("final", 0))
        values = _values(schedule, [0, max(end - 1, 0), end, end + 1])
        _same(schedule, values[[0, 2, 3]], np.array([first, last, last]), f"{card.name}({case}) at its ends")
        assert abs(values[1] - last) > 1e-5 * abs(first - last), f"{card.name}({case}) ends too soon."


@check("schedule", requires={"monotone"})
def check_monotone(card: Card) -> None:
    """It never rises, or never falls, beyond rounding."""
    for case, schedule in _built(card):
        values = _values(schedule, _steps(case))
        changes, slack = np.diff(values), _digits(schedule) * float(np.max(np.abs(values)))
        assert (changes <= slack).all() or (changes >= -slack).all(), f"{card.name}({case}) rises and falls."


@check("schedule")
def check_before_the_first_step(card: Card) -> None:
    """A negative step, if anything asks for one, has the value of the first, as an int and as a tensor."""
    for case, schedule in _built(card):
        if not isinstance(schedule, Schedule):  # of Keras's own it is not asked
            continue
        first = _number(schedule(0))
        for step in (-1, ops.convert_to_tensor(-7, dtype="int32")):
            assert _number(schedule(step)) == first, f"{card.name}({case}) at step {step}"


@check("schedule")
def check_composes(card: Card) -> None:
    """It can be behind a warm-up, in a sequence and scaled, all three in one another, also from a config."""
    case, schedule = next(_built(card))
    inner = Sequence([Scale(schedule, 0.5, offset=0.25), schedule], [5])
    composed = Warmup(inner, 3, start=0.01)
    again = through_json(composed, {"steps": 3})
    alone = _values(schedule, list(range(8)))
    start = 0.5 * alone[0] + 0.25
    expected = [0.01 + (start - 0.01) * k / 3 for k in range(3)] + [0.5 * v + 0.25 for v in alone[:5]] + [*alone[:4]]
    for made in (composed, again):
        _same(schedule, _values(made, list(range(12))), np.array(expected), f"{card.name}({case})")
    together = ops.convert_to_numpy(composed(ops.arange(12)))
    _same(schedule, together, np.array(expected), f"{card.name}({case}), a vector of steps")


@check("schedule", requires={"epochs"})
def check_epochs(card: Card) -> None:
    """Lengths in epochs of 4 updates are lengths four times as long."""

    def times_four(value: Any) -> Any:
        return [4 * each for each in value] if isinstance(value, list) else value and 4 * value

    names = getattr(card.make, "lengths", ())
    for case in card.cases:
        lengths = {name: times_four(value) for name, value in case.items() if name in names}
        assert lengths, f"{card.name}({case}) has none of the lengths {names}."
        longer = dict(case) | lengths
        expected = card.make(**longer)
        through_json(card.make(**case, steps_per_epoch=4), dict(case) | {"steps_per_epoch": 4})
        steps = [0, 1, 4 * _end(case) - 1, *np.linspace(2, 4 * _end(case) + 4, 9).astype(int).tolist()]
        actual = _values(card.make(**case, steps_per_epoch=4), steps)
        np.testing.assert_array_equal(actual, _values(expected, steps), err_msg=f"{card.name}({case})")


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

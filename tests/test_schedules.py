"""Schedules beyond the conformance suite: parity with torch and Keras, exact counting, arguments, plots."""

import itertools
import json
import math

import keras
import numpy as np
import pytest
from keras import ops
from torch_references import Made, in_torch, schedule_run

import keras_optkit as ok
from keras_optkit.schedules import Cosine, Linear, OneCycle, Warmup
from keras_optkit.testing.twins.schedules import TWINS


def values(schedule, steps):
    return np.array([float(ops.convert_to_numpy(schedule(step))) for step in steps])


def torchs(name, **arguments):
    return Made(f"torch.optim.lr_scheduler:{name}", arguments)


def torch_values(*schedules, steps, **more):
    return in_torch(schedule_run, *schedules, steps=steps, **more)["lr"]


@pytest.mark.parametrize(("initial", "steps", "final"), [(0.1, 20, 0.0), (0.1, 7, 0.03)])
def test_linear_is_torch_linear_lr(initial, steps, final):
    theirs = torchs("LinearLR", start_factor=1.0, end_factor=final / initial, total_iters=steps)
    expected = torch_values(theirs, steps=25)
    np.testing.assert_allclose(values(Linear(initial, steps, final), range(25)), expected, rtol=1e-10, atol=1e-16)


def test_cosine_is_torch_cosine_annealing_lr():
    expected = torch_values(torchs("CosineAnnealingLR", T_max=20, eta_min=0.01), steps=21)
    np.testing.assert_allclose(values(Cosine(0.1, 20, 0.01), range(21)), expected, rtol=1e-10)


def test_cosine_is_keras_cosine_decay_in_more_digits():
    theirs = keras.optimizers.schedules.CosineDecay(0.1, 50, alpha=0.1)
    np.testing.assert_allclose(
        values(Cosine(0.1, 50, final=0.01), range(60)), values(theirs, range(60)), rtol=1e-6, atol=0
    )


def test_warmup_and_cosine_is_torch_sequential_lr():
    rise = torchs("LinearLR", start_factor=0.2, end_factor=1.0, total_iters=5)
    fall = torchs("CosineAnnealingLR", T_max=20, eta_min=0.0)
    ours = Warmup(Cosine(0.1, 20), steps=5, start=0.02)
    expected = torch_values(rise, fall, steps=26, milestones=[5])
    np.testing.assert_allclose(values(ours, range(26)), expected, rtol=1e-10, atol=1e-16)


@pytest.mark.parametrize("three_phase", [False, True])
@pytest.mark.parametrize("anneal", ["cosine", "linear"])
def test_one_cycle_is_torch_one_cycle_lr(anneal, three_phase):
    rng = np.random.default_rng(0)
    for _ in range(5):
        steps = int(rng.integers(12, 60))
        pct_start = float(rng.uniform(0.15, 0.45))
        divisors = {"div_factor": float(rng.uniform(2, 30)), "final_div_factor": float(rng.uniform(1, 1e4))}

        theirs = torchs(
            "OneCycleLR",
            max_lr=0.3,
            total_steps=steps,
            pct_start=pct_start,
            anneal_strategy={"cosine": "cos", "linear": "linear"}[anneal],
            three_phase=three_phase,
            base_momentum=0.8,
            max_momentum=0.93,
            **divisors,
        )
        expected = in_torch(schedule_run, theirs, steps=steps)
        initial = 0.3 / divisors["div_factor"]
        final = initial / divisors["final_div_factor"]
        ours = OneCycle(0.3, steps, initial, final, pct_start, anneal, three_phase)
        np.testing.assert_allclose(values(ours, range(steps)), expected["lr"], rtol=1e-10)
        np.testing.assert_allclose(values(ours.momentum(0.8, 0.93), range(steps)), expected["momentum"], rtol=1e-10)


def test_one_cycle_defaults_are_torch_defaults():
    expected = torch_values(torchs("OneCycleLR", max_lr=0.1, total_steps=50), steps=50)
    np.testing.assert_allclose(values(OneCycle(0.1, 50), range(50)), expected, rtol=1e-10)


def test_every_schedule_has_a_twin():
    assert {card.name for card in ok.cards("schedule")} == set(TWINS)


def test_steps_beyond_float32_are_told_apart():
    schedule = Linear(0.0, 2**30, final=1.0)
    step = 2**24
    assert values(schedule, [step + 1])[0] - values(schedule, [step])[0] == pytest.approx(2**-30, rel=1e-6)
    tensor = schedule(ops.convert_to_tensor(2**24 + 1, dtype="int32"))
    assert float(tensor) == (2**24 + 1) / 2**30


class Table(keras.optimizers.schedules.LearningRateSchedule):
    """A user's schedule that needs an integer step."""

    def __call__(self, step):
        return ops.take(ops.convert_to_tensor([0.4, 0.3, 0.2]), ops.minimum(step, 2))


@pytest.mark.parametrize("as_step", [int, np.int64, ops.convert_to_tensor], ids=["int", "numpy", "tensor"])
def test_warmup_hands_integer_steps_to_the_inner_schedule_from_0(as_step):
    schedule = Warmup(Table(), steps=2)
    found = [float(schedule(as_step(step))) for step in range(6)]
    np.testing.assert_allclose(found, [0, 0.2, 0.4, 0.3, 0.2, 0.2], rtol=1e-7)


def test_warmup_of_a_warmup_survives_json():
    schedule = Warmup(Warmup(OneCycle(0.1, 20), 3), steps=4, start=1e-3)
    config = json.loads(json.dumps(keras.optimizers.schedules.serialize(schedule)))
    again = keras.optimizers.schedules.deserialize(config)
    np.testing.assert_array_equal(values(again, range(30)), values(schedule, range(30)))
    assert isinstance(again.schedule.schedule, OneCycle)


def test_a_vector_of_steps_gives_a_vector_of_values():
    steps = np.arange(30)
    for schedule in (Linear(1, 10), Cosine(1, 10), OneCycle(1, 10), Warmup(Cosine(1, 10), 5)):
        together = ops.convert_to_numpy(schedule(ops.convert_to_tensor(steps)))
        np.testing.assert_allclose(together, values(schedule, steps), rtol=1e-14, atol=1e-16)


STOCK = ["SGD", "RMSprop", "Adam", "AdamW", "Adamax", "Nadam", "Adadelta", "Adagrad", "Adafactor", "Ftrl", "Lion"]


@pytest.mark.parametrize("optimizer", STOCK)
def test_stock_optimizers_take_the_schedule(optimizer):
    """A constant schedule is the constant rate: the float64 value is cast, not spread."""
    weights = []
    for rate in (0.01, Linear(0.01, 5, final=0.01)):
        variable = keras.Variable(np.array([[1.0, -2.0]]), dtype="float32", name="kernel")
        made = getattr(keras.optimizers, optimizer)(learning_rate=rate)
        for _ in range(2):
            made.apply([ops.convert_to_tensor([[0.5, -0.25]])], [variable])
        assert keras.backend.standardize_dtype(variable.dtype) == "float32"
        weights.append(variable.numpy())
    np.testing.assert_array_equal(*weights)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_schedule_in_fit_makes_the_steps_it_names(jit_compile):
    """Each step moves the only weight by the rate, since the gradient is 1; 6 micro-steps go past the end."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    schedule = Warmup(Linear(1.0, 3, final=0.25), steps=2)
    model.compile(optimizer=keras.optimizers.SGD(schedule), loss=lambda _, p: ops.mean(p), jit_compile=jit_compile)
    model.fit(np.ones((6, 1)), np.ones((6, 1)), batch_size=1, verbose=0)
    assert model.get_weights()[0].item() == pytest.approx(-(0 + 0.5 + 1 + 0.75 + 0.5 + 0.25), rel=1e-6)


BAD = [
    (lambda: Linear("0.1", 10), TypeError, r"initial.*'0\.1'"),
    (lambda: Linear(0.1, 0), ValueError, "steps.*at least 1, got 0"),
    (lambda: Linear(0.1, 10.0), TypeError, r"steps.*10\.0"),
    (lambda: Linear(math.nan, 10), ValueError, "initial.*finite.*nan"),
    (lambda: Cosine(0.1, 10, final=math.inf), ValueError, "final.*inf"),
    (lambda: Cosine(0.1, True), TypeError, "steps.*True"),
    (lambda: Warmup("cosine", 10), TypeError, "schedule.*'cosine'"),
    (lambda: Warmup(0.1, -1), ValueError, "steps.*-1"),
    (lambda: Warmup(0.1, 5, start=None), TypeError, "start.*None"),
    (lambda: OneCycle(0.1, 1), ValueError, "steps.*at least 2"),
    (lambda: OneCycle(0.1, 100, pct_start=1.0), ValueError, r"pct_start.*\(0, 1\).*1\.0"),
    (lambda: OneCycle(0.1, 3, pct_start=0.3), ValueError, r"pct_start=0\.3 of steps=3"),
    (lambda: OneCycle(0.1, 100, pct_start=0.6, three_phase=True), ValueError, "leaves a phase empty"),
    (lambda: OneCycle(0.1, 100, anneal="cosin"), ValueError, "anneal.*'cosin'.*'cosine'"),
    (lambda: OneCycle(0.1, 100, three_phase=1), TypeError, "three_phase.*True or False"),
    (lambda: OneCycle(0.1, 100).momentum(0.95, 0.85), ValueError, r"high.*0\.85"),
    (lambda: OneCycle(0.1, 100).momentum(0.5, 1.0), ValueError, r"high.*1\.0"),
    (lambda: Linear(0.1, 10).plot(0), ValueError, "steps.*at least 1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments_raise_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_base_class_has_no_formula_of_its_own():
    with pytest.raises(NotImplementedError, match="Schedule must define value"):
        ok.schedules.Schedule()(0)


def test_plot_draws_the_values():
    import matplotlib.pyplot as plt

    schedule = Warmup(Cosine(0.1, 20), 5)
    ax = schedule.plot(25)
    drawn = ax.lines[0].get_xydata()
    np.testing.assert_allclose(drawn[:, 0], range(26))
    np.testing.assert_allclose(drawn[:, 1], values(schedule, range(26)))
    assert Linear(0.1, 10).plot(10_000, ax=ax) is ax
    assert len(ax.lines) == 2
    assert ax.lines[1].get_xydata()[-1].tolist() == [10_000, 0.0]
    plt.close("all")


# -- the suite finds what is wrong ------------------------------------------------------------------------------------


class Broken(Linear):
    """The base of wrong schedules; each subclass breaks one promise."""


class ForgetsItsConfig(Broken):
    def get_config(self):
        return super().get_config() | {"final": 0.0}


class ComputesInFloat32(Broken):
    def value(self, step):
        return ops.cast(ops.cast(super().value(step), "float32"), "float64")


class StartsOneTooLate(Broken):
    def value(self, step):
        return super().value(ops.maximum(step - 1, 0))


class GoesOn(Broken):
    def value(self, step):
        return self.real(step) * (self.final - self.initial) / self.steps + self.initial


class KnowsTensorsOnly(Broken):
    def value(self, step):
        return super().value(step) if ops.is_tensor(step) else self.real(self.initial)


class DividesByWhatIsLeft(Broken):
    def value(self, step):
        left = ops.maximum(self.real(self.steps) - self.real(step), 0.0)
        return self.final + (self.initial - self.final) * left / self.steps + 0.0 / left


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        (ForgetsItsConfig, "config_round_trip"),
        (ComputesInFloat32, "twin"),
        (StartsOneTooLate, "twin"),
        (GoesOn, "settles"),
        (KnowsTensorsOnly, "tensor_step_is_int_step"),
        (DividesByWhatIsLeft, "finite"),
    ],
)
def test_suite_fails_a_wrong_schedule(wrong, failing):
    made = itertools.count()
    keras.saving.register_keras_serializable("test_schedules", f"{wrong.__name__}{next(made)}")(wrong)
    case = {"initial": 0.1, "steps": 9, "final": 0.07}
    twin = TWINS["Linear"]
    card = ok.Card(name=wrong.__name__, kind="schedule", make=wrong, tags={"settles"}, cases=(case,), twin=twin)
    assert failing in ok.testing.failures(card)


def test_suite_passes_a_users_schedule():
    class Constant(keras.optimizers.schedules.LearningRateSchedule):
        def __init__(self, rate):
            self.rate = rate

        def __call__(self, step):
            return ops.convert_to_tensor(self.rate)

        def get_config(self):
            return {"rate": self.rate}

    keras.saving.register_keras_serializable("test_schedules")(Constant)
    card = ok.Card(name="Constant", kind="schedule", make=Constant, tags={"settles"}, cases=({"rate": 0.25},))
    assert ok.testing.failures(card) == {}

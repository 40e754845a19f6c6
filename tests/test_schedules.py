"""Schedules beyond the conformance suite: parity with torch and Keras, exact counting, arguments, plots."""

import itertools
import json
import math
import sys

import keras
import numpy as np
import pytest
from keras import ops
from torch_references import Made, in_torch, schedule_run, schedule_runs

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


@pytest.mark.few(2)
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


def wsd(anneal, final_ratio=0.0):
    arguments = {"num_warmup_steps": 5, "num_stable_steps": 8, "num_decay_steps": 7, "min_lr_ratio": final_ratio}
    return Made("pytorch_optimizer.lr_scheduler.wsd:get_wsd_schedule", arguments | {"cooldown_type": anneal})


#: Ours, and torch's or pytorch_optimizer's with a base rate of 0.1, from the first update to behind the end.
TORCH = {
    "Polynomial": (
        lambda: ok.schedules.Polynomial(0.1, 20, power=1.7),
        torchs("PolynomialLR", total_iters=20, power=1.7),
    ),
    "Exponential": (lambda: ok.schedules.Exponential(0.1, 1, 0.93), torchs("ExponentialLR", gamma=0.93)),
    "Step": (lambda: ok.schedules.Step(0.1, 6, 0.3), torchs("StepLR", step_size=6, gamma=0.3)),
    "Piecewise": (
        lambda: ok.schedules.Piecewise([4, 9], [0.1, 0.02, 0.004]),
        torchs("MultiStepLR", milestones=[4, 9], gamma=0.2),
    ),
    "CosineRestarts of one length": (
        lambda: ok.schedules.CosineRestarts(0.1, 6, final=0.01, t_mul=1),
        torchs("CosineAnnealingWarmRestarts", T_0=6, T_mult=1, eta_min=0.01),
    ),
    "CosineRestarts": (
        lambda: ok.schedules.CosineRestarts(0.1, 3, t_mul=2),
        torchs("CosineAnnealingWarmRestarts", T_0=3, T_mult=2),
    ),
    **{
        f"Cyclic {mode}": (
            lambda mode=mode: ok.schedules.Cyclic(0.02, 0.1, 5, 3, mode, 0.95),
            torchs(
                "CyclicLR", base_lr=0.02, max_lr=0.1, step_size_up=5, step_size_down=3, mode=mode, gamma=0.95,
                base_momentum=0.8, max_momentum=0.9,
            ),
        )
        for mode in ("triangular", "triangular2", "exp_range")
    },
    "WarmupStableDecay 1-sqrt": (lambda: ok.schedules.WarmupStableDecay(0.1, 20, 5, 7), wsd("1-sqrt")),
    "WarmupStableDecay linear": (
        lambda: ok.schedules.WarmupStableDecay(0.1, 20, 5, 7, anneal="linear"),
        wsd("linear"),
    ),
    "WarmupStableDecay cosine": (
        lambda: ok.schedules.WarmupStableDecay(0.1, 20, 5, 7, final=0.01, anneal="cosine"),
        wsd("cosine", 0.1),
    ),
    "REX": (
        lambda: ok.schedules.REX(0.1, 20, 0.01),
        Made("pytorch_optimizer:REXScheduler", {"total_steps": 20, "max_lr": 0.1, "min_lr": 0.01}),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def torch_runs():
    return in_torch(schedule_runs, {name: (theirs, 41) for name, (_, theirs) in TORCH.items()})


@pytest.mark.once
@pytest.mark.parametrize("name", TORCH)
def test_schedule_is_torchs(name, torch_runs):
    expected = torch_runs[name]["lr"]
    first = 1 if name == "REX" else 0  # which has `min_lr` in its first update
    ours = values(TORCH[name][0](), range(first, len(expected)))
    np.testing.assert_allclose(ours, expected[first:], rtol=1e-10, atol=1e-15)


@pytest.mark.once
def test_schedules_are_optax_s():
    """In the float32 that optax computes in."""
    import optax

    s = ok.schedules
    pairs = [
        (s.Linear(0.1, 20, 0.03), optax.linear_schedule(0.1, 0.03, 20)),
        (s.Cosine(0.1, 20, 0.01), optax.cosine_decay_schedule(0.1, 20, alpha=0.1)),
        (s.Polynomial(0.1, 20, 0.01, power=3.0), optax.polynomial_schedule(0.1, 0.01, 3.0, 20)),
        (s.Exponential(0.1, 7, 0.5, final=0.02), optax.exponential_decay(0.1, 7, 0.5, end_value=0.02)),
        (s.Step(0.1, 7, 0.5), optax.exponential_decay(0.1, 7, 0.5, staircase=True)),
        (s.Piecewise([4, 9], [0.1, 0.02, 0.01]), optax.piecewise_constant_schedule(0.1, {4: 0.2, 9: 0.5})),
        (
            s.Sequence([s.Linear(0.02, 5, 0.1), 0.1, s.Cosine(0.1, 9)], [5, 11]),
            optax.join_schedules(
                [optax.linear_schedule(0.02, 0.1, 5), lambda _: 0.1, optax.cosine_decay_schedule(0.1, 9)], [5, 11]
            ),
        ),
        (
            s.WarmupStableDecay(0.1, 30, 5, 10, final=0.001, anneal="exponential"),
            optax.join_schedules(
                [optax.linear_schedule(0.0, 0.1, 5), optax.exponential_decay(0.1, 10, 0.01, 15, end_value=0.001)], [5]
            ),
        ),
    ]
    steps = np.arange(41)
    for ours, theirs in pairs:
        found = ops.convert_to_numpy(ours(ops.convert_to_tensor(steps)))
        expected = [float(theirs(step)) for step in steps]
        np.testing.assert_allclose(found, expected, rtol=3e-6, atol=1e-8, err_msg=repr(ours.get_config()))


def test_inverse_square_root_behind_a_warmup_is_vaswani_s():
    ours = values(Warmup(ok.schedules.InverseSquareRoot(0.1, 8), 8), range(1, 60))
    n = np.arange(1.0, 60.0)
    np.testing.assert_allclose(ours, 0.1 * np.sqrt(8) * np.minimum(n**-0.5, n * 8**-1.5), rtol=1e-12)


def test_half_an_epoch_is_a_number_of_updates():
    warmup = Warmup(Cosine(0.1, 3, steps_per_epoch=7), 0.5, steps_per_epoch=7)  # 4 updates, since 3.5 is rounded
    np.testing.assert_array_equal(values(warmup, range(30)), values(Warmup(Cosine(0.1, 21), 4), range(30)))


def test_model_with_schedules_for_everything_continues_from_a_file(tmp_path):
    """As rate, decay, momentum and with a group; what was loaded makes the same updates as what was saved."""
    s = ok.schedules
    rate = Warmup(s.Sequence([s.REX(0.1, 4), s.Scale(s.Cyclic(0.01, 0.05, 2), 0.5, 0.01)], [4]), 2, start=0.01)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4, name="body"), keras.layers.Dense(1, name="head")]
    )
    momentum, decay = s.Piecewise([3], [0.5, 0.9]), s.Scale(rate, 0.1)
    optimizer = ok.optimizers.SGD(rate, momentum=momentum, weight_decay=0.01, groups=[ok.Group("head", lr_scale=0.5)])
    model.compile(optimizer, "mse")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    driven = ok.callbacks.ScheduleHyperparameters({"weight_decay": decay})
    model.fit(x, x[:, :1], batch_size=2, shuffle=False, verbose=0, callbacks=[driven])
    assert float(model.optimizer.weight_decay) == pytest.approx(float(decay(3)))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again.optimizer.momentum, s.Piecewise)
    for each in (model, again):
        each.fit(x, x[:, :1], batch_size=2, shuffle=False, verbose=0)
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


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
    (lambda: Linear(0.1, 2, steps_per_epoch=0), ValueError, "steps_per_epoch.*at least 1.*0"),
    (lambda: Linear(0.1, 0.1, steps_per_epoch=3), ValueError, "steps.*at least 1 update, got 0.1 epochs"),
    (lambda: OneCycle(0.1, 1, steps_per_epoch=1), ValueError, "steps.*at least 2 updates"),
    (lambda: ok.schedules.Polynomial(0.1, 5, power=0), ValueError, "power.*0"),
    (lambda: ok.schedules.Exponential(0.1, 5, 1.5), ValueError, r"decay_rate.*1\.5"),
    (lambda: ok.schedules.Step(0.1, 5, 0.5, final=0.2), ValueError, r"final.*initial=0\.1.*0\.2"),
    (lambda: ok.schedules.Piecewise(3, [1, 2]), TypeError, "boundaries.*list.*3"),
    (lambda: ok.schedules.Piecewise([3, 3], [1, 2, 3]), ValueError, r"boundaries.*\[3, 3\]"),
    (lambda: ok.schedules.Piecewise([3], [1, 2, 3]), ValueError, "values.*1 boundaries, got 3"),
    (lambda: ok.schedules.Piecewise([3], [1, -2]), ValueError, r"values\[1\].*-2"),
    (lambda: ok.schedules.CosineRestarts(0.1, 5, t_mul=1.5), TypeError, r"t_mul.*1\.5"),
    (lambda: ok.schedules.Cyclic(0.1, 0.2, 5, mode="triangle"), ValueError, "mode.*'triangle'.*'triangular'"),
    (lambda: ok.schedules.Sequence([0.1, "cosine"], [3]), TypeError, r"schedules\[1\].*'cosine'"),
    (lambda: ok.schedules.Sequence([0.1], [3]), ValueError, "schedules.*1 boundaries, got 1"),
    (lambda: ok.schedules.Scale(0.1, 2.0), TypeError, r"schedule must be.*0\.1"),
    (lambda: ok.schedules.Scale(Linear(0.1, 3), factor=math.nan), ValueError, "factor.*nan"),
    (lambda: ok.schedules.WarmupStableDecay(0.1, 10, 5, 6), ValueError, "steps.*10 with 5 and 6"),
    (lambda: ok.schedules.WarmupStableDecay(0.1, 10, 2, 3, anneal="exponential"), ValueError, "final.*above 0"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_arguments_raise_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_schedule_is_shown_as_the_call_that_makes_it():
    schedule = Warmup(Cosine(0.1, 30.0, steps_per_epoch=10), 2)
    assert repr(schedule) == "Warmup(schedule=Cosine(initial=0.1, steps=30.0, steps_per_epoch=10), steps=2)"
    again = eval(repr(schedule), dict(vars(ok.schedules)))
    np.testing.assert_array_equal(values(again, range(40)), values(schedule, range(40)))


@pytest.mark.parametrize("step", ["3", None, Linear(0.1, 3)], ids=["text", "None", "schedule"])
def test_a_step_that_is_no_number_is_refused(step):
    with pytest.raises(TypeError, match=r"step must be a number of updates, got .*('3'|None|Linear\()"):
        Linear(0.1, 3)(step)


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


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"Cosine\.plot needs matplotlib: pip install matplotlib"):
        Cosine(0.1, 20).plot(25)


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

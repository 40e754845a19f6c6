"""Optuna's samplers: by name, seeded for each trial, and asked for points of a `Space`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np

from keras_optkit import arguments
from keras_optkit.space import Bool, Choice, Float, Parameter, Space, Values

NAMES = ("qmc", "tpe", "gp", "cma", "nsga2")

_OF_GP = 10  # random points before the model of a Gaussian process
_POPULATION = 20
_NEEDS = {"qmc": ("scipy",), "cma": ("cmaes",), "gp": ("scipy", "torch")}

Params = dict[str, Any]


class SamplerError(keras_tuner.errors.FatalError, RuntimeError):
    """The sampler cannot propose a point, which ends the search and not the trial."""


def optuna_for(what: str) -> Any:
    """Optuna, or an error that says how to install it.

    Raises:
        ImportError: If it is not there.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError as error:
        raise ImportError(f'{what} needs Optuna: pip install "keras-optkit[search]"') from error


def sampler_of(strategy: Any, seed: int, objectives: int) -> Any:
    """The sampler of a strategy.

    Raises:
        TypeError: If it is neither a name nor a sampler.
        ValueError: If there is none of that name, or none for several objectives.
        ImportError: If it needs a package that is not there.
    """
    optuna = optuna_for(f"strategy={strategy!r}" if isinstance(strategy, str) else "strategy")
    samplers = optuna.samplers
    if isinstance(strategy, str):
        arguments.choice("strategy", strategy, NAMES)
        for package in _NEEDS.get(strategy, ()):
            if importlib.util.find_spec(package) is None:
                how = package if package == "torch" else '"keras-optkit[search]"'
                raise ImportError(f"strategy={strategy!r} needs {package}: pip install {how}")
    elif not isinstance(strategy, samplers.BaseSampler):
        raise TypeError(f"strategy must be a name or an Optuna sampler, got {strategy!r}.")
    elif isinstance(strategy, samplers.GPSampler):
        raise ValueError(
            'strategy must be "gp" instead of a GPSampler, which would import torch into this process; with "gp" it '
            "runs in one without TensorFlow."
        )
    if objectives > 1 and (strategy == "cma" or isinstance(strategy, samplers.CmaEsSampler)):
        raise ValueError(f"strategy must be for several objectives, such as 'nsga2', got {strategy!r}.")
    if not isinstance(strategy, str):
        return strategy
    with quiet(optuna), warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of QMCSampler, since years
        made: dict[str, Callable[[], Any]] = {
            "tpe": lambda: samplers.TPESampler(seed=seed),
            "qmc": lambda: samplers.QMCSampler(scramble=True, seed=seed, warn_independent_sampling=False),
            "cma": lambda: samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
            "nsga2": lambda: samplers.NSGAIISampler(population_size=_POPULATION, seed=seed),
            "gp": lambda: None,
        }
        return made[strategy]()


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """Optuna's reports are not about searches of this package."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def reseed(sampler: Any, sequence: np.random.SeedSequence) -> None:
    """Seeds all random generators of a sampler, which has no public method for that."""
    homes = {"optuna", type(sampler).__module__.split(".")[0]}
    seen: set[int] = set()

    def generators(value: Any) -> Iterator[Any]:
        if id(value) in seen or isinstance(value, type):
            return
        seen.add(id(value))
        if isinstance(value, np.random.RandomState | np.random.Generator):
            yield value
        elif isinstance(value, Mapping):
            yield from every(value.values())
        elif isinstance(value, list | tuple):
            yield from every(value)
        elif type(value).__name__ == "LazyRandomState":
            yield from generators(value.rng)
        elif type(value).__module__.split(".")[0] in homes and hasattr(value, "__dict__"):
            yield from every(vars(value).values())

    def every(values: Iterable[Any]) -> Iterator[Any]:
        for value in list(values):
            yield from generators(value)

    for generator in generators(sampler):
        (child,) = sequence.spawn(1)
        if isinstance(generator, np.random.RandomState):
            generator.seed(child.generate_state(8))
        else:
            generator.bit_generator.state = type(generator.bit_generator)(child).state


# Parameters as Optuna has them: a number of a range, the index of a value, or one of some categories


def is_index(parameter: Any) -> bool:
    """Whether the index of a value is searched: the values are in order, but not evenly spaced integers."""
    if isinstance(parameter, Choice):
        numbers = [
            value for value in parameter.values if isinstance(value, int | float) and not isinstance(value, bool)
        ]
        return numbers == list(parameter.values) and numbers in (sorted(numbers), sorted(numbers, reverse=True))
    return not isinstance(parameter, Bool) and parameter.step is not None


def distribution(parameter: Any) -> Any:
    """Optuna's distribution of a parameter."""
    from optuna import distributions

    if is_index(parameter):
        return distributions.IntDistribution(0, int(parameter.size) - 1)
    if isinstance(parameter, Choice | Bool):
        return distributions.CategoricalDistribution(parameter.grid())
    kind = distributions.FloatDistribution if isinstance(parameter, Float) else distributions.IntDistribution
    return kind(parameter.low, parameter.high, log=bool(parameter.log))


def decoded(parameter: Any, param: Any) -> Any:
    """The value that Optuna's parameter stands for."""
    if is_index(parameter):
        return parameter.grid()[param]
    return parameter.mirrored(param) if getattr(parameter, "log", False) == "reverse" else param


def encoded(parameter: Any, value: Any) -> Any:
    """Optuna's parameter for a value."""
    if is_index(parameter):
        return list(parameter.grid()).index(value)
    return parameter.mirrored(value) if getattr(parameter, "log", False) == "reverse" else value


def point_of(space: Space, params: Mapping[str, Any]) -> Values:
    """The active values of a point, of which parameters that are inactive may be given, too."""
    values: dict[str, Any] = {}
    for name in space.parents_first():
        if space.active(name, values):
            parameter = space[name]
            values[name] = decoded(parameter, params[name]) if parameter.size > 1 else parameter.grid()[0]
    return Values({name: values[name] for name in space if name in values})


def params_of(space: Space, values: Mapping[str, Any], rng: np.random.Generator | None) -> Params:
    """Optuna's parameters of a point; with `rng`, also random ones of what is inactive."""
    params = {}
    for name, parameter in space.items():
        if parameter.size > 1 and (name in values or rng is not None):
            params[name] = encoded(parameter, values[name] if name in values else parameter.sample(rng))  # type: ignore[arg-type]
    return params


class Study:
    """The trials of a search as Optuna sees them.

    Args:
        sampler: Proposes points.
        directions: `"minimize"` or `"maximize"` for each objective.
    """

    def __init__(self, sampler: Any, directions: Sequence[str]) -> None:
        self._optuna = optuna_for("A study")
        samplers = self._optuna.samplers
        with quiet(self._optuna):
            self._study = self._optuna.create_study(sampler=sampler, directions=list(directions))
        #: Whether everything that it is to be told about a trial is its parameters and values.
        self.is_stateless = isinstance(sampler, samplers.TPESampler | samplers.RandomSampler)
        #: Whether it is asked for inactive parameters, too, since it cannot deal with spaces that have conditions.
        self.asks_for_all = isinstance(
            sampler,
            samplers.QMCSampler | samplers.CmaEsSampler | samplers.NSGAIISampler | samplers.NSGAIIISampler,
        )
        #: Random points that it begins with.
        self.startup: Any = getattr(sampler, "population_size", None) or getattr(sampler, "_n_startup_trials", 0)
        self.attempts = 10
        self._asked: dict[int, Any] = {}  # trials, by number

    def ask(self, space: Space, sequence: np.random.SeedSequence, fixed: Params | None = None) -> tuple[int, Params]:
        """A new trial: its number in this study and its parameters, which are `fixed` where these are given."""
        with quiet(self._optuna):
            reseed(self._study.sampler, sequence)
            if fixed is not None:
                self._study.enqueue_trial(fixed)
            trial = self._study.ask()
            self._asked[trial.number] = trial
            _ = getattr(trial, "relative_params", None)  # samples now, even where all is fixed: CMA-ES counts that
            params: Params = {}
            values: dict[str, Any] = {}
            for name in space.parents_first():
                parameter = space[name]
                if not self.asks_for_all and not space.active(name, values):
                    continue
                if fixed is not None and name not in fixed and parameter.size > 1:
                    continue  # there was no such parameter then
                if parameter.size > 1:
                    params[name] = _suggested(trial, name, distribution(parameter))
                values[name] = decoded(parameter, params[name]) if parameter.size > 1 else parameter.grid()[0]
            return trial.number, params

    def add(self, space: Space, params: Params, pruned: Mapping[int, float] | None = None) -> int:
        """A trial that was proposed before, without asking the sampler again; if it was pruned, with its epochs."""
        create = self._optuna.trial.create_trial
        distributions = {name: distribution(space[name]) for name in params}
        states = self._optuna.trial.TrialState
        state = states.PRUNED if pruned else states.RUNNING
        about = {"params": params, "distributions": distributions, "intermediate_values": dict(pruned or {})}
        self._study.add_trial(create(state=state, **about))
        return len(self._study.get_trials(deepcopy=False)) - 1

    def tell(self, number: int, values: Sequence[float] | None, pruned: Mapping[int, float] | None = None) -> None:
        """How a trial has ended; None if it has failed or was not run, or was pruned, with the value of each epoch."""
        with quiet(self._optuna):
            states = self._optuna.trial.TrialState
            for step, value in (pruned or {}).items():
                self._asked[number].report(value, step)
            state = states.PRUNED if pruned else states.FAIL if values is None else None
            self._study.tell(number, None if pruned else values, state=state)
            self._asked.pop(number, None)

    @property
    def completed(self) -> int:
        """The number of trials with values."""
        state = self._optuna.trial.TrialState.COMPLETE
        return len(self._study.get_trials(deepcopy=False, states=(state,)))


def _suggested(trial: Any, name: str, wanted: Any) -> Any:
    if hasattr(wanted, "choices"):
        return trial.suggest_categorical(name, wanted.choices)
    kind = trial.suggest_float if type(wanted).__name__ == "FloatDistribution" else trial.suggest_int
    return kind(name, wanted.low, wanted.high, log=wanted.log)


class GaussianProcess:
    """The same interface for Optuna's `GPSampler`, which is asked in another process; see `gaussian_process.py`.

    Args:
        directions: `"minimize"` or `"maximize"` for each objective.
    """

    is_stateless = True
    asks_for_all = True
    startup = _OF_GP
    attempts = 3  # each takes seconds

    def __init__(self, directions: Sequence[str]) -> None:
        self._directions = list(directions)
        self._trials: list[dict[str, Any]] = []
        self._process: subprocess.Popen[str] | None = None

    @property
    def completed(self) -> int:
        """The number of trials with values."""
        return sum(trial["values"] is not None for trial in self._trials)

    def ask(self, space: Space, sequence: np.random.SeedSequence, fixed: Params | None = None) -> tuple[int, Params]:
        """As `Study.ask`."""
        if fixed is None and self.completed < self.startup:
            rng = np.random.default_rng(sequence)
            fixed = params_of(space, space.sample(rng), rng)
        elif fixed is None:
            fixed = self._asked(space, int(sequence.generate_state(1)[0]))
        return self.add(space, fixed), fixed

    def add(self, space: Space, params: Params) -> int:  # noqa: ARG002  (of `Study`)
        """As `Study.add`."""
        self._trials.append({"params": params, "values": None, "ended": False})
        return len(self._trials) - 1

    def tell(
        self,
        number: int,
        values: Sequence[float] | None,
        pruned: Mapping[int, float] | None = None,  # noqa: ARG002  (of `Study`; the process leaves those out)
    ) -> None:
        """As `Study.tell`."""
        self._trials[number] |= {"values": None if values is None else list(values), "ended": True}

    def _asked(self, space: Space, seed: int) -> Params:
        from optuna.distributions import distribution_to_json

        wanted: dict[str, Parameter] = {name: parameter for name, parameter in space.items() if parameter.size > 1}
        known = [trial for trial in self._trials if trial["params"].keys() == wanted.keys()]
        question = {
            "seed": seed,
            "directions": self._directions,
            "distributions": {name: distribution_to_json(distribution(wanted[name])) for name in wanted},
            # what has failed has no values, and would look as if it was running
            "trials": [trial for trial in known if trial["values"] is not None or not trial["ended"]],
        }
        for process in (self._process, None):
            if process is None:
                process = self._started()  # the one there was may have been killed
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps(question), file=process.stdin, flush=True)
            if answer := process.stdout.readline():
                found = json.loads(answer)
                if "error" in found:
                    raise SamplerError(f'strategy="gp" failed: {found["error"]}')
                return dict(found["params"])
        raise SamplerError('strategy="gp" failed: the process that computes the proposals has ended, twice.')

    def _started(self) -> subprocess.Popen[str]:
        file = Path(__file__).with_name("gaussian_process.py")
        process = subprocess.Popen(
            [sys.executable, "-P", str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, _stop, process)
        self._process = process
        return process


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.wait()

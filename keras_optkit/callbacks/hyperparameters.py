"""Driving any hyperparameter of any optimizer by a schedule, inside the compiled training step."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule

from keras_optkit import arguments
from keras_optkit.callbacks.callback import Callback, number
from keras_optkit.fit.basis import frozen
from keras_optkit.fit.hooks import Hook, around
from keras_optkit.fit.instrument import Instrument
from keras_optkit.fit.steps import attach, detach, renew
from keras_optkit.optimizers import Optimizer
from keras_optkit.optimizers.of_model import optimizers_of, unscaled
from keras_optkit.precision import scalar_dtype
from keras_optkit.private import known_variables
from keras_optkit.registry import register
from keras_optkit.schedules import Cosine, Linear, Schedule

Tensor = Any
#: A schedule, or what stands in for a function.
Source = Callable[[Any], Any]

#: Numbers that Keras hands to `jnp.clip`, which takes no tensor in disguise (`Driven`).
_NUMBERS_ON_JAX = {"clipvalue", "l1_regularization_strength"}

#: Numbers in the config of Keras's optimizers that say how the step is built, not what it computes.
_STRUCTURAL = {"gradient_accumulation_steps", "ema_overwrite_frequency", "loss_scale_factor", "name"}


class Driven:
    """A scalar tensor instead of a Python number.

    Optimizers read a hyperparameter in two ways. In arithmetic with tensors this behaves as a number does: it takes the
    other's dtype, and until then keeps its own precision. In the questions that decide whether a part of the update
    exists at all (`if self.momentum != 0`, `if self.clipnorm and self.clipnorm > 0`) the answer must be known when the
    step is compiled, and is yes. Every other use of it as a Python number raises.

    Args:
        name: Name of the hyperparameter.
        tensor: Its value.
        dtype: The dtype where nothing else decides.
        when_read: Called with the name when the value is used.
    """

    def __init__(self, name: str, tensor: Tensor, dtype: str, when_read: Callable[[str], None]):
        self._name, self._tensor, self._dtype, self._when_read = name, tensor, dtype, when_read

    def to(self, dtype: Any = None) -> Tensor:
        """The tensor in `dtype`."""
        self._when_read(self._name)
        return ops.cast(self._tensor, keras.backend.standardize_dtype(dtype or self._dtype))

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        return self.to(dtype)

    def __jax_array__(self) -> Tensor:
        return self.to()

    def __bool__(self) -> bool:
        return True

    def __gt__(self, other: Any) -> bool:
        if isinstance(other, Real) and other == 0:
            return True
        raise self._refusal()

    def __index__(self) -> int:
        raise self._refusal()

    def __float__(self) -> float:
        raise self._refusal()

    def _refusal(self) -> TypeError:
        return TypeError(f"{self._name} cannot be driven: it has to be a Python number when the step is compiled.")

    def __pos__(self) -> Driven:
        return self

    def __neg__(self) -> Driven:
        return self._combine(operator.mul, -1, False)

    def _combine(self, compute: Callable[[Any, Any], Any], other: Any, swapped: bool) -> Any:
        if isinstance(other, Driven):
            other = other._tensor
        elif not isinstance(other, Real):
            mine = self.to(other.dtype)
            return compute(other, mine) if swapped else compute(mine, other)
        self._when_read(self._name)
        tensor = compute(other, self._tensor) if swapped else compute(self._tensor, other)
        return Driven(self._name, tensor, self._dtype, self._when_read)


def _add_arithmetic() -> None:
    for name in ("add", "sub", "mul", "truediv", "pow"):
        compute = getattr(operator, name)
        setattr(Driven, f"__{name}__", lambda self, other, c=compute: self._combine(c, other, False))
        setattr(Driven, f"__r{name}__", lambda self, other, c=compute: self._combine(c, other, True))


_add_arithmetic()


class _Driven:
    """One optimizer whose hyperparameters are tensors inside of `apply`, while the step is traced."""

    def __init__(self, optimizer: Any, names: Iterable[str]):
        self.optimizer, self.names = optimizer, sorted(names)
        self.attributes = [name for name in self.names if name != "learning_rate"]  # which is a variable in all Keras
        self._inside = 0
        self._read: set[str] = set()
        self._numbers: dict[str, Any] = {}

    @contextlib.contextmanager
    def with_tensors(self, sources: Mapping[str, Source], dtype: str) -> Iterator[None]:
        """Around `apply`."""
        optimizer = self.optimizer
        attributes: dict[str, Any] = {}
        if not self._inside:
            self._read = set()
        for name in self.names:
            source = sources[name]
            value = Schedule.real(source(optimizer.iterations))
            if name == "learning_rate":
                optimizer.learning_rate.assign(ops.cast(value, optimizer.learning_rate.dtype))
            elif isinstance(optimizer, Optimizer):  # ours read schedules themselves
                attributes[name] = source
                self._read.add(name)
            else:
                attributes[name] = Driven(name, value, dtype, self._read.add)
        if not self._inside:
            self._numbers = {name: getattr(optimizer, name) for name in attributes}
        self._inside += 1  # the replicas of a strategy are traced in turns, and so enter before others have left
        _set(optimizer, attributes)
        try:
            yield
        except Exception as error:
            if self._numbers.get("momentum") == 0:
                raise ValueError(
                    f"momentum cannot be driven: this {type(optimizer).__name__} was built with momentum=0 and keeps "
                    "no velocity. Make it with a momentum above 0."
                ) from error
            raise
        finally:
            self._inside -= 1
            if not self._inside:
                _set(optimizer, self._numbers)
        unread = attributes.keys() - self._read
        if unread and not self._inside:
            raise ValueError(
                f"{', '.join(sorted(unread))} cannot be driven: {type(optimizer).__name__}, as it is configured, does "
                "not read it in its update."
            )

    def put_back(self) -> None:
        """An exception in one replica leaves the others where they were."""
        if self._inside:
            self._inside = 0
            _set(self.optimizer, self._numbers)


class _FromHost(LearningRateSchedule):
    """What a function of the update count has returned on the host, in the step."""

    def __init__(self, name: str, drive: _Drive):
        self._name, self._drive = name, drive

    def __call__(self, step: Any) -> Tensor:  # noqa: ARG002
        return self._drive[self._name]


class _Drive(Instrument):
    """Has schedules evaluated inside of the training step.

    Attributes:
        sources: Name of a hyperparameter to schedule; for a function, what the host has set under the name.
    """

    def __init__(self, model: Any, schedules: Mapping[str, Any], optimizers: Iterable[Any]):
        functions = [name for name, value in schedules.items() if not _is_schedule(value)]
        super().__init__(model, dict.fromkeys(functions, "only_first_replica"), scalar_dtype())
        self.sources = {name: _FromHost(name, self) if name in functions else s for name, s in schedules.items()}
        self._driven = [_Driven(o, [name for name in schedules if name in drivable(o)]) for o in optimizers]
        self._tried = False

    def hooks(self) -> list[Callable[[], None]]:
        """Around `apply`. On JAX, Keras's loss scaling does not call its own, but that of the optimizer inside."""
        found = {id(unscaled(outer)): outer for outer in optimizers_of(self.model)}
        on_jax = keras.config.backend() == "jax"
        hooks = [
            around(each.optimizer if on_jax else found[id(each.optimizer)], "apply", self._hook(each), first=True)
            for each in self._driven
        ]
        perturbing = [each for each in self._driven if hasattr(each.optimizer, "perturbed_values")]
        return hooks + [around(each.optimizer, "perturbed_values", self._hook(each), first=True) for each in perturbing]

    def _hook(self, each: _Driven) -> Hook:
        def hook(*_: Any, **__: Any) -> contextlib.AbstractContextManager[Any]:
            # numbers keep their precision until they meet a tensor, as Python's do; this is for meeting none
            double = "float64" in {v.dtype for v in self.model.trainable_variables}
            return each.with_tensors(self.sources, "float64" if double else "float32")

        return hook

    def driven(self) -> dict[Any, set[str]]:
        """A step does not depend on the numbers that are replaced in it."""
        return {each.optimizer: set(each.attributes) for each in self._driven}

    def try_out(self) -> None:
        """Traces an update for what it may raise: in the training step, Keras on JAX would lose all variables by it."""
        if self._tried or keras.config.backend() != "jax":
            return
        import jax

        for each in self._driven:
            if not each.optimizer.built:
                continue

            # an optimizer that needs a second gradient takes none without
            given = getattr(each.optimizer, "given_second_gradient", contextlib.nullcontext)

            def update(grads: list[Tensor], each: _Driven = each, given: Any = given) -> None:
                with keras.StatelessScope(), self._hook(each)(), given():
                    each.optimizer.apply(grads)

            known = known_variables(each.optimizer) or self.model.trainable_variables
            jax.eval_shape(update, [v.value for v in known])
        self._tried = True

    def iterations(self) -> list[int]:
        """How many updates each optimizer has made."""
        return [number(each.optimizer.iterations) for each in self._driven]

    def numbers(self) -> list[list[Any]]:
        """The attributes of each optimizer that the schedules stand in for."""
        return [[getattr(each.optimizer, name) for name in each.attributes] for each in self._driven]

    def leave_numbers(self, begun_at: Sequence[int]) -> None:
        """Sets the attributes to the numbers of the last update, if there was one since."""
        for each, begun, reached in zip(self._driven, begun_at, self.iterations(), strict=True):
            if reached > begun:
                for name in each.attributes:
                    setattr(each.optimizer, name, number(self.sources[name](reached - 1)))

    def release(self) -> None:
        """Leaves the optimizers as they were."""
        for each in self._driven:
            each.put_back()


@register(
    "callback",
    paper="Smith, arXiv 1803.09820 (learning rate, momentum and weight decay are scheduled together)",
    cases=({"schedules": {"learning_rate": Cosine(0.1, 8), "weight_decay": Linear(0.0, 8, final=0.1)}},),
)
class ScheduleHyperparameters(Callback):
    """Lets hyperparameters of the optimizer follow schedules, update by update.

    A hyperparameter that is a Python number is compiled into the training step: setting `optimizer.momentum` during
    `fit` changes nothing. This callback has the schedules evaluated inside the step instead, at the number of updates
    made before, `optimizer.iterations`. It thus works in graph mode and with XLA, in mixed precision, with gradient
    accumulation (an update is an update of the weights) and with `steps_per_execution > 1`, and a second `fit`
    continues where the first one ended.

    With Keras's optimizers any number in the config can be driven: `learning_rate`, `weight_decay`, `momentum`,
    `beta_1`, `clipnorm` and so on; with ours, the learning rate, the weight decay and the numbers of the update rule.
    After `fit`, and at the end of every epoch, the attributes hold plain numbers, the values used last, so that the
    optimizer can be saved as usual.

    A value can be a `LearningRateSchedule`, ours or Keras's, or a Python function of the update count. A function is
    called by the host before every batch, which costs a synchronisation with the device, works on the TensorFlow and
    JAX backends only, and with `steps_per_execution=k` is called before every k-th batch, so that k updates have one
    value.

    SGD and RMSprop keep no velocity when they are built with `momentum=0`; give them a momentum above 0 to have it
    driven. (Keras's on TensorFlow are built by the first step, and new ones thus with the momentum that is driven.) An
    optimizer that was made with a schedule as its learning rate has one already, so that driving `learning_rate`
    raises. Clipping thresholds must stay above 0. On JAX, `clipvalue` and the `l1_regularization_strength` of Ftrl
    cannot be driven.

    Of several optimizers that a model holds, those are driven that have the hyperparameter, each by its own updates.
    `keras.optimizers.MultiOptimizer` cannot be driven.

    When not to use it: for the learning rate alone; `optimizer = Adam(schedule)` is simpler and is saved with the
    model. Not together with another callback that sets the same hyperparameter, e.g. ReduceLROnPlateau.

    Args:
        schedules: Name of a hyperparameter to schedule, or to function of the update count.

    Raises:
        TypeError: For a value that is neither a schedule nor a function.
        ValueError: For no schedules at all; when training begins, before the first update, for a name that the
            optimizer does not have, with the names it has, and for a hyperparameter that cannot be driven.
        RuntimeError: When training begins, for a function on another backend.

    Example:
    ```python
    import keras
    import keras_optkit as ok

    x = keras.random.normal((64, 4), seed=0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9), loss="mse")
    driven = ok.callbacks.ScheduleHyperparameters(
        {
            "learning_rate": ok.schedules.Cosine(0.1, steps=8),
            "momentum": ok.schedules.Linear(0.5, steps=8, final=0.9),
            "weight_decay": lambda step: 0.0 if step < 4 else 0.01,
        }
    )
    model.fit(x, x[:, :1], batch_size=16, epochs=2, callbacks=[driven], verbose=0)
    print(model.optimizer.momentum, model.optimizer.weight_decay)  # as in the 8th update, number 7: 0.85 0.01
    ```
    """

    def __init__(self, schedules: Mapping[str, LearningRateSchedule | Callable[[int], float]]):
        super().__init__()
        if not isinstance(schedules, Mapping):
            raise TypeError(f"schedules must be a dict of hyperparameter to schedule, got {schedules!r}.")
        if not schedules:
            raise ValueError("schedules must name at least one hyperparameter, got {}.")
        for name, value in schedules.items():
            if not callable(value):
                raise TypeError(
                    f"schedules[{name!r}] must be a LearningRateSchedule or a function of the update count, "
                    f"got {value!r}."
                )
        self.schedules = dict(schedules)
        self._drive: Any = None

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()
        model = self.model
        optimizers = self._optimizers()
        begun_at = self._updates()
        self._check_values(begun_at)
        key = ("ScheduleHyperparameters", frozen(self._traced()), tuple(map(frozen, optimizers)))
        self._drive = attach(model, key, lambda: _Drive(model, self.schedules, optimizers))
        self._begun_at, self._found = self._drive.iterations(), self._drive.numbers()
        self._call_functions()
        self._drive.try_out()

    def _traced(self) -> dict[str, Any]:
        """The schedules; of a function only that there is one, since the host calls it."""
        return {name: value if _is_schedule(value) else None for name, value in self.schedules.items()}

    def _check_values(self, step: int) -> None:
        for name, schedule in self.schedules.items():
            if not _is_schedule(schedule):
                continue
            value = np.asarray(ops.convert_to_numpy(schedule(step)))
            if value.shape != ():
                raise ValueError(f"schedules[{name!r}] must return a scalar, got one of shape {value.shape}.")
            arguments.real(f"the value of {name} at update {step}", value.item())

    def _optimizers(self) -> list[Any]:
        """The optimizers that are driven: of several, those that have one of the hyperparameters.

        Raises:
            ValueError: If there is none, or for what cannot be driven.
        """
        found = [unscaled(optimizer) for optimizer in optimizers_of(self.model)]
        if not found:
            raise ValueError(f"schedules need an optimizer to drive, and model {self.model.name!r} holds none.")
        known = {name: None for optimizer in found for name in drivable(optimizer)}
        for name in self.schedules:
            if name not in known:
                kinds = " or ".join(dict.fromkeys(type(optimizer).__name__ for optimizer in found))
                raise ValueError(
                    f"schedules: {kinds} has no hyperparameter {name!r} that can be driven. "
                    f"Allowed: {', '.join(known) or 'none'}.{arguments.near(name, known)}"
                )
        driven = [optimizer for optimizer in found if set(drivable(optimizer)) & set(self.schedules)]
        for optimizer in driven:
            self._refuse_what_cannot_be_driven(optimizer)
        return driven

    def _refuse_what_cannot_be_driven(self, optimizer: Any) -> None:
        for name in sorted(_NUMBERS_ON_JAX & set(self.schedules) & set(drivable(optimizer))):
            if keras.config.backend() == "jax" and not isinstance(optimizer, Optimizer):
                raise ValueError(
                    f"{name} cannot be driven on the JAX backend, where {type(optimizer).__name__} needs it to be a "
                    "Python number."
                )
        if "learning_rate" in self.schedules and not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                f"learning_rate cannot be driven: this {type(optimizer).__name__} was made with a schedule as its "
                "learning rate and follows that. Make it with a number."
            )

    def _call_functions(self) -> None:
        functions = {name: value for name, value in self.schedules.items() if not _is_schedule(value)}
        if functions:
            step = self._updates()
            for name, function in functions.items():
                self._drive[name] = arguments.real(f"the value of {name} at update {step}", function(step))

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._call_functions()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._leave_numbers()

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:  # noqa: ARG002, D102
        self._end()

    def on_train_failure(self, error: BaseException) -> None:  # noqa: ARG002, D102
        self._end()

    def _leave_numbers(self) -> None:
        _ = self.model  # on JAX, has Keras fill the variables
        self._drive.leave_numbers(self._begun_at)

    def _end(self) -> None:
        if self._drive is not None:
            model, drive, self._drive = self.model, self._drive, None
            detach(drive)
            drive.leave_numbers(self._begun_at)
            if drive.numbers() != self._found:
                renew(model)


def drivable(optimizer: Any) -> list[str]:
    """The hyperparameters that are numbers, or may be."""
    if isinstance(optimizer, Optimizer):
        fields = [field.name for field in dataclasses.fields(optimizer.rule)]
        own = [name for name in fields if _is_number(getattr(optimizer, name))]
        return ["learning_rate", "weight_decay", *own]
    may_be_none = {"weight_decay", "clipnorm", "clipvalue", "global_clipnorm"}
    config = optimizer.get_config()
    numbers = [name for name, value in config.items() if _is_number(value) or (value is None and name in may_be_none)]
    rate = ["learning_rate"] if hasattr(optimizer, "learning_rate") else []  # Keras's MultiOptimizer has none
    return [*rate, *(name for name in numbers if name != "learning_rate" and name not in _STRUCTURAL)]


def _is_schedule(value: Any) -> bool:
    return isinstance(value, LearningRateSchedule)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _set(optimizer: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(optimizer, Optimizer):
            setattr(optimizer, name, value)
        else:  # past Keras's and TensorFlow's tracking of attributes: this is for the time of one call only
            vars(optimizer)[name] = value

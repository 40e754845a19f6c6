"""The one subclass of `keras.optimizers.Optimizer`: it owns the variables, the order of a step, and saving."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import re
import warnings
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit import arguments
from keras_optkit.optimizers import distribute
from keras_optkit.optimizers.packing import PACK_BELOW, Bucket, pack
from keras_optkit.optimizers.rule import Hyper, Rule, Tensor, Value, is_dynamic
from keras_optkit.precision import at_least_float32, scalar_dtype
from keras_optkit.saving import FromSignature, constructor_parameters

_FORMAT = 1


class Optimizer(FromSignature, keras.optimizers.Optimizer):
    """Base of all optimizers of keras_optkit: hosts one update rule and does everything around it.

    A subclass is a signature, a docstring and a rule. Every hyperparameter of the rule is an attribute of the optimizer
    that can be read and, before the training function is traced, set; the config is collected from the constructor's
    signature. The order of one step is: sum over replicas, unscale, accumulate, clip, rule, decoupled weight decay,
    constraints, moving average. Clipping thus sees the gradient of the whole global batch, and schedules, weight decay
    and the average count updates of the weights, not micro-batches.

    Float16 and bfloat16 parameters have float32 slots and are updated in float32.

    Args:
        learning_rate: A number >= 0, or a `keras.optimizers.schedules.LearningRateSchedule` of the update count.
        rule: The update rule.
        weight_decay: λ of decoupled decay, `θ ← θ - η λ θ` besides the rule's step; None for none. A number >= 0 or a
            schedule.
        clipnorm: Each variable's gradient is scaled down to this L2 norm.
        clipvalue: Each number of the gradient is clipped to ±this.
        global_clipnorm: The gradient of all variables together is scaled down to this L2 norm. At most one of the
            three can be given; None is no clipping.
        gradient_accumulation_steps: k >= 2: the weights are updated in every k-th call only, with the mean of the k
            gradients.
        use_ema: Keeps an exponential moving average of the weights, which they are set to at the end of `fit`
            (`finalize_variable_values`).
        ema_momentum: Decay of that average, in [0, 1): `a ← momentum a + (1 - momentum) θ`; the first update sets `a`.
        decay_mask: `"auto"` spares vectors and scalars (biases, normalisation scales) from weight decay, `"all"`
            decays everything, as Keras and torch do by default.
        name: Name of the optimizer.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.
    """

    #: Parameters with fewer numbers than this are packed; see `keras_optkit.optimizers.packing`.
    pack_below = PACK_BELOW

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # help() and editors then list the common keywords instead of "**common"; keyword-only where inherited
        own = list(inspect.signature(cls.__init__).parameters)
        known = constructor_parameters(cls)
        shown = [p if p.name in own else p.replace(kind=p.KEYWORD_ONLY) for p in known.values()]
        cls.__signature__ = inspect.Signature(sorted(shown, key=lambda p: p.kind))

    def __new__(cls, *_: Any, **kwargs: Any) -> Optimizer:
        known = constructor_parameters(cls)
        for name, value in kwargs.items():
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no argument {name!r} (got {name}={value!r}).{arguments.near(name, known)} "
                    f"Allowed: {', '.join(known)}."
                )
        return super().__new__(cls)

    def __init__(
        self,
        learning_rate: float | Schedule,
        rule: Rule,
        /,
        *,
        weight_decay: float | Schedule | None = None,
        clipnorm: float | None = None,
        clipvalue: float | None = None,
        global_clipnorm: float | None = None,
        gradient_accumulation_steps: int | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        decay_mask: str = "auto",
        name: str | None = None,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a keras_optkit.optimizers.Rule, got {rule!r}.")
        schedule, multiplier = _schedule_and_multiplier(learning_rate)
        clips = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
        for clip, value in clips.items():
            arguments.real(clip, value, 0, closed="neither", optional=True)
        if sum(value is not None for value in clips.values()) > 1:
            raise ValueError(f"At most one of {', '.join(clips)} can be given, got {clips}.")
        # Keras's own rate, decay, clipping, accumulation and average stay off: they act in another order (see above)
        super().__init__(learning_rate=lambda: self.learning_rate, name=name)
        self._updates = super().iterations
        self._schedule = schedule
        self._multiplier = self.add_variable(
            (), initializer=lambda _, dtype: ops.full((), multiplier, dtype), dtype=scalar_dtype(), name="learning_rate"
        )
        self.weight_decay = _checked_decay(weight_decay)
        self.clipnorm, self.clipvalue, self.global_clipnorm = clipnorm, clipvalue, global_clipnorm
        self.gradient_accumulation_steps = arguments.integer(
            "gradient_accumulation_steps", gradient_accumulation_steps, 2, optional=True
        )
        self.use_ema = arguments.boolean("use_ema", use_ema)
        self.ema_momentum = arguments.real("ema_momentum", ema_momentum, 0, 1, closed="left")
        self.decay_mask = arguments.choice("decay_mask", decay_mask, ("auto", "all"))
        # held in a namespace, where Keras's and TensorFlow's attribute tracking does not wrap lists and dicts
        self._held = SimpleNamespace(state=None, buckets=(), pending=None)
        self.rule = rule

    # -- hyperparameters ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        rule = self.__dict__.get("rule")
        if rule is not None and name in _fields(rule):
            return getattr(rule, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        rule = self.__dict__.get("rule")
        if rule is not None and name in _fields(rule):
            name, value = "rule", dataclasses.replace(rule, **{name: value})
        elif name == "weight_decay":
            value = _checked_decay(value)
        super().__setattr__(name, value)

    @property
    def iterations(self) -> keras.Variable:
        """How often the weights have been updated."""
        return self._updates

    @property
    def learning_rate(self) -> Any:
        """The present learning rate, `schedule(iterations) * multiplier`; with a constant rate, its variable.

        Assigning a number always works: with a schedule it sets the multiplier, so that the schedule goes on from
        there. The multiplier is part of the saved state. Assigning a schedule replaces the rate altogether; a training
        function that is traced already must then be made anew (`model.make_train_function(force=True)`).
        """
        return self._multiplier if self._schedule is None else self._rate(self._updates, self._multiplier)

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, Schedule):
            self._schedule = value
            self._multiplier.assign(1.0)
            return
        rate = arguments.real("learning_rate", _as_number(value), 0)
        if self._schedule is not None:
            scheduled = _as_number(self._schedule(self._updates))
            if scheduled == 0:
                if rate == 0:
                    return
                raise ValueError(
                    f"learning_rate cannot be set to {rate!r} while its schedule is 0 (at update "
                    f"{_as_number(self._updates)}): the rate is the schedule times a multiplier."
                )
            rate /= scheduled
        self._multiplier.assign(rate)

    def _rate(self, iterations: Tensor, multiplier: Tensor) -> Tensor:
        if self._schedule is None:
            return multiplier
        return ops.cast(self._schedule(iterations), scalar_dtype()) * multiplier

    # -- variables ----------------------------------------------------------------------------------------------------

    def build(self, variables: Sequence[Any]) -> None:
        """Creates the state for `variables`, the weights to be trained, in this order."""
        if self.built:
            return
        variables = list(variables)
        if not variables:
            raise ValueError(f"{self.name} was given no variables to train.")
        for variable in variables:
            if getattr(variable, "overwrite_with_gradient", False):  # Keras's float8 scales
                raise ValueError(f"{self.name} cannot train {variable.path}: float8 training is not supported.")
        super().build(variables)
        shapes = [tuple(v.shape) for v in variables]
        buckets = pack(
            shapes,
            [keras.backend.standardize_dtype(v.dtype) for v in variables],
            [self.decay_mask == "all" or len(shape) > 1 for shape in shapes],
            elementwise=self.rule.elementwise,
            below=self.pack_below,
        )
        self._held.buckets = buckets
        with distribute.outside_graph():
            self._held.state = self._new_state(variables, shapes)
            if self._held.pending is not None:
                pending, self._held.pending = self._held.pending, None
                self._restore(pending)

    def _new_state(self, variables: list[Any], shapes: list[tuple[int, ...]]) -> dict[str, Any]:
        dtypes = {i: at_least_float32(b.dtype) for b in self._held.buckets for i in b.indices}

        def like_weights(name: str) -> list[keras.Variable]:
            return [self.add_variable(shape, dtype=dtypes[i], name=f"{name}_{i}") for i, shape in enumerate(shapes)]

        state = {
            "weights": variables,
            "slots": [self._new_slots(b, [variables[i] for i in b.indices]) for b in self._held.buckets],
            "iterations": self._updates,
            "multiplier": self._multiplier,
        }
        if self.gradient_accumulation_steps:
            state["micro"] = self.add_variable((), dtype="int", name="micro")
            state["accumulated"] = like_weights("accumulated")
        if self.use_ema:
            state["average"] = like_weights("average")
        return state

    def _new_slots(self, bucket: Bucket, variables: list[Any]) -> dict[str, keras.Variable]:
        dtype = at_least_float32(bucket.dtype)
        slots = {}
        for name, initial in self.rule.slots().items():
            if callable(initial):
                value = initial(ops.cast(bucket.join([ops.convert_to_tensor(v) for v in variables]), dtype))
            else:
                value = ops.full(bucket.shape, initial, dtype)
            slots[name] = self.add_variable(value.shape, lambda *_, v=value, **__: v, dtype, name=name)
        return slots

    # -- the step -----------------------------------------------------------------------------------------------------

    @distribute.untraced
    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates the weights with `grads`, one gradient (or None) for each variable.

        Args:
            grads: Gradients in the order of `trainable_variables`. A variable whose gradient is None keeps its value
                and its state, and a warning names it.
            trainable_variables: The variables; those the optimizer was built with when left out. The first call
                builds the optimizer. Variables of the optimizer that are not among them keep their values.

        Raises:
            ValueError: If the numbers do not match, a variable is unknown, or every gradient is None.
        """
        grads = list(grads)
        if trainable_variables is None:
            if not self.built:
                raise ValueError(f"{self.name} is not built yet; pass the variables, or call build(variables) first.")
            variables = self._held.state["weights"]
        else:
            variables = list(trainable_variables)
            self.build(variables)
        if len(grads) != len(variables):
            raise ValueError(f"grads must match the variables one to one, got {len(grads)} for {len(variables)}.")
        distribute.run(self._step, self._held.state, self._in_order(grads, variables))

    def _in_order(self, grads: list[Tensor | None], variables: Sequence[Any]) -> list[Tensor | None]:
        """One gradient or None for each variable the optimizer was built with."""
        missing = [_path(v) for g, v in zip(grads, variables, strict=True) if g is None]
        if len(missing) == len(grads):
            raise ValueError(f"No gradients provided for any variable; the variables are {missing}.")
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        places = {distribute.key(v): i for i, v in enumerate(self._held.state["weights"])}
        ordered: list[Tensor | None] = [None] * len(places)
        for grad, variable in zip(grads, variables, strict=True):
            place = places.get(distribute.key(variable))
            if place is None:
                raise ValueError(
                    f"Unknown variable {_path(variable)}: {self.name} was built for {len(places)} other variables. "
                    "Make a new optimizer for a new set of variables."
                )
            ordered[place] = grad
        return ordered

    def _step(self, state: dict[str, Any], grads: list[Tensor | None]) -> dict[str, Any]:
        """One call of `apply` as a pure function of the state."""
        dtypes = [at_least_float32(w.dtype) for w in state["weights"]]
        grads = [None if g is None else ops.cast(g, dtype) for g, dtype in zip(grads, dtypes, strict=True)]
        if self.loss_scale_factor is not None:
            grads = [None if g is None else g / self.loss_scale_factor for g in grads]
        k = self.gradient_accumulation_steps
        if not k:
            return self._update(state, grads)
        sums = [a if g is None else a + g for a, g in zip(state["accumulated"], grads, strict=True)]
        micro = state["micro"] + 1

        def update() -> dict[str, Any]:
            means = [None if g is None else a / k for a, g in zip(sums, grads, strict=True)]
            cleared = {"accumulated": [ops.zeros_like(a) for a in sums], "micro": ops.zeros_like(micro)}
            return self._update(state, means) | cleared

        return ops.cond(ops.equal(micro, k), update, lambda: state | {"accumulated": sums, "micro": micro})

    def _update(self, state: dict[str, Any], grads: list[Tensor | None]) -> dict[str, Any]:
        """One update of the weights as a pure function of the state."""
        iterations = state["iterations"]
        rate = self._rate(iterations, state["multiplier"])
        grads = self._clip(grads)
        weights, slots = list(state["weights"]), list(state["slots"])
        memo: dict[Any, Tensor] = {}
        for b, bucket in enumerate(self._held.buckets):
            present = [place for place, i in enumerate(bucket.indices) if grads[i] is not None]
            if not present:
                continue
            h = Hyper(iterations, rate, at_least_float32(bucket.dtype), memo)
            if len(present) == len(bucket.indices):
                slots[b] = self._update_bucket(bucket, grads, weights, slots[b], h)
            else:
                parts = {name: bucket.split(slot) for name, slot in slots[b].items()}
                some = bucket.only(present)
                old = {name: some.join([part[place] for place in present]) for name, part in parts.items()}
                for name, new in self._update_bucket(some, grads, weights, old, h).items():
                    for place, value in zip(present, some.split(new), strict=True):
                        parts[name][place] = value
                slots[b] = {name: bucket.join(part) for name, part in parts.items()}
        for i, variable in enumerate(self._held.state["weights"]):
            constraint = getattr(variable, "constraint", None)
            if constraint is not None and grads[i] is not None:
                weights[i] = constraint(weights[i])
        new = state | {"weights": weights, "slots": slots, "iterations": iterations + 1}
        if self.use_ema:
            started = ops.cast(iterations > 0, scalar_dtype())
            momentum = started * self.ema_momentum  # the first update sets the average
            new["average"] = [
                ops.cast(momentum, a.dtype) * a + ops.cast(1 - momentum, a.dtype) * ops.cast(w, a.dtype)
                for a, w in zip(state["average"], weights, strict=True)
            ]
        return new

    def _update_bucket(
        self, bucket: Bucket, grads: list[Tensor | None], weights: list[Tensor], slots: dict[str, Tensor], h: Hyper
    ) -> dict[str, Tensor]:
        """Updates the bucket's members in `weights` and returns its new slots."""
        u = bucket.join([grads[i] for i in bucket.indices])
        p = ops.cast(bucket.join([weights[i] for i in bucket.indices]), u.dtype)
        missing = set(self.rule.slots()) - set(slots)
        if missing:
            raise ValueError(
                f"{self.name} was built without the state {sorted(missing)} that {self.rule!r} needs. Give a "
                "hyperparameter that switches state on a value other than 0 before the optimizer is built."
            )
        step, new_slots = self.rule.update(u, slots, p, h)
        if set(new_slots) != set(slots):
            raise ValueError(
                f"{type(self.rule).__name__}.update returned the slots {sorted(new_slots)}, expected {sorted(slots)}."
            )
        if self.weight_decay is not None and bucket.decayed:
            step = step + h.learning_rate * h(self.weight_decay) * p
        new_p = ops.cast(p - step, bucket.dtype)
        for i, value in zip(bucket.indices, bucket.split(new_p), strict=True):
            weights[i] = value
        return new_slots

    def _clip(self, grads: list[Tensor | None]) -> list[Tensor | None]:
        if self.clipvalue is not None:
            return [None if g is None else ops.clip(g, -self.clipvalue, self.clipvalue) for g in grads]
        if self.clipnorm is not None:
            return [None if g is None else g * _shrink(_sum_of_squares(g), self.clipnorm) for g in grads]
        if self.global_clipnorm is not None:
            total = sum(ops.cast(_sum_of_squares(g), scalar_dtype()) for g in grads if g is not None)
            factor = _shrink(total, self.global_clipnorm)
            return [None if g is None else g * ops.cast(factor, g.dtype) for g in grads]
        return grads

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Sets the weights to their moving average, if one is kept; `fit` calls it at its end."""
        if not (self.use_ema and self.built and _as_number(self._updates) > 0):
            return
        places = {distribute.key(v): i for i, v in enumerate(self._held.state["weights"])}
        for variable in var_list:
            average = self._held.state["average"][places[distribute.key(variable)]]
            variable.assign(ops.cast(average, variable.dtype))

    # -- saving -------------------------------------------------------------------------------------------------------

    def _inherited_config(self) -> dict[str, Any]:
        return {}  # Keras's optimizers have a config of their own, with arguments that do not exist here

    def _config_value(self, name: str) -> Any:
        value = getattr(self, name)
        if name == "learning_rate":
            return _as_number(value) if self._schedule is None else self._schedule
        return _as_number(value) if isinstance(value, keras.Variable) else value

    def _schema(self) -> dict[str, Any]:
        """What a file says about the state in it, so that a wrong file is refused."""
        state = self._held.state or {}
        return {
            "format": _FORMAT,
            "optimizer": keras.saving.get_registered_name(type(self)),
            "learning_rate": "constant" if self._schedule is None else "schedule",
            "state": sorted([*self.rule.slots(), *({"accumulated", "average"} & set(state))]) if self.built else None,
            "variables": [[_kind(v), list(v.shape)] for v in state.get("weights", [])],
        }

    def _entries(self) -> dict[str, tuple[Any, Bucket | None]]:
        """The variables to save by name; a packed one with the bucket that it is to be split by."""
        state = self._held.state or {"iterations": self._updates, "multiplier": self._multiplier}
        entries: dict[str, tuple[Any, Bucket | None]] = {
            name: (state[name], None) for name in ("iterations", "multiplier", "micro") if name in state
        }
        for name in ("accumulated", "average"):
            entries |= {f"{name}.{i}": (v, None) for i, v in enumerate(state.get(name, []))}
        for bucket, slots in zip(self._held.buckets, state.get("slots", []), strict=True):
            entries |= {f"slot.{name}.{bucket.indices[0]}": (v, bucket) for name, v in slots.items()}
        return entries

    def save_own_variables(self, store: Any) -> None:
        """Writes the state, parameter by parameter: a file does not depend on how parameters were packed."""
        if self._held.pending is not None:  # loaded, never used
            for name, value in self._held.pending.items():
                store[name] = value
            return
        store["schema"] = np.frombuffer(json.dumps(self._schema()).encode(), np.uint8)
        for name, (variable, bucket) in self._entries().items():
            value = ops.convert_to_numpy(variable)
            if bucket is None:
                store[name] = value
            else:
                slot = name.rsplit(".", 1)[0]
                for i, part in zip(bucket.indices, bucket.split(value), strict=True):
                    store[f"{slot}.{i}"] = ops.convert_to_numpy(part)

    def load_own_variables(self, store: Any) -> None:
        """Restores the state; one of another optimizer or another model is refused.

        State that is loaded before the optimizer is built is kept, and restored when it is. A file that holds no
        optimizer state at all changes nothing.

        Raises:
            ValueError: If the saved state does not belong to this optimizer and these variables.
        """
        saved = {name: np.array(store[name]) for name in list(store.keys())}
        if not saved:
            return
        if "schema" not in saved:
            raise ValueError(
                f"The saved optimizer state was not written by keras_optkit (it holds {len(saved)} unnamed arrays) and "
                f"cannot be restored into {type(self).__name__}. Load with `compile=False`, or compile with the "
                "optimizer that was saved."
            )
        if self.built:
            self._restore(saved)
        else:
            self._refuse_unless_same(saved, ("optimizer", "learning_rate"))
            self._updates.assign(saved["iterations"])
            self._multiplier.assign(saved["multiplier"])
            self._held.pending = saved

    def _restore(self, saved: dict[str, np.ndarray]) -> None:
        fresh = self._refuse_unless_same(saved, ("optimizer", "learning_rate", "state", "variables"))
        entries = self._entries()
        if fresh:
            entries = {name: entries[name] for name in ("iterations", "multiplier")}
        for name, (variable, bucket) in entries.items():
            if bucket is None:
                variable.assign(saved[name])
            else:
                slot = name.rsplit(".", 1)[0]
                variable.assign(bucket.join([saved[f"{slot}.{i}"] for i in bucket.indices]))

    def _refuse_unless_same(self, saved: dict[str, np.ndarray], keys: Sequence[str]) -> bool:
        """Raises with the differences between the saved schema and this one; True if it was saved before build."""
        theirs, ours = json.loads(saved["schema"].tobytes()), self._schema()
        if theirs["format"] != _FORMAT:
            raise ValueError(f"The optimizer state has format {theirs['format']!r}; this version reads {_FORMAT}.")
        fresh = theirs["state"] is None
        lines = [
            line
            for key in keys
            if not (fresh and key in ("state", "variables"))
            for line in _differences(key, theirs[key], ours[key])
        ]
        if lines:
            raise ValueError(
                f"The saved optimizer state does not belong to this {type(self).__name__} (saved != here):\n  "
                + "\n  ".join(lines)
            )
        return fresh


def _differences(key: str, theirs: Any, ours: Any) -> list[str]:
    if theirs == ours:
        return []
    if key != "variables":
        return [f"{key}: {theirs} != {ours}"]
    lines = [f"number of variables: {len(theirs)} != {len(ours)}"] if len(theirs) != len(ours) else []
    lines += [
        f"variable {i}: {_described(a)} != {_described(b)}"
        for i, (a, b) in enumerate(itertools.zip_longest(theirs, ours))
        if a != b
    ]
    return lines if len(lines) <= 10 else [*lines[:10], f"... and {len(lines) - 10} more"]


def _described(variable: list[Any] | None) -> str:
    return "none" if variable is None else f"{variable[0]} {tuple(variable[1])}"


def _kind(variable: Any) -> str:
    """The last part of a variable's path, without the number that makes it unique: "kernel", "gamma", ..."""
    return re.sub(r"(_\d+)?(:\d+)?$", "", variable.name.split("/")[-1])


def _path(variable: Any) -> str:
    return getattr(variable, "path", variable.name)


def _fields(rule: Rule) -> set[str]:
    return {field.name for field in dataclasses.fields(rule)}


def _sum_of_squares(tensor: Tensor) -> Tensor:
    return ops.sum(ops.square(tensor))


def _shrink(sum_of_squares: Tensor, limit: float) -> Tensor:
    """The factor that brings a tensor with this sum of squares down to the norm `limit`; NaN goes through."""
    return limit / ops.maximum(ops.sqrt(sum_of_squares), limit)


def _as_number(value: Any) -> Any:
    return ops.convert_to_numpy(value).item() if is_dynamic(value) or ops.is_tensor(value) else value


def _checked_decay(value: Value | None) -> Value | None:
    return value if is_dynamic(value) else arguments.real("weight_decay", value, 0, optional=True)


def _schedule_and_multiplier(learning_rate: Any) -> tuple[Schedule | None, float]:
    if isinstance(learning_rate, Schedule):
        return learning_rate, 1.0
    try:
        return None, arguments.real("learning_rate", learning_rate, 0)
    except TypeError:
        raise TypeError(
            "learning_rate must be a number >= 0 or a keras LearningRateSchedule, got "
            f"{learning_rate!r} of type {type(learning_rate).__name__}."
        ) from None

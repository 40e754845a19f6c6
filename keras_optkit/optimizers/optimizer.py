"""The one host of update rules. What it does around a rule is in `engine`; its variables are in `building.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit import arguments, backend
from keras_optkit.optimizers.building import Held, as_number
from keras_optkit.optimizers.engine import averages
from keras_optkit.optimizers.engine.files import is_opening
from keras_optkit.optimizers.engine.gradients import different
from keras_optkit.optimizers.engine.nonfinite import Nonfinite
from keras_optkit.optimizers.engine.packing import PACK_BELOW
from keras_optkit.optimizers.engine.plan import with_routes
from keras_optkit.optimizers.engine.run import change
from keras_optkit.optimizers.engine.state import filled, state_bytes
from keras_optkit.optimizers.explain import Explained, Explanation
from keras_optkit.optimizers.groups import Group, checked_blocks, checked_groups, path_pattern
from keras_optkit.optimizers.groups import keras_path as _path
from keras_optkit.optimizers.keywords import (
    BEFORE_BUILD,
    CHECKS,
    COUNTS,
    EXCLUSIVE,
    READ_ONLY,
    checked_patterns,
    given_slot_dtype,
    refuse_misspelt,
)
from keras_optkit.optimizers.rate import OfFunction, is_schedule, scaled_rate, schedule_and_multiplier
from keras_optkit.optimizers.rule import Rule, Value, checked_needs, name_of
from keras_optkit.optimizers.stepping import Stepping
from keras_optkit.optimizers.transforms.transform import Transform, checked_transforms, refuse_unless_for
from keras_optkit.precision import scalar_dtype
from keras_optkit.saving import FromSignature, constructor_parameters


class Optimizer(FromSignature, Stepping):
    """Base of all optimizers of keras_optkit: hosts one update rule and does everything around it.

    A subclass is a signature, a docstring and a rule. Every hyperparameter of the rule is an attribute of the optimizer
    that can be read and, before the training function is traced, set; the config is collected from the constructor's
    signature. The order of one step is: unscale, sum over replicas, accumulate, finite check, clip, rule, decoupled
    weight decay, constraints, moving average; `transforms` of gradients come after clipping, and those of steps after
    the rule. Clipping thus sees the gradient of the whole global batch, and schedules, weight decay and the average
    count updates of the weights, not micro-batches.

    Float16 and bfloat16 parameters have float32 slots and are updated in float32.

    Args:
        learning_rate: A number >= 0, a `keras.optimizers.schedules.LearningRateSchedule` of the update count, or, as in
            Keras, a function without arguments that returns the current rate.
        rule: The update rule.
        weight_decay: λ of decoupled decay, `θ ← θ - η λ θ` besides the rule's step; None for none. A number >= 0 or a
            schedule.
        clipnorm: Each variable's gradient is scaled down to this L2 norm.
        clipvalue: Each element of the gradient is clipped to ±this.
        global_clipnorm: The gradient of all variables together is scaled down to this L2 norm. At most one of the
            three can be given; None is no clipping.
        transforms: A list of `keras_optkit.optimizers.transforms`, which change gradients before the rule, after
            clipping, or its steps; applied in this order. None for none.
        gradient_accumulation_steps: k >= 2: the weights are updated in every k-th call only, with the mean of the k
            gradients.
        use_ema: Keeps an exponential moving average of the weights, which they are set to at the end of `fit`
            (`finalize_variable_values`).
        ema_momentum: Decay of that average, in [0, 1): `a ← momentum a + (1 - momentum) θ`; the first update sets `a`.
        skip_nonfinite: k >= 1: an update whose gradient is not finite is left out, with weights, state and update
            count bitwise as before, and the k-th in a row is an error; see `nonfinite`. None: no check.
        decay_mask: `"auto"` decays kernels and embeddings but nothing else (not biases, including those of attention,
            nor the scales of normalisations); `"all"` decays everything, as Keras and torch do by default.
        decay_exclude: Regular expressions; variables whose path matches one are not decayed either. Each must match a
            variable. `exclude_from_weight_decay` sets it.
        groups: A list of `keras_optkit.Group`: parameters with rates and decays of their own. See `explain`.
        layer_decay: d in (0, 1]: the learning rate of each layer is d times that of the next one, so that the last
            layer that is trained has the full rate; multiplied with the groups' `lr_scale`. See `layer_blocks`.
        layer_blocks: What `layer_decay` counts as one layer. None: each layer that the model is made of, blocks as one;
            deep models of plain layers are counted in 12 blocks. n >= 1: as many blocks of about as many layers. A
            pattern, such as `"block_([0-9]+)"`: layers in whose paths its groups find the same are one block.
        sparse: How gradients of some rows of an embedding are handled: `"lazy"` updates only these rows and their
            state, as if the others did not exist, decay included; `"dense"` treats the gradients of the other rows as
            zeros. A rule that is not element-wise is always dense.
        fuse: Whether the update is compiled with XLA where the training step is not: `"auto"` in graphs on CPUs, unless
            the model is so small that compiling takes longer than it saves in thousands of steps; True in all graphs,
            False never. Eager steps are never compiled.
        master_weights: Keeps a float32 copy of float16 and bfloat16 weights, which is what is updated, so that steps
            below the weights' resolution add up. Costs 4 bytes for each element.
        stochastic_rounding: Rounds updated bfloat16 weights up or down at random, with the probabilities that make the
            rounded weight right on average; small steps then add up without a copy. The random numbers are a function
            of the update count. At most one of the two can be given; for float32 weights neither does anything. State
            with a `slot_dtype` of fewer bits than float32 is rounded in the same way.
        slot_dtype: What the rule's state is kept in, apart from copies of the weights and what has another shape; an
            update is computed in at least float32 anyway. None: what it is computed in. `"float32"`, `"bfloat16"` (a
            half of that), `"bfloat16+8"` (three quarters: 24 bits, 16 of them precision) or `"int8"` (a quarter:
            quantised in blocks of 256; moments alone, not those of embeddings or of parameters below 4096 elements).
            In bfloat16 running means of β > 0.996 stand still, since their steps are below the last of 8 bits; give
            `stochastic_rounding=True` then. See the guide on precision.
        state_dtype: Another name for `slot_dtype`.
        loss_scale_factor: A constant > 0 that `scale_loss` multiplies the loss by, as `fit` does, and that the
            gradients are divided by; None for none.
        shard_state: Spreads the state over the devices that batches are split over, so that each holds a part of it,
            under a `keras.distribution` on JAX. Updates are the same up to rounding. Without a distribution it is an
            error. See the guide on `keras.distribution`.
        name: Name of the optimizer.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.
    """

    #: Parameters with fewer elements than this are packed; see `keras_optkit.optimizers.engine.packing`.
    pack_below = PACK_BELOW

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update_step" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}.update_step would never be called: the update is that of a Rule of "
                "keras_optkit.optimizers, which is given to super().__init__."
            )
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
        transforms: Sequence[Transform] | None = None,
        gradient_accumulation_steps: int | None = None,
        use_ema: bool = False,
        ema_momentum: float = 0.99,
        skip_nonfinite: int | None = None,
        decay_mask: str = "auto",
        decay_exclude: Sequence[str] | None = None,
        groups: Sequence[Group] | None = None,
        layer_decay: float | None = None,
        layer_blocks: int | str | None = None,
        sparse: str = "lazy",
        fuse: bool | str = "auto",
        master_weights: bool = False,
        stochastic_rounding: bool = False,
        slot_dtype: str | None = None,
        state_dtype: str | None = None,
        loss_scale_factor: float | None = None,
        shard_state: bool = False,
        name: str | None = None,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a keras_optkit.optimizers.Rule, got {rule!r}.")
        schedule, multiplier = schedule_and_multiplier(learning_rate)
        # Keras's own rate, decay, clipping, accumulation and average stay off: they act in another order (see above)
        super().__init__(learning_rate=lambda: self.learning_rate, name=name)
        # held in a namespace, where Keras's and TensorFlow's attribute tracking does not wrap lists and dicts
        self._held = Held(checked_groups(groups), checked_transforms(transforms), opened=is_opening())
        self._updates = super().iterations
        self._schedule = schedule
        self._multiplier = self.add_variable(
            (), initializer=filled(multiplier), dtype=scalar_dtype(), name="learning_rate"
        )
        # what is set as an attribute is checked; see `__setattr__`
        self.weight_decay = weight_decay
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.use_ema = use_ema
        self.ema_momentum = ema_momentum
        self.skip_nonfinite = skip_nonfinite
        self.decay_mask = decay_mask
        self.decay_exclude = decay_exclude  # type: ignore[assignment,misc]
        self.layer_decay = layer_decay
        self.layer_blocks = layer_blocks
        self.sparse = sparse
        self.fuse = fuse
        self.master_weights = master_weights
        self.stochastic_rounding = stochastic_rounding
        self.slot_dtype = given_slot_dtype(slot_dtype, state_dtype)
        self.loss_scale_factor = loss_scale_factor
        self.shard_state = shard_state
        self._refuse_second_average(use_ema, rule)
        self.rule = rule
        for routed in with_routes(self._rules).values():
            checked_needs(routed.rule)
            refuse_unless_for(self.transforms or (), routed.rule)
        self.checkpointed = backend.in_checkpoints(self)

    # -- hyperparameters -----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        rule = self.__dict__.get("rule")
        if rule is not None and name in _fields(rule):
            return getattr(rule, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; hyperparameters and the common keywords are checked as in the constructor."""
        rule = self.__dict__.get("rule")
        if rule is not None and name in _fields(rule):
            name, value = "rule", dataclasses.replace(rule, **{name: value})
        elif name in CHECKS:
            value = CHECKS[name](name, value)
            self._refuse_unless_settable(name, value)
            if name == "decay_exclude":
                self._held.decay_exclude, self._held.undecayed = value, None
                return
        elif name == "layer_blocks":
            value = checked_blocks(value, self.__dict__.get("layer_decay"))
            self._refuse_unless_settable(name, value)
        elif name in READ_ONLY:
            raise AttributeError(f"{name} cannot be set, got {value!r}: {READ_ONLY[name]}")
        elif rule is not None and not (name.startswith("_") or hasattr(type(self), name) or name in self.__dict__):
            refuse_misspelt(name, value, type(self), _fields(rule))
        super().__setattr__(name, value)

    def _refuse_unless_settable(self, name: str, value: Any) -> None:
        """Raises if a keyword excludes another one that is given, or comes too late."""
        for names in EXCLUSIVE:
            given = {n: value if n == name else self.__dict__.get(n) for n in names}
            if name in names and sum(v not in (None, False) for v in given.values()) > 1:
                raise ValueError(f"At most one of {', '.join(names)} can be given, got {given}.")
        if "rule" not in self.__dict__:
            return
        if name == "use_ema":
            self._refuse_second_average(value, self.rule)
        old = getattr(self, name, None)
        counts = name in COUNTS and None not in (old, value)  # another count needs no other state
        if name in BEFORE_BUILD and self.built and value != old and not counts:
            raise ValueError(
                f"{name} can only be set before the optimizer is built, got {value!r}; {self.name} was built with "
                f"{name}={old!r}. Make a new optimizer."
            )

    def _refuse_second_average(self, use_ema: bool, rule: Rule) -> None:
        if use_ema and rule.averages:
            raise ValueError(
                f"use_ema must be False: {type(self).__name__} has an average of its own, got {use_ema!r}."
            )

    @property
    def iterations(self) -> keras.Variable:
        """How often the weights have been updated."""
        return self._updates

    @property
    def learning_rate(self) -> Any:
        """The current learning rate, `schedule(iterations) * multiplier`; with a constant rate, its variable.

        Assigning a number always works. With a schedule it sets the multiplier, so that the schedule continues from
        there; while the schedule is 0, which no multiplier changes, the number replaces the schedule from there on.
        The multiplier is part of the saved state, as its negative where it replaces the schedule. Assigning a schedule
        or a function replaces the rate altogether; a training function that is traced already must then be made again
        (`model.make_train_function(force=True)`).
        """
        if self._schedule is None:
            return self._multiplier
        return scaled_rate(self._schedule(self._updates), self._multiplier)

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if is_schedule(value):
            if self._held.in_compiled_fit and self._held.used:
                raise ValueError(
                    f"learning_rate can be set to a number while `fit` runs a compiled step, got {value!r}. Set a "
                    "schedule or a function between two fits, or compile the model with run_eagerly=True."
                )
            self._schedule, multiplier = schedule_and_multiplier(value)
            self._multiplier.assign(multiplier)
            return
        rate = arguments.real("learning_rate", as_number(value), 0)
        if self._schedule is not None:
            replaced = math.copysign(1.0, as_number(self._multiplier)) < 0
            scheduled = as_number(self._schedule(self._updates))
            if scheduled == 0 and rate == 0 and not replaced:
                return
            rate = -rate if replaced or scheduled == 0 else rate / scheduled
        self._multiplier.assign(np.array(rate))  # TensorFlow takes the float -0.0 for 0.0

    @contextlib.contextmanager
    def in_compiled_fit(self) -> Iterator[None]:
        """Around a `fit` whose steps are compiled, and so have the schedule in them that there was before."""
        before, self._held.in_compiled_fit = self._held.in_compiled_fit, True
        try:
            yield
        finally:
            self._held.in_compiled_fit = before

    def compiled_in(self) -> dict[str, Any]:
        """What a compiled step has in it as it is now: the rule, the schedule and the common keywords."""
        names = [name for name in constructor_parameters(Optimizer) if name not in ("learning_rate", "rule", "name")]
        keywords = {name: getattr(self, name) for name in names}
        return {"rules": self._rules, "schedule": self._schedule, **keywords}

    @property
    def _rules(self) -> dict[int, Rule]:
        """The rule as number 0, and those that groups have of their own under their numbers in `Treatment`."""
        own = {n: g.own_rule for n, g in enumerate(self.groups or (), 1) if g.own_rule is not None}
        return {0: self.rule, **own}

    @property
    def groups(self) -> list[Group] | None:
        """The groups of parameters, in the order in which they are looked through; fixed when the optimizer is made."""
        return self._held.groups

    @property
    def transforms(self) -> tuple[Transform, ...] | None:
        """What changes gradients and steps, in this order; fixed when the optimizer is made."""
        return self._held.transforms

    def exclude_from_weight_decay(
        self, var_list: Iterable[Any] | None = None, var_names: Iterable[str] | None = None
    ) -> None:
        """Spares variables from weight decay, besides those that `decay_mask` spares; sets `decay_exclude`.

        A second call replaces the first.

        Args:
            var_list: Variables. Those that are not trained do not matter, but one at least must be.
            var_names: Regular expressions that are looked for in the variables' paths. Each must match a variable.

        Raises:
            TypeError: For something other than variables or strings.
            ValueError: If the optimizer is built already; and when it is built, if nothing matches.
        """
        if self.built:
            raise ValueError("exclude_from_weight_decay can only be called before the optimizer is built.")
        variables = list(var_list or ())
        for variable in variables:
            if not hasattr(variable, "shape") or not hasattr(variable, "name"):
                raise TypeError(f"var_list must be a list of variables, got {variable!r} in it.")
        names = list(checked_patterns("var_names", var_names) or ())
        if variables:
            names.append("|".join(dict.fromkeys(path_pattern(_path(v)) for v in variables)))
        self.decay_exclude = names or None  # type: ignore[misc]
        self._held.undecayed = {backend.key(v) for v in variables} if variables else None

    @property
    def decay_exclude(self) -> list[str] | None:
        """The patterns of variables that are spared from weight decay; can be set before the optimizer is built."""
        return self._held.decay_exclude

    def explain(self, model: Any) -> Explanation:
        """How each variable is trained: its group, rule, learning rate, decay, and the size of its state.

        Also the present estimate of a rule that finds its learning rate; where elements have their own, the median.

        Args:
            model: A model, whose trainable variables are shown, or a list of variables. Nothing is built or changed.

        Returns:
            A table: its `rows` can be read, and printing it shows it.
        """
        known = model if isinstance(model, keras.Layer) else None
        variables = different(model if known is None else known.trainable_variables)
        if not variables:
            raise ValueError(f"model must have trainable variables, got {model!r}. Is it built?")
        places = self._places(variables, known)
        found, groups = self._treatments(variables, places)
        rate, decay = as_number(self.learning_rate), as_number(self._present(self.weight_decay) or 0.0)
        rows, rules, estimates = [], with_routes(self._rules), self.watched_estimates()()
        for weight, paths, treatment, group in zip(places.weights(variables), places.paths, found, groups, strict=True):
            row = Explained(paths[0], weight.shape, "" if group is None else group.match, "frozen", 0.0, 0.0, 0)
            if treatment is not None:
                routed = rules[treatment.rule, treatment.route]
                own = routed.weight_decay if treatment.weight_decay is None else treatment.weight_decay
                applied = decay if own is None else as_number(self._present(own))
                row = row._replace(
                    rule=name_of(routed.rule),
                    learning_rate=rate * treatment.lr_scale * routed.lr_scale,
                    weight_decay=applied if treatment.decayed else 0.0,
                    state_bytes=state_bytes(routed.rule, weight, self._keywords()),
                    estimate=as_number(estimates.get((treatment.rule, treatment.route))),
                )
            rows.append(row)
        return Explanation(tuple(rows))

    def _present(self, value: Value | None) -> Any:
        return value(self._updates) if isinstance(value, Schedule) else value

    # -- which weights the model holds ---------------------------------------------------------------------------------

    @property
    def evaluating(self) -> bool:
        """Whether the model holds the weights to evaluate at, and not those that are trained."""
        return self._averages() and bool(as_number(self._held.state.evaluating))

    def swap_weights(self, evaluating: bool) -> None:
        """Gives the model the weights to evaluate at (True), or those that are trained (False).

        They differ with `use_ema=True` and for rules that average by themselves, such as Schedule-Free; otherwise, and
        where the model holds the wanted weights already or before the first update, nothing happens. `fit` and
        `train_on_batch` restore the training weights when they begin. So does the next update of a loop of your own,
        but its gradient has been computed by then: call `swap_weights(False)` before you continue.

        Raises:
            ValueError: If state was loaded by which the model holds the other weights, and the optimizer is not built,
                so that it does not know them.
        """
        pending = None if self.built else self._held.pending
        if isinstance(pending, dict) and pending["iterations"] and pending.get("evaluating", evaluating) != evaluating:
            raise ValueError(
                f"{self.name} was given state before it is built, and does not know which weights to swap. Call "
                "optimizer.build(model.trainable_variables) first."
            )
        self._swap(evaluating)

    def _swap(self, evaluating: bool) -> None:
        if not self._averages() or self.evaluating == evaluating or as_number(self._updates) == 0:
            return
        plan = self._plan()
        change(lambda state: averages.swapped(plan, state, evaluating=evaluating), plan.buckets, self._held.state)

    def _averages(self) -> bool:
        """Whether there are weights to evaluate at, other than those that are trained."""
        return bool(self._held.variables) and self._held.state.has("evaluating")

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Gives the model the weights to evaluate at; `fit` calls it at its end."""
        if backend.is_lost(self._updates):  # there is an error already
            return
        self.flush()
        self._swap(evaluating=True)
        self._raise_if_too_many_nonfinite()

    @property
    def nonfinite(self) -> Nonfinite:
        """What `skip_nonfinite` has met so far.

        Raises:
            ValueError: Without `skip_nonfinite`, or before the optimizer is built.
        """
        if not (self.skip_nonfinite and self.built):
            raise ValueError(
                f"{self.name} counts non-finite gradients with skip_nonfinite=k and once it is built; "
                f"it has skip_nonfinite={self.skip_nonfinite!r} and is {'' if self.built else 'not '}built."
            )
        counts = {name: as_number(v) for name, v in self._held.state.nonfinite.items()}
        path = None
        if counts["skipped"]:
            member = self._held.buckets[counts["bucket"]].member(counts["place"])
            path = _path(self._held.variables[member])
        return Nonfinite(counts["skipped"], counts["in_a_row"], path)

    def _raise_if_too_many_nonfinite(self) -> None:
        """For compiled steps, which cannot raise."""
        if self.skip_nonfinite and self.built:
            met = self.nonfinite
            if met.in_a_row >= self.skip_nonfinite:
                raise FloatingPointError(
                    f"{self.name}: {met.in_a_row} non-finite gradients in a row, skip_nonfinite={self.skip_nonfinite}; "
                    f"the first such variable in the last one is {met.variable}."
                )

    # -- saving --------------------------------------------------------------------------------------------------------

    def _inherited_config(self) -> dict[str, Any]:
        return {}  # Keras's optimizers have a config of their own, with arguments that do not exist here

    def _config_value(self, name: str) -> Any:
        if name == "learning_rate" and self._schedule is not None:
            return self._schedule.function if isinstance(self._schedule, OfFunction) else self._schedule
        if name == "state_dtype":  # which is in the config as slot_dtype
            return None
        if name == "transforms":
            return None if self.transforms is None else list(self.transforms)
        return super()._config_value(name)


def _fields(rule: Rule) -> set[str]:
    return {field.name for field in dataclasses.fields(rule)}

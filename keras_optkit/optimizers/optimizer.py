"""The one host of update rules: it owns the variables and the order of a step. Saving is in `saved.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops, tree
from keras.optimizers.schedules import LearningRateSchedule as Schedule

from keras_optkit import arguments
from keras_optkit.optimizers import distribute
from keras_optkit.optimizers.distribute import Rows, State
from keras_optkit.optimizers.groups import (
    Explained,
    Explanation,
    Group,
    Places,
    Treatment,
    checked_blocks,
    checked_groups,
    checked_pattern,
    near_misses,
    treatments,
)
from keras_optkit.optimizers.groups import keras_path as _path
from keras_optkit.optimizers.packing import PACK_BELOW, Bucket, pack
from keras_optkit.optimizers.rule import Hyper, Initial, Rule, Slots, Tensor, Value, is_dynamic
from keras_optkit.optimizers.saved import Legacy, SavedState, is_opening
from keras_optkit.precision import HALF, at_least_float32, scalar_dtype
from keras_optkit.registry import cards
from keras_optkit.saving import FromSignature, constructor_parameters

#: With `fuse="auto"` the update is compiled if its loops have at least so many elements on average. A loop takes XLA
#: about 20 ms to compile, and saves about 3 ns for each element.
COMPILE_ABOVE = 2**15

#: What there is of a parameter's gradient: nothing, some rows, or all of it.
NONE, ROWS, WHOLE = range(3)


class Grad(NamedTuple):
    """The gradients of the parameters of a bucket.

    Attributes:
        value: They as one tensor, `(k, *shape)` or `(1, n)`; 0 where there is none.
        mask: True for the numbers to update, in a shape that broadcasts; None: all.
        given: For each parameter, whether there is a gradient; see `NONE`.
    """

    value: Tensor
    mask: Any
    given: tuple[int, ...]


class Nonfinite(NamedTuple):
    """What `skip_nonfinite` has met.

    Attributes:
        skipped: How many updates were left out because of a non-finite gradient.
        in_a_row: How many of them are the last ones.
        variable: Path of the first variable with such a gradient in the last of them; None if there was none.
    """

    skipped: int
    in_a_row: int
    variable: str | None


class _Prepared(NamedTuple):
    """What the updates of all buckets of one step have in common."""

    iterations: Tensor  # before the update
    rate: Tensor
    read: list[Tensor]  # the present values of the hyperparameters that are schedules or variables
    scalars: dict[str, Tensor]  # the rule's, after `measure`
    factor: Tensor | None  # of clipping by global norm
    finite: Tensor | None  # whether all gradients are
    position: Tensor | None  # (bucket, place in it) of the first number that is not


class Optimizer(FromSignature, SavedState):
    """Base of all optimizers of keras_optkit: hosts one update rule and does everything around it.

    A subclass is a signature, a docstring and a rule. Every hyperparameter of the rule is an attribute of the optimizer
    that can be read and, before the training function is traced, set; the config is collected from the constructor's
    signature. The order of one step is: unscale, sum over replicas, accumulate, finite check, clip, rule, decoupled
    weight decay, constraints, moving average. Clipping thus sees the gradient of the whole global batch, and schedules,
    weight decay and the average count updates of the weights, not micro-batches.

    Float16 and bfloat16 parameters have float32 slots and are updated in float32.

    Args:
        learning_rate: A number >= 0, a `keras.optimizers.schedules.LearningRateSchedule` of the update count, or, as in
            Keras, a function without arguments that returns the present rate.
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
        skip_nonfinite: k >= 1: an update whose gradient is not finite is left out, with weights, state and update
            count bitwise as before, and the k-th in a row is an error; see `nonfinite`. None: no check.
        decay_mask: `"auto"` spares vectors and scalars (biases, normalisation scales) from weight decay, `"all"`
            decays everything, as Keras and torch do by default.
        decay_exclude: Regular expressions; variables in whose path one is found are spared from weight decay, too. Each
            must match a variable. `exclude_from_weight_decay` sets it.
        groups: A list of `keras_optkit.Group`: parameters with rates and decays of their own. See `explain`.
        layer_decay: d in (0, 1]: the learning rate of each layer is d times that of the next one, so that the last
            layer that is trained has the full rate; multiplied with the groups' `lr_scale`. See `layer_blocks`.
        layer_blocks: What `layer_decay` counts as one layer. None: each layer that the model is made of, blocks as one;
            deep models of plain layers are counted in 12 blocks. n >= 1: as many blocks of about as many layers. A
            pattern, such as `"block_([0-9]+)"`: layers in whose paths its groups find the same are one block.
        sparse: What is done with gradients of some rows only, those of embeddings: `"lazy"` updates these rows and
            their state alone, as if the others were not there, decay included; `"dense"` takes the gradients of the
            other rows as zeros. A rule that is not element-wise is always dense.
        fuse: Whether the update is compiled with XLA where the training step is not: `"auto"` in graphs on CPUs, unless
            the model is so small that compiling takes longer than it saves in thousands of steps; True in all graphs,
            False never. Eager steps are never compiled.
        master_weights: Keeps a float32 copy of float16 and bfloat16 weights, which is what is updated, so that steps
            below the weights' resolution add up. Costs 4 bytes for each number.
        stochastic_rounding: Rounds updated bfloat16 weights up or down at random, with the probabilities that make the
            rounded weight right on average; small steps then add up without a copy. The random numbers are a function
            of the update count. At most one of the two can be given; for float32 weights neither does anything. State
            that `slot_dtype` makes bfloat16 is rounded in the same way.
        slot_dtype: Dtype that the rule's state is kept in, `"float32"` or `"bfloat16"`, apart from copies of the
            weights; an update is computed in at least float32 anyway. None: what it is computed in. In bfloat16 it
            takes half of the memory, but running means of β > 0.996 stand still, since their steps are below the last
            of 8 bits; give `stochastic_rounding=True` then.
        loss_scale_factor: A constant > 0 that `scale_loss` multiplies the loss by, as `fit` does, and that the
            gradients are divided by; None for none.
        name: Name of the optimizer.

    Raises:
        TypeError: For an unknown keyword or a value of a wrong type.
        ValueError: For a value out of range.
    """

    #: Parameters with fewer numbers than this are packed; see `keras_optkit.optimizers.packing`.
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
        loss_scale_factor: float | None = None,
        name: str | None = None,
    ):
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a keras_optkit.optimizers.Rule, got {rule!r}.")
        schedule, multiplier = _schedule_and_multiplier(learning_rate)
        # Keras's own rate, decay, clipping, accumulation and average stay off: they act in another order (see above)
        super().__init__(learning_rate=lambda: self.learning_rate, name=name)
        # held in a namespace, where Keras's and TensorFlow's attribute tracking does not wrap lists and dicts
        self._held = SimpleNamespace(
            own=[],
            variables=[],
            places=[],
            buckets=(),
            state=None,
            names={"iteration"},
            pending=None,
            decay_exclude=None,
            undecayed=None,
            used=False,
            in_compiled_fit=False,
            opened=is_opening(),
            model=None,
            groups=checked_groups(groups),
        )
        self._updates = super().iterations
        self._schedule = schedule
        self._multiplier = self.add_variable(
            (), initializer=_filled(multiplier), dtype=scalar_dtype(), name="learning_rate"
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
        self.slot_dtype = slot_dtype
        self.loss_scale_factor = loss_scale_factor
        self._refuse_second_average(use_ema, rule)
        self.rule = rule
        self.checkpointed = distribute.in_checkpoints(self)

    # -- hyperparameters ----------------------------------------------------------------------------------------------

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
        elif name in _CHECKS:
            value = _CHECKS[name](name, value)
            self._refuse_unless_settable(name, value)
            if name == "decay_exclude":
                self._held.decay_exclude, self._held.undecayed = value, None
                return
        elif name == "layer_blocks":
            value = checked_blocks(value, self.__dict__.get("layer_decay"))
            self._refuse_unless_settable(name, value)
        elif name in _READ_ONLY:
            raise AttributeError(f"{name} cannot be set, got {value!r}: {_READ_ONLY[name]}")
        elif rule is not None and not (name.startswith("_") or hasattr(type(self), name) or name in self.__dict__):
            self._refuse_misspelt(name, value)
        super().__setattr__(name, value)

    def _refuse_unless_settable(self, name: str, value: Any) -> None:
        """Raises if a keyword excludes another one that is given, or comes too late."""
        for names in _EXCLUSIVE:
            given = {n: value if n == name else self.__dict__.get(n) for n in names}
            if name in names and sum(v not in (None, False) for v in given.values()) > 1:
                raise ValueError(f"At most one of {', '.join(names)} can be given, got {given}.")
        if "rule" not in self.__dict__:
            return
        if name == "use_ema":
            self._refuse_second_average(value, self.rule)
        old = getattr(self, name, None)
        counts = name in _COUNTS and None not in (old, value)  # another count needs no other state
        if name in _BEFORE_BUILD and self.built and value != old and not counts:
            raise ValueError(
                f"{name} can only be set before the optimizer is built, got {value!r}; {self.name} was built with "
                f"{name}={old!r}. Make a new optimizer."
            )

    def _refuse_second_average(self, use_ema: bool, rule: Rule) -> None:
        if use_ema and rule.averages:
            raise ValueError(
                f"use_ema must be False: {type(self).__name__} has an average of its own, got {use_ema!r}."
            )

    def _refuse_misspelt(self, name: str, value: Any) -> None:
        """Raises for an attribute that would do nothing, but is named like a keyword of this or of another optimizer.

        Those of other libraries count, too.

        Attributes of other names may be set, as with Keras's optimizers.
        """
        own = {*constructor_parameters(type(self)), *_fields(self.rule)}
        if name in own:  # a subclass stores its argument
            return
        others = {
            card.make.__name__: constructor_parameters(card.make)
            for card in cards("optimizer", package=None)
            if isinstance(card.make, type)
        }
        theirs = [other for other, known in others.items() if name in known]
        if theirs:
            hint = f" It is a hyperparameter of {', '.join(sorted(theirs)[:4])}."
        elif name in _ELSEWHERE:
            meant = [keyword for keyword in _ELSEWHERE[name] if keyword in own]
            hint = f" Did you mean {' or '.join(map(repr, meant))}?" if meant else ""
        else:
            elsewhere = {key for known in others.values() for key in known}
            hint = arguments.near(name, own, cutoff=0.8) or arguments.near(name, elsewhere, cutoff=0.9)
        if hint or name in _ELSEWHERE:
            raise AttributeError(
                f"{type(self).__name__} has no hyperparameter {name!r} (got {name}={value!r}).{hint} "
                f"Allowed: {', '.join(sorted(own))}."
            )

    @property
    def iterations(self) -> keras.Variable:
        """How often the weights have been updated."""
        return self._updates

    @property
    def learning_rate(self) -> Any:
        """The present learning rate, `schedule(iterations) * multiplier`; with a constant rate, its variable.

        Assigning a number always works. With a schedule it sets the multiplier, so that the schedule continues from
        there; while the schedule is 0, which no multiplier changes, the number replaces the schedule from there on.
        The multiplier is part of the saved state, as its negative where it replaces the schedule. Assigning a schedule
        or a function replaces the rate altogether; a training function that is traced already must then be made again
        (`model.make_train_function(force=True)`).
        """
        return self._multiplier if self._schedule is None else self._rate(self._updates, self._multiplier)

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, Schedule) or (callable(value) and not is_dynamic(value)):
            if self._held.in_compiled_fit and self._held.used:
                raise ValueError(
                    f"learning_rate can be set to a number while `fit` runs a compiled step, got {value!r}. Set a "
                    "schedule or a function between two fits, or compile the model with run_eagerly=True."
                )
            self._schedule, multiplier = _schedule_and_multiplier(value)
            self._multiplier.assign(multiplier)
            return
        rate = arguments.real("learning_rate", _as_number(value), 0)
        if self._schedule is not None:
            replaced = math.copysign(1.0, _as_number(self._multiplier)) < 0
            scheduled = _as_number(self._schedule(self._updates))
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

    def _rate(self, iterations: Tensor, multiplier: Tensor) -> Tensor:
        return multiplier if self._schedule is None else _scheduled_rate(self._schedule(iterations), multiplier)

    @property
    def _rules(self) -> dict[int, Rule]:
        """The rule as number 0, and those that groups have of their own under their numbers in `Treatment`."""
        own = {n: g.own_rule for n, g in enumerate(self.groups or (), 1) if g.own_rule is not None}
        return {0: self.rule, **own}

    @property
    def groups(self) -> list[Group] | None:
        """The groups of parameters, in the order in which they are looked through; fixed when the optimizer is made."""
        return self._held.groups

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
        names = list(_checked_patterns("var_names", var_names) or ())
        if variables:
            names.append("|".join(dict.fromkeys(_pattern_of(_path(v)) for v in variables)))
        self.decay_exclude = names or None  # type: ignore[misc]
        self._held.undecayed = {distribute.key(v) for v in variables} if variables else None

    @property
    def decay_exclude(self) -> list[str] | None:
        """The patterns of variables that are spared from weight decay; can be set before the optimizer is built."""
        return self._held.decay_exclude

    # -- variables ----------------------------------------------------------------------------------------------------

    @property
    def variables(self) -> list[Any]:
        """All variables of the optimizer; in which order and how packed, may change."""
        kept = {name: part for name, part in (self._held.state or {}).items() if name != "weights"}
        # those that are attributes, then the state, in an order that does not depend on when it was made
        found = [*super().variables, *tree.flatten(kept), *self._held.own]
        return list({id(variable): variable for variable in found}.values())

    def add_variable(
        self,
        shape: Sequence[int],
        initializer: Any = "zeros",
        dtype: Any = None,
        aggregation: str = "none",
        layout: Any = None,
        name: str | None = None,
    ) -> keras.Variable:
        """Makes a variable of the optimizer's own, with a path that no other one of them has.

        Keras would list it where TensorFlow's checkpoints find it, by a position that depends on the packing.
        """
        if name is not None:
            taken, stem, count = self._held.names, name, 0
            while name in taken:
                count += 1
                name = f"{stem}_{count}"
            taken.add(name)
        with keras.name_scope(self.name):
            variable = keras.Variable(
                keras.initializers.get(initializer),
                shape,
                dtype,
                trainable=False,
                aggregation=aggregation,
                layout=layout,
                name=name,
            )
        self._held.own.append(variable)
        return variable

    def set_weights(self, weights: Sequence[Any]) -> None:
        """Assigns a value to each of `variables`.

        Keras does so when it loads an `.h5` file, before it knows which weights are trained; the values are then kept
        until it does.

        Raises:
            ValueError: If the number of values or a shape does not match.
        """
        variables, shapes = self.variables, [np.shape(value) for value in weights]
        if not self._held.variables and len(weights) > len(variables):
            self._held.pending = Legacy.of(weights)
            return
        if self.built:
            Legacy.of(weights).refuse_unless_for(variables)
        if len(weights) != len(variables):
            raise ValueError(f"weights must have one value for each of {len(variables)}, got {len(weights)}.")
        for variable, shape in zip(variables, shapes, strict=True):
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"weights must have the shape {tuple(variable.shape)} for {variable.path}, got {shape}."
                )
        for variable, value in zip(variables, weights, strict=True):
            variable.assign(value)

    def set_model(self, model: Any) -> None:
        """Tells the optimizer which model it trains, whose layers' paths groups and `layer_decay` go by.

        `compile`, `fit` and `train_on_batch` call it. The model is not kept alive.
        """
        self._held.model = weakref.ref(model)

    def build(self, variables: Any) -> None:
        """Creates the state for `variables`, the weights to be trained, in this order.

        They are a list, or, in a loop of one's own, the model, whose layers' paths the groups then go by.

        An optimizer that is built already keeps the state that it has: `variables` may hold more than those it was
        built with, such as layers that are no longer frozen, and the new ones start afresh. This happens by itself, on
        TensorFlow in the first step that trains them, elsewhere when `fit` or `train_on_batch` begins. There may be
        none at first, in a model that is frozen.

        Raises:
            ValueError: If some of the variables that it was built with are missing, if its groups freeze all of them,
                or under a distribution strategy that is not supported.
        """
        if isinstance(variables, keras.Layer):  # lists that TensorFlow tracks have `trainable_variables`, too
            self.set_model(variables)
            variables = variables.trainable_variables
        variables = _different(variables)
        if self._held.variables:
            self._extend(variables)
            return
        if self.built and not variables:
            return
        distribute.refuse_unsupported_strategy()
        try:
            self._add(variables, variables)
        except ValueError as error:
            if not is_opening():
                raise
            # a model that was saved with other weights frozen has to open; the first step that trains it will raise
            warnings.warn(f"{self.name} is left without state for now: {error}", stacklevel=2)
            return
        self._build_keras(variables)
        if variables and self._held.pending is not None:
            pending, self._held.pending = self._held.pending, None
            with distribute.outside_graph():
                self._restore(pending, waited=True)

    def _build_keras(self, variables: list[Any]) -> None:
        """Keras's own part of `build`, but for the average and the accumulators that it would make besides ours."""
        ours = {name: self.__dict__[name] for name in ("use_ema", "gradient_accumulation_steps")}
        self.__dict__.update(use_ema=False, gradient_accumulation_steps=None)
        super().build(variables)
        self.__dict__.update(ours)

    def begin_training(self, variables: Sequence[Any] | None, *, inside: bool = False) -> None:
        """Called by `fit` and `train_on_batch` when they begin: what a step of the backend cannot do, or not in time.

        The model is given the weights of training. Outside of TensorFlow, where a step creates no state, variables that
        the optimizer was not built with join.

        Args:
            variables: The weights to train; None: those it was built with.
            inside: Whether the optimizer is inside of another one that has no room for more variables, such as
                `keras.optimizers.LossScaleOptimizer`.

        Raises:
            ValueError: Outside of TensorFlow, if variables are missing, or if some join and another optimizer, which
                has no room for them, is around this one.
        """
        if self.built and variables is not None and not distribute.TENSORFLOW:
            known = len(self._held.variables)
            if len(variables) < known or (inside and len(variables) > known):
                raise ValueError(
                    f"{self.name} was built for {known} variables and cannot go on with {len(variables)} on the "
                    f"{keras.config.backend()} backend. Compile the model with a new optimizer."
                )
        if self.built and variables and (not distribute.TENSORFLOW or self._held.pending is not None):
            with distribute.scope_of(self._updates):
                self.build(variables)
        self._swap(evaluating=False)

    def _add(self, new: list[Any], variables: list[Any], since: Sequence[int] | None = None) -> None:
        """Adds variables, and the buckets with their state.

        Args:
            new: The variables to add.
            variables: All, also those that are here already, in the model's order, which a file has, too.
            since: For each of `new` the update count at which it joined; the present one if None.
        """
        for variable in new:
            if not getattr(variable.dtype, "name", str(variable.dtype)).startswith(("float", "bfloat")):
                raise ValueError(f"{self.name} cannot train {_path(variable)}, which is not made of floats.")
            if getattr(variable, "overwrite_with_gradient", False):  # Keras's float8 scales
                raise ValueError(f"{self.name} cannot train {variable.path}: float8 training is not supported.")
        if since is None:
            with distribute.outside_graph():
                since = [_as_number(self._updates)] * len(new)
        buckets = self._pack(new, variables, since)
        if self.stochastic_rounding and any(b.dtype == "float16" for b in buckets):
            raise ValueError(
                "stochastic_rounding=True is for bfloat16 weights, got float16 ones. Use master_weights=True for them."
            )
        held, first = self._held, len(self._held.variables)
        with distribute.outside_graph():
            more = self._new_state(new, buckets)
            if held.state is None:
                held.state = more | self._new_scalars()
            else:
                held.state |= {name: held.state[name] + part for name, part in more.items()}
        held.variables = [*held.variables, *new]
        held.buckets = (*held.buckets, *(b.moved(first) for b in buckets))
        order = {distribute.key(v): place for place, v in enumerate(variables)}
        held.places = [order[distribute.key(v)] for v in held.variables]

    def _extend(self, variables: list[Any]) -> None:
        """Makes room for variables that the optimizer was not built with."""
        known = {distribute.key(v): i for i, v in enumerate(self._held.variables)}
        given = {distribute.key(v) for v in variables}
        new = [_path(v) for v in variables if distribute.key(v) not in known]
        if not new:
            return
        if not given.issuperset(known):
            raise ValueError(
                f"Unknown variables {', '.join(new)}: {self.name} was built for {len(known)} variables, and only "
                f"{len(given & set(known))} of them are here. It can go on with more variables, but not with others: "
                "make a new optimizer for another model."
            )
        self._add([v for v in variables if distribute.key(v) not in known], variables)
        self._build_keras(variables)
        self._renew_treatments()

    def _in_model_order(self) -> list[Any]:
        held = self._held
        return [v for _, v in sorted(zip(held.places, held.variables, strict=True), key=lambda pair: pair[0])]

    def _places(self, variables: Sequence[Any], model: Any = None) -> Places:
        if model is None and self._held.model is not None:
            model = self._held.model()
        return Places(variables, model)

    def _treatments(
        self, variables: Sequence[Any], places: Places | None = None
    ) -> tuple[list[Treatment | None], list[Group | None]]:
        places = self._places(variables) if places is None else places
        found, groups = treatments(
            places,
            [len(v.shape) for v in variables],
            self.groups,
            self.layer_decay,
            self.layer_blocks,
            self.decay_mask,
        )
        spared = self._spared(variables, places)
        return [
            dataclasses.replace(treatment, decayed=False) if treatment and spare else treatment
            for treatment, spare in zip(found, spared, strict=True)
        ], groups

    def _spared(self, variables: Sequence[Any], places: Places) -> list[bool]:
        """Which variables `decay_exclude` spares from decay, by the paths of their layers or by Keras's."""
        patterns, chosen = self.decay_exclude or [], self._held.undecayed
        paths = [(*layers, _path(v)) for v, layers in zip(variables, places.paths, strict=True)]
        known = list(dict.fromkeys([*places.known, *map(_path, variables)]))
        for pattern in patterns:
            if not any(re.search(pattern, path) for path in known):
                raise ValueError(
                    f"decay_exclude: the pattern {pattern!r} matches none of the {len(variables)} variables. "
                    f"Nearest: {', '.join(map(repr, near_misses(pattern, known)))}.{places.hint}"
                )
            if chosen is not None and pattern == patterns[-1]:  # those given as variables
                found = [v for v in variables if re.search(pattern, _path(v))]
                others = [_path(v) for v in found if distribute.key(v) not in chosen]
                if others:
                    raise ValueError(
                        f"var_list of exclude_from_weight_decay cannot be told by path from {', '.join(others)}, which "
                        "is not in it. Give the layers different names."
                    )
        return [any(re.search(pattern, path) for pattern in patterns for path in theirs) for theirs in paths]

    def _pack(self, new: Sequence[Any], variables: Sequence[Any], since: Sequence[int]) -> tuple[Bucket, ...]:
        if not variables:
            return ()
        treatment = dict(zip(map(distribute.key, variables), self._treatments(variables)[0], strict=True))
        if all(value is None for value in treatment.values()):
            raise ValueError(f"{self.name} has nothing to train: its groups freeze all {len(variables)} variables.")
        return pack(
            [tuple(v.shape) for v in new],
            [keras.backend.standardize_dtype(v.dtype) for v in new],
            [treatment[distribute.key(v)] for v in new],
            elementwise=lambda treatment: self._rules[treatment.rule].elementwise,
            below=self.pack_below,
            alone=lambda i: getattr(new[i], "constraint", None) is not None,
            since=since,
            repeated=distribute.REPEATED,
        )

    def _pack_again(self, since: list[int]) -> None:
        """Replaces the state, for variables that have joined at other update counts than those of here."""
        held = self._held
        if held.used:
            raise ValueError(
                f"The saved optimizer state has variables that joined at the updates {sorted(set(since))}; those of "
                f"{self.name} joined at {sorted(set(self._since()))}. Load it before the first step."
            )
        self._replace_state(since)

    def _replace_state(self, since: list[int]) -> None:
        held = self._held
        state = {id(variable) for variable in tree.flatten(held.state)} - {id(self._multiplier)}
        variables, held.own = self._in_model_order(), [v for v in held.own if id(v) not in state]
        held.names = {"iteration", *(variable.name for variable in held.own)}
        held.variables, held.places, held.buckets, held.state = [], [], (), None
        self._add(variables, variables, since)

    def _renew_treatments(self) -> None:
        """How the variables are treated now that others have joined: `layer_decay` counts from the last layer."""
        held = self._held
        found = self._treatments(self._in_model_order())[0]
        now = [[found[held.places[i]] for i in bucket.indices] for bucket in held.buckets]
        if all(len(set(treatments)) == 1 for treatments in now):
            pairs = zip(held.buckets, now, strict=True)
            held.buckets = tuple(dataclasses.replace(bucket, treatment=first) for bucket, (first, *_) in pairs)
            return
        saved: dict[str, Any] = {}  # some of one bucket are not treated alike any more
        with distribute.outside_graph():
            self.save_own_variables(saved)
            self._replace_state(self._since())
            self.load_own_variables(saved)

    def forget_steps(self) -> None:
        """Called when all compiled steps with this optimizer are made again, so that its state may be, too."""
        self._held.used = False

    def _since(self) -> list[int]:
        """The update count at which each variable joined, in the model's order."""
        since = {i: bucket.since for bucket in self._held.buckets for i in bucket.indices}
        order = sorted(range(len(self._held.places)), key=self._held.places.__getitem__)
        return [since.get(i, 0) for i in order]

    def _new_state(self, variables: list[Any], buckets: Sequence[Bucket]) -> dict[str, list[Any]]:
        """The state that there is for each bucket.

        What begins as the weights are is zeros until the first update: the weights of a model that is built by its
        first step have no values while that step is traced. Variables that join after others have names that say so,
        since state is told by its variable's name in some kinds of files.
        """
        joining = bool(self._held.variables)

        def named(name: str, bucket: Bucket) -> str:
            return f"{name}_joined_{bucket.since}" if joining or bucket.since else name

        def like_weights(name: str, bucket: Bucket) -> keras.Variable:
            dtype = at_least_float32(bucket.dtype)
            return self.add_variable(bucket.stored_shape, dtype=dtype, name=named(name, bucket))

        state: dict[str, list[Any]] = {
            "weights": [[variables[i] for i in b.indices] for b in buckets],
            "slots": [self._new_slots(b, named) for b in buckets],
        }
        if self.gradient_accumulation_steps:
            state["accumulated"] = [like_weights("accumulated", b) for b in buckets]
            state["given"] = [
                self.add_variable((len(b.indices),), dtype="int32", name=named("given", b)) for b in buckets
            ]
        if self.use_ema:
            state["average"] = [like_weights("average", b) for b in buckets]
        if self.master_weights:
            state["master"] = [{"master": like_weights("master", b)} if b.dtype in HALF else {} for b in buckets]
        return state

    def _new_scalars(self) -> State:
        """The state that there is once."""

        def counter(name: str) -> keras.Variable:
            return self.add_variable((), dtype="int", name=name)

        state: State = {"iterations": self._updates, "multiplier": self._multiplier}
        scalars = {
            _of_rule(r, name): self.add_variable((), _filled(value), scalar_dtype(), name=name)
            for r, rule in self._rules.items()
            for name, value in rule.scalars().items()
        }
        if scalars:
            state["scalars"] = scalars
        if self.gradient_accumulation_steps:
            state["micro"] = counter("micro")
        if self.use_ema or self.rule.averages:
            state["evaluating"] = counter("evaluating")
        if self.skip_nonfinite:
            state["nonfinite"] = {
                name: counter(f"nonfinite_{name}") for name in ("skipped", "in_a_row", "bucket", "place")
            }
        return state

    def _slot_dtype(self, weights: str, initial: Initial) -> str:
        """The dtype of a slot; those that begin as the weights are as exact as the computation."""
        return at_least_float32(weights) if self.slot_dtype is None or callable(initial) else self.slot_dtype

    def _new_slots(self, bucket: Bucket, named: Callable[[str, Bucket], str]) -> dict[str, keras.Variable]:
        slots = {}
        for name, initial in self._rules[bucket.treatment.rule].slots().items():
            dtype = self._slot_dtype(bucket.dtype, initial)
            if callable(initial):  # `_begun` sets it in the first update
                zeros = ops.zeros(bucket.stored_shape, dtype)
                shape = tuple(bucket.stored(initial(bucket.view(zeros))).shape)
                slots[name] = self.add_variable(shape, dtype=dtype, name=named(name, bucket))
            else:
                slots[name] = self.add_variable(bucket.stored_shape, _filled(initial), dtype, name=named(name, bucket))
        return slots

    def _begun(self, slots: Slots, p: Tensor, bucket: Bucket, iterations: Tensor) -> Slots:
        """Slots before an update; in the first one, those that begin as a function of the weights are set to it."""
        functions = self._functions_of_weights(bucket)
        first = ops.equal(iterations, bucket.since) if functions else None
        begun = {name: ops.where(first, function(p), slots[name]) for name, function in functions.items()}
        return {**slots, **begun}

    def _functions_of_weights(self, bucket: Bucket) -> dict[str, Callable[[Tensor], Tensor]]:
        """The slots that begin as a function of the weights."""
        initial = self._rules[bucket.treatment.rule].slots()
        return {name: function for name, function in initial.items() if callable(function)}

    def explain(self, model: Any) -> Explanation:
        """How each variable is trained: its group, rule, learning rate, decay, and the size of its state.

        Args:
            model: A model, whose trainable variables are shown, or a list of variables. Nothing is built or changed.

        Returns:
            A table: its `rows` can be read, and printing it shows it.
        """
        known = model if isinstance(model, keras.Layer) else None
        variables = _different(model if known is None else known.trainable_variables)
        if not variables:
            raise ValueError(f"model must have trainable variables, got {model!r}. Is it built?")
        places = self._places(variables, known)
        found, groups = self._treatments(variables, places)
        rate, decay = _as_number(self.learning_rate), _as_number(self._present(self.weight_decay) or 0.0)
        rows = []
        for variable, paths, treatment, group in zip(variables, places.paths, found, groups, strict=True):
            rule = self._rules[treatment.rule] if treatment else None
            dtypes = [self._slot_dtype(variable.dtype, initial) for initial in rule.slots().values()] if rule else []
            copies = self.use_ema + bool(self.gradient_accumulation_steps)
            copies += self.master_weights and variable.dtype in HALF
            dtypes += [at_least_float32(variable.dtype)] * copies
            size = sum(2 if dtype in HALF else np.dtype(dtype).itemsize for dtype in dtypes)
            lr_scale, own = (treatment.lr_scale, treatment.weight_decay) if treatment else (0.0, 0.0)
            rows.append(
                Explained(
                    paths[0],
                    tuple(variable.shape),
                    "" if group is None else group.match,
                    type(rule).__name__ if rule else "frozen",
                    rate * lr_scale,
                    (decay if own is None else own) if treatment and treatment.decayed else 0.0,
                    size * math.prod(variable.shape) if treatment else 0,
                )
            )
        return Explanation(tuple(rows))

    def _present(self, value: Value | None) -> Any:
        return value(self._updates) if isinstance(value, Schedule) else value

    # -- the step -----------------------------------------------------------------------------------------------------

    @distribute.untraced
    def apply(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None = None) -> None:
        """Updates the weights with `grads`, one gradient (or None) for each variable.

        Args:
            grads: Gradients in the order of `trainable_variables`, each in the shape of its variable. A variable whose
                gradient is None keeps its value and its state, and a warning names it.
            trainable_variables: The variables; those the optimizer was built with when left out. The first call
                builds the optimizer. Variables of the optimizer that are not among them keep their values. The
                gradients of a variable that is given twice are added up.

        Raises:
            TypeError: If a gradient is not made of real numbers.
            ValueError: If the numbers do not match, a gradient has another shape than its variable, a variable is
                unknown, or every gradient is None. Nothing has been changed then.
        """
        grads = list(grads)
        if trainable_variables is None:
            if not self.built:
                raise ValueError(f"{self.name} is not built yet; pass the variables, or call build(variables) first.")
            variables = self._in_model_order()
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"grads must match the variables one to one, got {len(grads)} for {len(variables)}.")
        grads = [_checked_gradient(i, g, v) for i, (g, v) in enumerate(zip(grads, variables, strict=True))]
        grads, variables = _summed(grads, variables)
        if trainable_variables is not None:
            self.build(variables)
        if not variables:  # a frozen model
            return
        self._held.used = True
        fuse = (
            distribute.on_cpu(self._updates) and self._is_worth_compiling() if self.fuse == "auto" else bool(self.fuse)
        )
        bucketed = self._bucketed(self._in_order(grads, variables))
        distribute.run(
            self._program(),
            self._held.buckets,
            self._held.state,
            bucketed,
            fuse=fuse,
        )

    def _is_worth_compiling(self) -> bool:
        """Whether XLA's loops, each of which takes it a while to compile, have enough elements on average."""
        state, buckets = self._held.state, self._held.buckets
        loops = sum(1 + len(slots) for slots in state["slots"])
        each = [
            self.use_ema,
            self.gradient_accumulation_steps,
            self.global_clipnorm,
            self.clipnorm,
            self.skip_nonfinite,
        ]
        loops += len(buckets) * sum(map(bool, each))
        return sum(math.prod(shape) for bucket in buckets for shape in bucket.shapes) >= loops * COMPILE_ABOVE

    def flush(self) -> None:
        """Updates the weights with the mean gradient of the micro-batches since the last update, if there are any.

        For `gradient_accumulation_steps`: `fit` calls it at the end of every epoch, so that an epoch whose number of
        batches k does not divide ends with a smaller update, as it does with large batches. Call it in a loop of your
        own, outside of `tf.function`. Without accumulation nothing happens.
        """
        if not (self.gradient_accumulation_steps and self.built and _as_number(self._held.state["micro"])):
            return
        program = dataclasses.replace(self._program(), collect=None, due=None)
        nothing = [None] * len(self._held.buckets)
        with distribute.scope_of(self._updates):
            distribute.run(program, self._held.buckets, self._held.state, nothing)

    def accumulated_gradients(self) -> tuple[dict[int, Tensor], Tensor]:
        """The sums of the gradients of the micro-batches since the last update, and of how many they are.

        Returns:
            The sum for each variable, by `distribute.key`, and the number; of a built optimizer with
            `gradient_accumulation_steps`.
        """
        held = self._held
        sums: dict[int, Tensor] = {}
        for bucket, stored in zip(held.buckets, held.state["accumulated"], strict=True):
            parts = bucket.split(bucket.view(ops.copy(stored)))
            sums |= {distribute.key(held.variables[i]): part for i, part in zip(bucket.indices, parts, strict=True)}
        return sums, ops.copy(held.state["micro"])

    def _in_order(self, grads: list[Tensor | None], variables: Sequence[Any]) -> list[Tensor | None]:
        """One gradient or None for each variable the optimizer was built with."""
        missing = [_path(v) for g, v in zip(grads, variables, strict=True) if g is None]
        if len(missing) == len(grads):
            raise ValueError(f"No gradients provided for any variable; the variables are {missing}.")
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        places = {distribute.key(v): i for i, v in enumerate(self._held.variables)}
        ordered: list[Tensor | None] = [None] * len(places)
        for grad, variable in zip(grads, variables, strict=True):
            place = places.get(distribute.key(variable))
            if place is None:
                raise ValueError(f"Unknown variable {_path(variable)}: {self.name} was built for others.")
            ordered[place] = grad
        return ordered

    def _bucketed(self, grads: list[Any]) -> list[list[Any] | Rows | None]:
        """The gradients of each bucket, in the dtype to compute in and summed over the replicas."""
        ready: list[Any] = [None] * len(grads)
        for bucket in self._held.buckets:
            lazy = self.sparse == "lazy" and self._rules[bucket.treatment.rule].elementwise
            for i, shape in zip(bucket.indices, bucket.shapes, strict=True):
                if grads[i] is not None:
                    keep = lazy and distribute.is_sparse(grads[i])
                    grad = grads[i] if keep else distribute.dense(grads[i], shape)
                    ready[i] = distribute.cast(grad, at_least_float32(bucket.dtype))
        ready = distribute.sum_over_replicas(ready)
        return [self._rows_or_parts(bucket, [ready[i] for i in bucket.indices]) for bucket in self._held.buckets]

    def _rows_or_parts(self, bucket: Bucket, parts: list[Any]) -> Rows | list[Any] | None:
        if all(g is None for g in parts):
            return None
        if not (distribute.is_sparse(parts[0]) and self._can_take_rows(bucket)):
            return parts
        rows, scale = distribute.rows(parts[0], bucket.shapes[0][1:]), self.loss_scale_factor
        return rows if scale is None else rows._replace(values=rows.values / scale)

    def _join(self, b: int, parts: list[Any]) -> Grad:
        """The gradient of a bucket, unscaled."""
        bucket, scale = self._held.buckets[b], self.loss_scale_factor
        given = tuple(NONE if g is None else ROWS if distribute.is_sparse(g) else WHOLE for g in parts)
        hits = {
            place: distribute.touched(parts[place], bucket.shapes[place]) for place, g in enumerate(given) if g == ROWS
        }
        joined = bucket.join(
            [
                ops.zeros(shape, at_least_float32(bucket.dtype)) if g is None else distribute.dense(g, shape)
                for g, shape in zip(parts, bucket.shapes, strict=True)
            ]
        )
        mask = None if min(given) == WHOLE else bucket.mask([place for place, g in enumerate(given) if g], hits)
        return Grad(joined if scale is None else joined / scale, mask, given)

    def _can_take_rows(self, bucket: Bucket) -> bool:
        """Whether nothing has to look at the rows without a gradient, or would treat equal rows differently."""
        state = self._held.state
        looks = "accumulated" in state or "evaluating" in state or "master" in state or self._constraint(bucket)
        looks = looks or self._functions_of_weights(bucket)
        rounds = self.stochastic_rounding and "bfloat16" in (bucket.dtype, self.slot_dtype)
        return bucket.alone and not looks and not rounds

    def _constraint(self, bucket: Bucket) -> Any:
        """The constraint of a bucket's variable, or None; variables with one are alone in their buckets."""
        return getattr(self._held.variables[bucket.indices[0]], "constraint", None)

    def _program(self) -> distribute.Step:
        """One call of `apply` in pure functions of the state."""
        k, limit = self.gradient_accumulation_steps, self.skip_nonfinite
        own = [b.treatment.weight_decay for b in self._held.buckets]
        hyperparameters = [value for rule in self._rules.values() for value in rule.hyperparameters()]
        dynamic = [v for v in [self._schedule, self.weight_decay, *own, *hyperparameters] if is_dynamic(v)]

        def read(state: State) -> list[Tensor]:
            h = Hyper(state["iterations"], state["multiplier"], scalar_dtype())
            return [h.exact(value) for value in dynamic]

        def prepare(state: State, grads: list[Any], read: list[Tensor]) -> _Prepared:
            return self._prepare(state, self._means(state, grads) if k else grads, dynamic, read)

        def update(state: State, grads: list[Any], prepared: _Prepared) -> State:
            return self._update(state, self._means(state, grads) if k else grads, dynamic, prepared)

        def update_rows(b: int, take: Any, rows: Rows, prepared: _Prepared) -> dict[str, Tensor]:
            return self._update_rows(b, take, rows, dynamic, prepared)

        return distribute.Step(
            join=self._join,
            collect=self._collect if k else None,
            due=(lambda state: state["micro"] >= k) if k else None,
            outdated=(lambda state: ops.equal(state["evaluating"], 1)) if self._averages() else None,
            renew=lambda state: self._swapped(state, evaluating=False),
            read=read if dynamic else None,
            prepare=prepare,
            update=update,
            update_rows=update_rows,
            healthy=(lambda state: state["nonfinite"]["in_a_row"] < limit) if limit else None,
            failure=f"{self.name}: {limit} non-finite gradients in a row, as many as skip_nonfinite allows. The "
            "weights are those before them; optimizer.nonfinite names the first such variable.",
        )

    def _collect(self, state: State, grads: list[Grad | None]) -> State:
        """Adds the gradients of one micro-batch to those of the others."""
        sums, given = [], []
        for bucket, a, seen, g in zip(self._held.buckets, state["accumulated"], state["given"], grads, strict=True):
            sums.append(a if g is None else a + bucket.stored(g.value))
            given.append(seen if g is None else ops.maximum(seen, np.array(g.given, "int32")))
        return state | {"accumulated": sums, "given": given, "micro": state["micro"] + 1}

    def _means(self, state: State, grads: list[Grad | None]) -> list[Grad | None]:
        """The mean gradients of the micro-batches, the last of which had `grads`."""
        means: list[Grad | None] = []
        for bucket, a, given, last in zip(self._held.buckets, state["accumulated"], state["given"], grads, strict=True):
            sums = bucket.view(a)
            mask = self._given_mask(bucket, sums, given, last.given if last else (NONE,) * len(bucket.indices))
            means.append(Grad(sums / ops.cast(state["micro"], sums.dtype), mask, ()))
        return means

    def _given_mask(self, bucket: Bucket, sums: Tensor, given: Tensor, last: tuple[int, ...]) -> Any:
        """The mask of a mean gradient: of a parameter with gradients of rows only, rows of zeros count as not there.

        Which gradients there have been is known in the step alone; that all of them are in this call, before.
        """
        if min(last) == WHOLE:
            return None
        hits = {}
        for place, part in enumerate(bucket.split(sums)):
            if last[place] != WHOLE:
                rows = ops.logical_and(ops.equal(given[place], ROWS), distribute.nonzero_rows(part))
                hits[place] = ops.logical_or(ops.equal(given[place], WHOLE), rows)
        return bucket.mask(range(len(last)), hits)

    def _prepare(self, state: State, grads: list[Any], dynamic: list[Value], read: list[Tensor]) -> _Prepared:
        """What needs all gradients, or is the same for all of them."""
        factor = finite = position = None
        if self.global_clipnorm is not None:
            total = sum(ops.cast(_sum_of_squares(g), scalar_dtype()) for g in grads if g is not None)
            factor = _shrink(total, self.global_clipnorm)
        if self.skip_nonfinite:
            finite, position = _first_bad([(b, _values(g)) for b, g in enumerate(grads) if g is not None])
        scheduled = None if self._schedule is None else read[dynamic.index(self._schedule)]
        multiplier = ops.cast(state["multiplier"], scalar_dtype())
        rate = multiplier if scheduled is None else _scheduled_rate(scheduled, multiplier)
        prepared = _Prepared(state["iterations"], rate, read, state.get("scalars", {}), factor, finite, position)
        if "scalars" in state:
            new = {
                _of_rule(r, name): value
                for r, rule in self._rules.items()
                for name, value in rule.measure(self._hyper(prepared, _memo(dynamic, read), rule=r)).items()
            }
            prepared = prepared._replace(
                scalars={name: ops.cast(new[name], old.dtype) for name, old in state["scalars"].items()}
            )
        return prepared

    def _hyper(
        self, prepared: _Prepared, memo: dict[Any, Tensor], bucket: Bucket | None = None, rule: int = 0
    ) -> Hyper:
        """What a rule is told, for the parameters of a bucket or (for `measure`) for the whole model."""
        treatment = Treatment(rule=rule) if bucket is None else bucket.treatment
        decay = self.weight_decay if treatment.weight_decay is None else treatment.weight_decay
        names = self._rules[treatment.rule].scalars()
        return Hyper(
            prepared.iterations,
            prepared.rate if treatment.lr_scale == 1 else prepared.rate * treatment.lr_scale,
            scalar_dtype() if bucket is None else at_least_float32(bucket.dtype),
            weight_decay=decay if treatment.decayed and decay is not None else 0.0,
            scalars={name: prepared.scalars[_of_rule(treatment.rule, name)] for name in names},
            memo=memo,
            since=0 if bucket is None else bucket.since,
        )

    def _update(self, state: State, grads: list[Any], dynamic: list[Value], prepared: _Prepared) -> State:
        """One update of the weights; buckets whose weights are None are left to `_update_rows`."""
        memo = _memo(dynamic, prepared.read)
        new = state | {name: list(part) for name, part in state.items() if isinstance(part, list)}
        new["iterations"] = state["iterations"] + 1
        if "scalars" in state:
            new["scalars"] = prepared.scalars
        for b, bucket in enumerate(self._held.buckets):
            looks = self.use_ema or self._functions_of_weights(bucket)
            if state["weights"][b] is None or (grads[b] is None and not looks):
                continue
            p = self._widened(state["weights"][b], state, b)
            slots = self._begun(self._wide_slots(state["slots"][b], bucket), p, bucket, state["iterations"])
            if grads[b] is not None:
                u = self._clip(bucket, grads[b].value, prepared.factor)
                h = self._hyper(prepared, memo, bucket)
                p, slots = self._apply_rule(bucket, u, slots, p, h, grads[b].mask)
                constraint = self._constraint(bucket)
                if constraint is not None:
                    constrained = bucket.join([constraint(bucket.split(p)[0])])
                    known = not self.gradient_accumulation_steps or grads[b].mask is None
                    p = constrained if known else ops.where(ops.any(grads[b].mask), constrained, p)
            if self.use_ema:
                started = ops.cast(state["iterations"] > bucket.since, scalar_dtype())
                momentum = started * self.ema_momentum  # the first update sets the average
                average = bucket.view(state["average"][b])
                average = ops.cast(momentum, p.dtype) * average + ops.cast(1 - momentum, p.dtype) * p
                new["average"][b] = bucket.stored(average)
            new["weights"][b] = self._narrowed(p, b, state["iterations"])
            if self.master_weights and state["master"][b]:
                new["master"][b] = {"master": bucket.stored(p)}
            slots = self._narrow_slots(slots, state["slots"][b], b, state["iterations"])
            new["slots"][b] = {name: bucket.stored(slot) for name, slot in slots.items()}
        if self.skip_nonfinite:
            new = _unless_nonfinite(state, new, prepared)
        if "accumulated" in state:
            new["accumulated"] = [ops.zeros_like(a) for a in state["accumulated"]]
            new["given"] = [ops.zeros_like(given) for given in state["given"]]
            new["micro"] = ops.zeros_like(state["micro"])
        return new

    def _widened(self, weights: Tensor, state: State, b: int) -> Tensor:
        """The weights of a bucket in the dtype to compute in: the masters, where they are what the weights show."""
        bucket = self._held.buckets[b]
        wide = ops.cast(weights, at_least_float32(bucket.dtype))
        if not (self.master_weights and state["master"][b]):
            return wide
        master = bucket.view(ops.convert_to_tensor(state["master"][b]["master"]))
        # weights that were set from outside, by a callback or a file, count more than their masters
        return ops.where(ops.equal(ops.cast(master, bucket.dtype), weights), master, wide)

    def _narrowed(self, p: Tensor, b: int, iterations: Tensor) -> Tensor:
        """Updated weights in their own dtype."""
        return self._rounded(p, self._held.buckets[b].dtype, (b, iterations))

    def _wide_slots(self, slots: Slots, bucket: Bucket) -> Slots:
        """Slots in the dtype to compute in."""
        return {name: ops.cast(bucket.view(slot), at_least_float32(bucket.dtype)) for name, slot in slots.items()}

    def _narrow_slots(self, slots: Slots, old: Slots, b: int, iterations: Tensor) -> Slots:
        """Slots in the dtypes that they are kept in."""
        kept = {name: keras.backend.standardize_dtype(old[name].dtype) for name in slots}
        seeds = {name: (b + (place << 16), iterations) for place, name in enumerate(slots, 1)}
        return {name: self._rounded(slot, kept[name], seeds[name]) for name, slot in slots.items()}

    def _rounded(self, x: Tensor, dtype: str, seed: tuple[int, Tensor]) -> Tensor:
        """`x` in another dtype, rounded at random if that is wanted and the dtype is bfloat16."""
        if keras.backend.standardize_dtype(x.dtype) == dtype:
            return x
        if not (self.stochastic_rounding and dtype == "bfloat16"):
            return ops.cast(x, dtype)
        # a bfloat16 is the upper half of a float32: what is added to the lower half carries over with its probability
        x = ops.cast(x, "float32")
        noise = ops.bitwise_and(distribute.random_bits(x.shape, seed), 0xFFFF)
        return ops.cast(ops.view(ops.bitwise_and(ops.view(x, "int32") + noise, -0x10000), "float32"), dtype)

    def _apply_rule(
        self, bucket: Bucket, u: Tensor, slots: Slots, p: Tensor, h: Hyper, mask: Any
    ) -> tuple[Tensor, Slots]:
        """Parameters and slots after the rule and the decoupled decay; where the mask is False, as they were."""
        rule = self._rules[bucket.treatment.rule]
        missing = set(rule.slots()) - set(slots)
        if missing:
            raise ValueError(
                f"{self.name} was built without the state {sorted(missing)} that {rule!r} needs. Give a "
                "hyperparameter that switches state on a value other than 0 before the optimizer is built."
            )
        step, new = rule.update(u, slots, p, h)
        if set(new) != set(slots):
            raise ValueError(
                f"{type(rule).__name__}.update returned the slots {sorted(new)}, expected {sorted(slots)}."
            )
        if h.decays and not rule.handles_decay:
            step = step + h.learning_rate * h.weight_decay * p
        if mask is None:
            return p - step, new
        return ops.where(mask, p - step, p), {name: ops.where(mask, new[name], old) for name, old in slots.items()}

    def _update_rows(
        self, b: int, take: Any, rows: Rows, dynamic: list[Value], prepared: _Prepared
    ) -> dict[str, Tensor]:
        """One update of some rows of a parameter that is alone in its bucket; the new rows by name of the state."""
        bucket = self._held.buckets[b]
        weights = take("weights")
        p = ops.cast(weights, at_least_float32(bucket.dtype))
        held = {name: take(name) for name in self._held.state["slots"][b]}
        slots = self._wide_slots(held, bucket)
        h = self._hyper(prepared, _memo(dynamic, prepared.read), bucket)
        u = self._clip(bucket, rows, prepared.factor)
        p, slots = self._apply_rule(bucket, u, slots, p, h, prepared.finite)
        slots = self._narrow_slots(slots, held, b, prepared.iterations)
        return {"weights": ops.cast(p, weights.dtype), **slots}

    def _clip(self, bucket: Bucket, grad: Tensor | Rows, factor: Tensor | None) -> Tensor:
        """The gradient of a bucket, or of some rows, after clipping."""
        u = _values(grad)
        if self.clipvalue is not None:
            return ops.clip(u, -self.clipvalue, self.clipvalue)
        if self.clipnorm is not None:
            if isinstance(grad, Rows):
                return u * _shrink(_sum_of_squares(grad), self.clipnorm)
            return bucket.join([g * _shrink(_sum_of_squares(g), self.clipnorm) for g in bucket.split(u)])
        return u if factor is None else u * ops.cast(factor, u.dtype)

    # -- which weights the model holds --------------------------------------------------------------------------------

    @property
    def evaluating(self) -> bool:
        """Whether the model holds the weights to evaluate at, and not those that are trained."""
        return self._averages() and bool(_as_number(self._held.state["evaluating"]))

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
        if not self._averages() or self.evaluating == evaluating or _as_number(self._updates) == 0:
            return
        distribute.change(lambda state: self._swapped(state, evaluating), self._held.buckets, self._held.state)

    def _swapped(self, state: State, evaluating: bool) -> State:
        """The state with the weights to evaluate at in the model, or from such a state that with those of training."""
        new = state | {name: list(part) for name, part in state.items() if isinstance(part, list)}
        memo: dict[Any, Tensor] = {}
        rate = None if self.use_ema else self._rate(state["iterations"], state["multiplier"])
        for b, bucket in enumerate(self._held.buckets):
            if not (self.use_ema or self._rules[bucket.treatment.rule].averages):
                continue
            wide = self._widened(state["weights"][b], state, b)
            begun = state["iterations"] > bucket.since  # parameters may have joined since the last update
            if self.use_ema:
                weights = bucket.view(state["average"][b])
                new["average"][b] = ops.where(begun, bucket.stored(wide), state["average"][b])
            else:
                h = Hyper(state["iterations"], rate, wide.dtype, memo=memo, since=bucket.since)
                slots = self._wide_slots(state["slots"][b], bucket)
                weights, slots = (self.rule.eval_value if evaluating else self.rule.train_value)(wide, slots, h)
                slots = self._narrow_slots(slots, state["slots"][b], b, state["iterations"])
                new["slots"][b] = {
                    name: ops.where(begun, bucket.stored(slot), state["slots"][b][name]) for name, slot in slots.items()
                }
            new["weights"][b] = ops.cast(ops.where(begun, weights, wide), bucket.dtype)
        return new | {"evaluating": ops.full_like(state["evaluating"], int(evaluating))}

    def _averages(self) -> bool:
        """Whether there are weights to evaluate at, other than those that are trained."""
        return bool(self._held.variables) and "evaluating" in self._held.state

    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Gives the model the weights to evaluate at; `fit` calls it at its end."""
        if distribute.is_lost(self._updates):  # there is an error already
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
        counts = {name: _as_number(v) for name, v in self._held.state["nonfinite"].items()}
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

    # -- saving -------------------------------------------------------------------------------------------------------

    def _inherited_config(self) -> dict[str, Any]:
        return {}  # Keras's optimizers have a config of their own, with arguments that do not exist here

    def _config_value(self, name: str) -> Any:
        value = getattr(self, name)
        if name == "learning_rate" and self._schedule is not None:
            return self._schedule.function if isinstance(self._schedule, _Function) else self._schedule
        return _as_written(value) if isinstance(value, keras.Variable) else value


def _filled(value: float) -> Callable[..., Tensor]:
    """An initializer with a constant in full precision; Keras's goes through float32."""
    return lambda shape, dtype: ops.full(shape, value, dtype)


def _of_rule(number: int, name: str) -> str:
    """The name in the optimizer's state of a scalar of one of its rules."""
    return name if number == 0 else f"{number}.{name}"


def _fields(rule: Rule) -> set[str]:
    return {field.name for field in dataclasses.fields(rule)}


def _different(variables: Iterable[Any]) -> list[Any]:
    """The variables, each once."""
    return list({distribute.key(v): v for v in variables}.values())


def _pattern_of(path: str) -> str:
    """A pattern for this path alone, also where Keras adds to its beginning or drops that, as it does when loading."""
    first, _, rest = path.partition("/")
    dropped = f"({re.escape(first)}/)?{re.escape(rest)}" if "/" in rest else re.escape(path)
    return f"^{dropped}$|/{re.escape(path)}$"


def _checked_gradient(place: int, gradient: Any, variable: Any) -> Any:
    """A gradient as a tensor or as rows, and raises if it is not one of this variable."""
    if gradient is None:
        return None
    gradient = distribute.as_gradient(gradient)
    shape, dtype = tuple(variable.shape), getattr(gradient.dtype, "name", str(gradient.dtype))
    if not dtype.startswith(("float", "bfloat", "int", "uint")):
        raise TypeError(f"grads[{place}], of {_path(variable)}, must have real numbers, got {dtype}.")
    if not distribute.may_have_shape(gradient, shape):
        raise ValueError(
            f"grads[{place}] must have the shape {shape} of {_path(variable)}, got "
            f"{distribute.described_shape(gradient)}."
        )
    return gradient


def _summed(grads: list[Any], variables: list[Any]) -> tuple[list[Any], list[Any]]:
    """One gradient for each different variable: those of a variable that is given twice are added up."""
    different = _different(variables)
    if len(different) == len(variables):
        return grads, variables
    sums: dict[int, Any] = {}
    for gradient, variable in zip(grads, variables, strict=True):
        key = distribute.key(variable)
        if gradient is not None:
            gradient = distribute.cast(gradient, at_least_float32(variable.dtype))
        sums[key] = distribute.add(sums.get(key), gradient, tuple(variable.shape))
    return [sums[distribute.key(v)] for v in different], different


def _values(grad: Any) -> Tensor:
    """The numbers of a Grad, of Rows or of a tensor."""
    return grad.values if isinstance(grad, Rows) else grad.value if isinstance(grad, Grad) else grad


def _sum_of_squares(grad: Any) -> Tensor:
    squares = ops.square(_values(grad))
    return ops.sum(ops.where(grad.first, squares, ops.zeros_like(squares)) if isinstance(grad, Rows) else squares)


def _first_bad(grads: Sequence[tuple[int, Tensor]]) -> tuple[Tensor, Tensor]:
    """Whether all gradients are finite, and (bucket, place in it) of the first number that is not.

    One pass, without a condition, since XLA takes seconds to compile both branches for many buckets.
    """
    places, sizes = [], []
    for _, values in grads:
        flags = ops.isfinite(ops.reshape(values, (-1,)))
        size = ops.shape(flags)[0]  # of rows it may be known in the step alone
        numbered = ops.where(flags, size, ops.arange(size, dtype="int32"))
        places.append(ops.cast(ops.min(numbered, initial=size), "int32"))  # there may be none
        sizes.append(ops.cast(size, "int32"))
    found = ops.stack(places)
    finite = ops.equal(found, ops.stack(sizes))
    first = ops.argmin(ops.cast(finite, "int32"))
    numbers = ops.convert_to_tensor([b for b, _ in grads], "int32")
    return ops.all(finite), ops.stack([ops.take(numbers, first), ops.take(found, first)])


def _unless_nonfinite(state: State, new: State, prepared: _Prepared) -> State:
    """The new state if all gradients are finite, else the old one; what was met is counted."""
    finite, counts = prepared.finite, state["nonfinite"]
    kept = tree.map_structure(lambda old, value: value if value is old else ops.where(finite, value, old), state, new)
    bad = ops.cast(ops.logical_not(finite), counts["skipped"].dtype)
    bucket, place = ops.unstack(ops.cast(prepared.position, counts["bucket"].dtype), 2)
    return kept | {
        "nonfinite": {
            "skipped": counts["skipped"] + bad,
            "in_a_row": (counts["in_a_row"] + bad) * bad,
            "bucket": ops.where(finite, counts["bucket"], bucket),
            "place": ops.where(finite, counts["place"], place),
        }
    }


def _memo(dynamic: Sequence[Value], read: Sequence[Tensor]) -> dict[Any, Tensor]:
    """What `Hyper` remembers at the start of a step: the present values of schedules."""
    return {("value", id(value)): tensor for value, tensor in zip(dynamic, read, strict=True)}


def _shrink(sum_of_squares: Tensor, limit: float) -> Tensor:
    """The factor that brings a tensor with this sum of squares down to the norm `limit`; NaN goes through."""
    return limit / ops.maximum(ops.sqrt(sum_of_squares), limit)


def _as_number(value: Any) -> Any:
    return ops.convert_to_numpy(value).item() if is_dynamic(value) or ops.is_tensor(value) else value


def _as_written(variable: keras.Variable) -> Any:
    """The value of a scalar variable as one would write it: 0.1 where a float32 holds 0.100000001490116."""
    value = ops.convert_to_numpy(variable)
    return float(str(value)) if value.dtype == "float32" else value.item()


def _checked_decay(name: str, value: Value | None) -> Value | None:
    return value if is_dynamic(value) else arguments.real(name, value, 0, optional=True)


def _positive(name: str, value: Any) -> Any:
    return arguments.real(name, value, 0, closed="neither", optional=True)


def _checked_patterns(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a list of regular expressions or None, got {value!r}.")
    return [checked_pattern(name, pattern) for pattern in value]


def _refused(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(f"{name} must be None, got {value!r}: the average is put into the model by swap_weights.")


#: How each common keyword is checked, whether it is given to the constructor or set as an attribute.
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "weight_decay": _checked_decay,
    "clipnorm": _positive,
    "clipvalue": _positive,
    "global_clipnorm": _positive,
    "gradient_accumulation_steps": lambda name, value: arguments.integer(name, value, 2, optional=True),
    "use_ema": arguments.boolean,
    "ema_momentum": lambda name, value: arguments.real(name, value, 0, 1, closed="left"),
    "ema_overwrite_frequency": _refused,
    "skip_nonfinite": lambda name, value: arguments.integer(name, value, 1, optional=True),
    "decay_mask": lambda name, value: arguments.choice(name, value, ("auto", "all")),
    "decay_exclude": _checked_patterns,
    "layer_decay": lambda name, value: arguments.real(name, value, 0, 1, closed="right", optional=True),
    "sparse": lambda name, value: arguments.choice(name, value, ("lazy", "dense")),
    "fuse": lambda name, value: arguments.choice(name, value, ("auto", True, False)),
    "master_weights": arguments.boolean,
    "stochastic_rounding": arguments.boolean,
    "slot_dtype": lambda name, value: arguments.choice(name, value, (None, "float32", "bfloat16")),
    "loss_scale_factor": _positive,
}

#: Attributes that have no setter, and what to do instead.
_READ_ONLY = {
    "groups": "they decide about the state and are given to the constructor. Make a new optimizer.",
    "iterations": "it is a variable, which counts the updates. Use optimizer.iterations.assign(n).",
    "evaluating": "it says which weights the model holds. Use optimizer.swap_weights(evaluating).",
}

#: What other libraries and older versions of Keras call hyperparameters that have other names here.
_ELSEWHERE = {
    "lr": ("learning_rate",),
    "lr_schedule": ("learning_rate",),
    "learning_rate_schedule": ("learning_rate",),
    "decay": ("weight_decay", "learning_rate"),  # in old versions of Keras that of the rate, by a schedule here
    "wd": ("weight_decay",),
    "l2": ("weight_decay",),
    "betas": ("beta_1", "beta_2"),
    "b1": ("beta_1",),
    "b2": ("beta_2",),
    "eps": ("epsilon",),
    "use_nesterov": ("nesterov",),
    "grad_clip": ("clipvalue", "global_clipnorm"),
    "gradient_clip": ("clipvalue", "global_clipnorm"),
    "grad_norm": ("global_clipnorm",),
    "max_norm": ("global_clipnorm",),
    "max_grad_norm": ("global_clipnorm",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "ema": ("use_ema",),
    "ema_decay": ("ema_momentum",),
}

#: Keywords of which at most one can be given.
_EXCLUSIVE = (("clipnorm", "clipvalue", "global_clipnorm"), ("master_weights", "stochastic_rounding"))

#: Keywords that decide about the state there is and the packing.
_COUNTS = ("gradient_accumulation_steps", "skip_nonfinite")
_BEFORE_BUILD = {
    *_COUNTS,
    "use_ema",
    "decay_mask",
    "decay_exclude",
    "layer_blocks",
    "layer_decay",
    "master_weights",
    "stochastic_rounding",
    "slot_dtype",
}


class _Function(Schedule):
    """A learning rate that is a function without arguments, as a schedule that does not look at the update count."""

    def __init__(self, function: Callable[[], Any]):
        self.function = function

    def __call__(self, step: Any) -> Any:
        return self.function()


def _scheduled_rate(scheduled: Tensor, multiplier: Tensor) -> Tensor:
    """The rate of a schedule; a negative multiplier is the negative of a rate that has replaced the schedule."""
    return ops.where(multiplier < 0, -multiplier, ops.cast(scheduled, scalar_dtype()) * multiplier)


def _schedule_and_multiplier(learning_rate: Any) -> tuple[Schedule | None, float]:
    if isinstance(learning_rate, Schedule):
        return learning_rate, 1.0
    if callable(learning_rate) and not is_dynamic(learning_rate):
        arguments.without_arguments("learning_rate", learning_rate)
        return _Function(learning_rate), 1.0
    try:
        return None, arguments.real("learning_rate", learning_rate, 0)
    except TypeError:
        raise TypeError(
            "learning_rate must be a number >= 0, a keras LearningRateSchedule or a function without arguments, got "
            f"{learning_rate!r} of type {type(learning_rate).__name__}."
        ) from None

"""The part of `Optimizer` that knows its variables: how they are packed and treated, and which state they have."""

from __future__ import annotations

import dataclasses
import re
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import tree

from keras_optkit import backend
from keras_optkit.optimizers.engine.codecs import QUANTISED_FROM
from keras_optkit.optimizers.engine.files import Legacy, SavedState, is_opening
from keras_optkit.optimizers.engine.gradients import different
from keras_optkit.optimizers.engine.packing import REPEATED, Bucket, pack
from keras_optkit.optimizers.engine.placing import places as places_of
from keras_optkit.optimizers.engine.placing import warn_unless_spread
from keras_optkit.optimizers.engine.plan import Keywords, Plan, layout_for, with_routes
from keras_optkit.optimizers.engine.state import State, for_buckets, joined, once, refuse_unless_quantised
from keras_optkit.optimizers.groups import (
    Group,
    Places,
    Treatment,
    near_misses,
    treatments,
)
from keras_optkit.optimizers.groups import keras_path as _path
from keras_optkit.optimizers.rule import is_dynamic
from keras_optkit.optimizers.transforms.clipping import ClipByGlobalNorm, ClipByNorm, ClipByValue
from keras_optkit.optimizers.transforms.transform import Transform


@dataclass
class Held:
    """What an optimizer holds where Keras's and TensorFlow's attribute tracking does not wrap lists and dicts.

    Attributes:
        own: The variables that it has made.
        names: Their names.
        variables: The weights that it was built for, in the order in which they joined.
        places: The place of each in the model's order.
        buckets: How they are packed.
        state: Their state, and what there is once; empty before it is built.
        pending: State that was loaded before there was something to train.
        decay_exclude: See `Optimizer.decay_exclude`.
        undecayed: The weights that `exclude_from_weight_decay` was given, by key; None for none.
        used: Whether there was a step.
        has_perturbed: Whether it was asked for weights to compute a second gradient at, since the last update.
        perturbed: Whether the variables hold these weights.
        driven: Whether an update is being made with what a training step has computed besides the gradient.
        extras: What was computed for the next update besides its gradient, by thread (replicas are traced in turns)
            and by name, for each variable by key; see `Provided`.
        in_compiled_fit: Whether a `fit` is running whose steps are compiled.
        opened: Whether it was made while a model was opened, and its state has not been read.
        model: The model that it trains, weakly.
        groups: See `Optimizer.groups`.
        inner: Of a wrapper, the config of the inner optimizer.
        transforms: See `Optimizer.transforms`.
    """

    groups: list[Group] | None
    transforms: tuple[Transform, ...] | None
    opened: bool
    own: list[keras.Variable] = field(default_factory=list)
    names: set[str] = field(default_factory=lambda: {"iteration"})
    variables: list[Any] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    buckets: tuple[Bucket, ...] = ()
    state: State = State()
    pending: Any = None
    decay_exclude: list[str] | None = None
    undecayed: set[int] | None = None
    used: bool = False
    has_perturbed: bool = False
    perturbed: bool = False
    driven: bool = False
    extras: dict[tuple[int, str], dict[int, Any]] = field(default_factory=dict)
    in_compiled_fit: bool = False
    model: weakref.ref[Any] | None = None
    inner: dict[str, Any] = field(default_factory=dict)


def as_number(value: Any) -> Any:
    """A scalar variable or tensor as a Python number; a number as it is."""
    dynamic = is_dynamic(value) or keras.ops.is_tensor(value)
    return keras.ops.convert_to_numpy(value).item() if dynamic else value


class Built(SavedState):
    """The variables of an optimizer, and the state that it has for them."""

    @property
    def variables(self) -> list[Any]:
        """All variables of the optimizer; their order and packing may change."""
        kept = tree.flatten(self._held.state._replace(weights=()))
        # those that are attributes, then the state, in an order that does not depend on when it was made
        found = [*super().variables, *kept, *self._held.own, *self._given()]
        return list({id(variable): variable for variable in found}.values())

    @property
    def state_dtype(self) -> str | None:
        """Another name for `slot_dtype`."""
        return self.slot_dtype

    @state_dtype.setter
    def state_dtype(self, value: str | None) -> None:
        self.slot_dtype = value

    def _given(self) -> list[keras.Variable]:
        """Hyperparameters that are variables, outside of TensorFlow, where a compiled step reads none but these."""
        if backend.TENSORFLOW or "rule" not in self.__dict__:
            return []
        parts = [*(routed.rule for routed in with_routes(self._rules).values()), *(self._held.transforms or ())]
        return [v for part in parts for v in part.hyperparameters() if isinstance(v, keras.Variable)]

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

        Pass a list or, in a loop of your own, the model, so that groups can match the paths of its layers.

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
        variables = different(variables)
        if self._held.variables:
            self._extend(variables)
            return
        if self.built and not variables:
            return
        backend.refuse_unsupported_strategy()
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
            with backend.outside_graph():
                self._restore(pending, waited=True)

    def _build_keras(self, variables: list[Any]) -> None:
        """Keras's own part of `build`, but for the average and the accumulators that it would make besides ours."""
        ours = {name: self.__dict__[name] for name in ("use_ema", "gradient_accumulation_steps")}
        self.__dict__.update(use_ema=False, gradient_accumulation_steps=None)
        super().build(variables)
        self.__dict__.update(ours)

    def begin_training(self, variables: Sequence[Any] | None, *, inside: bool = False) -> None:
        """Called by `fit` and `train_on_batch` when they begin: does what a step cannot do, or not in time.

        Restores the training weights. Outside of TensorFlow, where a step creates no state, variables that the
        optimizer was not built with join.

        Args:
            variables: The weights to train; None: those it was built with.
            inside: Whether the optimizer is inside of another one that has no room for more variables, such as
                `keras.optimizers.LossScaleOptimizer`.

        Raises:
            ValueError: Outside of TensorFlow, if variables are missing, or if some join and another optimizer, which
                has no room for them, is around this one.
        """
        if self.built and variables is not None and not backend.TENSORFLOW:
            known = len(self._held.variables)
            if len(variables) < known or (inside and len(variables) > known):
                raise ValueError(
                    f"{self.name} was built for {known} variables and cannot continue with {len(variables)} on the "
                    f"{keras.config.backend()} backend. Compile the model with a new optimizer."
                )
        if self.built and variables and (not backend.TENSORFLOW or self._held.pending is not None):
            with backend.scope_of(self._updates):
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
            with backend.outside_graph():
                since = [as_number(self._updates)] * len(new)
        buckets = self._pack(new, variables, since)
        refuse_unless_quantised(self.name, self._keywords(), with_routes(self._rules), [*self._held.buckets, *buckets])
        if self.stochastic_rounding and any(b.dtype == "float16" for b in buckets):
            raise ValueError(
                "stochastic_rounding=True is for bfloat16 weights, got float16 ones. Use master_weights=True for them."
            )
        held, first = self._held, len(self._held.variables)
        with backend.outside_graph():
            make, keywords, rules = self.add_variable, self._keywords(), with_routes(self._rules)
            if not held.state.has("iterations"):
                held.state = once(make, keywords, rules, self._updates, self._multiplier)
            more = for_buckets(make, keywords, rules, buckets, new, joining=bool(held.variables))
            warn_unless_spread(self.name, buckets, more, new)
            held.state = joined(held.state, more)
        held.variables = [*held.variables, *new]
        held.buckets = (*held.buckets, *(b.moved(first) for b in buckets))
        order = {backend.key(v): place for place, v in enumerate(variables)}
        held.places = [order[backend.key(v)] for v in held.variables]

    def _extend(self, variables: list[Any]) -> None:
        """Makes room for variables that the optimizer was not built with."""
        known = {backend.key(v): i for i, v in enumerate(self._held.variables)}
        given = {backend.key(v) for v in variables}
        new = [_path(v) for v in variables if backend.key(v) not in known]
        if not new:
            return
        if not given.issuperset(known):
            raise ValueError(
                f"Unknown variables {', '.join(new)}: {self.name} was built for {len(known)} variables, and only "
                f"{len(given & set(known))} of them are here. It can continue with more variables, but not others: "
                "make a new optimizer for another model."
            )
        self._add([v for v in variables if backend.key(v) not in known], variables)
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
            places.weights(variables),
            self._rules,
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
                others = [_path(v) for v in found if backend.key(v) not in chosen]
                if others:
                    raise ValueError(
                        f"var_list of exclude_from_weight_decay cannot be told by path from {', '.join(others)}, which "
                        "is not in it. Give the layers different names."
                    )
        return [any(re.search(pattern, path) for pattern in patterns for path in theirs) for theirs in paths]

    def _pack(self, new: Sequence[Any], variables: Sequence[Any], since: Sequence[int]) -> tuple[Bucket, ...]:
        if not variables:
            return ()
        places = self._places(variables)
        treatment = dict(zip(map(backend.key, variables), self._treatments(variables, places)[0], strict=True))
        weight = dict(zip(map(backend.key, variables), places.weights(variables), strict=True))
        if all(value is None for value in treatment.values()):
            raise ValueError(f"{self.name} has nothing to train: its groups freeze all {len(variables)} variables.")
        rules = with_routes(self._rules)
        on_devices = places_of(new, shard_state=self.shard_state)
        buckets = pack(
            [weight[backend.key(v)] for v in new],
            [treatment[backend.key(v)] for v in new],
            layout=lambda treatment: layout_for(rules[treatment.rule, treatment.route].rule, self._transforms()),
            below=min(self.pack_below, QUANTISED_FROM) if self.slot_dtype == "int8" else self.pack_below,
            alone=lambda i: getattr(new[i], "constraint", None) is not None or on_devices.alone(i),
            flat=lambda i: on_devices.flat(i, tuple(new[i].shape)),
            since=since,
            repeated=REPEATED,
        )
        return on_devices.given_to(buckets)

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
        held.variables, held.places, held.buckets, held.state = [], [], (), State()
        self._add(variables, variables, since)

    def _renew_treatments(self) -> None:
        """How the variables are treated now that others have joined: `layer_decay` counts from the last layer."""
        held = self._held
        found = self._treatments(self._in_model_order())[0]
        now = [[_along(found[held.places[i]], bucket) for i in bucket.indices] for bucket in held.buckets]
        if all(len(set(treatments)) == 1 for treatments in now):
            pairs = zip(held.buckets, now, strict=True)
            held.buckets = tuple(dataclasses.replace(bucket, treatment=first) for bucket, (first, *_) in pairs)
            return
        saved: dict[str, Any] = {}  # some of one bucket are not treated alike any more
        with backend.outside_graph():
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

    def _keywords(self) -> Keywords:
        return Keywords(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Keywords)})

    def _plan(self) -> Plan:
        held = self._held
        firsts = [held.variables[bucket.indices[0]] for bucket in held.buckets]
        constraints = [getattr(variable, "constraint", None) for variable in firsts]
        rules, keywords = with_routes(self._rules), self._keywords()
        transforms = self._transforms()
        return Plan(self.name, held.buckets, constraints, rules, keywords, self._schedule, transforms, held.places)

    def _transforms(self) -> list[Transform]:
        """Those that the keywords for clipping stand for, then those that were given."""
        makes = {"clipvalue": ClipByValue, "clipnorm": ClipByNorm, "global_clipnorm": ClipByGlobalNorm}
        limits = {name: getattr(self, name) for name in makes}
        clipping = [makes[name](limit) for name, limit in limits.items() if limit is not None]
        return [*clipping, *(self._held.transforms or ())]


def _along(treatment: Treatment | None, bucket: Bucket) -> Treatment | None:
    """A treatment by the rule that there is state for: the last layer, which routes may go by, can change."""
    return treatment and dataclasses.replace(treatment, route=bucket.treatment.route)

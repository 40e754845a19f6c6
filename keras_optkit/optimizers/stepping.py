"""The part of `Optimizer` that makes updates: gradients are checked, put in order and handed to the engine."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.building import Built, as_number
from keras_optkit.optimizers.engine import gradients
from keras_optkit.optimizers.engine.estimates import estimates_of
from keras_optkit.optimizers.engine.plan import RuleId, with_routes
from keras_optkit.optimizers.engine.run import perturbed, run, values
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.groups import keras_path as _path
from keras_optkit.optimizers.rule import Tensor, estimates

#: With `fuse="auto"` the update is compiled if its loops have at least so many elements on average. A loop takes XLA
#: about 20 ms to compile, and saves about 3 ns for each element.
COMPILE_ABOVE = 2**15

#: How many `fixed_gradients` there are around what runs at present.
_fixed = 0


@contextlib.contextmanager
def fixed_gradients() -> Iterator[None]:
    """For tests whose gradients do not depend on the weights, where a second gradient would equal the first."""
    global _fixed
    _fixed += 1
    try:
        yield
    finally:
        _fixed -= 1


class Stepping(Built):
    """The methods of `Optimizer` that make updates."""

    @backend.untraced
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
        self._refuse_first_gradient()
        grads, variables = self._checked(grads, trainable_variables)
        if not variables:  # a frozen model
            return
        self._held.used = True
        fuse = backend.on_cpu(self._updates) and self._is_worth_compiling() if self.fuse == "auto" else bool(self.fuse)
        plan, state = self._plan(), self._held.state
        run(plan, state, gradients.of_buckets(plan, state, self._in_order(grads, variables)), fuse=fuse)

    def _checked(
        self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any] | None
    ) -> tuple[list[Any], list[Any]]:
        """The gradients and variables that a method was given, each variable once; the optimizer is built for them."""
        grads = list(grads)
        if trainable_variables is None:
            if not self.built:
                raise ValueError(f"{self.name} is not built yet; pass the variables, or call build(variables) first.")
            variables = self._in_model_order()
        else:
            variables = list(trainable_variables)
        if len(grads) != len(variables):
            raise ValueError(f"grads must match the variables one to one, got {len(grads)} for {len(variables)}.")
        grads = [gradients.checked(i, g, v) for i, (g, v) in enumerate(zip(grads, variables, strict=True))]
        grads, variables = gradients.summed(grads, variables)
        if trainable_variables is not None:
            self.build(variables)
        return grads, variables

    # -- the second gradient -------------------------------------------------------------------------------------------

    @property
    def needs_second_gradient(self) -> bool:
        """Whether `apply` takes the gradient at weights that a first gradient has moved; see `perturbed`."""
        return any("second_gradient" in rule.needs for rule in self._rules.values())

    @contextlib.contextmanager
    def perturbed(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any]) -> Iterator[None]:
        """A context for computing the second gradient: in it, the variables hold the weights to compute it at.

        For loops of your own with `SAM`; `fit` and `train_on_batch` do it, also with a `train_step` of your own.

        Args:
            grads: The gradient at the weights as they are.
            trainable_variables: The variables, which have their values again at the end.

        Raises:
            TypeError: If a gradient is not made of real numbers.
            ValueError: If the optimizer takes one gradient alone, and as `apply` does.
        """
        variables = list(trainable_variables)
        before = [ops.copy(backend.tensor(v)) for v in variables]
        backend.assign(variables, self.perturbed_values(grads, variables))
        self._held.perturbed = True
        try:
            yield
        finally:
            self._held.perturbed = False
            backend.assign(variables, before)

    @backend.untraced
    def perturbed_values(self, grads: Sequence[Tensor | None], trainable_variables: Sequence[Any]) -> list[Tensor]:
        """The weights to compute the second gradient at, for each variable; nothing is changed.

        On JAX for use inside of a `keras.StatelessScope` with the state of the optimizer and the weights.

        Args:
            grads: The gradient at the weights as they are, as for `apply`.
            trainable_variables: The variables.
        """
        if not self.needs_second_gradient:
            raise ValueError(f"{self.name} takes one gradient alone: no rule of {type(self).__name__} needs a second.")
        variables = list(trainable_variables)
        given, known = self._checked(grads, variables)
        self._held.has_perturbed = True
        plan, state = self._plan(), self._held.state
        found: dict[int, Tensor] = {}
        if known:
            buckets = gradients.of_buckets(plan, state, self._in_order(given, known), dense=True)
            moved = perturbed(plan, state, buckets)
            for bucket, values in zip(plan.buckets, moved, strict=True):
                if values is not None:
                    keys = [backend.key(self._held.variables[i]) for i in bucket.indices]
                    found |= dict(zip(keys, bucket.split(values), strict=True))
        return [found.get(backend.key(v), backend.tensor(v)) for v in variables]

    @contextlib.contextmanager
    def given_second_gradient(self) -> Iterator[None]:
        """Around an update with a second gradient that a training step has computed."""
        self._held.driven = True
        try:
            yield
        finally:
            self._held.driven = self._held.has_perturbed = False

    def _refuse_first_gradient(self) -> None:
        """Raises unless somebody has computed a second gradient since the last update."""
        held = self._held
        if not self.needs_second_gradient or held.driven or _fixed:
            return
        if held.perturbed:
            raise ValueError(
                f"{self.name}: `apply` must be called after the block `with optimizer.perturbed(...)`, not inside: at "
                "its end the variables have their values again."
            )
        if not held.has_perturbed:
            raise ValueError(
                f"{self.name} needs a second gradient, at weights that the first has moved. `fit` and `train_on_batch` "
                "compute it; in a loop of your own, compute it inside of `with optimizer.perturbed(grads, variables):` "
                "and call `apply` with it after that, once."
            )
        if not backend.is_one_of_several_replicas():  # which are traced in turns
            held.has_perturbed = False

    # -- more about the step -------------------------------------------------------------------------------------------

    def _is_worth_compiling(self) -> bool:
        """Whether XLA's loops, each of which takes it a while to compile, have enough elements on average."""
        state, buckets = self._held.state, self._held.buckets
        rules = with_routes(self._rules)
        if any(rules[bucket.rule].rule.decomposes for bucket in buckets):
            return False
        loops: int = sum(1 + len(slots) for slots in state.slots)
        each = [self.use_ema, self.gradient_accumulation_steps, self.skip_nonfinite, *self._transforms()]
        loops += len(buckets) * sum(map(bool, each))
        return sum(math.prod(shape) for bucket in buckets for shape in bucket.shapes) >= loops * COMPILE_ABOVE

    def flush(self) -> None:
        """Updates the weights with the mean gradient of the micro-batches since the last update, if there are any.

        For `gradient_accumulation_steps`: `fit` calls it at the end of every epoch, so that an epoch whose number of
        batches k does not divide ends with a smaller update, as it does with large batches. Call it in a loop of your
        own, outside of `tf.function`. Without accumulation nothing happens.
        """
        if not (self.gradient_accumulation_steps and self.built and as_number(self._held.state.micro)):
            return
        with backend.scope_of(self._updates):
            run(self._plan(), self._held.state, [None] * len(self._held.buckets), flush=True)

    def accumulated_gradients(self) -> tuple[dict[int, Tensor], Tensor]:
        """The sums of the gradients of the micro-batches since the last update, and of how many they are.

        Returns:
            The sum for each variable, by `backend.key`, and the number; of a built optimizer with
            `gradient_accumulation_steps`.
        """
        held = self._held
        sums: dict[int, Tensor] = {}
        for bucket, stored in zip(held.buckets, held.state.accumulated, strict=True):
            parts = bucket.split(bucket.view(ops.copy(stored)))
            sums |= {backend.key(held.variables[i]): part for i, part in zip(bucket.indices, parts, strict=True)}
        return sums, ops.copy(held.state.micro)

    def watched_estimates(self) -> Callable[[], dict[RuleId, Tensor]]:
        """A function that returns the estimates of the rules that find their learning rate.

        If there is an update between this call and that of the function, they are those that the update has used; see
        `engine/estimates.py`.
        """
        if not any(estimates(routed.rule) for routed in with_routes(self._rules).values()):
            return dict

        def read(*, slots: bool) -> State:  # an optimizer that is not built has two variables
            state = self._held.state._replace(iterations=self._updates, multiplier=self._multiplier)
            return values(state, slots=slots)

        before = read(slots=False)
        return lambda: estimates_of(self._plan(), read(slots=True), before)

    def _in_order(self, grads: list[Tensor | None], variables: Sequence[Any]) -> list[Tensor | None]:
        """One gradient or None for each variable the optimizer was built with."""
        missing = [_path(v) for g, v in zip(grads, variables, strict=True) if g is None]
        if len(missing) == len(grads):
            raise ValueError(f"No gradients provided for any variable; the variables are {missing}.")
        if missing:
            warnings.warn(f"Gradients do not exist for variables {missing}; they are left as they are.", stacklevel=3)
        places = {backend.key(v): i for i, v in enumerate(self._held.variables)}
        ordered: list[Tensor | None] = [None] * len(places)
        for grad, variable in zip(grads, variables, strict=True):
            place = places.get(backend.key(variable))
            if place is None:
                raise ValueError(f"Unknown variable {_path(variable)}: {self.name} was built for others.")
            ordered[place] = grad
        return ordered

"""The part of `Optimizer` that makes updates: gradients are checked, put in order and handed to the engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from keras_optkit import backend
from keras_optkit.optimizers.building import as_number
from keras_optkit.optimizers.engine import gradients
from keras_optkit.optimizers.engine.estimates import estimates_of
from keras_optkit.optimizers.engine.plan import RuleId, with_routes
from keras_optkit.optimizers.engine.run import run, values
from keras_optkit.optimizers.engine.state import State
from keras_optkit.optimizers.provided import Provided
from keras_optkit.optimizers.rule import Tensor, estimates

#: With `fuse="auto"` the update is compiled if its loops have at least so many elements on average. A loop takes XLA
#: about 20 ms to compile, and saves about 3 ns for each element.
COMPILE_ABOVE = 2**15


class Stepping(Provided):
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
        extras = self._provided()
        grads, variables = self._checked(grads, trainable_variables)
        if not variables:  # a frozen model
            return
        self._held.used = True
        fuse = backend.on_cpu(self._updates) and self._is_worth_compiling() if self.fuse == "auto" else bool(self.fuse)
        plan, state = self._plan(), self._held.state
        ordered = self._in_order(grads, variables)
        buckets = gradients.of_buckets(plan, state, ordered, self._extras_in_order(extras, ordered))
        run(plan, state, buckets, fuse=fuse)

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
